"""Kernel functions for tests: routers and activations traced from PyTorch, wrapped as the passes would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sparsec.dialects import aten, builtin, moe
from sparsec.dialects.dtypes import from_torch
from sparsec.dialects.moe.common import tiles_type
from sparsec.frontend.importer import import_program
from sparsec.ir.core import Block, Func, Value
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import Dim, DType, Sym, TensorType, Type

T = Sym("t")

__all__ = ["T", "aten", "gather_gemm", "gemm_combine", "group", "region", "route_group"]


class _Fn(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: torch.Tensor) -> Any:
        return self.fn(*args)


def region(fn: Callable[..., Any], *args: torch.Tensor, rows: Sequence[bool], symbol: Sym = T) -> Block:
    """What `fn` does to `args`, as a block; those of `rows` have tokens on their first axis."""
    dynamic = [{0: torch.export.Dim.DYNAMIC} if row else None for row in rows]
    with torch.no_grad():
        program = torch.export.export(_Fn(fn), args, dynamic_shapes=(tuple(dynamic),), strict=False)
        module, _ = import_program(program.run_decompositions({}))
    block = module.main.body
    for value in [*block.args, *(result for op in block.walk() for result in op.results)]:
        value.type = _renamed(value.type, symbol)
    terminator = block.ops.pop()
    block.append(builtin.Yield(list(terminator.operands)))
    return block


def _renamed(type: Type, symbol: Sym) -> Type:
    assert isinstance(type, TensorType)
    return TensorType(tuple(symbol if isinstance(dim, Sym) else dim for dim in type.shape), type.dtype)


def route_group(
    fn: Callable[..., Any], logits: torch.Tensor, *params: torch.Tensor, variants: Any = (), fixed: bool = False,
    listed: bool = False,
) -> Func:  # fmt: skip
    """`fn(logits, *params) -> (ids, weights)` as a moe.route_group kernel; `fixed`: for as many tokens only."""
    body = region(fn, logits, *params, rows=[not fixed, *[False] * len(params)])
    args = Block([arg.type for arg in body.args], ["logits", *(f"param{i}" for i in range(len(params)))])
    attrs: dict[str, Any] = {"num_experts": logits.shape[1], **({"listed": True} if listed else {})}
    op = moe.RouteGroup(args.args, None, attrs, [body])
    return _func("route_group_0", args, op, variants, logits.shape[0] if fixed else T)


def group(experts: int, k: int, dtype: DType = DType.i64, variants: Any = (), listed: bool = False) -> Func:
    args = Block([TensorType((T, k), dtype)], ["ids"])
    attrs: dict[str, Any] = {"num_experts": experts, **({"listed": True} if listed else {})}
    return _func("group_0", args, moe.Group(args.args, None, attrs), variants)


def gather_gemm(
    activation: Callable[..., Any], hidden: int, width: int, experts: int, k: int, dtype: torch.dtype,
    layout: str = "concat", bias: bool = False, transposed: bool = False, variants: Any = (), listed: bool = False,
) -> Func:  # fmt: skip
    parts = 1 if layout == "single" else 2
    probe = [torch.randn(3, width, dtype=dtype) for _ in range(parts)]
    body = region(activation, *probe, rows=[True] * parts, symbol=Sym("r"))
    ours = from_torch(dtype)
    up = (experts, hidden, parts * width) if transposed else (experts, parts * width, hidden)
    pairs = Sym(f"{k}*t") if k > 1 else T
    args = Block(
        [TensorType((T, hidden), ours), TensorType((pairs,), DType.i32),
         TensorType((experts + 1,), DType.i32), TensorType(up, ours),
         *([TensorType((experts, parts * width), ours)] if bias else []),
         *([tiles_type(pairs, experts)] if listed else [])],
        ["x", "order", "offsets", "up", *(["up_bias"] if bias else []), "tiles"],
    )  # fmt: skip
    given: list[Value | None] = list(args.args)
    holes = [None] * (2 if bias else 3) if listed else []
    attrs: dict[str, Any] = {"k": k, "layout": layout, "up_transposed": transposed}
    return _func(
        "gather_gemm_0",
        args,
        moe.GatherGemm(given[: 4 + bias] + holes + given[4 + bias :], None, attrs, [body]),
        variants,
    )


def gemm_combine(
    hidden: int, width: int, experts: int, k: int, dtype: torch.dtype, bias: bool = False, transposed: bool = False,
    variants: Any = (), weights: DType = DType.f32, listed: bool = False,
) -> Func:  # fmt: skip
    ours = from_torch(dtype)
    pairs = Sym(f"{k}*t") if k > 1 else T
    down = (experts, width, hidden) if transposed else (experts, hidden, width)
    args = Block(
        [TensorType((pairs, width), ours), TensorType((pairs,), DType.i32), TensorType((experts + 1,), DType.i32),
         TensorType((T, k), weights), TensorType(down, ours), *([TensorType((experts, hidden), ours)] if bias else []),
         *([tiles_type(pairs, experts)] if listed else [])],
        ["h", "order", "offsets", "weights", "down", *(["down_bias"] if bias else []), "tiles"],
    )  # fmt: skip
    given: list[Value | None] = list(args.args)
    holes = [None] * (1 if bias else 2) if listed else []
    op = moe.GemmCombine(given[: 5 + bias] + holes + given[5 + bias :], None, {"down_transposed": transposed})
    return _func("gemm_combine_0", args, op, variants)


def _func(name: str, block: Block, op: OpDef, variants: Any, tokens: Dim = T) -> Func:
    block.append(op)
    block.append(builtin.Return(list[Value](op.results)))
    attrs: dict[str, Any] = {"backend": "triton", "tokens": tokens}
    if variants:
        attrs["variants"] = tuple(variants)
    return Func(name, block, attrs)
