"""The way out to other MLIR compilers: a module as linalg on tensors, by torch-mlir.

Its ops are traced with `torch.export` as their references say, but for those whose references have sizes that data
decides: each of these has here a form of static shapes. Where there are fewer pairs than experts, a bank is read row by
row as the ids say; else every expert computes every token, and the pairs take what is theirs. Sorting and choosing are
done by comparing all with all, so that the result holds no op beyond `linalg`, `tensor`, `arith` and `math`, and
`cf.assert` for indices.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from sparsec.diagnostics import CompileError, SparsecError
from sparsec.dialects.aten import AtenOp
from sparsec.dialects.dtypes import to_torch
from sparsec.dialects.moe import ExpertBank, Layer, split_parts
from sparsec.dialects.moe.common import padded
from sparsec.ir.core import Block, Module, Op
from sparsec.ir.opdef import OpDef
from sparsec.ir.printer import print_op
from sparsec.ir.ranks import Alone
from sparsec.ir.types import Dim, Sym, TensorType, Type, evaluate

FUNCTION = "main"  #: name of the function in the text

Static: TypeAlias = "Callable[[_Trace, Any, Sequence[Any]], Any]"


def require_torch_mlir() -> Any:
    """torch-mlir's `fx`. Raises: SparsecError where it is not installed."""
    try:
        from torch_mlir import fx
    except ImportError:
        raise SparsecError("torch-mlir is not installed\n  hint: pip install 'sparsec[mlir]'") from None
    return fx


def to_linalg(module: Module) -> str:
    """`main` of a module whose sizes are all known, as text of MLIR; arguments stay in order.

    Raises:
        CompileError: for an op that has no form of static shapes, or that torch-mlir does not lower.
        SparsecError: where torch-mlir is not installed.
    """
    fx = require_torch_mlir()
    args = [_example(arg.type, arg.name) for arg in module.main.body.args]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Traced(module), tuple(args), strict=False)
        log = logging.getLogger("torch_mlir")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            lowered = fx.export_and_import(program, *args, output_type="linalg-on-tensors", func_name=FUNCTION)
        except Exception as error:  # torch-mlir has several kinds for what it does not lower
            raise CompileError(f"torch-mlir does not lower this: {_first_line(error)}") from error
        finally:
            log.setLevel(level)
    return "\n".join([*_heading(module), str(lowered)])


def _heading(module: Module) -> list[str]:
    """Comments that say what the arguments are."""
    lines = ["// Arguments:"]
    for i, arg in enumerate(module.main.body.args):
        attrs = module.main.arg_attrs.get(arg, {})
        lines.append(f"//   %arg{i}: {attrs.get('source') or arg.name or 'input'}, {arg.type}")
    return lines


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "error:" in line or "failed to" in line), next(iter(lines), repr(error)))


def _example(type: Type, name: str) -> Tensor:
    if not isinstance(type, TensorType) or not all(isinstance(dim, int) for dim in type.shape):
        raise CompileError(f"%{name} is {type}: linalg needs sizes that are known")
    return torch.zeros([dim for dim in type.shape if isinstance(dim, int)], dtype=to_torch(type.dtype))


