"""The least of a crash reproducer that still fails the same way: `sparsec opt crash.sparsec --reduce -o small.sparsec`.

Delta debugging (Zeller and Hildebrandt, IEEE TSE 28/2, 2002): results, ops of `main` and of regions, arguments,
functions and passes are taken away in pieces, large ones first, as long as the compiler fails with the same message,
less its numbers and the names of values. What an op computed is replaced by an earlier value of its type, in `main`
else by a new input.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sparsec import pipeline
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.ir.core import Block, Func, Module, Op, Value
from sparsec.ir.equal import clone_module, count_ops
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.ir.verify import problems
from sparsec.passes.base import Pass, parse_pipeline, print_pipeline
from sparsec.pipeline import Instrument

_VARYING = re.compile(r"%[\w.$-]+|\d+")


@dataclass(frozen=True)
class Reduced:
    """What is left.

    Args:
        module: still fails under `passes`.
        passes: the pipeline; the failing pass is its last.
        message: of the failure.
        ops_before: ops of the module given, those in regions included.
        ops: ops of `module`.
        tries: how many candidates were compiled.
    """

    module: Module
    passes: tuple[Pass, ...]
    target: str
    message: str
    ops_before: int
    ops: int
    tries: int

    @property
    def text(self) -> str:
        """A reproducer, which `sparsec opt` runs as it is."""
        head = [*self.message.splitlines(), f"pipeline: {print_pipeline(self.passes)}", f"target: {self.target}"]
        return "".join(f"// {line}\n" for line in head) + "\n" + print_module(self.module)


def reduce(
    module: Module,
    passes: str,
    target: str,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> Reduced:
    """Make a failing module smaller.

    Args:
        passes: the pipeline that fails on it.
        seconds: after which what is smallest so far is returned.

    Raises: SparsecError if it does not fail.
    """
    todo = parse_pipeline(passes)
    message = _failure(module, todo, target)
    if message is None:
        raise SparsecError(f"the module does not fail under --passes '{passes}': there is nothing to reduce")
    end = clock() + seconds
    search = _Search(clone_module(module), todo, target, _alike(message), lambda: clock() < end)
    search.run()
    left = search.module
    if _alike(_failure(parse_module(print_module(left)), search.passes, target)) != search.alike:
        raise SparsecError("what is left fails otherwise once it is written and read: the failure is not in the text")
    said = _failure(left, search.passes, target) or message
    return Reduced(left, search.passes, target, said, count_ops(module), count_ops(left), search.tries)


class _Quiet(Instrument):
    """Keeps failures from writing reproducers."""

    def fail(self, reproducer: str) -> Path | None:
        return Path("reduced")


def _failure(module: Module, passes: tuple[Pass, ...], target: str) -> str | None:
    """What the compiler says of the module; None if it has nothing to say."""
    try:
        pipeline.run_passes(clone_module(module), passes, target=target, instruments=[_Quiet()])
    except CompileError as error:
        return error.diagnostics[0].message
    return None


def _alike(message: str | None) -> str | None:
    """A message less what changes when ops vanish."""
    return None if message is None else _VARYING.sub("#", message.splitlines()[0] if message else "")


@dataclass
class _Search:
    """Takes away what can be taken away from `module` while the failure stays and `going` says that there is time."""

    module: Module
    passes: tuple[Pass, ...]
    target: str
    alike: str | None
    going: Callable[[], bool]
    tries: int = 0
    sound: bool = field(init=False)  #: a module that was sound must stay so; one that was not fails for that reason

    def __post_init__(self) -> None:
        self.sound = not any(problems(self.module))

    def run(self) -> None:
        """Until nothing more can go, or the time is over."""
        left: tuple[int, ...] = ()
        while self.going() and left != (size := (len(self.passes), *_size(self.module))):
            left = size
            self._passes()
            self._pieces(lambda m: len(m.main.body.terminator.operands), _drop_results)
            self._pieces(lambda m: len(m.main.body.ops) - 1, _drop_ops)
            for place in range(sum(1 for _ in _regions(self.module))):
                self._pieces(partial(_inner, place=place), partial(_drop_at, place=place))
            self._pieces(lambda m: len(m.main.body.args), _drop_args)
            self._pieces(lambda m: len(m.funcs), _drop_funcs)

    def _fails(self, module: Module, passes: tuple[Pass, ...]) -> bool:
        self.tries += 1
        if self.sound and any(problems(module)):
            return False
        return _alike(_failure(module, passes, self.target)) == self.alike

    def _passes(self) -> None:
        """Leave out passes in front of the one that fails."""
        for i in reversed(range(len(self.passes) - 1)):
            fewer = (*self.passes[:i], *self.passes[i + 1 :])
            if self.going() and self._fails(self.module, fewer):
                self.passes = fewer

    def _pieces(self, count: Callable[[Module], int], drop: Callable[[Module, Collection[int]], None]) -> None:
        """Drop items, numbered from 0, in ever smaller pieces; from the end, since what is unused lies there."""
        size = count(self.module)
        while size >= 1 and self.going():
            stop = count(self.module)
            while stop > 0 and self.going():
                start = max(0, stop - size)
                candidate = clone_module(self.module)
                drop(candidate, range(start, stop))
                if _size(candidate) < _size(self.module) and self._fails(candidate, self.passes):
                    self.module = candidate
                stop = start
            size //= 2


def _size(module: Module) -> tuple[int, ...]:
    """What is to shrink, first things first."""
    main = module.main.body
    return count_ops(module), len(module.funcs), len(main.terminator.operands), len(main.args)


def _drop_results(module: Module, gone: Collection[int]) -> None:
    main = module.main
    returned = main.body.terminator
    kept = [i for i in range(len(returned.operands)) if i not in gone]
    returned.operands = tuple(returned.operands[i] for i in kept)
    main.result_attrs = {new: main.result_attrs[old] for new, old in enumerate(kept) if old in main.result_attrs}


def _drop_ops(module: Module, gone: Collection[int]) -> None:
    main = module.main
    for op in [main.body.ops[i] for i in gone]:
        _replace(op, lambda value: _new_input(main, value))


def _inner(module: Module, place: int) -> int:
    """How many ops of a region may go."""
    return len(_region(module, place).ops) - 1 if _has(module, place) else 0


def _drop_at(module: Module, gone: Collection[int], place: int) -> None:
    _drop_inner(_region(module, place), gone)


def _drop_inner(block: Block, gone: Collection[int]) -> None:
    for op in [block.ops[i] for i in gone]:
        _replace(op, lambda value: None)


def _replace(op: Op, otherwise: Callable[[Value], Value | None]) -> None:
    """Take an op away, if each of its results that is used has something to stand for it."""
    block = op.block
    assert block is not None
    before = block.ops[: block.ops.index(op)]
    known = [*(value for other in reversed(before) for value in other.results), *block.args]
    instead = dict[Value, Value]()
    for result in op.results:
        if not result.users:
            continue
        other = next((value for value in known if value.type == result.type), None) or otherwise(result)
        if other is None:
            return
        instead[result] = other
    for result, other in instead.items():
        result.replace_by(other)
    op.erase()


def _new_input(main: Func, value: Value) -> Value:
    made = main.body.add_arg(value.type, value.name)
    main.arg_attrs[made] = {"kind": "input"}
    return made


def _drop_args(module: Module, gone: Collection[int]) -> None:
    main = module.main
    for arg in [main.body.args[i] for i in gone]:
        if not arg.users:
            main.arg_attrs.pop(arg, None)
            main.body.remove_arg(arg)


def _drop_funcs(module: Module, gone: Collection[int]) -> None:
    names = list(module.funcs)
    for name in [names[i] for i in gone if names[i] != "main"]:
        del module.funcs[name]


def _regions(module: Module) -> Iterator[Block]:
    """The regions of all functions; in kernels, which hold one op, they are all that can shrink."""
    for op in module.walk():
        yield from op.regions


def _region(module: Module, place: int) -> Block:
    return list(_regions(module))[place]


def _has(module: Module, place: int) -> bool:
    return place < sum(1 for _ in _regions(module))
