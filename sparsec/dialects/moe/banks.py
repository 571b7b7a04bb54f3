"""Banks of experts, as models have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sparsec.dialects.moe.common import (
    TILE_DTYPES,
    Activations,
    Layout,
    Packing,
    activation_problems,
    bank_cost,
    bank_problems,
    known,
    packed_bias_type,
    packed_type,
    padded,
    region_takes,
    region_yields,
    results_are,
    scale_type,
    tail_problems,
)
from sparsec.dialects.moe.references import (
    gather_gemm_reference,
    gemm_combine_reference,
    group_reference,
    rounded,
    unpack_reference,
)
from sparsec.dialects.moe.routing import route_problems
from sparsec.ir.core import Value
from sparsec.ir.opdef import Body, Cost, Env, OpDef, Operand, Operands, OptBody, OptOperand, Result, Results
from sparsec.ir.types import TensorType, Type, evaluate


class ExpertBank(OpDef):
    """What the ops over a bank of expert MLPs share."""

    x: Operand
    ids: Operand  # of moe.layer a result
    up: Operand
    down: Operand
    up_bias: OptOperand
    down_bias: OptOperand
    up_scale: OptOperand
    down_scale: OptOperand
    layout: Layout
    up_transposed: bool
    down_transposed: bool
    weight_on: Literal["output", "input"]
    packing: Packing
    activations: Activations
    activation: Body
    tail: OptBody

    @property
    def k(self) -> int:
        """How many experts a token takes."""
        return known(self.ids.tensor.shape[-1])

    @property
    def num_experts(self) -> int:
        return known(self.up.tensor.shape[0])

    @property
    def parts(self) -> int:
        """How many equal parts of the up-projection's columns the activation takes."""
        return 1 if self.layout == "single" else 2

    @property
    def width(self) -> int:
        """I, the expert's inner width."""
        if self.packing == "plain":
            return known(self.down.tensor.shape[1 if self.down_transposed else 2])
        return next((known(arg.tensor.shape[-1]) for arg in self.activation.args), 0)

    @property
    def y_type(self) -> TensorType:
        """[T, H], dtype of x. Packed banks yield as many columns as they take."""
        rows, hidden = self.x.tensor.shape
        if self.packing == "plain":
            hidden = self.down.tensor.shape[2 if self.down_transposed else 1]
        return TensorType((rows, hidden), self.x.tensor.dtype)

    def bank_operands(self) -> tuple[Value | None, ...]:
        """Banks, biases and scales."""
        return (self.up, self.down, self.up_bias, self.down_bias, self.up_scale, self.down_scale)

    def packed_types(self) -> dict[str, TensorType | None]:
        """The types that the operands of packed banks must have, by name; a bias may be left out."""
        experts, width, hidden = self.num_experts, self.width, known(self.x.tensor.shape[-1])
        made: dict[str, TensorType | None] = {}
        for name, parts, n, k in (("up", self.parts, self.parts * width, hidden), ("down", 1, hidden, width)):
            made[name] = packed_type(self.packing, parts, experts, n, k, self.x.tensor.dtype)
            made[f"{name}_bias"] = packed_bias_type(parts, experts, n)
            made[f"{name}_scale"] = scale_type(self.packing, parts, experts, n, k)
        return made

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of banks and biases before they were packed, by name: [E, N, K] and [E, N]."""
        experts, width, hidden = self.num_experts, self.width, known(self.x.tensor.shape[-1])
        up, down = self.parts * width, known(self.y_type.shape[-1])
        return {
            "up": (experts, up, hidden),
            "down": (experts, down, width),
            "up_bias": (experts, up),
            "down_bias": (experts, down),
        }

    def bank_verify(self, tail_params: Sequence[Value]) -> Iterator[str]:
        """Problems of banks, activation and tail."""
        if self.packing == "plain":
            yield from bank_problems(self.x.tensor.shape[-1], self.up, self.up_transposed, self.layout, self.width)
            if self.up_scale is not None or self.down_scale is not None:
                yield "has scales, but its banks are not quantised"
        else:
            yield from self._packed_problems()
        if self.activations == "int8" and self.packing not in ("int8", "int4"):
            yield f"activations are int8, but packing is '{self.packing}': only quantised banks are multiplied by them"
        yield from activation_problems(self.activation, self.layout, self.width)
        yield from tail_problems(self.tail, tail_params, self.y_type)
        if self.up.tensor.shape[0] != self.down.tensor.shape[0]:
            yield f"up has {self.up.tensor.shape[0]} experts, down {self.down.tensor.shape[0]}"

    def _packed_problems(self) -> Iterator[str]:
        if self.x.tensor.dtype not in TILE_DTYPES:
            yield f"x is {self.x.type}: packed banks are for {' and '.join(dtype.value for dtype in TILE_DTYPES)}"
            return
        if self.up_transposed or self.down_transposed or self.layout == "interleaved":
            yield "packed banks are neither transposed nor interleaved"
        for name, wanted in self.packed_types().items():
            given = getattr(self, name)
            if given is None and (wanted is None or name.endswith("_bias")):
                continue
            if given is None or given.type != wanted:
                has = "is left out" if given is None else f"is {given.type}"
                needs = "must be left out" if wanted is None else f"must be {wanted}"
                yield f"packing '{self.packing}': '{name}' {has}, {needs}"

    def bank_moved(self, rest: Sequence[Value], k: int, env: Mapping[str, int]) -> Cost:
        """Cost of the GEMMs, with `rest` read and written once."""
        hidden, columns = known(self.x.tensor.shape[-1]), known(self.y_type.shape[-1])
        tokens = evaluate(self.x.tensor.shape[0], env)
        matmul = self.width * (self.parts * hidden + columns)
        return bank_cost(self.bank_operands(), rest, tokens, k, env, matmul)

    def bank_reference(self, env: Env, x: Any, ids: Any, weights: Any, banks: Sequence[Any], params: Any) -> Any:
        """y; `banks` are up, down, up_bias, down_bias, up_scale, down_scale, and `params` the tail's."""
        up, down, up_bias, down_bias, up_scale, down_scale = banks
        if self.packing != "plain":
            width, hidden = self.width, x.shape[-1]
            rows = self.parts * width
            up, up_bias = unpack_reference(up, up_bias, up_scale, self.packing, self.parts, rows, hidden)
            down, down_bias = unpack_reference(down, down_bias, down_scale, self.packing, 1, hidden, width)
        order, offsets = group_reference(ids, up.shape[0])
        early, tail = self.weight_on == "input", self.tail
        h = gather_gemm_reference(
            env, self.activation, self.layout, x, order, offsets, up, up_bias, self.up_transposed, ids.shape[-1],
            weights if early else None, self.activations,
        )  # fmt: skip
        h = rounded(h, self.activations)
        finish = None if tail is None else lambda rows: env.run(tail, [rows, *params])[0]
        return gemm_combine_reference(
            h, order, offsets, weights, down, down_bias, self.down_transposed, x.dtype, not early, finish
        )


