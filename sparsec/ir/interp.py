"""Runs a module with each op's reference: slow, plain, and what everything else is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from sparsec.diagnostics import CompileError
from sparsec.ir.core import Block, Func, Module, Op, Value
from sparsec.ir.derived import derivations, placement_tables
from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.opdef import OpDef, Peers
from sparsec.ir.printer import print_op
from sparsec.ir.ranks import Alone, run_together
from sparsec.ir.types import Dim, DType, HandleType, SymType, dims_of, evaluate

if TYPE_CHECKING:
    from torch import Tensor

Observer: TypeAlias = Callable[[Op, tuple[Any, ...]], None]
"""Is shown each op that ran, those in regions and callees too, and the values of its results."""

Override: TypeAlias = Mapping[Value, Any] | Callable[[Value, Any], Any]
"""Values to go on with in the place of computed ones; or a function of a value and what was computed for it."""

_TORCH_NAMES = {
    DType.f64: "float64",
    DType.f32: "float32",
    DType.f16: "float16",
    DType.bf16: "bfloat16",
    DType.f8E4M3FN: "float8_e4m3fn",
    DType.f8E5M2: "float8_e5m2",
    DType.i64: "int64",
    DType.i32: "int32",
    DType.i16: "int16",
    DType.i8: "int8",
    DType.ui8: "uint8",
    DType.i1: "bool",
    DType.c64: "complex64",
}


def evaluate_module(
    module: Module,
    inputs: Sequence[Tensor | int],
    weights: Mapping[str, Tensor],
    *,
    observer: Observer | None = None,
    override: Override | None = None,
) -> list[Any]:
    """Run `main` and give all its results in order: outputs, then new values of buffers.

    A module that is placed on several devices runs as all of them do, each on the same inputs, and gives the results of
    the first; it alone is observed.

    Args:
        module: a module that `verify_module` accepts.
        inputs: values of the arguments of kind `input` (or of no kind), in order: tensors, or ints for `sym<...>`.
        weights: values of the other arguments, by their `source`; derived ones are computed where they are missing.
        observer: is shown the results of every op.
        override: values to go on with in the place of computed ones, e.g. to force the same routing on two modules.

    Raises:
        CompileError: for inputs that do not fit the arguments, and where an op's result is not of its type.
    """
    ranks = devices(module) if any(op.dialect == "dist" for op in module.main.body.ops) else 1
    if ranks == 1:
        return _evaluate(module, inputs, weights, observer, override, Alone())
    return run_together(
        ranks,
        lambda peers: _evaluate(module, inputs, weights, None if peers.rank else observer, override, peers),
    )[0]


def evaluate_ranks(
    module: Module, inputs: Sequence[Sequence[Tensor | int]], weights: Mapping[str, Tensor]
) -> list[list[Any]]:
    """What each rank of a placed module gives for its own inputs, all ranks side by side in this process.

    Raises: CompileError, as of `evaluate_module`, for the first rank that fails.
    """
    if len(inputs) != devices(module):
        raise CompileError(f"the module is placed on {devices(module)} devices, there are inputs for {len(inputs)}")
    return run_together(len(inputs), lambda peers: _evaluate(module, inputs[peers.rank], weights, None, None, peers))


def devices(module: Module) -> int:
    """How many ranks run the module: its attribute `devices`, 1 where it has none."""
    count = module.attrs.get("devices", 1)
    return count if isinstance(count, int) else 1


def _evaluate(
    module: Module,
    inputs: Sequence[Tensor | int],
    weights: Mapping[str, Tensor],
    observer: Observer | None,
    override: Override | None,
    peers: Peers,
) -> list[Any]:
    import torch

    main = module.main
    given, args = iter(inputs), list[Any]()
    weights = DerivedWeights(module, weights, peers.rank)
    for arg in main.body.args:
        attrs = main.arg_attrs.get(arg, {})
        if attrs.get("kind", "input") == "input":
            value = next(given, None)
            if value is None:
                raise CompileError(f"@main takes more inputs than the {len(inputs)} given: %{arg.name} has none")
        else:
            try:
                value = weights[str(attrs.get("source"))]
            except KeyError as error:
                raise CompileError(f"no weight is named {error.args[0]!r} (for %{arg.name} of @main)") from None
        args.append(value)
    if next(given, None) is not None:
        raise CompileError(f"@main takes fewer inputs than the {len(inputs)} given")
    with torch.no_grad():
        return list(_Run(module, observer, override, peers).func(main, args))


class DerivedWeights(Mapping[str, "Tensor"]):
    """The weights that a module reads, by source: those given, and those derived from them.

    A derived weight is computed each time it is asked for and not kept, unless `given` has it, as an artifact does, or
    another one is computed of it, as packed banks are of their scales. Tables of a placement that are not given are
    those of an even one.

    Args:
        rank: of a placed module, whose local banks differ from rank to rank.
    """

    def __init__(self, module: Module, given: Mapping[str, Tensor], rank: int = 0) -> None:
        self.module, self.given, self.made = module, given, derivations(module)
        self.rank, self.tables = rank, placement_tables(module)
        self._read = {name for made in self.made.values() for name in made.of}
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, source: str) -> Tensor:
        made = self.made.get(source)
        if made is None or source in self.given:
            if source in self.tables and source not in self.given:
                return self.tables[source].even()
            return self.given[source]
        if source in self._kept:
            return self._kept[source]
        (value,) = evaluate_func(self.module, made.func, [self[name] for name in made.of], self.rank)
        if source in self._read:
            self._kept[source] = value
        return cast("Tensor", value)

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self.given), **dict.fromkeys(self.made), **dict.fromkeys(self.tables)})

    def __len__(self) -> int:
        return len(self.given.keys() | self.made.keys() | self.tables.keys())


def evaluate_func(module: Module, func: Func, args: Sequence[Tensor], rank: int = 0) -> tuple[Any, ...]:
    """What a function of a module returns for `args`. Raises: CompileError, as of `evaluate_module`."""
    import torch

    with torch.no_grad():
        return _Run(module, None, None, Alone(rank)).func(func, args)


class _Run:
    """One activation of a function or region: the `Env` that ops' references see."""

    def __init__(
        self,
        module: Module,
        observer: Observer | None,
        override: Override | None,
        peers: Peers,
        outer: _Run | None = None,
    ) -> None:
        self.module, self.observer, self.override, self.peers = module, observer, override, peers
        self.symbols: dict[str, int] = dict(outer.symbols) if outer is not None else {}
        self.local: set[str] = set()  # symbols that this activation bound: only those must agree
        self.deaths: dict[Block, list[tuple[Value, ...]]] = outer.deaths if outer is not None else {}

    def dim(self, dim: Dim) -> int:
        try:
            return evaluate(dim, self.symbols)
        except KeyError as error:
            raise CompileError(f"size {dim!r} needs {error.args[0]!r}, which no argument binds") from None

    def run(self, block: Block, args: Sequence[Any]) -> tuple[Any, ...]:
        return _Run(self.module, self.observer, self.override, self.peers, self).block(block, args)

    def call(self, name: str, args: Sequence[Any]) -> tuple[Any, ...]:
        callee = self.module.funcs.get(name)
        if callee is None:
            raise CompileError(f"@{name} is not in the module")
        inner = _Run(self.module, self.observer, self.override, self.peers)
        return inner.func(callee, [arg for arg in args if arg is not None])

    def func(self, func: Func, args: Sequence[Any]) -> tuple[Any, ...]:
        return self.block(func.body, args)

    def block(self, block: Block, args: Sequence[Any]) -> tuple[Any, ...]:
        if len(args) != len(block.args):
            raise CompileError(f"{len(args)} values for {len(block.args)} arguments", _place(block))
        values = dict(zip(block.args, args, strict=True))
        for arg, value in values.items():
            self.bind(arg, value)
        for arg, value in values.items():
            self.check(arg, value, None)
        for op, dead in zip(block.ops, self.dying(block), strict=True):
            operands = [values[operand] for operand in op.operands]
            for value in dead:
                del values[value]
            if op is block.ops[-1]:
                return tuple(operands)
            outputs = self.op(op, operands)
            values.update((result, out) for result, out in zip(op.results, outputs, strict=True) if result.users)
            del operands, outputs
        raise CompileError("a block without a terminator", _place(block))

    def op(self, op: Op, operands: list[Any]) -> tuple[Any, ...]:
        assert isinstance(op, OpDef)
        try:
            found = op.reference(self, *operands)
        except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            shapes = ", ".join(str(list(getattr(value, "shape", (value,)))) for value in operands)
            raise CompileError(f"'{op.name}' fails on ({shapes}): {error}\n{print_op(op)}", op.loc) from error
        outputs = tuple(found) if isinstance(found, (tuple, list)) else () if found is None else (found,)
        if len(outputs) != len(op.results):
            raise CompileError(f"'{op.name}' computes {len(outputs)} values for {len(op.results)} results", op.loc)
        if self.override is not None:
            outputs = tuple(map(self.overridden, op.results, outputs))
        for result, value in zip(op.results, outputs, strict=True):
            self.bind(result, value)
            self.check(result, value, op)
        if self.observer is not None:
            self.observer(op, outputs)
        return outputs

    def overridden(self, value: Value, computed: Any) -> Any:
        if callable(self.override):
            return self.override(value, computed)
        assert self.override is not None
        return self.override.get(value, computed)

    def dying(self, block: Block) -> list[tuple[Value, ...]]:
        """For each op, the values that it is the last to use (cached)."""
        if block not in self.deaths:
            seen, deaths = set[Value](), list[tuple[Value, ...]]()
            for op in reversed(block.ops):
                last = tuple(value for value in dict.fromkeys(op.operands) if value not in seen)
                seen.update(last)
                deaths.append(last)
            self.deaths[block] = deaths[::-1]
        return self.deaths[block]

    def bind(self, value: Value, actual: Any) -> None:
        """Bind the symbols that stand alone in a value's type, where they are not bound here yet."""
        for dim, size in _sizes(value, actual):
            if isinstance(dim, str) and dim.isidentifier() and dim not in self.local:
                is_argument = isinstance(value.owner, Block)
                if is_argument or dim not in self.symbols:
                    self.symbols[str(dim)] = size
                    self.local.add(str(dim))

    def check(self, value: Value, actual: Any, op: Op | None) -> None:
        """Raises: CompileError if a value is not of its type."""
        loc = op.loc if op is not None else UNKNOWN
        what = f"%{value.name}" if op is None else f"'{op.name}' result {value.index}"
        if isinstance(value.type, HandleType):
            return
        if isinstance(value.type, SymType):
            if not isinstance(actual, int):
                raise CompileError(f"{what} is a {type(actual).__name__}, {value.type} is an integer", loc)
        elif not hasattr(actual, "shape"):
            raise CompileError(f"{what} is a {type(actual).__name__}, not a {value.type}", loc)
        elif str(actual.dtype) != f"torch.{_TORCH_NAMES[value.type.dtype]}" or len(actual.shape) != value.type.rank:
            raise CompileError(f"{what} is {actual.dtype} of shape {list(actual.shape)}, not {value.type}", loc)
        for dim, size in _sizes(value, actual):
            if self.dim(dim) != size:
                is_known = isinstance(dim, int)
                why = f"{dim!r}" if is_known else f"{dim!r} = {self.dim(dim)}"
                raise CompileError(f"{what} has a size of {size} where {value.type} has {why}", loc)


def _sizes(value: Value, actual: Any) -> Iterator[tuple[Dim, int]]:
    if isinstance(value.type, SymType):
        yield value.type.expr, actual
    else:
        yield from zip(dims_of(value.type), getattr(actual, "shape", ()), strict=False)


def _place(block: Block) -> Loc:
    return block.parent.loc if block.parent is not None else UNKNOWN
