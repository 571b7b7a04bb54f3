"""Weights made of weights that a caller holds: stacked experts of a graph that has its parameters as inputs.

A weight is made when its parts are first seen, and kept while the memory that it was made of lives and does not change.
As for `live_banks`, a change is noticed by the tensors' version counters, which `tensor.data` bypasses: after writing
through `.data`, call `forget()`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.runtime.release import require

State = list[tuple[int, int]]


@dataclass
class _Made:
    """A weight, the state of its parts when it was made, and its value: None once a part is gone.

    A value that is a view of a part is kept as its place in there, or it would keep its part alive.
    """

    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    state: State
    value: Tensor | None
    view: tuple[int, tuple[Any, ...]] | None = None  #: number of the part; size, stride and offset


_made: dict[tuple[Any, ...], _Made] = {}


class LiveWeight:
    """One weight of a graph, to be called with its parts.

    Args:
        name: what is made: the same of the same parts is made once, whoever asks.
        make: computes it.
    """

    def __init__(self, name: str, make: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.name, self.make = name, make
        self._last: _Made | None = None

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """The weight, made anew if a part is another, or has changed."""
        try:
            state = [(part.data_ptr(), part._version) for part in parts]
        except RuntimeError:  # parts made in inference mode have no version counter
            return self._fresh(parts)
        last = self._last
        if last is None or last.value is None or last.state != state:
            last = self._last = self._find(parts, state)
        assert last.value is not None
        if last.view is None:
            return last.value
        number, place = last.view
        with torch.no_grad():
            return parts[number].as_strided(*place)

    def _find(self, parts: Sequence[Tensor], state: State) -> _Made:
        storages = [part.untyped_storage() for part in parts]
        places = [(part.storage_offset(), part.shape, part.stride()) for part in parts]
        key = (self.name, *map(id, storages), *places)
        known = _made.get(key)
        if known is not None and known.state == state:
            return known
        if known is not None:
            known.value = None  # whoever still has it lets go
        value, view = self._fresh(parts), None
        address = value.untyped_storage().data_ptr()
        number = next((i for i, storage in enumerate(storages) if storage.data_ptr() == address), None)
        if number is not None and value.dtype == parts[number].dtype:
            view = number, (value.size(), value.stride(), value.storage_offset())
            value = value.new_empty(0)
        elif number is not None:
            value = value.clone()
        refs = tuple(weakref.ref(storage, lambda _: _drop(key)) for storage in {id(s): s for s in storages}.values())
        made = _made[key] = _Made(refs, state, value, view)
        return made

    def is_view(self) -> bool:
        """Whether the weight that was last asked for lies in the memory of a part."""
        return self._last is None or self._last.view is not None

    def _fresh(self, parts: Sequence[Tensor]) -> Tensor:
        require(parts)
        with torch.inference_mode(False), torch.no_grad():
            return self.make(parts)


def _drop(key: tuple[Any, ...]) -> None:
    gone = _made.pop(key, None)
    if gone is not None:
        gone.value = None


def forget() -> None:
    """Drop every weight that was made."""
    for key in list(_made):
        _drop(key)
