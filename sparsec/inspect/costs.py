"""What every op of a module moves and computes, and how long a chip takes for it at best.

The time is the roofline's: the larger of bytes over bandwidth and flops over the rate for the op's element type
(Williams, Waterman and Patterson, CACM 52/4, 2009). Launches, caches and occupancy are left out: it is what no kernel
can beat, not what one reaches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sparsec.diagnostics import SparsecError
from sparsec.dialects.kernel import Launch
from sparsec.ir.core import Block, Func, Module, Op, Value
from sparsec.ir.opdef import Cost, OpDef
from sparsec.ir.types import DType, Sym, TensorType, dims_of, evaluate, symbols
from sparsec.passes.chips import CHIPS

SIZE = 128
"""What a size that is known only at run time is taken for, where nobody says."""


@dataclass(frozen=True)
class Roof:
    """The two limits of a chip.

    Args:
        bandwidth: memory, bytes/s.
        rates: flops/s by element type; `None` holds for those that are not named.
    """

    name: str
    bandwidth: float
    rates: Mapping[DType | None, float]

    def rate(self, dtype: DType | None) -> float:
        return self.rates.get(dtype, self.rates[None])


SERVER = Roof("a few cores of a server (35 GB/s, 3 TFLOP/s)", 35e9, {None: 3e12})
"""What a CPU is taken for where none is measured, so that what is said of a module stays the same everywhere."""

_GIVEN = re.compile(r"([\d.]+) ?([GT])B/s, ?([\d.]+) ?([GT])FLOP/s")
_SCALE = {"G": 1e9, "T": 1e12}


def roof(name: str) -> Roof:
    """A chip's roof by the name of its target, `cuda:sm_90`; `cpu`, measured here; or one's own: `37GB/s,6.7TFLOP/s`.

    Raises: SparsecError for a name that there is not.
    """
    if name in CHIPS:
        chip = CHIPS[name]
        rates: dict[DType | None, float] = {None: chip.flops[DType.f32]}
        rates.update((dtype, rate) for dtype, rate in chip.flops.items())
        return Roof(chip.name, chip.bandwidth, rates)
    if name == "cpu":
        from sparsec.inspect.cpu_roof import measured

        bandwidth, by_dtype = measured()
        said = f"{bandwidth / 1e9:.3g} GB/s, {by_dtype[DType.f32] / 1e12:.2g} TFLOP/s in f32, "
        said += f"{by_dtype[DType.bf16] / 1e12:.2g} in bf16"
        return Roof(f"this CPU (measured: {said})", bandwidth, by_dtype)
    if given := _GIVEN.fullmatch(name.strip()):
        bandwidth, flops = float(given[1]) * _SCALE[given[2]], float(given[3]) * _SCALE[given[4]]
        if min(bandwidth, flops) > 0:
            return Roof(name, bandwidth, {None: flops})
    known = ", ".join(CHIPS)
    raise SparsecError(
        f"there is no chip '{name}'\n  hint: name cpu (measured here), {known}, or give its limits as 37GB/s,6.7TFLOP/s"
    )


@dataclass(frozen=True)
class OpCost:
    """What one op costs.

    Args:
        bytes: read and written in memory, if no cache holds them already.
        flops: a multiply-add is 2.
        us: at best, in microseconds; 0 without a roof.
        limiter: which roof that is; "" for an op that costs nothing, or without a roof.
    """

    bytes: int
    flops: int
    us: float = 0.0
    limiter: Literal["memory", "compute", ""] = ""

    @property
    def intensity(self) -> float:
        """Flops per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


def free_symbols(module: Module) -> tuple[str, ...]:
    """The sizes of `main` that are known only at run time, in order of appearance."""
    found: dict[str, None] = {}
    for value in _values(module.main.body):
        found.update(dict.fromkeys(name for dim in dims_of(value.type) for name in symbols(dim)))
    return tuple(found)


def sizes(module: Module, given: Mapping[str, int]) -> dict[str, int]:
    """Every size of `main`: as given, else `SIZE`. Raises: SparsecError for one that the module does not have."""
    names = free_symbols(module)
    if unknown := [name for name in given if name not in names]:
        raise SparsecError(f"the module has no size '{unknown[0]}' (there are: {', '.join(names) or 'none'})")
    return {name: given.get(name, SIZE) for name in names}


def op_costs(module: Module, env: Mapping[str, int], on: Roof | None = None) -> dict[Op, OpCost]:
    """The cost of each op of `main`, and of the op in each kernel that it launches, as launched first.

    Args:
        env: every symbol's value, as `sizes` gives them.
        on: whose times; None leaves them out.
    """
    found = dict[Op, OpCost]()
    for op in module.main.body.ops:
        if isinstance(op, Launch):
            kernel = module.funcs[op.callee]
            inside = dict(_block(kernel.body, _bound(kernel, op, env), on))
            for inner, cost in inside.items():
                found.setdefault(inner, cost)
            found[op] = total(inside.values())
        else:
            found.update(_block_op(op, env, on))
    return found


def _block(block: Block, env: Mapping[str, int], on: Roof | None) -> Iterator[tuple[Op, OpCost]]:
    for op in block.ops:
        yield from _block_op(op, env, on)


def _block_op(op: Op, env: Mapping[str, int], on: Roof | None) -> Iterator[tuple[Op, OpCost]]:
    cost = op.cost(env) if isinstance(op, OpDef) else None
    if cost is not None:
        yield op, _timed(cost, _dtype(op), on)


def _timed(cost: Cost, dtype: DType | None, on: Roof | None) -> OpCost:
    if on is None or not (cost.bytes or cost.flops):
        return OpCost(cost.bytes, cost.flops)
    memory, compute = cost.bytes / on.bandwidth, cost.flops / on.rate(dtype)
    return OpCost(cost.bytes, cost.flops, max(memory, compute) * 1e6, "memory" if memory >= compute else "compute")


def _dtype(op: Op) -> DType | None:
    """What an op multiplies: its first operand that is a float."""
    types = (value.type for value in op.operands)
    return next((type.dtype for type in types if isinstance(type, TensorType) and type.dtype.is_float), None)


def total(costs: Iterable[OpCost]) -> OpCost:
    """One after the other; the limiter is the longest one's."""
    every = list(costs)
    limiter = max(every, key=lambda cost: cost.us).limiter if every else ""
    return OpCost(sum(c.bytes for c in every), sum(c.flops for c in every), sum(c.us for c in every), limiter)


def _bound(kernel: Func, launch: Launch, env: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a kernel as this launch gives them."""
    found = dict[str, int]()
    given = dict.fromkeys(value for value in launch.inputs if value is not None)
    for param, value in zip(kernel.body.args, given, strict=True):
        if isinstance(param.type, TensorType) and isinstance(value.type, TensorType):
            for inner, outer in zip(param.type.shape, value.type.shape, strict=True):
                if isinstance(inner, Sym) and inner.isidentifier():
                    found[str(inner)] = evaluate(outer, env)
    return found


def _values(block: Block) -> Iterator[Value]:
    yield from block.args
    for op in block.ops:
        yield from op.results
