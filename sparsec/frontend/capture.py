"""A PyTorch model as a module in phase `capture`, by `torch.export`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils._pytree import TreeSpec, tree_map

from sparsec.diagnostics import CompileError, Diagnostic
from sparsec.frontend import repeated, sizes, structure
from sparsec.frontend.adapters import registry as adapters
from sparsec.frontend.failures import explain, quiet
from sparsec.frontend.importer import import_program
from sparsec.frontend.pt2 import load_program
from sparsec.ir.core import Func, Module

EXPERTS = "_experts_implementation_internal"


@dataclass(frozen=True)
class Captured:
    """What the front end hands to the compiler.

    Args:
        module: the model, in phase `capture`.
        weights: the tensor of every parameter, buffer and constant that the module reads, by its `source`; it may lie
            on the meta device.
        inputs_json, structure_json: how arguments and results are put together (`sparsec.runtime.structure`).
        in_spec, out_spec: the same as torch's tree specs.
        warnings: what was captured differently from what was asked, such as a dimension that the model fixes.
    """

    module: Module
    weights: dict[str, torch.Tensor]
    inputs_json: Any
    structure_json: Any
    in_spec: TreeSpec
    out_spec: TreeSpec
    warnings: tuple[Diagnostic, ...] = ()


def capture(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool | Any = True,
    use_cache: bool = False,
) -> Captured:
    """Capture `model` as called by `model(*args, **kwargs)`.

    Args:
        model: a module, whose parameters may be on the meta device; an exported program; or the path of a `.pt2`
            file, which must be trusted (`sparsec.frontend.pt2`).
        dynamic: True leaves every dimension open that the model leaves open (for integer inputs such as token ids
            the first two, batch and sequence); False fixes all; anything else is a `dynamic_shapes` for torch.export.
        use_cache: whether a transformers model returns its key/value cache (an argument `use_cache` in `kwargs` decides
            by itself).

    Raises: CompileError with the user's line, for a model that torch.export or the IR cannot hold.
    """
    if isinstance(model, str | os.PathLike):
        model = load_program(Path(model))
    if isinstance(model, ExportedProgram):
        with quiet(), torch.no_grad():
            return _import(model.run_decompositions({}))
    if not isinstance(args, tuple | list):
        raise CompileError(
            f"the example inputs are a {type(args).__name__}, not a tuple of arguments",
            hint="a single argument x is given as (x,)",
        )
    with for_capture(model, no_cache=not use_cache and "use_cache" not in (kwargs or {})), torch.no_grad():
        device = _device(model)
        call: Any = tree_map(lambda leaf: _on(leaf, device), (tuple(args), dict(kwargs or {})))
        if dynamic is True:
            call = tree_map(_not_one, call)
        try:
            with quiet(), sizes.noting_places() as places:
                program, blocks = _program(model, call[0], call[1], dynamic)
        except Exception as error:
            raise explain(error, model) from error
    captured = _import(program, blocks)
    warnings = sizes.checked(program, captured.module, places, asked=dynamic) if dynamic is not False else []
    warnings += adapters.warnings(model)
    if model.training:
        warnings.append(Diagnostic("the model is in training mode", severity="warning", hint="call model.eval() first"))
    return replace(captured, warnings=tuple(warnings))


def _import(program: ExportedProgram, blocks: repeated.Blocks | None = None) -> Captured:
    """`program`, which must be functional, in the IR."""
    module, weights = import_program(program, blocks)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None and out_spec is not None
    signature = program.graph_signature
    given = [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else structure.LEAF
        for spec in signature.input_specs
        if spec.kind.name == "USER_INPUT"
    ]
    returned = [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else structure.LEAF
        for spec in signature.output_specs
        if spec.kind.name == "USER_OUTPUT"
    ]
    args_json, kwargs_json = structure.tree(in_spec, given)["items"]
    inputs = {"args": args_json, "kwargs": kwargs_json}
    return Captured(module, weights, inputs, structure.tree(out_spec, returned), in_spec, out_spec)


def _program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool | Any
) -> tuple[ExportedProgram, repeated.Blocks | None]:
    """The functional program of a model, in which each block that it repeats is exported once, if that can be."""
    with repeated.blocks(model, args, kwargs, _export_block) as blocks:
        try:
            return _export(model, args, kwargs, dynamic).run_decompositions({}), blocks
        except Exception:
            if not blocks:
                raise
    return _export(model, args, kwargs, dynamic).run_decompositions({}), None


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool | Any) -> ExportedProgram:
    shapes: Any = None if dynamic is False else dynamic
    if dynamic is True:
        # In the structure that torch.export wants: by name of the forward's parameters.
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        shapes = tree_map(_open_dims, dict(bound.arguments))
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _export_block(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ExportedProgram, Func, dict[str, torch.Tensor]]:
    """A block of a model on its own, with open sizes. Raises: repeated.Unrepeatable where its code ties them."""
    with quiet():
        program = _export(module, args, kwargs, True).run_decompositions({})
    if sizes.tied(program):
        raise repeated.Unrepeatable("the block's code takes sizes for granted")
    imported, tensors = import_program(program)
    return program, imported.main, tensors


def _open_dims(leaf: Any) -> Any:
    """Dimensions of an argument that torch.export may leave open."""
    if not isinstance(leaf, torch.Tensor):
        return None
    dims = leaf.dim() if leaf.dtype.is_floating_point else min(leaf.dim(), 2)
    return {i: Dim.AUTO for i in range(dims)}


def _not_one(leaf: Any) -> Any:
    """An example of a batch or sequence of two where it was one, a size that tracing takes for a constant."""
    if not isinstance(leaf, torch.Tensor) or leaf.dtype.is_floating_point or leaf.dtype.is_complex:
        return leaf
    for dim in range(min(leaf.dim(), 2)):
        if leaf.shape[dim] == 1:
            leaf = torch.cat([leaf, leaf], dim)
    return leaf


@contextmanager
def _set(configs: Sequence[Any], key: str, value: Any) -> Generator[None, None, None]:
    """Set an entry of transformers' configurations, where it exists, for a while."""
    before = [(config, config.__dict__[key]) for config in configs if key in config.__dict__]
    for config, _ in before:
        setattr(config, key, value)
    try:
        yield
    finally:
        for config, old in before:
            setattr(config, key, old)


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations that modules of `model` hold, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, "__dict__")}.values())


@contextmanager
def for_capture(model: nn.Module, no_cache: bool = False) -> Generator[None, None, None]:
    """Run transformers' banks of experts as `sparsec::experts`, modules that have adapters by these, and without a
    key/value cache, for a while."""
    configs = configs_of(model)
    with ExitStack() as stack:
        if any(EXPERTS in config.__dict__ for config in configs):
            from sparsec.frontend import experts_hook

            experts_hook.register()
            stack.enter_context(_set(configs, EXPERTS, experts_hook.NAME))
        stack.enter_context(adapters.adapted(model))
        if no_cache:
            stack.enter_context(_set(configs, "use_cache", False))
        yield


def _device(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else None


def _on(leaf: Any, device: torch.device | None) -> Any:
    return leaf.to(device) if isinstance(leaf, torch.Tensor) and device is not None else leaf
