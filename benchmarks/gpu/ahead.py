"""sparsec's kernels of a layer, compiled once for each state of the compiler and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import Device
from benchmarks.shapes import Shape, bank
from sparsec.codegen.emit import Emitted
from sparsec.runtime.executor import Program
from sparsec.runtime.plan import Plan
from sparsec.runtime.plan_json import from_json, to_json

ROOT = Path(__file__).parents[2]
CODE = ("codegen", "passes", "sparsec/ir", "sparsec/dialects", "sparsec/frontend", "runtime")


def program(
    shape: Shape, module: Any, device: Device, folder: Path | None, weights: str | None = None
) -> tuple[Program, Callable[[int], str]]:
    """The layer's program on the module's own weights, and which variants run for a number of tokens."""
    from sparsec.ir.interp import DerivedWeights

    made = compiled(shape, device.target, weights)
    plan, files = emitted(made, folder)
    stored = DerivedWeights(made.result.module, dict(module.named_parameters()))
    ready = Program(plan, stored, device.torch, files=files, trust_code=True)
    return ready, lambda tokens: chosen(plan, tokens)


def compile_only(shape: Shape, target: str, folder: Path) -> None:
    """Fill the folder for a shape; needs no GPU."""
    emitted(compiled(shape, target), folder)


def compiled(shape: Shape, target: str, weights: str | None = None) -> Any:
    """The layer after the compiler's passes, for any number of tokens."""
    import sparsec

    like = torch.empty(3, shape.hidden, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(3, shape.k, dtype=torch.int64, device="meta")
    tokens = {0: torch.export.Dim("tokens")}
    example = (like, ids, torch.empty(3, shape.k, dtype=torch.bfloat16, device="meta"))
    return sparsec.compile(bank(shape, "meta"), example, dynamic=(tokens,) * 3, target=target, weights=weights)


def emitted(made: Any, folder: Path | None) -> tuple[Plan, dict[str, bytes]]:
    """Plan and kernels, from the folder where it has them, and into it where it has not."""
    if folder is None or made.target.kind == "cpu":
        return made.emitted.plan, made.emitted.files
    place = folder / _key(made)
    if not (place / "plan.json").is_file():
        _store(made.emitted, place)
    plan = from_json(json.loads((place / "plan.json").read_text(encoding="utf-8")))
    files = (place / "files").rglob("*")
    return plan, {str(path.relative_to(place / "files")): path.read_bytes() for path in files if path.is_file()}


def chosen(plan: Plan, tokens: int) -> str:
    """The variant of each GEMM that runs for a number of tokens: its family and tile."""
    said = list[str]()
    for kernel in plan.kernels.values():
        fitting = (variant for variant in kernel.variants if variant.up_to is None or tokens <= variant.up_to)
        choice = next(fitting).config.get("choice")
        if isinstance(choice, dict) and "block_n" in choice:
            sizes = "x".join(str(choice.get(f"block_{axis}", "-")) for axis in "mnk")
            said.append(f"{choice.get('kernel', 'tiles')} {sizes}")
    return ", ".join(said) or "; ".join(sorted({kernel.backend for kernel in plan.kernels.values()}))


def _key(made: Any) -> str:
    """The layer's IR without the user's lines, the compiler's source, and Triton's version."""
    import triton

    from sparsec.ir.equal import module_key

    found = hashlib.sha256(f"{module_key(made.result.module)} {triton.__version__}".encode())
    for part in CODE:
        for path in sorted((ROOT / part).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:24]


def _store(what: Emitted, place: Path) -> None:
    """Whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as partial:
        ready = Path(partial, "ready")
        for name, content in what.files.items():
            path = ready / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (ready / "plan.json").write_text(json.dumps(to_json(what.plan), allow_nan=False), encoding="utf-8")
        if not place.exists():
            ready.rename(place)
