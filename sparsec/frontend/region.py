"""The activation of an expert bank as a region: recorded from the model's own code, and written as a string.

The string is canonical JSON, so that it survives in an exported graph and equal activations are equal strings:

    {"args": [[["r", 48], "f32"], ...],
     "ops": [["aten.silu", [0], {}, [[["r", 48], "f32"]]], ...],
     "yield": [3]}

Values are numbered in order: the arguments, then every op's results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sparsec.frontend.builder import Builder
from sparsec.frontend.symbols import Symbols
from sparsec.ir.core import Argument, Attr, Block, Op, Value
from sparsec.ir.loc import Loc
from sparsec.ir.opdef import make
from sparsec.ir.types import DType, Sym, TensorType

ROWS = Sym("r")
PROBE = 7919  # rows while recording: a prime that no model's sizes contain, read back as `r`
_aten = torch.ops.aten
_NORMS = {  # kernels that also return statistics: what they are called where only the first result counts
    _aten._fused_rms_norm.default: _aten.rms_norm.default,
    _aten.native_layer_norm.default: _aten.layer_norm.default,
}
_HALVES = (_aten.split.Tensor, _aten.slice.Tensor)  # only taken of the whole input, without overlap: see `_parts`


class UnsupportedActivation(ValueError):
    """An activation that is not a pointwise function of the up-projection's parts; the text says why."""


def record(fn: Callable[[torch.Tensor], torch.Tensor], width: int, gated: bool, dtype: torch.dtype) -> tuple[str, str]:
    """What `fn` does to an up-projection's output, as a region.

    Args:
        fn: maps [rows, 2 * width] (`gated`) or [rows, width] to [rows, width].
        width: the expert's inner width.
        dtype: of the up-projection's output.

    Returns: the layout (`concat`, `interleaved` or `single`) and the region as a string.
    Raises: UnsupportedActivation.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        projected = torch.empty(PROBE, 2 * width if gated else width, dtype=dtype, device="meta")
        with (recorder := _Recorder(projected)):
            out = fn(projected)
    if tuple(out.shape) != (PROBE, width):
        raise UnsupportedActivation(f"it returns the shape {[*out.shape]}, not [rows, {width}]")
    layout, parts = _parts(recorder.calls, projected, width) if gated else ("single", [projected])
    return layout, encode(_region(recorder.calls, parts, out))


def record_rows(
    fn: Callable[..., torch.Tensor],
    width: int,
    dtype: torch.dtype,
    params: Sequence[tuple[tuple[int, ...], torch.dtype]],
) -> str:
    """What `fn` does to whole rows, each by itself, as a region.

    Args:
        fn: maps y [rows, width] and `params` to [rows, width].
        dtype: of y.
        params: shapes and dtypes of small tensors that `fn` reads besides, such as the weight of a norm.

    Raises: UnsupportedActivation.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        y = torch.empty(PROBE, width, dtype=dtype, device="meta")
        given = [y, *(torch.empty(shape, dtype=kind, device="meta") for shape, kind in params)]
        with (recorder := _Recorder(y)):
            out = fn(*given)
    if tuple(out.shape) != (PROBE, width):
        raise UnsupportedActivation(f"it returns the shape {[*out.shape]}, not [rows, {width}]")
    return encode(_region(recorder.calls, given, out))


