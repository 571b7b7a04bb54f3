"""The planner: loads and a topology in, a placement out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement.affinity import Dispatch, best_place
from sparsec.passes.placement.bound import lower_bound
from sparsec.passes.placement.loads import Loads
from sparsec.passes.placement.pack import pack, replicas
from sparsec.passes.placement.plan_file import Plan, check_plan
from sparsec.passes.placement.replan import check_old, limits, moved
from sparsec.passes.placement.report import report
from sparsec.passes.placement.scenarios import batches, drifted
from sparsec.passes.placement.search import Found, Job, Ranks, search
from sparsec.passes.placement.split import best_split
from sparsec.passes.placement.swap import CLOSE, balance, fullest, split_of, swap
from sparsec.passes.placement.topology import Topology, slots_per_rank

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CHUNK = 8  #: layers that are searched together, which share what numpy costs per call


@dataclass(frozen=True)
class Options:
    """What to plan for.

    Args:
        slots: experts per rank and layer, where the topology does not say otherwise.
        batch: tokens times experts per token, of a batch whose noise to hold on; 0: none.
        robust: hold on traffic that drifts from the scenarios; None: where there are several.
        expert_bytes: of one expert's weights.
        row_bytes: of one token that is sent.
        moves: the most experts that may be loaded anew, over all layers, given an old plan; None: any number.
        seconds: no search goes on for longer. A plan that ran into this depends on the machine's speed, and says so.
        rounds: of the search.
        seed: of what is drawn by chance.
        workers: processes that search. They change no result. More than one needs a main module that can be imported.
    """

    slots: int
    batch: int = 0
    robust: bool | None = None
    expert_bytes: float = 0.0
    row_bytes: float = 0.0
    moves: int | None = None
    seconds: float = 45.0
    rounds: int = 300
    seed: int = 0
    workers: int = 1


def plan(
    loads: Loads,
    topology: Topology,
    options: Options,
    *,
    routing: Ints | None = None,
    old: Plan | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Place every layer's experts.

    With `routing` ([tokens, layers, k], experts), tokens are kept on few nodes as well as loads even.

    Raises:
        SparsecError: the experts do not fit, or the old plan is of another model or other devices.
    """
    deadline = monotonic() + options.seconds
    counts = loads.counts
    _, layers, experts = counts.shape
    size = slots_per_rank(topology, options.slots, experts, layers, options.expert_bytes)
    ranks = Ranks(np.repeat(np.arange(len(size)), size), np.array([rank.speed for rank in topology.ranks], np.float32))
    if old is not None:
        check_old(old, loads, size)
    rng = np.random.default_rng(options.seed)
    total = float(ranks.speed.sum())
    shares = counts / np.maximum(counts.sum(2, keepdims=True), 1e-300) * total
    mean = shares.mean(0)
    bound = lower_bound(mean, np.array(size), ranks.speed.astype(np.float64))
    say("replicas and packing")
    start = pack(mean, replicas(mean, sum(size), len(size)), ranks.of_slot, ranks.speed.astype(np.float64))
    robust = len(counts) > 1 if options.robust is None else options.robust
    cut = False
    sent: list[Dispatch] = []
    if routing is not None:
        node = np.array([rank.node for rank in topology.ranks])
        placed: list[Ints] = []
        for layer in range(layers):
            left = max(0.0, deadline - monotonic()) / (layers - layer)
            row, one, short = best_place(routing[:, layer], mean[layer], ranks, node, left)
            placed.append(row)
            sent.append(one)
            cut |= short
            say(f"tokens: {layer + 1} of {layers} layers")
        slots = np.stack(placed)
    elif options.moves is not None and old is not None:
        slots, cut = _search(old.slots, shares, ranks, rng, options, robust, deadline, say, old.slots)
    elif robust or options.batch:
        hottest = shares.max(0)
        number = replicas(hottest, sum(size), len(size))
        first = pack(hottest, number, ranks.of_slot, ranks.speed.astype(np.float64))
        slots, cut = _search(first, shares, ranks, rng, options, robust, deadline, say)
    else:
        slots, cut = balance(start, mean, ranks, bound, rng, deadline)
    say("split")
    split = _shares(slots, mean, ranks, bound)
    if sent:
        split = np.stack([_sent(row, one) for row, one in zip(slots, sent, strict=True)])
    elif options.moves is None:
        _repair(slots, split, start, mean, ranks, bound, options.seed)
    made = Plan(topology, loads.layers, experts, tuple(size), slots, split, options.seed)
    check_plan(made)
    figures = report(made, loads, bound, options.expert_bytes, options.row_bytes)
    figures["moved"] = None if old is None else moved(old, made, options.expert_bytes)
    figures["cut_short"] = cut
    figures["nodes_per_token"] = float(np.mean([one.nodes for one in sent])) if sent else None
    figures["load_of_routing"] = float(np.mean([one.load.max() for one in sent])) if sent else None
    made.report.update(figures)
    return made


