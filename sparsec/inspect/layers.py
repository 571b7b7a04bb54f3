"""One expert layer as a module of its own, and sizes made known: what can be handed to a compiler of static shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sparsec.diagnostics import SparsecError
from sparsec.dialects.moe import Experts, Layer
from sparsec.ir.core import Attr, Block, Func, Module, Op
from sparsec.ir.equal import ValueMap, clone_block, clone_op
from sparsec.ir.opdef import make
from sparsec.ir.types import Dim, Sym, TensorType, Type, dims_of, evaluate, symbols


def expert_layers(module: Module) -> dict[str, Op]:
    """The expert banks of `main` by name: their scope where they have one of their own, else their result's name."""
    found = dict[str, Op]()
    for op in module.main.body.ops:
        if isinstance(op, Experts | Layer):
            name = op.loc.scope or op.y.name or "experts"
            while name in found:
                name += "'"
            found[name] = op
    return found


def find_layer(module: Module, wanted: str | None) -> Op:
    """The layer of a name, or of a part of its name that no other has; the first one for None.

    Raises: SparsecError that lists the layers.
    """
    layers = expert_layers(module)
    if not layers:
        raise SparsecError("the module has no `moe.experts`: it is at a phase after `fuse`, or has no expert layer")
    if wanted is None:
        return next(iter(layers.values()))
    if wanted in layers:
        return layers[wanted]
    close = [op for name, op in layers.items() if f".{wanted}." in f".{name}."]
    if len(close) != 1:
        which = f"{len(close)} layers are" if close else "no layer is"
        listed = ", ".join(list(layers)[:8]) + (", ..." if len(layers) > 8 else "")
        raise SparsecError(f"{which} named '{wanted}' (there are: {listed})")
    return close[0]


def cut_layer(module: Module, experts: Op) -> Module:
    """A module whose `main` is one bank of experts with its router, from the logits on.

    What they read becomes arguments, parameters under their own names; the results are the layer's, then the router's
    ids and weights. A bank whose ids come from no `moe.route` is cut out alone.
    """
    main = module.main
    kept = {experts, *_between(experts)}
    ops = [op for op in main.body.ops if op in kept]
    inside = {result for op in ops for result in op.results}
    outside = dict.fromkeys(value for op in ops for value in op.operands if value not in inside)
    values: ValueMap = {}
    func = Func("main", Block(), loc=main.loc)
    for value in sorted(outside, key=lambda value: value in main.arg_attrs):
        values[value] = arg = func.body.add_arg(value.type, value.name)
        attrs = main.arg_attrs.get(value, {})
        func.arg_attrs[arg] = dict(attrs) if attrs.get("kind") in ("param", "buffer", "constant") else {"kind": "input"}
    for op in ops:
        func.body.append(clone_op(op, values))
    shown = [*experts.results, *(result for op in ops[:-1] if op.name == "moe.route" for result in op.results[:2])]
    func.body.append(make("func.return", [values[value] for value in shown]))
    func.result_attrs = {i: {"kind": "output"} for i in range(len(shown))}
    return Module([func], {key: value for key, value in module.attrs.items() if key in ("phase", "version")})


def _between(experts: Op) -> Iterator[Op]:
    """The router of a bank, and what stands between the two."""
    if not isinstance(experts, Experts):
        return
    seen, todo = dict[Op, bool](), [value.op for value in (experts.ids, experts.weights)]
    order = list[Op]()
    while todo:
        op = todo.pop()
        if op is None or op in seen:
            continue
        seen[op] = op.name == "moe.route"
        order.append(op)
        todo += [] if seen[op] else [value.op for value in op.operands]
    for op in sorted(order, key=lambda op: op.block.ops.index(op) if op.block else 0):
        seen[op] = seen[op] or any(seen.get(value.op, False) for value in op.operands if value.op)
        if seen[op]:
            yield op


def sizes_for(module: Module, tokens: int) -> dict[str, int]:
    """Sizes for the symbols of `main` at which its first matrix or longer tensor of floats has so many rows of tokens.

    Raises: SparsecError where the module has a number of tokens of its own.
    """
    types = [arg.type for arg in module.main.body.args]
    found = {name: 1 for type in types for dim in dims_of(type) for name in symbols(dim)}
    inputs = (
        arg.tensor
        for arg in module.main.body.args
        if module.main.arg_attrs.get(arg, {}).get("kind", "input") == "input" and isinstance(arg.type, TensorType)
    )
    shape = next((type.shape for type in inputs if type.rank > 1), None)
    if shape is None:
        return found
    rows = shape[:-1]
    for name in (name for dim in reversed(rows) for name in symbols(dim)):
        trial = found | {name: tokens}
        count = 1
        for dim in rows:
            count *= evaluate(dim, trial)
        if count == tokens:
            return trial
    raise SparsecError(f"rows of {', '.join(map(str, rows))} cannot be {tokens} tokens")


def with_sizes(module: Module, sizes: Mapping[str, int]) -> Module:
    """A copy in which symbols have these sizes. Symbols that only a region binds stay."""

    def dim(given: Dim) -> Dim:
        return evaluate(given, sizes) if isinstance(given, Sym) and set(symbols(given)) <= sizes.keys() else given

    def type_(given: Type) -> Type:
        return TensorType(tuple(map(dim, given.shape)), given.dtype) if isinstance(given, TensorType) else given

    def attr(given: Attr) -> Attr:
        if isinstance(given, Sym):
            return dim(given)
        if isinstance(given, tuple):
            return tuple(map(attr, given))
        return {key: attr(value) for key, value in given.items()} if isinstance(given, dict) else given

    made = Module(attrs=module.attrs)
    for func in module.funcs.values():
        values: ValueMap = {}
        new = Func(func.name, clone_block(func.body, values, type_, attr), func.attrs, func.loc)
        new.arg_attrs = {values[arg]: dict(attrs) for arg, attrs in func.arg_attrs.items()}
        new.result_attrs = {i: dict(attrs) for i, attrs in func.result_attrs.items()}
        made.funcs[func.name] = new
    return made


__all__ = ["cut_layer", "expert_layers", "find_layer", "sizes_for", "with_sizes"]
