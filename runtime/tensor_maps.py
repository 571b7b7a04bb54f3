"""Tensor maps: how the copy engine (TMA) of a GPU sees a tensor. The host makes them, kernels take them by value.

In a plan: `{"map": ..., "element": "bf16", "shape": [..], "strides": [..], "box": [..], "swizzle": 3}`. Shape and
strides are in elements, outermost first, sizes or expressions; `box` is what one copy moves; `swizzle` orders it in
shared memory: 0 as it is, 1, 2, 3 with 16-byte units exchanged within 32, 64, 128 bytes. Plans come from strangers, and
the engine checks nothing but these numbers, so none is believed that leads outside of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsec.runtime.dims import Expr
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError, InputError

ELEMENTS: Mapping[str, int] = {"ui8": 0, "f8E4M3FN": 0, "f16": 6, "f32": 7, "bf16": 9}
"""CUtensorMapDataType by the names that plans use; the engine copies bytes of 8-bit floats."""
MAX_RANK, MAX_BOX, MAX_STRIDE, UNIT = 5, 256, 1 << 40, 16


@dataclass(frozen=True)
class TensorMap:
    """A tensor, `shape` and `strides` (in elements) by which to see it, and what a copy moves."""

    tensor: Tensor
    element: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @property
    def itemsize(self) -> int:
        return DTYPES[self.element].itemsize


@dataclass(frozen=True)
class MapForm:
    """A map whose sizes may depend on the token count."""

    element: str
    shape: tuple[int | Expr, ...]
    strides: tuple[int | Expr, ...]
    box: tuple[int, ...]
    swizzle: int

    def of(self, tensor: Tensor | None, env: Mapping[str, int], what: str) -> TensorMap:
        """The map of a dense tensor. Raises: ArtifactError for one that would lead out of it."""
        if tensor is None:
            raise InputError(f"{what}: there is no tensor to map")
        shape, strides = (tuple(_value(size, env) for size in sizes) for sizes in (self.shape, self.strides))
        made = TensorMap(tensor, self.element, shape, strides, self.box, self.swizzle)
        steps = [stride * made.itemsize for stride in strides[:-1]]
        if not all(0 < size < 2**31 for size in shape):
            raise InputError(f"{what}: the copy engine takes no tensor of the sizes {list(shape)}")
        if strides[-1] != 1 or not all(0 < step < MAX_STRIDE and step % UNIT == 0 for step in steps):
            raise ArtifactError(f"{what}: the copy engine takes no strides {list(strides)} of {self.element}")
        reach = (1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))) * made.itemsize
        if reach > tensor.numel() * tensor.element_size():
            raise ArtifactError(
                f"{what}: a map of shape {list(shape)}, strides {list(strides)} leads out of the tensor"
            )
        return made


def parse(what: str, map: Mapping[str, Any], size: Callable[[Any], int | Expr]) -> MapForm:
    """A map of a plan, its numbers checked; `size` reads one size. Raises: ArtifactError."""
    element, box, swizzle = map.get("element"), map.get("box"), map.get("swizzle")
    shape, strides = map.get("shape"), map.get("strides")
    if not isinstance(element, str) or element not in ELEMENTS:
        raise ArtifactError(f"{what}: a map is of {element!r}, can be of {', '.join(ELEMENTS)}")
    if not (isinstance(shape, list) and isinstance(strides, list) and isinstance(box, list)):
        raise ArtifactError(f"{what}: a map has no shape, strides or box")
    if not 1 <= len(shape) <= MAX_RANK or len(strides) != len(shape) or len(box) != len(shape):
        raise ArtifactError(f"{what}: shape, strides and box of a map have not one rank of at most {MAX_RANK}")
    if not all(type(side) is int and 0 < side <= MAX_BOX for side in box):
        raise ArtifactError(f"{what}: the box {box!r} of a map is not of sizes up to {MAX_BOX}")
    row = box[-1] * DTYPES[element].itemsize
    if type(swizzle) is not int or not 0 <= swizzle <= 3 or row % UNIT or (swizzle and row > UNIT << swizzle):
        raise ArtifactError(f"{what}: the swizzle {swizzle!r} of a map does not go with rows of {row} bytes")
    return MapForm(
        element, tuple(size(value) for value in shape), tuple(size(value) for value in strides), tuple(box), swizzle
    )


def _value(size: int | Expr, env: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else size(env)
