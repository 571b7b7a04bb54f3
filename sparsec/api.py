"""The Python way in: compile a model, run it, save it, load it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from sparsec import pipeline
from sparsec.codegen.emit import Edit, Emitted, as_generated, emit
from sparsec.config import Config
from sparsec.devices import ALONE, Devices
from sparsec.diagnostics import Diagnostic, Remark, SparsecError
from sparsec.frontend.capture import Captured, capture
from sparsec.inspect.colour import colour
from sparsec.inspect.cost_text import print_costs
from sparsec.inspect.costs import roof
from sparsec.inspect.dump import Dump
from sparsec.inspect.override import Override
from sparsec.inspect.unified import diff
from sparsec.ir.core import Attr, Module
from sparsec.ir.interp import DerivedWeights
from sparsec.ir.printer import print_module
from sparsec.runtime import structure
from sparsec.runtime.artifact import load as load_program
from sparsec.runtime.exchanges import own_rank
from sparsec.runtime.executor import Program
from sparsec.targets import Target

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from sparsec.codegen.artifact import Progress
    from sparsec.inspect.accounting import ModelInfo
    from sparsec.inspect.quantised import LayerError
    from sparsec.runtime.distributed import World


class IRText(str):
    """The text of a module at one phase, or of a diff; `show()` prints it in colour, and so do notebooks."""

    __slots__ = ()

    def show(self) -> None:
        """Print the text, in colour on a terminal."""
        from rich.console import Console

        Console(highlight=False).print(colour(self), soft_wrap=True)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(record=True, file=io.StringIO(), width=10_000, highlight=False)
        console.print(colour(self), soft_wrap=True)
        return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.3'>{code}</pre>")


class CompiledModel:
    """A compiled model: callable like the model it was made from, returning the same structure.

    Attributes:
        captured: what the front end took in (module at phase `capture`, weights, structure of arguments and results).
        result: what the pipeline did: passes with their times, remarks, the module after each phase.
        target: what it is compiled for.
        warnings: what was captured differently from what was asked.
        devices: how many devices run it together, and how experts are placed on them.
    """

    def __init__(
        self,
        captured: Captured,
        result: pipeline.Result,
        target: Target,
        edit: Edit = as_generated,
        devices: Devices = ALONE,
    ) -> None:
        self.captured, self.result, self.target, self._edit, self.devices = captured, result, target, edit, devices

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            InputError: an argument has the wrong structure, dtype, rank, size or device.
            SparsecError: the target cannot run on this machine.
        """
        program = self.program
        outputs = program(*structure.take_apart(program.plan.inputs, args, kwargs))
        leaves = list(_leaves(program.plan.structure, outputs))
        return tree_unflatten(leaves, self.captured.out_spec)

    @cached_property
    def emitted(self) -> Emitted:
        """The plan and the files of its kernels, made when first asked for."""
        return emit_module(self.result.module, str(self.target), self._edit)

    @property
    def generation(self) -> dict[str, Any] | None:
        """How text is generated with it (`sparsec.runtime.generate`); None for a model that was compiled otherwise."""
        return plain(self.result.module.attrs.get("generation"))  # type: ignore[no-any-return]

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The tokens that greedy search appends to `prompt`, for a model made by `compile_language_model`.

        Raises: SparsecError for another model; InputError for a prompt that is too long.
        """
        from sparsec.runtime.generate import Generator

        if self.generation is None:
            raise SparsecError("only a model made by sparsec.compile_language_model generates text")
        generator = Generator(self.program, self.generation)
        return [token.id for token in generator.stream(prompt, max_new_tokens)]

    @cached_property
    def program(self) -> Program:
        """The plan with its weights, loaded into this process when first asked for; of several devices, this rank's.

        Raises: SparsecError; ArtifactError where there are not as many processes as devices.
        """
        self.target.require()
        weights = self.weights_of(own_rank(self.devices.ranks) if self.devices.ranks > 1 else 0)
        return Program(self.emitted.plan, weights, self.target.device, files=self.emitted.files)

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """What the plan reads, by source: the model's own tensors, and those derived from them, made when asked for.

        Of a model for several devices, what the first of them reads.
        """
        return self.weights_of(0)

    def weights_of(self, rank: int) -> Mapping[str, torch.Tensor]:
        """As `weights`, for one of several devices."""
        return DerivedWeights(self.result.module, self._given, rank)

    @cached_property
    def _given(self) -> Mapping[str, torch.Tensor]:
        """The model's own tensors, and the tables that say where its experts live."""
        return {**self.captured.weights, **self.devices.tables(self.result.module)}

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What passes and code generation did and declined, with the user's lines."""
        return (*self.result.remarks, *self.emitted.remarks)

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        return self.captured.warnings

    def ir(self, phase: str = "lower") -> IRText:
        """The text of the module after `phase` (capture, raise, place, fuse, schedule, lower).

        Raises: SparsecError for a phase that there is not.
        """
        return IRText(self.result.text(phase))

    def diff(self, phase: str) -> IRText:
        """What `phase` changed, as a unified diff of the texts before and after it.

        Raises: SparsecError for a phase that there is not.
        """
        before = self.result.before(phase)
        return IRText(diff(self.result.text(before), self.result.text(phase), before, phase))

    def costs(self, chip: str, phase: str = "lower", **sizes: int) -> IRText:
        """The text after `phase` with bytes, flops and the roofline's time on a chip beside every op.

        Args:
            chip: the name of a GPU target (`cuda:sm_90`), or limits as `37GB/s,6.7TFLOP/s`.
            sizes: values of sizes that are known only at run time: `s0=1, s1=512`; others are taken as 128.

        Raises: SparsecError for a chip, a phase or a size that there is not.
        """
        return IRText(print_costs(self.result.ir(phase), sizes, roof(chip)))

    def info(self) -> ModelInfo:
        """Layers, experts, total and active parameters, bytes per token; read from the captured ops."""
        from sparsec.inspect.info import info

        return info(self.captured)

    def weight_errors(self) -> list[LayerError]:
        """How far quantised experts are from the model's, layer by layer: ||y' - y|| / ||y|| on random inputs.

        Empty where no weights are quantised, or the model has none (on the meta device). Of several devices, the
        experts of the first.
        """
        from sparsec.inspect.quantised import layer_errors

        return layer_errors(self.result.ir("schedule"), self._given)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Path | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Write the artifact folder `path`, whole or not at all; an artifact that is there already is replaced.

        Args:
            tokenizer: a `tokenizer.json` to take along, for a model that generates text.
            progress: called with the bytes written so far and in all.

        Raises:
            SparsecError: the path cannot be written, or holds something that is no artifact.
        """
        from sparsec.codegen.artifact import write_artifact

        return write_artifact(
            Path(path),
            self.emitted,
            self.weights,
            target=str(self.target),
            text=print_module(self.result.module),
            stored=str(self.result.module.attrs.get("weights", "model")),
            generation=self.generation,
            tokenizer=tokenizer,
            of_rank=self.weights_of,
            placement=self.devices.raw,
            progress=progress,
        )


class LoadedModel:
    """An artifact, loaded: callable like the model; records come back with their fields as attributes."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Raises: InputError, as of `CompiledModel`."""
        return self.program.call(args, kwargs)


