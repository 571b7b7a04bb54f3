"""The Python way in: compile a model, run it, save it, load it."""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from sparsec import pipeline
from sparsec.codegen.emit import Emitted, emit
from sparsec.diagnostics import Diagnostic, Remark, SparsecError
from sparsec.frontend.capture import Captured, capture
from sparsec.inspect.dump import Dump
from sparsec.ir.printer import print_module
from sparsec.runtime import structure
from sparsec.runtime.artifact import load as load_program
from sparsec.runtime.executor import Program
from sparsec.targets import Target

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from sparsec.codegen.artifact import Progress
    from sparsec.inspect.accounting import ModelInfo


class IRText(str):
    """The text of a module at one phase; `show()` prints it, and notebooks show it as text."""

    __slots__ = ()

    def show(self) -> None:
        """Print the text."""
        builtins.print(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


class CompiledModel:
    """A compiled model: callable like the model it was made from, returning the same structure.

    Attributes:
        captured: what the front end took in (module at phase `capture`, weights, structure of arguments and results).
        result: what the pipeline did: passes with their times, remarks, the module after each phase.
        target: what it is compiled for.
        warnings: what was captured differently from what was asked.
    """

    def __init__(self, captured: Captured, result: pipeline.Result, target: Target) -> None:
        self.captured, self.result, self.target = captured, result, target

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
        captured = self.captured
        return emit(self.result.module, str(self.target), captured.inputs_json, captured.structure_json)

    @cached_property
    def program(self) -> Program:
        """The plan with its weights, loaded into this process when first asked for."""
        self.target.require()
        return Program(self.emitted.plan, self.captured.weights, self.target.device, files=self.emitted.files)

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """What passes and code generation did and declined, with the user's lines."""
        return (*self.result.remarks, *self.emitted.remarks)

    @property
    def warnings(self) -> tuple[Diagnostic, ...]:
        return self.captured.warnings

    def ir(self, phase: str = "lower") -> IRText:
        """The text of the module after `phase` (capture, raise, fuse, place, schedule, lower).

        Raises: SparsecError for a phase that there is not.
        """
        return IRText(self.result.text(phase))

    def info(self) -> ModelInfo:
        """Layers, experts, total and active parameters, bytes per token; read from the captured ops."""
        from sparsec.inspect.info import info

        return info(self.captured)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        generation: Mapping[str, Any] | None = None,
        tokenizer: Path | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Write the artifact folder `path`, whole or not at all; an artifact that is there already is replaced.

        Args:
            generation: how text is generated with it (`sparsec.runtime.generate`), for language models.
            tokenizer: a `tokenizer.json` to take along.
            progress: called with the bytes written so far and in all.

        Raises:
            SparsecError: the path cannot be written, or holds something that is no artifact.
        """
        from sparsec.codegen.artifact import write_artifact

        return write_artifact(
            Path(path),
            self.emitted,
            self.captured.weights,
            target=str(self.target),
            text=print_module(self.result.module),
            generation=generation,
            tokenizer=tokenizer,
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
    target: str = "cpu",
    dump: str | os.PathLike[str] | None = None,
    instruments: Sequence[pipeline.Instrument] = (),
) -> CompiledModel:
    """Compile a model as called by `model(*args, **kwargs)`.

    Args:
        model: a module, an exported program, or the path of a `.pt2` file that you trust.
        args, kwargs: example inputs, as for `torch.export.export`.
        dynamic: True leaves batch, sequence and every other size open that the model leaves open; False fixes all;
            anything else is `dynamic_shapes` as of torch.export.
        target: `cpu`, `cuda:sm_80`, `cuda:sm_90`, `cuda:sm_100`, `hip:gfx942`; see `sparsec targets`.
        dump: a folder for numbered IR texts, diffs and remarks.
        instruments: further watchers of the pipeline.

    Raises:
        CompileError: the model cannot be captured or compiled; says where, in the user's lines.
    """
    return compile_captured(capture(model, args, kwargs, dynamic=dynamic), target, dump=dump, instruments=instruments)


def compile_captured(
    captured: Captured,
    target: str = "cpu",
    *,
    dump: str | os.PathLike[str] | None = None,
    name: str = "model",
    instruments: Sequence[pipeline.Instrument] = (),
) -> CompiledModel:
    """Compile what `sparsec.capture` returned. Raises: CompileError."""
    parsed = Target.parse(target)
    watching = list(instruments)
    if folder := dump or os.environ.get("SPARSEC_DUMP"):
        watching.append(Dump(Path(folder), name))
    result = pipeline.run(captured.module, target=target, to="lower", instruments=watching)
    return CompiledModel(captured, result, parsed)


def load(path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> LoadedModel:
    """Load an artifact. Every file's hash is checked; nothing is compiled.

    Raises:
        ArtifactError: says in one sentence why the artifact cannot be run here.
    """
    return LoadedModel(load_program(Path(path), device=device))


def _leaves(tree: Any, outputs: Sequence[Any]) -> Any:
    """The leaves of a structure in torch's order: a tensor for each leaf, the value of each constant."""
    if tree["kind"] == "leaf":
        yield outputs[tree["index"]]
    elif tree["kind"] == "const":
        yield tree["value"]
    else:
        for item in tree["items"]:
            yield from _leaves(item, outputs)


__all__ = ["CompiledModel", "IRText", "LoadedModel", "SparsecError", "compile", "compile_captured", "load"]
