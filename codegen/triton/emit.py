"""From a kernel function to what an artifact holds of it: source, binaries, and how to launch them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsec.codegen.plan import constants
from sparsec.codegen.triton import backward, experts, families, pointwise, reduce, route, rowwise, weight_grads
from sparsec.codegen.triton.compile import Binary, Target, compile_entry, target_of
from sparsec.codegen.triton.launch import Entry, Json, Schedule, Sketch
from sparsec.codegen.triton.tile import unsupported
from sparsec.dialects.moe import BankGrad, BiasGrad, GatherGemm, GemmCombine, Group, HiddenGrad, Route, RouteGroup
from sparsec.ir.core import Func
from sparsec.runtime.plan import Variant

RULE_MODULES = (pointwise, reduce, rowwise)
"""Importing them registers how each aten op is written."""


@dataclass(frozen=True)
class TritonKernel:
    """A compiled kernel function.

    Args:
        name: of the function.
        source: the generated module.
        variants: by ascending token count, for the plan; `config` is described in `runtime/triton_kernels.py`.
        binaries: every compiled entry point by its file's name in the artifact.
    """

    name: str
    source: str
    variants: tuple[Variant, ...]
    binaries: dict[str, Binary]

    @property
    def files(self) -> dict[str, bytes]:
        """The kernel's files in the artifact: source and images."""
        images = {name: binary.image for name, binary in self.binaries.items()}
        return {f"kernels/{self.name}.py": self.source.encode(), **images}

    @property
    def texts(self) -> dict[str, bytes]:
        """What the source became on its way to each image: Triton's own IR, its GPU dialect, and assembly."""
        found = dict[str, bytes]()
        for name, binary in self.binaries.items():
            stem, _, kind = name.rpartition(".")
            assembly = "ptx" if kind == "cubin" else "amdgcn"
            texts = {"ttir": binary.ttir, "ttgir": binary.ttgir, assembly: binary.assembly}
            found |= {f"{stem}.{suffix}": text.encode() for suffix, text in texts.items()}
        return found


def sketch_kernel(func: Func) -> Sketch:
    """Write a kernel function as Triton text with its launches; nothing is compiled.

    Raises:
        CompileError: it does not hold exactly one op that there is a kernel for, or its region holds an op that
            cannot be part of one. The error names that op and the user's line.
    """
    op = experts.fused_op(func)
    match op:
        case Route() | RouteGroup() | Group():
            return route.sketch(func, op)
        case GatherGemm() | GemmCombine():
            return families.gemm_sketch(func, op)
        case HiddenGrad():
            return backward.hidden_grad(func, op)
        case BankGrad():
            return weight_grads.bank_grad(func, op)
        case BiasGrad():
            return weight_grads.bias_grad(func, op)
        case _:
            raise unsupported(op, "it is not one of the fused ops")


def emit_kernel(func: Func, target: str, early: bool = True) -> TritonKernel:
    """Write and compile a kernel function for a GPU target (`cuda:sm_90`, `hip:gfx942`); needs no GPU.

    Args:
        early: whether its first launch may start before the launch in front of it has ended: `early.may_start`.

    Raises:
        CompileError: as of `sketch_kernel`, or Triton cannot compile it, or a variant does not fit.
    """
    return compile_sketch(func, sketch_kernel(func), target, early)


def compile_sketch(func: Func, sketch: Sketch, target: str, early: bool = True) -> TritonKernel:
    """Compile what `sketch_kernel` wrote, or an edited text of it. Raises: CompileError, as of `emit_kernel`."""
    chosen = target_of(target)
    binaries = dict[str, Binary]()
    variants = list[Variant]()
    for schedule, choice in zip(sketch.schedules, _choices(func, len(sketch.schedules)), strict=True):
        what = f"kernel '{func.name}', variant up to {schedule.up_to or 'any number of'} tokens"
        launches = list[Json]()
        for i, given in enumerate(schedule.entries):
            pdl, ptx = chosen.hopper and (early or i > 0), chosen.backend == "cuda"
            entry = given.on(PDL=int(pdl), PTX=int(ptx), E4M3=int(chosen.e4m3))
            binary = compile_entry(sketch.source, entry, chosen, what)
            suffix = "cubin" if chosen.backend == "cuda" else "hsaco"
            file = f"kernels/{entry.name}.{binary.digest[:12]}.{suffix}"
            binaries[file] = binary
            launches.append(_launch(entry, binary, file))
        variants.append(Variant(schedule.up_to, _config(chosen, schedule, launches, choice)))
    return TritonKernel(func.name, sketch.source, tuple(variants), binaries)


def _choices(func: Func, count: int) -> list[dict[str, Json]]:
    """What was chosen for each of `count` schedules, and why: nothing where the kernel's own defaults were taken."""
    given: Any = func.attrs.get("variants") or experts.fused_op(func).attrs.get("variants") or ()
    chosen = [constants(choice, but=("up_to",)) for choice in given]
    return chosen if len(chosen) == count else [{}] * count


def _config(target: Target, schedule: Schedule, launches: list[Json], choice: dict[str, Json]) -> dict[str, Json]:
    return {
        "target": target.name,
        "choice": choice,
        "scratch": list(schedule.scratch),
        "state": list(schedule.state),
        "launches": launches,
    }


def _launch(entry: Entry, binary: Binary, file: str) -> dict[str, Any]:
    return {
        "file": file,
        "symbol": binary.symbol,
        "grid": list(entry.grid),
        "threads": binary.threads,
        "shared": binary.shared,
        "args": _arguments(entry, binary),
        "pdl": entry.early,
        "constants": dict(entry.constants),
        "num_warps": entry.num_warps,
        "num_stages": binary.num_stages,
    }


def _arguments(entry: Entry, binary: Binary) -> list[dict[str, Any]]:
    """What to pass; of maps, the binary knows how it wants their blocks copied."""
    maps = iter(binary.maps)
    given = [dict(parameter.argument) for parameter in entry.parameters]
    for argument in given:
        if argument.pop("block", None):
            argument.update(next(maps))
    return given
