"""Banks as kernels read them: in tiles on CPUs, in blocks on GPUs.

Computed once, when a model is compiled: see `sparsec.ir.derived`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from sparsec.dialects.moe.common import (
    TILE_DTYPES,
    bytes_of,
    known,
    packed_bias_type,
    packed_type,
    results_are,
    scale_type,
)
from sparsec.ir.opdef import Cost, Env, OpDef, Operand, OptOperand, Result
from sparsec.ir.types import TensorType, Type

Tiling = Literal["tiles", "int8", "int4", "fp8", "mxfp4"]
BLOCKS = ("fp8", "mxfp4")
Parts = Literal[1, 2]


class _OfBank(OpDef):
    """What ops on a bank of experts share."""

    w: Operand
    packing: Tiling
    parts: Parts
    transposed: bool
    interleaved: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, N and K."""
        experts, columns, inner = map(known, self.w.tensor.shape)
        return (experts, inner, columns) if self.transposed else (experts, columns, inner)

    def moved(self) -> Cost:
        values = (*self.operands, *self.results)
        return Cost(sum(bytes_of(value.type, {}) for value in values), 0)

    def problems(self) -> Iterator[str]:
        """Problems of the bank and of how its columns are ordered."""
        if self.w.tensor.rank != 3:
            yield f"w is {self.w.type}: a bank of experts has three dimensions"
        elif self.packing == "tiles" and self.w.tensor.dtype not in TILE_DTYPES:
            yield f"w is {self.w.type}: tiles are for {' and '.join(map(str, TILE_DTYPES))}"
        elif not self.w.tensor.dtype.is_float:
            yield f"w is {self.w.type}: only floats are packed"
        elif self.packing in BLOCKS and (self.parts != 1 or self.interleaved):
            yield f"packing '{self.packing}' keeps the columns in order: it has one part, not interleaved"
        else:
            yield from part_problems(self.parts, self.interleaved, self.sizes[1])
            yield from results_are(self, self.infer())


def part_problems(parts: int, interleaved: bool, columns: int) -> Iterator[str]:
    if columns % parts:
        yield f"{columns} columns are not {parts} equal parts"
    if interleaved and parts == 1:
        yield "one part cannot be interleaved"


class Pack(_OfBank, name="moe.pack"):
    """A bank in tiles: blocks of 32 columns, 16 lanes of 4 bytes side by side, zeros where the bank ends.

        %p = moe.pack(%up) {packing = "tiles", parts = 2} : tensor<8x3x4x2x16x16x1xf32>

    For a lane of V = 4 / itemsize values, p[e, b, s, j, r, c, v] is w[e, n, (s * 16 + r) * V + v]. With two parts, as
    an activation takes them, n is column b * 16 + c of part j; else n is b * 32 + j * 16 + c.

    Quantised values are w / scale, rounded: int8, or two int4 to a byte (`sparsec.runtime.tiles` says in which order).

        %s = moe.scales(%up) {packing = "int4", parts = 2} : tensor<8x3x1x2x16xf32>
        %p = moe.pack(%up, %s) {packing = "int4", parts = 2} : tensor<8x3x1x2x16x16x4xui8>

    Kernels for GPUs read blocks (`sparsec.runtime.blocks`): fp8 with a scale for 128 x 128 values, or mxfp4 with one
    for each 32 of a column. Their columns stay in order.

        %s = moe.scales(%down) {packing = "mxfp4"} : tensor<8x1x64x4xui8>
        %p = moe.pack(%down, %s) {packing = "mxfp4"} : tensor<8x1x64x64xui8>
    """

    w: Operand  #: [E, N, K], or [E, K, N] if transposed; bf16 or f32 for tiles
    scales: OptOperand  #: as `moe.scales` gives them, but for tiles
    packed: Result  #: [E, NB, KB, 2, 16, 16, V]; for fp8 [E, N, K], for mxfp4 [E, K / 128, N, 64]
    packing: Tiling
    parts: Parts = 1
    transposed: bool = False
    interleaved: bool = False  #: columns of part 0 and part 1 alternate in w

    def infer(self) -> tuple[Type, ...]:
        return (packed_type(self.packing, self.parts, *self.sizes, self.w.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        wanted = None if self.w.tensor.rank != 3 else scale_type(self.packing, self.parts, *self.sizes)
        given = None if self.scales is None else self.scales.type
        if given != wanted:
            yield f"the scales of packing '{self.packing}' are {wanted or 'left out'}, not {given or 'left out'}"
        yield from self.problems()

    def cost(self, env: Mapping[str, int]) -> Cost:
        return self.moved()

    def reference(self, env: Env, *args: Any) -> Any:
        from sparsec.runtime import blocks
        from sparsec.runtime.tiles import pack

        if self.packing in BLOCKS:
            return blocks.pack(args[0], args[1], self.transposed, self.packing)
        return pack(args[0], self.parts, self.transposed, self.interleaved, self.packing, *args[1:])


class Scales(_OfBank, name="moe.scales"):
    """Scales of a bank to be quantised: symmetric, of least squared error among a few for each column or group.

        %s = moe.scales(%down) {packing = "int8"} : tensor<8x2x1x2x16xf32>

    int8 has one scale for each column, int4 one for each 128 values of a column; those may be negative. fp8 has one for
    each block of 128 x 128 values, mxfp4 a power of two for each 32 values of a column, its exponent plus 127.
    """

    w: Operand  #: as of `moe.pack`, as all that follow
    scales: Result  #: f32 [E, NB, G, 2, 16]; for fp8 f32 [E, N / 128, K / 128], for mxfp4 ui8 [E, K / 128, N, 4]
    packing: Tiling  #: any but tiles
    parts: Parts = 1
    transposed: bool = False
    interleaved: bool = False

    def infer(self) -> tuple[Type, ...]:
        made = scale_type(self.packing, self.parts, *self.sizes)
        return () if made is None else (made,)

    def verify(self) -> Iterator[str]:
        if self.packing == "tiles":
            yield "tiles hold the values themselves: they have no scales"
        yield from self.problems()

    def cost(self, env: Mapping[str, int]) -> Cost:
        return self.moved()

    def reference(self, env: Env, *args: Any) -> Any:
        from sparsec.runtime import blocks
        from sparsec.runtime.tiles import find_scales

        if self.packing in BLOCKS:
            return blocks.find_scales(args[0], self.transposed, self.packing)
        return find_scales(args[0], self.parts, self.transposed, self.interleaved, self.packing)


class PackBias(OpDef, name="moe.pack_bias"):
    """The bias of a packed bank, in the order of its columns.

    For example:

        %b = moe.pack_bias(%bias) {parts = 2} : tensor<8x3x2x16xf32>
    """

    bias: Operand  #: [E, N], float
    packed: Result  #: [E, NB, 2, 16], f32
    parts: Parts = 1
    interleaved: bool = False

    def infer(self) -> tuple[Type, ...]:
        experts, columns = map(known, self.bias.tensor.shape)
        return (packed_bias_type(self.parts, experts, columns),)

    def verify(self) -> Iterator[str]:
        if not isinstance(self.bias.type, TensorType) or self.bias.tensor.rank != 2:
            yield f"bias is {self.bias.type}, must be [experts, columns]"
            return
        yield from part_problems(self.parts, self.interleaved, known(self.bias.tensor.shape[1]))
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(bytes_of(self.bias.type, env) + bytes_of(self.packed.type, env), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        from sparsec.runtime.tiles import pack_bias

        return pack_bias(args[0], self.parts, self.interleaved)