class _Recorder(TorchDispatchMode):
    """Keeps every operator call, with the tensors themselves, so that identities stay valid.

    A call that changes a tensor in place is kept as one that makes a new tensor, which the old one stands for after it.
    """

    def __init__(self, input: torch.Tensor) -> None:
        super().__init__()
        self.input = input
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                raise UnsupportedActivation(f"it reads a tensor of shape {tuple(leaf.shape)} that it is not given")
        if not func._schema.is_mutable:
            result = func(*args, **kwargs)
            norm = _NORMS.get(func)
            self.calls.append((norm, args, kwargs, result[0]) if norm else (func, args, kwargs, result))
            return result
        name = func._schema.name.removeprefix("aten::")
        pure = getattr(getattr(_aten, name.removesuffix("_"), None), func._overloadname, None)
        changed = args[0] if args else None
        if pure is None or not name.endswith("_") or not isinstance(changed, torch.Tensor) or self._is_seen(changed):
            raise UnsupportedActivation(f"it changes a tensor in place ({func})")
        result = pure(*args, **kwargs)
        if (result.dtype, result.shape) != (changed.dtype, changed.shape):
            raise UnsupportedActivation(f"it changes a tensor in place and rounds what it writes ({func})")
        self.calls += [(pure, args, kwargs, result), (_aten.alias.default, (result,), {}, changed)]
        return changed

    def _is_seen(self, changed: torch.Tensor) -> bool:
        """Whether another tensor that a call made looks at this one's memory, apart from the halves of the input."""
        memory = changed.untyped_storage()._cdata
        for func, args, _, result in self.calls:
            if func in _HALVES and args[0] is self.input:
                continue
            seen = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            if sum(leaf.untyped_storage()._cdata == memory for leaf in {id(leaf): leaf for leaf in seen}.values()) > 1:
                return True
        return False


def _parts(calls: list[Any], projected: torch.Tensor, width: int) -> tuple[str, list[torch.Tensor]]:
    """How the two parts are taken from `projected`; takes those calls off the list."""
    found = dict[tuple[str, int], list[torch.Tensor]]()
    rest = list[Any]()
    for call in calls:
        func, args, kwargs, result = call
        if not any(arg is projected for arg in args):
            rest.append(call)
            continue
        bound = dict(zip((param.name for param in func._schema.arguments), args, strict=False)) | kwargs
        last = bound.get("dim", 0) in (1, -1)
        if func is _aten.split.Tensor and last and bound["split_size"] == width:
            for i, part in enumerate(result):
                found.setdefault(("concat", i), []).append(part)
        elif func is _aten.slice.Tensor and last and (place := _slice_place(bound, width)):
            found.setdefault(place, []).append(result)
        elif func is _aten.slice.Tensor and tuple(result.shape) == tuple(projected.shape):
            raise UnsupportedActivation("it slices its input twice: take the parts by one slice each")
        else:
            raise UnsupportedActivation(f"it applies {func} to the whole of the up-projection, not to its two parts")
    layouts = {layout for layout, _ in found}
    if len(layouts) != 1 or len(found) != 2:
        raise UnsupportedActivation("it does not take the up-projection apart into two halves or two interleaved parts")
    (layout,) = layouts
    calls[:] = rest
    aliases = {id(other): parts[0] for parts in found.values() for other in parts[1:]}
    if aliases:
        raise UnsupportedActivation("it takes the same part of the up-projection more than once")
    return layout, [found[layout, 0][0], found[layout, 1][0]]


def _slice_place(bound: dict[str, Any], width: int) -> tuple[str, int] | None:
    start, end, step = bound.get("start") or 0, bound.get("end"), bound.get("step", 1)
    end = 2 * width if end is None else min(end, 2 * width)
    if step == 2 and start in (0, 1) and end == 2 * width:
        return "interleaved", start
    if step == 1 and (start, end) in ((0, width), (width, 2 * width)):
        return "concat", start // width
    return None


