"""Gradients of an expert layer, as kernels compute them from what the forward pass had: nothing inside it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsec.dialects.moe.common import (
    Layout,
    bank_cost,
    bank_problems,
    bytes_of,
    known,
    offsets_problems,
    padded,
    results_are,
    tiles_problems,
)
from sparsec.ir.opdef import Body, Cost, Env, OpDef, Operand, OptOperand, Result
from sparsec.ir.types import DType, TensorType, Type, evaluate, product


class HiddenGrad(OpDef, name="moe.hidden_grad"):
    """Gradients of what an expert's up-projection yields and of the routing weights; the up-projection is done again.

    Rows of `h_grad` and `h` are in the order of `order`, as of moe.gather_gemm; those from offsets[E] on are not
    defined. The region gives the activation's value and, from the gradient of that value, those of its arguments.

    For example:

        %g, %h, %w = moe.hidden_grad(%y_grad, %x, %order, %offsets, %weights, %up, %down)
            : tensor<(2*s0)x96xf32>, tensor<(2*s0)x48xf32>, tensor<s0x2xf32> {
          gradient(%d: tensor<rx48xf32>, %a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
            %h = aten.mul.Tensor(%a, %b) : tensor<rx48xf32>
            %da = aten.mul.Tensor(%d, %b) : tensor<rx48xf32>
            %db = aten.mul.Tensor(%d, %a) : tensor<rx48xf32>
            yield %h, %da, %db
        }
    """

    y_grad: Operand  #: [T, H], of moe.experts' result
    x: Operand  #: [T, H]
    order: Operand  #: [T * k], i32
    offsets: Operand  #: [E + 1], i32
    weights: Operand  #: [T, k], float
    up: Operand  #: as of moe.experts
    down: Operand  #: as of moe.experts
    up_bias: OptOperand
    down_bias: OptOperand
    tiles: OptOperand  #: as of moe.gather_gemm
    h_grad: Result  #: [T * k, P * I], dtype of x: of the up-projection's columns
    h: Result  #: [T * k, I], dtype of x: activated rows times their pair's weight
    weights_grad: Result  #: [T, k], dtype of weights; 0 for a pair that is skipped
    layout: Layout = "concat"
    up_transposed: bool = False
    down_transposed: bool = False
    variants: tuple[dict[str, Any], ...] = ()  #: as of moe.gather_gemm
    gradient: Body  #: pointwise in f32: gradient of the activation's value, its P arguments -> value, their gradients

    @property
    def num_experts(self) -> int:
        return known(self.up.tensor.shape[0])

    @property
    def k(self) -> int:
        return known(self.weights.tensor.shape[-1])

    @property
    def width(self) -> int:
        return known(self.down.tensor.shape[1 if self.down_transposed else 2])

    @property
    def parts(self) -> int:
        """How many equal parts of the up-projection's columns the activation takes."""
        return 1 if self.layout == "single" else 2

    def infer(self) -> tuple[Type, ...]:
        pairs, dtype = product((self.x.tensor.shape[0], self.k)), self.x.tensor.dtype
        wide, narrow = TensorType((pairs, self.parts * self.width), dtype), TensorType((pairs, self.width), dtype)
        return (wide, narrow, self.weights.type)

    def verify(self) -> Iterator[str]:
        yield from bank_problems(self.x.tensor.shape[-1], self.up, self.up_transposed, self.layout, self.width)
        yield from offsets_problems(self.offsets, self.num_experts)
        yield from tiles_problems(self.tiles, self.order, self.num_experts)
        if self.y_grad.tensor.shape[-1] != self.down.tensor.shape[2 if self.down_transposed else 1]:
            yield f"y_grad is {self.y_grad.type}, down {self.down.type}: their columns differ"
        taken = [(arg.tensor.shape[-1], arg.tensor.dtype) for arg in self.gradient.args]
        if taken != [(self.width, DType.f32)] * (1 + self.parts):
            yield f"gradient must take {1 + self.parts} f32 tensors of {self.width} columns"
        if len(self.gradient.terminator.operands) != 1 + self.parts:
            yield f"gradient must yield the activation's value and the gradients of its {self.parts} arguments"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.x.tensor.shape[0], env)
        rest = (self.y_grad, self.x, self.order, self.offsets, self.weights, *self.results)
        return bank_cost((self.up, self.down, self.up_bias), rest, tokens, self.k, env)

    def reference(self, env: Env, *args: Any) -> Any:
        from sparsec.runtime.gradients import hidden_grad

        def gradient(rows: list[Any]) -> tuple[Any, ...]:
            return env.run(self.gradient, rows)

        given = padded(self, args, 10)
        return hidden_grad(given[:7], given[7:9], gradient, self.layout, self.up_transposed, self.down_transposed)


