"""How far quantised experts are from the experts they were made of.

The measure is a block's relative error ||y' - y|| / ||y|| on random normal inputs and uniform routing, everything but
what is quantised in f32. A few experts stand for each layer's, so a model takes seconds; no packed weight of it is
needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import cast

import torch
from torch import Tensor

from sparsec.dialects.builtin import Return
from sparsec.dialects.dtypes import to_torch
from sparsec.dialects.moe import Experts, GatherGemm, GemmCombine, Group, Layer, Pack
from sparsec.ir.core import Attr, Block, Func, Module, Value
from sparsec.ir.derived import Derivation, derivations
from sparsec.ir.equal import ValueMap, clone_block, clone_op
from sparsec.ir.interp import evaluate_func
from sparsec.ir.types import DType, TensorType, Type
from sparsec.runtime import blocks
from sparsec.runtime.tiles import find_scales, pack

TOKENS = 64
EXPERTS = 4
"""Experts of a layer that are looked at; fewer where they have more than `VALUES` weights together."""

VALUES = 1 << 26


@dataclass(frozen=True)
class LayerError:
    """The error of one layer's experts.

    Attributes:
        scope: where the layer is in the model.
        packing: `int8`, `int4`, `fp8` or `mxfp4`.
        activations: `model`, `int8` or `fp8`.
        experts, hidden, width: E, H and I.
        error: ||y' - y|| / ||y||.
    """

    scope: str
    packing: str
    activations: str
    experts: int
    hidden: int
    width: int
    error: float


@dataclass(frozen=True)
class Summary:
    """The errors of layers that are alike."""

    layers: int
    packing: str
    activations: str
    experts: int
    hidden: int
    width: int
    least: float
    median: float
    most: float


def summarise(errors: Sequence[LayerError]) -> list[Summary]:
    """One row for all layers with as many experts of one size."""
    kinds = dict[tuple[str, str, int, int, int], list[float]]()
    for layer in errors:
        kind = (layer.packing, layer.activations, layer.experts, layer.hidden, layer.width)
        kinds.setdefault(kind, []).append(layer.error)
    return [Summary(len(found), *kind, min(found), median(found), max(found)) for kind, found in kinds.items()]


def layer_errors(module: Module, weights: Mapping[str, Tensor]) -> list[LayerError]:
    """The error of every quantised layer.

    Args:
        module: as it stood after phase `schedule`.
        weights: the model's own, by source; where they are missing or on the meta device nothing is measured.
    """
    made = derivations(module)
    found = list[LayerError]()
    for op in module.main.body.ops:
        if isinstance(op, Experts | Layer) and op.packing in ("int8", "int4"):
            error = _error(module, op, made, weights)
            if error is not None:
                hidden = cast("int", op.x.tensor.shape[-1])
                kind = (op.packing, op.activations, op.num_experts, hidden, op.width)
                found.append(LayerError(op.loc.scope, *kind, error))
        if isinstance(op, GatherGemm):
            for down in op.h.users:
                if isinstance(down, GemmCombine) and (packing := _packing_of(op, down)) is not None:
                    error = _error_of_pair(module, op, down, made, weights)
                    if error is not None:
                        sizes = (op.num_experts, cast("int", op.x.tensor.shape[-1]), op.width)
                        found.append(LayerError(op.loc.scope, packing, _activations_of(op, down), *sizes, error))
    return found


def _packing_of(up: GatherGemm, down: GemmCombine) -> str | None:
    return next((op.packing for op in (up, down) if op.packing != "plain"), None)


def _activations_of(up: GatherGemm, down: GemmCombine) -> str:
    return next((op.activations for op in (up, down) if op.activations != "model"), "model")


def _error_of_pair(
    module: Module, up: GatherGemm, down: GemmCombine, made: Mapping[str, Derivation], weights: Mapping[str, Tensor]
) -> float | None:
    """The error of a layer whose banks lie in blocks."""
    experts, hidden, width = up.num_experts, cast("int", up.x.tensor.shape[-1]), up.width
    generator = torch.Generator().manual_seed(0)
    chosen = _chosen(experts, 3 * hidden * width, generator)
    exact, packed, scales = list[Tensor](), list[Tensor](), list[Tensor | None]()
    for op, value, turned in ((up, up.up, up.up_transposed), (down, down.down, down.down_transposed)):
        source = str(module.main.arg_attrs[value]["source"])
        bank, transposed = weights.get(source), turned
        if op.packing != "plain" and all(name in weights or name in made for name in made[source].of):
            bank, how = _before_packing(module, made[source], weights)
            transposed = how.transposed
        if bank is None or bank.is_meta:
            return None
        plain = bank[chosen].float()
        plain = plain.transpose(1, 2).contiguous() if transposed else plain
        exact.append(plain)
        scales.append(None if op.packing == "plain" else blocks.find_scales(plain, False, op.packing))
        packed.append(plain if scales[-1] is None else blocks.pack(plain, scales[-1], False, op.packing))
    biases = list[Tensor | None]()
    for bias in (up.up_bias, down.down_bias):
        source = "" if bias is None else str(module.main.arg_attrs[bias]["source"])
        if bias is not None and source not in weights:
            return None
        biases.append(weights[source][chosen].float() if bias is not None else None)
    shared = _inputs(hidden, len(chosen), min(up.k, len(chosen)), generator)
    block = clone_block(up.activation, {}, _wide, _wide_attr)
    attrs: dict[str, Attr] = {"layout": up.layout, "weight_on": "output" if up.weights is None else "input"}
    given = [*shared, *packed, *biases, *scales]
    found = _pair_alone(block, up, down, len(chosen), given)
    return _distance(_alone(block, attrs, [*shared, *exact, *biases]), found)


def _chosen(experts: int, each: int, generator: torch.Generator) -> Tensor:
    """Some experts, in order; `each` has so many weights."""
    count = max(1, min(experts, EXPERTS, VALUES // each))
    return torch.randperm(experts, generator=generator)[:count].sort().values


def _inputs(hidden: int, experts: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights."""
    x = torch.randn(TOKENS, hidden, generator=generator)
    ids = torch.rand(TOKENS, experts, generator=generator).topk(k).indices
    return x, ids, torch.rand(TOKENS, k, generator=generator)


