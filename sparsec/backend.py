"""`torch.compile(model, backend="sparsec")`: fused expert kernels from sparsec, everything dense from Inductor."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext, detect_fake_mode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sparsec import pipeline
from sparsec.codegen.emit import as_generated, emit
from sparsec.codegen.fx import to_fx
from sparsec.config import Config
from sparsec.diagnostics import CompileError, Diagnostic, SparsecError
from sparsec.frontend.graph import import_graph
from sparsec.inspect.dump import Dump
from sparsec.inspect.override import Override
from sparsec.ir.core import Func, Module
from sparsec.ir.derived import derivations
from sparsec.ir.equal import func_key
from sparsec.ir.interp import evaluate_func
from sparsec.launch import register, target_of
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.live_weights import LiveWeight
from sparsec.runtime.release import release
from sparsec.training import is_differentiated, with_banks

_logger = logging.getLogger(__name__)

GraphCompiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def sparsec(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """The backend.

    Options:
        dense: "inductor" (default) or "aten": who runs the dense rest.
        weights: how the experts' weights are stored: "model" (default), "int8" or "int4" on a CPU, "fp8" or "mxfp4" on
            a GPU.
        activations: what quantised weights are multiplied by: "model" (default), "int8" (int8 and int4 weights, on a
            CPU) or "fp8" (fp8 weights, on a GPU).
        dump: a folder; each graph gets a run of its own in it, with IR texts, diffs, remarks and kernels.
        free_weights: whether to give back the memory of weights on a CPU once they are packed, so that they are held
            once and not twice. The model's own tensors then hold NaN: it can be run by what was compiled, at any
            sizes, but not eagerly, and not be saved, changed or moved.

    In a graph that is differentiated banks of experts become one operator each, which has a gradient
    (`sparsec.differentiable`); the rest, routers among it, is differentiated by PyTorch. The options on weights and
    activations do not apply to it.

    Raises: SparsecError for an unknown option.
    """
    given = dict(options or {})
    dense, free = given.pop("dense", "inductor"), given.pop("free_weights", False)
    folder = Path(dump) if isinstance(dump := given.pop("dump", None), str | PathLike) else dump
    config = Config.read(weights=given.pop("weights", None), activations=given.pop("activations", None), dump=folder)
    if given or dense not in ("inductor", "aten") or not isinstance(free, bool) or not isinstance(folder, Path | None):
        raise SparsecError(
            "backend 'sparsec' takes options={'dense': 'inductor' or 'aten', 'weights': 'model', 'int8', 'int4', 'fp8' "
            "or 'mxfp4', 'activations': 'model', 'int8' or 'fp8', 'dump': a folder, 'free_weights': False or True}, "
            f"was given {dict(options or {})}"
        )
    if is_differentiated(graph_module, example_inputs):
        try:
            trained = with_banks(graph_module, list(example_inputs), config.dump)
        except CompileError as error:
            warnings.warn(f"sparsec leaves this graph to PyTorch:\n{error}", stacklevel=2)
            trained = None
        return _differentiable(trained or graph_module, list(example_inputs), dense)
    forward, inference = (partial(_inductor, is_inference=False), _inductor) if dense == "inductor" else (_aten, _aten)
    backend = aot_autograd(
        fw_compiler=forward, inference_compiler=_Compiler(inference, config, free), decompositions={}
    )
    return backend(graph_module, list(example_inputs))  # type: ignore[no-any-return]


def _differentiable(graph_module: GraphModule, example_inputs: list[Any], dense: str) -> Callable[..., Any]:
    if dense == "aten":
        return graph_module.forward
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(graph_module, example_inputs))


class _Compiler:
    """Compiles a functional inference graph: experts by sparsec, the rest by `dense`."""

    def __init__(self, dense: GraphCompiler, config: Config, free: bool) -> None:
        self.dense, self.config, self.free = dense, config, free

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            fused = fuse(graph_module, example_inputs, self.config)
        except (CompileError, ArtifactError) as error:  # the latter where a kernel cannot be bound
            warnings.warn(f"sparsec leaves this graph to PyTorch:\n{error}", stacklevel=2)
            fused = None
        if fused is None:
            return self.dense(graph_module, example_inputs)
        with _mode_of(example_inputs):
            examples = [read.example(example_inputs) for read in fused.reads]
        run = self.dense(fused.graph, examples)
        free = self.free

        def boxed(inputs: list[Any]) -> Any:
            nonlocal free
            given = [read(inputs) for read in fused.reads]
            if free:
                free = False
                fused.release(inputs)
            inputs.clear()
            return run(given)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed


@dataclass(frozen=True)
class Given:
    """An argument of a fused graph that is an input of the graph before it."""

    place: int

    def __call__(self, inputs: Sequence[Any]) -> Any:
        return inputs[self.place]

    example = __call__


@dataclass(frozen=True)
class Made:
    """An argument of a fused graph that is made of weights among the inputs: once, not at every call."""

    parts: tuple[Given | Made, ...]
    weight: LiveWeight

    def __call__(self, inputs: Sequence[Any]) -> torch.Tensor:
        return self.weight([part(inputs) for part in self.parts])

    def example(self, inputs: Sequence[Any]) -> torch.Tensor:
        return self.weight.make([part.example(inputs) for part in self.parts])


@dataclass(frozen=True)
class Fused:
    """A graph whose expert layers are launches of kernels, and where its arguments come from."""

    graph: GraphModule
    reads: list[Given | Made]

    def release(self, inputs: Sequence[Any]) -> None:
        """Give back the memory of those inputs of which only weights are made that do not lie in there."""
        made = [read for read in self.reads if isinstance(read, Made)]
        kept = [read(inputs) for read in self.reads if isinstance(read, Given)]
        kept += [part(inputs) for read in made if read.weight.is_view() for part in read.parts]
        held = {id(tensor.untyped_storage()) for tensor in kept if isinstance(tensor, torch.Tensor)}
        for part in dict.fromkeys(part for read in made for part in read.parts if isinstance(part, Given)):
            if id(part(inputs).untyped_storage()) not in held:
                release(part(inputs))


def fuse(graph_module: GraphModule, example_inputs: Sequence[Any], config: Config | None = None) -> Fused | None:
    """The graph with its expert layers as launches of kernels; None where it has none.

    Args:
        config: how the experts' weights are stored and multiplied.

    Raises: CompileError.
    """
    imported = import_graph(graph_module, _static_inputs())
    config = config or Config()
    imported.module.attrs.update(config.of_banks)
    override = Override(config.override_dir) if config.override_dir else None
    dumped = Dump(config.dump, "graph", kernels=True) if config.dump else None
    instruments = [instrument for instrument in (override, dumped) if instrument]
    result = pipeline.run(imported.module, to="raise", instruments=instruments, verify=config.verify)
    for remark in result.remarks:
        if remark.kind == "missed":
            said = Diagnostic(remark.message, remark.loc, "warning", hint=remark.suggestion)
            warnings.warn(f"sparsec leaves a part of this graph to PyTorch:\n{said}", stacklevel=2)
    if not any(op.dialect == "moe" for op in imported.module.main.body.ops):
        _logger.info("no bank of experts in this graph: it is left to PyTorch")
        if dumped:
            dumped.close()
        return None
    device = _device_of(example_inputs)
    target = target_of(device)
    run = pipeline.run(imported.module, target=target, instruments=instruments, verify=config.verify)
    lowered = run.module
    emitted = emit(lowered, target, here=True, edit=override.source if override else as_generated)
    if dumped:
        dumped.emitted(emitted)
    kernels = {name: register(kernel, device, emitted.files) for name, kernel in emitted.plan.kernels.items()}
    graph = to_fx(lowered.main, kernels, device, imported.constants, imported.results)
    return Fused(graph, list(_reads(graph_module, lowered)))


def _reads(graph_module: GraphModule, lowered: Module) -> Iterator[Given | Made]:
    """For each argument of the lowered graph but its constants, where it comes from."""
    names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    places = {name: i for i, name in enumerate(names)}
    made = derivations(lowered)

    @cache
    def read(source: str) -> Given | Made:
        if source not in made:
            return Given(places[source])
        func = made[source].func
        digest = hashlib.sha256(repr(func_key(func)).encode()).hexdigest()
        return Made(tuple(map(read, made[source].of)), LiveWeight(digest, partial(_derive, Module([func]), func)))

    for attrs in map(lowered.main.arg_attrs.__getitem__, lowered.main.body.args):
        if attrs["kind"] != "constant":
            yield read(str(attrs["source"]))


def _derive(module: Module, func: Func, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    (made,) = evaluate_func(module, func, parts)
    return cast("torch.Tensor", made)


def _static_inputs() -> Collection[int]:
    """Numbers of the inputs that are parameters and buffers of the model that is compiled."""
    context = TracingContext.try_get()
    return () if context is None or context.fw_metadata is None else context.fw_metadata.static_input_indices


def _inductor(
    graph_module: GraphModule, example_inputs: Sequence[Any], is_inference: bool = True
) -> Callable[..., Any]:
    """Dense ops by Inductor, from the graph decomposed as it wants it."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    with _mode_of(example_inputs):
        decomposed = make_fx(graph_module, decomposition_table=select_decomp_table())(*example_inputs)
    joint_graph_passes(decomposed)
    (output,) = decomposed.graph.find_nodes(op="output")
    returned = enumerate(output.args[0])
    output.meta["user_visible_output_idxs"] = [i for i, item in returned if isinstance(item, torch.fx.Node)]
    return compile_fx_inner(decomposed, example_inputs, is_inference=is_inference)  # type: ignore[no-any-return]


def _mode_of(example_inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """The mode in which the examples are tensors without values."""
    mode = detect_fake_mode(list(example_inputs))
    return nullcontext() if mode is None else mode


def _aten(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Dense ops one by one."""
    return make_boxed_func(graph_module.forward)


def _device_of(example_inputs: Sequence[Any]) -> torch.device:
    devices = {value.device for value in example_inputs if isinstance(value, torch.Tensor) and value.dim() > 0}
    if len(devices) != 1:
        raise CompileError(f"the graph's inputs are on {len(devices)} devices; sparsec compiles for one")
    return devices.pop()
