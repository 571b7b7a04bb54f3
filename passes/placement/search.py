"""The search for a placement whose loads can be evened out, batch by batch, by re-splitting the replicas' tokens."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]
Found = tuple[NDArray[np.int64], bool]

GROWTH = 2.5
"""How many times the load that it was planned with an expert may come to have, in traffic that nobody has seen."""

WEIGHT = 0.1
"""How much a search minds ranks that could not bear that, beside the scenarios."""


@dataclass(frozen=True)
class Ranks:
    """Which rank each slot is of ([slots], ascending), and how fast each rank is ([ranks], relative)."""

    of_slot: Ints
    speed: Singles


def pairs(slots: Ints) -> tuple[Ints, Ints]:
    """Slots between which load can flow: two replicas of one expert. [rows, slots] -> two of [rows, pairs].

    An expert's replicas form a ring. Rows with fewer pairs end in pairs of a slot with itself, which move nothing.
    """
    rows, count = slots.shape
    order = np.argsort(slots, axis=1, kind="stable")
    expert = np.take_along_axis(slots, order, 1)
    new = np.ones((rows, count), np.bool_)
    new[:, 1:] = expert[:, 1:] != expert[:, :-1]
    row, at = np.nonzero(~new)
    width = len(row) // rows
    a, b = order[row, at - 1].reshape(rows, width), order[row, at].reshape(rows, width)
    first = np.maximum.accumulate(np.where(new, np.arange(count), 0), axis=1)
    last = np.ones((rows, count), np.bool_)
    last[:, :-1] = new[:, 1:]
    row, at = np.nonzero(last & (np.arange(count) - first >= 2))
    if not len(row):
        return a, b
    number = np.bincount(row, minlength=rows)
    place = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
    ring_a, ring_b = np.zeros((2, rows, number.max()), np.int64)
    ring_a[row, place], ring_b[row, place] = order[row, at], order[row, first[row, at]]
    return np.concatenate([a, ring_a], 1), np.concatenate([b, ring_b], 1)


def even_out(slots: Ints, amount: Singles, ranks: Ranks, sweeps: int) -> Singles:
    """Let load flow between replicas, from the fuller rank to the emptier. Changes `amount`, returns the ranks' loads.

    Exchanges between two replicas lower the sum of the squares of the loads, whose least point has the least maximum
    too; some sweeps come close to it.

    Args:
        slots: [rows, slots].
        amount: [rows, slots, scenarios]: the tokens that each slot gets.

    Returns:
        [rows, ranks, scenarios], over each rank's speed.
    """
    rows, count, scenarios = amount.shape
    number = len(ranks.speed)
    starts = np.searchsorted(ranks.of_slot, np.arange(number))
    load3 = (np.add.reduceat(amount, starts, axis=1) / ranks.speed[:, None]).astype(np.float32)
    load, flat = load3.reshape(-1, scenarios), amount.reshape(-1, scenarios)
    a, b = pairs(slots)
    slot_a, slot_b = (a + np.arange(rows)[:, None] * count).T.copy(), (b + np.arange(rows)[:, None] * count).T.copy()
    rank_a, rank_b = ranks.of_slot[a], ranks.of_slot[b]
    inverse = (1 / ranks.speed).astype(np.float32)
    inv_a, inv_b = inverse[rank_a].T[..., None], inverse[rank_b].T[..., None]
    gain = 1 / (inv_a + inv_b)
    rank_a = (rank_a + np.arange(rows)[:, None] * number).T.copy()
    rank_b = (rank_b + np.arange(rows)[:, None] * number).T.copy()
    for sweep in range(sweeps):
        for n in range(len(slot_a)) if sweep % 2 == 0 else range(len(slot_a) - 1, -1, -1):
            sa, sb, ra, rb = slot_a[n], slot_b[n], rank_a[n], rank_b[n]
            has_a, has_b, load_a, load_b = flat.take(sa, 0), flat.take(sb, 0), load.take(ra, 0), load.take(rb, 0)
            flow = load_a - load_b
            flow *= gain[n]
            np.minimum(flow, has_a, out=flow)
            np.maximum(flow, -has_b, out=flow)
            flat[sa] = has_a - flow
            flat[sb] = has_b + flow
            load[ra] = load_a - flow * inv_a[n]
            load[rb] = load_b + flow * inv_b[n]
    return load3


def objective(load: Singles) -> Singles:
    """How uneven loads are: the norm of order 16 over the ranks, averaged over the scenarios. -> [rows]."""
    power = load * load
    for _ in range(3):
        power *= power
    return np.asarray((power.mean(1) ** np.float32(1 / 16)).mean(1), np.float32)


def exposure(slots: Ints, loads: Singles, ranks: Ranks) -> tuple[Singles, Singles]:
    """What each rank must carry, whatever the split, when the largest expert that is there alone grows.

    Args:
        slots: [rows, slots].
        loads: [rows, experts].

    Returns:
        [rows, ranks], over each rank's speed; and [rows, slots], the loads of the experts that have no other slot.
    """
    rows, experts = loads.shape
    flat = slots + np.arange(rows)[:, None] * experts
    once = np.bincount(flat.ravel(), minlength=rows * experts)[flat] == 1
    alone = np.where(once, np.take_along_axis(loads, slots, 1), np.float32(0))
    starts = np.searchsorted(ranks.of_slot, np.arange(len(ranks.speed)))
    whole, largest = np.add.reduceat(alone, starts, axis=1), np.maximum.reduceat(alone, starts, axis=1)
    return (whole + np.float32(GROWTH - 1) * largest) / ranks.speed, alone


@dataclass
class Search:
    """The state: the experts in the slots ([layers, slots]) and their scenarios ([layers, experts, scenarios]).

    Every layer's loads of a scenario sum to the speeds' sum, so that 1 is perfect balance. `limit` ([layers]) says how
    many slots may differ from the `old` placement. `highest` ([layers, experts]) are loads whose growth to hold on.
    """

    slots: Ints
    loads: Singles
    ranks: Ranks
    rng: np.random.Generator
    candidates: int = 8
    sweeps: int = 3
    old: Ints | None = None
    limit: Ints | None = None
    highest: Singles | None = None

    def __post_init__(self) -> None:
        self.amount = spread(self.slots, self.loads)
        self.load = even_out(self.slots, self.amount, self.ranks, 10)
        self.value = objective(self.load)
        if self.highest is not None:
            self.value = self.value + self._exposed(self.slots, self.highest)

    def run(self, rounds: int, deadline: float) -> int:
        """Try moves, keep those that help. Returns the rounds that there was time for."""
        for done in range(rounds):
            if monotonic() > deadline:
                return done
            self.step()
        return rounds

    def step(self) -> None:
        """One round: some candidates for every layer; the best of them is taken where it is better."""
        layers = len(self.slots)
        tries = np.repeat(self.slots, self.candidates, 0)
        amount = np.repeat(self.amount, self.candidates, 0)
        self._propose(tries, amount)
        load = even_out(tries, amount, self.ranks, self.sweeps)
        value = objective(load)
        if self.highest is not None:
            value = value + self._exposed(tries, np.repeat(self.highest, self.candidates, 0))
        if self.old is not None and self.limit is not None:
            changed = (tries != np.repeat(self.old, self.candidates, 0)).sum(1)
            value[changed > np.repeat(self.limit, self.candidates)] = np.inf
        value = value.reshape(layers, self.candidates)
        best = value.argmin(1)
        better = np.flatnonzero(value[np.arange(layers), best] < self.value - 1e-6)
        rows = better * self.candidates + best[better]
        self.slots[better], self.amount[better], self.load[better] = tries[rows], amount[rows], load[rows]
        self.value[better] = value.reshape(-1)[rows]

    def _exposed(self, slots: Ints, highest: Singles) -> Singles:
        most, _ = exposure(slots, highest, self.ranks)
        return np.float32(WEIGHT) * objective(most[:, :, None])

    def _propose(self, tries: Ints, amount: Singles) -> None:
        """Change one slot or two in every row: bring an expert of a rank that is hot to one that is not."""
        rng, of_slot = self.rng, self.ranks.of_slot
        rows = len(tries)
        at = np.arange(rows)
        load = np.repeat(self.load, self.candidates, 0)
        scenario = _draw(rng, load.max(1) - 0.999)
        fullness = load[at, :, scenario] + rng.random((rows, load.shape[1]), np.float32) * 0.01
        first = np.searchsorted(of_slot, np.arange(len(self.ranks.speed)))
        size = np.bincount(of_slot)
        largest = np.full(rows, -1)
        if self.highest is not None:
            most, alone = exposure(self.slots, self.highest, self.ranks)
            most = np.repeat(most / np.maximum(most.max(1, keepdims=True), 1e-6), self.candidates, 0)
            exposed = rng.random(rows) < 0.3
            noisy = most + rng.random(most.shape, np.float32) * 0.1
            fullness = np.where(exposed[:, None], noisy, fullness)
            alone = np.repeat(alone, self.candidates, 0)
            there = np.where(of_slot == fullness.argmax(1)[:, None], alone, -1)
            largest = np.where(exposed & (rng.random(rows) < 0.6), there.argmax(1), -1)
        hot = fullness.argmax(1)
        cold = _draw(rng, fullness.max(1, keepdims=True) - fullness + 1e-6)
        a = first[hot] + (rng.random(rows) * size[hot]).astype(np.int64)
        a = np.where(largest >= 0, largest, a)
        b = first[cold] + (rng.random(rows) * size[cold]).astype(np.int64)
        expert_a, expert_b = tries[at, a], tries[at, b]
        in_hot, in_cold = of_slot == hot[:, None], of_slot == cold[:, None]
        a_on_cold = ((tries == expert_a[:, None]) & in_cold).any(1)
        b_on_hot = ((tries == expert_b[:, None]) & in_hot).any(1)
        spare = (tries == expert_b[:, None]).sum(1) > 1
        replace = ~a_on_cold & spare & (rng.random(rows) < 0.7)
        swap = ~a_on_cold & ~b_on_hot & (hot != cold) & ~replace
        for row in np.flatnonzero(replace):
            # The replica's tokens go to the others; the new one starts with none.
            others = np.flatnonzero(tries[row] == expert_b[row])
            others = others[others != b[row]]
            amount[row, others] += amount[row, b[row]] / len(others)
            amount[row, b[row]] = 0
        tries[at[replace], b[replace]] = expert_a[replace]
        s, i, j = at[swap], a[swap], b[swap]
        tries[s, i], tries[s, j] = expert_b[swap], expert_a[swap]
        amount[s, i], amount[s, j] = amount[s, j], amount[s, i]


def _draw(rng: np.random.Generator, weights: Singles) -> Ints:
    """An index per row, as likely as its weight. [rows, choices] -> [rows]."""
    total = np.maximum(weights, 1e-9).cumsum(1)
    return (total < (rng.random(len(total), np.float32) * total[:, -1])[:, None]).sum(1)


def spread(slots: Ints, loads: Singles) -> Singles:
    """Each expert's load, split equally over its replicas. -> [layers, slots, scenarios]."""
    counts = np.stack([np.bincount(row)[row] for row in slots])
    return (np.take_along_axis(loads, slots[:, :, None], 1) / counts[:, :, None]).astype(np.float32)


@dataclass(frozen=True)
class Job:
    """A search over some layers, whole, for another process."""

    slots: Ints
    loads: Singles
    ranks: Ranks
    seed: int
    rounds: int
    seconds: float
    old: Ints | None = None
    limit: Ints | None = None
    highest: Singles | None = None


def search(job: Job) -> Found:
    """The slots that were found, and whether time ran out."""
    rng = np.random.default_rng(job.seed)
    state = Search(job.slots.copy(), job.loads, job.ranks, rng, old=job.old, limit=job.limit, highest=job.highest)
    done = state.run(job.rounds, monotonic() + job.seconds)
    return state.slots, done < job.rounds
