"""Sparse experts: routing, grouping, and the two GEMMs of an expert layer.

Words: T tokens, k experts chosen per token, E experts, H hidden width, I expert width. A (token, slot) pair has the
number `token * k + slot`. An id outside 0..E-1 means "skip": the pair costs nothing and adds nothing.

Arithmetic: GEMMs accumulate in f32; the k results of a token are weighted and added in f32 in the order of its slots,
and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from sparsec.ir.opdef import Body, Cost, Env, OpDef, Operand, Operands, OptOperand, Result
from sparsec.ir.types import Dim, DType, TensorType, Type, evaluate, product

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["concat", "interleaved", "single"]
"""How the up-projection's columns feed the activation: gate half then up half, alternating, or one undivided part."""


def bytes_of(type: Type, env: Mapping[str, int]) -> int:
    """Bytes of a tensor for the symbol values in `env`."""
    if not isinstance(type, TensorType):
        return 8
    return evaluate(product(type.shape), env) * type.dtype.itemsize


def experts_hit(experts: int, k: int, tokens: int) -> float:
    """Expected number of distinct experts for `tokens` tokens under uniform routing: E (1 - (1 - k/E)^T)."""
    return experts * (1 - (1 - k / experts) ** tokens)


class Route(OpDef, name="moe.route"):
    """Choose k experts for each token and weigh them.

    The region is the model's own router from the logits on: row-local ops (one token is one row) that yield the ids
    and the weights. Nothing else about a router is fixed.

        %ids, %weights = moe.route(%logits) : tensor<s0x2xi64>, tensor<s0x2xf32> {
          body(%z: tensor<s0x8xf32>):
            %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x8xf32>
            %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
            yield %e, %w
        }
    """

    logits: Operand  #: [T, E]
    params: Operands  #: what else the region reads: selection bias, per-expert scale ...
    ids: Result  #: [T, k], integer
    weights: Result  #: [T, k], float
    body: Body  #: (logits, *params) -> (ids, weights)

    @property
    def num_experts(self) -> Dim:
        return self.logits.tensor.shape[-1]

    @property
    def k(self) -> Dim:
        return self.ids.tensor.shape[-1]

    def infer(self) -> tuple[Type, ...]:
        return tuple(value.type for value in self.body.terminator.operands)

    def verify(self) -> Iterator[str]:
        yield from _region_takes(self.body, [value.type for value in self.operands])
        yield from _region_yields(self.body, [result.type for result in self.results])
        if self.ids.tensor.shape != self.weights.tensor.shape:
            yield f"ids are {self.ids.type}, weights {self.weights.type}: shapes differ"
        if self.ids.tensor.dtype.is_float:
            yield f"ids are {self.ids.tensor.dtype}, not integers"

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.logits.tensor.shape[0], env)
        moved = sum(bytes_of(value.type, env) for value in (*self.operands, *self.results))
        return Cost(moved, tokens * evaluate(self.num_experts, env) * len(self.body.ops))

    def reference(self, env: Env, *args: Any) -> Any:
        return env.run(self.body, args)


class Group(OpDef, name="moe.group"):
    """Sort the (token, slot) pairs by expert, keeping their order within an expert; skipped pairs go last.

    For example:

        %order, %offsets = moe.group(%ids) {num_experts = 8} : tensor<(2*s0)xi32>, tensor<9xi32>
    """

    ids: Operand  #: [T, k], integer
    order: Result  #: [T * k], i32: pair numbers, expert by expert
    offsets: Result  #: [E + 1], i32: expert e owns order[offsets[e]:offsets[e + 1]]
    num_experts: int
    variants: tuple[dict[str, Any], ...] = ()  #: as of moe.gather_gemm

    def infer(self) -> tuple[Type, ...]:
        return group_types(self.ids.tensor, self.num_experts)

    def verify(self) -> Iterator[str]:
        yield from _results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(sum(bytes_of(value.type, env) for value in (*self.operands, *self.results)), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        return group_reference(args[0], self.num_experts)


class RouteGroup(OpDef, name="moe.route_group"):
    """`moe.route` and `moe.group` in one kernel: choose, weigh, and sort the pairs by expert.

    For example:

        %ids, %weights, %order, %offsets = moe.route_group(%logits) {num_experts = 8}
            : tensor<s0x2xi64>, tensor<s0x2xf32>, tensor<(2*s0)xi32>, tensor<9xi32> {
          body(%z: tensor<s0x8xf32>):
            %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x8xf32>
            %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
            yield %e, %w
        }
    """

    logits: Operand  #: [T, E]
    params: Operands
    ids: Result  #: [T, k], integer
    weights: Result  #: [T, k], float
    order: Result  #: [T * k], i32, as of moe.group
    offsets: Result  #: [experts + 1], i32, as of moe.group
    num_experts: int  #: of the expert bank that the offsets are for; logits may have further columns
    variants: tuple[dict[str, Any], ...] = ()  #: as of moe.gather_gemm
    body: Body  #: as of moe.route

    def infer(self) -> tuple[Type, ...]:
        ids, weights = self.body.terminator.operands
        return (ids.type, weights.type, *group_types(ids.tensor, self.num_experts))

    def verify(self) -> Iterator[str]:
        yield from _region_takes(self.body, [value.type for value in self.operands])
        yield from _region_yields(self.body, [self.ids.type, self.weights.type])
        yield from _results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.logits.tensor.shape[0], env)
        moved = sum(bytes_of(value.type, env) for value in (*self.operands, *self.results))
        return Cost(moved, tokens * evaluate(self.logits.tensor.shape[-1], env) * len(self.body.ops))

    def reference(self, env: Env, *args: Any) -> Any:
        ids, weights = env.run(self.body, args)
        return (ids, weights, *group_reference(ids, self.num_experts))


