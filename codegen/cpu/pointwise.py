"""Element by element: arithmetic, comparisons, casts. These rules serve routers, activations and tails alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from sparsec.codegen.cpu.lanes import KINDS, NARROW, Kind, Lanes, attr, kind_of, number, real, unsupported
from sparsec.ir.core import Op
from sparsec.ir.types import DType

Operands: TypeAlias = "Sequence[Lanes | None]"
Rule: TypeAlias = Callable[[Op, Operands], str]
"""Gives the text of the only result, a vector of the kind of its element type."""

RULES: dict[str, Rule] = {}

CONSTANTS = frozenset(
    f"aten.{name}"
    for name in ["zeros_like", "ones_like", "full_like", "fill.Scalar", "full", "zeros", "ones", "new_zeros",
                 "new_full", "new_ones", "scalar_tensor"]
)  # fmt: skip
"""Ops whose result is one number everywhere."""

SAME = frozenset(f"aten.{name}" for name in ["clone", "contiguous", "detach", "alias", "lift_fresh_copy", "copy"])
"""Ops whose result is an operand: the last one."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how to write aten ops."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES["aten." + name] = function
        return function

    return register


def write(op: Op, operands: Operands, rounds: bool) -> str:
    """The text of a pointwise op's result. Raises: CompileError."""
    kind_of(op, op.results[0])
    text = RULES[op.name](op, operands)
    dtype = op.results[0].tensor.dtype
    return f"{NARROW[dtype]}({text})" if rounds and dtype in NARROW else text


def constant(op: Op) -> bool | int | float:
    """The number that an op of `CONSTANTS` gives, as its element type has it."""
    name = op.name.split(".")[1]
    if "zeros" in name or "ones" in name:
        return int("ones" in name)
    key = next((key for key in ("fill_value", "s", "value") if key in op.attrs), "fill_value")
    value = real(op, key, 0)
    kind = kind_of(op, op.results[0])
    return bool(value) if kind is Kind.mask else int(value) if kind is Kind.integer else float(value)


def given(op: Op, operands: Operands, i: int, name: str = "other") -> Lanes:
    """Operand `i`, or the number that stands in its place. Raises: CompileError if neither is there."""
    if i < len(op.arguments):
        lanes = operands[i]
        if lanes is None:
            raise unsupported(op, f"operand {i} is not one tensor")
        return lanes
    if op.attrs.get(name) is None:
        raise unsupported(op, f"'{name}' is missing")
    value = real(op, name, 0)
    # A bare number takes the tensors' element type, unless it is of a higher kind.
    dtypes = [lanes.dtype for lanes in operands if lanes is not None]
    dtype = next((d for d in dtypes if KINDS[d] is Kind.number), dtypes[0] if dtypes else DType.f32)
    if isinstance(value, float) and KINDS[dtype] is not Kind.number:
        dtype = DType.f32
    elif KINDS[dtype] is Kind.mask and not isinstance(value, bool):
        dtype = DType.i64
    return Lanes("", dtype, value)


def result_kind(op: Op) -> Kind:
    return kind_of(op, op.results[0])


def first(op: Op, operands: Operands) -> str:
    """The first operand as the kind of the result."""
    return given(op, operands, 0).vector(result_kind(op))


_UNARY = {
    "neg": "-{x}",
    "abs": "abs({x})",
    "exp": "exp({x})",
    "exp2": "exp2({x})",
    "expm1": "expm1({x})",
    "log": "log({x})",
    "log2": "log2({x})",
    "log10": "log({x}) * 0.434294482f",
    "log1p": "log1p({x})",
    "sqrt": "sqrt({x})",
    "rsqrt": "rsqrt({x})",
    "reciprocal": "1.0f / {x}",
    "sigmoid": "sigmoid({x})",
    "silu": "silu({x})",
    "tanh": "tanh({x})",
    "erf": "erf({x})",
    "erfc": "1.0f - erf({x})",
    "floor": "floor({x})",
    "ceil": "ceil({x})",
    "round": "round_even({x})",
    "trunc": "trunc({x})",
    "frac": "{x} - trunc({x})",
    "square": "{x} * {x}",
    "mish": "{x} * tanh(softplus({x}))",
    "log_sigmoid": "-softplus(-{x})",
    "log_sigmoid_forward": "-softplus(-{x})",
    "hardsigmoid": "min(max({x} / 6.0f + 0.5f, splat(0.0f)), splat(1.0f))",
    "hardswish": "{x} * min(max({x} + 3.0f, splat(0.0f)), splat(6.0f)) / 6.0f",
    "softsign": "{x} / (1.0f + abs({x}))",
    "selu": "select({x} > 0.0f, 1.05070099f * {x}, 1.75809934f * expm1({x}))",
}
_ROUND_WHOLE = ("floor", "ceil", "round", "trunc")


