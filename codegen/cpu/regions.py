"""From regions of the IR to C++ functions: activations on registers, routers and tails on a row in the stack."""

from __future__ import annotations

from pathlib import Path

from sparsec.codegen.cpu.lanes import KINDS, Kind, Lanes, Names, unsupported
from sparsec.codegen.cpu.pointwise import CONSTANTS, RULES, SAME, Operands, constant, write
from sparsec.ir.core import Block, Op, Value
from sparsec.ir.loc import Loc

INCLUDE = Path(__file__).parent / "include"

FUNCTIONS = (
    "activation route_row tail_row in out row params y splat select abs max min fma sqrt exp exp2 expm1 log log2 log1p "  # noqa: SIM905
    "rsqrt sigmoid silu tanh erf gelu gelu_tanh softplus pow floor ceil trunc round_even round_bf16 round_f16 is_nan "
    "to_float to_int floor_divide modulo i memcpy size_t".split()
)
"""Names that generated code uses, which no variable may take."""

_SHAPES = frozenset(
    f"aten.{name}" for name in ["expand", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze.dim", "squeeze"]
)


def activation(block: Block) -> str:
    """`static inline F32 activation(F32 p0, ...)`: sixteen elements of an activation, computed in f32 throughout.

    Raises: CompileError naming an op that is not computed element by element, or that has no rule.
    """
    names = Names(*FUNCTIONS)
    parameters = [names.fresh(f"p{i}") for i in range(len(block.args))]
    values = {arg: Lanes(name, arg.tensor.dtype) for arg, name in zip(block.args, parameters, strict=True)}
    lines, comments = list[str](), Comments()
    for op in block.ops[:-1]:
        operands = [values.get(a) if isinstance(a, Value) else None for a in op.arguments]
        same = alias(op, operands)
        if same is not None:
            values[op.results[0]] = same
            continue
        text = pointwise(op, operands, rounds=False)
        name, result = names.of(op.results[0]), op.results[0]
        values[result] = Lanes(name, result.tensor.dtype)
        lines += [*comments.of(op.loc), f"const {values[result].kind.vector} {name} = {text};"]
    (result,) = block.terminator.operands
    lines.append(f"return {values[result].vector(Kind.number)};")
    head = f"static inline F32 activation({', '.join(f'F32 {name}' for name in parameters)}) {{"
    return "\n".join([head, *(f"  {line}" for line in lines), "}"]) + "\n"


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
