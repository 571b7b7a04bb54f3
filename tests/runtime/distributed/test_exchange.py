"""Dispatch and combine on 4 processes as 2 nodes x 2, against one process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from sparsec.runtime.distributed import (
    World,
    combine_start,
    combine_wait,
    dispatch_start,
    dispatch_wait,
    remap,
)
from sparsec.runtime.distributed.remap import POLICIES, count, physical
from sparsec.runtime.distributed.transport import Collectives
from sparsec.runtime.errors import InputError
from tests.runtime.distributed.ranks import TIMEOUT, Ranks

VARIANTS = [("none", "flat"), ("rank", "flat"), ("none", "two_level"), ("rank", "two_level"), ("node", "two_level")]
EXPERTS, S, RANKS, H = 8, 3, 4, 12
SLOTS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 3])
SHARES = torch.tensor([0.5, 0.25, 1, 0.6, 1, 1, 1, 1, 0.3, 0.75, 0.2, 0.4], dtype=torch.float64)

CASES: dict[str, tuple[tuple[int, ...], int, str]] = {
    "uneven": ((10, 0, 17, 13), 3, "random"),
    "no tokens anywhere": ((0, 0, 0, 0), 2, "random"),
    "all tokens on one rank": ((0, 0, 0, 31), 3, "random"),
    "one expert gets all": ((5, 6, 7, 8), 1, "first"),
    "k is 1": ((9, 4, 1, 6), 1, "random"),
    "k is all experts": ((3, 4, 0, 5), EXPERTS, "random"),
    "all skipped": ((3, 4, 2, 5), 2, "skip"),
}


def tokens(lengths: tuple[int, ...], k: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids, weights of all ranks' tokens; some ids are none."""
    made = torch.Generator().manual_seed(0)
    total = sum(lengths)
    ids = torch.stack([torch.randperm(EXPERTS, generator=made)[:k] for _ in range(total)] or [torch.zeros(k)]).long()
    ids = ids[:total]
    if kind == "random" and k < EXPERTS:
        ids[torch.rand(total, k, generator=made) < 0.15] = -1
        ids[torch.rand(total, k, generator=made) < 0.1] = EXPERTS + 3
    elif kind != "random":
        ids.fill_(0 if kind == "first" else -7)
    return torch.randn(total, H, generator=made), ids, torch.rand(total, k, generator=made)


def bank() -> Tensor:
    """[EXPERTS, H, H]"""
    return torch.randn(EXPERTS, H, H, generator=torch.Generator().manual_seed(1)) / H**0.5


def experts(rows: Tensor, local: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    """Sum over the picks of weight times tanh(row @ matrix); a pick outside of the matrices is skipped."""
    y = torch.zeros_like(rows)
    for slot, matrix in enumerate(matrices):
        row, pick = torch.where(local == slot)
        y = y.index_add(0, row, torch.tanh(rows[row] @ matrix) * weights[row, pick, None])
    return y


def mine(world: World, lengths: tuple[int, ...], *tensors: Tensor) -> list[Tensor]:
    return [tensor.split(list(lengths))[world.rank].clone() for tensor in tensors]


def run_case(world: World, name: str, policy: str, dedup: str, algo: str) -> dict[str, Any]:
    lengths, k, kind = CASES[name]
    x, ids, weights = mine(world, lengths, *tokens(lengths, k, kind))
    x.requires_grad_()
    weights.requires_grad_()
    world.reset_links()
    where = remap(world, ids, SLOTS, SHARES, experts=EXPERTS, policy=policy)
    sent = dispatch_start(world, x, where, weights, slots=S, dedup=dedup, algo=algo)
    rows, local, w = dispatch_wait(sent)
    held = bank()[SLOTS[world.rank * S : world.rank * S + S]]
    out = combine_wait(combine_start(experts(rows, local, w, held), sent))
    out.backward(torch.cos(out.detach()))
    assert x.grad is not None and weights.grad is not None
    found = {"where": where, "out": out.detach(), "x": x.grad, "weights": weights.grad}
    return {**found, "links": world.all_links(), "rows": len(rows)}


def expected(name: str) -> dict[str, Tensor]:
    x, ids, weights = tokens(*CASES[name])
    x.requires_grad_()
    weights.requires_grad_()
    out = experts(x, ids, weights, bank())
    out.backward(torch.cos(out.detach()))
    assert x.grad is not None and weights.grad is not None
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad}


