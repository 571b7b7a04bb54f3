"""Element by element: arithmetic, comparisons, casts, constants. These rules serve routers and activations alike."""

from __future__ import annotations

from sparsec.codegen.triton.region import (
    RegionCode,
    Rule,
    attr,
    converted,
    literal,
    numeric,
    operand,
    rule,
)
from sparsec.codegen.triton.tile import FLOATS, Tile, unsupported
from sparsec.ir.core import Op
from sparsec.ir.types import DType

_UNARY = {
    "neg": "-{x}",
    "abs": "tl.abs({x})",
    "exp": "tl.exp({x})",
    "exp2": "tl.exp2({x})",
    "log": "tl.log({x})",
    "log2": "tl.log2({x})",
    "sqrt": "tl.sqrt({x})",
    "rsqrt": "1 / tl.sqrt({x})",
    "reciprocal": "1 / {x}",
    "sigmoid": "tl.sigmoid({x})",
    "silu": "{x} * tl.sigmoid({x})",
    "relu": "tl.maximum({x}, 0)",
    "erf": "tl.erf({x})",
    "floor": "tl.floor({x})",
    "ceil": "tl.ceil({x})",
    "log1p": "tl.log(1 + {x})",
    "square": "{x} * {x}",
    "isnan": "{x} != {x}",
    "isinf": 'tl.abs({x}) == float("inf")',
    "isfinite": 'tl.abs({x}) < float("inf")',
    "sign": "({x} > 0).to(tl.float32) - ({x} < 0).to(tl.float32)",
    "hardsigmoid": "tl.minimum(tl.maximum({x} / 6 + 0.5, 0), 1)",
    "hardswish": "{x} * tl.minimum(tl.maximum({x} / 6 + 0.5, 0), 1)",
    "softsign": "{x} / (1 + tl.abs({x}))",
    "relu6": "tl.minimum(tl.maximum({x}, 0), 6)",
}
_BINARY = {"mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_POWERS = {
    2: "{x} * {x}",
    3: "{x} * {x} * {x}",
    1: "{x}",
    0.5: "tl.sqrt({x})",
    -0.5: "1 / tl.sqrt({x})",
    -1: "1 / {x}",
}


def _unary(pattern: str) -> Rule:
    return lambda code, op: pattern.format(x=floating(code.tile(op, 0), op))


def _binary(sign: str) -> Rule:
    def write(code: RegionCode, op: Op) -> str:
        x = floating(code.tile(op, 0), op) if sign == "/" else numeric(code.tile(op, 0))
        return f"{x} {sign} {operand(code, op, 1, 'other')}"

    return write


def floating(tile: Tile, op: Op) -> str:
    """A tile as floats where the op yields floats: torch promotes integers. Comparisons are made in its own type."""
    return converted(tile.text, tile.dtype, DType.f32) if op.results[0].tensor.dtype in FLOATS else numeric(tile)


@rule(
    "div.Tensor_mode", "div.Scalar_mode", "floor_divide", "floor_divide.Scalar", "remainder.Scalar", "remainder.Tensor"
)
def _whole(code: RegionCode, op: Op) -> str:
    x, y, mode = floating(code.tile(op, 0), op), operand(code, op, 1, "other"), attr(op, "rounding_mode", "floor")
    whole, remainder = op.results[0].tensor.dtype not in FLOATS, "remainder" in op.name
    if mode is None:
        return f"{x} / {y}"
    if mode != "floor":
        raise unsupported(op, f"division rounded by '{mode}'")
    if whole:
        return code.call("modulo" if remainder else "floor_divide", x, y)
    return f"{x} - tl.floor({x} / {y}) * {y}" if remainder else f"tl.floor({x} / {y})"


for _name, _pattern in _UNARY.items():
    rule(_name)(_unary(_pattern))
for _name, _sign in _BINARY.items():
    rule(f"{_name}.Tensor", f"{_name}.Scalar")(_binary(_sign))