class BankGrad(OpDef, name="moe.bank_grad"):
    """Gradient of a bank: for each expert the outer products, added, of a row of its own and one of a token; zeros for
    an expert without rows.

    For example:

        %g = moe.bank_grad(%h, %x, %order, %offsets) {k = 2} : tensor<8x48x64xf32>
    """

    rows: Operand  #: [T * k, N], in the order of `order`
    tokens: Operand  #: [T, K]: row i goes with that of pair order[i]
    order: Operand  #: [T * k], i32
    offsets: Operand  #: [E + 1], i32
    grad: Result  #: [E, N, K], or [E, K, N] if transposed; dtype of rows
    k: int
    transposed: bool = False
    variants: tuple[dict[str, Any], ...] = ()  #: as of moe.gather_gemm; blocks of N, of K, and of rows

    @property
    def num_experts(self) -> int:
        return known(self.offsets.tensor.shape[0]) - 1

    def infer(self) -> tuple[Type, ...]:
        sizes = (self.rows.tensor.shape[-1], self.tokens.tensor.shape[-1])
        sizes = sizes[::-1] if self.transposed else sizes
        return (TensorType((self.num_experts, *sizes), self.rows.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        if self.rows.tensor.dtype is not self.tokens.tensor.dtype:
            yield f"rows are {self.rows.type}, tokens {self.tokens.type}: their dtypes differ"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        moved = sum(bytes_of(value.type, env) for value in (*self.operands, self.grad))
        pairs, n = (evaluate(dim, env) for dim in self.rows.tensor.shape)
        return Cost(moved, 2 * pairs * n * evaluate(self.tokens.tensor.shape[-1], env))

    def reference(self, env: Env, *args: Any) -> Any:
        from sparsec.runtime.gradients import bank_grad

        rows, tokens, order, offsets = args
        return (bank_grad(rows, tokens, order, offsets, self.k, self.transposed),)


class BiasGrad(OpDef, name="moe.bias_grad"):
    """Gradient of a bank's bias: for each expert the sum of its rows; with `weights` of rows of tokens, weighed.

    For example:

        %g = moe.bias_grad(%h, %order, %offsets) : tensor<8x48xf32>
    """

    rows: Operand  #: [T * k, N], in the order of `order`; with weights [T, N]: those of the pairs order[i]
    order: Operand  #: [T * k], i32
    offsets: Operand  #: [E + 1], i32
    weights: OptOperand  #: [T, k], float
    grad: Result  #: [E, N], dtype of rows
    variants: tuple[dict[str, Any], ...] = ()  #: as of moe.gather_gemm; blocks of rows and of N

    @property
    def k(self) -> int:
        """Pairs that a row stands for."""
        return 1 if self.weights is None else known(self.weights.tensor.shape[-1])

    @property
    def num_experts(self) -> int:
        return known(self.offsets.tensor.shape[0]) - 1

    def infer(self) -> tuple[Type, ...]:
        return (TensorType((self.num_experts, self.rows.tensor.shape[-1]), self.rows.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        if self.weights is not None and self.weights.tensor.shape[0] != self.rows.tensor.shape[0]:
            yield f"weights are {self.weights.type}, rows {self.rows.type}: their tokens differ"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        moved = sum(bytes_of(value.type, env) for value in (*self.operands, self.grad))
        return Cost(moved, evaluate(product(self.rows.tensor.shape), env) * 2 * self.k)

    def reference(self, env: Env, *args: Any) -> Any:
        from sparsec.runtime.gradients import bias_grad

        rows, order, offsets, weights = padded(self, args, 4)
        return (bias_grad(rows, order, offsets, weights),)
