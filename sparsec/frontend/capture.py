"""A PyTorch model as a module in phase `capture`, by `torch.export`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils._pytree import TreeSpec, tree_map

from sparsec.diagnostics import Diagnostic
from sparsec.frontend import structure
from sparsec.frontend.failures import explain
from sparsec.frontend.importer import import_program
from sparsec.frontend.pt2 import load_program
from sparsec.ir.core import Module

_EXPERTS = "_experts_implementation_internal"


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
    kwargs = dict(kwargs or {})
    if isinstance(model, str | os.PathLike):
        return _import(load_program(Path(model)))
    if isinstance(model, ExportedProgram):
        return _import(model)
    with for_capture(model, no_cache=not use_cache and "use_cache" not in kwargs), torch.no_grad():
        device = _device(model)
        args, kwargs = tree_map(lambda leaf: _on(leaf, device), (tuple(args), kwargs))
        program, warnings = _export(model, args, kwargs, dynamic)
    return _import(program, warnings)


def _import(program: ExportedProgram, warnings: tuple[Diagnostic, ...] = ()) -> Captured:
    with torch.no_grad():
        program = program.run_decompositions({})
    module, weights = import_program(program)
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
    return Captured(module, weights, inputs, structure.tree(out_spec, returned), in_spec, out_spec, warnings)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool | Any
) -> tuple[ExportedProgram, tuple[Diagnostic, ...]]:
    shapes = dynamic
    if isinstance(dynamic, bool):
        shapes = None
        if dynamic:
            args, kwargs = tree_map(_not_one, (args, kwargs))
            shapes = _open_shapes(model, args, kwargs)
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise explain(error, model) from error
    return program, tuple(_fixed(program)) if dynamic is True else ()


def _open_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dimensions that torch.export may leave open, in the structure of the arguments."""
    return tree_map(_open_dims, _by_name(model, args, kwargs))


def _open_dims(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return None
    dims = leaf.dim() if leaf.dtype.is_floating_point else min(leaf.dim(), 2)
    return {i: Dim.AUTO for i in range(dims)}


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments in the order that torch.export wants for `dynamic_shapes`: by name of the forward's parameters."""
    if not kwargs:
        return args
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def _not_one(leaf: Any) -> Any:
    """An example of a batch or sequence of two where it was one, a size that tracing takes for a constant."""
    if not isinstance(leaf, torch.Tensor) or leaf.dtype.is_floating_point or leaf.dtype.is_complex:
        return leaf
    for dim in range(min(leaf.dim(), 2)):
        if leaf.shape[dim] == 1:
            leaf = torch.cat([leaf, leaf], dim)
    return leaf


def _fixed(program: ExportedProgram) -> Iterator[Diagnostic]:
    """The batch and sequence dimensions of integer inputs that the model fixed while it was traced."""
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if not isinstance(value, torch.Tensor) or node.name not in program.graph_signature.user_inputs:
            continue
        if value.dtype.is_floating_point:
            continue
        for dim, size in enumerate(value.shape[:2]):
            if isinstance(size, int):
                yield Diagnostic(
                    f"dimension {dim} of '{node.name}' is fixed to {size}: the model's code depends on this size",
                    severity="warning",
                    hint="TORCH_LOGS=+dynamic shows where",
                )


@contextmanager
def _set(configs: Sequence[Any], key: str, value: Any) -> Iterator[None]:
    """Set an entry of transformers' configurations, where it exists, for a while."""
    before = [(config, config.__dict__[key]) for config in configs if key in config.__dict__]
    for config, _ in before:
        setattr(config, key, value)
    try:
        yield
    finally:
        for config, old in before:
            setattr(config, key, old)


@contextmanager
def for_capture(model: nn.Module, no_cache: bool = False) -> Iterator[None]:
    """Run transformers' banks of experts as `sparsec::experts`, and without a key/value cache, for a while."""
    configs = list({id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "__dict__")}.values())
    with ExitStack() as stack:
        if any(_EXPERTS in config.__dict__ for config in configs):
            from sparsec.frontend import experts_hook

            experts_hook.register()
            stack.enter_context(_set(configs, _EXPERTS, experts_hook.NAME))
        if no_cache:
            stack.enter_context(_set(configs, "use_cache", False))
        yield


def _device(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else None


def _on(leaf: Any, device: torch.device | None) -> Any:
    return leaf.to(device) if isinstance(leaf, torch.Tensor) and device is not None else leaf
