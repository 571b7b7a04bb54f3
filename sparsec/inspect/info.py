"""What a model costs per token: parameters in all and at work, bytes read, experts hit, cache. No weights needed.

The figures follow from operators (`sparsec.inspect.accounting`) noted on shapes alone, so a model of any size takes
seconds.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.diagnostics import SparsecError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from sparsec.frontend.blocks import Progress
    from sparsec.inspect.accounting import Accounting

BATCHES = (1, 8, 64, 512)
LOOKED_FOR = (
    "a top-k or arg-max whose indices reach a grouped GEMM, a gather from a parameter, a batched product over a "
    "parameter's leading axis, or modules built alike"
)
_TOKENS = 7  # a length that is unlikely to equal a number of experts


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
    """

    layers: int
    experts: int
    k: int
    parameters: int
    expert_parameters: int
    shared_parameters: int | None
    shared_experts: float | None
    place: str


@dataclass(frozen=True)
class Traffic:
    """Weights read for a batch of tokens, one per sequence: bytes, and for each entry of `routed` the experts hit."""

    batch: int
    weight_bytes: float
    experts_hit: list[float]


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
        unreached: parameters that the traced inputs do not lead to, counted as active (a vision tower, say).
        notes: what the figures leave out or assume.
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


def info(
    model: nn.Module | str | Path,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    progress: Progress | None = None,
) -> ModelInfo:
    """Account for a model.

    Args:
        model: a module, on the meta device or with weights, or a folder with a `config.json`.
        args, kwargs: example inputs; only shapes matter. Left out, token ids are made up where `forward` takes
            `input_ids`.
        batches: batch sizes to give the weight traffic for.
        progress: told the path of each block as it is traced.

    Raises:
        SparsecError: the folder holds no model, or inputs are needed and not given.
    """
    from sparsec.frontend.blocks import record
    from sparsec.inspect.accounting import Accounting

    module = model if not isinstance(model, (str, Path)) else load_meta(Path(model))
    if not args and not kwargs:
        kwargs = example_inputs(module)
    try:
        accounting = Accounting(record(module, args, kwargs, progress=progress))
    except Exception as error:
        raise SparsecError(
            f"{type(module).__name__} cannot be run on shapes alone: {error}\n"
            "  hint: give example inputs of the right shapes: info(model, args, kwargs)"
        ) from error
    return summarise(type(module).__name__, accounting, batches)


