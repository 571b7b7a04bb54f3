"""Within a row: top-k and sorting, gather and scatter, views that split or join the axes after the rows."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.codegen.triton.reduce import dropped
from sparsec.codegen.triton.region import RegionCode, attr, converted, integer, literal, numeric, rule
from sparsec.codegen.triton.tile import FLOATS, Tile, padded, shape_text, unsupported
from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType

MOST_CHOSEN = 64
"""Most lanes that are put in order one by one."""


@rule("topk")
def _topk(code: RegionCode, op: Op) -> str:
    tile, k = code.tile(op, 0), integer(op, "k", 0)
    if tile.axis(integer(op, "dim", -1)) != tile.rank - 1:
        raise unsupported(op, "only along the last axis")
    return _ordered(code, op, tile, k, bool(attr(op, "largest", True)))


def _ordered(code: RegionCode, op: Op, tile: Tile, k: int, largest: bool) -> str:
    if not 1 <= k <= tile.sizes[-1] or k > MOST_CHOSEN:
        raise unsupported(op, f"{k} of {tile.sizes[-1]} in order (at most {MOST_CHOSEN})")
    text = converted(tile.text, tile.dtype, DType.f32)
    return code.call("top_k", text, tile.sizes[-1], k, padded(k), largest)


@rule("sort", "sort.stable", "argsort", "argsort.stable")
def _sort(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    if tile.axis(integer(op, "dim", -1)) != tile.rank - 1:
        raise unsupported(op, "only along the last axis")
    text = _ordered(code, op, tile, tile.sizes[-1], bool(attr(op, "descending", False)))
    return text if "argsort" not in op.name else f"{text}[1]"


@rule("kthvalue")
def _kth_value(code: RegionCode, op: Op) -> tuple[str, str]:
    tile, k = code.tile(op, 0), integer(op, "k", 0)
    if tile.axis(integer(op, "dim", -1)) != tile.rank - 1:
        raise unsupported(op, "only along the last axis")
    largest = k > tile.sizes[-1] // 2
    count = tile.sizes[-1] - k + 1 if largest else k
    pair = _ordered(code, op, tile, count, largest)
    texts = list[str]()
    for i in range(2):
        here = f"tl.where({code.call('lanes', f'{pair}[{i}]', tile.rank - 1)} == {count - 1}, {pair}[{i}], 0)"
        text = f"tl.sum({here}, axis={tile.rank - 1}, keep_dims=True)"
        texts.append(text if attr(op, "keepdim", False) else dropped(text, tile, [tile.rank - 1]))
    return texts[0], texts[1]


@rule("gather")
def _gather(code: RegionCode, op: Op) -> str:
    tile, index = code.tile(op, 0), code.tile(op, 1)
    if tile.rows != index.rows:
        raise unsupported(op, "rows looked up in what has none")
    axis, last = tile.axis(integer(op, "dim", 0)), tile.rank - 1
    others = [[size for i, size in enumerate(each.sizes, each.rows) if i != axis] for each in (tile, index)]
    if others[0] != others[1] or tile.rank != index.rank or (tile.rows and axis == 0):
        raise unsupported(op, "only along axes after the tokens, the others alike")
    if axis == last:
        return _picked(code, tile, index.text)
    order = list(range(tile.rank))
    order[axis], order[last] = last, axis
    turn = shape_text(*order)
    sizes = tuple(tile.sizes[i - tile.rows] for i in order[tile.rows :])
    dtype = DType.i32 if tile.dtype is DType.i1 else tile.dtype
    turned = Tile(f"tl.permute({numeric(tile)}, {turn})", sizes, tile.rows, dtype)
    text = f"tl.permute({_picked(code, turned, f'tl.permute({index.text}, {turn})')}, {turn})"
    return f"{text} != 0" if tile.dtype is DType.i1 else text


def _picked(code: RegionCode, tile: Tile, index: str) -> str:
    text = code.call("pick", numeric(tile), index, tile.sizes[-1])
    return f"{text} != 0" if tile.dtype is DType.i1 else text


@rule("scatter.value", "scatter.src", "scatter_add")
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
        helper = "put" if op.name == "aten.scatter.src" else "put_sum"
        text = code.call(helper, numeric(tile), index.text, numeric(source), index.sizes[-1])
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


@rule("unbind.int")
def _unbind(code: RegionCode, op: Op) -> tuple[str, ...]:
    tile = code.tile(op, 0)
    axis = tile.axis(integer(op, "dim", 0))
    if tile.rows and axis == 0:
        raise unsupported(op, "it tells tokens apart")
    lane = code.call("lanes", tile.text, axis)
    texts = [f"tl.sum(tl.where({lane} == {i}, {numeric(tile)}, 0), axis={axis})" for i in range(len(op.results))]
    return tuple(f"{text} != 0" if tile.dtype is DType.i1 else text for text in texts)


@rule("select_scatter", "slice_scatter")
def _assign(code: RegionCode, op: Op) -> str:
    """x[:, i] = y, x[:, a:b] = y"""
    tile, source = code.tile(op, 0), code.tile(op, 1)
    axis = tile.axis(integer(op, "dim", 0))
    if axis != tile.rank - 1 or tile.rows != source.rows or tile.dtype is DType.i1:
        raise unsupported(op, "only numbers, along the last axis")
    lane = code.call("lanes", tile.text, axis)
    if op.name == "aten.select_scatter":
        index = integer(op, "index", 0) % tile.sizes[-1]
        return f"tl.where({lane} == {index}, tl.expand_dims({source.text}, {axis}), {tile.text})"
    start = integer(op, "start", 0) if attr(op, "start", None) is not None else 0
    start, size = start % tile.sizes[-1], source.sizes[-1]
    if integer(op, "step", 1) != 1:
        raise unsupported(op, "only one after the other")
    offset = f"tl.broadcast_to({lane} - {start}, {tile.shape()})"
    inside = f"({lane} >= {start}) & ({lane} < {start + size})"
    return f"tl.where({inside}, {code.call('pick', source.text, offset, size)}, {tile.text})"


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


@rule("arange", "arange.start", "arange.start_step")
def _arange(code: RegionCode, op: Op) -> str:
    result = code.result(op)
    if result.rows or len(result.sizes) != 1:
        raise unsupported(op, "it numbers the tokens")
    start, step = (literal(op, attr(op, name, value)) for name, value in (("start", 0), ("step", 1)))
    text = f"tl.arange(0, {result.lanes[0]})"
    text = f"{text}.to(tl.float32)" if result.dtype in FLOATS else text
    return f"{text} * {step} + {start}"


@rule("permute", "transpose.int")
def _permute(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    order = list(range(tile.rank))
    if op.name == "aten.permute":
        dims = attr(op, "dims", ())
        order = [tile.axis(dim) for dim in dims if isinstance(dim, int)] if isinstance(dims, Sequence) else []
    else:
        a, b = tile.axis(integer(op, "dim0", 0)), tile.axis(integer(op, "dim1", 0))
        order[a], order[b] = b, a
    if len(order) != tile.rank or (tile.rows and order[0] != 0):
        raise unsupported(op, "it moves the tokens")
    text = f"tl.permute({numeric(tile)}, {shape_text(*order)})"
    return f"{text} != 0" if tile.dtype is DType.i1 else text


@rule("flip")
def _flip(code: RegionCode, op: Op) -> str:
    tile = code.tile(op, 0)
    dims = attr(op, "dims", ())
    if not isinstance(dims, Sequence) or [tile.axis(dim) for dim in dims if isinstance(dim, int)] != [tile.rank - 1]:
        raise unsupported(op, "only along the last axis")
    lane = f"({tile.sizes[-1] - 1} - tl.arange(0, {tile.lanes[-1]}))[{'None, ' * (tile.rank - 1)}:]"
    return _picked(code, tile, f"tl.broadcast_to({lane}, {tile.shape()})")


@rule("stack")
def _stack(code: RegionCode, op: Op) -> str:
    result = code.result(op)
    values = op.arguments[0] if isinstance(op.arguments[0], tuple) else op.arguments
    axis = result.axis(integer(op, "dim", 0))
    if result.rows and axis == 0:
        raise unsupported(op, "it numbers the tokens")
    text = ""
    for i, value in enumerate(values):
        assert isinstance(value, Value)
        part = f"tl.broadcast_to(tl.expand_dims({numeric(code.tiles[value])}, {axis}), {result.shape()})"
        lane = f"tl.arange(0, {result.lanes[axis - result.rows]})"
        lane += f"[{', '.join(':' if other == axis else 'None' for other in range(result.rank))}]"
        text = f"tl.where({lane} == {i}, {part}, {text})" if text else part
    return f"{text} != 0" if result.dtype is DType.i1 else text


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
