"""Is the compiled model right? Compares it with eager PyTorch, block by block, with the same routing on both sides.

A whole model cannot be compared in low precision: one tie that falls the other way changes everything after it. So each
expert layer is compiled on its own and run on what eager PyTorch gave it (hidden states, ids, weights), and each router
on the logits it sees when all routers before it are held to eager's choices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sparsec import pipeline
from sparsec.codegen.emit import Emitted, emit
from sparsec.diagnostics import CompileError
from sparsec.dialects.builtin import Return
from sparsec.dialects.dtypes import to_torch
from sparsec.dialects.moe import Experts, Route
from sparsec.frontend.capture import capture
from sparsec.ir.core import Attr, Block, Func, Module, Op, Value
from sparsec.ir.equal import ValueMap, clone_op
from sparsec.ir.interp import DerivedWeights, evaluate_module
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import Dim, Sym, TensorType, Type, evaluate, symbols
from sparsec.passes.rules import substitute
from sparsec.pipeline import Instrument
from sparsec.runtime.executor import Program

_TOKENS = Sym("n")
F32_TOLERANCE = 1e-5
"""Largest relative error in f32, of a block and of the whole model."""
LOW_PRECISION_FACTOR = 1.1
"""How much further from an f32 reference than eager's own result a low-precision block may be."""


@dataclass(frozen=True)
class Comparison:
    """One figure: `error` must not exceed `bound`.

    Args:
        tokens: token count of the run.
        place: module path of the block, or `model`.
        what: `experts`, `route` or `output`.
        error: relative; for low precision the distance to the f32 reference.
        bound: what it may be.
    """

    tokens: int
    place: str
    what: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def check(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tokens: Sequence[int] = (1, 7, 64),
    instruments: Sequence[Instrument] = (),
    emitted_to: Callable[[Emitted], None] = lambda emitted: None,
    say: Callable[[str], None] = lambda what: None,
) -> list[Comparison]:
    """Compile `model` for the CPU and compare.

    Args:
        tokens: the token counts to run at.
        instruments: watch the passes over the whole model, such as a dump.
        emitted_to: is given the whole model's plan and kernels.

    Raises: CompileError; also for a model without expert layers.
    """
    captured = capture(model, args, kwargs)
    leaves, spec = tree_flatten((tuple(args), dict(kwargs or {})))
    no_cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    result = pipeline.run(captured.module, instruments=instruments)
    raised = result.ir("raise")
    weights = DerivedWeights(raised, captured.weights)
    layers = [_Layer(raised.main, op, weights) for op in raised.main.body.ops if isinstance(op, Experts)]
    if not layers:
        raise CompileError("there are no expert layers to compare")
    emitted = emit(result.module, "cpu", captured.inputs_json, captured.structure_json, here=True)
    emitted_to(emitted)
    program = Program(emitted.plan, DerivedWeights(result.module, captured.weights), files=emitted.files)
    found = list[Comparison]()
    for count in tokens:
        say(f"{count} tokens")
        inputs = random_inputs(raised.main, leaves, count)
        with _recorded(model, layers) as seen, torch.no_grad():
            given, named = tree_unflatten(inputs, spec)
            expected = tree_leaves(model(*given, **named, **no_cache))
        found += _compare(count, raised, layers, seen, inputs, weights)
        if layers[0].op.x.tensor.dtype.itemsize >= 4:
            outputs = [value for value in expected if isinstance(value, Tensor)]
            error = max(relative(ours, theirs) for ours, theirs in zip(program(*inputs), outputs, strict=False))
            found.append(Comparison(count, "model", "output", error, F32_TOLERANCE))
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite where one has a NaN that the other has not."""
    ours, theirs = ours.double(), theirs.double()
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return float("inf")
    scale = theirs.nan_to_num().abs().max().item() if theirs.numel() else 0.0
    error = (ours - theirs).nan_to_num().abs().max().item() if theirs.numel() else 0.0
    return error / scale if scale else error


@dataclass(frozen=True)
class _Alone:
    """Ops as a module of their own, and the values of the model that its arguments stand for."""

    module: Module
    taken: tuple[Value, ...]


def _alone(ops: Sequence[OpDef], results: Sequence[Value], tokens: Dim) -> _Alone:
    """Copies of `ops` as a module that takes what they read, its token count called `n`."""

    def size(dim: Dim) -> Dim:
        return substitute(dim, tokens, _TOKENS)

    def type_(type: Type) -> Type:
        return TensorType(tuple(map(size, type.shape)), type.dtype) if isinstance(type, TensorType) else type

    def attr(value: Attr) -> Attr:
        if isinstance(value, tuple):
            return tuple(attr(item) for item in value)
        return size(value) if isinstance(value, Sym) else value

    made = {result for op in ops for result in op.results}
    taken = tuple(dict.fromkeys(value for op in ops for value in op.operands if value not in made))
    body = Block([type_(value.type) for value in taken], [value.name for value in taken])
    values: ValueMap = dict(zip(taken, body.args, strict=True))
    for op in ops:
        body.append(clone_op(op, values, type_, attr))
    body.append(Return([values[result] for result in results]))
    return _Alone(Module([Func("main", body)], {"phase": "raise", "version": 1}), taken)


class _Compiled:
    """A block compiled on its own: called with values of the model, it looks up its weights itself."""

    def __init__(self, alone: _Alone, sources: Mapping[Value, str], weights: Mapping[str, Tensor]) -> None:
        main = alone.module.main
        for value, arg in zip(alone.taken, main.body.args, strict=True):
            if value in sources:
                main.arg_attrs[arg] = {"kind": "param", "source": sources[value]}
        self.inputs = [value for value in alone.taken if value not in sources]
        lowered = pipeline.run(alone.module).module
        emitted = emit(lowered, "cpu", here=True)
        self.program = Program(emitted.plan, DerivedWeights(lowered, weights), files=emitted.files)

    def __call__(self, values: Mapping[Value, Tensor]) -> list[Tensor]:
        return self.program(*[values[value] for value in self.inputs])


class _Layer:
    """An expert layer: its op and the router that feeds it, compiled on their own."""

    def __init__(self, main: Func, op: Experts, weights: Mapping[str, Tensor]) -> None:
        sources = {v: str(a["source"]) for v, a in main.arg_attrs.items() if a.get("kind") not in (None, "input")}
        tokens = op.x.tensor.shape[0]
        maker = op.ids.op
        self.op, self.path = op, op.loc.scope
        self.route = maker if isinstance(maker, Route) and op.weights.op is maker else None
        self.experts = _Compiled(_alone([op], [op.y], tokens), sources, weights)
        if self.route is not None:
            ops = [self.route, op]
            self.routed = _Compiled(_alone(ops, [self.route.ids, self.route.weights], tokens), sources, weights)


@dataclass
class _Seen:
    """What eager PyTorch gave one bank of experts and got from it; `wide` is the bank's result computed in f32."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    y: Tensor
    wide: Tensor


