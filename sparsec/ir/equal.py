"""Structural equality and copies of IR.

Two pieces of IR are equal where they compute the same in the same way: names of values, locations and attributes that
are spelled out although they equal their default make no difference.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from sparsec.ir.core import Attr, Block, Func, Module, Op, Value
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import Type

Key: TypeAlias = Hashable
"""What equal pieces share; hashable, and of use only for comparison."""

ValueMap: TypeAlias = dict[Value, Value]
OpT = TypeVar("OpT", bound=Op)


def attr_key(value: Attr) -> Key:
    """An attribute's value with its kind, so that `1`, `1.0` and `true` differ and a NaN equals itself."""
    if isinstance(value, Mapping):
        return ("dict", tuple(sorted((name, attr_key(item)) for name, item in value.items())))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ("list", tuple(attr_key(item) for item in value))
    return (type(value).__name__, repr(value))


def attrs_key(op: Op) -> Key:
    """The attributes of an op, less those that equal their default."""
    if not op.attrs:
        return ()
    defaults = op.fields().defaults if isinstance(op, OpDef) else {}
    keys = {name: attr_key(value) for name, value in op.attrs.items()}
    return tuple(
        sorted(item for item in keys.items() if item[0] not in defaults or item[1] != attr_key(defaults[item[0]]))
    )


def op_key(op: Op, numbers: dict[Value, int]) -> Key:
    """What an op shares with its equals; `numbers` tells values apart and learns those defined inside."""
    operands = tuple(numbers.get(value, -1 - id(value)) for value in op.operands)
    regions = tuple(block_key(region, numbers) for region in op.regions)
    return (op.name, operands, op.segments, tuple(result.type for result in op.results), attrs_key(op), regions)


def block_key(block: Block, numbers: dict[Value, int] | None = None) -> Key:
    """What a block shares with its equals. Values from outside must be in `numbers`, or they equal only themselves."""
    numbers = {} if numbers is None else numbers
    for arg in block.args:
        numbers[arg] = len(numbers)
    keys = list[Key]()
    for op in block.ops:
        keys.append(op_key(op, numbers))
        for result in op.results:
            numbers[result] = len(numbers)
    return (tuple(arg.type for arg in block.args), tuple(keys))


def func_key(func: Func) -> Key:
    """What a function shares with its equals; its name is not part of it."""
    args = tuple(attr_key(func.arg_attrs.get(arg, {})) for arg in func.body.args)
    results = tuple(attr_key(func.result_attrs.get(i, {})) for i in range(len(func.result_types)))
    return (block_key(func.body), attr_key(func.attrs), args, results)


def module_key(module: Module) -> Key:
    """What a module shares with its equals."""
    return (attr_key(module.attrs), tuple((name, func_key(func)) for name, func in module.funcs.items()))


def equal(a: Module | Func | Block, b: Module | Func | Block) -> bool:
    """Whether two pieces of the same kind are structurally equal."""
    if isinstance(a, Module):
        return isinstance(b, Module) and module_key(a) == module_key(b)
    if isinstance(a, Func):
        return isinstance(b, Func) and func_key(a) == func_key(b)
    return isinstance(b, Block) and block_key(a) == block_key(b)


def _same_type(type: Type) -> Type:
    return type


def _same_attr(value: Attr) -> Attr:
    return value


def clone_op(
    op: OpT,
    values: ValueMap,
    map_type: Callable[[Type], Type] = _same_type,
    map_attr: Callable[[Attr], Attr] = _same_attr,
) -> OpT:
    """A copy of an op outside any block.

    Operands are looked up in `values` (those it lacks stay as they are), and the results are entered there.
    """
    new: OpT = object.__new__(type(op))
    Op.__init__(
        new,
        op.name,
        (values.get(operand, operand) for operand in op.operands),
        (map_type(result.type) for result in op.results),
        {name: map_attr(value) for name, value in op.attrs.items()},
        [clone_block(region, values, map_type, map_attr) for region in op.regions],
        op.loc,
        op.segments,
    )
    for old, result in zip(op.results, new.results, strict=True):
        result.name = old.name
        values[old] = result
    return new


def clone_block(
    block: Block,
    values: ValueMap,
    map_type: Callable[[Type], Type] = _same_type,
    map_attr: Callable[[Attr], Attr] = _same_attr,
) -> Block:
    """A copy of a block; its arguments and results are entered in `values`."""
    new = Block((map_type(arg.type) for arg in block.args), (arg.name for arg in block.args))
    values.update(zip(block.args, new.args, strict=True))
    for op in block.ops:
        new.append(clone_op(op, values, map_type, map_attr))
    return new


def clone_func(func: Func) -> Func:
    """A copy of a function that shares no data with it."""
    values: ValueMap = {}
    new = Func(func.name, clone_block(func.body, values), func.attrs, func.loc)
    new.arg_attrs = {values[arg]: dict(attrs) for arg, attrs in func.arg_attrs.items()}
    new.result_attrs = {i: dict(attrs) for i, attrs in func.result_attrs.items()}
    return new


def clone_module(module: Module) -> Module:
    """A copy of a module that shares no data with it."""
    # All of it stays alive: looking for garbage in it takes several times as long as making it.
    collects = gc.isenabled()
    gc.disable()
    try:
        return Module([clone_func(func) for func in module.funcs.values()], module.attrs)
    finally:
        if collects:
            gc.enable()


def count_ops(module: Module) -> int:
    """Ops of all functions, those in regions included."""
    return sum(_count(func.body) for func in module.funcs.values())


def _count(block: Block) -> int:
    return len(block.ops) + sum(_count(region) for op in block.ops for region in op.regions)