class Experts(ExpertBank, name="moe.experts"):
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

    `packing` says how the banks lie in memory; all but "plain" are made by `moe.pack`, with scales by `moe.scales` if
    they are quantised. Packed banks are never transposed or interleaved, and biases of packed banks are packed too.

    With `activations = "int8"`, for quantised banks, what they are multiplied by is rounded as well: each row of x to
    multiples of max|row| / 127, and the activated rows so in each group of 128 columns. A row that is not finite
    makes all of its results NaN.
    """

    x: Operand  #: [T, H]
    ids: Operand  #: [T, k], integer
    weights: Operand  #: [T, k], float
    up: Operand  #: [E, P * I, H], or [E, H, P * I] if up_transposed; P parts: 2 unless layout is "single"
    down: Operand  #: [E, H, I], or [E, I, H] if down_transposed
    up_bias: OptOperand  #: [E, P * I]
    down_bias: OptOperand  #: [E, H]
    up_scale: OptOperand  #: of quantised banks
    down_scale: OptOperand
    tail_params: Operands  #: what the tail reads besides the rows: a norm's weight [H] ...
    y: Result  #: [T, H], dtype of x
    layout: Layout = "concat"
    up_transposed: bool = False
    down_transposed: bool = False
    weight_on: Literal["output", "input"] = "output"
    packing: Packing = "plain"
    activations: Activations = "model"
    activation: Body  #: pointwise over rows r: one [r, I] per part -> [r, I]
    tail: OptBody  #: over whole rows r: [r, H], *tail_params -> [r, H]

    def infer(self) -> tuple[Type, ...]:
        return (self.y_type,)

    def verify(self) -> Iterator[str]:
        yield from self.bank_verify(self.tail_params)
        if self.ids.tensor.shape != self.weights.tensor.shape:
            yield f"ids are {self.ids.type}, weights {self.weights.type}: shapes differ"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return self.bank_moved((self.x, self.ids, self.weights, *self.tail_params, self.y), self.k, env)

    def reference(self, env: Env, *args: Any) -> Any:
        x, ids, weights, *rest = padded(self, args, 9)
        return self.bank_reference(env, x, ids, weights, rest[:6], rest[6:])


class Layer(ExpertBank, name="moe.layer"):
    """`moe.route` and the `moe.experts` that reads its ids and weights in one kernel, for CPUs.

    For example:

        %y, %ids, %weights = moe.layer(%x, %logits, %up, %down)
            : tensor<s0x64xf32>, tensor<s0x2xi64>, tensor<s0x2xf32> {
          router(%z: tensor<s0x8xf32>):
            %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x8xf32>
            %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
            yield %e, %w
          activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
            %g = aten.silu(%a) : tensor<rx48xf32>
            %h = aten.mul.Tensor(%g, %b) : tensor<rx48xf32>
            yield %h
        }

    Further banks on the same route stay `moe.experts` and read this op's ids and weights.
    """

    x: Operand  #: [T, H]
    logits: Operand  #: [T, n], as of moe.route
    up: Operand  #: as of moe.experts, as all that follow
    down: Operand
    up_bias: OptOperand
    down_bias: OptOperand
    up_scale: OptOperand
    down_scale: OptOperand
    params: Operands  #: those of the router, then those of the tail
    y: Result  #: [T, H], dtype of x
    ids: Result  #: [T, k], integer
    weights: Result  #: [T, k], float
    extras: Results  #: [T, n] each, as of moe.route
    layout: Layout = "concat"
    up_transposed: bool = False
    down_transposed: bool = False
    weight_on: Literal["output", "input"] = "output"
    packing: Packing = "plain"
    activations: Activations = "model"
    router: Body  #: as the body of moe.route
    activation: Body  #: as of moe.experts
    tail: OptBody  #: as of moe.experts

    @property
    def router_params(self) -> Operands:
        return self.params[: len(self.router.args) - 1]

    @property
    def tail_params(self) -> Operands:
        return self.params[len(self.router.args) - 1 :]

    def infer(self) -> tuple[Type, ...]:
        return (self.y_type, *(value.type for value in self.router.terminator.operands))

    def verify(self) -> Iterator[str]:
        yield from self.bank_verify(self.tail_params)
        yield from region_takes(self.router, [value.type for value in (self.logits, *self.router_params)])
        yield from region_yields(self.router, [value.type for value in (self.ids, self.weights, *self.extras)])
        yield from route_problems(self.logits, self.ids, self.weights, self.extras)
        if self.x.tensor.shape[0] != self.logits.tensor.shape[0]:
            yield f"x is {self.x.type}, the logits {self.logits.type}: their rows differ"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        banks = self.bank_moved((self.x, self.logits, *self.params, *self.results), self.k, env)
        tokens, columns = (evaluate(dim, env) for dim in self.logits.tensor.shape)
        return banks + Cost(0, tokens * columns * len(self.router.ops))

    def reference(self, env: Env, *args: Any) -> Any:
        x, logits, *rest = padded(self, args, 8)
        banks, params = rest[:6], rest[6:]
        count = len(self.router.args) - 1
        ids, weights, *extras = env.run(self.router, [logits, *params[:count]])
        return (self.bank_reference(env, x, ids, weights, banks, params[count:]), ids, weights, *extras)


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
