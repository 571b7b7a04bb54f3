"""Graphs that are differentiated: their banks of experts as one operator each, everything else as it was.

The graph that Dynamo gives is traced to functional ATen operators in front of autograd, its banks are raised as they
are where nothing is differentiated, and written back as `sparsec::bank`. AOT autograd differentiates the result.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from copy import copy
from operator import getitem
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes._tensorify_python_scalars import tensorify_python_scalars

from sparsec import pipeline
from sparsec.codegen.fx import FxBuilder
from sparsec.diagnostics import CompileError, Diagnostic
from sparsec.dialects.moe import Experts
from sparsec.differentiable import TARGET
from sparsec.frontend import region
from sparsec.frontend.derivative import gradient
from sparsec.frontend.graph import import_graph
from sparsec.inspect.dump import Dump
from sparsec.ir.core import Op
from sparsec.ir.types import DType

_logger = logging.getLogger(__name__)
_aten = torch.ops.aten
_PASSES = "recompose,canonicalize,cse,raise-experts,dce"
_DTYPES = (DType.f32, DType.bf16, DType.f16)


@torch.library.custom_op("sparsec::held", mutates_args=())
def held(x: Tensor) -> Tensor:
    """A tensor that lets no gradient through, in graphs on their way through the IR: passes leave it where it is."""
    return x.clone()


@held.register_fake
def _held_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_HELD = torch.ops.sparsec.held.default


def is_differentiated(graph_module: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether gradients can be asked for: outside of `torch.no_grad()`, for inputs that require them."""
    needed = (isinstance(value, Tensor) and value.requires_grad for value in example_inputs)
    if not (torch.is_grad_enabled() and any(needed)):
        return False
    if not any(node.target is torch._C._set_grad_enabled for node in graph_module.graph.nodes):
        return True
    (output,) = graph_module.graph.find_nodes(op="output")
    examples = [node.meta.get("example_value") for node in output.all_input_nodes]
    return any(isinstance(value, Tensor) and value.requires_grad for value in examples)


def with_banks(graph_module: GraphModule, example_inputs: list[Any], dump: Path | None = None) -> GraphModule | None:
    """The graph with each bank of experts as `sparsec::bank`; None where it has none, or cannot be taken apart.

    Args:
        dump: a folder for a run with what the passes did.

    Raises: CompileError that names the operator and the user's line, for what the IR cannot hold.
    """
    if (why := _obstacle(graph_module)) is not None:
        _logger.info("a graph that is differentiated is left to PyTorch: %s", why)
        return None
    traced = _functional(graph_module, example_inputs)
    if traced is None:
        _logger.info("a graph that is differentiated is left to PyTorch: it changes its inputs in place")
        return None
    _hold(traced, example_inputs)
    imported = import_graph(traced)
    result = pipeline.run_passes(imported.module, _PASSES, instruments=[Dump(dump, "graph")] if dump else [])
    for remark in result.remarks:
        if remark.kind == "missed":
            said = Diagnostic(remark.message, remark.loc, "warning", hint=remark.suggestion)
            warnings.warn(f"sparsec leaves a part of this graph to PyTorch:\n{said}", stacklevel=2)
    banks = [op for op in imported.module.main.body.ops if op.dialect == "moe"]
    for op in banks:
        if (why := _untrainable(op)) is not None:
            raise CompileError(f"{op.name} has no gradient by sparsec's kernels: {why}", op.loc)
    if not banks:
        _logger.info("no bank of experts in this graph: it is left to PyTorch")
        return None
    device = next(value.device for value in example_inputs if isinstance(value, Tensor))
    made = _BankBuilder({}, device, imported.constants, imported.results).build(imported.module.main)
    _copy_origins(graph_module, made)
    return made


def _obstacle(graph_module: GraphModule) -> str | None:
    """Why a graph is not even tried."""
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "it runs under autocast"
    for node in graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"it holds the operator {node.target}"
        if "autocast" in getattr(node.target, "__name__", ""):
            return "it switches autocast"
    return None


