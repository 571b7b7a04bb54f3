"""The dense rest: every operator of PyTorch, as `aten.NAME[.OVERLOAD]`, legal where torch's own schema says so.

Operators of other libraries are `torch.NAMESPACE.NAME[.OVERLOAD]`. Tensor parameters are operands in schema order
(lists in brackets, absent ones before the last as `none`); every other parameter is an attribute under its schema
name, left out where it equals the default. Sizes are ints or symbols; dtypes are types (`dtype = bf16`). Parameters
that name a device, layout or memory pinning are never written: the target decides.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from sparsec.dialects.dtypes import to_torch
from sparsec.ir.core import Argument, Attr, Value
from sparsec.ir.opdef import FALLBACK_NAMES, FALLBACKS, Cost, Env, OpDef
from sparsec.ir.types import DType, Sym, TensorType, evaluate, product

if TYPE_CHECKING:
    import torch

PLACEMENT = frozenset({"device", "layout", "pin_memory"})  # parameters the target decides


@cache
def overload(name: str) -> torch._ops.OpOverload | None:
    """The operator behind an op name: `aten.add.Tensor`, `aten.linear`, `torch.mylib.op`. None if torch has none."""
    import torch

    parts = name.split(".")
    if parts[0] == "torch":
        parts = parts[1:]
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isidentifier() for part in parts):
        return None
    packet = getattr(getattr(torch.ops, parts[0], None), parts[1], None)
    found = getattr(packet, parts[2] if len(parts) == 3 else "default", None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def operator_names() -> list[str]:
    """Every operator that torch knows now, under its name here."""
    import torch

    found = list[str]()
    for schema in torch._C._jit_get_all_schemas():
        dialect, _, op = schema.name.partition("::")
        name = f"{dialect}.{op}" if dialect == "aten" else f"torch.{dialect}.{op}"
        found.append(f"{name}.{schema.overload_name}" if schema.overload_name else name)
    return found


@cache
def is_tensor(param: torch.Argument) -> bool:
    """Whether a schema parameter takes tensors (one, an optional one, a list)."""
    return "Tensor" in str(param.type)


def parameters(name: str) -> tuple[torch.Argument, ...]:
    """The schema parameters of an op that exists, less those that the target decides."""
    found = overload(name)
    assert found is not None
    return tuple(param for param in found._schema.arguments if param.name not in PLACEMENT)


class AtenOp(OpDef):
    """Base of the classes made on demand, one per operator."""

    __slots__ = ()

    @property
    def target(self) -> torch._ops.OpOverload:
        found = overload(self.name)
        assert found is not None
        return found

    def bound(self) -> Iterator[tuple[torch.Argument, Argument | Attr]]:
        """Each schema parameter that is given, with its operand (a value, None, a tuple) or attribute."""
        arguments = list(self.arguments)
        for param in parameters(self.name):
            if is_tensor(param):
                is_list = "List" in str(param.type)
                if is_list and arguments and not isinstance(arguments[0], tuple):
                    yield param, cast(Argument, tuple(arguments))  # a lone list needs no brackets
                    arguments = []
                elif arguments:
                    yield param, arguments.pop(0)
                elif not param.has_default_value() and "Optional" in str(param.type):
                    yield param, None  # trailing ones are not written
            elif param.name in self.attrs:
                yield param, self.attrs[param.name]

    def verify(self) -> Iterator[str]:
        # What the schema says depends on this alone, and most ops of a model are alike.
        attrs = tuple((key, _kind(value)) for key, value in self.attrs.items())
        key = (self.name, attrs, self.segments or len(self.operands), len(self.results))
        if key in _SOUND:
            return iter(())
        found = list(self._schema_problems())
        if not found:
            _SOUND.add(key)
        return iter(found)

    def _schema_problems(self) -> Iterator[str]:
        names = [param.name for param in parameters(self.name)]
        given = {param.name for param, _ in self.bound()}
        for param in parameters(self.name):
            if param.name not in given and not param.has_default_value() and "Optional" not in str(param.type):
                yield f"needs {'operand' if is_tensor(param) else 'attribute'} '{param.name}' ({self.target._schema})"
        taken = sum(1 for param, _ in self.bound() if is_tensor(param))
        takes_list = any(is_tensor(param) and "List" in str(param.type) for param in parameters(self.name))
        if len(self.arguments) > taken and not (takes_list and self.segments is None):
            yield f"has {len(self.arguments)} operands, takes at most {taken} ({self.target._schema})"
        for name in self.attrs:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                yield f"has no attribute '{name}'" + (
                    f"; did you mean '{close[0]}'?" if close else f" ({self.target._schema})"
                )
        for param, value in self.bound():
            if not is_tensor(param) and not _fits(value, str(param.real_type)):
                yield f"attribute '{param.name}' is {value!r}, not of type {param.real_type} ({self.target._schema})"
        expected = len(self.target._schema.returns)
        is_list = any("List" in str(ret.type) for ret in self.target._schema.returns)
        if not is_list and len(self.results) != expected:
            yield f"has {len(self.results)} results, the operator returns {expected}"

    def cost(self, env: Mapping[str, int]) -> Cost | None:
        returns = self.target._schema.returns
        if returns and returns[0].alias_info is not None:
            return Cost(0, 0)  # a view
        kind = self.name.split(".")[1]
        results = sum(_bytes(value, env) for value in self.results)
        operands = dict.fromkeys(self.operands)
        if kind in _LOOKUPS:  # reads as many elements of the table as it returns
            table = self.operands[_LOOKUPS[kind]]
            return Cost(2 * results + sum(_bytes(value, env) for value in operands if value is not table), 0)
        moved = results + sum(_bytes(value, env) for value in operands)
        out = self.results[0].type if self.results else None
        if not isinstance(out, TensorType):
            return Cost(moved, 0)
        size = evaluate(product(out.shape), env)
        if kind == "scaled_dot_product_attention":
            queries, keys = (self.operands[i].tensor for i in range(2))
            pairs = evaluate(product(queries.shape), env) + size  # once along each head's size, in and out
            return Cost(moved, 2 * pairs * evaluate(keys.shape[-2], env))
        contracted = {"linear": 0, "mm": 0, "addmm": 1, "bmm": 0, "matmul": 0}.get(kind)
        if contracted is None:
            return Cost(moved, size)
        return Cost(moved, 2 * size * evaluate(self.operands[contracted].tensor.shape[-1], env))

    def reference(self, env: Env, *args: Any) -> Any:
        values = iter(args)
        positional, keywords = list[Any](), dict[str, Any]()
        for param, given in self.bound():
            value = _fill(given, values) if is_tensor(param) else concrete(cast(Attr, given), env)
            if param.kwarg_only:
                keywords[param.name] = value
            else:
                positional.append((param.name, value))
        names = [param.name for param in self.target._schema.arguments if not param.kwarg_only]
        in_order = [name for name, _ in positional] == names[: len(positional)]
        if in_order:
            return self.target(*[value for _, value in positional], **keywords)
        return self.target(**dict(positional), **keywords)


_LOOKUPS = {"embedding": 0, "index_select": 0, "gather": 0, "index": 0}  # where their table stands among the operands


def _bytes(value: Value, env: Mapping[str, int]) -> int:
    type = value.type
    return evaluate(product(type.shape), env) * type.dtype.itemsize if isinstance(type, TensorType) else 0


_SCALARS: dict[str, tuple[type, ...]] = {  # schema type -> what an attribute of it may be
    "bool": (bool,),
    "int": (int, Sym),
    "float": (float, int, Sym),
    "number": (bool, int, float, Sym),
    "str": (str,),
    "ScalarType": (DType,),
}


def _kind(value: Attr) -> object:
    """What of an attribute decides whether it fits its type."""
    return frozenset(map(type, value)) if isinstance(value, tuple) else type(value)


def _fits(value: Any, kind: str) -> bool:
    """Whether an attribute can be given for a parameter of a schema type; a lone value may stand for a list."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[9:-1])
    if kind.startswith("List["):
        return all(_fits(item, kind[5:-1]) for item in (value if isinstance(value, tuple) else (value,)))
    return kind not in _SCALARS or type(value) in _SCALARS[kind]