def _unary(pattern: str) -> Rule:
    return lambda op, operands: pattern.format(x=first(op, operands))


for _name, _pattern in _UNARY.items():
    rule(_name)(_unary(_pattern))


@rule("relu", "relu6", "sign", "sgn")
def _signed(op: Op, operands: Operands) -> str:
    x, kind = first(op, operands), result_kind(op)
    zero, one = f"splat({number(0, kind)})", f"splat({number(1, kind)})"
    if "relu" in op.name:
        text = f"max({x}, {zero})"
        return f"min({text}, splat({number(6, kind)}))" if op.name == "aten.relu6" else text
    return f"select({x} > {number(0, kind)}, {one}, select({x} < {number(0, kind)}, -{one}, {x}))"


@rule("isnan", "isinf", "isfinite")
def _classified(op: Op, operands: Operands) -> str:
    x = given(op, operands, 0).vector(Kind.number)
    if op.name == "aten.isnan":
        return f"is_nan({x})"
    return f"abs({x}) {'==' if op.name == 'aten.isinf' else '<'} INFINITY_F32"


@rule("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar", "true_divide.Tensor")
def _product(op: Op, operands: Operands) -> str:
    x, y, kind = given(op, operands, 0), given(op, operands, 1), result_kind(op)
    if kind is Kind.mask:
        return f"{x.vector(kind)} & {y.vector(kind)}"
    return f"{x.vector(kind)} {'*' if 'mul' in op.name else '/'} {y.scalar(kind)}"


_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _comparison(sign: str) -> Rule:
    def text(op: Op, operands: Operands) -> str:
        x, y = given(op, operands, 0), given(op, operands, 1)
        kind = Kind.number if Kind.number in (x.kind, y.kind) else Kind.integer
        right = y.scalar(kind)
        if not y.text and y.dtype in NARROW:
            right = f"{NARROW[y.dtype]}({y.vector(kind)})"  # a bare number is compared as the tensor's element type
        return f"{x.vector(kind)} {sign} {right}"

    return text


for _name, _sign in _COMPARED.items():
    rule(f"{_name}.Tensor", f"{_name}.Scalar")(_comparison(_sign))


@rule("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor")
def _add(op: Op, operands: Operands) -> str:
    x, y, kind = given(op, operands, 0), given(op, operands, 1), result_kind(op)
    alpha, name = real(op, "alpha", 1), op.name.split(".")[1]
    if kind is Kind.mask:
        return f"{x.vector(kind)} | {y.vector(kind)}"
    if name == "rsub":
        x, y = y, x
    times = f" * {number(alpha, kind)}" if alpha != 1 else ""
    right = f"{y.vector(kind)}{times}" if times else y.scalar(kind)
    return f"{x.vector(kind)} {'+' if name == 'add' else '-'} {right}"


@rule("div.Tensor_mode", "div.Scalar_mode", "floor_divide", "floor_divide.Scalar", "remainder.Scalar",
      "remainder.Tensor")  # fmt: skip
def _whole(op: Op, operands: Operands) -> str:
    kind, mode = result_kind(op), attr(op, "rounding_mode", "floor" if "div.T" not in op.name else None)
    x, y = given(op, operands, 0).vector(kind), given(op, operands, 1).vector(kind)
    if mode is None:
        return f"{x} / {y}"
    remainder = "remainder" in op.name
    if kind is Kind.number:
        whole = f"{'floor' if mode == 'floor' else 'trunc'}({x} / {y})"
        return f"{x} - {whole} * {y}" if remainder else whole
    if mode != "floor":
        raise unsupported(op, f"division of integers rounded by '{mode}'")
    return f"{'modulo' if remainder else 'floor_divide'}({x}, {y})"


_POWERS: dict[float, str] = {
    1: "{x}",
    2: "{x} * {x}",
    3: "{x} * {x} * {x}",
    0.5: "sqrt({x})",
    -0.5: "rsqrt({x})",
    -1: "1.0f / {x}",
    -2: "1.0f / ({x} * {x})",
}


