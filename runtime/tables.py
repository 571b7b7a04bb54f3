"""Placement tables: which expert each slot of all ranks holds, and the share of its tokens that it gets.

A program holds them in buffers, so that another placement needs no other program. `read_placement` reads those of a
`plan.json`, as `sparsec plan` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.plan import Plan, Spread, SpreadLayer

FORMAT, VERSION = "sparsec-placement", 1
LARGEST = 1 << 28
"""Most bytes that a plan.json may have."""

Tables: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""Per layer, by name: slots [P] i64 and shares [P] f64."""


def as_tables(placement: str | os.PathLike[str] | Tables, spread: Spread) -> Tables:
    """Checked tables for a program. Raises: InputError where they are none, or not for this program."""
    if isinstance(placement, str | os.PathLike):
        return read_placement(Path(placement), spread)
    for layer in spread.layers:
        if layer.name not in placement:
            raise InputError(f"the placement lacks layer {layer.name}")
        if (why := problem(layer, spread, *placement[layer.name])) is not None:
            raise InputError(f"the placement of layer {layer.name} is none: {why}")
    return placement


def read_placement(place: Path, spread: Spread) -> dict[str, tuple[Tensor, Tensor]]:
    """The tables of a plan.json for a program. Raises: InputError where it is none, or not for this program."""
    try:
        raw = place.read_bytes() if place.stat().st_size <= LARGEST else b""
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror}") from None
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        raise InputError(f"{place} is no plan: it is not JSON of at most {LARGEST} bytes") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise InputError(f"{place} is no plan of format '{FORMAT}', version {VERSION}")
    size = data.get("slots_per_rank")
    if size != [spread.slots] * spread.ranks:
        raise InputError(
            f"{place} gives its ranks {_short(size)} slots, the program was compiled for {spread.ranks} ranks of "
            f"{spread.slots}: plan with the same --slots, or compile again"
        )
    names = [str(layer) for layer in _list(data, "layers", place)]
    slots, shares = _list(data, "physical_to_logical", place), _list(data, "split", place)
    if len(slots) != len(names) or len(shares) != len(names):
        raise InputError(f"{place} has not one row of slots and shares for each of its {len(names)} layers")
    wanted = [layer.name for layer in spread.layers]
    if sorted(names) != sorted(wanted):
        raise InputError(f"{place} is for the layers {', '.join(names)}, the program has {', '.join(wanted)}")
    tables = {
        name: (_numbers(row, int, place, name), _numbers(part, float, place, name))
        for name, row, part in zip(names, slots, shares, strict=True)
    }
    for layer in spread.layers:
        if (why := problem(layer, spread, *tables[layer.name])) is not None:
            raise InputError(f"{place}, layer {layer.name}: {why}")
    return tables


def check_tables(plan: Plan, values: Sequence[Any]) -> None:
    """Check the tables of a plan, whose arguments' values lie in their slots. Raises: ArtifactError."""
    if plan.spread is None:
        return
    by_source = {arg.source: values[arg.slot] for arg in plan.args if arg.kind == "buffer"}
    for layer in plan.spread.layers:
        if (why := problem(layer, plan.spread, by_source[layer.slots], by_source[layer.shares])) is not None:
            raise ArtifactError(f"the tables of layer {layer.name} are not sound: {why}")


def problem(layer: SpreadLayer, spread: Spread, slots: Tensor, shares: Tensor) -> str | None:
    """Why tables are no placement of a layer, or None."""
    count = spread.ranks * spread.slots
    if slots.shape != (count,) or shares.shape != (count,):
        return f"there are {slots.numel()} slots and {shares.numel()} shares, {count} are needed"
    slots, shares = slots.cpu(), shares.cpu()
    if not bool(((slots >= 0) & (slots < layer.experts)).all()):
        return f"a slot holds an expert that is none of the {layer.experts}"
    held = torch.bincount(slots, minlength=layer.experts)
    if bool((held == 0).any()):
        return f"expert {int((held == 0).nonzero()[0])} has no slot"
    for rank, row in enumerate(slots.view(spread.ranks, spread.slots)):
        if row.unique().numel() != row.numel():
            return f"rank {rank} holds an expert twice"
    if not bool(torch.isfinite(shares).all()) or bool((shares < 0).any()):
        return "shares are negative or no numbers"
    sums = torch.zeros(layer.experts, dtype=torch.float64).index_add_(0, slots, shares.double())
    off = (sums - 1).abs() > 1e-6
    return f"the shares of expert {int(off.nonzero()[0])} do not sum to 1" if bool(off.any()) else None


def _list(data: dict[str, Any], key: str, place: Path) -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list):
        raise InputError(f"{place}: '{key}' is not a list")
    return value


def _numbers(row: Any, kind: type, place: Path, layer: str) -> Tensor:
    kinds = (int,) if kind is int else (int, float)
    if not isinstance(row, list) or not all(type(value) in kinds and -(2**53) < value < 2**53 for value in row):
        raise InputError(f"{place}, layer {layer}: slots and shares are not lists of numbers")
    return torch.tensor(row, dtype=torch.int64 if kind is int else torch.float64)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
