"""Put the experts of a layer on several devices: each rank holds some, and tokens travel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, get_args

from sparsec.diagnostics import CompileError
from sparsec.dialects.dist import (
    Algo,
    CombineStart,
    CombineWait,
    Dedup,
    DispatchStart,
    DispatchWait,
    Local,
    Payload,
    Policy,
    Remap,
    row_bytes,
)
from sparsec.dialects.moe import Experts, GroupedLinear
from sparsec.ir.core import Attr, Module, Op, Value
from sparsec.ir.derived import PLACEMENT
from sparsec.ir.equal import clone_block
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import DType, Sym, TensorType, dims_of, symbols
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.derivations import Deriver
from sparsec.passes.dispatch_choice import Links, Way, a_way, ways

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@register
@dataclass(frozen=True)
class PlaceExperts(Pass):
    """Share the experts of every `moe.experts` out to `devices` ranks, in nodes of `width`.

    The experts' ids become slots (`dist.remap`), tokens go to the ranks of their slots, the rows that come are computed
    by the same op with this rank's part of the banks (`dist.local`, a derived weight), and results go back. Which
    expert is in which slot is said at run time, by the buffers `placement/LAYER/slots` and `placement/LAYER/shares`.

    What tokens are sent once for, and the way they take, is what `passes/dispatch_choice.py` finds fastest, unless it
    is given. Attributes of the module named like the options come before them. A layer whose experts cannot be shared
    out stays whole on every rank, and a remark says why.
    """

    name: ClassVar[str] = "place-experts"
    devices: int = 1  #: ranks; with 1 nothing changes
    width: int = 0  #: ranks of a node; 0: all are in one
    slots: int = 0  #: experts that each rank holds of a layer; 0: as few as hold them all
    dispatch: str = "auto"  #: what a token is sent once for: none (each expert), rank or node
    algo: str = "auto"  #: flat, or two_level: over the network first, then inside the node
    policy: str = "static"  #: how a replica is chosen: static, local or batch
    payload: str = "model"  #: how rows travel to experts: as the model has them, bf16, or fp8 (with scales)
    tokens: int = 1024  #: of each rank, that the choice is made for
    inside: float = 450e9  #: bytes/s of a rank to others of its node
    outside: float = 50e9  #: bytes/s of a rank to other nodes

    def run(self, module: Module, ctx: PassContext) -> None:
        given = {name: module.attrs[name] for name in _CHECKED if name in module.attrs}
        chosen = _Chosen(self, {**{name: getattr(self, name) for name in _CHECKED}, **given})
        if chosen.devices == 1:
            return
        placer = _Placer(module, chosen, ctx)
        for op in list(module.main.body.ops):
            if isinstance(op, GroupedLinear):
                ctx.missed(op, why="every rank holds this bank: only whole experts (moe.experts) are shared out")
            elif isinstance(op, Experts):
                if (why := next(placer.obstacles(op), None)) is None:
                    placer.place(op)
                else:
                    ctx.missed(op, why=f"every rank holds all of these experts: {why}")
        if placer.count:
            module.attrs |= {"devices": chosen.devices, "width": chosen.width}
            placer.deriver.sweep()
            ctx.changed("layers placed", placer.count)


_CHECKED = ("devices", "width", "slots", "dispatch", "algo", "policy", "payload", "inside", "outside")


_WORDS: dict[str, tuple[str, ...]] = {
    "dispatch": ("auto", *get_args(Dedup)),
    "algo": ("auto", *get_args(Algo)),
    "policy": get_args(Policy),
    "payload": get_args(Payload),
}


class _Chosen:
    """What was asked for, checked."""

    def __init__(self, options: PlaceExperts, given: dict[str, Any]) -> None:
        self.tokens = options.tokens
        for name in ("devices", "width", "slots"):
            if type(given[name]) is not int or given[name] < (name == "devices"):
                raise CompileError(f"'{name}' must be a whole number, not {given[name]!r}")
        for name in ("inside", "outside"):
            if not isinstance(given[name], int | float) or not 0 < given[name] < inf:
                raise CompileError(f"'{name}' must be bytes/s, not {given[name]!r}")
        self.devices, self.slots = given["devices"], given["slots"]
        self.width = given["width"] or self.devices
        self.links = Links(self.devices, self.width, float(given["inside"]), float(given["outside"]))
        if self.devices % self.width:
            raise CompileError(
                f"{self.devices} devices do not make nodes of {self.width}: every node needs as many ranks"
            )
        for name, known in _WORDS.items():
            if given[name] not in known:
                raise CompileError(f"'{name}' is {' or '.join(known)}, not '{given[name]}'")
        self.dispatch, self.algo = str(given["dispatch"]), str(given["algo"])
        self.policy, self.payload = str(given["policy"]), str(given["payload"])
        if (self.dispatch, self.algo) == ("node", "flat"):
            raise CompileError("a token can go once to each node only by two levels: drop algo=flat, or dispatch=node")

    def way(self, k: int, row: int) -> Way:
        """The fastest way that was not ruled out; what was asked for and never pays is taken as it is."""
        for way in ways(self.links, k, row, self.tokens):
            if self.dispatch in ("auto", way.dedup) and self.algo in ("auto", way.algo):
                return way
        return a_way(self.links, k, row, self.tokens, self.dispatch, self.algo)


@dataclass
class _Placer:
    """Rewrites layers, and knows the tables and the parts of banks that it made."""

    module: Module
    chosen: _Chosen
    ctx: PassContext
    count: int = 0
    tables: dict[Value, tuple[Value, Value]] = field(default_factory=dict[Value, tuple[Value, Value]])
    parts: dict[Value, Value] = field(default_factory=dict[Value, Value])

    def __post_init__(self) -> None:
        self.deriver = Deriver(self.module)
        main = self.module.main.body
        values = [*main.args, *(result for op in main.ops for result in op.results)]
        taken = {name for value in values for dim in dims_of(value.type) for name in symbols(dim)}
        self.unbacked = max((int(name[1:]) + 1 for name in taken if re.fullmatch(r"u\d+", name)), default=0)
        self.layers = set[str]()

    def obstacles(self, op: Experts) -> Iterator[str]:
        """Why the experts of an op cannot be shared out."""
        experts, slots, ranks = op.num_experts, self.slots(op), self.chosen.devices
        if slots * ranks < experts:
            yield f"{ranks} ranks of {slots} slots cannot hold {experts}; {-(-experts // ranks)} slots can"
        if slots > experts:
            yield f"a rank has {slots} slots and would hold some of {experts} experts twice"
        if op.packing != "plain":
            yield f"the banks are packed already ('{op.packing}')"
        if op.ids.tensor.shape[0] != op.x.tensor.shape[0]:
            yield f"x is {op.x.type}, the ids are {op.ids.type}: one row for each token is needed"
        for name, value in self.banks(op):
            if not self.deriver.is_fixed(value):
                yield f"{name} (%{value.name}) is no weight that stays as it is"
            for user in value.users:
                if not isinstance(user, Experts | Local):
                    yield f"'{user.name}' reads {name} (%{value.name}) too"

    def slots(self, op: Experts) -> int:
        """How many experts a rank holds of a layer."""
        return self.chosen.slots or -(-op.num_experts // self.chosen.devices)

    def banks(self, op: Experts) -> Iterator[tuple[str, Value]]:
        for name in ("up", "down", "up_bias", "down_bias"):
            value = getattr(op, name)
            if value is not None:
                yield name, value

    def place(self, op: Experts) -> None:
        chosen, slots, x = self.chosen, self.slots(op), op.x.tensor
        table, shares = self.tables_of(op)
        ranks: dict[str, Attr] = {"ranks": chosen.devices, "width": chosen.width}
        policy: dict[str, Attr] = {"policy": chosen.policy} if chosen.policy != "static" else {}
        remap = self.insert(op, Remap([op.ids, table, shares], None, {"experts": op.num_experts, **ranks, **policy}))
        width = x.shape[-1]
        assert isinstance(width, int)
        way = chosen.way(op.k, row_bytes(width, x.dtype, chosen.payload))
        how: dict[str, Attr] = {"dedup": way.dedup, "algo": way.algo, "payload": chosen.payload}
        plain = DispatchStart.fields().defaults
        how = {name: value for name, value in how.items() if plain[name] != value}
        start = self.insert(op, DispatchStart([op.x, remap.result, op.weights], None, {**ranks, "slots": slots, **how}))
        u, n = Sym(f"u{self.unbacked}"), 1 if way.dedup == "none" else op.k
        self.unbacked += 1
        types = (
            TensorType((u, width), x.dtype),
            TensorType((u, n), DType.i64),
            TensorType((u, n), op.weights.tensor.dtype),
        )
        wait = self.insert(op, DispatchWait([start.result], types))
        parts = {value: self.part(op, value, table, slots) for _, value in self.banks(op)}
        arguments = [*wait.results, *(parts[v] if isinstance(v, Value) and v in parts else v for v in op.arguments[3:])]
        regions = [clone_block(region, {}) for region in op.regions]
        here = self.insert(op, Experts(arguments, None, op.attrs, regions))
        back = self.insert(op, CombineStart([here.result, start.result]))
        out = self.insert(op, CombineWait([back.result]))
        for made, names in ((remap, ["where"]), (start, ["sent"]), (wait, ["rows", "local", "w"]), (back, ["back"])):
            for value, name in zip(made.results, names, strict=True):
                value.name = name
        here.result.name = f"{op.y.name or 'y'}.here"
        for _, value in self.banks(op):
            if parts[value].op is not None:
                self.parts[value] = self.deriver.take(parts[value], ".here")
        self.ctx.passed(here, self._told(op, slots, way))
        op.y.replace_by(out.result)
        op.erase()
        self.count += 1

    def insert(self, op: Op, new: OpDef) -> OpDef:
        new.loc = op.loc
        assert op.block is not None
        op.block.insert_before(op, new)
        return new

    def part(self, op: Op, bank: Value, table: Value, slots: int) -> Value:
        """This rank's part of a bank: an argument of `main`, or the op that computes what will be one."""
        if bank in self.parts:
            return self.parts[bank]
        return self.insert(op, Local([bank, table], None, {"ranks": self.chosen.devices, "slots": slots})).result

    def tables_of(self, op: Experts) -> tuple[Value, Value]:
        """The arguments that say where the experts of a bank live: slots and shares."""
        if op.up not in self.tables:
            main, layer = self.module.main, self.layer(op)
            made = list[Value]()
            for name, dtype in (("slots", DType.i64), ("shares", DType.f64)):
                type = TensorType((self.slots(op) * self.chosen.devices,), dtype)
                arg = main.body.add_arg(type, f"{name}.{layer}")
                source = f"{PLACEMENT}{layer}/{name}"
                main.arg_attrs[arg] = {"kind": "buffer", "source": source, "experts": op.num_experts}
                made.append(arg)
            self.tables[op.up] = made[0], made[1]
        return self.tables[op.up]

    def layer(self, op: Op) -> str:
        """What tables of a layer are called: its number in the module's path, else how many came before."""
        found = _NUMBER.search(op.loc.scope)
        free = number = found[1] if found else str(len(self.tables))
        count = 0
        while free in self.layers:
            count += 1
            free = f"{number}.{count}"
        self.layers.add(free)
        return free

    def _told(self, op: Experts, slots: int, way: Way) -> str:
        once = {"none": "to each of its experts", "rank": "once to each rank", "node": "once to each node"}[way.dedup]
        by = "" if way.algo == "flat" else ", over the network first"
        tokens = self.chosen.tokens
        return (
            f"{op.num_experts} experts on {self.chosen.devices} ranks of {slots} slots; a token goes {once}{by}; for "
            f"{tokens} tokens a rank sends {way.inside / 1e6:.3g} MB in its node and {way.outside / 1e6:.3g} MB to "
            f"others, {way.seconds * 1e6:.3g} us there and back"
        )
