"""A routing trace: how many tokens each expert of each layer got while a model ran, step by step.

    {"version": 1, "model": "mixtral", "layers": [{"path": "model.layers.0.mlp", "experts": 8, "k": 2}],
     "steps": [{"tokens": 5, "counts": [[2, 0, 3, ...]], "routed": [[[0, 2], ...]]}]}

The module as raised is run by the reference interpreter, and every router's ids are counted: the runtime knows nothing
of it. That is slow, and exact; it is meant for small models and short prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from sparsec.diagnostics import SparsecError
from sparsec.dialects.moe import Route
from sparsec.ir.core import Module, Op
from sparsec.ir.interp import evaluate_module

MAX_LAYERS, MAX_EXPERTS, MAX_STEPS = 1024, 4096, 65536
MAX_COUNTS = 1 << 24
"""Counts of a trace in all."""
MAX_TOKENS = 1 << 40
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class TracedLayer:
    """A router: its module's path, of how many experts it chooses how many for each token."""

    path: str
    experts: int
    k: int


@dataclass(frozen=True)
class Step:
    """One run: `counts[layer][expert]` of its `tokens` went to an expert. Ids outside 0..experts-1 count nowhere.

    Args:
        routed: [layers][tokens][k], the experts of every token, or empty.
    """

    tokens: int
    counts: tuple[tuple[int, ...], ...]
    routed: tuple[tuple[tuple[int, ...], ...], ...] = ()


@dataclass(frozen=True)
class Trace:
    """Steps of one model, the prompt first.

    Args:
        placement: the device of each expert of each layer, or empty.
    """

    model: str
    layers: tuple[TracedLayer, ...]
    steps: tuple[Step, ...]
    placement: tuple[tuple[int, ...], ...] = ()

    def json(self) -> dict[str, Any]:
        """As it is written."""
        data: dict[str, Any] = {"version": 1, **{key: value for key, value in asdict(self).items() if value != ()}}
        data["steps"] = [{key: value for key, value in step.items() if value != ()} for step in data["steps"]]
        return data

    def counted(self) -> Trace:
        """Without the single tokens' experts."""
        return replace(self, steps=tuple(replace(step, routed=()) for step in self.steps))


def record(
    module: Module,
    weights: Mapping[str, Any],
    inputs: Callable[[Sequence[int]], Sequence[Any]],
    prompt: Sequence[int],
    *,
    name: str = "",
    new_tokens: int = 0,
    say: Callable[[str], None] = lambda what: None,
) -> Trace:
    """Run a module of phase `raise` on a prompt, then on each token that it writes (the likeliest), and count.

    Args:
        weights: by source, as of `evaluate_module`.
        inputs: the module's inputs for token ids; its first output must be logits [1, T, V] if `new_tokens`.

    Raises: SparsecError if the module has no router.
    """
    routes = [op for op in module.main.body.ops if isinstance(op, Route)]
    if not routes:
        raise SparsecError("the module has no `moe.route`: there is nothing to trace")
    found: dict[Op, Any] = {}

    def observe(op: Op, results: tuple[Any, ...]) -> None:
        if isinstance(op, Route):
            found[op] = results[0]

    ids, steps = list(prompt), list[Step]()
    for written in range(new_tokens + 1):
        say(f"{len(ids)} tokens")
        outputs = evaluate_module(module, inputs(ids), weights, observer=observe)
        seen = len(ids) if not written else 1  # attention looks back only: earlier tokens choose as before
        ids_of = [found[op][-seen:] for op in routes]
        counts = tuple(_counts(one, _size(op.num_experts)) for one, op in zip(ids_of, routes, strict=True))
        steps.append(Step(seen, counts, tuple(tuple(map(tuple, one.long().tolist())) for one in ids_of)))
        if written < new_tokens:
            ids.append(int(outputs[0].reshape(-1, outputs[0].shape[-1])[-1].argmax()))
    layers = tuple(TracedLayer(op.loc.scope, _size(op.num_experts), _size(op.k)) for op in routes)
    return Trace(name, layers, tuple(steps))