@contextmanager
def _recorded(model: nn.Module, layers: Sequence[_Layer]) -> Generator[dict[str, _Seen]]:
    """Record calls of the modules that became banks, while the model runs its own implementation of them."""
    seen: dict[str, _Seen] = {}
    modules = dict(model.named_modules())

    def recorder(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            if len(args) == 3 and all(isinstance(arg, Tensor) for arg in args) and isinstance(y, Tensor):
                x, ids, weights = args
                wide = y if y.dtype.itemsize >= 4 else _wide(module)(x.float(), ids, weights.float())
                seen[path] = _Seen(x, ids, weights, y, wide)

        return record

    handles = [
        modules[layer.path].register_forward_hook(recorder(layer.path)) for layer in layers if layer.path in modules
    ]
    switch = getattr(model, "set_experts_implementation", None)
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    try:
        if switch is not None:
            switch("eager")
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        if switch is not None and before is not None:
            switch(before)


def _wide(module: nn.Module) -> nn.Module:
    """A copy of a bank in f32, without the hook that records it."""
    wide = copy.deepcopy(module).float()
    wide._forward_hooks.clear()
    return wide


def _compare(
    count: int,
    module: Module,
    layers: Sequence[_Layer],
    seen: Mapping[str, _Seen],
    inputs: Sequence[Any],
    weights: Mapping[str, Tensor],
) -> Iterator[Comparison]:
    """Routers and experts of one run, all routers held to eager's choices."""
    values, own = _values(module, layers, seen, inputs, weights)
    for layer in layers:
        eager = seen.get(layer.path)
        op = layer.op
        if layer.route is not None:
            ids, chosen = layer.routed(values)
            # In low precision eager's logits are others than these, so the router's own ops say what is right.
            exact = eager is not None and eager.x.dtype.itemsize >= 4
            reference = (eager.ids, eager.weights) if exact and eager else (own[op.ids], own[op.weights])
            error = relative(_dense(ids, chosen, op.num_experts), _dense(*reference, op.num_experts))
            bound = F32_TOLERANCE if chosen.dtype.itemsize >= 4 else torch.finfo(chosen.dtype).eps
            yield Comparison(count, layer.path, "route", error, bound)
        if eager is None:
            # No module of the user's to compare with: the op's own definition stands for it.
            yield Comparison(count, layer.path, "experts", relative(layer.experts(values)[0], values[op.y]), _bound(op))
            continue
        forced = {**values, op.x: eager.x, op.ids: eager.ids, op.weights: eager.weights}
        (ours,) = layer.experts(forced)
        if eager.y.dtype.itemsize >= 4:
            yield Comparison(count, layer.path, "experts", relative(ours, eager.y), F32_TOLERANCE)
        else:
            distance = LOW_PRECISION_FACTOR * distance_rms(eager.y, eager.wide)
            yield Comparison(count, layer.path, "experts", distance_rms(ours, eager.wide), distance)


def _values(
    module: Module,
    layers: Sequence[_Layer],
    seen: Mapping[str, _Seen],
    inputs: Sequence[Any],
    weights: Mapping[str, Tensor],
) -> tuple[dict[Value, Tensor], dict[Value, Tensor]]:
    """What the blocks read and yield when routers make the choices of eager PyTorch; what they would have chosen."""
    forced, own = dict[Value, Tensor](), dict[Value, Tensor]()
    for layer in layers:
        if (eager := seen.get(layer.path)) is not None:
            forced |= {layer.op.ids: eager.ids, layer.op.weights: eager.weights}
    wanted = {value for layer in layers for op in (layer.op, layer.route) if op is not None for value in op.operands}
    wanted |= {layer.op.y for layer in layers}
    choices = {value for layer in layers for value in (layer.op.ids, layer.op.weights)}
    values = dict[Value, Tensor]()

    def force(value: Value, computed: Tensor) -> Tensor:
        if value in choices:
            own[value] = computed
        return forced.get(value, computed)

    def observe(op: Op, results: tuple[Any, ...]) -> None:
        values.update((value, result) for value, result in zip(op.results, results, strict=True) if value in wanted)

    evaluate_module(module, inputs, weights, observer=observe, override=force)
    return values, own


def _dense(ids: Tensor, weights: Tensor, width: int) -> Tensor:
    """The weight of every expert for every token, [T, width + 1]: slots in another order are the same choice."""
    ids = torch.where((ids < 0) | (ids >= width), width, ids).long()
    return torch.zeros(ids.shape[0], width + 1, dtype=weights.dtype).scatter_add(1, ids, weights)


def distance_rms(ours: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, relative to that of the reference."""
    ours, reference = ours.double(), reference.double()
    scale = reference.pow(2).mean().sqrt().item()
    return (ours - reference).pow(2).mean().sqrt().item() / scale if scale else 0.0


def _bound(op: Experts) -> float:
    dtype = to_torch(op.x.tensor.dtype)
    return F32_TOLERANCE if dtype.itemsize >= 4 else 2 * torch.finfo(dtype).eps


def random_inputs(main: Func, leaves: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Random inputs like the examples: every open size is 1 but the last one of the first input, which is `tokens`."""
    generator = torch.Generator().manual_seed(tokens)
    args = [arg for arg in main.body.args if main.arg_attrs[arg].get("kind", "input") == "input"]
    sizes = dict.fromkeys((name for arg in args for dim in arg.tensor.shape for name in symbols(dim)), 1)
    if sizes:
        first = [name for dim in args[0].tensor.shape for name in symbols(dim)]
        sizes[(first or list(sizes))[-1]] = tokens
    made = list[Tensor]()
    for arg, example in zip(args, leaves, strict=True):
        shape = [evaluate(dim, sizes) for dim in arg.tensor.shape]
        if example.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator).to(example.dtype))
        else:
            low, high = int(example.min()), int(example.max())
            made.append(torch.randint(low, high + 1, shape, generator=generator).to(example.dtype))
    return made