def compile(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool | Any = True,
    target: str | None = None,
    weights: str | None = None,
    activations: str | None = None,
    invariant: bool | None = None,
    devices: int | str | None = None,
    plan: str | os.PathLike[str] | None = None,
    dispatch: str | None = None,
    policy: str | None = None,
    chunks: int | None = None,
    payload: str | None = None,
    dump: str | os.PathLike[str] | None = None,
    instruments: Sequence[pipeline.Instrument] = (),
) -> CompiledModel:
    """Compile a model as called by `model(*args, **kwargs)`.

    Args:
        model: a module, an exported program, or the path of a `.pt2` file that you trust.
        args, kwargs: example inputs, as for `torch.export.export`.
        dynamic: True leaves batch, sequence and every other size open that the model leaves open; False fixes all;
            anything else is `dynamic_shapes` as of torch.export.
        target: `cpu` (default), `cuda:sm_80`, `cuda:sm_90`, `cuda:sm_100`, `hip:gfx942`,
            `hip:gfx950`; see `sparsec targets`.
        weights: how experts' weights are stored: `model` (default, as they are); on a CPU `int8` (a scale for each
            column) or `int4` (a scale for each 128 values); on a GPU `fp8` (a scale for each block of 128 x 128) or
            `mxfp4` (a power of two for each 32 values); see `CompiledModel.weight_errors`.
        activations: what quantised weights are multiplied by: `model` (default, rows as they are); for `int8` and
            `int4` weights `int8` (rows that are rounded as they come, by a scale for each row of x and each 128 of an
            expert's inner values); for `fp8` weights `fp8` (rounded so, by a power of two for each 128 of either).
        invariant: on a GPU, give a row the same bits in whatever batch it comes, whatever that costs. Without it that
            is so where it costs less than 3 % by the cost model; see `sparsec schedule`.
        devices: how many devices run the model together (8, or "2x4": two nodes of four), each with some of the
            experts; those of the plan by default.
        plan: a placement of `sparsec plan`; experts are spread evenly without one.
        dispatch: what a token is sent once for: `none` (each pick), `rank`, `node`, or `auto` (by the cost model).
        policy: which replica of an expert gets a token: `static` (the plan's shares), `local` or `batch`.
        chunks: parts that the tokens of a layer travel in.
        payload: how rows travel to experts: `model` (as they are), `bf16` or `fp8`.
        dump: a folder for numbered IR texts, diffs, remarks, kernels and a page to read them (`index.html`).
        instruments: further watchers of the pipeline.

    Raises:
        CompileError: the model cannot be captured or compiled; says where, in the user's lines.
    """
    captured = capture(model, args, kwargs, dynamic=dynamic)
    given: dict[str, Any] = {"weights": weights, "activations": activations, "invariant": invariant}
    given |= {"devices": devices, "plan": plan, "dispatch": dispatch, "policy": policy, "chunks": chunks}
    given["payload"] = payload
    return compile_captured(captured, target, **given, dump=dump, instruments=instruments)


