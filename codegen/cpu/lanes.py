"""Sixteen elements of a region's value, as C++ text: an F32, an I32, or an I32 mask of 0 and -1 for booleans."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

from sparsec.codegen import names
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Attr, Op, Value
from sparsec.ir.types import DType


class Kind(Enum):
    """What lanes hold; the value is the C++ type."""

    number = "F32"
    integer = "I32"
    mask = "I32 mask"

    @property
    def vector(self) -> str:
        return "F32" if self is Kind.number else "I32"

    @property
    def element(self) -> str:
        """Type of one element in a row that is kept on the stack."""
        return "float" if self is Kind.number else "int32_t"


KINDS = {
    **dict.fromkeys((DType.f32, DType.bf16, DType.f16), Kind.number),
    **dict.fromkeys((DType.i64, DType.i32, DType.i16, DType.i8, DType.ui8), Kind.integer),
    DType.i1: Kind.mask,
}
"""How each element type is computed. Integers wider than 32 bits are ids and counts, which fit."""

NARROW = {DType.bf16: "round_bf16", DType.f16: "round_f16"}
"""Element types that results are rounded to, and the function of `vec.h` that does."""


@dataclass(frozen=True)
class Lanes:
    """Sixteen elements.

    Args:
        text: a variable; empty for a number that is known.
        dtype: element type in the graph.
        value: the number that all lanes are, where there is no variable.
    """

    text: str
    dtype: DType
    value: bool | int | float = 0

    @property
    def kind(self) -> Kind:
        return KINDS[self.dtype]

    def vector(self, kind: Kind) -> str:
        """As a vector of a kind."""
        if not self.text:
            return f"splat({number(self.value, kind)})"
        if kind is self.kind:
            return self.text
        if kind is Kind.mask:
            return f"({self.text} != {'0.0f' if self.kind is Kind.number else '0'})"
        if self.kind is Kind.mask:
            return f"select({self.text}, splat({number(1, kind)}), splat({number(0, kind)}))"
        return f"{'to_float' if kind is Kind.number else 'to_int'}({self.text})"

    def scalar(self, kind: Kind) -> str:
        """As the right side of an operator: a known number needs no vector there."""
        return self.vector(kind) if self.text else number(self.value, kind)


def number(value: bool | int | float, kind: Kind) -> str:
    """A literal of C++."""
    if kind is Kind.mask:
        return "-1" if value else "0"
    if kind is Kind.integer:
        value = max(-0x7FFFFFFF, min(0x7FFFFFFF, value)) if math.isinf(value) else int(value)
        return str(value)
    value = float(value)
    if math.isnan(value):
        return "NAN_F32"
    if abs(value) >= 3.4028235677973366e38:  # what rounds to infinity in f32
        return "INFINITY_F32" if value > 0 else "-INFINITY_F32"
    return f"{value:.9g}f" if re.search(r"[.e]", f"{value:.9g}") else f"{value:.9g}.0f"


def unsupported(op: Op | None, why: str) -> CompileError:
    """The error for an op that no generated C++ can hold; the caller may run the layer without generated code."""
    if op is None:
        return CompileError(f"no C++ kernel: {why}")
    return CompileError(f"no C++ kernel for '{op.name}': {why}", op.loc, "PyTorch's own operators run it instead")


def attr(op: Op, name: str, default: Attr) -> Attr:
    return op.attrs.get(name, default)


def integer(op: Op, name: str, default: int) -> int:
    """An attribute that must be known. Raises: CompileError."""
    value = op.attrs.get(name, default)
    if not isinstance(value, int):
        raise unsupported(op, f"attribute '{name}' is {value!r}, not an integer")
    return value


def real(op: Op, name: str, default: float) -> float:
    """An attribute that must be a number; none is the default. Raises: CompileError."""
    value = op.attrs.get(name)
    if value is None:
        return default
    if not isinstance(value, bool | int | float):
        raise unsupported(op, f"attribute '{name}' is {value!r}, not a number")
    return value


def kind_of(op: Op, value: Value) -> Kind:
    """How a value is computed. Raises: CompileError for f64, complex numbers and 8-bit floats."""
    kind = KINDS.get(value.tensor.dtype)
    if kind is None:
        raise unsupported(op, f"element type {value.tensor.dtype} is not computed in a kernel")
    return kind


KEYWORDS = frozenset(
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const const_cast "  # noqa: SIM905
    "constexpr continue decltype default delete do double dynamic_cast else enum explicit export extern false float "
    "for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private "
    "protected public register reinterpret_cast return short signed sizeof static static_assert static_cast struct "
    "switch template this thread_local throw true try typedef typeid typename union unsigned using virtual void "
    "volatile wchar_t while xor xor_eq".split()
)


class Names(names.Names):
    """Hands out C++ variables; none that a header of `include` or the language uses."""

    def __init__(self, *reserved: str) -> None:
        super().__init__(*KEYWORDS, *reserved)
