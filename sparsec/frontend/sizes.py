"""Sizes that tracing took for granted: dimensions that the model's code has fixed, and equations between them."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

from sparsec.diagnostics import CompileError, Diagnostic
from sparsec.frontend import locations, rewrites
from sparsec.ir.core import Module
from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.types import Sym, TensorType, evaluate

_SIZE = re.compile(r"L\['(\w+)'\]((?:\[[^][]+\])*)\.size\(\)\[(\d+)\]")
_SHAPE = re.compile(r"\w+(?:\[[^][]+\])*\.shape\[\d+\]")
_FIXED = re.compile(rf"{_SHAPE.pattern} == \d+")
_EQUAL = re.compile(rf"{_SHAPE.pattern} == {_SHAPE.pattern}")

Places = dict[int, tuple[Any, Loc]]
"""The user's line at which torch decided something about sizes, by the identity of torch's note of it."""


@contextmanager
def noting_places() -> Generator[Places, None, None]:
    """Note the user's line of every decision about sizes, where torch lets us."""
    places: Places = {}
    original: Any = getattr(ShapeEnv, "_get_sloc", None)
    if original is None:
        yield places
        return

    def noted(self: ShapeEnv, framework_loc: str | None = None) -> Any:
        note = original(self, framework_loc)
        places[id(note)] = note, locations.here()
        return note

    ShapeEnv._get_sloc = noted  # type: ignore[method-assign]
    try:
        yield places
    finally:
        ShapeEnv._get_sloc = original  # type: ignore[method-assign]


def checked(program: ExportedProgram, module: Module, places: Places, asked: Any) -> list[Diagnostic]:
    """Warnings of sizes that the program takes for granted.

    Args:
        asked: the caller's `dynamic`: True, or a specification of open dimensions, which is then to be kept.

    Raises: CompileError where a dimension that the caller wants open is not.
    """
    lines = _Lines(program, places)
    found = _fixed(module, lines) if asked is True else []
    equations = _equations(program)
    if not found and equations:
        shown = " and ".join(equations[:3])
        loc = next(filter(None, (lines.of(name) for name in _SHAPE.findall(equations[0]))), UNKNOWN)
        change = rewrites.exact_classes([loc.source])
        found.append(
            Diagnostic(
                f"the model's code depends on sizes of its inputs: it was captured for {shown}",
                loc,
                severity="warning",
                excerpt=change.excerpt if change else "",
                notes=(f"and {len(equations) - 3} more such equations",) if len(equations) > 3 else (),
                hint=change.why if change else "use it for sizes that satisfy this only",
            )
        )
        if asked is not True and Dim.AUTO not in tree_leaves(asked) and tied(program):
            raise CompileError(
                f"dimensions that should stay open are tied by the model's code: {shown}",
                loc,
                hint="let Dim.AUTO stand for them to get a model for such sizes only",
            )
    return found


def tied(program: ExportedProgram) -> bool:
    """Whether a program takes more for granted than that two sizes are equal, which its types say."""
    return not all(_EQUAL.fullmatch(equation) for equation in _equations(program))


class _Lines:
    """Finds the user's line that made a decision about a size."""

    def __init__(self, program: ExportedProgram, places: Places) -> None:
        values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
        envs = (mode.shape_env for value in values if (mode := getattr(value, "fake_mode", None)) is not None)
        env: Any = next(envs, None)
        symbols: dict[str, Any] = getattr(env, "source_to_var", {})
        self.symbols = {_SIZE.sub(r"\1\2.shape[\3]", str(source)): symbol for source, symbol in symbols.items()}
        self.guards = [
            (guard.expr.free_symbols, places[id(guard.sloc)][1])
            for guard in getattr(env, "guards", [])
            if id(guard.sloc) in places and guard.expr.is_Relational and guard.expr.rel_op == "=="
        ]

    def of(self, size: str) -> Loc:
        """The line that first equated a size, `x.shape[0]`, with something."""
        symbol = self.symbols.get(size)
        return next((loc for names, loc in self.guards if symbol in names and loc), UNKNOWN)


def _fixed(module: Module, lines: _Lines) -> list[Diagnostic]:
    """The batch and sequence dimensions of integer inputs, and first of others, that the model's code has fixed."""
    found = list[Diagnostic]()
    for arg in module.main.body.args:
        if module.main.arg_attrs[arg]["kind"] != "input" or not isinstance(arg.type, TensorType):
            continue
        for dim, size in enumerate(arg.type.shape[: 1 if arg.type.dtype.is_float else 2]):
            if isinstance(size, int):
                loc = lines.of(f"{arg.name}.shape[{dim}]")
                found.append(
                    Diagnostic(
                        f"dimension {dim} of '{arg.name}' is fixed to {size}: the model's code depends on this size",
                        loc,
                        severity="warning",
                        hint="" if loc else "TORCH_LOGS=+dynamic shows where",
                    )
                )
    return found


def _equations(program: ExportedProgram) -> list[str]:
    """Equations between sizes that tracing took for granted, less those that say a size or hold for all."""
    guards: list[str] = getattr(program, "_guards_code", None) or []  # newer than the oldest torch that we run on
    equations = [_SIZE.sub(r"\1\2.shape[\3]", guard) for guard in guards if " == " in guard]
    fixed = {name: int(size) for name, size in (e.split(" == ") for e in equations if _FIXED.fullmatch(e))}
    return [text for text in equations if not _FIXED.fullmatch(text) and not _always(text, fixed)]


def _always(equation: str, fixed: Mapping[str, int]) -> bool:
    """Whether an equation holds for any sizes beside the fixed ones (tried with a few): then it says nothing."""
    names = sorted(set(_SHAPE.findall(equation)))
    for i, name in enumerate(names):
        equation = equation.replace(name, f"n{i}")
    left, _, right = equation.lower().partition(" == ")
    tries = [
        {f"n{i}": fixed.get(name, 2 + (7 * i + 5 * step) % 11) for i, name in enumerate(names)} for step in range(6)
    ]
    try:
        return all(evaluate(Sym(left.strip()), env) == evaluate(Sym(right.strip()), env) for env in tries)
    except (ValueError, SyntaxError, KeyError, ZeroDivisionError):
        return False
