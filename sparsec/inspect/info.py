"""What a model costs per token: parameters in all and at work, bytes read, experts hit, cache. No weights needed.

The figures follow from operators (`sparsec.inspect.dataflow`) noted on shapes alone, so a model of any size takes
seconds.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.diagnostics import SparsecError
from sparsec.inspect.accounting import BATCHES, ModelInfo, Placed, Routed, Scheduled, summarise
from sparsec.ir.core import Module

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from sparsec.frontend.blocks import Progress
    from sparsec.frontend.capture import Captured

LOOKED_FOR = (
    "a top-k or arg-max whose indices reach a grouped GEMM, a gather from a parameter, a batched product over a "
    "parameter's leading axis, or modules built alike"
)
_TOKENS = 7  # a length that is unlikely to equal a number of experts


def info(
    model: nn.Module | Captured | Module | str | Path,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    progress: Progress | None = None,
) -> ModelInfo:
    """Account for a model.

    Args:
        model: a module, on the meta device or with weights; a folder with a `config.json`; an artifact; what the front
            end captured, or the IR of any phase.
        args, kwargs: example inputs; only shapes matter. Left out, token ids are made up where `forward` takes
            `input_ids`.
        batches: batch sizes to give the weight traffic for.
        progress: told the path of each block as it is traced.

    Raises:
        SparsecError: the folder holds no model, or inputs are needed and not given.
    """
    from sparsec.frontend.capture import Captured

    if isinstance(model, (str, Path)):
        path = Path(model)
        if (path / "manifest.json").is_file():
            found = _of_module(load_module(path), path.name, batches)
            notes = [*found.notes, *_runners(path)]
            return replace(found, notes=notes, scheduled=_scheduled(path), placed=_placed(path))
        model = load_meta(path)
    if isinstance(model, Captured):
        model = model.module
    if isinstance(model, Module):
        return _of_module(model, "main", batches)
    return _of_model(model, args, kwargs, batches, progress)


def _of_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    batches: Sequence[int],
    progress: Progress | None,
) -> ModelInfo:
    from sparsec.frontend.blocks import record
    from sparsec.inspect.dataflow import Dataflow

    name = type(model).__name__
    if not args and not kwargs:
        kwargs = example_inputs(model)
    try:
        seen = record(model, args, kwargs, progress=progress)
    except Exception as error:
        raise SparsecError(
            f"{name} cannot be run on shapes alone: {error}\n"
            "  hint: give example inputs of the right shapes: info(model, args, kwargs)"
        ) from error
    found = summarise(name, Dataflow(seen), batches)
    if getattr(getattr(model, "config", None), "quantization_config", None) is None:
        return found
    note = "the config names a quantisation of the stored weights: bytes here are of the dtypes shown"
    return replace(found, notes=[*found.notes, note])


def _of_module(module: Module, name: str, batches: Sequence[int]) -> ModelInfo:
    from sparsec.inspect.dataflow import Dataflow
    from sparsec.inspect.ir_record import record_module

    return summarise(name, Dataflow(record_module(module)), batches)


def load_module(artifact: Path) -> Module:
    """The IR of an artifact. Raises: ArtifactError, CompileError."""
    from sparsec.ir.parser import parse_module
    from sparsec.runtime.artifact import open_artifact

    text = open_artifact(artifact, verify=False).read("module.sparsec").decode()
    return parse_module(text, str(artifact / "module.sparsec"))


def _runners(artifact: Path) -> list[str]:
    """Who runs an artifact's kernels on this machine, a line for each. Raises: ArtifactError."""
    from sparsec.runtime.artifact import open_artifact

    opened = open_artifact(artifact, verify=False)
    choices, named = opened.paths(), dict[str, list[str]]()
    by = {"triton": f"Triton's code for {opened.target}", "onednn": "PyTorch's oneDNN", "torch": "PyTorch's operators"}
    for kernel in opened.plan.kernels.values():
        choice = choices.get(kernel.name)
        named.setdefault(str(choice) if choice else by.get(kernel.backend, kernel.backend), []).append(kernel.name)
    return [f"{', '.join(names)}: run by {runner}" for runner, names in named.items()]


