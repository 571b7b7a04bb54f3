"""Kernels that route and group: `moe.route_group`, `moe.route` alone, and `moe.group` for ids from elsewhere.

Grouping is a stable counting sort. For a few tokens one program does everything. Otherwise there are two launches:
programs route some blocks of rows each and count their experts; then every program adds up the counts of all and of
those before it, and writes its pairs. Nobody waits for another program, and nothing is added by atomics: there are so
few programs (MOST_PROGRAMS) that reading all counts costs each a microsecond or two, less than a launch between them.

By instructions, for E = 128 and k = 8 on Hopper: one program takes 800 in its only warp for one token, and 3200 in each
of 8 warps for 32, of which softmax and top-k are most; at 4 a cycle that is about 3.6 us of a multiprocessor. Two
launches with 8 rows a program take 1100 and 2400 in each of 4 warps, about a microsecond each and what lies between. So
this is how far one program goes; with fewer experts up to 64 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sparsec.codegen.triton.launch import I32, TOKENS, Entry, Parameter, Schedule, Sketch, Wiring, ceil_div
from sparsec.codegen.triton.region import RegionCode, converted
from sparsec.codegen.triton.source import indent, library, module_text
from sparsec.codegen.triton.tile import FLOATS, INTEGERS, POINTERS, Names, Tile, known_sizes, padded, unsupported
from sparsec.dialects.moe import Group, Route, RouteGroup
from sparsec.ir.core import Func, Value
from sparsec.ir.types import DType, Sym

RESERVED = tuple(
    "rows live tokens ids ids_in ids_out weights weights_out order offsets tiles counts count program steps start stop "  # noqa: SIM905
    "expert chosen slot mask ROWS PDL E E_PAD K K_PAD".split()
)
CONSTANTS = "ROWS: tl.constexpr, PDL: tl.constexpr"
MAX_LANES = 16384
"""Most lanes of a tile that still fit in registers."""

FEW_PAIRS = 32
"""Most pairs that one program sorts by comparing each with each."""

MOST_PROGRAMS = 256
"""Most programs among which many tokens are divided: about two for each multiprocessor."""

KEEP = "ids = kept_ids(ids, live, E, K)"


def sketch(func: Func, op: Route | RouteGroup | Group) -> Sketch:
    """Text and launches of a routing kernel. Raises: CompileError for a region that no kernel can hold."""
    return _Router(func, op).sketch()


def _role(i: int, value: Value) -> str:
    """What to call an operand: the logits lead, others keep a name that is short."""
    return "logits" if i == 0 else value.name if 0 < len(value.name) <= 24 else f"param_{i}"


class _Router:
    """Writes one kernel; the parts that routing and grouping share are methods."""

    def __init__(self, func: Func, op: Route | RouteGroup | Group) -> None:
        self.func, self.op = func, op
        ids = op.ids.tensor
        if len(ids.shape) != 2 or not isinstance(ids.shape[1], int) or ids.dtype not in INTEGERS:
            raise unsupported(op, f"ids are {ids}, must be [tokens, k] integers with k known")
        self.k = ids.shape[1]
        experts = op.num_experts
        if not isinstance(experts, int):
            raise unsupported(op, f"the number of experts {experts!r} must be known")
        self.experts = experts
        self.inputs = list[Value]() if isinstance(op, Group) else list(dict.fromkeys(op.operands))
        self.names = Names((*RESERVED, *library()))
        self.arguments = {value: self.names.fresh(_role(i, value)) for i, value in enumerate(self.inputs)}
        extras = () if isinstance(op, Group) else op.extras
        self.extras = {value: self.names.fresh(f"extra_{i}") for i, value in enumerate(extras)}
        widths = [self.experts, *(v.tensor.shape[-1] for v in (*self.inputs, *extras) if v.tensor.shape)]
        self.widest = max(padded(width) for width in widths if isinstance(width, int))

    def sketch(self) -> Sketch:
        functions = list[str]()
        if not isinstance(self.op, Group):
            functions.append(self._region())
        variants = self._variants()
        if isinstance(self.op, Route):
            functions.append(self._choose_text())
        elif any(not self._alone(v) for v in variants):
            functions += [self._count_text(), self._place_text()]
        if not isinstance(self.op, Route) and any(self._alone(v) for v in variants):
            functions.append(self._alone_text())
        constants = {"E": self.experts, "E_PAD": padded(self.experts), "K": self.k, "K_PAD": padded(self.k)}
        source = module_text(self.func, self.op, self._summary(), constants, functions)
        return Sketch(source, tuple(self._schedule(variant) for variant in variants))

    def _summary(self) -> str:
        routing = f"choose {self.k} of {self.experts} experts for each token and weigh them"
        grouping = "sort the (token, slot) pairs by expert, keeping their order"
        if isinstance(self.op, Route):
            return f"{routing}."
        return f"{grouping}." if isinstance(self.op, Group) else f"{routing}; then {grouping}."

    def _variants(self) -> list[Mapping[str, Any]]:
        given = self.func.attrs.get("variants") or self.op.attrs.get("variants")
        if given:
            return list(cast("Sequence[Mapping[str, Any]]", given))
        few = max(4, min(16, 4096 // self.widest))
        many = max(4, min(32, 4096 // self.widest))
        warps = 8 if self.widest >= 128 else 4
        return [
            {"up_to": few, "block_rows": few, "num_warps": warps},
            {"up_to": None, "block_rows": many, "num_warps": warps},
        ]

    def _rows(self, variant: Mapping[str, Any]) -> int:
        rows = padded(int(variant.get("block_rows") or max(4, min(32, 4096 // self.widest))))
        return max(1, min(rows, MAX_LANES // self.widest))

    def _alone(self, variant: Mapping[str, Any]) -> bool:
        """Whether one program takes all tokens of a variant."""
        return variant.get("up_to") is not None and variant["up_to"] <= self._rows(variant)

    # Text

    def _region(self) -> str:
        """The function that turns logits into ids and weights."""
        op = self.op
        assert not isinstance(op, Group)
        code = RegionCode(self.names, rounds=True)
        tiles = {value: self._load(code, value) for value in self.inputs}
        ids, weights, *extras = code.run(op.body, [tiles[value] for value in op.operands])  # type: ignore[index]
        texts = [converted(ids.text, ids.dtype, DType.i32), weights.text, *(extra.text for extra in extras)]
        code.lines.append(f"return {', '.join(texts)}")
        doc = '"""Expert ids and weights of a block of rows, [ROWS, K_PAD] each, and what else the model reads."""'
        return f"@triton.jit\ndef region({self._names(', ')}rows, live, ROWS: tl.constexpr):\n" + indent(
            [doc, *code.lines]
        )

    def _load(self, code: RegionCode, value: Value) -> Tile:
        """Load an operand: rows of this block, or all of a parameter."""
        type, pointer = value.tensor, self.arguments[value]
        if type.dtype not in FLOATS | INTEGERS | {DType.i1}:
            raise unsupported(self.op, f"%{value.name} is {type}: that element type is not computed in a kernel")
        rows = self._has_rows(value)
        sizes = known_sizes(type, rows, self.op)
        if len(sizes) > 1 and (rows or sizes[:-1] != (1,)):
            raise unsupported(self.op, f"%{value.name} is {type}: more than one axis besides the tokens")
        name = self.names.fresh(f"{pointer}_tile")
        size = sizes[-1] if sizes else 1
        lane = f"tl.arange(0, {padded(size)})"
        if rows:
            at, mask = f"rows[:, None] * {size} + {lane}[None, :]", "live[:, None]"
            mask += f" & ({lane} < {size})[None, :]" if padded(size) != size else ""
        else:
            at, mask = (lane, f"{lane} < {size}" if padded(size) != size else "") if sizes else ("", "")
        load = f"tl.load({pointer}{' + ' + at if at else ''}{f', mask={mask}, other=0' if mask else ''})"
        load += f"[{'None, ' * (len(sizes) - 1)}:]" if len(sizes) > 1 else ""
        stored = "i1" if type.dtype is DType.i1 else "f32" if type.dtype in FLOATS else "i32"
        cast = {"f32": ".to(tl.float32)", "i32": ".to(tl.int32)", "i1": " != 0"}[stored]
        code.lines.append(f"{name} = {load}{'' if type.dtype is DType.f32 else cast}")
        return Tile(name, sizes, rows, type.dtype, "" if rows else pointer)

    def _has_rows(self, value: Value) -> bool:
        """Whether an operand has one row per token: the logits, and what is as long (a bias may be, by chance)."""
        logits, shape = self.inputs[0], value.tensor.shape
        if value is logits or not shape:
            return value is logits
        return shape[0] == logits.tensor.shape[0] and (isinstance(shape[0], Sym) or len(shape) > 1)

    def _names(self, after: str) -> str:
        return "".join(name + after for name in self.arguments.values())

    def _tile_of_ids(self) -> list[str]:
        """Lines that make `ids`, those of experts that are not there as -1, for the rows of this block."""
        if isinstance(self.op, Group):
            lines = [
                "slot = tl.arange(0, K_PAD)[None, :]",
                "mask = live[:, None] & (slot < K)",
                "ids = tl.load(ids_in + rows[:, None] * K + slot, mask=mask, other=-1)",
            ]
        else:
            results = ", ".join(["ids", "weights", *self.extras.values()])
            lines = [f"{results} = region({self._names(', ')}rows, live, ROWS)", *self._store_chosen()]
        return lines

    def _store_chosen(self) -> list[str]:
        lines = [
            "slot = tl.arange(0, K_PAD)[None, :]",
            "mask = live[:, None] & (slot < K)",
            "tl.store(ids_out + rows[:, None] * K + slot, ids, mask=mask)",
            "tl.store(weights_out + rows[:, None] * K + slot, weights, mask=mask)",
        ]
        for value, name in self.extras.items():
            (size,) = known_sizes(value.tensor, True, self.op)
            at = f"{name}_out + rows[:, None] * {size} + {name}_lane"
            lines += [
                f"{name}_lane = tl.arange(0, {padded(size)})[None, :]",
                f"tl.store({at}, {name}, mask=live[:, None] & ({name}_lane < {size}))",
            ]
        return lines

    @property
    def _chosen(self) -> str:
        if isinstance(self.op, Group):
            return "ids_in, "
        outputs = "".join(f"{name}_out, " for name in ("ids", "weights", *self.extras.values()))
        return self._names(", ") + outputs

    @property
    def _sorted(self) -> dict[str, Value]:
        """The results of the sort by the names of their parameters."""
        op = self.op
        assert not isinstance(op, Route)
        return {"order": op.order, "offsets": op.offsets} | ({} if op.tiles is None else {"tiles": op.tiles})

    @property
    def _placed(self) -> str:
        return "".join(f"{name}, " for name in self._sorted)

    def _choose_text(self) -> str:
        lines = [
            '"""One block of rows: ids and weights."""',
            "arrive(PDL)",
            "rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
            "live = rows < tokens",
            "rows = rows.to(tl.int64)",
            *self._tile_of_ids(),
        ]
        return self._entry(f"{self.func.name}_choose", f"{self._chosen}tokens, {CONSTANTS}", lines)

    def _count_text(self) -> str:
        ids = "" if isinstance(self.op, Group) else "ids and weights, "
        lines = [
            f'"""Some blocks of rows: {ids}how often each expert was chosen: a row of counts [programs, E]."""',
            "arrive(PDL)",
            "program = tl.program_id(0)",
            "count = tl.zeros([E_PAD], tl.int32)",
            "start = program * steps * ROWS",
            "stop = start + steps * ROWS",
            "while start < stop:",
            "    rows = start + tl.arange(0, ROWS)",
            "    live = rows < tokens",
            "    rows = rows.to(tl.int64)",
            *(f"    {line}" for line in self._tile_of_ids()),
            f"    {KEEP}",
            "    count += tl.sum(hits(ids, K, E_PAD), axis=0)",
            "    start += ROWS",
            "expert = tl.arange(0, E_PAD)",
            "tl.store(counts + program * E + expert, count, mask=expert < E)",
        ]
        return self._entry(f"{self.func.name}_count", f"{self._chosen}counts, tokens, steps, {CONSTANTS}", lines)

    def _place_text(self) -> str:
        listing = [
            "if tl.program_id(1) == 1:",
            "    list_tiles(tiles, count, stops, total, tokens * K, program, tl.num_programs(0), E, E_PAD)",
            "    return",
        ]
        lines = [
            '"""Some blocks of rows: their pairs go to their places. The first program writes the offsets."""',
            "arrive(PDL)",
            "program = tl.program_id(0)",
            "count, before = add_counts(counts, program, tl.num_programs(0), E, E_PAD)",
            "stops = tl.cumsum(count, axis=0)",
            "total = tl.sum(count, axis=0)",
            *(listing if "tiles" in self._sorted else []),
            "if program == 0:",
            "    store_offsets(offsets, stops, E, E_PAD)",
            "first, earlier = stops - count + before, tl.sum(before, axis=0)",
            "slot = tl.arange(0, K_PAD)[None, :]",
            "start = program * steps * ROWS",
            "stop = start + steps * ROWS",
            "while start < stop:",
            "    rows = start + tl.arange(0, ROWS)",
            "    live = rows < tokens",
            "    at = ids_in + rows[:, None].to(tl.int64) * K + slot",
            "    ids = tl.load(at, mask=live[:, None] & (slot < K), other=-1)",
            f"    {KEEP}",
            "    chosen = hits(ids, K, E_PAD)",
            "    place(order, ids, chosen, rows, live, first, earlier, total, tokens * K, K, E_PAD)",
            "    here = tl.sum(chosen, axis=0)",
            "    first, earlier = first + here, earlier + tl.sum(here, axis=0)",
            "    start += ROWS",
        ]
        parameters = f"ids_in, counts, {self._placed}tokens, steps, {CONSTANTS}"
        return self._entry(f"{self.func.name}_place", parameters, lines)

    def _alone_text(self) -> str:
        tiles = "tiles" if "tiles" in self._sorted else "order"
        listed = "tiles" in self._sorted
        lines = [
            '"""All tokens in one program: at most ROWS of them."""',
            "arrive(PDL)",
            "rows = tl.arange(0, ROWS)",
            "live = rows < tokens",
            *self._tile_of_ids(),
            KEEP,
            f"if ROWS * K_PAD <= {FEW_PAIRS}:",
            f"    group_few(order, offsets, {tiles}, ids, tokens, E, E_PAD, K, {listed})",
            "else:",
            "    chosen = hits(ids, K, E_PAD)",
            "    count = tl.sum(chosen, axis=0)",
            "    stops = tl.cumsum(count, axis=0)",
            "    store_offsets(offsets, stops, E, E_PAD)",
            "    total = tl.sum(count, axis=0)",
            *(["    list_tiles(tiles, count, stops, total, tokens * K, 0, 1, E, E_PAD)"] if listed else []),
            "    place(order, ids, chosen, rows, live, stops - count, 0, total, tokens * K, K, E_PAD)",
        ]
        parameters = f"{self._chosen}{self._placed}tokens, {CONSTANTS}"
        return self._entry(f"{self.func.name}_few", parameters, lines)

    def _entry(self, name: str, parameters: str, lines: list[str]) -> str:
        sizes = [size for size in ("tokens", "steps") if f"{size}, " in parameters]
        return f"@triton.jit(do_not_specialize={sizes})\ndef {name}({parameters}):\n{indent(lines)}"

    # Launches

    def _schedule(self, variant: Mapping[str, Any]) -> Schedule:
        op, wiring = self.op, Wiring(self.op)
        rows, warps = self._rows(variant), int(variant.get("num_warps", 4))
        blocks = f"max(1, {ceil_div('t', rows)})"
        if isinstance(op, Group):
            stored = Parameter("ids_in", POINTERS[op.ids.tensor.dtype], wiring.operand(op.ids))
            chosen = [stored]
        else:
            given = [Parameter(name, POINTERS[v.tensor.dtype], wiring.operand(v)) for v, name in self.arguments.items()]
            ids, weights = wiring.result(op.ids), wiring.result(op.weights)
            stored = Parameter("ids_in", POINTERS[op.ids.tensor.dtype], ids)
            chosen = [
                *given,
                Parameter("ids_out", stored.type, ids),
                Parameter("weights_out", POINTERS[op.weights.tensor.dtype], weights),
                *(
                    Parameter(f"{name}_out", POINTERS[value.tensor.dtype], wiring.result(value))
                    for value, name in self.extras.items()
                ),
            ]
        constants = {"ROWS": rows, "PDL": 0}
        up_to, name = variant.get("up_to"), self.func.name
        if isinstance(op, Route):
            entry = Entry(f"{name}_choose", (*chosen, TOKENS), constants, (blocks, "1"), warps, 1)
            return Schedule(up_to, (entry,))
        placed = [Parameter(name, I32, wiring.result(value)) for name, value in self._sorted.items()]
        if self._alone(variant):
            entry = Entry(f"{name}_few", (*chosen, *placed, TOKENS), constants, ("1", "1"), warps, 1)
            return Schedule(up_to, (entry,), tuple(wiring.scratch))
        each = f"max(1, {ceil_div('t', rows * MOST_PROGRAMS)})"
        programs = f"max(1, ({blocks} + {each} - 1) // {each})"
        counts = Parameter("counts", I32, wiring.buffer(f"{programs} * {4 * self.experts}"))
        steps = Parameter("steps", "i32", {"size": each})
        places = (programs, "2" if op.tiles is not None else "1")
        entries = (
            Entry(f"{name}_count", (*chosen, counts, TOKENS, steps), constants, (programs, "1"), warps, 1),
            Entry(f"{name}_place", (stored, counts, *placed, TOKENS, steps), constants, places, warps, 1),
        )
        return Schedule(up_to, entries, tuple(wiring.scratch))
