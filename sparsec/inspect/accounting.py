"""Figures of a model added up: parameters in all and at work, bytes read per token, experts hit, cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsec.dialects.moe import experts_hit

if TYPE_CHECKING:
    from sparsec.frontend.blocks import Record
    from sparsec.inspect.dataflow import Dataflow

BATCHES = (1, 8, 64, 512)


@dataclass(frozen=True)
class Routed:
    """Expert layers that are alike.

    Args:
        layers: how many there are.
        experts, k: E, and how many of them a token uses.
        parameters: of all E experts of all these layers.
        expert_parameters: of one expert.
        shared_parameters: in one layer's block, at work for every token beside the router; None if not derived.
        shared_experts: the same in experts; None if not derived.
        place: path of the first such block.
        hidden: width of a token, by the router's weight; None if not derived.
    """

    layers: int
    experts: int
    k: int
    parameters: int
    expert_parameters: int
    shared_parameters: int | None
    shared_experts: float | None
    place: str
    hidden: int | None = None


@dataclass(frozen=True)
class Traffic:
    """Weights read for a batch of tokens, one per sequence: bytes, and for each entry of `routed` the experts hit."""

    batch: int
    weight_bytes: float
    experts_hit: list[float]


@dataclass(frozen=True)
class Scheduled:
    """How a GPU kernel of an artifact runs for up to `up_to` tokens (None: any number), as the cost model chose.

    Args:
        variant: family of kernels and tile, as text.
        predicted_us: at the range's upper end. A prediction, or, where `measured_us` is given, what that replaced.
        measured_us: what `sparsec tune` measured; None if it did not.
    """

    kernel: str
    up_to: int | None
    variant: str
    predicted_us: float
    limiter: str
    measured_us: float | None


@dataclass(frozen=True)
class Placed:
    """How an artifact is spread over devices.

    Args:
        devices: how many run it, a process each.
        width: devices of a node.
        slots: experts of a layer that a device holds.
        common_bytes: weights that all devices have.
        own_bytes: weights that a device alone has, by device.
    """

    devices: int
    width: int
    slots: int
    common_bytes: int
    own_bytes: list[int]


@dataclass(frozen=True)
class ModelInfo:
    """What `sparsec info` prints.

    Args:
        name: class of the model, or name of the artifact.
        layers: blocks in sequence, encoder and decoder together; 0 if no container holds any.
        moe_layers: those with experts.
        routed: expert layers by kind; empty for a dense model.
        total: parameters, each counted once.
        active: those at work for one token: all but the experts that it does not use.
        active_without_embedding: the same without tables that are only looked up.
        weight_bytes: of all parameters.
        traffic: weights read at a few batch sizes.
        kv_bytes_per_token: keys and values of all layers; None if not derived.
        dtypes: parameters by dtype.
        unreached: parameters that the traced inputs do not lead to, a vision tower say: in `active`, not in `traffic`.
        notes: what the figures leave out or assume.
        scheduled: GEMMs of an artifact for a GPU.
        placed: of an artifact for several devices.
    """

    name: str
    layers: int
    moe_layers: int
    routed: list[Routed]
    total: int
    active: int
    active_without_embedding: int
    weight_bytes: int
    traffic: list[Traffic]
    kv_bytes_per_token: int | None
    dtypes: dict[str, int]
    unreached: int = 0
    notes: list[str] = field(default_factory=list[str])
    scheduled: list[Scheduled] = field(default_factory=list[Scheduled])
    placed: Placed | None = None


def summarise(name: str, flow: Dataflow, batches: Sequence[int] = BATCHES) -> ModelInfo:
    """Add up what the flow found."""
    record = flow.record
    weights = _Weights(flow)
    routed = weights.routed()
    layers, moe_layers = _layers(flow)
    idle = sum(r.parameters - r.parameters * r.k // r.experts for r in routed)
    notes = [_stopped(record, path, weights.unseen.get(path, 0)) for path in record.stopped]
    return ModelInfo(
        name=name,
        layers=layers,
        moe_layers=moe_layers,
        routed=routed,
        total=weights.total,
        active=weights.total - idle,
        active_without_embedding=weights.total - idle - weights.tables,
        weight_bytes=weights.bytes,
        traffic=[weights.traffic(batch, routed) for batch in batches],
        kv_bytes_per_token=_kv_bytes(flow, notes),
        dtypes=weights.dtypes,
        unreached=weights.unreached,
        notes=notes,
    )


@dataclass
class _Block:
    """The banks of alike blocks, all layers together."""

    experts: int
    k: int
    parameters: int = 0
    bytes: int = 0


class _Weights:
    """Sums over parameters; every member of a family counts like the one that was traced."""

    def __init__(self, flow: Dataflow) -> None:
        from sparsec.inspect.dataflow import inside

        self.flow = flow
        self.total = self.bytes = self.tables = self.table_row = self.dense_bytes = self.unreached = 0
        self.dtypes = dict[str, int]()
        self.unseen = dict[str, int]()  # stopped module -> parameters, of no bank, that it did not come to read
        self.blocks = dict[str, _Block]()
        self.others = dict[str, int]()  # canonical path -> parameters at work for every token, all layers
        record = flow.record
        for path, value in record.parameters.items():
            canonical, count = record.canonical(path), value.numel or 0
            size, dtype = value.nbytes, str(value.dtype).removeprefix("torch.")
            self.total, self.bytes = self.total + count, self.bytes + size
            self.dtypes[dtype] = self.dtypes.get(dtype, 0) + count
            if (bank := flow.bank_of(canonical)) is not None:
                block = self.blocks.setdefault(bank.block, _Block(bank.experts, bank.k))
                block.parameters, block.bytes = block.parameters + count, block.bytes + size
            elif canonical in flow.tables:
                self.tables += count
                self.table_row += size // (value.shape[0] or 1)
            else:
                self.others[canonical] = self.others.get(canonical, 0) + count
                where = next((p for p in record.stopped if inside(canonical, record.canonical(p))), None)
                if canonical in flow.used or where is not None:
                    self.dense_bytes += size
                else:
                    self.unreached += count
                if canonical not in flow.used and where is not None:
                    self.unseen[where] = self.unseen.get(where, 0) + count

    def routed(self) -> list[Routed]:
        """Blocks with as many experts of one size, of which as many are used, are one kind."""
        kinds = dict[tuple[int, int, int], list[str]]()
        for path, block in self.blocks.items():
            one = block.parameters // (block.experts * _copies(self.flow.record, path))
            kinds.setdefault((block.experts, block.k, one), []).append(path)
        return [self._routed(*kind, paths) for kind, paths in kinds.items()]

    def _routed(self, experts: int, k: int, one: int, paths: list[str]) -> Routed:
        shared = self._shared(paths[0])
        ratio = None if shared is None else round(shared / one, 3)
        parameters = sum(self.blocks[path].parameters for path in paths)
        layers = _moe_layers(self.flow, paths)
        return Routed(layers, experts, k, parameters, one, shared, ratio, paths[0], self._hidden(paths[0], experts))

    def _hidden(self, block: str, experts: int) -> int | None:
        """What the router's weight, [experts, hidden] or the other way round, says."""
        router = self.flow.router_of(block)
        shapes = (
            v.shape for path, v in self.flow.record.parameters.items() if self.flow.record.canonical(path) in router
        )
        pairs = (shape for shape in shapes if len(shape) == 2 and experts in shape)
        return next((shape[shape[0] == experts] for shape in pairs), None)

    def _shared(self, block: str) -> int | None:
        """Parameters of the block that are neither in a bank nor in the router; None if it is more than the experts."""
        flow = self.flow
        around = flow.record.around(block)
        wide = not block or (around and block == around[-1].members[0])
        if wide or any(a.scope == block or a.scope.startswith(block + ".") for a in flow.attentions):
            return None
        router = flow.router_of(block)
        held = {path: count for path, count in self.others.items() if path.startswith(block + ".")}
        return sum(count for path, count in held.items() if path not in router) // _copies(flow.record, block)

    def traffic(self, batch: int, kinds: Sequence[Routed]) -> Traffic:
        """A dense weight is read once, a looked-up table by rows, an expert if any of the tokens uses it."""
        banks = sum(b.bytes * experts_hit(b.experts, b.k, batch) / b.experts for b in self.blocks.values())
        hit = [experts_hit(kind.experts, kind.k, batch) for kind in kinds]
        return Traffic(batch, self.dense_bytes + batch * self.table_row + banks, hit)


