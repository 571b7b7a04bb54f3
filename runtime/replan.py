"""A running program goes over to another placement: experts move between ranks, then the tables change.

Nothing is compiled anew. Banks move as they lie in memory, packed or not, since a slot of theirs is one piece; those
that oneDNN holds in a layout of its own are unpacked for it, one layer at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsec.runtime.context import Context
from sparsec.runtime.distributed import World
from sparsec.runtime.distributed.migrate import migrate
from sparsec.runtime.errors import InputError
from sparsec.runtime.packing import Bank
from sparsec.runtime.plan import Plan, SpreadLayer
from sparsec.runtime.steps import Slots
from sparsec.runtime.tables import Tables


def replan(
    plan: Plan, base: Slots, context: Context, world: World, tables: Tables, budget_bytes: int | None
) -> Iterator[str]:
    """Move experts and change tables, in steps between which the program may run.

    Args:
        base: the slots of the program: its banks and tables are there.
        context: holds the banks that oneDNN packed.
        tables: checked, for every layer.
        budget_bytes: as of `migrate`, for each step.

    Yields: the layer of each step that was done.

    Raises: InputError where ranks do not go over to the same placement; RankError.
    """
    assert plan.spread is not None
    slot_of = {arg.source: arg.slot for arg in plan.args if arg.kind != "input"}
    layers = [_Layer.of(layer, slot_of, base, context) for layer in plan.spread.layers]
    _agree(world, layers, tables, base)
    for layer in layers:
        slots, shares = tables[layer.name]
        old, banks = base[layer.slots].cpu(), layer.banks()
        for table in migrate(world, banks, old, slots, budget_bytes=budget_bytes) if banks else ():
            first = world.rank * (len(table) // world.size)
            mine = range(first, first + len(table) // world.size)
            layer.put_back([slot - first for slot in mine if table[slot] != old[slot]])
            base[layer.slots] = table.to(base[layer.slots].device)
            base[layer.shares] = _alike(table).to(base[layer.shares].device)
            old = table
            yield layer.name
        layer.unpacked.clear()
        base[layer.slots] = slots.to(base[layer.slots].device)
        base[layer.shares] = shares.to(base[layer.shares].device)


@dataclass
class _Layer:
    """A layer's tables, by their slots, and its banks."""

    name: str
    slots: int
    shares: int
    plain: list[Tensor]
    packed: list[Bank]
    unpacked: list[Tensor]

    @staticmethod
    def of(layer: SpreadLayer, slot_of: dict[str, int], base: Slots, context: Context) -> _Layer:
        places = [slot_of[source] for source in layer.banks]
        packed = [bank for key, bank in context.banks.items() if key[0] in places]
        plain = [base[place] for place in places if base[place] is not None]
        return _Layer(layer.name, slot_of[layer.slots], slot_of[layer.shares], plain, packed, [])

    def banks(self) -> list[Tensor]:
        """Tensors [S, ...] that are written in place; `put_back` packs what was."""
        for bank in self.packed:
            self.unpacked.append(torch.stack([_plain(weight) for weight in bank.weights]))
            if bank.biases[0] is not None:
                self.unpacked.append(torch.stack([bias for bias in bank.biases if bias is not None]))
        return [*self.plain, *self.unpacked]

    def put_back(self, slots: Sequence[int]) -> None:
        """Pack the slots that changed."""
        values = iter(self.unpacked)
        for bank in self.packed:
            weights = next(values)
            biases = None if bank.biases[0] is None else next(values)
            for slot in slots:
                weight = weights[slot].clone()
                bank.weights[slot] = torch.ops.mkldnn._reorder_linear_weight(weight) if bank.packed else weight
                if biases is not None:
                    bank.biases[slot] = biases[slot].clone()

    @property
    def sizes(self) -> str:
        """What must be alike on all ranks."""
        kinds = [(list(bank.shape), bank.dtype) for bank in self.plain]
        return str(kinds + [(bank.columns, bank.dtype, bank.biases[0] is None) for bank in self.packed])


def _plain(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight


def _alike(table: Tensor) -> Tensor:
    """Shares by which the replicas of an expert get as many tokens each."""
    return 1.0 / torch.bincount(table)[table].double()


def _agree(world: World, layers: list[_Layer], tables: Tables, base: Slots) -> None:
    """Raises: InputError unless all ranks have the same tables before and after, and banks of the same sizes."""
    before, after = hashlib.sha256(), hashlib.sha256()
    for layer in layers:
        before.update(layer.sizes.encode() + base[layer.slots].cpu().numpy().tobytes())
        for table in tables[layer.name]:
            after.update(table.cpu().numpy().tobytes())
    marks = [int.from_bytes(digest.digest()[:7], "big") for digest in (before, after)]
    device = base[layers[0].slots].device
    all_marks = world.gather(torch.tensor(marks, dtype=torch.int64, device=device))
    for column, what in enumerate(("hold their banks in different ways or places", "were given different plans")):
        other = (all_marks[:, column] != all_marks[0, column]).nonzero()
        if len(other):
            raise InputError(f"ranks 0 and {int(other[0])} {what}: every rank must go over to the same plan")