@rule("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor")
def _add(code: RegionCode, op: Op) -> str:
    x, y = numeric(code.tile(op, 0)), operand(code, op, 1, "other")
    alpha = attr(op, "alpha", 1)
    name = op.name.split(".")[1]
    if name == "rsub":
        x, y = y, x
        return f"{x} - {y}" if alpha == 1 else f"{x} - {y} * {literal(op, alpha)}"
    return f"{x} {'+' if name == 'add' else '-'} {y}" + (f" * {literal(op, alpha)}" if alpha != 1 else "")


@rule("pow.Tensor_Scalar")
def _pow(code: RegionCode, op: Op) -> str:
    exponent = attr(op, "exponent", None)
    x = floating(code.tile(op, 0), op)
    if exponent in _POWERS:
        return _POWERS[exponent].format(x=x)  # type: ignore[index]
    if isinstance(exponent, bool | int) or not isinstance(exponent, float) or exponent.is_integer():
        raise unsupported(op, f"exponent {exponent!r}")
    return f"tl.exp2({exponent!r} * tl.log2({x}))"


@rule("clamp", "clamp.Tensor", "clamp_min", "clamp_max", "clamp_min.Tensor", "clamp_max.Tensor")
def _clamp(code: RegionCode, op: Op) -> str:
    text = code.tile(op, 0).text
    low = high = None
    if op.name.startswith("aten.clamp_"):
        side = op.name.removeprefix("aten.clamp_")[:3]
        bound = operand(code, op, 1, side)
        low, high = (bound, None) if side == "min" else (None, bound)
    elif op.name.endswith(".Tensor"):
        bounds = [*op.arguments[1:], None, None][:2]
        low, high = (code.tile(op, i + 1).text if bound is not None else None for i, bound in enumerate(bounds))
    else:
        low, high = (literal(op, op.attrs[side]) if op.attrs.get(side) is not None else None for side in ("min", "max"))
    text = f"tl.maximum({text}, {low})" if low is not None else text
    return f"tl.minimum({text}, {high})" if high is not None else text


@rule("maximum", "minimum", "max.other", "min.other")
def _extreme(code: RegionCode, op: Op) -> str:
    function = op.name.split(".")[1][:3] + "imum"
    return f"tl.{function}({code.tile(op, 0).text}, {code.tile(op, 1).text})"


@rule("nan_to_num")
def _nan_to_num(code: RegionCode, op: Op) -> str:
    x, limit = code.tile(op, 0).text, {"f16": 65504.0, "bf16": 3.3895313892515355e38}
    most = limit.get(op.results[0].tensor.dtype.value, 3.4028234663852886e38)
    nan, high, low = (attr(op, name, None) for name in ("nan", "posinf", "neginf"))
    high, low = (most if high is None else high), (-most if low is None else low)
    text = f'tl.where({x} == float("inf"), {literal(op, high)}, {x})'
    text = f'tl.where({x} == float("-inf"), {literal(op, low)}, {text})'
    return f"tl.where({x} != {x}, {literal(op, nan or 0.0)}, {text})"


@rule("tanh")
def _tanh(code: RegionCode, op: Op) -> str:
    return code.call("tanh", code.tile(op, 0).text)


@rule("softplus")
def _softplus(code: RegionCode, op: Op) -> str:
    if attr(op, "beta", 1) != 1:
        raise unsupported(op, "beta other than 1")
    return code.call("softplus", code.tile(op, 0).text)


@rule("log_sigmoid", "log_sigmoid_forward")
def _log_sigmoid(code: RegionCode, op: Op) -> str:
    return "-" + code.call("softplus", f"-{code.tile(op, 0).text}")


@rule("gelu")
def _gelu(code: RegionCode, op: Op) -> str:
    x = code.tile(op, 0).text
    if attr(op, "approximate", "none") == "tanh":
        inner = code.call("tanh", f"0.7978845608028654 * ({x} + 0.044715 * {x} * {x} * {x})")
        return f"0.5 * {x} * (1 + {inner})"
    return f"0.5 * {x} * (1 + tl.erf({x} * 0.7071067811865476))"