def _functional(graph_module: GraphModule, example_inputs: list[Any]) -> GraphModule | None:
    """The graph in ATen operators as autograd would see them, without changes in place; None if it changes inputs."""
    with tracing(copy(TracingContext.try_get())):  # what the trace notes there is not for the real one
        made, signature = aot_export_module(
            graph_module, example_inputs, trace_joint=False, pre_dispatch=True, decompositions={}
        )
    traced = cast("GraphModule", made)
    _tensorify(traced, detect_fake_mode(example_inputs))
    changed = (signature.buffers_to_mutate, signature.user_inputs_to_mutate, signature.parameters_to_mutate)
    return None if any(changed) else traced


def _tensorify(graph_module: GraphModule, mode: FakeTensorMode | None) -> None:
    """Make Python floats that Dynamo passes as tensors tensors in the graph too, as AOT autograd does.

    Where that cannot be, Dynamo is told to start again with the float as a constant.
    """
    for node in graph_module.graph.nodes:
        if node.target is _aten.item.default:
            node.target = _aten._local_scalar_dense.default
    if mode is not None and mode.shape_env is not None:
        tensorify_python_scalars(graph_module, mode.shape_env, mode)


def _hold(graph_module: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Write where gradients end as `sparsec::held`: what is detached, and what is computed under `no_grad`."""
    graph, enabled = graph_module.graph, True
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    needs = {
        node
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, Tensor) and value.requires_grad
    }
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and any(given in needs for given in node.all_input_nodes):
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                needs.add(node)  # of several results each is looked at where it is taken
            elif value.is_floating_point():
                if enabled and node.target is not _aten.detach.default:
                    needs.add(node)
                elif not (node.target is getitem and node.args[0] not in needs):
                    _hold_result(graph, node)
    graph.lint()


def _hold_result(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_after(node):
        made = graph.call_function(_HELD, (node,))
    made.meta.update(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def _untrainable(op: Op) -> str | None:
    """Why there are no kernels for the gradients of an op; None where there are."""
    if not isinstance(op, Experts):
        return "it is not a whole bank of experts"
    if op.tail is not None:
        return "its experts end in a region of their own (`tail`)"
    if op.weight_on == "input":
        return "the routing weight is applied to the input of the experts"
    banks = [value for value in op.bank_operands() if value is not None]
    dtypes = {value.tensor.dtype for value in (op.x, *banks)}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"its operands are of types {', '.join(sorted(dtype.value for dtype in dtypes))}"
    try:
        gradient(op.activation)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        return f"its activation cannot be differentiated: {error}"
    return None


class _BankBuilder(FxBuilder):
    """Banks as `sparsec::bank`."""

    def emit(self, op: Op) -> None:
        if isinstance(op, Experts):
            operands = (op.x, op.ids, op.weights, op.up, op.down, op.up_bias, op.down_bias)
            options: dict[str, Any] = {
                "activation": region.encode(op.activation),
                "gradient": region.encode(gradient(op.activation)),
                "layout": op.layout,
                "up_transposed": op.up_transposed,
                "down_transposed": op.down_transposed,
            }
            given = tuple(None if value is None else self.nodes[value] for value in operands)
            self.results(op, self.graph.call_function(TARGET, given, options), many=True)
        elif op.name == "torch.sparsec.held":
            self.results(op, self.graph.call_function(_aten.detach.default, (self.nodes[op.operands[0]],)), many=False)
        else:
            super().emit(op)


def _copy_origins(graph_module: GraphModule, made: GraphModule) -> None:
    """Say of the arguments what Dynamo said: which are weights, and where they come from."""
    made.meta.update(graph_module.meta)
    pairs = zip(graph_module.graph.find_nodes(op="placeholder"), made.graph.find_nodes(op="placeholder"), strict=True)
    for old, new in pairs:
        new.meta.update(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