def _fill(argument: Any, values: Iterator[Any]) -> Any:
    """The structure of an argument with run-time values in the place of IR values."""
    if argument is None:
        return None
    if isinstance(argument, tuple):
        return [_fill(item, values) for item in argument]
    return next(values)


def concrete(attr: Attr, env: Env) -> Any:
    """An attribute as torch takes it: symbols evaluated, dtypes translated."""
    if isinstance(attr, Sym):
        return env.dim(attr)
    if isinstance(attr, DType):
        return to_torch(attr)
    if isinstance(attr, tuple):
        return [concrete(item, env) for item in attr]
    return attr


@cache
def _aten_class(name: str) -> type[OpDef] | None:
    found = overload(name)
    if found is None:
        return None
    doc = f"PyTorch's `{found._schema}`."
    cls = type("AtenOp_" + name.replace(".", "_"), (AtenOp,), {"__doc__": doc, "__slots__": ()})
    cls.op_name = name  # type: ignore[attr-defined]
    cls.pure = not found._schema.is_mutable and not is_random(found)  # type: ignore[attr-defined]
    return cls


def is_random(op: torch._ops.OpOverload) -> bool:
    """Whether two runs of an operator may differ."""
    import torch

    return torch.Tag.nondeterministic_seeded in op.tags


_SOUND: set[tuple[object, ...]] = set()  # shapes of ops that were found to be as their schema says

FALLBACKS["aten"] = _aten_class
FALLBACKS["torch"] = _aten_class
FALLBACK_NAMES["aten"] = FALLBACK_NAMES["torch"] = operator_names