@rule("leaky_relu")
def _leaky_relu(code: RegionCode, op: Op) -> str:
    x = code.tile(op, 0).text
    return f"tl.where({x} > 0, {x}, {x} * {literal(op, attr(op, 'negative_slope', 0.01))})"


@rule("mish")
def _mish(code: RegionCode, op: Op) -> str:
    x = code.tile(op, 0).text
    return f"{x} * {code.call('tanh', code.call('softplus', x))}"


@rule("bitwise_not", "logical_not")
def _not(code: RegionCode, op: Op) -> str:
    x = code.tile(op, 0)
    if x.dtype is not DType.i1 and op.name == "aten.bitwise_not":
        raise unsupported(op, f"on {x.dtype}")
    return f"{numeric(x)} == 0"


@rule("logical_and", "bitwise_and.Tensor", "__and__.Tensor", "logical_or", "bitwise_or.Tensor", "__or__.Tensor",
      "logical_xor", "bitwise_xor.Tensor", "__xor__.Tensor")  # fmt: skip
def _logical(code: RegionCode, op: Op) -> str:
    x, y = (converted(tile.text, tile.dtype, DType.i1) for tile in (code.tile(op, 0), code.tile(op, 1)))
    if op.results[0].tensor.dtype is not DType.i1:
        raise unsupported(op, "on integers")
    return f"({x}) {'&' if 'and' in op.name else '^' if 'xor' in op.name else '|'} ({y})"


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(code: RegionCode, op: Op) -> str:
    return f"tl.where({code.tile(op, 1).text}, {operand(code, op, 2, 'value')}, {code.tile(op, 0).text})"


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(code: RegionCode, op: Op) -> str:
    values = [code.tile(op, i).text for i in range(1, len(op.arguments))]
    one = literal(op, op.attrs["self"]) if "self" in op.attrs else values.pop(0)
    other = literal(op, op.attrs["other"]) if "other" in op.attrs else values.pop(0)
    return f"tl.where({code.tile(op, 0).text}, {one}, {other})"


@rule("_to_copy", "to.dtype", "type_as", "to.other")
def _cast(code: RegionCode, op: Op) -> str | Tile:
    x, target = code.tile(op, 0), op.results[0].tensor.dtype
    text = converted(x.text, x.dtype, target)
    return text if text != x.text or target is not x.dtype else x


@rule("clone", "contiguous", "detach", "alias", "lift_fresh_copy")
def _same(code: RegionCode, op: Op) -> Tile:
    return code.tile(op, 0)


@rule("fill.Tensor", "copy")
def _filled(code: RegionCode, op: Op) -> str:
    result, value = code.result(op), code.tile(op, 1)
    text = converted(value.text, value.dtype, result.dtype)
    if value.rank not in (0, result.rank):
        raise unsupported(op, f"{op.operands[1].type} in {op.results[0].type}")
    return f"tl.broadcast_to({text}, {result.shape()})"


@rule(
    "fill.Scalar",
    "zeros_like",
    "ones_like",
    "full_like",
    "full",
    "zeros",
    "ones",
    "new_zeros",
    "new_full",
    "new_ones",
    "scalar_tensor",
)
def _constant(code: RegionCode, op: Op) -> str:
    result, name = code.result(op), op.name.split(".")[1]
    fill = (
        0
        if "zeros" in name
        else 1
        if "ones" in name
        else attr(op, "fill_value", attr(op, "s", attr(op, "value", None)))
    )
    if not result.rank:
        return literal(op, fill)
    if result.rows and any(size == 0 for size in result.sizes):
        raise unsupported(op, "rows of no elements")
    dtype = "tl.float32" if result.dtype in FLOATS else "tl.int1" if result.dtype is DType.i1 else "tl.int32"
    return f"tl.full({result.shape()}, {literal(op, fill)}, {dtype})"
