"""The cost model of the backward ops: against what is published, and what any cost model has to do."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.ir.types import DType
from sparsec.passes.chips import CHIPS
from sparsec.passes.cost import BUCKETS, SLACK, best
from sparsec.passes.gradient_variants import (
    FAMILIES,
    FEW,
    gradient_candidates,
    gradient_ranges,
    gradient_ranked,
    obstacle,
)
from sparsec.passes.gradients import Bank, Gradient, Hidden, foresee
from sparsec.passes.variants import Gemm, Variant
from tests.passes.published import DEEPSEEK_V3, GPT_OSS, MIXTRAL, OLMOE, QWEN3, SONIC_BACKWARD, Shape

H100 = CHIPS["cuda:sm_90"]
MODELS = [MIXTRAL, QWEN3, OLMOE, GPT_OSS, DEEPSEEK_V3]


def gradients(s: Shape, dtype: DType = DType.bf16) -> tuple[Hidden, Bank, Bank]:
    """What the backward pass of a gated layer takes besides the gradient of x."""
    hidden = Hidden(s.experts, s.k, s.hidden, s.hidden, s.width, 2, dtype)
    up = Bank(s.experts, s.k, 2 * s.width, s.hidden, dtype)
    return hidden, up, Bank(s.experts, s.k, s.hidden, s.width, dtype, transposed=True)


def x_grad(s: Shape) -> Gemm:
    """The gradient of x: a down-projection by the up bank."""
    return Gemm("down", s.experts, s.k, 2 * s.width, s.hidden, 1, DType.bf16, 1, transposed=True)


def step(s: Shape, tokens: int) -> float:
    """Microseconds of forward and backward."""
    gemms = sum(best(gemm, tokens, H100).made.us for gemm in (*s.layer(), x_grad(s)))
    return gemms + sum(gradient_ranked(grad, tokens, H100)[0].made.us for grad in gradients(s))


@pytest.mark.parametrize(("tokens", "shape"), list(SONIC_BACKWARD))
def test_backward_takes_about_as_long_as_the_best_known(tokens: int, shape: Shape) -> None:
    """Within 12 % of SonicMoE, which keeps the up-projection's result where ours computes it again."""
    _, *banks = gradients(shape)
    value = Gemm("up", shape.experts, shape.k, shape.hidden, shape.width, 1, DType.bf16, transposed=True)
    predicted = sum(best(gemm, tokens, H100).made.us for gemm in (value, x_grad(shape)))
    predicted += sum(gradient_ranked(bank, tokens, H100)[0].made.us for bank in banks)
    assert 0.88 < predicted / (2 * shape.flops(tokens) / SONIC_BACKWARD[tokens, shape] * 1e-6) < 1.12


@pytest.mark.parametrize("shape", [QWEN3, MIXTRAL], ids=["qwen3", "mixtral"])
def test_forward_and_backward_are_predicted_to_reach_what_is_asked(shape: Shape) -> None:
    """400 TFLOP/s of three times the forward's flops, 18 of the 22 products made: by the model, not measured."""
    assert 3 * shape.flops(32768) / step(shape, 32768) * 1e-6 >= 400


shapes = st.builds(
    Shape, st.sampled_from([8, 60, 256]), st.integers(1, 8), st.sampled_from([512, 2880, 7168]),
    st.sampled_from([256, 1000, 14336]),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(shape=shapes, tokens=st.integers(1, 50000), more=st.integers(1, 500), data=st.data())
def test_more_tokens_take_longer_and_no_time_is_below_the_floor(
    shape: Shape, tokens: int, more: int, data: st.DataObject
) -> None:
    grad = data.draw(st.sampled_from(list[Gradient](gradients(shape))))
    for candidate in gradient_ranked(grad, tokens, H100):
        now, later = candidate.made, foresee(grad, candidate.variant, tokens + more, H100)
        assert later is not None and now.us <= later.us * 1.0001
        assert now.us >= now.roofs[now.limiter] == max(now.roofs.values())
        assert now.us > 1e6 * tokens * shape.k * flops_of_a_row(grad) / H100.flops[grad.dtype]
        assert now.us > 1e6 * written(grad, tokens) / H100.bandwidth
        assert now.waste > -0.02 and now.resident >= 1


def flops_of_a_row(grad: Gradient) -> int:
    if isinstance(grad, Bank):
        return 2 * grad.m * grad.n
    return 2 * grad.width * (grad.parts * grad.hidden + grad.out)


def written(grad: Gradient, tokens: int) -> int:
    if isinstance(grad, Bank):
        return grad.experts * grad.m * grad.n * grad.dtype.itemsize
    return tokens * grad.k * grad.width * (1 + grad.parts) * grad.dtype.itemsize


@pytest.mark.parametrize("target", sorted(CHIPS))
@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: f"{shape.experts}x{shape.width}")
def test_ranges_lose_little_against_the_best_of_each_bucket(shape: Shape, target: str) -> None:
    on = CHIPS[target]
    for dtype in (DType.bf16, DType.f32):
        for grad in gradients(shape, dtype):
            table = gradient_ranges(grad, on)
            assert table[-1].up_to is None and len(table) <= FEW
            assert all((a.up_to or 0) < (b.up_to or 1 << 30) for a, b in pairwise(table))
            for tokens in BUCKETS:
                chosen = next(r for r in table if r.up_to is None or tokens <= r.up_to).chosen.variant
                made = foresee(grad, chosen, tokens, on)
                assert made is not None
                assert made.us <= gradient_ranked(grad, tokens, on)[0].made.us * SLACK[-1]


def test_the_copy_engine_brings_rows_only_where_there_are_some() -> None:
    """A tensor of no rows has no map: whatever runs for no tokens takes them by pointers."""
    for shape in MODELS:
        for grad in gradients(shape)[1:]:
            assert gradient_ranges(grad, H100)[0].chosen.variant.kernel == "tiles"
            assert gradient_ranges(grad, H100)[-1].chosen.variant.kernel == "tma"


def test_what_the_copy_engine_cannot_do_says_why() -> None:
    hidden, bank, _ = gradients(Shape(8, 2, 512, 250))
    assert "16 bytes" in obstacle("tma", hidden, H100) and "16 bytes" in obstacle("tma", bank, H100)
    assert "blocks of 64" in obstacle("tma", gradients(Shape(8, 2, 520, 256))[0], H100)
    assert "f32" in obstacle("tma", gradients(QWEN3, DType.f32)[0], H100)
    assert "no copy engine" in obstacle("tma", bank, CHIPS["cuda:sm_80"])
    alternate = Hidden(8, 2, 512, 512, 256, 2, DType.bf16, alternate=True)
    assert "registers" in obstacle("tma", alternate, CHIPS["cuda:sm_100"]) and not obstacle("tma", alternate, H100)
    assert "no such family" in obstacle("rows", bank, H100)
    for target in CHIPS.values():
        kernels = {variant.kernel for variant in gradient_candidates(bank, target)}
        assert kernels <= set(FAMILIES) and "tiles" in kernels


def test_a_tile_too_large_is_refused() -> None:
    hidden, bank, _ = gradients(QWEN3)
    assert foresee(hidden, Variant("tma", 128, 256, 64, 8, 3), 4096, H100) is None
    assert foresee(bank, Variant("tiles", 128, 256, 64, 8, 5), 4096, H100) is None