def _distance(exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> float:
    (y, other) = (result.double() for result in (*exact, *rounded))
    return float((other - y).norm() / y.norm()) if y.norm() else 0.0


def _error(
    module: Module, op: Experts | Layer, made: Mapping[str, Derivation], weights: Mapping[str, Tensor]
) -> float | None:
    experts, hidden, width = op.num_experts, cast("int", op.x.tensor.shape[-1]), op.width
    generator = torch.Generator().manual_seed(0)
    chosen = _chosen(experts, (op.parts + 1) * hidden * width, generator)
    exact, rounded, scales = list[Tensor](), list[Tensor](), list[Tensor]()
    for value in (op.up, op.down):
        derivation = made[str(module.main.arg_attrs[value]["source"])]
        if not all(name in weights or name in made for name in derivation.of):
            return None
        bank, how = _before_packing(module, derivation, weights)
        if bank.is_meta:
            return None
        bank, order = bank[chosen].float(), (how.parts, how.transposed, how.interleaved)
        exact.append(pack(bank, *order))
        scales.append(find_scales(bank, *order, op.packing))
        rounded.append(pack(bank, *order, op.packing, scales[-1]))
    biases = list[Tensor | None]()
    for bias in (op.up_bias, op.down_bias):
        if bias is None:
            biases.append(None)
            continue
        derivation = made[str(module.main.arg_attrs[bias]["source"])]
        (packed,) = evaluate_func(module, derivation.func, [weights[name] for name in derivation.of])
        biases.append(packed[chosen])
    block = clone_block(op.activation, {}, _wide, _wide_attr)
    attrs: dict[str, Attr] = {"layout": op.layout, "weight_on": op.weight_on}
    quantised: dict[str, Attr] = {**attrs, "packing": op.packing, "activations": op.activations}
    shared = _inputs(hidden, len(chosen), min(op.k, len(chosen)), generator)
    return _distance(
        _alone(block, {**attrs, "packing": "tiles"}, [*shared, *exact, *biases]),
        _alone(block, quantised, [*shared, *rounded, *biases, *scales]),
    )


def _before_packing(module: Module, made: Derivation, weights: Mapping[str, Tensor]) -> tuple[Tensor, Pack]:
    """A bank as it was packed, and the op that packed it."""
    body = made.func.body
    last = next(op for op in body.ops if isinstance(op, Pack))
    sources = zip(body.args, made.of, strict=True)
    parts = {arg: weights[name] for arg, name in sources if arg is not last.scales}
    if last.w.op is None:
        return parts[last.w], last
    copy = Block([arg.type for arg in parts], [arg.name for arg in parts])
    values: ValueMap = dict(zip(parts, copy.args, strict=True))
    for op in body.ops[: body.ops.index(last)]:
        copy.append(clone_op(op, values))
    copy.append(Return([values[last.w]]))
    return evaluate_func(module, Func("bank", copy), list(parts.values()))[0], last


def _wide(type: Type) -> Type:
    narrow = isinstance(type, TensorType) and type.dtype.is_float
    return TensorType(type.shape, DType.f32) if isinstance(type, TensorType) and narrow else type


def _wide_attr(value: Attr) -> Attr:
    return DType.f32 if isinstance(value, DType) and value.is_float else value


def _alone(activation: Block, attrs: dict[str, Attr], given: Sequence[Tensor | None]) -> list[Tensor]:
    """What experts on packed banks give by themselves, without what comes after them."""
    body, arguments = _taking(given)
    experts = Experts(_trimmed(arguments), None, attrs, [clone_block(activation, {})])
    body.append(experts)
    return _results(body, experts.y, given)


def _pair_alone(
    activation: Block, up: GatherGemm, down: GemmCombine, experts: int, given: Sequence[Tensor | None]
) -> list[Tensor]:
    """The same of two GEMMs; `given`: x, ids, weights, then banks, biases and scales of both."""
    body, (x, ids, weights, *rest) = _taking(given)
    assert ids is not None
    group = Group([ids], None, {"num_experts": experts})
    early = None if up.weights is None else weights
    attrs: dict[str, Attr] = {
        "k": ids.tensor.shape[-1],
        "layout": up.layout,
        "packing": up.packing,
        "activations": up.activations,
    }
    arguments = _trimmed([x, group.order, group.offsets, rest[0], rest[2], early, rest[4]])
    first = GatherGemm(arguments, None, attrs, [clone_block(activation, {})])
    attrs = {"packing": down.packing, "activations": down.activations, "weighted": early is None}
    arguments = _trimmed([first.h, group.order, group.offsets, weights, rest[1], rest[3], rest[5]])
    second = GemmCombine(arguments, None, attrs)
    for op in (group, first, second):
        body.append(op)
    return _results(body, second.y, given)


def _taking(given: Sequence[Tensor | None]) -> tuple[Block, list[Value | None]]:
    """A block that takes these tensors, and its arguments in their places."""
    names = {to_torch(dtype): dtype for dtype in DType}
    body = Block([TensorType(tuple(value.shape), names[value.dtype]) for value in given if value is not None])
    rest = iter(body.args)
    return body, [None if value is None else next(rest) for value in given]


def _trimmed(arguments: Sequence[Value | None]) -> list[Value | None]:
    found = list(arguments)
    while found[-1] is None:
        found.pop()
    return found


def _results(body: Block, value: Value, given: Sequence[Tensor | None]) -> list[Tensor]:
    body.append(Return([value]))
    func = Func("main", body)
    return list(evaluate_func(Module([func]), func, [tensor for tensor in given if tensor is not None]))
