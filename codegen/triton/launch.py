"""What a kernel asks of the runtime: entry points with grids, arguments and scratch buffers, per range of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType

Json: TypeAlias = Any
Argument: TypeAlias = Mapping[str, Json]
"""`{"in": i}`, `{"out": i}`, `{"scratch": i}` for a tensor, `{"size": expression}` for a 32-bit integer."""


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
    """

    name: str
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, int]
    grid: tuple[str, str]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Schedule:
    """How to run a kernel for up to `up_to` tokens: its launches in order, and the bytes of each scratch buffer."""

    up_to: int | None
    entries: tuple[Entry, ...]
    scratch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """A kernel as text, and its schedules by ascending token count."""

    source: str
    schedules: tuple[Schedule, ...]


@dataclass
class Wiring:
    """Says where the operands and results of a kernel's op are passed, and keeps its scratch buffers."""

    op: Op
    scratch: list[str] = field(default_factory=list[str])

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


def ceil_div(a: str, b: int) -> str:
    """`a / b`, rounded up, as a size expression."""
    return a if b == 1 else f"({a} + {b - 1}) // {b}"


TOKENS = Parameter("tokens", "i32", {"size": "t"})
I32 = "*" + DType.i32.value
