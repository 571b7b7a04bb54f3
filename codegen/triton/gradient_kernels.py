"""What the kernels of gradients share: their variants, tile sizes, heads of entry points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sparsec.codegen.triton.launch import ENGINE_BYTES, Parameter
from sparsec.codegen.triton.tile import FLOATS, padded, unsupported
from sparsec.ir.core import Func, Op, Value
from sparsec.ir.types import DType

Variant = Mapping[str, Any]

FAMILIES = ("tiles", "tma")
"""Families of the kernels of gradients: all operands by pointers; what lies in blocks by the copy engine (TMA)."""


def family_of(op: Op, variant: Variant) -> str:
    """The family that a variant names. Raises: CompileError for one that there is not."""
    name = str(variant.get("kernel", "tiles"))
    if name not in FAMILIES:
        raise unsupported(op, f"there is no family of kernels '{name}' (there are: {', '.join(FAMILIES)})")
    return name


def sizes_of(op: Op, variant: Variant, m: int, n: int, k: int) -> dict[str, int]:
    """Tile sizes of a variant, no larger than m x n x k and no smaller than a tensor core's."""
    sides = {"block_m": m, "block_n": n, "block_k": k}
    return {
        side.upper(): max(16, min(padded(int(variant.get(side, 64))), padded(most))) for side, most in sides.items()
    }


def chosen(func: Func, op: Op, default: Sequence[Variant]) -> list[Variant]:
    """The variants that the schedule or the function names, else `default`."""
    return list(cast("Sequence[Variant]", op.attrs.get("variants") or func.attrs.get("variants") or default))


def number(op: Op, dim: object) -> int:
    """A size that must be known. Raises: CompileError."""
    if not isinstance(dim, int):
        raise unsupported(op, f"the size {dim!r} must be known")
    return dim


def require_floats(op: Op, *values: Value | None) -> None:
    """Raises: CompileError unless all of them are of one type that GEMMs take."""
    given = [value for value in values if value is not None]
    for value in given:
        if value.tensor.dtype not in FLOATS or value.tensor.dtype is not given[0].tensor.dtype:
            raise unsupported(op, f"%{value.name} is {value.type}: gradients take f32, f16 or bf16, all alike")


def require_engine(op: Op, dtype: DType, *rows: int) -> None:
    """Raises: CompileError unless the copy engine takes rows of so many elements."""
    if dtype is DType.f32:
        raise unsupported(op, "f32 is not multiplied by tensor cores: the family 'tma' takes bf16 and f16")
    for row in rows:
        if row * dtype.itemsize % ENGINE_BYTES:
            raise unsupported(
                op, f"the copy engine takes rows of multiples of {ENGINE_BYTES} bytes, not {row} of {dtype.value}"
            )


def signature(name: str, parameters: Sequence[Parameter], constants: Mapping[str, int]) -> str:
    """The head of an entry point."""
    given = [*(parameter.name for parameter in parameters), *(f"{name}: tl.constexpr" for name in constants)]
    return f'@triton.jit(do_not_specialize=["tokens"])\ndef {name}({", ".join(given)}):'
