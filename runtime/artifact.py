"""Reads artifacts: a folder `NAME.sparsec` with a plan, weights and kernels, written by `sparsec.codegen.artifact`.

    manifest.json       format and versions, target, size and SHA-256 of every other file, names that share a tensor
    manifest.sha256     SHA-256 of manifest.json
    plan.json           what to run (`sparsec.runtime.plan`)
    module.sparsec      the IR that the plan was made of, for people
    weights/*.safetensors
    weights/ranks/00003/*.safetensors       of a model compiled for several devices: what rank 3 alone has
    kernels/*           sources and binaries
    generation.json, tokenizer.json     where the model generates text
    placement.json      the plan that a model was compiled for several devices by (`sparsec plan`)

Files are opened by the names in the manifest only; names that could leave the folder, and links, are refused. Hashes
say that nothing was damaged, not who wrote it: the binaries of GPU kernels run as they are, so load what you trust.
Native code for the CPU runs only where it was compiled by this user, or by leave of the caller (`trust_code`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsec.runtime import native
from sparsec.runtime.check_spread import MAX_RANKS
from sparsec.runtime.context import Choice
from sparsec.runtime.dtypes import SAFETENSORS
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.exchanges import own_rank, require_world
from sparsec.runtime.executor import Program
from sparsec.runtime.huge_pages import InHugePages
from sparsec.runtime.plan import Plan
from sparsec.runtime.plan_json import from_json

if TYPE_CHECKING:
    from sparsec.runtime.distributed import World

FORMAT = "sparsec-artifact"
VERSION = 3
"""Version of the format, raised with every change that older or newer readers cannot read."""

MAX_JSON = 1 << 28
"""Most bytes that a JSON file of an artifact may have."""

CHUNK = 1 << 20
MAX_READERS = 8  # files that are hashed at once: beyond, disks are what is waited for
_RANKS = "weights/ranks/"
_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*(/[A-Za-z0-9_+-][A-Za-z0-9_.+-]*)*")

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all."""


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files are all there and as they were written.

    Args:
        path: its folder.
        target: what it was compiled for (`cpu`, `cuda:sm_90` ...).
        manifest: as read.
        plan: what it runs.
        rank: whose files were read, of a model for several devices; None: everybody's.
    """

    path: Path
    target: str
    manifest: dict[str, Any]
    plan: Plan
    rank: int | None = None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Source name -> tensor, read on demand out of the mapped files; those of ranks only if it is of one."""
        return self.weights_of(self.rank)

    def weights_of(self, rank: int | None) -> Weights:
        """As `weights`, for a rank; None: what all have."""
        names = [name for name in self._names("weights/") if is_read_by(name, -1 if rank is None else rank)]
        return Weights(self.path, names, self.manifest["aliases"])

    def read(self, name: str) -> bytes:
        """The content of a file, compared with its hash. Raises: ArtifactError if it is damaged or not listed."""
        digest = self._digest(name)
        content = _read(self.path, name, self.manifest["files"][name]["size"])
        if hashlib.sha256(content).hexdigest() != digest:
            raise ArtifactError(f"{self.path} is damaged: '{name}' is not what was written")
        return content

    def paths(self, trust_code: bool = False) -> dict[str, Choice]:
        """Who would run the kernels that come as native code on this machine, by their names; nothing is loaded."""
        kernels = [kernel for kernel in self.plan.kernels.values() if kernel.backend == "cpp"]
        return {kernel.name: native.choose(kernel.binaries, self._digest, trust_code) for kernel in kernels}

    def json(self, name: str) -> Any:
        """A JSON file, None if the artifact has none of that name. Raises: ArtifactError."""
        return _parse(self.read(name), self.path, name) if name in self.manifest["files"] else None

    def program(
        self,
        device: str | torch.device | None = None,
        allow: Collection[str] = (),
        trust_code: bool = False,
        huge_pages: bool = False,
        world: World | None = None,
    ) -> Program:
        """Make the artifact ready to run.

        Args:
            device: where; the default is the kind of device that it was compiled for.
            allow, trust_code, world: as of `Program`.
            huge_pages: as of `load`.

        Raises:
            ArtifactError: it was compiled for another kind of device, or this machine has none of the kind.
        """
        kind = device_type(self.target)
        device = torch.device(kind if device is None else device)
        if device.type != kind:
            raise ArtifactError(
                f"{self.path} was compiled for {self.target} and cannot run on {device}: "
                f"compile it with --target {'cpu' if device.type == 'cpu' else 'cuda:sm_90, or what your GPU is'}"
            )
        if kind == "cuda" and not torch.cuda.is_available():
            raise ArtifactError(f"{self.path} was compiled for {self.target}, and torch sees no GPU on this machine")
        files = {name: self.read(name) for name in self._names("kernels/")}
        world = require_world(self.plan, world)
        weights = self.weights if world is None else self.weights_of(world.rank)
        given = InHugePages(weights) if huge_pages and kind == "cpu" else weights
        return Program(self.plan, given, device, files=files, allow=allow, trust_code=trust_code, world=world)

    def _digest(self, name: str) -> str:
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self.path} has no file '{name}'")
        return str(self.manifest["files"][name]["sha256"])

    def _names(self, prefix: str) -> list[str]:
        return [name for name in self.manifest["files"] if name.startswith(prefix)]


