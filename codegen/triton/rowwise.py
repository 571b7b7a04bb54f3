"""Within a row: reductions, softmax, top-k, gather and scatter, views that split or join the axes after the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsec.codegen.triton.pointwise import floating
from sparsec.codegen.triton.region import RegionCode, attr, integer, literal, numeric, rule
from sparsec.codegen.triton.tile import FLOATS, Tile, padded, shape_text, unsupported
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
    return text if attr(op, "keepdim", False) else _dropped(text, tile, axes)


def _dropped(text: str, tile: Tile, axes: Sequence[int]) -> str:
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
    greatest = op.name == "aten.amax"
    fill = 'float("-inf")' if greatest else 'float("inf")'
    return _reduce(code, op, code.tile(op, 0), "tl.max" if greatest else "tl.min", fill)


@rule("max.dim")
def _max(code: RegionCode, op: Op) -> tuple[str, str]:
    tile = code.tile(op, 0)
    return _reduce(code, op, tile, "tl.max", 'float("-inf")'), _index_of_max(code, op)


@rule("argmax")
def _arg_max(code: RegionCode, op: Op) -> str:
    return _index_of_max(code, op)


def _index_of_max(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    (axis,) = _axes(op, tile)
    text = code.call("arg_max", tile.text, axis, tile.size(axis))
    return text if attr(op, "keepdim", False) else _dropped(text, tile, [axis])


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
    return text if attr(op, "keepdim", False) else _dropped(text, tile, axes)


@rule("linalg_vector_norm")
def _norm(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    order = attr(op, "ord", 2)
    inner = {1: f"tl.abs({tile.text})", 2: f"{tile.text} * {tile.text}"}.get(order)  # type: ignore[arg-type]
    if inner is None:
        raise unsupported(op, f"norm of order {order!r}")
    text = _reduce(code, op, replace(tile, text=inner), "tl.sum", "0")
    return f"tl.sqrt({text})" if order == 2 else text


def _kept(code: RegionCode, tile: Tile, axes: Sequence[int], function: str, fill: str) -> str:
    """Reduced over `axes`, which stay, with one lane each."""
    text = tile.text
    for axis in axes:
        text = code.guarded(replace(tile, text=text), axis, fill)
        text = f"{function}({text}, axis={axis}, keep_dims=True)"
    return text


@rule("topk")
def _topk(code: RegionCode, op: Op) -> str:
    tile, k = code.tile(op, 0), integer(op, "k", 0)
    if tile.axis(integer(op, "dim", -1)) != tile.rank - 1 or not attr(op, "largest", True):
        raise unsupported(op, "only the greatest along the last axis")
    if not 1 <= k <= tile.sizes[-1]:
        raise unsupported(op, f"{k} of {tile.sizes[-1]}")
    return code.call("top_k", tile.text, tile.sizes[-1], k, padded(k))


@rule("gather")
def _gather(code: RegionCode, op: Op) -> str:
    tile, index = code.tile(op, 0), code.tile(op, 1)
    if tile.axis(integer(op, "dim", 0)) != tile.rank - 1 or tile.sizes[:-1] != index.sizes[:-1]:
        raise unsupported(op, "only along the last axis, the others alike")
    return _picked(code, tile, index.text)


def _picked(code: RegionCode, tile: Tile, index: str) -> str:
    text = code.call("pick", numeric(tile), index, tile.sizes[-1])
    return f"{text} != 0" if tile.dtype is DType.i1 else text


@rule("scatter.value", "scatter.src")
def _scatter(code: RegionCode, op: Op) -> str:
    tile, index = code.tile(op, 0), code.tile(op, 1)
    if tile.axis(integer(op, "dim", 0)) != tile.rank - 1 or tile.sizes[:-1] != index.sizes[:-1]:
        raise unsupported(op, "only along the last axis, the others alike")
    if op.name == "aten.scatter.value":
        value = literal(op, attr(op, "value", None))
        text = code.call("put_scalar", numeric(tile), index.text, value, index.sizes[-1])
    else:
        source = code.tile(op, 2)
        if source.sizes != index.sizes:
            raise unsupported(op, f"the source is {op.operands[2].type}, the index {op.operands[1].type}")
        text = code.call("put", numeric(tile), index.text, numeric(source), index.sizes[-1])
    return f"{text} != 0" if tile.dtype is DType.i1 else text


@rule("one_hot")
def _one_hot(code: RegionCode, op: Op) -> str:
    tile, result = code.tile(op, 0), code.result(op)
    lane = f"tl.arange(0, {result.lanes[-1]})[{'None, ' * tile.rank}:]"
    return f"(tl.expand_dims({tile.text}, {tile.rank}) == {lane}).to(tl.int32)"


@rule("index.Tensor", "index_select", "embedding")
def _index(code: RegionCode, op: Op) -> str:
    """A lookup in a vector that is not cut into rows: a bias or a scale per expert."""
    if op.name == "aten.index.Tensor":
        indices = op.arguments[1] if isinstance(op.arguments[1], tuple) else op.arguments[1:]
    else:
        indices = op.arguments[1:]
    tile = code.tile(op, 0)
    index = indices[0] if len(indices) == 1 else None
    if not isinstance(index, Value) or not tile.pointer or len(tile.sizes) != 1:
        raise unsupported(op, "only a vector is looked up, by one index")
    at = f"tl.minimum(tl.maximum({code.tiles[index].text}, 0), {tile.sizes[0] - 1})"
    text = f"tl.load({tile.pointer} + {at})"
    return f"{text}.to(tl.float32)" if tile.dtype in FLOATS else f"{text}.to(tl.int32)"


@rule("unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "view", "_unsafe_view", "reshape", "unflatten.int",
      "flatten.using_ints")  # fmt: skip
def _view(code: RegionCode, op: Op) -> str | Tile:
    tile, result = code.tile(op, 0), code.result(op)
    if tile.rows != result.rows:
        raise unsupported(op, f"{op.operands[0].type} to {op.results[0].type} mixes tokens")
    return regrouped(code, tile, result)


def regrouped(code: RegionCode, tile: Tile, result: Tile) -> str | Tile:
    """The same elements with the axes after the rows split or joined."""
    if tile.sizes == result.sizes:
        return tile
    lanes_in, lanes_out = _volume(tile.lanes), _volume(result.lanes)
    moved = {_at(i, result.sizes, result.lanes): _at(i, tile.sizes, tile.lanes) for i in range(_volume(tile.sizes))}
    if lanes_in == lanes_out and all(a == b for a, b in moved.items()):
        return f"tl.reshape({tile.text}, {result.shape()})"
    lane = f"tl.arange(0, {lanes_out})"
    flat = _flat_index(lane, result, tile)
    head = ["ROWS"] if tile.rows else []
    index = f"tl.broadcast_to({f'({flat})[None, :]' if head else flat}, {shape_text(*head, lanes_out)})"
    source = f"tl.reshape({numeric(tile)}, {shape_text(*head, lanes_in)})"
    text = f"tl.reshape({code.call('pick', source, index, lanes_in)}, {result.shape()})"
    return f"{text} != 0" if tile.dtype is DType.i1 else text


def _volume(sizes: Sequence[int]) -> int:
    volume = 1
    for size in sizes:
        volume *= size
    return volume


def _at(i: int, sizes: Sequence[int], lanes: Sequence[int]) -> int:
    """The lane of element `i`."""
    at, stride = 0, 1
    for size, lane in zip(reversed(sizes), reversed(lanes), strict=True):
        at += i % size * stride
        i, stride = i // size, stride * lane
    return at


def _flat_index(lane: str, result: Tile, tile: Tile) -> str:
    """For each lane of `result`, flat: the lane of `tile` that holds its element."""
    terms, stride, volume = list[str](), 1, 1
    for size, lanes in zip(reversed(result.sizes), reversed(result.lanes), strict=True):
        coordinate = f"{lane} // {stride} % {lanes}" if stride > 1 else f"{lane} % {lanes}"
        terms.append(f"{coordinate} * {volume}" if volume > 1 else coordinate)
        stride, volume = stride * lanes, volume * size
    element = f"({' + '.join(reversed(terms))})"
    terms, stride, volume = [], 1, 1
    for size, lanes in zip(reversed(tile.sizes), reversed(tile.lanes), strict=True):
        coordinate = f"{element} // {volume} % {size}" if volume > 1 else f"{element} % {size}"
        terms.append(f"{coordinate} * {stride}" if stride > 1 else coordinate)
        stride, volume = stride * lanes, volume * size
    return " + ".join(reversed(terms))


@rule("expand")
def _expand(code: RegionCode, op: Op) -> str | Tile:
    tile, result = code.tile(op, 0), code.result(op)
    if tile.rows and (tile.rank != result.rank):
        raise unsupported(op, "new axes before the tokens")
    return tile if tile.lanes == result.lanes and tile.rows == result.rows else _spread(tile, result)


def _spread(tile: Tile, result: Tile) -> str:
    text, rank = tile.text, tile.rank
    if not rank:
        return f"tl.full({result.shape()}, 0, tl.int32) + {text}"
    for _ in range(result.rank - rank):
        text = f"tl.expand_dims({text}, 0)"
    return f"tl.broadcast_to({text}, {result.shape()})"


@rule("slice.Tensor", "narrow")
def _slice(code: RegionCode, op: Op) -> str | Tile:
    tile, result = code.tile(op, 0), code.result(op)
    axis = tile.axis(integer(op, "dim", 0))
    if tile.sizes == result.sizes:
        return tile
    if axis != tile.rank - 1:
        raise unsupported(op, "only along the last axis")
    start = integer(op, "start", 0)
    return _strided(code, tile, result, start % tile.sizes[-1], integer(op, "step", 1))


@rule("select.int")
def _select(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    axis = tile.axis(integer(op, "dim", 0))
    if tile.rows and axis == 0:
        raise unsupported(op, "it picks a token")
    index = integer(op, "index", 0) % tile.size(axis)
    picked = f"tl.where({code.call('lanes', tile.text, axis)} == {index}, {numeric(tile)}, 0)"
    text = f"tl.sum({picked}, axis={axis})"
    return f"{text} != 0" if tile.dtype is DType.i1 else text


@rule("split.Tensor", "chunk", "split_with_sizes")
def _split(code: RegionCode, op: Op) -> tuple[str, ...]:
    tile = code.tile(op, 0)
    if tile.axis(integer(op, "dim", 0)) != tile.rank - 1:
        raise unsupported(op, "only along the last axis")
    texts, start = list[str](), 0
    for i in range(len(op.results)):
        result = code.result(op, i)
        texts.append(_strided(code, tile, result, start, 1))
        start += result.sizes[-1]
    return tuple(texts)


def _strided(code: RegionCode, tile: Tile, result: Tile, start: int, step: int) -> str:
    lane = f"tl.arange(0, {result.lanes[-1]})"
    index = f"({lane}{f' * {step}' if step != 1 else ''} + {start})[{'None, ' * (tile.rank - 1)}:]"
    return _picked(code, tile, f"tl.broadcast_to({index}, {result.shape()})")


@rule("cat", "concat")
def _cat(code: RegionCode, op: Op) -> str:
    result = code.result(op)
    values = op.arguments[0] if isinstance(op.arguments[0], tuple) else op.arguments
    parts = [code.tiles[value] for value in values if isinstance(value, Value)]
    if result.axis(integer(op, "dim", 0)) != result.rank - 1 or len(parts) != len(values):
        raise unsupported(op, "only along the last axis")
    lane = f"tl.arange(0, {result.lanes[-1]})[{'None, ' * (result.rank - 1)}:]"
    text, start = "", 0
    for part in parts:
        index = f"tl.broadcast_to({lane} - {start}, {result.shape()})"
        piece = code.call("pick", numeric(part), index, part.sizes[-1])
        text = f"tl.where({lane} < {start}, {text}, {piece})" if text else piece
        start += part.sizes[-1]
    return f"{text} != 0" if result.dtype is DType.i1 else text