def compile_captured(
    captured: Captured,
    target: str | None = None,
    *,
    weights: str | None = None,
    activations: str | None = None,
    invariant: bool | None = None,
    devices: int | str | None = None,
    plan: str | os.PathLike[str] | None = None,
    dispatch: str | None = None,
    policy: str | None = None,
    chunks: int | None = None,
    payload: str | None = None,
    dump: str | os.PathLike[str] | None = None,
    name: str = "model",
    instruments: Sequence[pipeline.Instrument] = (),
) -> CompiledModel:
    """Compile what `sparsec.capture` returned. Raises: CompileError."""
    given: dict[str, Any] = {"weights": weights, "activations": activations, "invariant": invariant}
    given |= {"devices": devices, "plan": Path(plan) if plan else None, "dispatch": dispatch, "policy": policy}
    given |= {"chunks": chunks, "payload": payload}
    config = Config.read(target=target, **given, dump=Path(dump) if dump else None)
    parsed, placed = Target.parse(config.target), Devices.of(config)
    module = stored_as(config, with_structure(captured).module)
    placed.mark(module, config)
    override = Override(config.override_dir) if config.override_dir else None
    dumped = Dump(config.dump, name, kernels=True) if config.dump else None
    watching = [*instruments, *(instrument for instrument in (override, dumped) if instrument)]
    result = pipeline.run(module, target=config.target, instruments=watching, verify=config.verify)
    placed.tables(result.module)  # says what does not fit before kernels are made
    compiled = CompiledModel(captured, result, parsed, override.source if override else as_generated, placed)
    if dumped:
        dumped.emitted(compiled.emitted)
    return compiled


def compile_language_model(
    model: Any,
    *,
    max_length: int | None = None,
    target: str | None = None,
    weights: str | None = None,
    activations: str | None = None,
    invariant: bool | None = None,
    devices: int | str | None = None,
    plan: str | os.PathLike[str] | None = None,
    dispatch: str | None = None,
    policy: str | None = None,
    chunks: int | None = None,
    payload: str | None = None,
    dump: str | os.PathLike[str] | None = None,
    name: str = "model",
    instruments: Sequence[pipeline.Instrument] = (),
) -> CompiledModel:
    """Compile a causal language model of transformers for generating text, its key/value cache inside.

    The program takes `input_ids` [1, s] and the position `start` [1] of the first of them, and returns the logits of
    the last. A model that keeps other states than keys and values is compiled without a cache: it then runs the whole
    text for every token, which `generation["kind"]` and a warning say.

    Args:
        max_length: positions that the cache has; by default what the model was made for, at most 4096.
        weights, activations, invariant, devices, plan, dispatch, policy, chunks, payload: as of `compile`.

    Raises: CompileError.
    """
    captured = capture_language_model(model, max_length)
    given: dict[str, Any] = {"weights": weights, "activations": activations, "invariant": invariant}
    given |= {"devices": devices, "plan": plan, "dispatch": dispatch, "policy": policy, "chunks": chunks}
    given["payload"] = payload
    return compile_captured(captured, target, **given, dump=dump, name=name, instruments=instruments)


