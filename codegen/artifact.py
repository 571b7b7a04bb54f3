"""Writes artifacts (the format is described in `sparsec.runtime.artifact`).

Everything is written into a folder beside the final one, which it then replaces by renaming: whoever looks sees the
old artifact or the new one, and an error, a full disk or Ctrl-C leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec import __version__
from sparsec.codegen.emit import Emitted
from sparsec.codegen.shards import write_shard
from sparsec.runtime.artifact import FORMAT, VERSION, Artifact, Progress, digest_line, is_safe, rank_folder
from sparsec.runtime.banks import bank_slots
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.plan import Arg, Plan
from sparsec.runtime.plan_json import to_json

__all__ = ["SHARD", "Progress", "checked_place", "rewrite_kernels", "write_artifact"]

SHARD = 512 << 20
"""Bytes of a shard where nothing else is asked for."""


def checked_place(path: Path) -> Path:
    """The folder that an artifact named `path` takes; can be asked before the work.

    Raises: ArtifactError if it is no name, or taken by something that is no artifact.
    """
    if not path.name:
        raise ArtifactError(
            f"{path} is no name for an artifact: give a folder to make, such as {path / 'model.sparsec'}"
        )
    path = path if path.suffix == ".sparsec" else path.with_name(path.name + ".sparsec")
    if path.is_symlink() or (path.exists() and not _is_replaceable(path)):
        raise ArtifactError(f"{path} exists and is no sparsec artifact: choose another name or remove it")
    return path


def write_artifact(
    path: str | Path,
    emitted: Emitted,
    weights: Mapping[str, Tensor],
    *,
    target: str,
    text: str = "",
    stored: str = "model",
    generation: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    of_rank: Callable[[int], Mapping[str, Tensor]] | None = None,
    placement: bytes = b"",
    shard: int = SHARD,
    progress: Progress | None = None,
) -> Path:
    """Write an artifact and return its path.

    Args:
        path: the folder to make; `.sparsec` is appended if its name lacks it. An artifact there is replaced.
        emitted: plan and kernel files.
        weights: source name -> tensor for all that the plan reads. Asked for one at a time; at most one shard of them
            is held at once, so a mapping that makes tensors on demand bounds the memory.
        target: what the plan was compiled for.
        text: the IR after `lower`.
        stored: how the experts' weights are stored: `model`, `int8`, `int4`, `fp8` or `mxfp4`.
        generation: how text is generated with it, as of `sparsec.runtime.generate`.
        tokenizer: a `tokenizer.json` to take along.
        of_rank: the weights of a rank, for a plan that is spread over several; asked for one rank after the other.
        placement: the `plan.json` of a plan that is spread, to take along.
        shard: most bytes of tensors in one file, unless a single tensor has more.
        progress: called with the bytes written so far and in all.

    Raises:
        ArtifactError: the place is taken by something else, a weight is missing or has no values, or the disk refuses.
    """
    path = checked_place(Path(path))
    plan = emitted.plan
    small = {"plan.json": json.dumps(to_json(plan), allow_nan=False).encode(), **emitted.files}
    if text:
        small["module.sparsec"] = text.encode()
    if generation is not None:
        small["generation.json"] = json.dumps(dict(generation), allow_nan=False).encode()
    if tokenizer is not None:
        small["tokenizer.json"] = _read(tokenizer)
    if placement:
        small["placement.json"] = placement
    for name in small:
        if not is_safe(name):
            raise ArtifactError(f"'{name}' cannot be the name of a file in an artifact")
    with _whole(path) as folder:
        ranks, local = _ranks(plan), plan.local()
        sizes = [_size(arg) * (ranks if arg.source in local else 1) for arg in _stored(plan)]
        writer = _Writer(folder, sum(map(len, small.values())) + sum(sizes), progress)
        for name, content in small.items():
            writer.write(name, content)
        banks = bank_slots(plan)
        common = [arg for arg in _stored(plan) if arg.source not in local]
        aliases = writer.write_weights("weights", common, banks, weights, shard)
        own = [arg for arg in _stored(plan) if arg.source in local]
        for rank in range(ranks) if own else ():
            assert of_rank is not None, "a plan that is spread has weights of ranks"
            writer.write_weights(rank_folder(rank), own, banks, of_rank(rank), shard)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "sparsec": __version__,
            "torch": torch.__version__,
            "target": target,
            "weights": stored,
            "files": writer.entries,
            "aliases": aliases,
            **({} if plan.spread is None else {"ranks": ranks}),
        }
        _write_manifest(folder, manifest)
    return path


def rewrite_kernels(artifact: Artifact, plan: Plan, files: Mapping[str, bytes], text: str) -> None:
    """Give an artifact another plan and text, and the kernel files that the plan reads; weights stay as they are.

    The folder is replaced at once; an error leaves the artifact as it was.

    Args:
        plan: as the artifact's, but for the kernels' variants.
        files: new kernel files. Those that the plan goes on reading are taken from the artifact.
        text: the IR.

    Raises:
        ArtifactError: a file that is kept is damaged, or the disk refuses.
    """
    read = {f"kernels/{name}.py" for name in plan.kernels} | set(_files_of(plan))
    old: dict[str, dict[str, Any]] = artifact.manifest["files"]
    kernels = {name: artifact.read(name) for name in old if name in read and name not in files}
    renewed = {"plan.json": json.dumps(to_json(plan), allow_nan=False).encode(), "module.sparsec": text.encode()}
    with _whole(artifact.path) as folder:
        writer = _Writer(folder, 0, None)
        for name, content in {**renewed, **kernels, **files}.items():
            writer.write(name, content)
        for name, entry in old.items():
            if name not in writer.entries and not name.startswith("kernels/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _link(artifact.path / name, folder / name)
                writer.entries[name] = entry
        _write_manifest(folder, {**artifact.manifest, "files": writer.entries})


def _files_of(plan: Plan) -> Generator[str]:
    """The binaries that a plan's kernels name."""
    for kernel in plan.kernels.values():
        yield from kernel.binaries.values()
        for variant in kernel.variants:
            yield from (launch["file"] for launch in variant.config.get("launches", ()))


