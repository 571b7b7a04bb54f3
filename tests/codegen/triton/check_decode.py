"""The family `rows` in Triton's interpreter, against the ops' own references."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen.triton import decode
from sparsec.dialects.moe import gemm_combine_reference, group_reference
from tests.codegen.triton import build
from tests.codegen.triton.check_experts import check_down, check_up, loads, silu
from tests.codegen.triton.interpret import kernel

ROWS = {"kernel": "rows", "block_m": 1, "block_n": 8, "block_k": 16, "num_stages": 2, "up_to": 40}
TILES = {"block_m": 16, "block_n": 16, "block_k": 32}


def variants(**kwargs: Any) -> tuple[dict[str, Any], ...]:
    """Up to 40 tokens by `rows`, more by tiles."""
    return ({**ROWS, **kwargs}, TILES)


@pytest.mark.parametrize("layout", ["concat", "interleaved", "single"])
@pytest.mark.parametrize("transposed", [False, True])
def test_up_layouts(layout: str, transposed: bool) -> None:
    check_up(4, 2, 3, layout, True, transposed, torch.float32, "skip", variants=variants(block_m=2))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_down_layouts(transposed: bool, split: int) -> None:
    check_down(4, 3, 5, True, transposed, torch.float32, "skip", 24, 20, variants(split=split, block_k=4))


@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_and_whole_tiles(transposed: bool) -> None:
    check_up(3, 2, 4, "concat", True, transposed, torch.float16, "even", 32, 16, variants())
    check_down(3, 2, 4, True, transposed, torch.float16, "even", 16, 64, variants(split=4))


def test_parts_that_are_empty() -> None:
    """Five parts of one block each, where there are three blocks; and tokens beyond those that `rows` is for."""
    for tokens in (0, 1, 41):
        check_down(tokens, 2, 4, True, False, torch.float32, "even", 16, 48, variants(split=5))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", ["even", "hot"])
def test_k_from_one_to_all(k: int, kind: str) -> None:
    """With three rows or more of an expert, groups of two have a last one that is not full."""
    check_up(3, k, 4, "concat", False, False, torch.float32, kind, variants=variants(block_m=2))
    check_down(3, k, 4, False, False, torch.float32, kind, variants=variants())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.integers(0, 6), st.integers(1, 3), st.integers(3, 9), st.sampled_from(["even", "hot", "skip"]),
    st.integers(3, 40), st.integers(3, 40), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_any_size(
    tokens: int, k: int, experts: int, kind: str, hidden: int, width: int, block_m: int, split: int, transposed: bool
) -> None:
    given = variants(block_m=block_m, split=split)
    check_up(tokens, k, experts, "concat", False, transposed, torch.float32, kind, hidden, width, given)
    check_down(tokens, k, experts, False, transposed, torch.float32, kind, hidden, width, given)


def test_bits_do_not_depend_on_the_batch() -> None:
    """Tokens in one batch, one by one, and with rows in groups: the same bits."""
    torch.manual_seed(0)
    tokens, k, experts, hidden, width = 4, 2, 3, 24, 20
    x, ids, weights = torch.randn(tokens, hidden), loads(tokens, k, experts, "even"), torch.rand(tokens, k)
    up, down = torch.randn(experts, 2 * width, hidden), torch.randn(experts, hidden, width)
    second = kernel(build.gemm_combine(hidden, width, experts, k, torch.float32, variants=variants(split=2)))
    found = list[torch.Tensor]()
    for block_m, batch in ((1, tokens), (1, 1), (4, 3)):
        tiles = variants(block_m=block_m)
        first = kernel(build.gather_gemm(silu, hidden, width, experts, k, torch.float32, variants=tiles))
        parts = list[torch.Tensor]()
        for part in torch.arange(tokens).split(batch):
            order, offsets = group_reference(ids[part], experts)
            (h,) = first([x[part], order, offsets, up])
            parts += second([h, order, offsets, weights[part], down])
        found.append(torch.cat(parts))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="fresh memory is known there")
def test_only_who_comes_last_adds_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a part is missing, nobody stores: here of the last block of columns."""
    split, blocks = 3, 2
    launches = decode.Down.launches

    def short(self: decode.Down, variant: Any) -> Any:
        (entry,) = launches(self, variant)
        assert entry.grid == ("t", str(blocks * split))
        return (replace(entry, grid=("t", str(blocks * split - 1))),)

    monkeypatch.setattr(decode.Down, "launches", short)
    run = kernel(build.gemm_combine(16, 24, 3, 2, torch.float32, variants=variants(split=split, block_k=4)))
    operands = [torch.ones(2, 24), *group_reference(torch.tensor([[0, 2]]), 3), torch.ones(1, 2), torch.ones(3, 16, 24)]
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kwargs: torch.zeros(*sizes, **kwargs) + 7)
    (y,) = run(operands)
    assert (y[0, :8] == 48).all() and (y[0, 8:] == 7).all()


def test_counts_are_left_zero() -> None:
    """Of what outlives calls, the next call, of another number of tokens, finds nothing."""
    torch.manual_seed(0)
    h, down, weights = torch.randn(6, 20), torch.randn(3, 12, 20), torch.rand(3, 2)
    run = kernel(build.gemm_combine(12, 20, 3, 2, torch.float32, variants=variants(split=2, block_k=4)))
    for tokens in (3, 1, 3):
        order, offsets = group_reference(torch.tensor([[0, 2], [1, 2], [2, 0]])[:tokens], 3)
        (y,) = run([h[: 2 * tokens], order, offsets, weights[:tokens], down])
        wanted = gemm_combine_reference(h, order, offsets, weights[:tokens], down, None, False, torch.float32)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_skipped_pairs_are_not_read() -> None:
    """They are not defined: here NaN, as are the weights of what nobody chose."""
    torch.manual_seed(0)
    tokens, k, experts, hidden, width = 4, 3, 6, 16, 24
    ids = torch.tensor([[0, -1, 2], [-1, -1, -1], [2, 9, 0], [1, 2, -1]])
    order, offsets = group_reference(ids, experts)
    h, down, weights = torch.randn(tokens * k, width), torch.randn(experts, hidden, width), torch.rand(tokens, k)
    kept = ids.clamp(0, experts - 1) == ids
    wanted = torch.zeros(tokens, hidden)
    for i, pair in enumerate(order[: int(offsets[-1])].tolist()):
        expert = int(ids.flatten()[pair])
        wanted[pair // k] += weights.flatten()[pair] * (down[expert] @ h[i])
    h[int(offsets[-1]) :] = float("nan")
    weights[~kept] = float("nan")
    down[3:] = float("nan")
    run = kernel(build.gemm_combine(hidden, width, experts, k, torch.float32, variants=variants()))
    (y,) = run([h, order, offsets, weights, down])
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