def predicted_links(name: str, policy: str, dedup: str, algo: str) -> Tensor:
    """[from, to], token by token, from the rule of remap alone."""
    lengths, k, kind = CASES[name]
    ids = tokens(lengths, k, kind)[1].split(list(lengths))
    counts = torch.stack([count(part, EXPERTS) for part in ids])
    links = torch.zeros(RANKS, RANKS, dtype=torch.int64)
    for rank, part in enumerate(ids):
        where = physical(
            part, SLOTS, SHARES, experts=EXPERTS, ranks=RANKS, width=2, rank=rank, policy=policy, counts=counts
        )
        for token in where.tolist():
            targets = [slot // S for slot in token if slot < RANKS * S]
            targets = targets if dedup == "none" else sorted(set(targets))
            if algo == "flat":
                for target in targets:
                    links[rank, target] += 1
                continue
            hops = [target // 2 * 2 + rank % 2 for target in targets]
            for hop in set(hops) if dedup == "node" else hops:
                links[rank, hop] += 1
            for hop, target in zip(hops, targets, strict=True):
                links[hop, target] += 1
    return links


@pytest.mark.parametrize("name", CASES)
def test_every_variant_equals_one_process(ranks: Ranks, name: str) -> None:
    want = expected(name)
    flat: dict[str, Tensor] = {}
    for policy, (dedup, algo) in product(POLICIES, VARIANTS):
        answers = ranks.run(run_case, name, policy, dedup, algo)
        for key, tensor in want.items():
            found = torch.cat([answer[key] for answer in answers])
            assert torch.allclose(found, tensor, rtol=0, atol=1e-5), (policy, dedup, algo, key)
        assert all(torch.equal(answer["links"], answers[0]["links"]) for answer in answers)
        assert torch.equal(answers[0]["links"], predicted_links(name, policy, dedup, algo)), (policy, dedup, algo)
        out = torch.cat([answer["out"] for answer in answers])
        if dedup != "node":  # one order of the sum, so the same bits by either way
            assert torch.equal(flat.setdefault(f"{policy} {dedup}", out), out)


def adjoint_case(world: World, dedup: str, algo: str) -> tuple[float, float, float]:
    """<dispatch x, y>, <x, combine y>, and their size, on this rank; in f64."""
    made = torch.Generator().manual_seed(world.rank)
    x = torch.randn(7 + world.rank, H, generator=made, dtype=torch.float64)
    where = torch.randint(-1, RANKS * S + 2, (len(x), 4), generator=made)
    sent = dispatch_start(world, x, where, torch.ones(where.shape), slots=S, dedup=dedup, algo=algo)
    rows, _, _ = dispatch_wait(sent)
    y = torch.randn(rows.shape, generator=made, dtype=torch.float64)
    back = combine_wait(combine_start(y, sent))
    return float((rows * y).sum()), float((x * back).sum()), float((rows * y).abs().sum())


@pytest.mark.parametrize(("dedup", "algo"), VARIANTS)
def test_dispatch_and_combine_are_adjoint(ranks: Ranks, dedup: str, algo: str) -> None:
    answers = ranks.run(adjoint_case, dedup, algo)
    there, back, size = (sum(values) for values in zip(*answers, strict=True))
    assert size > 100
    assert abs(there - back) < 1e-12 * size


def payload_case(world: World, payload: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, str]:
    x = torch.randn(9, 200, generator=torch.Generator().manual_seed(world.rank)).to(dtype)
    where = torch.arange(9)[:, None] % RANKS * S + torch.tensor([0, 1])
    sent = dispatch_start(world, x, where, torch.ones(9, 2), slots=S, dedup="node", algo="two_level", payload=payload)
    rows, _, _ = dispatch_wait(sent)
    return combine_wait(combine_start(rows, sent)), x, str(rows.dtype)


@pytest.mark.parametrize(
    ("payload", "dtype", "error"),
    [("model", torch.bfloat16, 0.0), ("bf16", torch.float32, 2**-8), ("fp8", torch.bfloat16, 2**-4)],
)
def test_payloads(ranks: Ranks, payload: str, dtype: torch.dtype, error: float) -> None:
    for back, x, rows in ranks.run(payload_case, payload, dtype):
        assert rows == str(dtype)
        assert ((back - x).abs() <= error * x.abs() + error / 50).all()
        assert error == 0 or not torch.equal(back, x)


def misuse_case(world: World) -> list[str]:
    """The texts of what is refused, before anything is sent."""
    texts = list[str]()
    x, where, weights = torch.zeros(2, H), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)

    def refused(call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except InputError as error:
            texts.append(str(error))

    sent = dispatch_start(world, x, where, weights, slots=S)
    refused(combine_start, x, sent)
    rows, _, _ = dispatch_wait(sent)
    refused(dispatch_wait, sent)
    refused(combine_start, torch.zeros(len(rows) + 1, H), sent)
    combine = combine_start(rows, sent)
    refused(combine_start, rows, sent)
    combine_wait(combine)
    refused(combine_wait, combine)
    refused(dispatch_start, world, x, where, weights, slots=S, dedup="node")
    refused(dispatch_start, world, x, where, weights, slots=S, dedup="some")
    refused(dispatch_start, world, x, where[:1], weights, slots=S)
    refused(World.of, width=3)
    refused(World.of, transport="symm_mem")
    refused(World.of, transport="deep_ep")
    refused(World.of, transport="pigeons")
    return texts


def test_a_handle_is_used_once_and_wrong_calls_are_refused(ranks: Ranks) -> None:
    for texts in ranks.run(misuse_case):
        words = [
            "no rows yet", "waited for before", "a row for each", "combined before", "waited for before",
            "needs algo 'two_level'", "there are dedup none, rank, node", "takes x [T, H]", "do not fill nodes of 3",
            "transport 'symm_mem' ", "transport 'deep_ep' ", "there is no transport 'pigeons'",
        ]  # fmt: skip
        assert len(texts) == len(words)
        assert all(word in text for word, text in zip(words, texts, strict=True)), texts


def mesh_case(world: World) -> tuple[int, int, int, int, list[int]]:
    """A world of the mesh's second node row, by a transport of the caller's that counts."""

    class Counting(Collectives):
        calls = 0

        def all_to_all(self, group: Any, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Any:
            self.calls += 1
            return super().all_to_all(group, rows, send, receive)

    transport = Counting()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))
    whole = World.of(mesh, timeout=TIMEOUT, transport=transport)
    half = World.of(mesh["rank"], timeout=TIMEOUT)
    x = torch.full((2, H), float(world.rank))
    sent = dispatch_start(half, x, torch.tensor([[0], [1]]), torch.ones(2, 1), slots=1)
    rows, _, _ = dispatch_wait(sent)
    whole.counts("rail", torch.tensor([1, 2]), "test")
    whole.close()
    half.close()
    return whole.width, half.size, half.rank, transport.calls, rows[:, 0].tolist()


def test_worlds_of_a_mesh(ranks: Ranks) -> None:
    found = ranks.run(mesh_case)
    assert found == [
        (2, 2, 0, 1, [0.0, 1.0]),
        (2, 2, 1, 1, [0.0, 1.0]),
        (2, 2, 0, 1, [2.0, 3.0]),
        (2, 2, 1, 1, [2.0, 3.0]),
    ]


def test_a_lone_process_is_a_world_of_one() -> None:
    world = World.of()
    assert (world.rank, world.size, world.width, world.nodes) == (0, 1, 1, 1)
    x, ids, weights = tokens((6,), 3, "random")
    slots, shares = torch.arange(EXPERTS), torch.ones(EXPERTS)
    for dedup, algo in VARIANTS:
        for policy in POLICIES:
            where = remap(world, ids, slots, shares, experts=EXPERTS, policy=policy)
            sent = dispatch_start(world, x, where, weights, slots=EXPERTS, dedup=dedup, algo=algo)
            rows, local, w = dispatch_wait(sent)
            out = combine_wait(combine_start(experts(rows, local, w, bank()), sent))
            assert torch.allclose(out, experts(x, ids, weights, bank()), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="torchrun"):
        World.of(width=2)
