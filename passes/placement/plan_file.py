"""plan.json: a placement as it is kept, checked when it is read, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError
from sparsec.passes.placement.array_file import read_json
from sparsec.passes.placement.topology import Topology, parse_topology

FORMAT, VERSION = "sparsec-placement", 1
LARGEST = 1 << 27  #: bytes of a plan
MOST_SLOTS = 1 << 26  #: over all layers

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """Where experts live.

    Args:
        layers: the number of each layer in the model.
        experts: per layer.
        size: slots of each rank; slot numbers run over the ranks in order.
        slots: [layers, slots] int64, the expert in each slot.
        split: [layers, slots] float64, the share of the expert's tokens that a slot gets; an expert's sum to 1.
        report: figures of the plan, as JSON.
    """

    topology: Topology
    layers: tuple[int, ...]
    experts: int
    size: tuple[int, ...]
    slots: Ints
    split: Floats
    seed: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def rank_of_slot(self) -> Ints:
        """[slots], the rank that each slot is of."""
        return np.repeat(np.arange(len(self.size)), self.size)

    def replicas(self) -> list[list[list[int]]]:
        """Logical to physical: the slots of every expert of every layer, ascending."""
        tables: list[list[list[int]]] = []
        for row in self.slots:
            table: list[list[int]] = [[] for _ in range(self.experts)]
            for slot, expert in enumerate(row.tolist()):
                table[expert].append(slot)
            tables.append(table)
        return tables


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan. The file appears whole, or is left as it was. Raises: OSError."""
    path = Path(path)
    data = {
        "format": FORMAT,
        "version": VERSION,
        "topology": plan.topology.text,
        "seed": plan.seed,
        "experts": plan.experts,
        "layers": list(plan.layers),
        "slots_per_rank": list(plan.size),
        "physical_to_logical": plan.slots.tolist(),
        "logical_to_physical": plan.replicas(),
        "split": [[round(value, 9) for value in row] for row in plan.split.tolist()],
        "report": plan.report,
    }
    check_writable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, allow_nan=False)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def check_writable(path: Path) -> None:
    """Raises: SparsecError where no file can be written, before anything is computed for it."""
    if path.is_dir():
        raise SparsecError(f"{path}: is a folder\n  hint: name a file in it")
    if not path.parent.is_dir():
        raise SparsecError(f"{path}: there is no folder {path.parent}\n  hint: make it first")
    if not os.access(path.parent, os.W_OK):
        raise SparsecError(f"{path}: the folder {path.parent} cannot be written to\n  hint: name another file")


def read_plan(path: str | Path) -> Plan:
    """Read and check a plan. Raises: SparsecError naming the entry that is wrong."""
    data = read_json(Path(path), LARGEST, nan=False)
    try:
        return _plan(data)
    except SparsecError as error:
        raise SparsecError(f"{path}: {error}") from error


def _plan(data: Any) -> Plan:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SparsecError(f"is no plan: 'format' is not '{FORMAT}'\n  hint: make one with sparsec plan")
    if data.get("version") != VERSION:
        found = repr(data.get("version"))[:20]
        raise SparsecError(f"has version {found}; this sparsec reads {VERSION}\n  hint: plan again")
    experts, layers, size = _whole(data, "experts"), _wholes(data, "layers"), _wholes(data, "slots_per_rank")
    if experts < 1 or not layers or len(set(layers)) != len(layers):
        raise SparsecError("'experts' and 'layers' must name at least one expert, and each layer once")
    if not isinstance(data.get("topology"), str):
        raise SparsecError("'topology' is not a text")
    topology = parse_topology(data["topology"])
    if len(size) != len(topology.ranks) or not all(0 < one <= experts for one in size):
        raise SparsecError(f"'slots_per_rank' must be {len(topology.ranks)} numbers of 1 to {experts}")
    slots_count = sum(size)
    if slots_count * len(layers) > MOST_SLOTS:
        raise SparsecError(f"has more than {MOST_SLOTS} slots")
    slots = _table(data, "physical_to_logical", len(layers), slots_count, int).astype(np.int64)
    split = _table(data, "split", len(layers), slots_count, float).astype(np.float64)
    plan = Plan(topology, tuple(layers), experts, tuple(size), slots, split, _whole(data, "seed"), _report(data))
    check_plan(plan)
    if data.get("logical_to_physical") != plan.replicas():
        raise SparsecError("'logical_to_physical' does not agree with 'physical_to_logical'")
    return plan


def check_plan(plan: Plan) -> None:
    """The rules of a placement. Raises: SparsecError naming the layer, and the expert or rank."""
    of_slot = plan.rank_of_slot
    for layer, row, split in zip(plan.layers, plan.slots, plan.split, strict=True):
        if row.min() < 0 or row.max() >= plan.experts:
            raise SparsecError(f"layer {layer}: a slot holds expert {row.max()}; there are {plan.experts}")
        missing = np.flatnonzero(np.bincount(row, minlength=plan.experts) == 0)
        if len(missing):
            raise SparsecError(f"layer {layer}: expert {missing[0]} has no slot")
        both, number = np.unique(of_slot * plan.experts + row, return_counts=True)
        if (number > 1).any():
            rank, expert = divmod(int(both[number > 1][0]), plan.experts)
            raise SparsecError(f"layer {layer}: rank {rank} holds expert {expert} twice")
        if not np.isfinite(split).all() or (split < 0).any():
            raise SparsecError(f"layer {layer}: 'split' has shares that are negative or no numbers")
        off = np.abs(np.bincount(row, split, plan.experts) - 1) > 1e-6
        if off.any():
            raise SparsecError(f"layer {layer}: the shares of expert {np.flatnonzero(off)[0]} do not sum to 1")


def _whole(data: dict[str, Any], key: str) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise SparsecError(f"'{key}' is not a whole number from 0")
    return value


def _wholes(data: dict[str, Any], key: str) -> list[int]:
    values = data.get(key)
    if not isinstance(values, list):
        raise SparsecError(f"'{key}' is not a list")
    return [_whole({key: value}, key) for value in values]


def _table(data: dict[str, Any], key: str, rows: int, columns: int, kind: type) -> NDArray[Any]:
    table = data.get(key)
    kinds = (int,) if kind is int else (int, float)
    if not isinstance(table, list) or len(table) != rows:
        raise SparsecError(f"'{key}' has not one row for each of {rows} layers")
    for index, row in enumerate(table):
        if not isinstance(row, list) or len(row) != columns or not all(type(value) in kinds for value in row):
            raise SparsecError(f"'{key}': row {index} is not a list of {columns} numbers")
        if kind is int and not all(0 <= value < 1 << 31 for value in row):
            raise SparsecError(f"'{key}': row {index} has a number that is no expert")
        if kind is float and not all(0 <= value <= 1 + 1e-6 for value in row):
            raise SparsecError(f"'{key}': row {index} has a share that is not from 0 to 1")
    return np.array(table)


def _report(data: dict[str, Any]) -> dict[str, Any]:
    report = data.get("report", {})
    if not isinstance(report, dict):
        raise SparsecError("'report' is no JSON object")
    return report
