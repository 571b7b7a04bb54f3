"""What a kernel asks of the runtime: entry points with grids, arguments and scratch buffers, per range of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType

Json: TypeAlias = Any
Argument: TypeAlias = Mapping[str, Json]
"""`{"in": i}`, `{"out": i}`, `{"scratch": i}`, `{"state": i}` for a tensor, `{"size": expression}` for a 32-bit
integer, and a tensor as the copy engine (TMA) sees it: `{"map": TENSOR, "element": dtype, "shape": [..],
"strides": [..], "block": [..]}`.

Size expressions are over `t`, the token count, and `sms`, the multiprocessors of the GPU that runs them.
"""


@dataclass(frozen=True)
class Parameter:
    """One run-time parameter of an entry point: its name, its type as Triton spells it, and what is passed."""

    name: str
    type: str
    argument: Argument


@dataclass(frozen=True)
class Entry:
    """One launch.

    Args:
        name: the function in the module.
        parameters: in order; the constants follow.
        constants: compile-time parameters by name.
        grid: programs along x and y, as expressions over the token count.
        num_warps, num_stages: as Triton means them.

    A constant PDL says that the launch may start before the one in front of it has ended (programmatic dependent
    launch): it is 0 here, becomes 1 for targets that can, and the function begins with `arrive(PDL)`. A constant PTX, 0
    here, becomes 1 for GPUs of NVIDIA, whose assembly the function may hold; E4M3 for those that multiply such floats.
    """

    name: str
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, int]
    grid: tuple[str, str]
    num_warps: int
    num_stages: int

    @property
    def early(self) -> bool:
        """Whether it may start before the launch in front of it has ended."""
        return bool(self.constants.get("PDL"))

    def on(self, **known: int) -> Entry:
        """The same for a target of which so much is known: PDL, PTX and E4M3, where the entry asks for them."""
        return replace(self, constants={name: known.get(name, value) for name, value in self.constants.items()})


@dataclass(frozen=True)
class Schedule:
    """How to run a kernel for up to `up_to` tokens: its launches in order, and its buffers.

    Args:
        scratch: bytes of each buffer that lives for one call, as expressions.
        state: bytes of each buffer that outlives calls; zero at first, and every call leaves it zero.
    """

    up_to: int | None
    entries: tuple[Entry, ...]
    scratch: tuple[str, ...] = ()
    state: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """A kernel as text, and its schedules by ascending token count."""

    source: str
    schedules: tuple[Schedule, ...]


@dataclass
class Wiring:
    """Says where the operands and results of a kernel's op are passed, and keeps its buffers."""

    op: Op
    scratch: list[str] = field(default_factory=list[str])
    state: list[int] = field(default_factory=list[int])

    def operand(self, value: Value) -> Argument:
        """By its place among the op's arguments, absent ones counted."""
        flat = list[Value | None]()
        for argument in self.op.arguments:
            flat += argument if isinstance(argument, tuple) else (argument,)
        return {"in": flat.index(value)}

    def result(self, value: Value) -> Argument:
        return {"out": self.op.results.index(value)}

    def buffer(self, size: str) -> Argument:
        """A new scratch buffer of `size` bytes."""
        self.scratch.append(size)
        return {"scratch": len(self.scratch) - 1}

    def kept(self, size: int) -> Argument:
        """A new buffer of `size` bytes that is zero before each call, and that each call leaves so."""
        self.state.append(size)
        return {"state": len(self.state) - 1}


ENGINE_BYTES = 16
"""The copy engine of Hopper and later takes rows that are a multiple of this long."""


def tensor_map(name: str, dtype: DType, of: Argument, shape: Sequence[int | str], strides: Sequence[int | str],
               block: Sequence[int]) -> Parameter:  # fmt: skip
    """A tensor descriptor made by the runtime, for `name.load(offsets)` of blocks.

    Args:
        of: the tensor, as other parameters name it.
        shape, strides: how to see it, in elements, sizes or expressions; the last stride is 1, others are multiples of
            16 bytes.
        block: sizes of a block.
    """
    type = f"tensordesc<{ELEMENTS[dtype]}[{','.join(map(str, block))}]>"
    sizes = {"shape": list(shape), "strides": list(strides), "block": list(block)}
    return Parameter(name, type, {"map": dict(of), "element": dtype.value, **sizes})


ELEMENTS: Mapping[DType, str] = {
    DType.bf16: "bf16",
    DType.f16: "fp16",
    DType.f32: "fp32",
    DType.ui8: "u8",
    DType.f8E4M3FN: "fp8e4nv",
}
"""What tensor maps can be of, as Triton spells it."""


def ceil_div(a: str, b: int) -> str:
    """`a / b`, rounded up, as a size expression."""
    return a if b == 1 else f"({a} + {b - 1}) // {b}"


TOKENS = Parameter("tokens", "i32", {"size": "t"})
I32 = "*" + DType.i32.value
