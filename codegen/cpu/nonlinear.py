"""Functions with numbers of their own, element by element: gelu, elu, softplus and the like."""

from __future__ import annotations

from sparsec.codegen.cpu.lanes import Kind, attr, number, real
from sparsec.codegen.cpu.pointwise import RULES, Operands, first, given, rule
from sparsec.ir.core import Op

__all__ = ["RULES"]


@rule("nan_to_num")
def _nan_to_num(op: Op, operands: Operands) -> str:
    x, limit = first(op, operands), {"f16": 65504.0, "bf16": 3.3895313892515355e38}
    most = limit.get(op.results[0].tensor.dtype.value, 3.4028234663852886e38)
    high, low, nan = (
        number(real(op, name, value), Kind.number) for name, value in (("posinf", most), ("neginf", -most), ("nan", 0))
    )
    text = f"select({x} == -INFINITY_F32, splat({low}), select(is_nan({x}), splat({nan}), {x}))"
    return f"select({x} == INFINITY_F32, splat({high}), {text})"


@rule("softplus")
def _softplus(op: Op, operands: Operands) -> str:
    x, beta = first(op, operands), real(op, "beta", 1)
    threshold = number(real(op, "threshold", 20), Kind.number)
    if beta == 1:
        return f"select({x} > {threshold}, {x}, softplus({x}))"
    b = number(beta, Kind.number)
    return f"select({x} * {b} > {threshold}, {x}, softplus({x} * {b}) / {b})"


@rule("gelu")
def _gelu(op: Op, operands: Operands) -> str:
    return f"{'gelu_tanh' if attr(op, 'approximate', 'none') == 'tanh' else 'gelu'}({first(op, operands)})"


@rule("leaky_relu", "prelu", "_prelu_kernel")
def _leaky_relu(op: Op, operands: Operands) -> str:
    x = first(op, operands)
    slope = number(real(op, "negative_slope", 0.01), Kind.number)
    if op.name != "aten.leaky_relu":
        slope = given(op, operands, 1).scalar(Kind.number)
    return f"select({x} > 0.0f, {x}, {x} * {slope})"


@rule("elu", "celu")
def _elu(op: Op, operands: Operands) -> str:
    x, alpha = first(op, operands), real(op, "alpha", 1)
    scale, inner = real(op, "scale", 1), real(op, "input_scale", 1) if op.name == "aten.elu" else 1 / alpha
    a, s, i = (number(value, Kind.number) for value in (alpha * scale, scale, inner))
    return f"select({x} > 0.0f, {x} * {s}, expm1({x} * {i}) * {a})"


@rule("threshold", "hardshrink", "softshrink")
def _cut(op: Op, operands: Operands) -> str:
    x = first(op, operands)
    if op.name == "aten.threshold":
        limit, value = (number(real(op, name, 0), Kind.number) for name in ("threshold", "value"))
        return f"select({x} <= {limit}, splat({value}), {x})"
    limit = number(real(op, "lambd", 0.5), Kind.number)
    if op.name == "aten.hardshrink":
        return f"select(abs({x}) <= {limit}, splat(0.0f), {x})"
    return f"select({x} > {limit}, {x} - {limit}, select({x} < -{limit}, {x} + {limit}, {x} * 0.0f))"


@rule("addcmul", "addcdiv", "lerp.Scalar", "lerp.Tensor")
def _three(op: Op, operands: Operands) -> str:
    x, y = (given(op, operands, i).vector(Kind.number) for i in range(2))
    z = given(op, operands, 2, "weight").vector(Kind.number)
    if "lerp" in op.name:
        return f"select(abs({z}) < 0.5f, {x} + {z} * ({y} - {x}), {y} - ({y} - {x}) * (1.0f - {z}))"
    value = number(real(op, "value", 1), Kind.number)
    return f"{x} + {value} * {y} {'*' if 'mul' in op.name else '/'} {z}"