def device_type(target: str) -> str:
    """The kind of torch device that a target runs on (torch calls AMD's GPUs cuda too)."""
    return "cpu" if target == "cpu" else "cuda"


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    verify: bool = True,
    allow: Collection[str] = (),
    trust_code: bool = False,
    huge_pages: bool = False,
    world: World | None = None,
    progress: Progress | None = None,
) -> Program:
    """Load an artifact, ready to run.

    Weights are mapped from the files, and kernels read them there. Banks of experts that PyTorch runs on a CPU are
    packed into memory of their own, one at a time. Of a model that was compiled for several devices a rank reads its
    own files only.

    Args:
        device: where to run; the default follows from the artifact's target.
        verify: compare every file's hash. Without it only sizes and headers are checked.
        allow: namespaces or operators beyond PyTorch's own that the model may call.
        trust_code: run the artifact's native CPU kernels even if they were compiled elsewhere.
        huge_pages: read large weights into huge pages on a CPU instead of leaving them in the mapped files: loading
            takes as long as reading them, and decoding is then up to 15 % faster.
        world: as of `Program`.

    Raises:
        ArtifactError: not an artifact, damaged, of a newer format, for another target or number of processes, or not
            allowed to run.
    """
    artifact = open_artifact(path, verify=verify, rank=rank_of(Path(path), world), progress=progress)
    return artifact.program(device, allow, trust_code, huge_pages, world)


def rank_of(path: Path, world: World | None = None) -> int | None:
    """The rank that this process has among those that an artifact is for; None if it is for one device.

    Raises: ArtifactError, also where there are not as many processes.
    """
    ranks = _manifest(path).get("ranks")
    return None if ranks is None else own_rank(ranks, world)


def open_artifact(
    path: str | Path, *, verify: bool = True, rank: int | None = None, progress: Progress | None = None
) -> Artifact:
    """Read and check an artifact without making it ready to run.

    Args:
        rank: look at the files that this rank needs only; None: at all of them.

    Raises: ArtifactError.
    """
    path = Path(path)
    manifest = _manifest(path)
    files = {name: entry for name, entry in manifest["files"].items() if is_read_by(name, rank)}
    for name, entry in files.items():
        _check_file(path, name, entry["size"])
    if verify:
        _check_hashes(path, files, progress)
    if "plan.json" not in files:
        raise ArtifactError(f"{path} has no plan.json")
    plan = from_json(_parse(_read(path, "plan.json", files["plan.json"]["size"]), path, "plan.json"))
    if manifest.get("ranks") != (None if plan.spread is None else plan.spread.ranks):
        raise ArtifactError(f"{path}: the manifest and the plan are for different numbers of devices")
    artifact = Artifact(path, manifest["target"], manifest, plan, rank)
    for each in [rank] if rank is not None else range(manifest.get("ranks", 1)):
        _check_weights(artifact, each)
    return artifact


def rank_folder(rank: int) -> str:
    """Where the weights are that one rank alone has."""
    return f"{_RANKS}{rank:05}"


def is_read_by(name: str, rank: int | None) -> bool:
    """Whether a rank needs a file (None: all ranks together)."""
    return rank is None or not name.startswith(_RANKS) or name.startswith(f"{rank_folder(rank)}/")


class Weights(Mapping[str, Tensor]):
    """Tensors of safetensors files by name; files stay mapped while a tensor of theirs, or this object, lives."""

    def __init__(self, path: Path, files: Collection[str], aliases: Mapping[str, str]) -> None:
        self._aliases = aliases
        self._home: dict[str, Any] = {}
        for name in files:
            try:
                file: Any = safe_open(path / name, framework="pt")
                keys = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{path}: '{name}' is no safetensors file ({error})") from None
            for key in keys:
                if key in self._home:
                    raise ArtifactError(f"{path} has the tensor '{key}' twice")
                self._home[key] = file

    def _find(self, name: str) -> tuple[Any, str]:
        stored = self._aliases.get(name, name)
        return self._home[stored], stored

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._find(name)
        return file.get_tensor(stored)

    def header(self, name: str) -> tuple[list[int], str]:
        """Shape and dtype (as safetensors spells it) of a tensor, without reading it. Raises: KeyError."""
        file, stored = self._find(name)
        part = file.get_slice(stored)
        return part.get_shape(), part.get_dtype()

    def __iter__(self) -> Iterator[str]:
        yield from self._home
        yield from self._aliases

    def __len__(self) -> int:
        return len(self._home) + len(self._aliases)


