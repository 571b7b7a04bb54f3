"""The Triton kernels that stand in for peers' CUDA operators: in the interpreter, and compiled where there is a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.gpu.peers import kernels
from sparsec.inspect.interpreted import let_loops_run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")
if INTERPRETED:
    let_loops_run()


@pytest.mark.parametrize("few", [1, 1 << 20])
@pytest.mark.parametrize(("tokens", "experts", "k", "size"), [(1, 5, 2, 16), (150, 12, 4, 32)])
def test_align(few: int, tokens: int, experts: int, k: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair once, in a block of its expert; all else is padding. Counted by one program, and by many."""
    monkeypatch.setattr(kernels, "FEW", few)
    torch.manual_seed(tokens)
    ids = torch.rand(tokens, experts).argsort(-1)[:, :k].int().to(DEVICE)
    most = tokens * k + experts * (size - 1)
    rows, owners, total = (torch.full((n,), -1, dtype=torch.int32, device=DEVICE) for n in (most, -(-most // size), 1))
    kernels.align(ids, experts, size, rows, owners, total)
    counts = ids.flatten().bincount(minlength=experts).cpu()
    blocks = (counts + size - 1) // size
    assert int(total) == int(blocks.sum()) * size
    wanted = torch.arange(experts).repeat_interleave(blocks)
    assert owners[: len(wanted)].tolist() == wanted.tolist()
    used = rows[: int(total)].cpu()
    assert sorted(used[used < tokens * k].tolist()) == list(range(tokens * k))
    assert (used <= tokens * k).all()
    pair = used < tokens * k
    assert torch.equal(ids.flatten().cpu()[used[pair].long()].long(), wanted.repeat_interleave(size)[pair])


def test_activation_and_sum() -> None:
    wide, parts = torch.randn(7, 2 * 40, device=DEVICE), torch.randn(5, 3, 40, device=DEVICE)
    out, total = torch.empty(7, 40, device=DEVICE), torch.empty(5, 40, device=DEVICE)
    kernels.silu_and_mul(out, wide)
    kernels.sum_of_slots(parts, total)
    gate, up = wide.chunk(2, -1)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, parts.sum(1), rtol=1e-5, atol=1e-5)
