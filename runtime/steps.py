"""Turns a plan's steps into closures over a list of slots, with everything that can be decided at load decided.

The list holds the plan's slots first, then constants of argument trees and sizes that symbols decide. A call is then
an `itemgetter` over that list and the operator. Sizes are computed once per assignment of symbols and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from sparsec.runtime import cpu_dense
from sparsec.runtime.dims import Expr, compile_dim
from sparsec.runtime.errors import InputError, RankError
from sparsec.runtime.operators import CONSTANTS, dims_of, resolve, slots_of
from sparsec.runtime.plan import Call, Exchange, Free

Slots = list[Any]
Closure = Callable[[Slots], None]
MAX_KEPT = 64
"""For how many assignments of symbols the sizes are kept."""


class Runner:
    """Steps over slots, ready to run any number of times.

    Args:
        steps: checked steps (`runtime.check`).
        width: how many slots the plan itself uses.
        known: symbols that have a value before the first step.
        device: where factory operators create.
        launch: makes the closure of a `Launch` or an `Exchange`.
        allow: as of `operators.resolve`.

    Attributes:
        base: what a run starts from; whoever owns the runner puts its constants there.
    """

    def __init__(
        self,
        steps: Sequence[Any],
        width: int,
        known: Collection[str],
        device: torch.device,
        launch: Callable[[Any], Closure] | None = None,
        allow: Collection[str] = (),
    ) -> None:
        self.base: Slots = [None] * (width + 1)
        self._env_slot = width
        self._device, self._allow = device, allow
        self._known = sorted(known)
        self._sizes: list[tuple[int, Any]] = []  # (slot, argument tree), decided by `known`
        self._late: list[tuple[int, Any, frozenset[str]]] = []  # decided by results on the way
        self._kept: dict[tuple[int, ...], list[Any]] = {}
        self._closures: list[Closure] = []
        self._names: list[str] = []
        self._places: list[range] = []  # of each step: its closures
        self._new = set[int]()  # slots of tensors that nobody else holds
        self._visible: dict[int, int] = {}  # slot of a mask -> slot of what it shows
        for step in steps:
            first = len(self._closures)
            if isinstance(step, Free):
                self._add("free", _free(step.slots))
            elif isinstance(step, Call):
                self._add(step.op, self._call(step))
            else:
                assert launch is not None, "a region launches nothing"
                self._add(step.op if isinstance(step, Exchange) else f"launch {step.kernel}", launch(step))
            if isinstance(step, Call | Exchange) and step.binds:
                self._add(step.op, self._bind(step))
            self._places.append(range(first, len(self._closures)))

    def blank(self) -> Slots:
        """Fresh slots for a run of steps that need no known symbol."""
        values = self.base.copy()
        values[self._env_slot] = {}
        return values

    def start(self, env: Mapping[str, int]) -> Slots:
        """Fresh slots for a run in which `env` gives every known symbol its value."""
        values = self.blank()
        values[self._env_slot].update(env)
        if self._sizes:
            key = tuple([env[name] for name in self._known])
            sizes = self._kept.get(key)
            if sizes is None:
                if len(self._kept) >= MAX_KEPT:
                    self._kept.pop(next(iter(self._kept)), None)
                sizes = self._kept[key] = [self._fixed(tree, env) for _, tree in self._sizes]
            for (slot, _), size in zip(self._sizes, sizes, strict=True):
                values[slot] = size
        return values

    def run(self, values: Slots, only: Sequence[int] | None = None) -> None:
        """Run every step, or `only` those of these numbers.

        Raises:
            InputError: an index, such as a token id, is beyond its table.
            RankError: another rank is dead or does not answer.
            RuntimeError: an operator fails; names the step.
        """
        i = 0
        steps: Iterable[tuple[int, Closure]] = enumerate(self._closures)
        if only is not None:
            steps = ((i, self._closures[i]) for step in only for i in self._places[step])
        try:
            for i, closure in steps:  # noqa: B007 (read where it fails)
                closure(values)
        except (InputError, RankError):
            raise
        except IndexError as error:
            raise InputError(
                f"an input holds an index beyond its table, such as a token id beyond the vocabulary: "
                f"{self._names[i]} failed: {error}"
            ) from error
        except Exception as error:
            raise RuntimeError(f"{self._names[i]} failed: {error}") from error

    def _add(self, name: str, closure: Closure) -> None:
        self._names.append(name)
        self._closures.append(closure)

    def _call(self, step: Call) -> Closure:
        op = resolve(step.op, self._allow)
        fixed = {name: self._fixed(tree) for name, tree in step.kwargs.items() if _is_fixed(tree)}
        run: Callable[..., Any] = partial(op, **fixed) if fixed else op
        places = [self._place(tree) for tree in step.args]
        named = {name: self._place(tree) for name, tree in step.kwargs.items() if not _is_fixed(tree)}
        several = len(step.outs) != 1 or any("List" in str(ret.type) for ret in op._schema.returns)
        flat = [place for place in places if isinstance(place, int)]
        if self._device.type == "cpu":
            if cpu_dense.is_new(step, op, self._new):
                self._new.update(slot for slot in step.outs if slot is not None)
            if step.op == cpu_dense.LINEAR and len(flat) == 2 and not step.kwargs:
                return _one(cpu_dense.linear, flat, step.outs[0])
            if (mask := cpu_dense.hides(step)) is not None and mask in self._new:
                return self._attention(run, flat, mask, step.outs[0])
        if not named and len(flat) == len(places):
            return _several(run, flat, step.outs) if several else _one(run, flat, step.outs[0])
        outs = [(i, slot) for i, slot in enumerate(step.outs) if slot is not None]

        def call(values: Slots) -> None:
            result = run(
                *[_pick(place, values) for place in places],
                **{name: _pick(place, values) for name, place in named.items()},
            )
            for i, slot in outs:
                values[slot] = result[i] if several else result

        return call

    def _attention(self, run: Callable[..., Any], places: list[int], mask: int, out: int | None) -> Closure:
        """Attention by what its mask shows, which all layers of a run find out once."""
        if mask not in self._visible:
            self.base.append(None)
            self._visible[mask] = len(self.base) - 1
        visible = self._visible[mask]
        pick = itemgetter(*places)

        def attention(values: Slots) -> None:
            query, key, value, given = pick(values)
            shown: cpu_dense.Visible | None = values[visible]
            if shown is None or shown.mask is not given:
                shown = values[visible] = cpu_dense.Visible.of(given)
            result = shown.attend(run, query, key, value)
            if out is not None:
                values[out] = result

        return attention

    def _place(self, tree: Any) -> Any:
        """Where an argument will be: a slot, or a list of slots for a list of tensors."""
        if isinstance(tree, dict) and "slot" in tree:
            return tree["slot"]
        if isinstance(tree, list) and any(True for _ in slots_of(tree)):
            return [self._place(item) for item in tree]
        self.base.append(None)
        slot = len(self.base) - 1
        symbols = {name for dim in dims_of(tree) for name in _symbols(dim)}
        if not symbols:
            self.base[slot] = self._fixed(tree)
        elif symbols <= set(self._known):
            self._sizes.append((slot, tree))
        else:
            self._late.append((slot, tree, frozenset(symbols)))
        return slot

    def _fixed(self, tree: Any, env: Mapping[str, int] | None = None) -> Any:
        """The value of an argument tree without slots."""
        if isinstance(tree, list):
            return [self._fixed(item, env) for item in tree]
        if not isinstance(tree, dict):
            return tree
        ((tag, value),) = tree.items()
        if tag == "dim":
            size = compile_dim(value)
            return size(env or {}) if isinstance(size, Expr) else size
        if tag == "device":
            return self._device
        return CONSTANTS[tag][value]

    def _bind(self, step: Call | Exchange) -> Closure:
        binds = list(step.binds)

        def bind(values: Slots) -> None:
            env = values[self._env_slot]
            for slot, axis, symbol in binds:
                size = int(values[slot]) if axis < 0 else values[slot].shape[axis]
                if env.setdefault(symbol, size) != size:
                    raise ValueError(f"the size {symbol} is both {env[symbol]} and {size}")
            for slot, tree, symbols in self._late:
                if symbols <= env.keys():
                    values[slot] = self._fixed(tree, env)

        return bind


def _is_fixed(tree: Any) -> bool:
    """Whether an argument tree has the same value in every run."""
    return not any(True for _ in slots_of(tree)) and not any(_symbols(dim) for dim in dims_of(tree))


def _symbols(dim: int | str) -> frozenset[str]:
    size = compile_dim(dim)
    return size.symbols if isinstance(size, Expr) else frozenset()


def _pick(place: Any, values: Slots) -> Any:
    return [_pick(item, values) for item in place] if isinstance(place, list) else values[place]


def _free(slots: Sequence[int]) -> Closure:
    def free(values: Slots) -> None:
        for slot in slots:
            values[slot] = None

    return free


def _one(run: Callable[..., Any], places: list[int], out: int | None) -> Closure:
    """A call with positional arguments and one result: most of them."""
    if not places or out is None:
        return _several(lambda *args: (run(*args),), places, [out])
    if len(places) == 1:
        (only,) = places

        def unary(values: Slots) -> None:
            values[out] = run(values[only])

        return unary
    pick = itemgetter(*places)

    def call(values: Slots) -> None:
        values[out] = run(*pick(values))

    return call


def _several(run: Callable[..., Any], places: list[int], outs: Sequence[int | None]) -> Closure:
    kept = [(i, slot) for i, slot in enumerate(outs) if slot is not None]

    def call(values: Slots) -> None:
        result = run(*[values[place] for place in places])
        for i, slot in kept:
            values[slot] = result[i]

    return call
