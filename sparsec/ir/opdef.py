"""Typed op classes: one documented class per op, and the registry that finds it by name.

    class Group(OpDef, name="moe.group"):
        '''Sort the (token, slot) pairs by expert.'''

        ids: Operand          #: [tokens, k]
        order: Result         #: [tokens * k], i32
        offsets: Result       #: [num_experts + 1], i32
        num_experts: int

Annotations declare operands, results, regions and attributes in the order that the text form shows them. A class
attribute that is not annotated so is ordinary Python. `OptOperand` may be `none`; `HandleOperand` and `HandleResult`
are of type `handle`, as no `Operand` or `Result` is; `Operands` and `Results` take the rest and come last of their
kind, as does `OptBody`, a region that may be left out. An attribute with a value in the class is optional, and that
value is its default.
"""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsec.ir.core import Argument, Attr, Block, Op, Value, flatten
from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.types import Dim, Type

Operand: TypeAlias = Value
OptOperand: TypeAlias = Value | None
Operands: TypeAlias = tuple[Value, ...]
HandleOperand: TypeAlias = Value
Result: TypeAlias = Value
HandleResult: TypeAlias = Value
Results: TypeAlias = tuple[Value, ...]
Body: TypeAlias = Block
OptBody: TypeAlias = Block | None

