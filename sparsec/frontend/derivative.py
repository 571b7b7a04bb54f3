"""The gradient of an activation's region, by PyTorch's own autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from sparsec.frontend.experts_op import Rows
from sparsec.frontend.region import PROBE, RowBuilder
from sparsec.frontend.symbols import Symbols
from sparsec.ir.core import Attr, Block
from sparsec.ir.equal import clone_block
from sparsec.ir.opdef import make
from sparsec.ir.types import DType, TensorType, Type

_NARROW = (DType.f16, DType.bf16)


def gradient(activation: Block) -> Block:
    """The region of `moe.hidden_grad` for an activation: in f32 and in pointwise operators that kernels are built of.

    It takes the gradient of the activation's value, then the activation's arguments, and yields the value and the
    gradients of the arguments.

    Raises: TypeError, ValueError, KeyError, RuntimeError for an activation that PyTorch cannot differentiate so.
    """
    wide = clone_block(activation, {}, _wide_type, _wide_attr)
    width = wide.args[0].tensor.shape[-1]
    assert isinstance(width, int)

    def joint(grad: Tensor, *parts: Tensor) -> list[Tensor]:
        given = [part.detach().requires_grad_() for part in parts]
        (value,) = Rows(PROBE).run(wide, given)
        grads = torch.autograd.grad(value, given, grad, materialize_grads=True)
        return [value.detach(), *grads]

    rules: Any = core_aten_decompositions()
    with _disable_current_modes(), FakeTensorMode(), torch.enable_grad():
        inputs = [torch.empty(PROBE, width) for _ in range(1 + len(wide.args))]
        graph = make_fx(joint, decomposition_table=rules)(*inputs).graph
    graph.eliminate_dead_code()
    return _imported(graph, ["d", *(arg.name for arg in wide.args)])


def _imported(graph: torch.fx.Graph, names: Sequence[str]) -> Block:
    """The nodes of a graph over so many rows as a region over any number."""
    block = Block()
    builder = RowBuilder(block, Symbols())
    known = dict[torch.fx.Node, Any]()
    given = iter(names)

    def resolve(item: Any) -> Any:
        if isinstance(item, list | tuple):
            return [resolve(part) for part in item]
        if isinstance(item, int) and item == PROBE:
            raise ValueError("the gradient depends on the number of rows")
        return known[item] if isinstance(item, torch.fx.Node) else item

    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = block.add_arg(builder.type_of(node.meta["val"]), next(given))
        elif node.op == "output":
            block.append(make("moe.yield", resolve(node.args[0])))
        elif node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            known[node] = resolve(node.args[0])
        else:
            kwargs = {key: resolve(value) for key, value in node.kwargs.items()}
            target = _pure(node.target)
            known[node] = builder.call(target, resolve(node.args), kwargs, node.meta["val"], name=node.name)
            if target is not node.target:
                known[node.args[0]] = known[node]
    return block


def _pure(target: Any) -> Any:
    """`mul` for `mul_`: autograd adds and masks in place."""
    if not target._schema.is_mutable:
        return target
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"))
    return getattr(packet, target._overloadname)


def _wide_type(type: Type) -> Type:
    if isinstance(type, TensorType) and type.dtype in _NARROW:
        return TensorType(type.shape, DType.f32)
    return type


def _wide_attr(value: Attr) -> Attr:
    return DType.f32 if value in _NARROW else value
