"""Banks in blocks: what is stored is the nearest there is, and comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.runtime import blocks

MOST = {"fp8": 0.03, "mxfp4": 0.13}


def bank(experts: int, columns: int, inner: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(experts, columns, 1, generator=generator)
    return torch.randn(experts, columns, inner, generator=generator) * spread


def restored(weight: torch.Tensor, packing: str) -> torch.Tensor:
    scales = blocks.find_scales(weight, False, packing)
    return blocks.unpack(blocks.pack(weight, scales, False, packing), scales, packing, weight.shape[2])


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(blocks.PACKINGS), st.integers(1, 2), st.integers(1, 140), st.integers(1, 270), st.integers(0, 99)
)
def test_any_size(packing: str, experts: int, columns: int, inner: int, seed: int) -> None:
    weight = bank(experts, columns, inner, seed)
    once = restored(weight, packing)
    assert once.shape == weight.shape
    torch.testing.assert_close(restored(once, packing), once, rtol=1e-6, atol=0)
    turned = weight.transpose(1, 2).contiguous()
    scales = blocks.find_scales(turned, True, packing)
    assert torch.equal(blocks.unpack(blocks.pack(turned, scales, True, packing), scales, packing, inner), once)


@pytest.mark.parametrize("packing", blocks.PACKINGS)
def test_error_of_normal_weights(packing: str) -> None:
    weight = torch.randn(1, 256, 512, generator=torch.Generator().manual_seed(0))
    error = float((restored(weight, packing) - weight).norm() / weight.norm())
    assert MOST[packing] / 2 < error < MOST[packing]


def test_fp8_is_torch_s_in_every_block() -> None:
    weight = bank(2, 130, 300)
    scales = blocks.find_scales(weight, False, "fp8")
    made = blocks.pack(weight, scales, False, "fp8")
    assert made.dtype is torch.float8_e4m3fn and scales.shape == (2, 2, 3)
    part = weight[1, 128:, 256:]
    torch.testing.assert_close(scales[1, 1, 2], part.abs().max() / 448, rtol=0.02, atol=0)
    assert torch.equal(made[1, 128:, 256:].float(), (part / scales[1, 1, 2]).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("powers", [False, True])
def test_fp8_weights_come_back_from_bf16(powers: bool) -> None:
    """Checkpoints are widened to bf16 when they are read: values are found again, scales but for rounding."""
    generator = torch.Generator().manual_seed(1)
    codes = (torch.randn(1, 256, 256, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes[0, ::128, ::128] = 448 if not powers else 300
    scales = torch.rand(1, 2, 2, generator=generator) * 1e-3 + 1e-4
    scales = torch.exp2(torch.log2(scales).round()) if powers else scales
    widened = blocks.unpack(codes, scales, "fp8", 256).bfloat16()
    found = blocks.find_scales(widened, False, "fp8")
    again = blocks.pack(widened, found, False, "fp8")
    torch.testing.assert_close(found, scales, rtol=0 if powers else 2**-9, atol=0)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_mxfp4_takes_the_nearest_value_and_the_better_scale() -> None:
    weight = bank(1, 20, 192)
    scales = blocks.find_scales(weight, False, "mxfp4")
    found = blocks.unpack(blocks.pack(weight, scales, False, "mxfp4"), scales, "mxfp4", 192)
    grid = torch.tensor([*blocks.FP4, *(-v for v in blocks.FP4)])
    best = None
    for more in (-1, 0, 1):
        exponents = scales[0].transpose(0, 1).flatten(1)[:, :6].int() - 127 + more
        by = torch.ldexp(torch.ones(20, 6), exponents).repeat_interleave(32, 1)
        nearest = grid[(weight[0].unsqueeze(-1) / by.unsqueeze(-1) - grid).abs().argmin(-1)] * by
        error = (nearest - weight[0]).square().unflatten(1, (6, 32)).sum(-1)
        best = error if best is None else torch.minimum(best, error)
    mine = (found[0] - weight[0]).square().unflatten(1, (6, 32)).sum(-1)
    torch.testing.assert_close(mine, best)


def test_mxfp4_bytes_lie_as_documented() -> None:
    """Byte j of a block: values j and 32 + j; byte 32 + j: values 64 + j and 96 + j."""
    codes = torch.arange(256).reshape(1, 2, 128) % 8
    weight = torch.tensor(blocks.FP4)[codes]
    weight[0, 1] *= 0.5
    scales = blocks.find_scales(weight, False, "mxfp4")
    made = blocks.pack(weight, scales, False, "mxfp4")
    assert made.shape == (1, 1, 2, 64) and scales.tolist() == [[[[127] * 4, [126] * 4]]]
    for j in (0, 5, 31):
        for half in (0, 1):
            low, high = codes[0, 0, 64 * half + j], codes[0, 0, 64 * half + 32 + j]
            assert made[0, 0, 0, 32 * half + j] == low | high << 4


def test_zeros_and_extremes() -> None:
    for packing in blocks.PACKINGS:
        assert restored(torch.zeros(1, 3, 64), packing).abs().max() == 0
        tiny = torch.full((1, 1, 32), 2.0**-120)
        torch.testing.assert_close(restored(tiny, packing), tiny, rtol=1e-4, atol=0)
    smallest = torch.tensor([[[1e-45] + [0.0] * 31]])
    assert restored(smallest, "fp8").isfinite().all()
    largest = torch.full((1, 1, 32), 12.0)
    assert torch.equal(restored(largest, "mxfp4"), largest)


def test_what_cannot_be_packed() -> None:
    weight = torch.ones(1, 4, 32)
    with pytest.raises(ValueError, match="fp8 or mxfp4, not 'int8'"):
        blocks.find_scales(weight, False, "int8")
    with pytest.raises(ValueError, match="three sizes above zero"):
        blocks.find_scales(weight[0], False, "fp8")
    with pytest.raises(ValueError, match=r"int64 cannot be quantised"):
        blocks.pack(weight.long(), weight, False, "fp8")
    with pytest.raises(ValueError, match=r"expert 0 has weights that are not finite: they cannot be fp8"):
        blocks.find_scales(weight * torch.inf, False, "fp8")
    with pytest.raises(ValueError, match=r"expert 0 has weights beyond 12.0: they cannot be mxfp4"):
        blocks.find_scales(weight * 13, False, "mxfp4")
    with pytest.raises(ValueError, match="fp8 or mxfp4, not 'tiles'"):
        blocks.unpack(weight, weight, "tiles", 32)


def test_without_values_there_are_shapes() -> None:
    weight = torch.empty(2, 130, 300, device="meta")
    for packing in blocks.PACKINGS:
        scales = blocks.find_scales(weight, False, packing)
        assert scales.is_meta and blocks.pack(weight, scales, False, packing).is_meta
