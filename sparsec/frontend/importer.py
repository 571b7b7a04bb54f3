"""An exported program as a module in phase `capture`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from sparsec.diagnostics import CompileError
from sparsec.frontend import experts_op, locations, pair_ops, region, repeated
from sparsec.frontend.builder import Builder
from sparsec.frontend.symbols import Symbols
from sparsec.ir.core import Attr, Block, Func, Module, Value
from sparsec.ir.loc import Loc
from sparsec.ir.opdef import make
from sparsec.ir.types import Sym, TensorType

_aten = torch.ops.aten
_CHECKS = ("aten::_assert", "aten::sym_constrain_range", "aten::_functional_sym_constrain_range")
_SAME_VALUE = frozenset(
    {_aten.lift_fresh_copy.default, _aten.lift_fresh.default, _aten.alias.default, _aten.detach.default}
)
_ITEMS = frozenset({_aten._local_scalar_dense.default, _aten.item.default})
_KINDS = {
    InputKind.USER_INPUT: "input",
    InputKind.PARAMETER: "param",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
_ORDER = {kind: i for i, kind in enumerate(_KINDS)}


def import_program(
    program: ExportedProgram, blocks: repeated.Blocks | None = None
) -> tuple[Module, dict[str, torch.Tensor]]:
    """The module of a functional exported program, and the tensor behind every parameter, buffer and constant of it.

    Args:
        blocks: what the program's calls of `sparsec::block` mean.

    Raises: CompileError that names the operator and the user's line, for what the IR cannot hold.
    """
    return _ProgramImporter(program, blocks or repeated.Blocks()).run()


_EXPERTS_ATTRS: dict[str, Attr] = {
    "layout": "concat",
    "up_transposed": False,
    "down_transposed": False,
    "weight_on": "output",
}
"""Attributes of `moe.experts` that `sparsec::experts` has under the same names, with their defaults."""


class GraphImporter:
    """Imports the nodes of ATen graphs into the function `main`."""

    def __init__(self) -> None:
        self.builder = Builder(Block(), Symbols())
        self.known: dict[Node, Any] = {}  # what each node's result has become: a value, or a tuple of them
        self.func = Func("main", self.builder.block)
        self._special = {
            experts_op.TARGET: self._experts,
            pair_ops.GROUPED_LINEAR: self._grouped_linear,
            pair_ops.CAPACITY: self._capacity,
        }

    def argument(self, node: Node, attrs: dict[str, Attr]) -> Value:
        """Make a placeholder an argument of `main`."""
        try:
            name = str(attrs.get("source", node.name))
            value = self.builder.block.add_arg(self.builder.type_of(node.meta["val"]), name)
        except (TypeError, ValueError) as error:
            raise CompileError(f"argument '{node.name}' of the model cannot be compiled: {error}") from error
        self.func.arg_attrs[value] = attrs
        if isinstance(value.type, TensorType):  # sizes are read by their symbols
            self.known[node] = value
        return value

    def graph(self, graph_module: GraphModule) -> Sequence[Any]:
        """Import the nodes of a graph whose placeholders are known; what it returns."""
        for node in graph_module.graph.nodes:
            if node.op == "output":
                returned = node.args[0]
                return [self._resolve(item) for item in returned]
            if node.op != "call_function":
                continue
            loc = locations.of_node(node)
            try:
                self._node(node, graph_module, loc)
            except (TypeError, ValueError, KeyError) as error:
                said = error.args[0] if error.args else error
                raise CompileError(f"'{node.target}' cannot be compiled: {said}", loc) from error
        return []

    def _node(self, node: Node, graph_module: GraphModule, loc: Loc) -> None:
        target: Any = node.target
        if target is operator.getitem and isinstance(whole := self.known.get(node.args[0]), tuple):  # type: ignore[arg-type]
            self.known[node] = whole[node.args[1]]  # type: ignore[index]
        elif isinstance(target, torch._ops.HigherOrderOperator):
            self.known[node] = self._inline(node, graph_module)
        elif not isinstance(target, torch._ops.OpOverload):
            if not _is_size(node.meta.get("val")):
                raise TypeError("it is no operator of torch")
        elif target._schema.name.startswith(_CHECKS):
            return
        elif target in _SAME_VALUE:
            self.known[node] = self._resolve(node.args[0])
        elif target in self._special:
            self.known[node] = self._special[target](_given(node), loc)
            self.known[node].name = node.name
        elif target is repeated.TARGET:
            self.known[node] = self._block(node, loc)
        elif target in _ITEMS or not _is_size(node.meta.get("val")):
            args, kwargs = self._resolve(node.args), {key: self._resolve(value) for key, value in node.kwargs.items()}
            self.known[node] = self.builder.call(target, args, kwargs, node.meta["val"], loc, node.name)
            if target in _ITEMS:
                self.known[node] = self.builder.symbols.dim(node.meta["val"])

    def _inline(self, node: Node, graph_module: GraphModule) -> tuple[Any, ...]:
        """The body of a region that only sets a mode which an inference graph does not depend on."""
        name = node.target._name  # type: ignore[union-attr]
        if name == "wrap_with_set_grad_enabled":
            body, args = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast" and not node.args[2]:
            body, args = node.args[4], node.args[5:]
        elif name == "wrap_with_autocast":
            raise TypeError("torch.autocast inside of the model is not supported: convert the model's dtype instead")
        else:
            raise TypeError(f"control flow on data ({name}) is not supported")
        inner = getattr(graph_module, str(body.target))  # type: ignore[union-attr]
        places = [place for place in inner.graph.nodes if place.op == "placeholder"]
        for place, arg in zip(places, args, strict=True):
            if isinstance(arg, Node) and arg in self.known:
                self.known[place] = self.known[arg]
        return tuple(self.graph(inner))

    def _experts(self, given: dict[str, Any], loc: Loc) -> Value:
        names = ("x", "ids", "weights", "up", "down", "up_bias", "down_bias")
        operands = [self._resolve(given.get(name)) for name in names]
        if given.get("tail_params"):
            operands += [None, None, *self._resolve(given["tail_params"])]  # no scales: these banks are as the model's
        defaults = {"layout": "concat", "up_transposed": False, "down_transposed": False, "weight_on": "output"}
        bodies = [region.decode(given[name], loc) for name in ("activation", "tail") if given.get(name)]
        return self._append("moe.experts", operands, given, defaults, bodies, loc)

    def _grouped_linear(self, given: dict[str, Any], loc: Loc) -> Value:
        operands = [self._resolve(given.get(name)) for name in ("x", "ids", "w", "bias", "weights")]
        return self._append("moe.grouped_linear", operands, given, {"transposed": False}, [], loc)

    def _capacity(self, given: dict[str, Any], loc: Loc) -> Value:
        given = given | {name: self._resolve(given[name]) for name in ("capacity", "groups") if name in given}
        defaults = {"num_experts": None, "capacity": None, "order": "slot", "groups": 1}
        return self._append("moe.capacity", [self._resolve(given["ids"])], given, defaults, [], loc)

    def _append(
        self,
        name: str,
        operands: list[Any],
        given: dict[str, Any],
        defaults: dict[str, Any],
        bodies: list[Block],
        loc: Loc,
    ) -> Value:
        """An op with those attributes that are given and differ from the default."""
        while operands[-1] is None:
            operands.pop()
        attrs = {key: given[key] for key, default in defaults.items() if given.get(key, default) != default}
        return self.builder.block.append(make(name, operands, None, attrs, bodies, loc)).result

    def _block(self, node: Node, loc: Loc) -> tuple[Value, ...]:
        raise TypeError("a block of another program is called")

    def _resolve(self, item: Any) -> Any:
        """A node's argument with values in the place of nodes, and dimensions in the place of symbolic integers."""
        if isinstance(item, list | tuple):
            return [self._resolve(part) for part in item]
        if not isinstance(item, Node):
            return item
        if item in self.known:
            return self.known[item]
        size = item.meta.get("val")
        if isinstance(size, torch.SymInt):
            return self.builder.symbols.dim(size)
        if isinstance(size, int | float | str | None):
            return size
        raise TypeError(f"its argument '{item.name}' is a {type(size).__name__}, which is known at run time only")


