"""The row-local ops behind some values (`Slice`): what a region of `moe.route` can hold, and where it has to start."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field

from sparsec.ir.core import Op, Value
from sparsec.ir.types import Dim, TensorType
from sparsec.passes.rows import LINEAR, LOOKUPS, ROW_OPS, is_small, operand_rows
from sparsec.passes.rules import is_pointwise, same_shape

WIDEST = 1 << 14  #: elements of one row that a region may read or yield

MOST_CUTS = 64
LIMIT_OF_SEARCH = 256  # ops looked at to tell whether one thing comes from another


@dataclass(frozen=True)
class Problem:
    """Why a slice does not close, or what stays outside it."""

    op: Op
    why: str
    suggestion: str
    cut: Op | None = None  #: an op whose results the slice could start from instead


WRITE_ROW_LOCAL = "compute ids and weights from one token's logits alone"


@dataclass
class Slice:
    """The ops between a router's logits and the ids and weights of a bank.

    Going backwards, it ends at the results of linear layers, at ops that are not row-local, and in `cuts`. What it ends
    at and has rows is a source: the logits, and others, such as ids that are given.
    """

    ids: Value
    weights: Value
    bank: Op
    cuts: Container[Op] = ()
    rows: dict[Value, int] = field(default_factory=dict)  #: leading axes that count tokens, for every value met
    ops: list[Op] = field(default_factory=list)  #: in an order in which they can run
    sources: list[Value] = field(default_factory=list)  #: what has rows and comes from outside, the logits first
    params: list[Value] = field(default_factory=list)
    extras: list[Value] = field(default_factory=list)  #: further values of the slice that others read
    outside: list[Problem] = field(default_factory=list)  #: ops that could not come in though they belong to the router

    @property
    def tokens(self) -> Dim:
        return self.ids.tensor.shape[0]

    @property
    def logits(self) -> Value:
        return self.sources[0]

    def collect(self) -> Problem | None:
        """Fill the slice. Returns what is in the way, if anything is."""
        ops: dict[Op, None] = {}
        ends = list[Problem]()
        deciding = 0
        for start in (self.ids, self.weights):
            stack: list[tuple[Value, int, Op]] = [(start, 1, self.bank)]
            while stack:
                value, rows, user = stack.pop()
                if value in self.rows:
                    if self.rows[value] != rows:
                        why = f"%{value.name} is used both per token and across tokens"
                        return Problem(user, why, WRITE_ROW_LOCAL, user)
                    continue
                self.rows[value] = rows
                if (problem := self._visit(value, rows, user, ops, stack, ends)) is not None:
                    return problem
            deciding = deciding or len(self.sources)
        if not isinstance(self.ids.tensor.shape[-1], int):
            return Problem(self.bank, f"the ids {self.ids.type} are not of a known number per token", "")
        logits = self._choose_logits(deciding)
        if logits is None:
            return ends[0] if ends else Problem(self.bank, "the ids and weights depend on no logits", "")
        self.sources.remove(logits)
        self.sources.insert(0, logits)
        self.ops = in_order((self.ids, self.weights), ops)
        self.outside = [end for end in ends if _belongs(end.op, logits)]
        for param in self.params:
            if param.op is not None and _comes_from(param.op, logits):
                why = f"'{param.op.name}' works across tokens"
                self.outside.append(Problem(param.op, why, WRITE_ROW_LOCAL))
        return None

    def _visit(
        self,
        value: Value,
        rows: int,
        user: Op,
        ops: dict[Op, None],
        stack: list[tuple[Value, int, Op]],
        ends: list[Problem],
    ) -> Problem | None:
        """Take in the op behind a value, or note the value as coming from outside."""
        op = value.op
        stop = op is None or op.name in LINEAR or op in self.cuts or op.dialect == "moe"
        if not rows and not stop:
            stop = op is None or not all(map(is_small, op.operands))
        if not stop and op is not None:
            if op in ops:
                if any(self.rows.get(result, rows) != rows for result in op.results):
                    return Problem(op, f"'{op.name}' is used both per token and across tokens", WRITE_ROW_LOCAL, user)
                return None
            verdict = operand_rows(op, rows)
            if not isinstance(verdict, str):
                ops[op] = None
                stack += [(operand, count, op) for operand, count in zip(op.operands, verdict, strict=True)]
                return None
            if rows:
                ends.append(Problem(op, f"'{op.name}' {verdict}", WRITE_ROW_LOCAL))
        cut = user if user is not self.bank else None
        if rows:
            tail = value.tensor.shape[rows:] if isinstance(value.type, TensorType) else ("?",)
            if len(tail) > 1 or not all(isinstance(size, int) and size <= WIDEST for size in tail):
                why = f"the router starts from {origin(value)}, which is no [tokens, experts] of known width"
                return Problem(user, why, WRITE_ROW_LOCAL, cut)
            self.sources.append(value)
        elif is_small(value) or _matches(value, user):
            self.params.append(value)
        else:
            why = f"the router reads {origin(value)}, which is more than one number per expert"
            return Problem(user, why, WRITE_ROW_LOCAL, cut)
        return None

    def _choose_logits(self, deciding: int) -> Value | None:
        """The widest float source that the ids depend on; where they depend on none, the widest of all."""
        for sources in (self.sources[:deciding], self.sources):
            found = [
                value
                for value in sources
                if value.tensor.dtype.is_float and value not in (self.ids, self.weights) and self._width(value)
            ]
            if found:
                return max(found, key=self._width)
        return None

    def _width(self, value: Value) -> int:
        tail = value.tensor.shape[self.rows[value] :]
        return tail[0] if len(tail) == 1 and isinstance(tail[0], int) else 0

    def extend(self, after: Container[Op]) -> None:
        """Take in the row-local ops that lead from the slice to others, and name the values that others read.

        Args:
            after: the ops behind the place where the slice will be computed.
        """
        inside = dict.fromkeys(self.ops)
        more: dict[Op, None] = {}
        queue = [user for op in self.ops for result in op.results for user in result.users]
        while queue:
            op = queue.pop()
            if op in inside or op in more or op not in after or not self._admits(op, {**inside, **more}):
                continue
            more[op] = None
            queue += [user for result in op.results for user in result.users]
        while True:
            read = list(self._read_outside({**inside, **more}, after))
            late = [value.op for value in read if not self._may_leave(value)]
            if not any(op in more for op in late if op is not None):
                break
            more = {op: None for op in more if op not in late}
        self.extras = [value for value in read if self._may_leave(value)]
        kept = in_order((self.ids, self.weights, *self.extras), {**inside, **more})
        for op in kept:
            for value in op.operands:
                if value.op not in kept and value not in self.sources and value not in self.params:
                    self.params.append(value)
        self.ops = kept

    def _admits(self, op: Op, inside: Container[Op]) -> bool:
        """Whether an op reads nothing but the slice, and keeps tokens apart; learns the rows of its results."""
        if op.dialect != "aten" or not op.results or not isinstance(op.results[0].type, TensorType):
            return False
        for operand in op.operands:
            if operand in self.sources or operand in self.params:
                continue
            if operand.op not in inside if operand.op is not None else not is_small(operand):
                return False
        for rows in range(1, op.results[0].tensor.rank + 1):
            verdict = operand_rows(op, rows)
            if isinstance(verdict, str):
                continue
            if all(self.rows.get(v, 0) == count for v, count in zip(op.operands, verdict, strict=True)):
                for result in op.results:
                    self.rows[result] = rows
                return True
        return False

    def _read_outside(self, inside: Collection[Op], after: Container[Op]) -> Iterator[Value]:
        """Results of the slice, but for ids and weights, that ops outside it read."""
        for op in inside:
            for value in op.results:
                if value in (self.ids, self.weights):
                    continue
                if any(user not in inside and user in after for user in value.users):
                    yield value

    def _may_leave(self, value: Value) -> bool:
        """Whether a value can be a result of the route: a short row of known width."""
        if value not in self.rows or not isinstance(value.type, TensorType) or not self.rows[value]:
            return False
        tail = value.tensor.shape[self.rows[value] :]
        return len(tail) <= 1 and all(isinstance(size, int) and size <= self._width(self.logits) for size in tail)


def close(ids: Value, weights: Value, bank: Op) -> Slice | Problem:
    """The slice behind a bank's ids and weights; it starts later where what comes before cannot be in a region."""
    cuts: dict[Op, None] = {}
    while True:
        found = Slice(ids, weights, bank, cuts)
        problem = found.collect()
        if problem is None:
            return found
        if problem.cut is None or problem.cut in cuts or len(cuts) == MOST_CUTS:
            return problem
        cuts[problem.cut] = None


