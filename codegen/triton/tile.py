"""Values of a region as they appear in a kernel's text."""

from __future__ import annotations

import keyword
from dataclasses import dataclass

from sparsec.codegen import names
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Op
from sparsec.ir.types import DType, TensorType

NARROW = {DType.f16: "tl.float16", DType.bf16: "tl.bfloat16"}
FLOATS = {DType.f32, *NARROW}
INTEGERS = {DType.i64, DType.i32, DType.i16, DType.i8, DType.ui8}
POINTERS = {
    DType.f64: "*fp64",
    DType.f32: "*fp32",
    DType.f16: "*fp16",
    DType.bf16: "*bf16",
    DType.i64: "*i64",
    DType.i32: "*i32",
    DType.i16: "*i16",
    DType.i8: "*i8",
    DType.ui8: "*u8",
    DType.f8E4M3FN: "*u8",  # kernels widen the bytes themselves, on every GPU
    DType.i1: "*i1",
}
"""How Triton's signatures spell a pointer to each element type."""


def padded(size: int) -> int:
    """The least power of two that holds `size` lanes."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """A value in registers.

    Args:
        text: a variable, or an expression that needs no parentheses.
        sizes: the tensor's sizes without the row axis; each axis holds `padded(size)` lanes.
        rows: whether axis 0 of the tile is the tokens.
        dtype: element type in the graph. Registers hold every float as f32 and every integer as i32.
        pointer: for an operand in memory that is not cut into rows, the kernel's argument.
    """

    text: str
    sizes: tuple[int, ...]
    rows: bool
    dtype: DType
    pointer: str = ""

    @property
    def lanes(self) -> tuple[int, ...]:
        return tuple(padded(size) for size in self.sizes)

    @property
    def rank(self) -> int:
        """Number of axes, that of the tokens included."""
        return len(self.sizes) + self.rows

    def axis(self, dim: int) -> int:
        """A dimension counted from either end, from 0."""
        return dim % self.rank

    def size(self, axis: int) -> int:
        return self.sizes[axis - self.rows]

    def shape(self) -> str:
        """The tile's shape as Triton takes it."""
        return shape_text(*(["ROWS"] if self.rows else []), *self.lanes)


def shape_text(*sizes: int | str) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def known_sizes(type: TensorType, rows: bool, op: Op | None = None) -> tuple[int, ...]:
    """A tensor's sizes without its rows. Raises: CompileError for sizes that only a run gives."""
    sizes = type.shape[1:] if rows else type.shape
    known = tuple(size for size in sizes if isinstance(size, int))
    if len(known) != len(sizes):
        raise unsupported(op, f"{type} has sizes that are known only at run time, besides its rows")
    return known


def unsupported(op: Op | None, why: str) -> CompileError:
    """The error for an op that no kernel can hold; the caller may keep the region as separate ops instead."""
    if op is None:
        return CompileError(f"no Triton kernel: {why}")
    return CompileError(
        f"no Triton kernel for '{op.name}': {why}", op.loc, "leave these ops out of the region, or target the CPU"
    )


class Names(names.Names):
    """Hands out Python variables."""

    def __init__(self, reserved: tuple[str, ...]) -> None:
        super().__init__(*reserved, *keyword.kwlist, "tl", "triton")
