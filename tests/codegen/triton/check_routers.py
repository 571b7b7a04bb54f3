"""Routing kernels in Triton's interpreter, against the routers themselves run by PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsec.dialects.moe import group_reference
from tests.codegen.triton import build
from tests.codegen.triton.interpret import kernel
from tests.codegen.triton.routers import ROUTERS, Router, biased_groups

BLOCKS = ({"up_to": None, "block_rows": 4, "num_warps": 4},)


def operands(router: Router, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(tokens, router.experts).to(router.dtype)
    return [logits, *(torch.rand(shape) for shape in router.params)]


def check(got: Any, wanted: tuple[torch.Tensor, torch.Tensor], experts: int) -> None:
    """Ids as sets, weights by id (a router may leave the order open), and the grouping of the ids that came."""
    ids, weights, order, offsets, *_ = got
    wanted_ids, wanted_weights = wanted
    assert weights.dtype is wanted_weights.dtype
    at, wanted_at = ids.argsort(dim=-1, stable=True), wanted_ids.argsort(dim=-1, stable=True)
    assert torch.equal(ids.gather(1, at), wanted_ids.gather(1, wanted_at))
    tolerance = 1e-5 if weights.dtype is torch.float32 else 2e-3
    torch.testing.assert_close(
        weights.gather(1, at), wanted_weights.gather(1, wanted_at), rtol=tolerance, atol=tolerance
    )
    wanted_order, wanted_offsets = group_reference(ids, experts)
    assert torch.equal(order, wanted_order)
    assert torch.equal(offsets, wanted_offsets)


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name: str) -> None:
    router = ROUTERS[name]
    example = operands(router, 5)
    for variants, tokens in ((), 5), (BLOCKS, 6):
        run = kernel(build.route_group(router, *example, variants=variants))
        given = operands(router, tokens, seed=1)
        check(run(given), router(*given), router.experts)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 40])
def test_token_counts(tokens: int) -> None:
    router = ROUTERS["mixtral"]
    run = kernel(build.route_group(router, *operands(router, 5)))
    given = operands(router, tokens)
    check(run(given), router(*given), router.experts)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("name", ["biased", "mixtral"])
def test_fixed_number_of_tokens(name: str, tokens: int) -> None:
    """As many tokens as experts: their sizes must not be taken for each other."""
    biased = Router(biased_groups, 8, ((8,),), {"k": 2, "groups": 4, "kept": 2})
    router = biased if name == "biased" else ROUTERS[name]
    given = operands(router, tokens)
    check(kernel(build.route_group(router, *given, fixed=True))(given), router(*given), router.experts)


def test_k_is_every_expert() -> None:
    router = Router(ROUTERS["mixtral"].fn, 6, options={"k": 6})
    run = kernel(build.route_group(router, *operands(router, 5)))
    given = operands(router, 5)
    check(run(given), router(*given), router.experts)


def test_ties_take_the_lowest_index() -> None:
    router = ROUTERS["gpt_oss"]
    run = kernel(build.route_group(router, *operands(router, 5)))
    logits = torch.zeros(3, 32)
    logits[1, 7:9], logits[1, 3] = 1.0, -0.0
    logits[2, :] = float("-inf")
    ids = run([logits])[0]
    assert ids.tolist() == [[0, 1, 2, 3], [7, 8, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "deepseek_v3", "phimoe"])
def test_nan_stays_in_bounds(name: str) -> None:
    """Rows that are not numbers get some ids, each pair has its place, and other rows are as without them."""
    router = ROUTERS[name]
    example = operands(router, 6)
    run = kernel(build.route_group(router, *example, variants=BLOCKS))
    clean = run(example)
    broken = [example[0].clone(), *example[1:]]
    broken[0][2] = float("nan")
    broken[0][4, 3] = float("nan")
    ids, weights, order, offsets = run(broken)
    whole = [0, 1, 3, 5]
    assert torch.equal(ids[whole], clean[0][whole])
    assert torch.equal(weights[whole], clean[1][whole])
    assert order.sort().values.tolist() == list(range(ids.numel()))
    assert offsets[-1] == ((ids >= 0) & (ids < router.experts)).sum()


def test_order_of_the_chosen_is_that_of_topk() -> None:
    router = ROUTERS["olmoe"]
    given = operands(router, 9)
    ids, weights, *_ = kernel(build.route_group(router, *given))(given)
    wanted_ids, wanted_weights = router(*given)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights)


def test_rounding_follows_the_graph() -> None:
    """Scores that the model rounds to f16 tie where they tie in eager."""

    def rounded(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.topk(torch.sigmoid(z.to(torch.float16)), 2)
        return ids, weights

    logits = torch.tensor([[0.5, 0.5001, 0.4, 0.5002], [0.1, 0.2, 0.3, 0.3001]])
    ids, weights, *_ = kernel(build.route_group(rounded, logits))([logits])
    assert ids.tolist() == [[0, 1], [2, 3]]
    assert torch.equal(weights, rounded(logits)[1])
