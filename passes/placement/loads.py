"""Expert loads from files: counts of tokens per layer and expert, in one scenario or several, and tokens' routing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError
from sparsec.passes.placement.array_file import as_array, read_array, read_json

KEYS = ("logical_count", "load", "loads", "counts")
ROUTED = ("routed", "routing")
MOST = (4096, 4096, 65536)  #: scenarios, layers, experts
RANGE = (1e-12, 1e18)  #: of a count that is not zero


@dataclass(frozen=True)
class Loads:
    """What was measured.

    Args:
        counts: [scenarios, layers, experts] float64, tokens that each expert got.
        names: of the scenarios.
        layers: the number of each layer in the model. Dense layers, which have no tokens at all, are left out.
    """

    counts: NDArray[np.float64]
    names: tuple[str, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class _File:
    """One file: [scenarios, layers, experts], the scenarios' names, the layers' numbers, and whether it named them."""

    path: Path
    counts: NDArray[np.float64]
    names: list[str]
    layers: tuple[int, ...]
    named: bool


def read_loads(paths: Sequence[str | Path]) -> Loads:
    """Read .json, .npy or .npz files, whose scenarios are all planned for.

    An array is [layers, experts] or [scenarios, layers, experts]. In .npz it is named `logical_count`, `load`, `loads`
    or `counts` (or is the only one), and `workload` may name the scenarios, `layers` give the layers' numbers. JSON is
    the array as nested lists, an object with such entries, or a trace of `sparsec trace`, whose steps are added up to
    one scenario. Where no file numbers its layers, dense ones (the first, or every n-th) may be there, without tokens.

    Raises:
        SparsecError: for what cannot be read, or is no load: says what and where.
    """
    if not paths:
        raise SparsecError("there is no load to plan for\n  hint: name a file of counts: --load FILE")
    files = [_read(Path(path)) for path in paths]
    first = files[0]
    for file in files[1:]:
        _same(first, file)
    counts = np.concatenate([file.counts for file in files])
    names = [name for file in files for name in file.names]
    dense = counts.sum((0, 2)) == 0
    if dense.all():
        raise SparsecError(f"{first.path}: no layer has any tokens")
    empty = np.argwhere((counts.sum(2) == 0) & ~dense)
    if len(empty):
        scenario, layer = empty[0]
        raise SparsecError(
            f"{_file_of(files, int(scenario))}: scenario '{names[scenario]}': layer {first.layers[layer]} is missing "
            "(all its counts are zero), but others have it\n  hint: leave the scenario out, or record it again"
        )
    lost = _lost(dense, any(file.named for file in files))
    if lost is not None:
        raise SparsecError(
            f"{first.path}: layer {first.layers[lost]} is missing: it has no tokens in any scenario\n"
            "  hint: record it again; if it is dense, leave it out and give the others' numbers as 'layers'"
        )
    return Loads(counts[:, ~dense], tuple(names), tuple(np.array(first.layers)[~dense].tolist()))


def _lost(dense: NDArray[np.bool_], named: bool) -> int | None:
    """A layer without tokens that is not dense: layers with experts are every n-th from some layer on, unless named."""
    kept = np.flatnonzero(~dense)
    if named:
        return int(np.flatnonzero(dense)[0]) if dense.any() else None
    step = int(np.diff(kept).min(initial=len(dense)))
    wanted = np.arange(kept[0], len(dense), step)
    lost = np.setdiff1d(wanted, kept)
    return int(lost[0]) if len(lost) else None


def read_routing(path: str | Path, layers: Sequence[int], experts: int) -> NDArray[np.int64]:
    """Experts of every token: [tokens, layers, k], from .npy or .npz (`routed`), or a trace of `sparsec trace`.

    Leading axes are flattened.

    Raises:
        SparsecError: ids out of range, a wrong number of layers, or a file that cannot be read.
    """
    path = Path(path)
    array = _routed(path, read_json(path)) if path.suffix == ".json" else read_array(_known(path), ROUTED).array
    if array.ndim < 3 or array.dtype.kind not in "iu":
        raise SparsecError(
            f"{path}: routing is [tokens, layers, k] of whole numbers, not {list(array.shape)} of {array.dtype}"
        )
    if 0 in array.shape:
        raise SparsecError(f"{path}: routing of {list(array.shape)} holds no token, no layer or no pick")
    array = array.reshape(-1, *array.shape[-2:])
    if array.shape[1] != len(layers):
        raise SparsecError(
            f"{path}: routing of {array.shape[1]} layers, but the loads have {len(layers)} with experts\n"
            "  hint: record both from the same model"
        )
    bad = np.argwhere((array < 0) | (array >= experts))
    if len(bad):
        token, layer, pick = bad[0]
        raise SparsecError(
            f"{path}: token {token} in layer {layers[layer]} goes to expert {array[token, layer, pick]}, "
            f"but there are {experts} (0..{experts - 1})"
        )
    return array.astype(np.int64)


def _read(path: Path) -> _File:
    array, names, given = _counts(path)
    if array.dtype.kind not in "iuf":
        raise SparsecError(f"{path}: counts are numbers, and these are {_KINDS.get(array.dtype.kind, array.dtype)}")
    counts = array.astype(np.float64)
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or 0 in counts.shape:
        raise SparsecError(
            f"{path}: counts are [layers, experts] or [scenarios, layers, experts], not {list(array.shape)}"
        )
    if any(size > most for size, most in zip(counts.shape, MOST, strict=True)):
        raise SparsecError(f"{path}: {list(counts.shape)} is more than {list(MOST)} scenarios, layers and experts")
    if len(names) != len(counts):
        stem = path.stem
        names = [stem] if len(counts) == 1 else [f"{stem}[{index}]" for index in range(len(counts))]
    names = [_clean(name) for name in names]
    layers = tuple(range(counts.shape[1])) if given is None else _numbers(path, given, counts.shape[1])
    low, high = RANGE
    for what, bad in (
        ("not a number", np.isnan(counts)),
        ("negative", counts < 0),
        ("infinite", np.isinf(counts)),
        (f"no count of tokens ({low:g} to {high:g})", (counts > high) | ((counts > 0) & (counts < low))),
    ):
        if bad.any():
            scenario, layer, expert = np.argwhere(bad)[0]
            raise SparsecError(
                f"{path}: the count of expert {expert} in layer {layers[layer]} of scenario '{names[scenario]}' is "
                f"{what}: {counts[scenario, layer, expert]:g}\n  hint: record it again, or leave the scenario out"
            )
    return _File(path, counts, names, layers, given is not None)


def _numbers(path: Path, given: Any, count: int) -> tuple[int, ...]:
    good = isinstance(given, list) and all(type(one) is int and 0 <= one < 1 << 31 for one in given)
    if not good or len(given) != count or len(set(given)) != count:
        raise SparsecError(f"{path}: 'layers' are not the numbers of {count} layers, each once")
    return tuple(given)


_KINDS = {"b": "true and false", "O": "not all numbers", "U": "texts"}


def _same(first: _File, file: _File) -> None:
    """Raises: SparsecError unless two files are of one model."""
    (layers, experts), (other_layers, other_experts) = first.counts.shape[1:], file.counts.shape[1:]
    hint = "\n  hint: plan for one model at a time"
    if (layers, experts) != (other_layers, other_experts):
        raise SparsecError(
            f"{file.path}: {other_layers} layers of {other_experts} experts, but {first.path} has {layers} layers of "
            f"{experts}{hint}"
        )
    if first.layers != file.layers:
        one, two = next(pair for pair in zip(file.layers, first.layers, strict=True) if pair[0] != pair[1])
        raise SparsecError(f"{file.path}: has layer {one} where {first.path} has layer {two}{hint}")


def _counts(path: Path) -> tuple[NDArray[Any], list[str], Any]:
    if path.suffix != ".json":
        found = read_array(_known(path), KEYS)
        return found.array, found.names, found.layers
    data = read_json(path)
    if not isinstance(data, dict):
        return as_array(data, str(path)), [], None
    if "steps" in data:
        return _trace_counts(path, data)
    key = next((key for key in KEYS if key in data), None)
    if key is None:
        raise SparsecError(f"{path}: has no entry {' or '.join(KEYS)}, and is no trace of `sparsec trace`")
    names = data.get("workload", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SparsecError(f"{path}: 'workload' is a list of names")
    return as_array(data[key], f"{path}: '{key}'"), names, data.get("layers")


# --------------------------------------------------------------------------------------- what `sparsec trace` records
def _trace_counts(path: Path, data: dict[str, Any]) -> tuple[NDArray[Any], list[str], list[int]]:
    layers, steps = _trace(path, data)
    total: NDArray[Any] | None = None
    for index, step in enumerate(steps):
        counts = as_array(step.get("counts"), f"{path}: 'counts' of step {index}")
        if counts.dtype.kind not in "iuf" or counts.ndim != 2 or len(counts) != len(layers):
            raise SparsecError(f"{path}: 'counts' of step {index} are not a list of numbers for each of the layers")
        if total is not None and counts.shape != total.shape:
            raise SparsecError(f"{path}: step {index} has {counts.shape[1]} experts, step 0 has {total.shape[1]}")
        total = counts.astype(np.float64) if total is None else total + counts
    if total is None:
        raise SparsecError(f"{path}: the trace has no step\n  hint: record one with sparsec trace")
    return total, [], list(layers)


def _routed(path: Path, data: Any) -> NDArray[Any]:
    """[tokens, layers, k] of a trace."""
    if not isinstance(data, dict) or "steps" not in data:
        raise SparsecError(f"{path}: routing is .npy, .npz or a trace of `sparsec trace`")
    layers, steps = _trace(path, data)
    hint = "\n  hint: record it again with sparsec trace"
    parts: list[NDArray[Any]] = []
    for index, step in enumerate(steps):
        if not step.get("routed"):
            raise SparsecError(f"{path}: step {index} of the trace has no 'routed', the experts of its tokens{hint}")
        part = as_array(step["routed"], f"{path}: 'routed' of step {index}")
        if part.ndim != 3 or part.shape[0] != len(layers) or part.dtype.kind not in "iu":
            raise SparsecError(f"{path}: 'routed' of step {index} is not [layers, tokens, k] of whole numbers{hint}")
        if parts and part.shape[2] != parts[0].shape[2]:
            raise SparsecError(f"{path}: tokens of step {index} have {part.shape[2]} experts, not {parts[0].shape[2]}")
        parts.append(part)
    if not parts:
        raise SparsecError(f"{path}: the trace has no step{hint}")
    return np.concatenate(parts, 1).transpose(1, 0, 2)


def _trace(path: Path, data: dict[str, Any]) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """The layers' numbers and the steps."""
    layers, steps = data.get("layers"), data["steps"]
    for name, held in (("layers", layers), ("steps", steps)):
        if not isinstance(held, list) or not all(isinstance(item, dict) for item in held):
            raise SparsecError(f"{path}: '{name}' of a trace is a list of objects")
    assert isinstance(layers, list)
    found = [re.findall(r"(?:^|\.)(\d{1,6})(?=\.|$)", str(layer.get("path", ""))) for layer in layers]
    numbers = tuple(int(one[0]) for one in found if one)
    unique = len(numbers) == len(layers) == len(set(numbers))
    return numbers if unique else tuple(range(len(layers))), steps


# ------------------------------------------------------------------------------------------------------------- names
def _known(path: Path) -> Path:
    if path.suffix not in (".npy", ".npz") and not path.is_dir():
        raise SparsecError(f"{path}: is of no known kind\n  hint: .json, .npy or .npz")
    return path


def _clean(name: str) -> str:
    """A name as it can be shown."""
    return "".join(char if char.isprintable() else "?" for char in name[:60])


def _file_of(files: Sequence[_File], scenario: int) -> Path:
    for file in files:
        if scenario < len(file.names):
            return file.path
        scenario -= len(file.names)
    return files[-1].path
