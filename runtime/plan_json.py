"""Plans as JSON, and back. Reading checks types only; `runtime.check` decides whether a plan may run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.plan import (
    Arg,
    Call,
    Exchange,
    Free,
    Kernel,
    Launch,
    Output,
    Plan,
    Region,
    Spread,
    SpreadLayer,
    Step,
    Tensor,
    Variant,
)

T = TypeVar("T")

_STEPS: dict[str, type[Step]] = {"call": Call, "launch": Launch, "free": Free, "exchange": Exchange}
_EXCHANGES = ("remap", "dispatch_start", "dispatch_wait", "combine_start", "combine_wait")


def to_json(value: Any) -> Any:
    """A plan, or any part of it, as what `json.dumps(..., allow_nan=False)` takes."""
    if is_dataclass(value):
        step = next((name for name, kind in _STEPS.items() if isinstance(value, kind)), None)
        out: dict[str, Any] = {} if step is None else {"step": step}
        return out | {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(data: Any) -> Plan:
    """A plan from parsed JSON. Raises: ArtifactError naming the entry that is missing or of the wrong type."""
    entry = _Entry(data, "plan")
    return Plan(
        args=entry.list("args", _arg),
        steps=entry.list("steps", _step),
        outputs=entry.list("outputs", _output),
        kernels={name: _kernel(kernel, f"kernel '{name}'") for name, kernel in entry.get("kernels", dict).items()},
        inputs=entry.get("inputs", dict),
        structure=entry.get("structure", dict),
        spread=None if entry.data.get("spread") is None else _spread(entry.data["spread"], "spread"),
    )


class _Entry:
    """A JSON object, read with checks that say where it stands."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ArtifactError(f"{where} is not a JSON object")
        self.data, self.where = data, where

    def get(self, key: str, kind: type[T]) -> T:
        value = self.data.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ArtifactError(f"{self.where}: '{key}' is missing or not of type {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        return None if self.data.get(key) is None else self.get(key, kind)

    def choice(self, key: str, choices: tuple[str, ...]) -> Any:
        value = self.get(key, str)
        if value not in choices:
            raise ArtifactError(f"{self.where}: '{key}' is {value!r}, not one of {', '.join(choices)}")
        return value

    def slot(self, key: str) -> int:
        return _index(self.data.get(key), f"{self.where}: '{key}'")

    def slots(self, key: str) -> list[int]:
        return self.list(key, _index)

    def optional_slots(self, key: str) -> list[int | None]:
        return self.list(key, lambda item, where: None if item is None else _index(item, where))

    def mapping(self, key: str, read: Callable[[Any, str], T]) -> dict[str, T]:
        return {name: read(item, f"{self.where}.{key}.{name}") for name, item in self.get(key, dict).items()}

    def list(self, key: str, read: Callable[[Any, str], T]) -> list[T]:
        return [read(item, f"{self.where}.{key}[{i}]") for i, item in enumerate(self.get(key, list))]


def _index(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArtifactError(f"{where} is {value!r}, not a slot number")
    return value


def _dim(value: Any, where: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ArtifactError(f"{where} is {value!r}, not a size")
    return value


def _tensor(data: Any, where: str) -> Tensor:
    entry = _Entry(data, where)
    return Tensor(tuple(entry.list("shape", _dim)), entry.choice("dtype", tuple(DTYPES)))


def _optional_tensor(data: Any, where: str) -> Tensor | None:
    return None if data is None else _tensor(data, where)


def _arg(data: Any, where: str) -> Arg:
    entry = _Entry(data, where)
    return Arg(
        name=entry.get("name", str),
        slot=entry.slot("slot"),
        kind=entry.choice("kind", ("input", "param", "buffer", "constant")),
        type=_optional_tensor(entry.data.get("type"), f"{where}.type"),
        source=entry.get("source", str),
        symbol=entry.get("symbol", str),
        zeros=entry.get("zeros", bool),
    )


def _step(data: Any, where: str) -> Step:
    entry = _Entry(data, where)
    kind = entry.choice("step", tuple(_STEPS))
    if kind == "free":
        return Free(entry.slots("slots"))
    if kind == "launch":
        return Launch(entry.get("kernel", str), entry.optional_slots("ins"), entry.slots("outs"))
    if kind == "exchange":
        return Exchange(
            op=entry.choice("op", _EXCHANGES),
            attrs=entry.get("attrs", dict),
            ins=entry.slots("ins"),
            outs=entry.slots("outs"),
            types=entry.list("types", _optional_tensor),
            binds=entry.list("binds", _bind),
        )
    return Call(
        op=entry.get("op", str),
        args=entry.get("args", list),
        kwargs=entry.get("kwargs", dict),
        outs=entry.optional_slots("outs"),
        binds=entry.list("binds", _bind),
    )


def _bind(data: Any, where: str) -> tuple[int, int, str]:
    if not isinstance(data, list) or len(data) != 3 or not isinstance(data[2], str):
        raise ArtifactError(f"{where} is not [slot, axis, symbol]")
    axis = data[1]
    return _index(data[0], where), -1 if axis == -1 else _index(axis, where), data[2]


def _output(data: Any, where: str) -> Output:
    entry = _Entry(data, where)
    return Output(entry.choice("kind", ("output", "mutation")), entry.slot("slot"), entry.get("source", str))


def _spread(data: Any, where: str) -> Spread:
    entry = _Entry(data, where)
    sizes = (entry.get("ranks", int), entry.get("width", int), entry.get("slots", int))
    return Spread(*sizes, layers=entry.list("layers", _spread_layer))


def _spread_layer(data: Any, where: str) -> SpreadLayer:
    entry = _Entry(data, where)
    return SpreadLayer(
        name=entry.get("name", str),
        experts=entry.get("experts", int),
        slots=entry.get("slots", str),
        shares=entry.get("shares", str),
        banks=entry.list("banks", _name),
    )


def _variant(data: Any, where: str) -> Variant:
    entry = _Entry(data, where)
    return Variant(entry.optional("up_to", int), entry.get("config", dict))


def _region(data: Any, where: str) -> Region:
    entry = _Entry(data, where)
    return Region(tuple(entry.list("params", _tensor)), entry.list("steps", _step), entry.slots("outs"))


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ArtifactError(f"{where} is {value!r}, not the name of a file")
    return value


def _kernel(data: Any, where: str) -> Kernel:
    entry = _Entry(data, where)
    return Kernel(
        name=entry.get("name", str),
        op=entry.get("op", str),
        backend=entry.get("backend", str),
        params=tuple(entry.list("params", _optional_tensor)),
        results=tuple(entry.list("results", _tensor)),
        tokens=_dim(entry.data.get("tokens"), f"{where}.tokens"),
        attrs=entry.get("attrs", dict),
        regions=entry.mapping("regions", _region),
        variants=entry.list("variants", _variant),
        binaries=entry.mapping("binaries", _name),
        source=entry.optional("source", str),
    )