def _check_weights(artifact: Artifact, rank: int) -> None:
    """Compare what the plan of a rank reads with what the files' headers say. Raises: ArtifactError."""
    weights = artifact.weights_of(rank)
    for arg in artifact.plan.args:
        if not arg.stored:
            continue
        try:
            shape, dtype = weights.header(arg.source)
        except KeyError:
            raise ArtifactError(f"{artifact.path}: the weights lack '{arg.source}', which the plan reads") from None
        if arg.type is None or shape != list(arg.type.shape) or dtype != SAFETENSORS[arg.type.dtype]:
            wanted = "nothing" if arg.type is None else f"{list(arg.type.shape)} {arg.type.dtype}"
            raise ArtifactError(
                f"{artifact.path}: '{arg.source}' is {shape} {dtype} in the weights, {wanted} in the plan"
            )


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, with every field checked. Raises: ArtifactError."""
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    if not path.is_dir() or not (path / "manifest.json").is_file():
        raise ArtifactError(f"{path} is no sparsec artifact: it is not a folder with a manifest.json")
    _check_file(path, "manifest.json", None)
    _check_file(path, "manifest.sha256", None)
    raw = _read(path, "manifest.json", MAX_JSON, exact=False)
    if _read(path, "manifest.sha256", 100, exact=False) != digest_line(raw):
        raise ArtifactError(f"{path} is damaged: 'manifest.json' is not what was written")
    manifest = _parse(raw, path, "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no sparsec artifact: its manifest says {_format_of(manifest)!r}")
    version = manifest.get("version")
    if not isinstance(version, int) or version < 1:
        raise ArtifactError(f"{path}: the manifest has no format version")
    if version > VERSION:
        made = manifest.get("sparsec", "a newer sparsec")
        raise ArtifactError(
            f"{path} has format version {version} (sparsec {made}), this sparsec reads up to {VERSION}: update sparsec"
        )
    if version < VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, this sparsec reads version {VERSION}: compile the model again"
        )
    if not isinstance(manifest.get("target"), str):
        raise ArtifactError(f"{path}: the manifest names no target")
    ranks = manifest.get("ranks", 1)
    if type(ranks) is not int or not 1 <= ranks <= MAX_RANKS:
        raise ArtifactError(f"{path}: the manifest is for {ranks!r} devices")
    files, aliases = manifest.get("files"), manifest.get("aliases")
    if not isinstance(files, dict) or not all(_entry_is_sound(name, entry) for name, entry in files.items()):
        raise ArtifactError(f"{path}: the manifest's list of files is not sound")
    pairs = aliases.items() if isinstance(aliases, dict) else [("", None)]
    if not all(isinstance(name, str) and isinstance(stored, str) for name, stored in pairs):
        raise ArtifactError(f"{path}: the manifest's aliases are not sound")
    return manifest


def _format_of(manifest: Any) -> Any:
    return manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__


def _entry_is_sound(name: str, entry: Any) -> bool:
    if not is_safe(name) or not isinstance(entry, dict):
        return False
    size, digest = entry.get("size"), entry.get("sha256")
    return type(size) is int and size >= 0 and isinstance(digest, str)


def is_safe(name: str) -> bool:
    """Whether a file's name stays inside its folder: plain parts, none of which starts with a dot."""
    return _NAME.fullmatch(name) is not None and len(name) < 500


def digest_line(raw: bytes) -> bytes:
    """What manifest.sha256 holds."""
    return hashlib.sha256(raw).hexdigest().encode() + b"\n"


def _check_file(path: Path, name: str, size: int | None) -> None:
    """Raises: ArtifactError unless the file is a plain one of that size, and no folder on the way is a link."""
    place = path
    for part in name.split("/"):
        place = place / part
        if place.is_symlink():
            raise ArtifactError(f"{path}: '{name}' is a link, which an artifact may not hold")
    try:
        found = place.lstat()
    except OSError:
        raise ArtifactError(f"{path} is incomplete: '{name}' is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path}: '{name}' is no plain file")
    if size is not None and found.st_size != size:
        raise ArtifactError(f"{path} is damaged: '{name}' has {found.st_size} bytes of {size}")


def _read(path: Path, name: str, size: int, exact: bool = True) -> bytes:
    try:
        with (path / name).open("rb") as file:
            raw = file.read(size + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: '{name}' cannot be read ({error.strerror})") from None
    if len(raw) > size or (exact and len(raw) < size):
        raise ArtifactError(f"{path} is damaged: '{name}' has another size than it was written with")
    return raw


def _check_hashes(path: Path, files: Mapping[str, Any], progress: Progress | None) -> None:
    """Raises: ArtifactError unless every file is what was written. Several are read at once, large ones first."""
    total, done = sum(entry["size"] for entry in files.values()), 0
    names = sorted(files, key=lambda name: -files[name]["size"])
    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as pool:
        for name, digest in zip(names, pool.map(partial(_hash, path), names), strict=True):
            if digest != files[name]["sha256"]:
                raise ArtifactError(f"{path} is damaged: '{name}' is not what was written")
            done += files[name]["size"]
            if progress is not None:
                progress(done, total)


def _hash(path: Path, name: str) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    try:
        with (path / name).open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                digest.update(buffer[:read])
    except OSError as error:
        raise ArtifactError(f"{path}: '{name}' cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _parse(raw: bytes, path: Path, name: str) -> Any:
    if len(raw) > MAX_JSON:
        raise ArtifactError(f"{path}: '{name}' has {len(raw)} bytes, more than {MAX_JSON}")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path}: '{name}' is not JSON") from None