def _link(source: Path, place: Path) -> None:
    """The same file under another name; a copy where the disk knows no links."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    raw = json.dumps(manifest, indent=1).encode()
    (folder / "manifest.json").write_bytes(raw)
    (folder / "manifest.sha256").write_bytes(digest_line(raw))


class _Writer:
    """Writes files into a folder and keeps what the manifest says about them."""

    def __init__(self, folder: Path, total: int, progress: Progress | None) -> None:
        self.folder, self.progress = folder, progress
        self.total, self.done = total, 0
        self.entries: dict[str, dict[str, Any]] = {}

    def write(self, name: str, content: bytes) -> None:
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        self._enter(name, len(content), hashlib.sha256(content).hexdigest())

    def write_weights(
        self, folder: str, args: Sequence[Arg], banks: Collection[int], weights: Mapping[str, Tensor], limit: int
    ) -> dict[str, str]:
        """Write the tensors of arguments. Returns: names that share another's tensor -> that name.

        Those in the slots `banks` have files of their own: once they are packed, nothing keeps the files mapped. Only
        what all ranks read shares: what a rank has of its own is written as it is.
        """
        aliases = dict[str, str]()
        seen: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], str]] = {}
        shard, size = dict[str, Tensor](), 0
        kind = False
        for arg in sorted(args, key=lambda arg: arg.slot in banks):
            kind, other = arg.slot in banks, (arg.slot in banks) != kind
            if shard and (other or size + _size(arg) > limit):
                self._write_shard(folder, shard)
                shard, size = {}, 0
            tensor = _tensor(weights, arg)
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            known = seen.get(key) if folder == "weights" else None
            # Only while the first one lives does an equal address mean the same memory.
            if known is not None and known[0]() is not None and tensor.numel():
                aliases[arg.source] = known[1]
                continue
            seen[key] = weakref.ref(tensor), arg.source
            shard[arg.source] = tensor
            size += _size(arg)
            del tensor
        if shard:
            self._write_shard(folder, shard)
        return aliases

    def _write_shard(self, folder: str, tensors: dict[str, Tensor]) -> None:
        number = sum(name.startswith(f"{folder}/") for name in self.entries)
        name = f"{folder}/{number:05}.safetensors"
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        size, digest = write_shard(place, tensors)
        self._enter(name, size, digest)

    def _enter(self, name: str, size: int, digest: str) -> None:
        self.entries[name] = {"size": size, "sha256": digest}
        self.done += size
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


def _ranks(plan: Plan) -> int:
    return 1 if plan.spread is None else plan.spread.ranks


def _stored(plan: Plan) -> list[Arg]:
    """The arguments whose tensors are stored, each source once."""
    return list({arg.source: arg for arg in plan.args if arg.stored}.values())


def _size(arg: Arg) -> int:
    assert arg.type is not None
    size = DTYPES[arg.type.dtype].itemsize
    for dim in arg.type.shape:
        size *= int(dim)
    return size


def _tensor(weights: Mapping[str, Tensor], arg: Arg) -> Tensor:
    try:
        tensor = weights[arg.source]
    except KeyError:
        raise ArtifactError(f"the weights lack '{arg.source}', which the plan reads") from None
    assert arg.type is not None
    if tensor.is_meta:
        raise ArtifactError(f"'{arg.source}' is on the meta device: it has no values to write")
    if list(tensor.shape) != list(arg.type.shape) or tensor.dtype != DTYPES[arg.type.dtype]:
        raise ArtifactError(
            f"'{arg.source}' is {list(tensor.shape)} {tensor.dtype} in the weights, "
            f"{list(arg.type.shape)} {arg.type.dtype} in the plan"
        )
    return tensor


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None


def _is_replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / "manifest.json").is_file() or not any(path.iterdir()))


@contextlib.contextmanager
def _whole(path: Path) -> Generator[Path, None, None]:
    """A folder to write into that becomes `path` if the block ends well, and vanishes if it does not."""
    token = secrets.token_hex(4)
    new, old = path.with_name(f".{path.name}.new-{token}"), path.with_name(f".{path.name}.old-{token}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
