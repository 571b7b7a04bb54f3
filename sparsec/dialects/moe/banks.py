"""Banks of experts, as models have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from sparsec.dialects.moe.common import (
    Layout,
    activation_problems,
    bank_cost,
    bank_problems,
    known,
    padded,
    results_are,
    tail_problems,
)
from sparsec.dialects.moe.references import gather_gemm_reference, gemm_combine_reference, group_reference
from sparsec.ir.opdef import Body, Cost, Env, OpDef, Operand, Operands, OptBody, OptOperand, Result
from sparsec.ir.types import TensorType, Type, evaluate


class Experts(OpDef, name="moe.experts"):
    """A bank of expert MLPs: for each token the weighted sum of down(activation(up(x))) over its experts.

    For example:

        %y = moe.experts(%x, %ids, %weights, %up, %down) {layout = "concat"} : tensor<s0x64xf32> {
          activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
            %g = aten.silu(%a) : tensor<rx48xf32>
            %h = aten.mul.Tensor(%g, %b) : tensor<rx48xf32>
            yield %h
        }

    With `weight_on = "input"` x is multiplied by the weight in front of the up-projection, and the results are added
    as they are. A region `tail` sees whole rows of each expert's result before they are weighed:

        %y = moe.experts(%x, %ids, %weights, %up, %down) {weight_on = "input"} : tensor<s0x64xf32> {
          activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
            %h = aten.mul.Tensor(%a, %b) : tensor<rx48xf32>
            yield %h
          tail(%z: tensor<rx64xf32>):
            %n = aten.softmax.int(%z) {dim = -1} : tensor<rx64xf32>
            yield %n
        }
    """

    x: Operand  #: [T, H]
    ids: Operand  #: [T, k], integer
    weights: Operand  #: [T, k], float
    up: Operand  #: [E, P * I, H], or [E, H, P * I] if up_transposed; P parts: 2 unless layout is "single"
    down: Operand  #: [E, H, I], or [E, I, H] if down_transposed
    up_bias: OptOperand  #: [E, P * I]
    down_bias: OptOperand  #: [E, H]
    tail_params: Operands  #: what the tail reads besides the rows: a norm's weight [H] ...
    y: Result  #: [T, H], dtype of x
    layout: Layout = "concat"
    up_transposed: bool = False
    down_transposed: bool = False
    weight_on: Literal["output", "input"] = "output"
    activation: Body  #: pointwise over rows r: one [r, I] per part -> [r, I]
    tail: OptBody  #: over whole rows r: [r, H], *tail_params -> [r, H]

    @property
    def num_experts(self) -> int:
        return known(self.up.tensor.shape[0])

    @property
    def k(self) -> int:
        return known(self.ids.tensor.shape[-1])

    @property
    def width(self) -> int:
        """I, the expert's inner width."""
        return known(self.down.tensor.shape[1 if self.down_transposed else 2])

    def infer(self) -> tuple[Type, ...]:
        rows = self.x.tensor.shape[0]
        return (TensorType((rows, self.down.tensor.shape[2 if self.down_transposed else 1]), self.x.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        yield from bank_problems(self.x.tensor.shape[-1], self.up, self.up_transposed, self.layout, self.width)
        yield from activation_problems(self.activation, self.layout, self.width)
        yield from tail_problems(self.tail, self.tail_params, self.y.tensor)
        if self.ids.tensor.shape != self.weights.tensor.shape:
            yield f"ids are {self.ids.type}, weights {self.weights.type}: shapes differ"
        if self.up.tensor.shape[0] != self.down.tensor.shape[0]:
            yield f"up has {self.up.tensor.shape[0]} experts, down {self.down.tensor.shape[0]}"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.x.tensor.shape[0], env)
        banks = (self.up, self.down, self.up_bias, self.down_bias)
        return bank_cost(banks, (self.x, self.ids, self.weights, *self.tail_params, self.y), tokens, self.k, env)

    def reference(self, env: Env, *args: Any) -> Any:
        x, ids, weights, up, down, up_bias, down_bias, *params = padded(self, args, 7)
        order, offsets = group_reference(ids, up.shape[0])
        early, tail = self.weight_on == "input", self.tail
        h = gather_gemm_reference(
            env, self.activation, self.layout, x, order, offsets, up, up_bias, self.up_transposed, ids.shape[-1],
            weights if early else None,
        )  # fmt: skip
        finish = None if tail is None else lambda rows: env.run(tail, [rows, *params])[0]
        return gemm_combine_reference(
            h, order, offsets, weights, down, down_bias, self.down_transposed, x.dtype, not early, finish
        )


class GroupedLinear(OpDef, name="moe.grouped_linear"):
    """One linear per expert: for each pair x @ w[e].T + bias[e], zeros for a pair that is skipped.

    For example:

        %y = moe.grouped_linear(%x, %ids, %up) : tensor<s0x2x96xf32>

    With `weights` the results of a token are weighed and added.
    """

    x: Operand  #: [T, K]: the same for all pairs of a token; or [T, k, K]
    ids: Operand  #: [T, k], integer
    w: Operand  #: [E, N, K], or [E, K, N] if transposed
    bias: OptOperand  #: [E, N]
    weights: OptOperand  #: [T, k], float
    y: Result  #: [T, k, N], dtype of x; [T, N] with weights
    transposed: bool = False

    @property
    def num_experts(self) -> int:
        return known(self.w.tensor.shape[0])

    @property
    def k(self) -> int:
        return known(self.ids.tensor.shape[-1])

    def infer(self) -> tuple[Type, ...]:
        tokens, k = self.ids.tensor.shape
        columns = self.w.tensor.shape[2 if self.transposed else 1]
        shape = (tokens, columns) if self.weights is not None else (tokens, k, columns)
        return (TensorType(shape, self.x.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        if self.ids.tensor.rank != 2 or self.ids.tensor.dtype.is_float:
            yield f"ids are {self.ids.type}, must be [tokens, k] integers"
            return
        inner = self.w.tensor.shape[1 if self.transposed else 2]
        if self.x.tensor.shape not in ((self.ids.tensor.shape[0], inner), (*self.ids.tensor.shape, inner)):
            yield f"x is {self.x.type}: the ids are {self.ids.type}, w takes {inner!r} columns"
        if self.weights is not None and self.weights.tensor.shape != self.ids.tensor.shape:
            yield f"ids are {self.ids.type}, weights {self.weights.type}: shapes differ"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.ids.tensor.shape[0], env)
        rest = [value for value in (self.x, self.ids, self.weights, self.y) if value is not None]
        return bank_cost((self.w, self.bias), rest, tokens, self.k, env)

    def reference(self, env: Env, *args: Any) -> Any:
        x, ids, w, bias, weights = padded(self, args, 5)
        (tokens, k), experts = ids.shape, w.shape[0]
        order, offsets = group_reference(ids, experts)
        pairs = order.long()
        rows = x.flatten(0, 1)[pairs] if x.dim() == 3 else x[pairs // k]
        if weights is not None:
            return gemm_combine_reference(rows, order, offsets, weights, w, bias, self.transposed, x.dtype)
        single = ids.reshape(-1, 1)
        y = gemm_combine_reference(rows, order, offsets, single, w, bias, self.transposed, x.dtype, weighted=False)
        return y.reshape(tokens, k, y.shape[-1])