def load_meta(folder: Path) -> nn.Module:
    """The model that a folder's `config.json` describes, on the meta device, in the dtype it names.

    Raises:
        SparsecError: there is no such file, transformers is missing or does not know the architecture.
    """
    if not (folder / "config.json").is_file():
        raise SparsecError(f"{folder} holds no config.json\n  hint: give the folder of a model, or an artifact")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SparsecError("reading a config.json needs transformers\n  hint: pip install 'sparsec[hf]'") from error
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    names = getattr(config, "architectures", None) or []
    found = next((c for name in names if (c := getattr(transformers, name, None)) is not None), None)
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        if found is not None:
            return found._from_config(config, dtype=dtype).eval()
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Token ids for a language model, by the signature of its `forward`. Raises: SparsecError."""
    import torch

    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        raise SparsecError(
            f"{type(model).__name__}.forward takes no input_ids, so its inputs cannot be made up\n"
            "  hint: give example inputs: info(model, args, kwargs)"
        )
    ids = torch.zeros(1, _TOKENS, dtype=torch.long)
    if "decoder_input_ids" not in names:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": mask}


def summarise(name: str, accounting: Accounting, batches: Sequence[int] = BATCHES) -> ModelInfo:
    """Add up what the accounting found."""
    record = accounting.record
    weights = _Weights(accounting)
    routed = [weights.routed(layout) for layout in weights.layouts]
    layers, moe_layers = _layers(accounting)
    idle = sum(r.parameters - r.parameters * r.k // r.experts for r in routed)
    notes = [f"{path} was not traced: {reason}" for path, reason in record.stopped.items()]
    return ModelInfo(
        name=name,
        layers=layers,
        moe_layers=moe_layers,
        routed=routed,
        total=weights.total,
        active=weights.total - idle,
        active_without_embedding=weights.total - idle - weights.tables,
        weight_bytes=weights.bytes,
        traffic=[weights.traffic(batch) for batch in batches],
        kv_bytes_per_token=_kv_bytes(accounting, notes),
        dtypes=weights.dtypes,
        unreached=weights.unreached,
        notes=notes,
    )


class _Weights:
    """Sums over parameters; every member of a family counts like the one that was traced."""

    def __init__(self, accounting: Accounting) -> None:
        self.accounting = accounting
        self.total = self.bytes = self.tables = self.table_bytes = self.table_row = self.unreached = 0
        self.dtypes, self.dense_bytes = dict[str, int](), 0
        self.layouts = dict[tuple[int, int], dict[str, int]]()  # (E, k) -> block -> parameters of its banks
        self.bank_bytes = dict[tuple[int, int], int]()
        self.others = dict[str, int]()  # canonical path -> parameters at work for every token, all layers
        record = accounting.record
        stopped = tuple(record.stopped)
        for path, value in record.parameters.items():
            canonical, count = record.canonical(path), value.numel or 0
            size, dtype = count * value.dtype.itemsize, str(value.dtype).removeprefix("torch.")
            self.total, self.bytes = self.total + count, self.bytes + size
            self.dtypes[dtype] = self.dtypes.get(dtype, 0) + count
            bank = accounting.bank_of(canonical)
            if bank is not None:
                key = bank.experts, bank.k
                blocks = self.layouts.setdefault(key, {})
                blocks[bank.block] = blocks.get(bank.block, 0) + count
                self.bank_bytes[key] = self.bank_bytes.get(key, 0) + size
            elif canonical in accounting.tables:
                self.tables, self.table_bytes = self.tables + count, self.table_bytes + size
                self.table_row += size // (value.shape[0] or 1)
            else:
                self.dense_bytes += size
                self.others[canonical] = self.others.get(canonical, 0) + count
                if canonical not in accounting.used and not canonical.startswith(stopped):
                    self.unreached += count

    def routed(self, layout: tuple[int, int]) -> Routed:
        experts, k = layout
        blocks = self.layouts[layout]
        first = next(iter(blocks))
        layers = _moe_layers(self.accounting, blocks)
        parameters = sum(blocks.values())
        copies = _copies(self.accounting, first)
        one = blocks[first] // (experts * copies)
        shared = self._shared(first, copies)
        return Routed(
            layers,
            experts,
            k,
            parameters,
            one,
            shared,
            None if shared is None else round(shared / one, 3),
            first,
        )

    def _shared(self, block: str, copies: int) -> int | None:
        """Parameters of the block that are neither in a bank nor in the router; None if it is more than the experts."""
        accounting = self.accounting
        around = accounting.record.around(block)
        wide = not block or (around and block == around[-1].members[0])
        if wide or any(a.scope == block or a.scope.startswith(block + ".") for a in accounting.attentions):
            return None
        router = accounting.router_of(block)
        inside = {path: count for path, count in self.others.items() if path.startswith(block + ".")}
        return sum(count for path, count in inside.items() if path not in router) // copies

    def traffic(self, batch: int) -> Traffic:
        """A dense weight is read once, a looked-up table by rows, an expert if any of the tokens uses it."""
        hit = [expected_experts(experts, k, batch) for experts, k in self.layouts]
        banks = sum(self.bank_bytes[layout] * n / layout[0] for layout, n in zip(self.layouts, hit, strict=True))
        return Traffic(batch, self.dense_bytes + batch * self.table_row + banks, hit)


def expected_experts(experts: int, k: int, batch: int) -> float:
    """Distinct experts hit by `batch` tokens that choose k of E evenly: E(1 - (1 - k/E)^B)."""
    return experts * (1 - (1 - k / experts) ** batch)


def _copies(accounting: Accounting, path: str) -> int:
    """How many times the module at `path` is there, counting the families around it."""
    copies = 1
    for family in accounting.record.around(path):
        copies *= len(family)
    return copies


def _moe_layers(accounting: Accounting, blocks: Mapping[str, int] | Sequence[str]) -> int:
    """Layers that hold the blocks: members of the outermost container, or the blocks themselves."""
    counts = dict[str, int]()
    for block in blocks:
        around = accounting.record.around(block)
        counts[around[0].members[0] if around else block] = len(around[0]) if around else 1
    return sum(counts.values())


def _layers(accounting: Accounting) -> tuple[int, int]:
    """Members of outermost containers whose results feed one another, and how many of them hold experts."""
    record = accounting.record
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
    places = {a.scope for a in accounting.attentions} | {bank.block for bank in accounting.banks.values()}
    working = {family.container for place in places for family in record.around(place)[:1]}
    layers = sum(len(family) for family in called if family.container in chained | working)
    return layers, _moe_layers(accounting, list({bank.block: None for bank in accounting.banks.values()}))


def _kv_bytes(accounting: Accounting, notes: list[str]) -> int | None:
    """Bytes that one more token adds to the keys and values of all layers."""
    kept = [a for a in accounting.attentions if a.returned]
    if not kept and accounting.attentions:
        kept = accounting.attentions
        notes.append("the model returns no cache: KV bytes are those of all keys and values of its attentions")
    total = 0
    for attention in kept:
        for value in (attention.keys, attention.values):
            size, rest = divmod((value.numel or 0) * value.dtype.itemsize, accounting.record.tokens)
            if rest or not size:
                return None
            total += size * _copies(accounting, attention.scope)
    return total or None


def render(model: ModelInfo) -> RenderableType:
    """The figures as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table

    facts = Table(box=None, show_header=False, title=model.name, title_justify="left", title_style="bold")
    facts.add_column(style="dim")
    facts.add_column()
    dense = "" if model.routed else " (nothing sparse found)"
    facts.add_row("layers", f"{model.layers}, {model.moe_layers} with experts{dense}")
    for routed in model.routed:
        facts.add_row("experts", _describe(routed))
    facts.add_row("parameters", f"{_count(model.total)} total, {_count(model.active)} active per token")
    facts.add_row("", f"{_count(model.active_without_embedding)} active without the input embedding")
    if model.unreached:
        facts.add_row("", f"{_count(model.unreached)} not reached by the traced inputs, counted as active")
    dtypes = ", ".join(f"{_count(n)} {dtype}" for dtype, n in model.dtypes.items())
    facts.add_row("weights", f"{_bytes(model.weight_bytes)} ({dtypes})")
    kv = "not derived" if model.kv_bytes_per_token is None else f"{_bytes(model.kv_bytes_per_token)} per token"
    facts.add_row("KV cache", kv)

    traffic = Table(title="weights read per step", title_justify="left", title_style="bold", box=None)
    for column in ("batch", "bytes", "bytes/token", *(f"of {r.experts} experts" for r in model.routed)):
        traffic.add_column(column, justify="right")
    for row in model.traffic:
        hit = (f"{n:.1f}" for n in row.experts_hit)
        traffic.add_row(str(row.batch), _bytes(row.weight_bytes), _bytes(row.weight_bytes / row.batch), *hit)

    notes = [f"note: {note}" for note in model.notes]
    if not model.routed:
        notes.append(f"nothing sparse found; looked for {LOOKED_FOR}")
    return Group(facts, "", traffic, *(["", *notes] if notes else []))


def _describe(routed: Routed) -> str:
    shared = "shared part not derived"
    if routed.shared_experts is not None and routed.shared_parameters is not None:
        shared = "none shared"
        if routed.shared_parameters:
            shared = f"shared part of {_count(routed.shared_parameters)} ({routed.shared_experts:g} experts)"
    return (
        f"{routed.k} of {routed.experts} in {routed.layers} layers, {_count(routed.expert_parameters)} each, "
        f"{_count(routed.parameters)} in all; {shared}"
    )


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}" if number < 1e12 else f"{number / size:.0f} {unit}"
    return f"{number:g}"


def _bytes(number: float) -> str:
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if number >= 1024**power:
            return f"{number / 1024**power:.4g} {unit}"
    return f"{number:.0f} B"


def to_json(model: ModelInfo) -> str:
    """The figures as JSON, for `--json`."""
    from dataclasses import asdict

    return json.dumps(asdict(model), indent=2)
