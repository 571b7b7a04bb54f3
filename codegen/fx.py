"""From IR back to a torch.fx graph, for Inductor: dense ops as ATen calls, kernels as `sparsec::launch`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from sparsec.diagnostics import CompileError
from sparsec.dialects.aten import PLACEMENT, AtenOp, is_tensor
from sparsec.dialects.builtin import Return
from sparsec.dialects.dtypes import to_torch
from sparsec.dialects.kernel import Alloc, Launch
from sparsec.ir.core import Attr, Func, Op, Value
from sparsec.ir.types import Dim, DType, Sym, SymType, dims_of, symbols

_BINARY: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., Any]] = {"max": torch.sym_max, "min": torch.sym_min}


class FxBuilder:
    """Builds the graph of one function; arguments as of `to_fx`."""

    def __init__(
        self,
        kernels: Mapping[str, str],
        device: torch.device,
        constants: Mapping[str, torch.Tensor],
        places: Sequence[int | Sym | None] | None,
    ) -> None:
        self.kernels, self.device, self.places = kernels, device, places
        self.root = torch.nn.Module()
        self.constants = constants
        self.graph = fx.Graph()
        self.nodes: dict[Value, fx.Node] = {}
        self.dims: dict[str, fx.Node] = {}

    def build(self, func: Func) -> fx.GraphModule:
        """The graph module of `func`: one placeholder per argument that is no constant, a tuple of its results."""
        for arg in func.body.args:
            name = arg.name.replace(".", "_") or "arg"
            attrs = func.arg_attrs.get(arg, {})
            if attrs.get("kind") == "constant":
                self.root.register_buffer(name, self.constants[str(attrs["source"])])
                self.nodes[arg] = self.graph.get_attr(name)
            else:
                self.nodes[arg] = self.graph.placeholder(name)
        for arg in func.body.args:
            self._bind(arg)
        for op in func.body.ops:
            self.emit(op)
        return fx.GraphModule(self.root, self.graph)

    def emit(self, op: Op) -> None:
        match op:
            case Return():
                results = [self.nodes[value] for value in op.operands]
                places = range(len(results)) if self.places is None else self.places
                self.graph.output(tuple(self._returned(place, results) for place in places))
            case Alloc():
                pass  # the operator allocates what it returns
            case Launch():
                inputs = [None if value is None else self.nodes[value] for value in op.inputs]
                node = self.graph.call_function(torch.ops.sparsec.launch.default, (self.kernels[op.callee], inputs))
                self.results(op, node, many=True)
            case AtenOp():
                self._call(op)
            case _:
                raise CompileError(f"'{op.name}' has no counterpart in a torch.fx graph", op.loc)

    def _returned(self, place: int | Sym | None, results: Sequence[fx.Node]) -> Any:
        if isinstance(place, Sym):
            return self.dim(place)
        return None if place is None else results[place]

    def _call(self, op: AtenOp) -> None:
        args, kwargs = list[Any](), dict[str, Any]()
        positional = [param.name for param in op.target._schema.arguments if not param.kwarg_only]
        for param, given in op.bound():
            value = self._argument(given) if is_tensor(param) else self.constant(cast("Attr", given))
            if not param.kwarg_only and positional[len(args) :][:1] == [param.name]:
                args.append(value)
            else:
                kwargs[param.name] = value
        if any(param.name == "device" for param in op.target._schema.arguments) and _creates(op):
            kwargs["device"] = self.device
        many = len(op.target._schema.returns) != 1 or "List" in str(op.target._schema.returns[0].type)
        self.results(op, self.graph.call_function(op.target, tuple(args), kwargs), many)

    def results(self, op: Op, node: fx.Node, many: bool) -> None:
        for i, result in enumerate(op.results):
            self.nodes[result] = self.graph.call_function(operator.getitem, (node, i)) if many else node
            self._bind(result)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, tuple):
            return [self._argument(item) for item in cast("tuple[Any, ...]", argument)]
        return None if argument is None else self.nodes[argument]

    def _bind(self, value: Value) -> None:
        """Give the symbols that this value is the first to mention a node."""
        if isinstance(value.type, SymType):
            self.dims.setdefault(str(value.type.expr), self.nodes[value])
            return
        for axis, dim in enumerate(dims_of(value.type)):
            if isinstance(dim, Sym) and dim.isidentifier() and dim not in self.dims:
                call = (torch.ops.aten.sym_size.int, (self.nodes[value], axis))
                self.dims[dim] = self.graph.call_function(*call)

    def constant(self, attr: Attr) -> Any:
        """An attribute as an argument of a torch call."""
        if isinstance(attr, Sym):
            return self.dim(attr)
        if isinstance(attr, DType):
            return to_torch(attr)
        if isinstance(attr, tuple):
            return [self.constant(item) for item in attr]
        return attr

    def dim(self, dim: Dim) -> Any:
        """A size as an int or a node."""
        if isinstance(dim, int):
            return dim
        if dim not in self.dims:
            missing = [name for name in symbols(dim) if name not in self.dims]
            if missing:
                raise CompileError(f"nothing gives the symbol '{missing[0]}' of the size {dim!r} a value")
            self.dims[dim] = self._expression(ast.parse(dim, mode="eval").body)
        return self.dims[dim]

    def _expression(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name):
                return self.dims[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.graph.call_function(operator.neg, (self._expression(operand),))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                sides = (self._expression(left), self._expression(right))
                return self.graph.call_function(_BINARY[type(op)], sides)
            case ast.Call(func=ast.Name(id=name), args=args) if name in _CALLS:
                return self.graph.call_function(_CALLS[name], tuple(map(self._expression, args)))
            case _:
                raise CompileError(f"not a dimension expression: {ast.unparse(node)!r}")


def _creates(op: AtenOp) -> bool:
    """Whether an op makes a tensor out of nothing, so that somebody must say where."""
    return not op.operands and any(param.name in PLACEMENT for param in op.target._schema.arguments)


def to_fx(
    func: Func,
    kernels: Mapping[str, str],
    device: torch.device,
    constants: Mapping[str, torch.Tensor] | None = None,
    places: Sequence[int | Sym | None] | None = None,
) -> fx.GraphModule:
    """A torch.fx graph that computes `func`.

    Args:
        func: a lowered function: ATen ops, `kernel.alloc`, `kernel.launch`.
        kernels: for each callee, the name under which the runtime's launch operator knows it.
        device: where tensors that the function creates live.
        constants: the tensors of arguments of kind `constant`, by source; they become buffers of the graph's module.
        places: what the graph returns: for each place the number of a result, a size, or None. All results by default.

    Raises:
        CompileError: for an op that torch has no operator for, or a size that nothing binds.
    """
    return FxBuilder(kernels, device, constants or {}, places).build(func)


__all__ = ["FxBuilder", "to_fx"]
