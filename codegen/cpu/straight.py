"""Ops one after the other on registers: what activations are, and the bodies of the loops of a row."""

from __future__ import annotations

from sparsec.codegen.cpu.lanes import KINDS, Lanes, unsupported
from sparsec.codegen.cpu.nonlinear import RULES
from sparsec.codegen.cpu.pointwise import CONSTANTS, SAME, Operands, constant, write
from sparsec.ir.core import Op
from sparsec.ir.loc import Loc

_SHAPES = frozenset(
    f"aten.{name}" for name in ["expand", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze.dim", "squeeze"]
)


def alias(op: Op, operands: Operands) -> Lanes | None:
    """The lanes that an op gives without computing: an operand's, or a number; None if it computes."""
    dtype = op.results[0].tensor.dtype
    if op.name in CONSTANTS and dtype in KINDS:
        return Lanes("", dtype, constant(op))
    if op.name in SAME and (lanes := operands[-1]) is not None and lanes.dtype is dtype:
        return lanes
    if op.name in _SHAPES and (lanes := operands[0]) is not None and not lanes.text:
        return lanes
    return None


def pointwise(op: Op, operands: Operands, rounds: bool) -> str:
    """The text of the first result of an op. Raises: CompileError."""
    if op.name in SAME and (lanes := operands[-1]) is not None:
        return lanes.vector(KINDS[op.results[0].tensor.dtype])
    if op.name not in RULES:
        raise unsupported(op, "it is not among the row-local ops that kernels are built of")
    if any(result.users for result in op.results[1:]):
        raise unsupported(op, "only its first result is computed")
    return write(op, operands, rounds)


class Comments:
    """The user's lines as comments, each once where several ops in a row come of it."""

    def __init__(self) -> None:
        self.last = ""

    def of(self, loc: Loc) -> list[str]:
        """No line, or one."""
        source = " ".join(loc.source.split()).rstrip("\\")
        comment = f"// {source}   {loc}" if source else f"// {loc}"
        if not loc or comment == self.last:
            return []
        self.last = comment
        return [comment]
