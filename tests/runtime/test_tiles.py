"""Packed banks: where each value lies, what comes back, and how far quantised weights are off."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.runtime.tiles import GROUP, find_scales, pack, pack_bias, unpack


@dataclass(frozen=True)
class Shape:
    """A bank as a model has it; `sorted` turns it over to [E, N, K] with gate columns before up columns."""

    experts: int
    width: int  # columns of a part
    inner: int
    parts: int
    transposed: bool
    interleaved: bool
    dtype: torch.dtype
    offset: int  # columns in front of the bank in the memory that it is a view of

    @property
    def columns(self) -> int:
        return self.parts * self.width

    def made(self) -> Tensor:
        gen = torch.Generator().manual_seed(self.width * 100 + self.inner)
        last = self.columns if self.transposed else self.inner
        rows = self.inner if self.transposed else self.columns
        whole = torch.randn(self.experts, rows, last + self.offset, generator=gen).to(self.dtype)
        return whole[..., self.offset :]

    def sorted(self, bank: Tensor) -> Tensor:
        bank = bank.transpose(1, 2) if self.transposed else bank
        return torch.cat([bank[:, ::2], bank[:, 1::2]], 1) if self.interleaved else bank

    def column(self, block: int, tile: int, c: int) -> int:
        """The column of the sorted bank that a lane holds, from the number of columns on for padding."""
        if self.parts == 1:
            return block * 32 + tile * 16 + c
        column = block * 16 + c
        return tile * self.width + column if column < self.width else self.columns

    def args(self) -> tuple[int, bool, bool]:
        return self.parts, self.transposed, self.interleaved


@st.composite
def shapes(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> Shape:
    parts = draw(st.sampled_from([1, 2]))
    return Shape(
        experts=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 70)),
        inner=draw(st.integers(1, 150)),
        parts=parts,
        transposed=draw(st.booleans()),
        interleaved=parts == 2 and draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        offset=draw(st.integers(0, 2)),
    )


@given(shapes())
@settings(max_examples=60, deadline=None)
def test_tiles_give_back_every_bit(shape: Shape) -> None:
    bank = shape.made()
    packed = pack(bank, *shape.args())
    back = unpack(packed, None, "tiles", shape.parts, shape.columns, shape.inner)
    assert back.dtype == shape.dtype
    assert torch.equal(back, shape.sorted(bank))
    assert packed.count_nonzero() == bank.count_nonzero()  # padding is zero


@given(shapes(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_each_value_lies_where_kernels_look(shape: Shape, random: object) -> None:
    bank = shape.made()
    wanted, packed = shape.sorted(bank), pack(bank, *shape.args())
    values = 4 // bank.itemsize
    blocks = math.ceil(shape.columns / 32) if shape.parts == 1 else math.ceil(shape.width / 16)
    assert packed.shape == (shape.experts, blocks, math.ceil(shape.inner / (16 * values)), 2, 16, 16, values)
    assert packed.is_contiguous()
    for _ in range(50):
        e, b, s, j, r, c, v = (random.randrange(size) for size in packed.shape)  # type: ignore[attr-defined]
        column, k = shape.column(b, j, c), (s * 16 + r) * values + v
        inside = column < shape.columns and k < shape.inner
        assert packed[e, b, s, j, r, c, v] == (wanted[e, column, k] if inside else 0)


@given(shapes((torch.bfloat16, torch.float32, torch.float16)), st.sampled_from(["int8", "int4"]))
@settings(max_examples=60, deadline=None)
def test_quantised_values_are_the_nearest_there_are(shape: Shape, packing: str) -> None:
    bank = shape.made()
    scales = find_scales(bank, *shape.args(), packing)
    packed = pack(bank, *shape.args(), packing)
    assert torch.equal(packed, pack(bank, *shape.args(), packing, scales))
    back = unpack(packed, scales, packing, shape.parts, shape.columns, shape.inner)
    exact = shape.sorted(bank).float()
    low, high = (-127, 127) if packing == "int8" else (-8, 7)
    group = shape.inner if packing == "int8" else GROUP
    blocks, groups = packed.shape[1], math.ceil(shape.inner / group)
    assert scales.shape == (shape.experts, blocks, groups, 2, 16)
    for b in range(blocks):
        for j in range(2):
            for c in range(16):
                if (column := shape.column(b, j, c)) >= shape.columns:
                    continue
                scale = scales[:, b, :, j, c].repeat_interleave(group, 1)[:, : shape.inner]
                nearest = (exact[:, column] / scale).round().clamp(low, high) * scale
                assert torch.equal(back[:, column], nearest)


@pytest.mark.parametrize(
    ("packing", "inner", "most"), [("int8", 1024, 0.009), ("int8", 4096, 0.009), ("int4", 2048, 0.1)]
)
def test_error_on_normal_weights(packing: str, inner: int, most: float) -> None:
    bank = 0.02 * torch.randn(1, 128, inner, generator=torch.Generator().manual_seed(0))
    scales = find_scales(bank, packing=packing)
    back = unpack(pack(bank, packing=packing, scales=scales), scales, packing, 1, 128, inner)
    error = (back - bank).norm() / bank.norm()
    assert error < most
    farthest = bank.abs().unflatten(-1, (-1, inner if packing == "int8" else GROUP)).amax(-1, keepdim=True)
    step = farthest / (127 if packing == "int8" else 7)
    plain = (bank.unflatten(-1, (*step.shape[-2:-1], -1)) / step).round() * step
    assert error < (plain.flatten(-2) - bank).norm() / bank.norm()  # the search pays


def test_a_group_of_zeros_stays_zero() -> None:
    bank = torch.zeros(1, 3, 300)
    bank[0, 1, 140] = 5.0
    for packing in ("int8", "int4"):
        scales = find_scales(bank, packing=packing)
        assert torch.equal(unpack(pack(bank, packing=packing), scales, packing, 1, 3, 300), bank)


@pytest.mark.parametrize("interleaved", [False, True])
def test_bias_in_the_order_of_the_columns(interleaved: bool) -> None:
    bias = torch.arange(1, 41, dtype=torch.bfloat16).expand(2, 40)
    packed = pack_bias(bias, 2, interleaved)
    assert packed.shape == (2, 2, 2, 16)
    assert packed.dtype == torch.float32
    gate = bias[0, ::2] if interleaved else bias[0, :20]
    assert packed[1, :, 0].flatten()[:20].tolist() == gate.tolist()
    assert packed[0, 1, 1].tolist() == [*(bias[0, 33::2] if interleaved else bias[0, 36:]).tolist(), *[0] * 12]
    assert torch.equal(pack_bias(bias)[0].flatten()[:40], bias[0].float())


def test_one_expert_alone_can_be_unpacked() -> None:
    bank = torch.randn(4, 40, 130)
    scales, packed = find_scales(bank, packing="int4"), pack(bank, packing="int4")
    every = unpack(packed, scales, "int4", 1, 40, 130)
    assert torch.equal(unpack(packed[2:3], scales[2:3], "int4", 1, 40, 130), every[2:3])
    assert unpack(packed, scales, "int4", 1, 40, 130, torch.bfloat16).dtype == torch.bfloat16


def test_nothing_is_recorded_for_gradients() -> None:
    bank = torch.nn.Parameter(torch.randn(2, 32, 64))
    scales = find_scales(bank, packing="int8")
    packed = pack(bank)
    assert not scales.requires_grad and not packed.requires_grad
    assert not unpack(packed, None, "tiles", 1, 32, 64).requires_grad


def test_shapes_without_values() -> None:
    bank = torch.randn(2, 64, 200, device="meta", dtype=torch.bfloat16)
    assert pack(bank, 2).shape == (2, 2, 7, 2, 16, 16, 2)
    assert find_scales(bank, 2, packing="int4").shape == (2, 2, 2, 2, 16)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: pack(torch.ones(1, 2, 2), packing="int3"), "not as 'int3'"),
        (lambda: pack(torch.ones(1, 2, 2, dtype=torch.float16)), "bf16 or f32"),
        (lambda: pack(torch.ones(2, 2)), "three sizes"),
        (lambda: pack(torch.ones(0, 2, 2)), "three sizes"),
        (lambda: pack(torch.ones(1, 2, 2), 1, False, True), "interleaved"),
        (lambda: find_scales(torch.ones(1, 2, 2), packing="tiles"), "no scales"),
        (lambda: pack(torch.ones(1, 2, 2, dtype=torch.int8), packing="int8"), "cannot be quantised"),
        (lambda: find_scales(torch.full((1, 2, 2), torch.inf)), "expert 0 has weights that are not finite"),
        (lambda: unpack(torch.ones(1), None, "int8", 1, 1, 1), "quantised ones have scales"),
    ],
)
def test_what_cannot_be_packed_is_said(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