def _scheduled(artifact: Path) -> list[Scheduled]:
    """The choices that the GPU kernels of an artifact hold. Raises: ArtifactError."""
    from sparsec.passes.variants import as_text
    from sparsec.runtime.artifact import open_artifact

    rows = list[Scheduled]()
    for kernel in open_artifact(artifact, verify=False).plan.kernels.values():
        for variant in kernel.variants:
            choice: Any = variant.config.get("choice") or {}
            if "predicted_us" in choice:
                measured = choice.get("measured_us")
                us, limiter = float(choice["predicted_us"]), str(choice["limiter"])
                rows.append(Scheduled(kernel.name, variant.up_to, as_text(choice), us, limiter, measured))
    return rows


def _placed(artifact: Path) -> Placed | None:
    """How an artifact is spread over devices. Raises: ArtifactError."""
    from sparsec.runtime.artifact import is_read_by, open_artifact

    opened = open_artifact(artifact, verify=False)
    spread = opened.plan.spread
    if spread is None:
        return None
    sizes = {n: int(entry["size"]) for n, entry in opened.manifest["files"].items() if n.startswith("weights/")}
    common = sum(size for name, size in sizes.items() if is_read_by(name, -1))
    each = (sum(size for name, size in sizes.items() if is_read_by(name, rank)) for rank in range(spread.ranks))
    return Placed(spread.ranks, spread.width, spread.slots, common, [size - common for size in each])


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


def render(model: ModelInfo) -> RenderableType:
    """The figures as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, title=Text(model.name), title_justify="left", title_style="bold")
    facts.add_column(style="dim")
    facts.add_column()
    dense = "" if model.routed else " (nothing sparse found)"
    facts.add_row("layers", f"{model.layers}, {model.moe_layers} with experts{dense}")
    for routed in model.routed:
        facts.add_row("experts", _describe(routed))
    facts.add_row("parameters", f"{_count(model.total)} total, {_count(model.active)} active per token")
    facts.add_row("", f"{_count(model.active_without_embedding)} active without the input embedding")
    if model.unreached:
        facts.add_row("", f"{_count(model.unreached)} not reached by the traced inputs: counted as active, not as read")
    dtypes = ", ".join(f"{_count(n)} {dtype}" for dtype, n in model.dtypes.items())
    facts.add_row("weights", f"{_bytes(model.weight_bytes)} ({dtypes})")
    kv = "not derived" if model.kv_bytes_per_token is None else f"{_bytes(model.kv_bytes_per_token)} per token"
    facts.add_row("KV cache", kv)
    if (placed := model.placed) is not None:
        nodes = f"{placed.devices // placed.width} nodes of {placed.width}"
        facts.add_row("devices", f"{placed.devices} ({nodes}), {placed.slots} experts of a layer on each")
        own = sorted({_bytes(size) for size in (min(placed.own_bytes), max(placed.own_bytes))})
        facts.add_row("", f"{_bytes(placed.common_bytes)} of weights on all, {' to '.join(own)} on each alone")

    traffic = Table(title="weights read per step", title_justify="left", title_style="bold", box=None)
    for column in ("batch", "bytes", "bytes/token", *(f"of {r.experts} experts" for r in model.routed)):
        traffic.add_column(column, justify="right")
    for row in model.traffic:
        hit = (f"{n:.1f}" for n in row.experts_hit)
        traffic.add_row(str(row.batch), _bytes(row.weight_bytes), _bytes(row.weight_bytes / row.batch), *hit)

    kernels = Table(title="kernels", title_justify="left", title_style="bold", box=None)
    for column in ("kernel", "up to", "variant", "predicted us", "limiter", "measured us"):
        kernels.add_column(column, justify="right" if column[-1] == "s" else "left")
    for one in model.scheduled:
        measured = "not measured" if one.measured_us is None else f"{one.measured_us:.1f}"
        ends = "any" if one.up_to is None else f"{one.up_to} tokens"
        kernels.add_row(one.kernel, ends, one.variant, f"{one.predicted_us:.1f}", one.limiter, measured)

    notes = [Text(f"note: {note}") for note in model.notes]
    if not model.routed:
        notes.append(Text(f"nothing sparse found; looked for {LOOKED_FOR}"))
    parts: list[RenderableType] = [facts, "", traffic]
    parts += ["", kernels] if model.scheduled else []
    return Group(*parts, *([""] if notes else []), *notes)


def _describe(routed: Routed) -> str:
    shared = "shared part not derived"
    if routed.shared_experts is not None and routed.shared_parameters is not None:
        shared = "none shared"
        if routed.shared_parameters:
            shared = f"shared part of {_count(routed.shared_parameters)}, {routed.shared_experts:g} x an expert"
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
    return json.dumps(asdict(model), indent=2)