class Experts(OpDef, name="moe.experts"):
    """A bank of expert MLPs: for each token the weighted sum of down(activation(up(x))) over its experts.

    For example:

        %y = moe.experts(%x, %ids, %weights, %up, %down) {layout = "concat"} : tensor<s0x64xf32> {
          activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
            %g = aten.silu(%a) : tensor<rx48xf32>
            %h = aten.mul.Tensor(%g, %b) : tensor<rx48xf32>
            yield %h
        }
    """

    x: Operand  #: [T, H]
    ids: Operand  #: [T, k], integer
    weights: Operand  #: [T, k], float
    up: Operand  #: [E, P * I, H], or [E, H, P * I] if up_transposed; P parts: 2 unless layout is "single"
    down: Operand  #: [E, H, I], or [E, I, H] if down_transposed
    up_bias: OptOperand  #: [E, P * I]
    down_bias: OptOperand  #: [E, H]
    y: Result  #: [T, H], dtype of x
    layout: Layout = "concat"
    up_transposed: bool = False
    down_transposed: bool = False
    activation: Body  #: pointwise over rows r: one [r, I] per part -> [r, I]

    @property
    def num_experts(self) -> int:
        return _known(self.up.tensor.shape[0])

    @property
    def k(self) -> int:
        return _known(self.ids.tensor.shape[-1])

    @property
    def width(self) -> int:
        """I, the expert's inner width."""
        return _known(self.down.tensor.shape[1 if self.down_transposed else 2])

    def infer(self) -> tuple[Type, ...]:
        rows = self.x.tensor.shape[0]
        return (TensorType((rows, self.down.tensor.shape[2 if self.down_transposed else 1]), self.x.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        yield from _bank_problems(self.x.tensor.shape[-1], self.up, self.up_transposed, self.layout, self.width)
        yield from _activation_problems(self.activation, self.layout, self.width)
        if self.ids.tensor.shape != self.weights.tensor.shape:
            yield f"ids are {self.ids.type}, weights {self.weights.type}: shapes differ"
        if self.up.tensor.shape[0] != self.down.tensor.shape[0]:
            yield f"up has {self.up.tensor.shape[0]} experts, down {self.down.tensor.shape[0]}"
        yield from _results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.x.tensor.shape[0], env)
        share = experts_hit(self.num_experts, self.k, tokens) / self.num_experts
        banks = [bank for bank in (self.up, self.down, self.up_bias, self.down_bias) if bank is not None]
        per_expert = sum(bytes_of(bank.type, env) for bank in banks) * share
        rest = sum(bytes_of(v.type, env) for v in (self.x, self.ids, self.weights, self.y))
        matmul = sum(evaluate(product(bank.tensor.shape), env) for bank in (self.up, self.down)) // self.num_experts
        return Cost(int(per_expert) + rest, 2 * tokens * self.k * matmul)

    def reference(self, env: Env, *args: Any) -> Any:
        x, ids, weights, up, down, up_bias, down_bias = _padded(self, args, 7)
        order, offsets = group_reference(ids, up.shape[0])
        h = gather_gemm_reference(
            env, self.activation, self.layout, x, order, offsets, up, up_bias, self.up_transposed, ids.shape[-1]
        )
        return gemm_combine_reference(h, order, offsets, weights, down, down_bias, self.down_transposed, x.dtype)


class GatherGemm(OpDef, name="moe.gather_gemm"):
    """First half of an expert layer: gather rows, multiply by the expert's up-projection, activate. One kernel.

    Row i of the result belongs to pair order[i]; rows from offsets[E] on are not defined.

        %h = moe.gather_gemm(%x, %order, %offsets, %up) {k = 2} : tensor<(2*s0)x48xf32> {
          activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
            %g = aten.silu(%a) : tensor<rx48xf32>
            %h = aten.mul.Tensor(%g, %b) : tensor<rx48xf32>
            yield %h
        }
    """

    x: Operand  #: [T, H]
    order: Operand  #: [T * k], i32
    offsets: Operand  #: [E + 1], i32
    up: Operand  #: as of moe.experts
    up_bias: OptOperand
    h: Result  #: [T * k, I], dtype of x
    k: int
    layout: Layout = "concat"
    up_transposed: bool = False
    variants: tuple[dict[str, Any], ...] = ()  #: set by `schedule`: {up_to, ...} by ascending token count
    activation: Body

    @property
    def num_experts(self) -> int:
        return _known(self.up.tensor.shape[0])

    @property
    def width(self) -> int:
        columns = _known(self.up.tensor.shape[2 if self.up_transposed else 1])
        return columns if self.layout == "single" else columns // 2

    def infer(self) -> tuple[Type, ...]:
        return (TensorType((product((self.x.tensor.shape[0], self.k)), self.width), self.x.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        yield from _bank_problems(self.x.tensor.shape[-1], self.up, self.up_transposed, self.layout, self.width)
        yield from _activation_problems(self.activation, self.layout, self.width)
        yield from _offsets_problems(self.offsets, self.num_experts)
        yield from _results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.x.tensor.shape[0], env)
        share = experts_hit(self.num_experts, self.k, tokens) / self.num_experts
        rest = sum(bytes_of(v.type, env) for v in (self.x, self.order, self.offsets, self.h))
        per_row = evaluate(product(self.up.tensor.shape), env) // self.num_experts
        return Cost(int(bytes_of(self.up.type, env) * share) + rest, 2 * tokens * self.k * per_row)

    def reference(self, env: Env, *args: Any) -> Any:
        x, order, offsets, up, up_bias = _padded(self, args, 5)
        return gather_gemm_reference(
            env, self.activation, self.layout, x, order, offsets, up, up_bias, self.up_transposed, self.k
        )


class GemmCombine(OpDef, name="moe.gemm_combine"):
    """Second half: multiply by the expert's down-projection, weigh, and add the k results of each token.

    For example:

        %y = moe.gemm_combine(%h, %order, %offsets, %weights, %down) : tensor<s0x64xf32>
    """

    h: Operand  #: [T * k, I], as of moe.gather_gemm
    order: Operand  #: [T * k], i32
    offsets: Operand  #: [E + 1], i32
    weights: Operand  #: [T, k], float
    down: Operand  #: as of moe.experts
    down_bias: OptOperand
    y: Result  #: [T, H], dtype of h
    down_transposed: bool = False
    variants: tuple[dict[str, Any], ...] = ()

    @property
    def num_experts(self) -> int:
        return _known(self.down.tensor.shape[0])

    @property
    def k(self) -> int:
        return _known(self.weights.tensor.shape[-1])

    def infer(self) -> tuple[Type, ...]:
        columns = self.down.tensor.shape[2 if self.down_transposed else 1]
        return (TensorType((self.weights.tensor.shape[0], columns), self.h.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        inner = self.down.tensor.shape[1 if self.down_transposed else 2]
        if self.h.tensor.shape[-1] != inner:
            yield f"h has {self.h.tensor.shape[-1]} columns, down takes {inner}"
        yield from _offsets_problems(self.offsets, self.num_experts)
        yield from _results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.weights.tensor.shape[0], env)
        share = experts_hit(self.num_experts, self.k, tokens) / self.num_experts
        rest = sum(bytes_of(v.type, env) for v in (self.h, self.order, self.offsets, self.weights, self.y))
        per_row = evaluate(product(self.down.tensor.shape), env) // self.num_experts
        return Cost(int(bytes_of(self.down.type, env) * share) + rest, 2 * tokens * self.k * per_row)

    def reference(self, env: Env, *args: Any) -> Any:
        h, order, offsets, weights, down, down_bias = _padded(self, args, 6)
        return gemm_combine_reference(h, order, offsets, weights, down, down_bias, self.down_transposed, h.dtype)


def group_types(ids: TensorType, num_experts: int) -> tuple[TensorType, TensorType]:
    """Types of `order` and `offsets`."""
    return TensorType((product(ids.shape),), DType.i32), TensorType((num_experts + 1,), DType.i32)


def group_reference(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A stable counting sort of the pairs by expert, skipped ones last: `order` and `offsets`, i32."""
    import torch

    flat = ids.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.argsort(flat, stable=True).int(), offsets.int()


def gather_gemm_reference(
    env: Env,
    activation: Body,
    layout: str,
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    transposed: bool,
    k: int,
) -> Tensor:
    """Expert by expert: activation(x[rows] @ up[e].T + bias), accumulated in f32, rounded to x's dtype."""
    import torch

    columns = up.shape[2 if transposed else 1]
    projected = torch.zeros(order.shape[0], columns, dtype=torch.float32, device=x.device)
    bounds = offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(bounds)):
        rows = x[order[start:stop].long() // k].float()
        weight = up[e].float() if transposed else up[e].float().T
        projected[start:stop] = rows @ weight + (up_bias[e].float() if up_bias is not None else 0)
    (h,) = env.run(activation, split_parts(projected.to(x.dtype), layout))
    return h.to(x.dtype)


def gemm_combine_reference(
    h: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    transposed: bool,
    dtype: Any,
) -> Tensor:
    """Expert by expert h @ down[e].T + bias, scattered to [T, k, H], weighed and summed over k in f32."""
    import torch

    tokens, k = weights.shape
    out = torch.zeros(tokens * k, down.shape[2 if transposed else 1], dtype=torch.float32, device=h.device)
    bounds = offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(bounds)):
        weight = down[e].float() if transposed else down[e].float().T
        y = h[start:stop].float() @ weight + (down_bias[e].float() if down_bias is not None else 0)
        out[order[start:stop].long()] = y
    # A pair that is skipped adds nothing, even where its weight is not a number.
    used = torch.zeros(tokens * k, 1, dtype=torch.bool, device=h.device)
    used[order[: bounds[-1]].long()] = True
    weighed = torch.where(used, out * weights.reshape(-1, 1).float(), 0.0)
    return weighed.reshape(tokens, k, out.shape[1]).sum(1).to(dtype)


def split_parts(projected: Tensor, layout: str) -> list[Tensor]:
    """The columns of an up-projection as the activation's arguments."""
    if layout == "single":
        return [projected]
    if layout == "interleaved":
        return [projected[..., ::2], projected[..., 1::2]]
    return list(projected.chunk(2, dim=-1))


def _known(dim: Dim) -> int:
    if not isinstance(dim, int):
        raise TypeError(f"the size {dim!r} of an expert bank must be known")
    return dim


def _padded(op: OpDef, args: tuple[Any, ...], count: int) -> list[Any]:
    """Run-time values in the places of the op's arguments, None where one is left out."""
    values = iter(args)
    full = [next(values) if argument is not None else None for argument in op.arguments]
    return full + [None] * (count - len(full))


def _region_takes(body: Body, types: list[Type]) -> Iterator[str]:
    given = [arg.type for arg in body.args]
    if given != types:
        yield f"region takes ({', '.join(map(str, given))}), the operands are ({', '.join(map(str, types))})"


def _region_yields(body: Body, types: list[Type]) -> Iterator[str]:
    given = [value.type for value in body.terminator.operands]
    if given != types:
        yield f"region yields ({', '.join(map(str, given))}), the results are ({', '.join(map(str, types))})"


def _results_are(op: OpDef, types: tuple[Type, ...]) -> Iterator[str]:
    for name, result, type in zip(op.fields().results, op.results, types, strict=False):
        if result.type != type:
            yield f"result '{name}' is {result.type}, must be {type}"


def _bank_problems(hidden: Dim, up: Operand, transposed: bool, layout: str, width: int) -> Iterator[str]:
    if up.tensor.rank != 3:
        yield f"up is {up.type}: an expert bank has three dimensions"
        return
    columns, inner = up.tensor.shape[1:][::-1] if transposed else up.tensor.shape[1:]
    if inner != hidden:
        yield f"x has {hidden!r} columns, up takes {inner!r}"
    expected = width if layout == "single" else 2 * width
    if columns != expected:
        yield f"up yields {columns!r} columns, layout '{layout}' of width {width} needs {expected}"


def _activation_problems(body: Body, layout: str, width: int) -> Iterator[str]:
    parts = 1 if layout == "single" else 2
    if len(body.args) != parts:
        yield f"activation takes {len(body.args)} arguments, layout '{layout}' gives {parts}"
    for arg in body.args:
        if arg.tensor.shape[-1] != width:
            yield f"activation argument %{arg.name} is {arg.type}, the expert width is {width}"


def _offsets_problems(offsets: Operand, num_experts: int) -> Iterator[str]:
    if offsets.tensor.shape != (num_experts + 1,):
        yield f"offsets are {offsets.type}, {num_experts} experts need tensor<{num_experts + 1}xi32>"
