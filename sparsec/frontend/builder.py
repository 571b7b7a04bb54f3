"""Calls of torch operators as ops of a block: the part of the import that does not know where the calls come from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sparsec.dialects.aten import PLACEMENT, is_tensor
from sparsec.dialects.dtypes import from_torch
from sparsec.frontend.symbols import Symbols
from sparsec.ir.core import Argument, Attr, Block, Value
from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.opdef import make
from sparsec.ir.types import Sym, SymType, TensorType, Type

_aten = torch.ops.aten
# A view says how its input lies in memory; the IR has values only, so it asks for the shape.
_RESHAPES = {_aten.view.default: _aten.reshape.default, _aten._unsafe_view.default: _aten.reshape.default}
_LAYOUT = PLACEMENT | {"memory_format", "non_blocking"}
_WHOLE = {"start": 0, "end": sys.maxsize}  # a slice's bounds where they bound nothing


def op_name(target: torch._ops.OpOverload) -> str:
    """`aten.add.Tensor`, `aten.linear`, `torch.mylib.op`."""
    namespace, _, name = target._schema.name.partition("::")
    prefix = namespace if namespace == "aten" else f"torch.{namespace}"
    overload = "" if target._overloadname == "default" else f".{target._overloadname}"
    return f"{prefix}.{name}{overload}"


class Builder:
    """Appends ops to a block. Arguments of calls hold values, dimensions and Python constants, nothing of torch's."""

    def __init__(self, block: Block, symbols: Symbols) -> None:
        self.block, self.symbols = block, symbols

    def type_of(self, result: Any) -> Type:
        """The type of a (fake) tensor or symbolic integer. Raises: TypeError, ValueError for what the IR lacks."""
        if isinstance(result, torch.Tensor):
            return TensorType(tuple(self.symbols.dim(size) for size in result.shape), from_torch(result.dtype))
        if isinstance(result, torch.SymInt):
            dim = self.symbols.dim(result)
            return SymType(dim if isinstance(dim, Sym) else Sym(str(dim)))
        raise TypeError(f"a result of type {type(result).__name__} has no place in a compiled graph")

    def call(
        self,
        target: torch._ops.OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        loc: Loc = UNKNOWN,
        name: str = "",
    ) -> Value | tuple[Value, ...]:
        """Append the op for one operator call; `result` is what it returned, as (fake) tensors.

        Returns: the op's result, or a tuple of them where the operator returns several.
        Raises: TypeError, ValueError, KeyError for what the IR cannot hold.
        """
        target = _scalar_overload(_plain(_RESHAPES.get(target, target)), args, kwargs)
        operands, attrs = self._bind(target, args, kwargs, loc)
        several = isinstance(result, list | tuple)
        types = [self.type_of(item) for item in (result if several else [result])]
        op = self.block.append(make(op_name(target), operands, types, attrs, loc=loc))
        for value in op.results:
            value.name = f"{name}_{value.index}" if several else name
        return op.results if several else op.result

    def _bind(
        self, target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], loc: Loc
    ) -> tuple[list[Argument], dict[str, Attr]]:
        operands, attrs = list[Argument](), dict[str, Attr]()
        for i, param in enumerate(target._schema.arguments):
            if param.name in _LAYOUT:
                continue
            given = args[i] if i < len(args) else kwargs.get(param.name, _DEFAULT)
            if is_tensor(param):
                operands.append(self._operand(None if given is _DEFAULT else given, loc))
            elif given is not _DEFAULT:
                if target is _aten.slice.Tensor and _WHOLE.get(param.name) == given:
                    continue
                attr = attribute(given)
                if not param.has_default_value() or attribute(param.default_value) != attr:
                    attrs[param.name] = attr
        while operands and operands[-1] is None:
            operands.pop()
        return operands, attrs

    def _operand(self, given: Any, loc: Loc) -> Argument:
        if given is None or isinstance(given, Value):
            return given
        if isinstance(given, list | tuple):
            items = (self._operand(item, loc) for item in given)
            return tuple(item for item in items if item is None or isinstance(item, Value))
        return self._number(given, loc)

    def _number(self, number: Any, loc: Loc) -> Value:
        """A number where an operator takes tensors only."""
        dtype = torch.get_default_dtype() if isinstance(number, float) else torch.bool
        if not isinstance(number, bool | float):
            dtype = torch.int64
        type = TensorType((), from_torch(dtype))
        attrs: dict[str, Attr] = {"size": (), "fill_value": attribute(number), "dtype": type.dtype}
        return self.block.append(make("aten.full", (), [type], attrs, loc=loc)).result


_DEFAULT: Any = object()


def attribute(value: Any) -> Attr:
    """A call's constant as an attribute. Raises: TypeError for what has no place in the text."""
    if isinstance(value, torch.dtype):
        return from_torch(value)
    if isinstance(value, list | tuple):
        return tuple(attribute(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} has no place in a compiled graph")


def _plain(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """`bitwise_and` for `__and__`: Python's operators have operators of torch beside them that say the same."""
    name = target._schema.name.removeprefix("aten::__").removesuffix("__")
    packet = getattr(_aten, f"bitwise_{name}", None) if target._schema.name.startswith("aten::__") else None
    return getattr(packet, target._overloadname, target)


def _scalar_overload(
    target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch._ops.OpOverload:
    """The overload that takes a number where the call gives one in the place of a tensor (`x + 1`)."""
    numbers = [
        i
        for i, param in enumerate(target._schema.arguments[: len(args)])
        if str(param.type) == "Tensor" and isinstance(args[i], int | float | Sym)
    ]
    if not numbers:
        return target
    packet = target.overloadpacket
    for overload in ("Scalar", "ScalarOther", "ScalarSelf", "Tensor_Scalar"):
        found = getattr(packet, overload, None)
        if found is None:
            continue
        params = found._schema.arguments
        fits = all(
            i < len(params) and ("Tensor" in str(params[i].type)) == (i not in numbers)
            for i, param in enumerate(target._schema.arguments[: len(args)])
            if "Tensor" in str(param.type)
        )
        if fits and all(key in {param.name for param in params} for key in kwargs):
            return found
    return target