def _size(dim: Any) -> int:
    if not isinstance(dim, int):
        raise SparsecError(f"a router has {dim} experts: a trace needs a number")
    return dim


def _counts(ids: Any, experts: int) -> tuple[int, ...]:
    import torch

    flat = ids.reshape(-1).long()
    kept = flat[(flat >= 0) & (flat < experts)]
    return tuple(torch.bincount(kept, minlength=experts).tolist())


def read_trace(path: Path) -> Trace:
    """A trace from its file. Raises: SparsecError for what is none, and for sizes that do not agree."""

    def wrong(what: str) -> SparsecError:
        return SparsecError(f"{path} is no routing trace: {what}")

    def ints(value: Any, length: int, what: str) -> tuple[int, ...]:
        if not isinstance(value, list) or len(value) != length:
            raise wrong(f"{what} are not {length} numbers")
        if not all(type(item) is int and 0 <= item <= MAX_TOKENS for item in value):
            raise wrong(f"{what} are not all whole numbers from 0")
        return tuple(value)

    def items(holder: dict[str, Any], key: str, most: int) -> list[dict[str, Any]]:
        found = holder.get(key)
        if not isinstance(found, list) or len(found) > most or not all(isinstance(item, dict) for item in found):
            raise wrong(f"`{key}` is no list of at most {most} objects")
        return cast("list[dict[str, Any]]", found)

    if path.stat().st_size > MAX_BYTES:
        raise wrong(f"it is larger than {MAX_BYTES >> 20} MB")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise wrong(str(error)) from None
    if not isinstance(data, dict) or data.get("version") != 1:
        raise wrong("it is not of version 1")
    layers = list[TracedLayer]()
    for layer in items(data, "layers", MAX_LAYERS):
        experts, k = ints([layer.get("experts"), layer.get("k")], 2, "`experts` and `k`")
        if not 1 <= experts <= MAX_EXPERTS or not 1 <= k <= experts:
            raise wrong(f"a layer chooses {k} of {experts} experts")
        layers.append(TracedLayer(str(layer.get("path", "")), experts, k))
    held = items(data, "steps", MAX_STEPS)
    if len(held) * sum(layer.experts for layer in layers) > MAX_COUNTS:
        raise wrong(f"it holds more than {MAX_COUNTS} counts")

    def table(value: Any, what: str) -> tuple[tuple[int, ...], ...]:
        if not isinstance(value, list) or len(value) != len(layers):
            raise wrong(f"{what} are not for {len(layers)} layers")
        return tuple(ints(row, layer.experts, what) for row, layer in zip(value, layers, strict=True))

    def routed(value: Any, tokens: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) != len(layers):
            raise wrong(f"`routed` is not for {len(layers)} layers")
        found = list[tuple[tuple[int, ...], ...]]()
        for rows, router in zip(value, layers, strict=True):
            if not isinstance(rows, list) or len(rows) != tokens:
                raise wrong(f"`routed` is not for {tokens} tokens")
            for row in rows:
                if not isinstance(row, list) or len(row) != router.k or not all(type(one) is int for one in row):
                    raise wrong(f"`routed` has not {router.k} numbers for every token")
            found.append(tuple(map(tuple, rows)))
        return tuple(found)

    steps = list[Step]()
    for step in held:
        (tokens,) = ints([step.get("tokens")], 1, "`tokens`")
        counts = table(step.get("counts"), "`counts`")
        for row, router in zip(counts, layers, strict=True):
            if sum(row) > tokens * router.k:
                raise wrong(f"{sum(row)} choices of {tokens} tokens that have {router.k} each")
        steps.append(Step(tokens, counts, routed(step.get("routed"), tokens)))
    placement = table(data["placement"], "`placement`") if data.get("placement") else ()
    return Trace(str(data.get("model", "")), tuple(layers), tuple(steps), placement)