def capture_language_model(model: Any, max_length: int | None = None) -> Captured:
    """Capture a causal language model as `compile_language_model` does. Raises: CompileError."""
    from sparsec.frontend.causal_lm import CausalLM, UnsupportedCache

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096
    length = max_length or min(positions, 4096)
    try:
        captured = CausalLM(model, length).capture()
        kind, inputs = "static-cache", ["input_ids", "start"]
    except UnsupportedCache as error:
        warned = tuple(replace(diagnostic, severity="warning") for diagnostic in error.diagnostics)
        captured = capture(model, (), {"input_ids": torch.zeros(1, 7, dtype=torch.int64)})
        captured = replace(captured, warnings=(*captured.warnings, *warned))
        kind, inputs = "recompute", ["input_ids"]
    eos = getattr(model.generation_config, "eos_token_id", None)
    captured.module.attrs["generation"] = {
        "kind": kind,
        "max_len": length,
        "batch": 1,
        "eos": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "inputs": tuple(inputs),
    }
    return with_structure(captured)


def with_structure(captured: Captured) -> Captured:
    """The same, its module carrying the structure of arguments and results, so that its text alone can be emitted."""
    attrs = captured.module.attrs
    attrs["inputs"], attrs["structure"] = frozen(captured.inputs_json), frozen(captured.structure_json)
    return captured


def stored_as(config: Config, module: Module) -> Module:
    """The module, saying how the weights of its experts are to be stored and multiplied (`pack-banks`)."""
    for name in ("weights", "activations", "invariant"):
        module.attrs.pop(name, None)
    module.attrs.update(config.of_banks)
    return module


def emit_module(module: Module, target: str, edit: Edit = as_generated) -> Emitted:
    """Plan and kernels of a lowered module, with the structure of arguments and results that it carries."""
    inputs, structure = plain(module.attrs.get("inputs")), plain(module.attrs.get("structure"))
    return emit(module, target, inputs, structure, edit=edit)


def frozen(json: Any) -> Attr:
    """JSON as an attribute: lists become tuples."""
    if isinstance(json, list):
        return tuple(frozen(item) for item in json)
    if isinstance(json, dict):
        return {key: frozen(value) for key, value in json.items()}
    return json


def plain(attr: Any) -> Any:
    """An attribute as JSON."""
    if isinstance(attr, tuple):
        return [plain(item) for item in attr]
    if isinstance(attr, dict):
        return {key: plain(value) for key, value in attr.items()}
    return attr


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    trust_code: bool = False,
    huge_pages: bool = False,
    world: World | None = None,
) -> LoadedModel:
    """Load an artifact. Every file's hash is checked; nothing is compiled.

    Of a model for several devices, each process loads what its rank needs: see `docs/distributed.md`.

    Args:
        device: where to run; the default follows from the artifact's target.
        trust_code: run its native CPU kernels even if they were compiled by somebody else or on another machine.
            Without it those are run by PyTorch, more slowly.
        huge_pages: read large weights into huge pages on a CPU instead of leaving them in the mapped files: loading
            takes as long as reading them, and decoding is then up to 15 % faster.
        world: the ranks that run a model for several devices (`sparsec.runtime.distributed.World`); by default all
            processes that torch.distributed knows.

    Raises:
        ArtifactError: says in one sentence why the artifact cannot be run here.
    """
    given: dict[str, Any] = {"trust_code": trust_code, "huge_pages": huge_pages, "world": world}
    return LoadedModel(load_program(Path(path), device=device, **given))


def _leaves(tree: Any, outputs: Sequence[Any]) -> Any:
    """The leaves of a structure in torch's order: a tensor for each leaf, the value of each constant."""
    if tree["kind"] == "leaf":
        yield outputs[tree["index"]]
    elif tree["kind"] == "const":
        yield tree["value"]
    else:
        for item in tree["items"]:
            yield from _leaves(item, outputs)
