"""Which parameters work for which token, read from the operators that `sparsec.frontend.blocks` noted.

Nothing here looks at the name of a parameter, a class or an option. A *selection* is a top-k or arg-max over an axis of
E; what is computed from its indices carries it along. A *bank* is E equal shares of parameters of which a token uses k:

- the operand of an op of the `moe` dialect, or of a grouped GEMM (an integer per expert says where its rows end);
- rows of a parameter gathered by indices that carry a selection;
- a parameter whose leading size is E, used slice by slice or as the batch of a product that meets a selection of E;
- E modules built alike whose inputs or results meet a selection of E.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeVar

from sparsec.frontend.blocks import Call, Family, Record, Value

_MATMULS = frozenset(f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "einsum"))
_SOFTMAXES = frozenset({"aten._softmax", "aten._safe_softmax", "aten.softmax"})
_GATHERS = frozenset({"aten.index", "aten.index_select", "aten.embedding"})
_COPIES = frozenset(
    {"aten._to_copy", "aten.to", "aten.contiguous", "aten.reshape", "aten.clone", "aten._unsafe_view", "aten.detach"}
)
_RESHAPES = frozenset({"aten.view", "aten._unsafe_view", "aten.reshape"})
_WHOLE = frozenset({"block", "stopped"})
_REORDERS = frozenset({"aten.cumsum", "aten.sort", "aten.argsort"})

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Selection:
    """`k` chosen out of `extent`, from `source`, in the module at `scope`."""

    extent: int
    k: int
    scope: str
    source: Value


@dataclass(frozen=True)
class Bank:
    """A parameter, or all parameters below a module, of which a token uses `k / experts`.

    Args:
        path: the parameter, or the first of the E modules.
        experts, k: E, and how many of them a token uses.
        block: path of the innermost module that holds both the bank and what selects from it.
    """

    path: str
    experts: int
    k: int
    block: str


@dataclass(frozen=True)
class Attention:
    """What one attention remembers of its tokens.

    Args:
        scope: path of the module.
        memory: if `returned`, the tensors nearest to keys and values that the model hands back: its cache, be it keys
            and values or what they are computed from. If not, keys and values before heads are repeated.
        length: tokens remembered, per sequence; None if it depends on data.
        returned: whether the model hands any back.
    """

    scope: str
    memory: tuple[Value, ...]
    length: int | None
    returned: bool


@dataclass(frozen=True)
class _View:
    """A parameter seen through views: its leading sizes so far, and whether this is only a part of it."""

    param: str
    leads: frozenset[int]
    rank: int
    part: bool = False


@dataclass(frozen=True, eq=False)
class _Candidate:
    """What would be a bank if its results met a selection."""

    path: str
    extents: frozenset[int]
    scope: str
    family: Family | None = None


class Dataflow:
    """Reads a record once, in order.

    Attributes:
        banks: by the path of their parameter or module.
        tables: parameters that are only looked up by ids that the caller gave: input embeddings.
        used: parameters that some operator reads, by canonical path.
        attentions: softmax attentions, one per module.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.banks = dict[str, Bank]()
        self.used = set[str]()
        self.producer = dict[Value, Call]()
        self.views = dict[Value, _View]()
        self.selections = list[Selection]()
        self._carried = dict[Value, frozenset[Selection]]()
        self._candidates = dict[Value, frozenset[_Candidate]]()
        self._ids = set[Value]()
        self._looked_up, self._multiplied = set[str](), set[str]()
        for call in record.calls:
            self._read(call)
            self.producer |= dict.fromkeys(call.results, call)
        for call in record.calls:
            if call.name == "stopped":
                self._read_stopped(call)
        self.tables = self._looked_up - self._multiplied
        self.attentions = list(self._attentions())

    def bank_of(self, path: str) -> Bank | None:
        """The bank that a parameter, by canonical path, belongs to."""
        parts = path.split(".")
        return next((b for i in range(len(parts)) if (b := self.banks.get(".".join(parts[: i + 1])))), None)

    def router_of(self, block: str) -> set[str]:
        """Parameters inside a block that lead to its selections."""
        todo = [s.source for s in self.selections if inside(s.scope, block)]
        found, seen = set[str](), set[Value]()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.views:
                found.add(self.record.canonical(self.views[value].param))
            elif (call := self.producer.get(value)) and inside(call.scope, block):
                todo += call.operands
        return found

    def _read(self, call: Call) -> None:
        operands = call.operands
        for value in operands:
            if value.param and value not in self.views:
                leads = frozenset(size for size in value.shape[:1] if size)
                self.views[value] = _View(value.param, leads, len(value.shape))
            if value.input and not value.dtype.is_floating_point:
                self._ids.add(value)
        if self._is_view(call):
            return
        carried = _union(self._carried, operands)
        candidates = _union(self._candidates, operands)
        if call.name == "block":
            self._read_block(call, carried)
            return
        found = self._read_params(call, carried)
        for candidate in candidates:
            others = _union(self._carried, (v for v in operands if candidate not in self._candidates.get(v, ())))
            self._confirm(candidate, others)
        self._carry(call, carried, candidates | found)
        self._select(call)

    def _is_view(self, call: Call) -> bool:
        """Follow a parameter through views and casts."""
        view = self.views.get(call.operands[0]) if call.operands else None
        if view is None or not (call.is_view or call.name in _COPIES):
            return False
        whole = call.operands[0].numel
        for result in call.results:
            part = view.part or (result.numel != whole and "expand" not in call.name)
            leads = view.leads
            if call.name in _RESHAPES and not part and len(result.shape) > 2 and result.shape[0]:
                leads |= {result.shape[0]}
            self.views[result] = replace(view, leads=leads, part=part, rank=max(view.rank, len(result.shape)))
        return True

    def _read_block(self, call: Call, carried: frozenset[Selection]) -> None:
        """A member's results carry no selection made inside; as one of E alike, it is a candidate."""
        family = call.family
        if family is None or len(family) < 2:
            return
        candidate = _Candidate(family.members[0], frozenset({len(family)}), family.container, family)
        self._confirm(candidate, carried)
        self._candidates |= dict.fromkeys(call.results, frozenset({candidate}))

    def _read_params(self, call: Call, carried: frozenset[Selection]) -> frozenset[_Candidate]:
        """Note the parameters that a call reads; those that might be banks are returned or confirmed."""
        found = set[_Candidate]()
        for value in call.operands:
            view = self.views.get(value)
            if view is None:
                continue
            path = self.record.canonical(view.param)
            self.used.add(path)
            gathered = call.name in _GATHERS and call.operands[0] is value
            if gathered and any(v in self._ids for v in call.operands):
                self._looked_up.add(path)
                continue
            self._multiplied.add(path)
            candidate = _Candidate(path, view.leads, call.scope)
            if len(self.record.parameters[view.param].shape) < 2:
                continue  # a scale or a bias per expert is no bank
            if call.name.startswith("moe.") and "k" in call.kwargs:
                self._confirm(candidate, carried, value.shape[0] or 0, call.kwargs["k"] * self.record.tokens)
            elif gathered and carried and not view.part:
                ids = max((v.numel or 0 for v in call.operands if v is not value), default=0)
                self._confirm(candidate, carried, value.shape[0] or 0, ids)
            elif self._groups(call, value):
                rows = next((v.shape[0] for v in call.operands if v not in self.views and len(v.shape) == 2), 0)
                self._confirm(candidate, carried, value.shape[0] or 0, rows or 0)
            elif view.part or (call.name in _MATMULS and view.rank > 2):
                self._confirm(candidate, carried)
                found.add(candidate)
        return frozenset(found)

    def _groups(self, call: Call, bank: Value) -> bool:
        """Whether the call takes one integer per slice of a whole three-dimensional parameter."""
        return (
            len(bank.shape) == 3
            and not self.views[bank].part
            and any(v.shape == bank.shape[:1] and not v.dtype.is_floating_point for v in call.operands)
        )

    def _confirm(self, candidate: _Candidate, carried: Iterable[Selection], experts: int = 0, pairs: int = 0) -> None:
        """Make a bank of the candidate if a selection fits it.

        Args:
            candidate: what the bank would be.
            carried: selections that reach it.
            experts: E, where the operator itself tells it; a selection of another extent will then do.
            pairs: (token, expert) pairs that the operator works on, where it tells.
        """
        if candidate.path in self.banks:
            return
        members = candidate.family.members if candidate.family else ()
        outside = [s for s in carried if not any(inside(s.scope, member) for member in members)]
        fitting = [s for s in outside if s.extent in candidate.extents]
        k = _count(fitting, candidate.scope)
        if pairs and pairs % self.record.tokens == 0:
            k = pairs // self.record.tokens
        experts = experts or (fitting[0].extent if fitting else 0)
        if 0 < k < experts:
            near = [innermost(s.scope, candidate.scope) for s in fitting or outside] or [candidate.scope]
            block = self.record.canonical(max(near, key=len))
            self.banks[candidate.path] = Bank(candidate.path, experts, k, block)

    def _carry(self, call: Call, carried: frozenset[Selection], candidates: frozenset[_Candidate]) -> None:
        for result in call.results:
            if carried:
                self._carried[result] = carried
            if candidates:
                self._candidates[result] = candidates
            integer = not result.dtype.is_floating_point and str(result.dtype) != "torch.bool"
            if integer and call.name not in _REORDERS:
                same = (v for v in call.operands if v in self._ids and v.numel == result.numel)
                self._ids |= {result for _ in same}

    def _select(self, call: Call) -> None:
        """Indices of a top-k or arg-max begin to carry a selection."""
        name = call.name.removeprefix("aten.")
        if name in {"moe.route", "moe.route_group"}:
            self._selected(call, call.operands[0].shape[-1], call.results[0].shape[-1], call.results)
            return
        if name not in {"topk", "argmax", "max"} or (name == "max" and len(call.results) < 2):
            return
        source = call.operands[0]
        position = 2 if name == "topk" else 1
        axis = call.args[position] if len(call.args) > position else call.kwargs.get("dim", -1)
        extent = source.shape[axis] if isinstance(axis, int) and source.shape else None
        k = (call.args[1] if len(call.args) > 1 else call.kwargs.get("k")) if name == "topk" else 1
        self._selected(call, extent, k, call.results[-1:])

    def _selected(self, call: Call, extent: int | None, k: Any, chosen: tuple[Value, ...]) -> None:
        if extent and isinstance(k, int) and k < extent:
            selection = Selection(extent, k, call.scope, call.operands[0])
            self.selections.append(selection)
            self._carried |= {value: self._carried.get(value, frozenset()) | {selection} for value in chosen}

    def _read_stopped(self, call: Call) -> None:
        """What a module that stopped did not come to read, where its shape tells: banks of a selection that came in."""
        carried = _union(self._carried, call.operands)
        carried |= {s for s in self.selections if inside(s.scope, call.scope)}
        for family in self.record.families:
            if inside(family.container, call.scope) and len(family) > 1:
                extents = frozenset({len(family)})
                self._confirm(_Candidate(family.members[0], extents, family.container, family), carried)
        leads = dict[str, frozenset[int]]()
        for view in self.views.values():
            leads[view.param] = leads.get(view.param, frozenset()) | view.leads
        for path, parameter in self.record.parameters.items():
            if inside(path, call.scope) and self.record.canonical(path) not in self.used:
                extents = leads.get(path, frozenset[int]()) | {size for size in parameter.shape[:1] if size}
                self._confirm(_Candidate(self.record.canonical(path), extents, call.scope), carried)

    def _attentions(self) -> Iterator[Attention]:
        """Products of a softmax over a product of two activations, and fused attention operators."""
        returned = {value for tensor in self.record.returned for value in self._chain(tensor)}
        first = dict[str, str]()
        for call in self.record.calls:
            keys, values = self._keys_and_values(call)
            scope = self.record.canonical(call.scope)
            if keys is None or values is None or first.setdefault(scope, call.scope) != call.scope:
                continue
            memory = self._memory((keys, values), returned, self._layer(call.scope))
            narrow = (min(self._chain(value), key=lambda value: value.numel or 0) for value in (keys, values))
            length = keys.shape[-1 if call.name in _MATMULS else -2]
            yield Attention(scope, memory or tuple(narrow), length, bool(memory))

    def _layer(self, scope: str) -> str:
        """The innermost member of a container that holds a module; the model itself if none does."""
        around = self.record.around(scope)
        return next((member for member in around[-1].members if inside(scope, member)), "") if around else ""

    def _memory(self, todo: Iterable[Value], returned: set[Value], layer: str) -> tuple[Value, ...]:
        """The values nearest to `todo`, going back inside the layer, that are handed back."""
        queue, seen, found = list(todo), set[Value](), dict[Value, None]()
        while queue:
            value = queue.pop()
            if value in seen or value in self.views:
                continue
            seen.add(value)
            call = self.producer.get(value)
            if value in returned:
                found[value] = None
            elif call and inside(call.scope, layer) and call.name not in _WHOLE | _GATHERS:
                queue += call.operands
        return tuple(found)

    def _keys_and_values(self, call: Call) -> tuple[Value | None, Value | None]:
        operands = call.operands
        if "scaled_dot_product" in call.name and len(operands) > 2:
            return operands[1], operands[2]
        if call.name in _MATMULS and len(operands) == 2 and not any(v in self.views for v in operands):
            for value in self._chain(operands[0]):
                softmax = self.producer.get(value)
                if softmax and softmax.name in _SOFTMAXES:
                    scores = self._scores(softmax)
                    return (scores.operands[1], operands[1]) if scores else (None, None)
        return None, None

    def _scores(self, softmax: Call) -> Call | None:
        """The product of queries and keys behind a softmax, through scales, masks, biases and sinks."""
        todo, depth = list(softmax.operands), 0
        while todo and depth < 32:
            call, depth = self.producer.get(todo.pop(0)), depth + 1
            if call is None or call.name in _WHOLE:
                continue
            if call.name in _MATMULS:
                if len(call.operands) == 2 and not any(v in self.views for v in call.operands):
                    return call
                continue
            todo += call.operands
        return None

    def _chain(self, value: Value) -> Iterator[Value]:
        """The value and those that it is a copy, a view or a scaled version of."""
        while True:
            yield value
            call = self.producer.get(value)
            if call is None or call.name in _MATMULS or call.name in _WHOLE:
                return
            sources = [v for v in call.operands if v.numel is None or v.numel > 1]
            if len(sources) != 1 or sources[0] in self.views:
                return
            value = sources[0]


def _union(carried: Mapping[Value, frozenset[_T]], values: Iterable[Value]) -> frozenset[_T]:
    return frozenset[_T]().union(*(carried.get(value, frozenset[_T]()) for value in values))


def _count(selections: list[Selection], scope: str) -> int:
    """How many are chosen in all by the selections nearest to `scope`."""
    near = [len(innermost(s.scope, scope)) for s in selections]
    by_source = {s.source: s.k for s, distance in zip(selections, near, strict=True) if distance == max(near)}
    return sum(by_source.values())


def innermost(*paths: str) -> str:
    """The innermost module that holds all of them; the model itself for none."""
    columns = takewhile(lambda parts: len(set(parts)) == 1, zip(*(path.split(".") for path in paths), strict=False))
    return ".".join(parts[0] for parts in columns)


def inside(path: str, module: str) -> bool:
    """Whether `path` is the module or in it."""
    return not module or path == module or path.startswith(module + ".")
