"""`torch.compile(model, backend="sparsec")`: fused expert kernels from sparsec, everything dense from Inductor."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sparsec import pipeline
from sparsec.codegen.emit import emit
from sparsec.codegen.fx import to_fx
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.frontend.graph import import_graph, result_places
from sparsec.launch import register

_logger = logging.getLogger(__name__)

GraphCompiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def sparsec(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """The backend. Options: `dense` = "inductor" (default) or "aten", who runs the dense rest.

    A graph that is differentiated is left to Inductor as it is: the fused kernels have no backward yet.

    Raises: SparsecError for an unknown option.
    """
    given = dict(options or {})
    dense = given.pop("dense", "inductor")
    if given or dense not in ("inductor", "aten"):
        raise SparsecError(
            f"backend 'sparsec' takes options={{'dense': 'inductor' or 'aten'}}, was given {dict(options or {})}"
        )
    inference = _Compiler(_inductor if dense == "inductor" else _aten)
    backend = aot_autograd(fw_compiler=_inductor, inference_compiler=inference, decompositions={})
    return backend(graph_module, list(example_inputs))  # type: ignore[no-any-return]


class _Compiler:
    """Compiles a functional inference graph: experts by sparsec, the rest by `dense`."""

    def __init__(self, dense: GraphCompiler) -> None:
        self.dense = dense

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            fused = _fuse(graph_module, example_inputs)
        except CompileError as error:
            warnings.warn(f"sparsec leaves this graph to PyTorch:\n{error}", stacklevel=2)
            fused = graph_module
        return self.dense(fused, example_inputs)


def _fuse(graph_module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """The graph with its expert layers as launches of kernels; the same graph where it has none."""
    module, constants = import_graph(graph_module)
    if not any(op.name == "moe.experts" for op in module.walk()):
        _logger.info("no bank of experts in this graph: it is left to PyTorch")
        return graph_module
    device = _device_of(example_inputs)
    target = _target_of(device)
    lowered = pipeline.run(module, target=target).module
    emitted = emit(lowered, target)
    kernels = {name: register(kernel, device, emitted.files) for name, kernel in emitted.plan.kernels.items()}
    return to_fx(lowered.main, kernels, device, constants, result_places(graph_module))


def _inductor(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Dense ops by Inductor, from the graph decomposed as it wants it."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    mode = detect_fake_mode(list(example_inputs))
    with mode if mode is not None else nullcontext():
        decomposed = make_fx(graph_module, decomposition_table=select_decomp_table())(*example_inputs)
    return compile_fx_inner(decomposed, example_inputs)  # type: ignore[no-any-return]


def _aten(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Dense ops one by one."""
    return make_boxed_func(graph_module.forward)


def _device_of(example_inputs: Sequence[Any]) -> torch.device:
    devices = {value.device for value in example_inputs if isinstance(value, torch.Tensor) and value.dim() > 0}
    if len(devices) != 1:
        raise CompileError(f"the graph's inputs are on {len(devices)} devices; sparsec compiles for one")
    return devices.pop()


def _target_of(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise CompileError(f"sparsec has no target for device '{device}'")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return f"hip:{properties.gcnArchName.split(':')[0]}"
    return f"cuda:sm_{properties.major}{properties.minor}"