_OPERANDS = ("Operand", "HandleOperand", "OptOperand", "Operands")
_RESULTS = ("Result", "HandleResult", "Results")
_KINDS = {*_OPERANDS, *_RESULTS, "Body", "OptBody"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of an op moves and computes: `bytes` read and written in memory, `flops` (a multiply-add is 2)."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


class Env(Protocol):
    """What an op's reference may ask of whoever evaluates it."""

    def dim(self, dim: Dim) -> int:
        """The value of a dimension in this run."""
        ...

    def run(self, block: Block, args: Sequence[Any]) -> tuple[Any, ...]:
        """What a region yields for `args`."""
        ...

    def call(self, name: str, args: Sequence[Any]) -> tuple[Any, ...]:
        """What another function of the module returns for `args`."""
        ...

    @property
    def peers(self) -> Peers:
        """The ranks that run the same program."""
        ...


class Peers(Protocol):
    """Ranks that run one program together, as one of them sees them."""

    rank: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, by rank; every rank must call it, in the same order."""
        ...


@dataclass(frozen=True, slots=True)
class Fields:
    """An op class's declaration, by kind, in order."""

    operands: dict[str, str]
    results: dict[str, str]
    regions: tuple[str, ...]
    required_regions: int
    attrs: dict[str, Any]  # name -> resolved annotation
    defaults: dict[str, Attr]


class OpDef(Op):
    """Base of every op class. Subclass with `name="dialect.op"` to declare and register an op."""

    __slots__ = ()
    op_name: ClassVar[str] = ""
    pure: ClassVar[bool] = True  #: no effect but its results: may be removed, merged and reordered
    _declared: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not name:
            return
        cls.op_name = name
        cls._declared = {field: str(kind) for field, kind in inspect.get_annotations(cls).items()}
        counts = {"operand": 0, "result": 0, "region": 0}
        for field, kind in cls._declared.items():
            if kind.startswith("ClassVar"):
                continue
            default = cls.__dict__.get(field, _REQUIRED)
            setattr(cls, field, _accessor(field, kind, counts, default))
            if kind not in _KINDS and default is not _REQUIRED:
                _DEFAULTS.setdefault(cls, {})[field] = default
        REGISTRY[name] = cls

    def __init__(
        self,
        operands: Sequence[Argument] = (),
        result_types: Iterable[Type] | None = None,
        attrs: Mapping[str, Attr] | None = None,
        regions: Iterable[Block] = (),
        loc: Loc = UNKNOWN,
        name: str = "",
    ) -> None:
        """Make the op. `operands` may hold `None` and tuples; without `result_types` they are inferred."""
        flat, segments = flatten(operands)
        super().__init__(name or self.op_name, flat, (), attrs, regions, loc, segments)
        types_ = self.infer() if result_types is None else tuple(result_types)
        self.results = tuple(Value(type, self, i) for i, type in enumerate(types_))

    @classmethod
    def fields(cls) -> Fields:
        """The declaration of this op, with resolved annotations (cached)."""
        if cls not in _FIELDS:
            hints = get_type_hints(cls)
            kinds = {field: kind for field, kind in cls._declared.items() if not kind.startswith("ClassVar")}
            _FIELDS[cls] = Fields(
                operands={f: k for f, k in kinds.items() if k in _OPERANDS},
                results={f: k for f, k in kinds.items() if k in _RESULTS},
                regions=tuple(f for f, k in kinds.items() if k in ("Body", "OptBody")),
                required_regions=sum(k == "Body" for k in kinds.values()),
                attrs={f: hints[f] for f, k in kinds.items() if k not in _KINDS},
                defaults=_DEFAULTS.get(cls, {}),
            )
        return _FIELDS[cls]

    def infer(self) -> tuple[Type, ...]:
        """Result types from operands and attributes."""
        raise TypeError(f"'{self.name}' cannot infer its result types: give them")

    def verify(self) -> Iterator[str]:
        """Every problem of this op beyond its declared shape, in words."""
        return iter(())

    def cost(self, env: Mapping[str, int]) -> Cost | None:
        """Bytes and flops for the symbol values in `env`; None where nobody knows."""
        return None

    def reference(self, env: Env, *args: Any) -> Any:
        """What the op computes, in plain torch: a tensor, or a tuple of them. The oracle for everything else."""
        raise NotImplementedError(f"'{self.name}' has no reference")


_REQUIRED: Any = object()
_DEFAULTS: dict[type[OpDef], dict[str, Attr]] = {}
_FIELDS: dict[type[OpDef], Fields] = {}
REGISTRY: dict[str, type[OpDef]] = {}


class DialectFallback(Protocol):
    """Makes an op of a dialect that is not listed op by op (`aten`); None if there is no such op."""

    def __call__(self, name: str) -> type[OpDef] | None: ...


FALLBACKS: dict[str, DialectFallback] = {}
FALLBACK_NAMES: dict[str, Callable[[], list[str]]] = {}  #: the ops such a dialect has, for "did you mean"


def _accessor(field: str, kind: str, counts: dict[str, int], default: Any) -> property:
    """A property that reads one declared field."""
    if kind in _OPERANDS:
        i = counts["operand"]
        counts["operand"] += 1
        if kind == "Operands":
            return property(lambda op: op.arguments[i:])
        return property(lambda op: op.arguments[i] if i < len(op.arguments) else None)
    if kind in _RESULTS:
        i = counts["result"]
        counts["result"] += 1
        return property(lambda op: op.results[i:]) if kind == "Results" else property(lambda op: op.results[i])
    if kind in ("Body", "OptBody"):
        i = counts["region"]
        counts["region"] += 1
        if kind == "Body":
            return property(lambda op: op.regions[i])
        return property(lambda op: op.regions[i] if i < len(op.regions) else None)
    if default is _REQUIRED:
        return property(lambda op: op.attrs[field])
    return property(lambda op: op.attrs.get(field, default))


OpT = TypeVar("OpT", bound=OpDef)


def lookup(name: str) -> type[OpDef]:
    """The class of op `name`. Raises: KeyError with a sentence that says what there is instead."""
    if (found := REGISTRY.get(name)) is not None:
        return found
    dialect = name.partition(".")[0]
    if (fallback := FALLBACKS.get(dialect)) is not None and (found := fallback(name)) is not None:
        return found
    known = sorted(REGISTRY)
    dialects = sorted({op.partition(".")[0] for op in known} | set(FALLBACKS))
    if dialect not in dialects:
        raise KeyError(f"unknown dialect '{dialect}' (there are: {', '.join(dialects)})")
    if dialect in FALLBACK_NAMES:
        known += FALLBACK_NAMES[dialect]()
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    raise KeyError(f"unknown op '{name}'" + (f"; did you mean '{close[0]}'?" if close else ""))


def make(
    name: str,
    operands: Sequence[Argument] = (),
    result_types: Iterable[Type] | None = None,
    attrs: Mapping[str, Attr] | None = None,
    regions: Iterable[Block] = (),
    loc: Loc = UNKNOWN,
) -> OpDef:
    """An op by name. Raises: KeyError for an unknown one."""
    return lookup(name)(operands, result_types, attrs, regions, loc, name)


def check_attr(value: Attr, annotation: Any) -> bool:
    """Whether an attribute's value fits its declared type (bool is no int; an int is a fine float)."""
    origin = get_origin(annotation)
    if annotation is Any or isinstance(annotation, TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(check_attr(value, arm) for arm in get_args(annotation))
    if origin is Literal:
        return value in get_args(annotation)
    if origin is tuple:
        element = get_args(annotation)[0]
        return isinstance(value, tuple) and all(check_attr(item, element) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if annotation is type(None):
        return value is None
    if annotation in (int, float):
        return isinstance(value, annotation | int) and not isinstance(value, bool)
    if annotation is str:
        return type(value) is str
    return isinstance(value, annotation)


def declared_problems(op: OpDef) -> Iterator[str]:
    """What in an op differs from its class's declaration: counts of operands, results, regions; attributes."""
    fields = op.fields()
    if fields.operands or fields.results or fields.regions or fields.attrs:
        yield from _count("operand", fields.operands, [a is not None for a in op.arguments])
        yield from _count("result", fields.results, [True] * len(op.results))
        if not fields.required_regions <= len(op.regions) <= len(fields.regions):
            yield f"needs {len(fields.regions)} regions ({', '.join(fields.regions)}), has {len(op.regions)}"
        for name, annotation in fields.attrs.items():
            if name not in op.attrs:
                if name not in fields.defaults:
                    yield f"needs attribute '{name}: {_spell(annotation)}'"
            elif not check_attr(op.attrs[name], annotation):
                yield f"attribute '{name}' is {op.attrs[name]!r}, not of type {_spell(annotation)}"
        for name in op.attrs:
            if name not in fields.attrs:
                close = difflib.get_close_matches(name, fields.attrs, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else f" (it has: {', '.join(fields.attrs) or 'none'})"
                yield f"has no attribute '{name}'{hint}"


def _count(what: str, declared: Mapping[str, str], present: list[bool]) -> Iterator[str]:
    names, kinds = list(declared), list(declared.values())
    open_ended = bool(kinds) and kinds[-1] in ("Operands", "Results")
    required = [n for n, k in declared.items() if k in ("Operand", "HandleOperand", "Result", "HandleResult")]
    missing = [n for i, n in enumerate(names) if n in required and not (i < len(present) and present[i])]
    if missing:
        yield f"lacks {what} {', '.join(repr(n) for n in missing)}"
    if not open_ended and len(present) > len(names):
        yield f"has {len(present)} {what}s, takes at most {len(names)} ({', '.join(names)})"


def _spell(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