class _ProgramImporter(GraphImporter):
    """Adds what an exported program says of its arguments and results."""

    def __init__(self, program: ExportedProgram, blocks: repeated.Blocks) -> None:
        super().__init__()
        self.program, self.blocks = program, blocks
        self.held: dict[str, Any] = program.constants | program.state_dict
        self.called: dict[str, repeated.Block] = {}
        self.by_tensor: dict[int, Value] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def run(self) -> tuple[Module, dict[str, torch.Tensor]]:
        self._arguments()
        results = self.graph(self.program.graph_module)
        self._results(results)
        self._drop_unused()
        funcs = [self.func, *(block.func for block in self.called.values())]
        return Module(funcs, {"phase": "capture", "version": 1}), self.weights

    def _block(self, node: Node, loc: Loc) -> tuple[Value, ...]:
        operands, name, path = self._resolve(node.args[0]), str(node.args[1]), str(node.args[2])
        block = self.called[name] = self.blocks.by_name[name]
        held = self.blocks.weights[path]
        for source in block.sources:
            shared = block.constants.get(source)
            if shared is None:
                kind = "param" if isinstance(held[source], Parameter) else "buffer"
                operands.append(self._weight(f"{path}.{source}", held[source], kind))
            else:
                operands.append(self._weight(f"{name}.{source}", shared, "constant"))
        types = [self.builder.type_of(item) for item in node.meta["val"]]
        op = self.builder.block.append(make("moe.call", [tuple(operands)], types, {"callee": block.name}, loc=loc))
        for value in op.results:
            value.name = f"{node.name}_{value.index}"
        return op.results

    def _weight(self, source: str, tensor: torch.Tensor, kind: str) -> Value:
        """The argument of `main` that holds a tensor, by whichever name it came first."""
        if id(tensor) not in self.by_tensor:
            value = self.builder.block.add_arg(self.builder.type_of(tensor), source)
            self.func.arg_attrs[value] = {"kind": kind, "source": source}
            self.weights[source], self.by_tensor[id(tensor)] = tensor, value
        return self.by_tensor[id(tensor)]

    def _arguments(self) -> None:
        nodes = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        specs = self.program.graph_signature.input_specs
        pairs = list(zip(nodes, specs, strict=True))
        pairs.sort(key=lambda pair: _ORDER.get(pair[1].kind, 9))
        for node, spec in pairs:
            self._argument(node, spec)

    def _argument(self, node: Node, spec: InputSpec) -> None:
        if isinstance(spec.arg, ConstantArgument):
            return
        if spec.kind not in _KINDS or not isinstance(spec.arg, TensorArgument | SymIntArgument):
            what = spec.kind.name.lower().replace("_", " ")
            raise CompileError(f"argument '{node.name}' of the model is a {what}, which cannot be compiled")
        attrs: dict[str, Attr] = {"kind": _KINDS[spec.kind]}
        if spec.kind is InputKind.USER_INPUT:
            self.argument(node, attrs)
            return
        assert spec.target is not None
        tensor = self.weights[spec.target] = self.held[spec.target]
        self.by_tensor[id(tensor)] = self.argument(node, attrs | {"source": spec.target})

    def _results(self, results: Sequence[Any]) -> None:
        outputs, mutations = list[tuple[Value, dict[str, Attr]]](), list[tuple[Value, dict[str, Attr]]]()
        for spec, result in zip(self.program.graph_signature.output_specs, results, strict=True):
            if spec.kind is OutputKind.BUFFER_MUTATION:
                assert spec.target is not None
                mutations.append((result, {"kind": "mutation", "source": spec.target}))
            elif spec.kind is OutputKind.USER_OUTPUT:
                if isinstance(result, Value):
                    outputs.append((result, {"kind": "output"}))
                elif isinstance(result, Sym):
                    raise CompileError(
                        f"the model returns the size {result}", hint="return tensors; sizes can be read from them"
                    )
            else:
                what = spec.kind.name.lower().replace("_", " ")
                raise CompileError(
                    f"the model does a {what} of '{spec.target}', which a compiled model cannot",
                    hint="return the new value instead of changing a tensor in place",
                )
        together = outputs + mutations
        self.builder.block.append(make("func.return", [value for value, _ in together]))
        self.func.result_attrs = {i: attrs for i, (_, attrs) in enumerate(together)}

    def _drop_unused(self) -> None:
        kept = {str(attrs.get("source")) for attrs in self.func.result_attrs.values()}
        for arg in list(self.builder.block.args):
            attrs = self.func.arg_attrs[arg]
            if attrs["kind"] != "input" and not arg.users and attrs["source"] not in kept:
                self.builder.block.remove_arg(arg)
                del self.func.arg_attrs[arg]
        used = {str(attrs["source"]) for attrs in self.func.arg_attrs.values() if "source" in attrs}
        self.weights = {name: tensor for name, tensor in self.weights.items() if name in used}


def _given(node: Node) -> dict[str, Any]:
    """A call's arguments by name."""
    names = (arg.name for arg in node.target._schema.arguments)  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _is_size(value: Any) -> bool:
    """Whether a node computes with sizes or scalars, which types and attributes hold as expressions."""
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


__all__ = ["GraphImporter", "import_program"]
