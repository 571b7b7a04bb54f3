"""The sort of pairs and its lists of tiles in Triton's interpreter, against their references."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen.triton import route, sorting
from sparsec.dialects.moe import group_reference, tiles_reference
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import loads
from tests.codegen.triton.interpret import kernel

E, K, GROUP_M = 6, 2, 3
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KINDS = st.sampled_from(["even", "hot", "skip", "none"])
WAYS = {
    "by comparing": ({"up_to": 4, "block_rows": 4}, {"block_rows": 4}),
    "by counting": ({"up_to": 64, "block_rows": 64}, {"block_rows": 8}),
    "by blocks": ({"block_rows": 8},),
}


def ids_of(tokens: int, k: int, experts: int, kind: str) -> torch.Tensor:
    """Expert ids of a pattern of loads; `none`: every pair is skipped."""
    return torch.full((tokens, k), experts) if kind == "none" else loads(tokens, k, experts, kind)


def check(ids: torch.Tensor, experts: int, variants: Any) -> None:
    """`order` and `offsets`, and every entry of the lists that is defined."""
    got = kernel(build.group(experts, ids.shape[1], variants=variants, listed=True))([ids])
    order, offsets = group_reference(ids, experts)
    wanted = tiles_reference(offsets, ids.numel())
    assert torch.equal(got[0], order)
    assert torch.equal(got[1], offsets)
    assert got[2].shape == wanted.shape
    assert torch.equal(got[2][wanted >= 0], wanted[wanted >= 0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["even", "hot", "skip", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 4, 21])
def test_lists(way: str, kind: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    check(ids_of(tokens, 3, 11, kind), 11, WAYS[way])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 64), st.integers(1, 4), st.integers(4, 20), KINDS, st.sampled_from(sorted(WAYS)))
def test_any_size(tokens: int, k: int, experts: int, kind: str, way: str) -> None:
    torch.manual_seed(tokens)
    check(ids_of(tokens, k, experts, kind), experts, WAYS[way])


def test_one_expert_with_many_tiles() -> None:
    for variants in ({"block_rows": 64},), ({"up_to": 256, "block_rows": 256}, {"block_rows": 64}):
        check(torch.ones(200, 1, dtype=torch.int64), 3, variants)


def test_programs_that_take_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than programs: each program goes through some, and counts what came before."""
    monkeypatch.setattr(route, "MOST_PROGRAMS", 3)
    for tokens in (5, 12, 13, 40):
        check(ids_of(tokens, 3, 7, "skip"), 7, ({"block_rows": 4},))


def test_more_programs_than_one_step_adds() -> None:
    check(ids_of(70, 1, 2, "skip"), 2, ({"block_rows": 1},))


find_tile: Any = sorting.find_tile
listed_tile: Any = sorting.listed_tile


@triton.jit
def both(
    offsets: Any, lists: Any, found: Any, read: Any, pairs: Any, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr
) -> None:
    tile = tl.program_id(0)
    a, b, c, d, e = find_tile(tile, offsets, pairs, E_, E_PAD_, COLUMNS, BLOCK_M, GROUP_M_)
    at = found + tile * 5
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)
    tl.store(at + 4, e)
    a, b, c, d, e = listed_tile(tile, lists, pairs, E_, COLUMNS, BLOCK_M, GROUP_M_)
    at = read + tile * 5
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)
    tl.store(at + 4, e)


E_, E_PAD_, GROUP_M_ = tl.constexpr(E), tl.constexpr(8), tl.constexpr(GROUP_M)


@pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", ["even", "hot", "skip"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 1), (32, 4), (128, 2)])
def test_what_is_read_is_what_is_found(kind: str, rows: int, columns: int) -> None:
    """Every program of the grid gets the tile that a search in the offsets gives it, in the same order."""
    torch.manual_seed(0)
    tokens = 150
    pairs = tokens * K
    _, offsets = group_reference(loads(tokens, K, E, kind).to(DEVICE), E)
    lists = tiles_reference(offsets, pairs)
    grid = (pairs // rows + min(E + 1, pairs)) * columns
    found, read = torch.zeros(2, grid, 5, dtype=torch.int32, device=DEVICE)
    launch: Any = both
    launch[(grid,)](offsets, lists, found, read, pairs, COLUMNS=columns, BLOCK_M=rows)
    used = found[:, 0] <= E
    assert used.any()
    assert torch.equal(found[used], read[used])
    assert (read[~used][:, 0] > E).all()


@triton.jit
def arrivals(counter: Any, place: Any) -> None:
    tl.store(place + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.atomic_add(counter, 1))


@pytest.mark.skipif(DEVICE == "cuda", reason="how the interpreter is taught")
def test_programs_come_in_no_order_to_rely_on() -> None:
    """Each once, and mixed: what one writes in the place of another is not always written over."""
    kernel(build.group(4, 2, listed=True))
    counter, place = torch.zeros(1, dtype=torch.int32), torch.full((6, 4), -1, dtype=torch.int32)
    launch: Any = arrivals
    launch[(6, 4)](counter, place)
    assert place.flatten().sort().values.tolist() == list(range(24))
    rises = (place.flatten().diff() > 0).sum()
    assert 5 < rises < 18


@pytest.mark.parametrize("k", [1, 3, 8])
def test_choice_among_equals(k: int) -> None:
    """Scores with many ties, infinities and zeros of both signs: the lowest index of equals first."""
    torch.manual_seed(k)

    def chosen(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(z, k)
        return ids, weights

    logits = torch.randint(-2, 3, (9, 40)).float() / 2
    logits[0, ::3], logits[1, 5:] = float("-inf"), float("inf")
    logits[2], logits[2, ::2] = 0.0, -0.0
    for variants in WAYS.values():
        ids, weights, *_ = kernel(build.route_group(chosen, logits, variants=variants))([logits])
        wanted, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        assert torch.equal(ids, order[:, :k])
        assert torch.equal(weights, wanted[:, :k])