class _Traced(nn.Module):
    """`main` as something that `torch.export` captures."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.body = module.main.body

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return _Trace({}).run(self.body, args)


class _Trace:
    """The `Env` of ops while they are traced."""

    def __init__(self, symbols: dict[str, int]) -> None:
        self.symbols, self.peers = symbols, Alone()

    def dim(self, dim: Dim) -> int:
        return evaluate(dim, self.symbols)

    def call(self, name: str, args: Sequence[Any]) -> tuple[Any, ...]:
        raise CompileError(f"a call of @{name} has no form in linalg: inline it, or export a phase before `lower`")

    def run(self, block: Block, args: Sequence[Any]) -> tuple[Any, ...]:
        inner = _Trace(dict(self.symbols))
        for arg, value in zip(block.args, args, strict=True):
            if isinstance(arg.type, TensorType):
                pairs = zip(arg.type.shape, value.shape, strict=True)
                inner.symbols |= {dim: size for dim, size in pairs if isinstance(dim, Sym) and dim.isidentifier()}
        values = dict(zip(block.args, args, strict=True))
        for op in block.ops[:-1]:
            values.update(zip(op.results, inner.op(op, [values[operand] for operand in op.operands]), strict=True))
        return tuple(values[operand] for operand in block.terminator.operands)

    def op(self, op: Op, operands: list[Any]) -> Sequence[Any]:
        assert isinstance(op, OpDef)
        static = _STATIC.get(op.name)
        if static is None and op.dialect in ("moe", "dist", "kernel") and op.name != "moe.route":
            raise CompileError(
                f"'{op.name}' has no form of static shapes: export the phase `raise`\n{print_op(op)}", op.loc
            )
        found = static(self, op, operands) if static else op.reference(self, *operands)
        return found if isinstance(found, (tuple, list)) else (found,)


# ------------------------------------------------------------------------------------------------- forms of our own ops
def _experts(env: _Trace, op: ExpertBank, operands: Sequence[Any]) -> Tensor:
    x, ids, weights, *rest = padded(op, tuple(operands), 9)
    return _bank(env, op, x, ids, weights, rest[:4], rest[6:])


def _layer(env: _Trace, op: Layer, operands: Sequence[Any]) -> tuple[Tensor, ...]:
    x, logits, *rest = padded(op, tuple(operands), 8)
    params, count = rest[6:], len(op.router.args) - 1
    ids, weights, *extras = env.run(op.router, [logits, *params[:count]])
    return (_bank(env, op, x, ids, weights, rest[:4], params[count:]), ids, weights, *extras)


def _bank(
    env: _Trace, op: ExpertBank, x: Tensor, ids: Tensor, weights: Tensor, banks: Sequence[Any], params: Sequence[Any]
) -> Tensor:
    """As `moe.experts` says: x [T, H], ids and weights [T, k]."""
    if op.packing != "plain":
        raise CompileError(f"'{op.name}' has packed banks: export a phase before `schedule`", op.loc)
    up, down, up_bias, down_bias = banks
    (tokens, k), experts = ids.shape, up.shape[0]
    flat = ids.reshape(-1)
    used = (flat >= 0) & (flat < experts)
    expert = torch.where(used, flat, 0).long()
    by_pair = tokens * k <= experts or op.weight_on == "input"  # whether a row is a pair, or a token
    rows, row = x.float(), torch.arange(tokens).unsqueeze(1).expand(tokens, k).reshape(-1)
    if by_pair:
        rows, row = rows.unsqueeze(1).expand(tokens, k, rows.shape[1]).reshape(tokens * k, -1), torch.arange(tokens * k)
    if op.weight_on == "input":
        rows = rows * weights.reshape(-1, 1).float()
    each_reads = tokens * k <= experts  # whether a pair reads its expert, or experts all the rows

    def project(rows: Tensor, bank: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        matrices = (bank[expert] if each_reads else bank).float()
        out = torch.bmm(rows, matrices if transposed else matrices.transpose(1, 2))
        return out if bias is None else out + (bias[expert] if each_reads else bias).float().unsqueeze(1)

    batched = rows.unsqueeze(1) if each_reads else rows.unsqueeze(0).expand(experts, *rows.shape)
    projected = project(batched, up, up_bias, op.up_transposed).to(x.dtype)
    (h,) = env.run(op.activation, split_parts(projected.flatten(0, 1), op.layout))
    y = project(h.to(x.dtype).float().unflatten(0, projected.shape[:2]), down, down_bias, op.down_transposed)
    y = y.squeeze(1) if each_reads else y[expert, row]
    if op.tail is not None:
        y = env.run(op.tail, [y.to(x.dtype), *params])[0].float()
    if op.weight_on == "output":
        y = y * weights.reshape(-1, 1).float()
    return torch.where(used.unsqueeze(1), y, 0.0).unflatten(0, (tokens, k)).sum(1).to(x.dtype)


def _capacity(env: _Trace, op: Any, operands: Sequence[Any]) -> Tensor:
    """As `moe.capacity` says: a pair is over where as many of its group and expert came before as there is room."""
    (ids,) = operands
    groups = env.dim(op.groups)
    arrival = ids.reshape(groups, -1, ids.shape[1])
    if op.order == "slot":
        arrival = arrival.transpose(1, 2)
    shape, flat = arrival.shape, arrival.reshape(groups, -1)
    place = torch.arange(flat.shape[1])
    before = (flat.unsqueeze(1) == flat.unsqueeze(2)) & (place.unsqueeze(0) < place.unsqueeze(1))
    counted = (flat >= 0) & (flat < op.num_experts)
    kept = torch.where(counted & (before.sum(2) >= env.dim(op.capacity)), op.num_experts, flat).reshape(shape)
    return (kept.transpose(1, 2) if op.order == "slot" else kept).reshape(ids.shape)


# --------------------------------------------------------------------------------------------- forms of PyTorch's ops
def _ranked(x: Tensor, k: int, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    """The first k of x in order along a dimension, equal ones by their place: values and places."""
    x = x.movedim(dim, -1) if x.dim() else x.unsqueeze(0)
    place, mine, other = torch.arange(x.shape[-1]), x.unsqueeze(-1), x.unsqueeze(-2)
    ahead = other > mine if descending else other < mine
    rank = (ahead | ((other == mine) & (place.unsqueeze(0) < place.unsqueeze(1)))).sum(-1)
    hit = rank.unsqueeze(-2) == torch.arange(k).unsqueeze(1)
    places = torch.where(hit, place, 0).sum(-1)
    values = torch.where(hit, other, torch.zeros((), dtype=x.dtype)).sum(-1).to(x.dtype)
    return values.movedim(-1, dim), places.movedim(-1, dim)


def _given(op: AtenOp, **defaults: Any) -> list[Any]:
    return [op.attrs.get(name, default) for name, default in defaults.items()]


def _topk(env: _Trace, op: AtenOp, operands: Sequence[Any]) -> tuple[Tensor, Tensor]:
    k, dim, largest = _given(op, k=1, dim=-1, largest=True)
    return _ranked(operands[0], env.dim(k), dim, largest)


def _sort(env: _Trace, op: AtenOp, operands: Sequence[Any]) -> tuple[Tensor, Tensor]:
    dim, descending = _given(op, dim=-1, descending=False)
    return _ranked(operands[0], operands[0].shape[dim], dim, descending)


def _argsort(env: _Trace, op: AtenOp, operands: Sequence[Any]) -> Tensor:
    return _sort(env, op, operands)[1]


def _cumsum(env: _Trace, op: AtenOp, operands: Sequence[Any]) -> Tensor:
    dim, dtype = _given(op, dim=-1, dtype=None)
    x = operands[0].movedim(dim, -1) if operands[0].dim() else operands[0].unsqueeze(0)
    wide = to_torch(dtype) if dtype else x.dtype if x.is_floating_point() else torch.int64
    place = torch.arange(x.shape[-1])
    earlier = torch.where(place.unsqueeze(0) <= place.unsqueeze(1), x.to(wide).unsqueeze(-2), 0)
    return earlier.to(wide).sum(-1).to(wide).movedim(-1, dim).reshape(operands[0].shape)


def _scatter(env: _Trace, op: AtenOp, operands: Sequence[Any]) -> Tensor:
    """x with values at the places that an index names along the last dimension; no place is named twice."""
    x, index, *src = operands
    if op.attrs["dim"] not in (-1, x.dim() - 1):
        return op.reference(env, *operands)
    hit = index.unsqueeze(-1) == torch.arange(x.shape[-1])
    if not src:
        return torch.where(hit.any(-2), cast(float, op.attrs["value"]), x).to(x.dtype)
    given = src[0][tuple(slice(size) for size in index.shape)].unsqueeze(-1)
    return torch.where(hit.any(-2), torch.where(hit, given, torch.zeros((), dtype=x.dtype)).sum(-2).to(x.dtype), x)


_STATIC: dict[str, Static] = {
    "moe.experts": _experts,
    "moe.layer": _layer,
    "moe.capacity": _capacity,
    "aten.topk": _topk,
    "aten.sort": _sort,
    "aten.sort.stable": _sort,
    "aten.argsort": _argsort,
    "aten.argsort.stable": _argsort,
    "aten.cumsum": _cumsum,
    "aten.scatter.value": _scatter,
    "aten.scatter.src": _scatter,
}
