"""The two GEMMs of an expert layer, as kernels compute them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsec.dialects.moe.common import (
    BlockActivations,
    BlockPacking,
    Layout,
    activation_problems,
    bank_columns,
    bank_cost,
    bank_problems,
    block_problems,
    known,
    offsets_problems,
    padded,
    results_are,
    rounding_problems,
    tail_problems,
    tiles_problems,
)
from sparsec.dialects.moe.references import (
    gather_gemm_reference,
    gemm_combine_reference,
    rounded,
    unblock_reference,
)
from sparsec.ir.opdef import Body, Cost, Env, OpDef, Operand, Operands, OptBody, OptOperand, Result
from sparsec.ir.types import TensorType, Type, evaluate, product


class GatherGemm(OpDef, name="moe.gather_gemm"):
    """First half of an expert layer: gather rows, multiply by the expert's up-projection, activate. One kernel.

    Row i of the result belongs to pair order[i]; rows from offsets[E] on are not defined.

        %h = moe.gather_gemm(%x, %order, %offsets, %up) {k = 2} : tensor<(2*s0)x48xf32> {
          activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
            %g = aten.silu(%a) : tensor<rx48xf32>
            %h = aten.mul.Tensor(%g, %b) : tensor<rx48xf32>
            yield %h
        }

    `packing` says how the bank lies in memory: but for "plain" it is made by `moe.pack`, with scales by `moe.scales`,
    and its columns keep their order. Values are multiplied as the packed ones with their scales stand for.

    With `activations = "fp8"`, for banks of fp8, the rows of x are rounded first: in each group of 128 columns to e4m3
    times the least power of two that keeps the largest at 448 or below. bf16 holds what they become, so it makes no
    difference in what they are multiplied. A row that is not finite, or would not be so in x's dtype once it is
    rounded, makes all of its results NaN.
    """

    x: Operand  #: [T, H]
    order: Operand  #: [T * k], i32
    offsets: Operand  #: [E + 1], i32
    up: Operand  #: as of moe.experts
    up_bias: OptOperand
    weights: OptOperand  #: [T, k], float: each row of x is multiplied by its pair's, before the bias
    up_scale: OptOperand  #: of packed banks
    tiles: OptOperand  #: as of moe.group: spares kernels the search for their rows
    h: Result  #: [T * k, I], dtype of x
    k: int
    layout: Layout = "concat"
    up_transposed: bool = False
    packing: BlockPacking = "plain"
    activations: BlockActivations = "model"
    variants: tuple[dict[str, Any], ...] = ()  #: set by `schedule`: {up_to, ...} by ascending token count
    activation: Body

    @property
    def num_experts(self) -> int:
        return known(self.up.tensor.shape[0])

    @property
    def width(self) -> int:
        columns = known(bank_columns(self.up, self.up_transposed, self.packing))
        return columns if self.layout == "single" else columns // 2

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape [E, N, K] of the bank before it was packed."""
        columns = known(bank_columns(self.up, self.up_transposed, self.packing))
        return {"up": (self.num_experts, columns, known(self.x.tensor.shape[-1]))}

    def infer(self) -> tuple[Type, ...]:
        return (TensorType((product((self.x.tensor.shape[0], self.k)), self.width), self.x.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        if self.packing == "plain":
            yield from bank_problems(self.x.tensor.shape[-1], self.up, self.up_transposed, self.layout, self.width)
        hidden = self.x.tensor.shape[-1]
        yield from block_problems("up", self.up, self.up_scale, hidden, self.up_transposed, self.packing)
        yield from rounding_problems(self.activations, self.packing)
        yield from activation_problems(self.activation, self.layout, self.width)
        yield from offsets_problems(self.offsets, self.num_experts)
        yield from tiles_problems(self.tiles, self.order, self.num_experts)
        if self.weights is not None and self.weights.tensor.shape != (self.x.tensor.shape[0], self.k):
            yield f"weights are {self.weights.type}, must be [tokens, {self.k}]"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.x.tensor.shape[0], env)
        rest = [v for v in (self.x, self.order, self.offsets, self.weights, self.tiles, self.h) if v is not None]
        matmul = known(self.x.tensor.shape[-1]) * known(bank_columns(self.up, self.up_transposed, self.packing))
        return bank_cost((self.up, self.up_bias, self.up_scale), rest, tokens, self.k, env, matmul)

    def reference(self, env: Env, *args: Any) -> Any:
        x, order, offsets, up, up_bias, weights, up_scale, _ = padded(self, args, 8)
        up = unblock_reference(up, up_scale, self.packing, x.shape[-1])
        return gather_gemm_reference(
            env, self.activation, self.layout, x, order, offsets, up, up_bias, self.up_transposed, self.k, weights,
            self.activations,
        )  # fmt: skip


class GemmCombine(OpDef, name="moe.gemm_combine"):
    """Second half: multiply by the expert's down-projection, finish the rows, weigh, and add the k of each token.

    For example:

        %y = moe.gemm_combine(%h, %order, %offsets, %weights, %down) : tensor<s0x64xf32>
    """

    h: Operand  #: [T * k, I], as of moe.gather_gemm
    order: Operand  #: [T * k], i32
    offsets: Operand  #: [E + 1], i32
    weights: Operand  #: [T, k], float; of any kind if not weighted: then only its shape counts
    down: Operand  #: as of moe.experts
    down_bias: OptOperand
    down_scale: OptOperand  #: of packed banks
    tiles: OptOperand  #: as of moe.group
    tail_params: Operands  #: as of moe.experts
    y: Result  #: [T, H], dtype of h
    down_transposed: bool = False
    packing: BlockPacking = "plain"  #: as of moe.gather_gemm
    activations: BlockActivations = "model"  #: as of moe.gather_gemm: how rows of h are rounded
    weighted: bool = True  #: whether the results are weighed, or added as they are
    variants: tuple[dict[str, Any], ...] = ()
    tail: OptBody  #: as of moe.experts

    @property
    def num_experts(self) -> int:
        return known(self.down.tensor.shape[0])

    @property
    def k(self) -> int:
        return known(self.weights.tensor.shape[-1])

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape [E, N, K] of the bank before it was packed."""
        return {"down": (self.num_experts, known(self.y.tensor.shape[-1]), known(self.h.tensor.shape[-1]))}

    def infer(self) -> tuple[Type, ...]:
        columns = bank_columns(self.down, self.down_transposed, self.packing)
        return (TensorType((self.weights.tensor.shape[0], columns), self.h.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        width = self.h.tensor.shape[-1]
        inner = self.down.tensor.shape[1 if self.down_transposed else 2] if self.packing == "plain" else width
        yield from block_problems("down", self.down, self.down_scale, width, self.down_transposed, self.packing)
        yield from rounding_problems(self.activations, self.packing)
        if width != inner:
            yield f"h has {self.h.tensor.shape[-1]} columns, down takes {inner}"
        if self.weighted and not self.weights.tensor.dtype.is_float:
            yield f"weights are {self.weights.type}, not floats"
        yield from offsets_problems(self.offsets, self.num_experts)
        yield from tiles_problems(self.tiles, self.order, self.num_experts)
        yield from tail_problems(self.tail, self.tail_params, self.y.tensor)
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.weights.tensor.shape[0], env)
        rest = [self.h, self.order, self.offsets, self.weights, *self.tail_params, self.y]
        rest += [self.tiles] if self.tiles is not None else []
        matmul = known(self.h.tensor.shape[-1]) * known(self.y.tensor.shape[-1])
        return bank_cost((self.down, self.down_bias, self.down_scale), rest, tokens, self.k, env, matmul)

    def reference(self, env: Env, *args: Any) -> Any:
        h, order, offsets, weights, down, down_bias, down_scale, _, *params = padded(self, args, 8)
        down = unblock_reference(down, down_scale, self.packing, h.shape[-1])
        dtype, h = h.dtype, rounded(h, self.activations)
        tail = self.tail
        finish = None if tail is None else lambda rows: env.run(tail, [rows, *params])[0]
        return gemm_combine_reference(
            h, order, offsets, weights, down, down_bias, self.down_transposed, dtype, self.weighted, finish
        )