def _region(calls: list[Any], parts: list[torch.Tensor], out: torch.Tensor) -> Block:
    symbols = Symbols()
    block = Block()
    builder = RowBuilder(block, symbols)
    values = {id(part): block.add_arg(builder.type_of(part), _name(i)) for i, part in enumerate(parts)}

    def resolve(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            if id(item) not in values:
                raise UnsupportedActivation(f"it reads a tensor of shape {tuple(item.shape)} that it is not given")
            return values[id(item)]
        if isinstance(item, list | tuple):
            return [resolve(part) for part in item]
        if isinstance(item, int) and 0 < item < PROBE**2 and item % PROBE == 0:
            raise UnsupportedActivation("it depends on the number of rows")
        return item

    for func, args, kwargs, result in calls:
        if func in (_aten.detach.default, _aten.alias.default):
            values[id(result)] = resolve(args[0])
            continue
        try:
            made = builder.call(func, resolve(args), {key: resolve(value) for key, value in kwargs.items()}, result)
        except (TypeError, KeyError) as error:
            raise UnsupportedActivation(str(error)) from error
        for item, value in zip(
            result if isinstance(result, list | tuple) else [result],
            made if isinstance(made, tuple) else [made],
            strict=True,
        ):
            values[id(item)] = value
    block.append(make("moe.yield", [resolve(out)]))
    _drop_dead(block)
    return block


class RowBuilder(Builder):
    def type_of(self, result: Any) -> TensorType:
        type = super().type_of(result)
        if not isinstance(type, TensorType):
            raise UnsupportedActivation("it computes with sizes")
        return TensorType(tuple(ROWS if dim == PROBE else dim for dim in type.shape), type.dtype)


def _name(i: int) -> str:
    return "abcdefgh"[i] if i < 8 else f"a{i}"


def _drop_dead(block: Block) -> None:
    for op in reversed(block.ops[:-1]):
        if not any(result.users for result in op.results):
            op.erase()


def encode(block: Block) -> str:
    """A region as a string; equal regions give equal strings."""
    numbers = {value: i for i, value in enumerate(block.args)}
    ops = list[Any]()
    for op in block.ops[:-1]:
        arguments = [_number(argument, numbers) for argument in op.arguments]
        for result in op.results:
            numbers[result] = len(numbers)
        attrs = {key: _write(attr) for key, attr in sorted(op.attrs.items())}
        ops.append([op.name, arguments, attrs, [_write_type(result) for result in op.results]])
    out = {
        "args": [_write_type(arg) for arg in block.args],
        "ops": ops,
        "yield": [numbers[value] for value in block.terminator.operands],
    }
    return json.dumps(out, separators=(",", ":"))


def decode(text: str, loc: Loc | None = None) -> Block:
    """A fresh region from its string. Raises: ValueError if it is none, or holds an op that is not a pure operator."""
    try:
        return _decode(_parse(text), loc)
    except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not an activation region: {error}") from error


def _decode(tree: dict[str, Any], loc: Loc | None) -> Block:
    block = Block([_read_type(item) for item in tree["args"]], [_name(i) for i in range(len(tree["args"]))])
    values = list[Value](block.args)
    for name, arguments, attrs, types in tree["ops"]:
        read = {key: _read(attr) for key, attr in attrs.items()}
        op = make(name, [_pick(item, values) for item in arguments], [_read_type(item) for item in types], read)
        if op.dialect != "aten" or not op.pure:
            raise ValueError(f"'{name}' is no pure operator of PyTorch")
        op.loc = loc or op.loc
        values += block.append(op).results
        for result in op.results:
            result.name = f"v{values.index(result)}"
    terminator: Op = make("moe.yield", [values[i] for i in tree["yield"]])
    block.append(terminator)
    return block


@lru_cache(maxsize=256)
def _parse(text: str) -> dict[str, Any]:
    return json.loads(text)


def _number(argument: Argument, numbers: dict[Value, int]) -> Any:
    if isinstance(argument, tuple):
        return [_number(item, numbers) for item in argument]
    return None if argument is None else numbers[argument]


def _pick(item: Any, values: list[Value]) -> Argument:
    if isinstance(item, list):
        return tuple(None if i is None else values[i] for i in item)
    return None if item is None else values[item]


def _write_type(value: Value) -> list[Any]:
    return [[dim if isinstance(dim, int) else str(dim) for dim in value.tensor.shape], value.tensor.dtype.value]


def _read_type(item: Any) -> TensorType:
    shape, dtype = item
    return TensorType(tuple(dim if isinstance(dim, int) else Sym(dim) for dim in shape), DType(dtype))


def _write(attr: Attr) -> Any:
    if isinstance(attr, DType):
        return {"dtype": attr.value}
    if isinstance(attr, Sym):
        return {"dim": str(attr)}
    if isinstance(attr, float) and attr - attr != 0:
        return {"float": str(attr)}
    if isinstance(attr, tuple):
        return [_write(item) for item in attr]
    return attr


def _read(item: Any) -> Attr:
    if isinstance(item, list):
        return tuple(_read(part) for part in item)
    if isinstance(item, dict):
        ((kind, value),) = item.items()
        return {"dtype": DType, "dim": Sym, "float": float}[kind](value)
    return item
