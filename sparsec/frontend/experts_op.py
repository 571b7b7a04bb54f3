"""`sparsec::experts`: an expert bank as one torch operator, so that graphs carry it whole.

    torch.ops.sparsec.experts(x, ids, weights, up, down, activation=region, layout="concat")

Shapes are those of `moe.experts`: x [T, H], ids and weights [T, k], up [E, P * I, H] and down [E, H, I] (transposed in
their last two dimensions where said so), biases [E, P * I] and [E, H]. An id outside 0..E-1 is skipped. `activation`
is a region as a string (`sparsec.frontend.region`), for the dtype of `x`; so is `tail`, over whole rows [r, H] of an
expert's result and `tail_params`, where it is not empty. `weight_on` says which side of an expert is weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec.dialects.moe import gather_gemm_reference, gemm_combine_reference, group_reference
from sparsec.frontend import region
from sparsec.ir.core import Block
from sparsec.ir.ranks import Alone
from sparsec.ir.types import Dim, evaluate

SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor down, Tensor? up_bias=None, Tensor? down_bias=None, "
    "Tensor[]? tail_params=None, *, "
    'str activation, str layout="concat", bool up_transposed=False, bool down_transposed=False, '
    'str weight_on="output", str tail="") -> Tensor'
)

ExpertsKernel = Callable[..., Tensor]


def reference(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    tail_params: Sequence[Tensor] | None = None,
    *,
    activation: str,
    layout: str = "concat",
    up_transposed: bool = False,
    down_transposed: bool = False,
    weight_on: str = "output",
    tail: str = "",
) -> Tensor:
    """What the operator computes, expert by expert in plain torch; y [T, H] in the dtype of `x`."""
    order, offsets = group_reference(ids, up.shape[0])
    env = Rows(order.shape[0])
    block = region.decode(activation)
    early = weights if weight_on == "input" else None
    h = gather_gemm_reference(env, block, layout, x, order, offsets, up, up_bias, up_transposed, ids.shape[-1], early)
    end = region.decode(tail) if tail else None
    finish = None if end is None else lambda rows: env.run(end, [rows, *(tail_params or ())])[0]
    weighted = early is None
    return gemm_combine_reference(
        h, order, offsets, weights, down, down_bias, down_transposed, x.dtype, weighted, finish
    )


class Rows:
    """Evaluates an activation region; the only size that it may ask for is the number of rows."""

    peers = Alone()

    def __init__(self, rows: int) -> None:
        self.sizes = {str(region.ROWS): rows}

    def dim(self, dim: Dim) -> int:
        return evaluate(dim, self.sizes)

    def run(self, block: Block, args: Sequence[Any]) -> tuple[Any, ...]:
        values = dict(zip(block.args, args, strict=True))
        for op in block.ops[:-1]:
            out = op.reference(self, *[values[operand] for operand in op.operands])  # type: ignore[attr-defined]
            values.update(zip(op.results, out if isinstance(out, list | tuple) else [out], strict=True))
        return tuple(values[value] for value in block.terminator.operands)

    def call(self, name: str, args: Sequence[Any]) -> tuple[Any, ...]:
        raise KeyError(f"an activation has no function '{name}' to call")


_bound: dict[str, ExpertsKernel] = {"kernel": reference}


def set_experts_kernel(kernel: ExpertsKernel | None) -> None:
    """Run `sparsec::experts` by `kernel`, which takes the operator's arguments; None puts the reference back."""
    _bound["kernel"] = kernel or reference


@torch.library.custom_op("sparsec::experts", mutates_args=(), schema=SCHEMA)
def experts(*args: Any, **kwargs: Any) -> Tensor:
    return _bound["kernel"](*args, **kwargs)


@experts.register_fake
def _fake(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    fits(x, ids, up.shape[1 if kwargs.get("up_transposed") else 2], weights)
    columns = down.shape[2 if kwargs.get("down_transposed") else 1]
    return x.new_empty(x.shape[0], columns)


def fits(x: Tensor, ids: Tensor, columns: int, weights: Tensor | None) -> None:
    """Tell a trace with open sizes what the operands of experts say of each other: a weight fixes the columns of `x`.

    How many experts a token has is fixed too, to what it has in the trace: kernels are made for a number of them.

    Args:
        columns: of the rows that the first projection takes.

    Raises: RuntimeError for sizes that cannot be.
    """
    int(ids.shape[1])
    torch._check(x.shape[-1] == columns, lambda: f"x has {x.shape[-1]} columns, the experts take {columns}")
    pairs = [(x, "x", dim) for dim in range(x.dim() - 1)]
    pairs += [] if weights is None else [(weights, "weights", dim) for dim in range(2)]
    for tensor, name, dim in pairs:
        if not (_is_bare(tensor.shape[dim]) and _is_bare(ids.shape[dim])):
            continue  # products of sizes are equal for reasons of the model's own, which torch.export cannot express
        torch._check(
            tensor.shape[dim] == ids.shape[dim],
            lambda: f"{name} has shape {list(tensor.shape)}, ids {list(ids.shape)}",  # noqa: B023 (called at once)
        )


def _is_bare(size: int | torch.SymInt) -> bool:
    """Whether a size is a number or one symbol, not an expression of several."""
    return isinstance(size, int) or bool(size.node.expr.is_symbol or size.node.expr.is_number)


def _backward(ctx: Any, grad: Tensor) -> Any:
    raise NotImplementedError(
        "sparsec::experts has no backward: call the model under torch.no_grad(), "
        'or train it with model.set_experts_implementation("grouped_mm")'
    )


def _setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    """Nothing is kept for a backward that there is not."""


experts.register_autograd(_backward, setup_context=_setup)


TARGET = torch.ops.sparsec.experts.default
"""The operator, as it stands in a graph."""