def _repair(slots: Ints, split: Floats, start: Ints, mean: Floats, ranks: Ranks, bound: Floats, seed: int) -> None:
    """See to it that no layer is worse for the mean than `start`, which is no worse than EPLB, is when shared equally.

    First the exact best split; then a short search for the mean alone, which changes few slots, so that the rest still
    holds on other traffic; then `start` with swaps. Changes `slots` and `split`.
    """
    least = _equal(start, mean, ranks) * (1 + 1e-9)

    def polish(at: Ints) -> Ints:
        columns = np.ascontiguousarray(mean[at][:, :, None], np.float32)
        return search(Job(slots[at], columns, ranks, seed, 60, 10.0))[0]

    repairs = (lambda at: slots[at], polish, lambda at: swap(start[at], mean[at], ranks, bound[at]))
    for repair in repairs:
        worse = np.flatnonzero(fullest(slots, split, mean, ranks) > least)
        if not len(worse):
            return
        slots[worse] = repair(worse)
        split[worse] = np.stack([_exact(slots[layer], mean[layer], ranks) for layer in worse])


def _sent(slots: Ints, sent: Dispatch) -> Floats:
    """The shares of every slot, as its expert's tokens were dispatched; equal where it had none."""
    rows = np.bincount(sent.slot.ravel(), minlength=len(slots)).astype(np.float64)
    held, number = np.bincount(slots, rows), np.bincount(slots)
    return np.divide(rows, held[slots], out=1.0 / number[slots], where=held[slots] > 0)


def _search(
    start: Ints,
    shares: Floats,
    ranks: Ranks,
    rng: np.random.Generator,
    options: Options,
    robust: bool,
    deadline: float,
    say: Callable[[str], None],
    old: Ints | None = None,
) -> tuple[Ints, bool]:
    """Search for a placement that holds on the scenarios, and on those near them. Also: whether time ran out."""
    made = [shares.mean(0)[None], shares]
    if robust:
        made = [drifted(shares, max(32, 2 * len(shares)), rng), shares.mean(0)[None], shares.mean(0)[None]]
    if options.batch:
        made.append(batches(shares, max(32, 2 * len(shares)), options.batch, rng))
    loads = np.concatenate(made)
    loads = loads / loads.sum(2, keepdims=True) * ranks.speed.sum()
    limit = None
    if old is not None and options.moves is not None:
        limit = limits(old, shares, ranks, options.moves)
    columns = np.ascontiguousarray(loads.transpose(1, 2, 0), np.float32)
    highest = shares.max(0).astype(np.float32)
    parts = [slice(first, first + CHUNK) for first in range(0, len(start), CHUNK)]
    share = max(0.0, deadline - monotonic()) * min(options.workers, len(parts)) / len(parts)
    jobs = [
        Job(
            start[part],
            columns[part],
            ranks,
            int(rng.integers(1 << 62)),
            options.rounds,
            share,
            None if old is None else old[part],
            None if limit is None else limit[part],
            highest[part] if robust else None,
        )
        for part in parts
    ]
    found: list[tuple[Ints, bool]] = []
    with _mapping(min(options.workers, len(jobs))) as run:
        for one in run(search, jobs):
            found.append(one)
            say(f"search: {len(found)} of {len(jobs)} groups of layers")
    return np.concatenate([slots for slots, _ in found]), any(cut for _, cut in found)


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[[Callable[[Job], Found], list[Job]], Iterable[Found]]]:
    """`map`, in this process or in several."""
    if workers == 1:
        yield map
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            yield pool.map


def _equal(slots: Ints, loads: Floats, ranks: Ranks) -> Floats:
    """The fullest rank of every layer, when replicas share equally."""
    return fullest(slots, _equal_shares(slots, loads.shape[1]), loads, ranks)


def _equal_shares(slots: Ints, experts: int) -> Floats:
    return 1 / np.stack([np.bincount(row, minlength=experts)[row] for row in slots])


def _shares(slots: Ints, loads: Floats, ranks: Ranks, bound: Floats) -> Floats:
    """The shares of every slot: equal where that is near the bound, else near the best for these loads."""
    split = _equal_shares(slots, loads.shape[1])
    far = np.flatnonzero(fullest(slots, split, loads, ranks) > bound * (1 + CLOSE))
    if len(far):
        split[far] = split_of(slots[far], loads[far], ranks, 40)
    return split


def _exact(slots: Ints, loads: Floats, ranks: Ranks) -> Floats:
    """The shares of the best split. [slots]"""
    amount, _ = best_split(slots, loads, ranks)
    held, number = np.bincount(slots, amount, len(loads))[slots], np.bincount(slots)[slots]
    return np.divide(amount, held, out=1.0 / number, where=held > 0)
