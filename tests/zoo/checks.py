"""What became of an expert layer: compiled from one capture, compared at several token counts, its IR looked at."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import sparsec
from sparsec.ir.core import Func, Module, Op, Value
from tests.zoo.layers import Call, tensors_of

BANKS = ("moe.experts", "moe.grouped_linear")
LOGITS = ("aten.linear", "aten.mm", "aten.addmm", "aten.matmul", "aten.bmm", "aten.einsum")
ROUTING = (
    *("topk", "sort", "argsort", "argmax", "one_hot", "histc", "bincount", "nonzero", "cumsum", "gather", "scatter"),
    *("scatter_add", "index_put", "index_add", "_grouped_mm", "grouped_mm_fallback"),
)
PLAIN = ("view", "reshape", "unsqueeze", "squeeze", "expand", "clone", "to", "_to_copy", "detach", "slice", "permute")


@dataclass(frozen=True)
class Found:
    """The expert layers of a module in phase `raise`.

    Args:
        routes, experts, linears: how many `moe.route`, `moe.experts` and `moe.grouped_linear` there are.
        router: the ops of the first router, views and casts left out.
        loose: ops between logits and combine that stayed outside of them.
        missed: remarks on what was not done, each with its line.
    """

    routes: int
    experts: int
    linears: int
    router: str
    loose: tuple[str, ...]
    missed: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether every bank has a router and nothing of the layer stayed outside."""
        return self.routes > 0 and self.experts + self.linears > 0 and not self.loose


def found(compiled: sparsec.CompiledModel) -> Found:
    """What the compiler raised in a model."""
    module = compiled.result.ir("raise")
    names = [op.name for op in module.walk()]
    route = next((op for op in module.walk() if op.name == "moe.route"), None)
    missed = tuple(f"{r.loc}: {r.pass_name}: {r.message}" for r in compiled.remarks if r.kind == "missed")
    return Found(
        names.count("moe.route"),
        names.count("moe.experts"),
        names.count("moe.grouped_linear"),
        router_line(route) if route is not None else "",
        tuple(loose(module)),
        missed,
    )


def router_line(route: Op) -> str:
    """The ops of a router in one line, with the parameters that they read."""
    (body,) = route.regions
    words = list[str]()
    for op in body.ops[:-1]:
        params = [value.name for value in op.operands if value in body.args[1:]]
        if (name := _short(op.name)) not in PLAIN:
            words.append(f"{name}({', '.join(params)})" if params else name)
    return " ".join(words)


def _short(name: str) -> str:
    return name.removeprefix("aten.").partition(".")[0]


def loose(module: Module) -> list[str]:
    """Names of the ops of `main` between the logits of a router and the combination of its experts' outputs.

    These are ops that pick, sort or count; ops on the way to a bank's ids and weights, from a router or from logits
    without one; and ops that put a router's weights to a bank's output.
    """
    main = module.main
    routes = [op for op in main.body.ops if op.name == "moe.route"]
    banks = [op for op in main.body.ops if op.name in BANKS]
    chosen = [value for op in routes for value in op.results[:2]]
    after_choice, after_bank = _reached(main, chosen), _reached(main, [v for op in banks for v in op.results])
    before_bank = {op for bank in banks for op in _leading_to(_given(bank))}
    left = {op for op in after_choice if op in before_bank or op in after_bank}
    left |= before_bank - after_choice
    left |= {op for op in main.body.ops if _short(op.name) in ROUTING}
    return [
        name for op in main.body.ops if op in left and op.dialect == "aten" and (name := _short(op.name)) not in PLAIN
    ]


def _given(bank: Op) -> list[Value]:
    """The ids and weights of a bank."""
    values = [getattr(bank, name, None) for name in ("ids", "weights")]
    return [value for value in values if isinstance(value, Value)]


def _reached(main: Func, values: Iterable[Value]) -> set[Op]:
    """Ops that read `values` or what is made of them, not through a bank."""
    known, ops = set(values), set[Op]()
    for op in main.body.ops:
        if op.name not in BANKS and any(operand in known for operand in op.operands):
            known.update(op.results)
            ops.add(op)
    return ops


def _leading_to(values: Sequence[Value]) -> set[Op]:
    """Ops that `values` are made by, back to routers and logits."""
    ops, todo = set[Op](), list(values)
    while todo:
        op = todo.pop().op
        if op is not None and op not in ops and op.name not in LOGITS and op.dialect != "moe":
            ops.add(op)
            todo.extend(op.operands)
    return ops


class Alone(nn.Module):
    """A layer called with tensors only: what else it is called with stays as it was in one call."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        super().__init__()
        self.layer = layer
        leaves, self.spec = tree_flatten((call.args, call.kwargs))
        self.rest = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if kept is None else kept[0] for kept in self.rest], self.spec)
        return self.layer(*args, **kwargs)


def alone(layer: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """A layer and its call as torch.export takes them: a layer that is given more than one tensor is wrapped."""
    if not call.kwargs and len(tree_leaves(call.args)) == 1:
        return layer, call
    return Alone(layer, call), Call(tuple(call.given), {}, call.output)


def compile_layer(layer: nn.Module, call: Call, other: Call) -> sparsec.CompiledModel:
    """`layer` compiled alone for any number of tokens: for sizes that are not the same in two calls."""
    layer, call = alone(layer, call)
    shapes: Any = True
    if isinstance(layer, Alone):
        shapes = {"tensors": tuple(map(_open, call.args, alone(layer.layer, other)[1].args))}
    return sparsec.compile(layer, call.args, call.kwargs, dynamic=shapes)


def _open(one: Tensor, other: Tensor) -> dict[int, Any]:
    """The sizes that differ; those that differ in the same way are the same size."""
    return {i: Dim(f"from_{a}_to_{b}") for i, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b}


def outputs(layer: Any, call: Call) -> list[Tensor]:
    """The tensors that `layer` returns for a call."""
    with torch.no_grad():
        args, kwargs = copy.deepcopy((call.args, call.kwargs))
        return tensors_of(layer(*args, **kwargs))


def error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The greatest difference of two lists of results, relative to the greatest value of each."""
    assert len(results) == len(expected)
    return max(_relative(new, old) for new, old in zip(results, expected, strict=True))


def _relative(new: Tensor, old: Tensor) -> float:
    assert new.shape == old.shape and new.dtype == old.dtype
    new, old = new.double(), old.double()
    same = new.isfinite() & old.isfinite()
    assert torch.equal(new[~same].nan_to_num(), old[~same].nan_to_num()), "infinite in different places"
    scale = old[same].abs().max().item() if same.any() else 0.0
    return (new - old)[same].abs().max().item() / (scale or 1.0) if same.any() else 0.0


def distance(result: Tensor, exact: Tensor) -> float:
    """The median over tokens of a row's relative error: a token whose experts flip by rounding does not count."""
    result, exact = result.double().flatten(0, -2), exact.double().flatten(0, -2)
    return ((result - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-9)).median().item()