def _matches(param: Value, user: Op) -> bool:
    """Whether a parameter has the shape of the row that it is combined with: one number per expert, by groups."""
    if not isinstance(param.type, TensorType) or not is_pointwise(user.name):
        return False
    shape = param.type.shape
    return any(v.tensor.rank > len(shape) and same_shape(v.tensor.shape[-len(shape) :], shape) for v in user.operands)


def _belongs(op: Op, logits: Value) -> bool:
    """Whether an op that stays outside is part of the router: it turns scores into scores, or comes from the logits."""
    if op.name in ROW_OPS:
        return op.name not in LOOKUPS
    shape = op.results[0].tensor.shape
    if any(isinstance(v.type, TensorType) and same_shape(v.tensor.shape, shape) for v in op.operands):
        return True
    return _comes_from(op, logits)


def _comes_from(op: Op, logits: Value) -> bool:
    """Whether an op reads the logits, or what is made of them."""
    seen: dict[Op, None] = {}
    stack = [op]
    while stack and len(seen) < LIMIT_OF_SEARCH:
        at = stack.pop()
        if at in seen:
            continue
        seen[at] = None
        if logits in at.operands:
            return True
        stack += [value.op for value in at.operands if value.op is not None and at.name not in LINEAR]
    return False


def in_order(ends: Sequence[Value], ops: Container[Op] | None = None) -> list[Op]:
    """The ops behind `ends`, all or those in `ops`, such that each comes after those whose results it reads."""
    done: dict[Op, None] = {}
    stack = [(value.op, False) for value in reversed(ends)]
    while stack:
        op, ready = stack.pop()
        if op is None or op in done or (ops is not None and op not in ops):
            continue
        if ready:
            done[op] = None
        else:
            stack.append((op, True))
            stack += [(operand.op, False) for operand in reversed(op.operands)]
    return list(done)


def origin(value: Value) -> str:
    """A value in words: its name and type, and the op behind it."""
    made = f" of '{value.op.name}' ({value.op.loc})" if value.op is not None else ""
    return f"%{value.name or '?'}: {value.type}{made}"