def _stopped(record: Record, path: str, unseen: int) -> str:
    """Which modules could be traced in part only, why, and what that leaves open."""
    copies = _copies(record, path)
    alike = f" and {copies - 1} alike" if copies > 1 else ""
    left = f"; {unseen:,} parameters in there are taken to work for every token" if unseen else ""
    return f"{path or 'the model'}{alike} traced in part: {record.stopped[path]}{left}"


def _copies(record: Record, path: str) -> int:
    """How many times the module at `path` is there, counting the families around it."""
    copies = 1
    for family in record.around(path):
        copies *= len(family)
    return copies


def _moe_layers(flow: Dataflow, blocks: Mapping[str, int] | Sequence[str]) -> int:
    """Layers that hold the blocks: members of the outermost container, or the blocks themselves."""
    counts = dict[str, int]()
    for block in blocks:
        around = flow.record.around(block)
        counts[around[0].members[0] if around else block] = len(around[0]) if around else 1
    return sum(counts.values())


def _layers(flow: Dataflow) -> tuple[int, int]:
    """Members of outermost containers whose results feed one another, and how many of them hold experts."""
    record = flow.record
    made, chained = dict[str, set[Any]](), set[str]()
    called = dict[Any, None]()
    for call in record.calls:
        if call.name != "block" or call.family is None or record.around(call.family.container):
            continue
        before = made.setdefault(call.family.container, set())
        if before.intersection(call.operands):
            chained.add(call.family.container)
        before.update(call.results)
        called[call.family] = None
    places = {a.scope for a in flow.attentions} | {bank.block for bank in flow.banks.values()}
    working = {family.container for place in places for family in record.around(place)[:1]}
    layers = sum(len(family) for family in called if family.container in chained | working)
    return layers, _moe_layers(flow, list({bank.block: None for bank in flow.banks.values()}))


def _kv_bytes(flow: Dataflow, notes: list[str]) -> int | None:
    """Bytes that one more token adds to the keys and values of all layers."""
    kept = [a for a in flow.attentions if a.returned]
    if not kept and flow.attentions:
        kept = flow.attentions
        notes.append("the model hands back no cache: KV bytes are those of all its keys and values")
    total = 0
    for value, attention in {value: a for a in kept for value in a.memory}.items():
        tokens = flow.record.batch * (attention.length or 0)
        size = (value.numel or 0) * value.dtype.itemsize
        if not tokens or not size or size % tokens:
            return None
        total += size // tokens * _copies(flow.record, attention.scope)
    return total or None