@rule("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(op: Op, operands: Operands) -> str:
    kind, x = result_kind(op), first(op, operands)
    if op.name == "aten.pow.Tensor_Scalar":
        exponent = real(op, "exponent", 1)
        if exponent in _POWERS and (kind is Kind.number or exponent in (1, 2, 3)):
            return _POWERS[exponent].format(x=x)
        y = f"splat({number(exponent, Kind.number)})"
    elif op.name == "aten.pow.Scalar":
        x, y = f"splat({number(real(op, 'self', 1), Kind.number)})", x
    else:
        y = given(op, operands, 1).vector(kind)
    if kind is not Kind.number:
        raise unsupported(op, "powers of integers")
    return f"pow({x}, {y})"


@rule(
    "clamp",
    "clamp.Tensor",
    "clip",
    "clip.Tensor",
    "clamp_min",
    "clamp_max",
    "clamp_min.Tensor",
    "clamp_max.Tensor",
    "hardtanh",
)
def _clamp(op: Op, operands: Operands) -> str:
    text, kind = first(op, operands), result_kind(op)
    low = high = None
    if op.name.startswith("aten.clamp_"):
        side = op.name.removeprefix("aten.clamp_")[:3]
        bound = given(op, operands, 1, side)
        low, high = (bound, None) if side == "min" else (None, bound)
    elif op.name.endswith(".Tensor"):
        low, high = [*operands[1:], None, None][:2]
    else:
        names, default = (("min_val", "max_val"), 1.0) if op.name == "aten.hardtanh" else (("min", "max"), None)
        bounds = [op.attrs.get(name, default and sign * default) for name, sign in zip(names, (-1, 1), strict=True)]
        low, high = (None if b is None else Lanes("", op.results[0].tensor.dtype, _known(op, b)) for b in bounds)
    text = f"max({text}, {low.vector(kind)})" if low is not None else text
    return f"min({text}, {high.vector(kind)})" if high is not None else text


def _known(op: Op, value: object) -> bool | int | float:
    if not isinstance(value, bool | int | float):
        raise unsupported(op, f"{value!r} is not a number")
    return value


@rule("maximum", "minimum", "max.other", "min.other", "fmax", "fmin")
def _extreme(op: Op, operands: Operands) -> str:
    kind, name = result_kind(op), op.name.split(".")[1]
    x, y = (given(op, operands, i).vector(kind) for i in range(2))
    if kind is Kind.mask:
        return f"{x} {'|' if 'max' in name else '&'} {y}"
    if name in ("fmax", "fmin") and kind is Kind.number:
        return f"select(is_nan({x}), {y}, select(is_nan({y}), {x}, {name[1:]}({x}, {y})))"
    return f"{'max' if 'max' in name else 'min'}({x}, {y})"


@rule("bitwise_not", "logical_not")
def _not(op: Op, operands: Operands) -> str:
    x = given(op, operands, 0)
    return f"~{x.vector(Kind.mask if result_kind(op) is Kind.mask else x.kind)}"


@rule("logical_and", "logical_or", "logical_xor", *(
    f"{name}.{kind}" for kind in ("Tensor", "Scalar") for name in
    ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__")
))  # fmt: skip
def _logical(op: Op, operands: Operands) -> str:
    kind = result_kind(op)
    x, y = (given(op, operands, i).vector(kind) for i in range(2))
    return f"{x} {'&' if 'and' in op.name else '^' if 'xor' in op.name else '|'} {y}"


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(op: Op, operands: Operands) -> str:
    kind, mask = result_kind(op), given(op, operands, 1).vector(Kind.mask)
    return f"select({mask}, {given(op, operands, 2, 'value').vector(kind)}, {first(op, operands)})"


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(op: Op, operands: Operands) -> str:
    kind, values = result_kind(op), [lanes for lanes in operands[1:] if lanes is not None]
    dtype = op.results[0].tensor.dtype
    one, other = (
        Lanes("", dtype, real(op, name, 0)) if name in op.attrs else values.pop(0) for name in ("self", "other")
    )
    return f"select({given(op, operands, 0).vector(Kind.mask)}, {one.vector(kind)}, {other.vector(kind)})"


@rule("_to_copy", "to.dtype", "type_as", "to.other")
def _cast(op: Op, operands: Operands) -> str:
    x, dtype = given(op, operands, 0), op.results[0].tensor.dtype
    text = x.vector(KINDS[dtype])
    match dtype:
        case DType.ui8:
            return f"{text} & 255"
        case DType.i8 | DType.i16:
            shift = 24 if dtype is DType.i8 else 16
            return f"({text} << {shift}) >> {shift}"
        case _:
            return text


@rule("fill.Tensor")
def _filled(op: Op, operands: Operands) -> str:
    return given(op, operands, 1).vector(result_kind(op))
