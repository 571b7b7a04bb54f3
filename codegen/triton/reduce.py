"""Within a row: sums, extremes, norms, softmax: along an axis, to one number or as many as there were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsec.codegen.triton.pointwise import floating
from sparsec.codegen.triton.region import RegionCode, attr, converted, integer, literal, numeric, rule
from sparsec.codegen.triton.tile import FLOATS, Tile, shape_text, unsupported
from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType


def _axes(op: Op, tile: Tile) -> list[int]:
    """The axes that a reduction runs over, last first. Raises: CompileError if the tokens are among them."""
    dims = attr(op, "dim", None)
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, Sequence) or not dims:
        dims = tuple(range(tile.rank))
    axes = sorted({tile.axis(dim) for dim in dims if isinstance(dim, int)}, reverse=True)
    if tile.rows and 0 in axes:
        raise unsupported(op, "it runs over the tokens")
    return axes


def _reduce(code: RegionCode, op: Op, tile: Tile, function: str, fill: str) -> str:
    axes = _axes(op, tile)
    text = _kept(code, tile, axes, function, fill)
    return text if attr(op, "keepdim", False) else dropped(text, tile, axes)


def dropped(text: str, tile: Tile, axes: Sequence[int]) -> str:
    """A tile without `axes`, each of which holds one lane."""
    kept: list[int | str] = [*(["ROWS"] if tile.rows else []), *tile.lanes]
    return f"tl.reshape({text}, {shape_text(*(n for axis, n in enumerate(kept) if axis not in axes))})"


@rule("sum.dim_IntList", "sum", "mean.dim")
def _sum(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    text = floating(tile, op)
    summed = _reduce(code, op, replace(tile, text=text), "tl.sum", "0")
    if op.name != "aten.mean.dim":
        return summed
    count = 1
    for axis in _axes(op, tile):
        count *= tile.size(axis)
    return f"{summed} / {count}"


@rule("amax", "amin")
def _extremes(code: RegionCode, op: Op) -> str:
    return _extreme_value(code, op, op.name == "aten.amax")


def _extreme_value(code: RegionCode, op: Op, greatest: bool) -> str:
    tile = code.tile(op, 0)
    fill = 'float("-inf")' if greatest else 'float("inf")'
    if tile.dtype not in FLOATS:
        fill = "-0x80000000" if greatest else "0x7FFFFFFF"
    return _reduce(code, op, replace(tile, text=numeric(tile)), "tl.max" if greatest else "tl.min", fill)


@rule("max.dim", "min.dim")
def _max(code: RegionCode, op: Op) -> tuple[str, str]:
    return _extreme_value(code, op, op.name == "aten.max.dim"), _index_of_extreme(code, op)


@rule("argmax", "argmin")
def _arg_max(code: RegionCode, op: Op) -> str:
    return _index_of_extreme(code, op)


def _index_of_extreme(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    (axis,) = _axes(op, tile)
    text = converted(tile.text, tile.dtype, DType.f32)
    text = text if "max" in op.name else f"-{text}"
    text = code.call("arg_max", text, axis, tile.size(axis))
    return text if attr(op, "keepdim", False) else dropped(text, tile, [axis])


@rule("softmax.int", "_softmax", "log_softmax.int")
def _softmax(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    axis = tile.axis(integer(op, "dim", -1))
    if tile.rows and axis == 0:
        raise unsupported(op, "it runs over the tokens")
    text = code.call("softmax", tile.text, axis, tile.size(axis))
    return f"tl.log({text})" if op.name == "aten.log_softmax.int" else text


@rule("logsumexp")
def _logsumexp(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    axes = _axes(op, tile)
    top = _kept(code, tile, axes, "tl.max", 'float("-inf")')
    e = replace(tile, text=f"tl.exp({tile.text} - {top})")
    text = f"({top} + tl.log({_kept(code, e, axes, 'tl.sum', '0')}))"
    return text if attr(op, "keepdim", False) else dropped(text, tile, axes)


@rule("linalg_vector_norm", "norm.ScalarOpt_dim")
def _norm(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    order = attr(op, "ord" if op.name == "aten.linalg_vector_norm" else "p", 2)
    size = f"tl.abs({tile.text})"
    if order == float("inf"):
        return _reduce(code, op, replace(tile, text=size), "tl.max", "0")
    if not isinstance(order, int | float) or order <= 0:
        raise unsupported(op, f"norm of order {order!r}")
    if order == 1:
        return _reduce(code, op, replace(tile, text=size), "tl.sum", "0")
    power = f"{tile.text} * {tile.text}" if order == 2 else f"tl.exp2({order!r} * tl.log2({size}))"
    text = _reduce(code, op, replace(tile, text=power), "tl.sum", "0")
    return f"tl.sqrt({text})" if order == 2 else f"tl.exp2(tl.log2({text}) / {order!r})"


@rule("var.dim", "var.correction", "std.dim", "std.correction")
def _spread_of(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    (axis,) = _axes(op, tile)
    less = attr(op, "correction", 1) if op.name.endswith("correction") else int(bool(attr(op, "unbiased", True)))
    if not isinstance(less, int | float) or tile.size(axis) <= less:
        raise unsupported(op, f"correction {less!r} of {tile.size(axis)}")
    text = code.call("variance", tile.text, axis, tile.size(axis), tile.size(axis) - less)
    text = f"tl.sqrt({text})" if "std" in op.name else text
    return text if attr(op, "keepdim", False) else dropped(text, tile, [axis])


@rule("layer_norm", "rms_norm")
def _normed(code: RegionCode, op: Op) -> str:
    tile, shape = code.tile(op, 0), attr(op, "normalized_shape", ())
    if not isinstance(shape, Sequence) or len(shape) != 1:
        raise unsupported(op, "only over the last axis")
    name = op.name.removeprefix("aten.")
    eps = attr(op, "eps", 1e-5 if name == "layer_norm" else None)
    if eps is None:
        eps = 1.1920928955078125e-07
    text = code.call(name, tile.text, tile.rank - 1, tile.sizes[-1], literal(op, eps))
    for sign, given in zip("*+", op.arguments[1:], strict=False):
        if isinstance(given, Value):
            text = f"{text} {sign} {code.tiles[given].text}"
    return text


@rule("any.dim", "all.dim")
def _any(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    held = replace(tile, text=f"({converted(tile.text, tile.dtype, DType.i1)}).to(tl.int32)")
    any_ = op.name == "aten.any.dim"
    return f"{_reduce(code, op, held, 'tl.max' if any_ else 'tl.min', '0' if any_ else '1')} != 0"


@rule("count_nonzero.dim_IntList")
def _count(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    held = replace(tile, text=f"({converted(tile.text, tile.dtype, DType.i1)}).to(tl.int32)")
    return dropped(_kept(code, held, _axes(op, tile), "tl.sum", "0"), tile, _axes(op, tile))


@rule("cumsum", "cumprod")
def _running(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    (axis,) = _axes(op, tile)
    return f"tl.{op.name.removeprefix('aten.')}({floating(tile, op)}, axis={axis})"


def _kept(code: RegionCode, tile: Tile, axes: Sequence[int], function: str, fill: str) -> str:
    """Reduced over `axes`, which stay, with one lane each."""
    text = tile.text
    for axis in axes:
        text = code.guarded(replace(tile, text=text), axis, fill)
        text = f"{function}({text}, axis={axis}, keep_dims=True)"
    return text
