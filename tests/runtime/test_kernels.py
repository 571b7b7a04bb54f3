"""The CPU kernels against the ops' references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.dialects.moe import gather_gemm_reference, gemm_combine_reference, group_reference
from sparsec.ir.core import Block
from sparsec.runtime import cpu_kernels, packing
from sparsec.runtime.experts import run_experts
from sparsec.runtime.live_banks import _seen, forget
from sparsec.runtime.packing import Bank

torch.set_num_threads(1)


def gated(parts: Sequence[Tensor]) -> Tensor:
    return F.silu(parts[0]) * parts[1] if len(parts) == 2 else F.silu(parts[0])


@pytest.fixture(autouse=True, scope="module")
def pack_small_banks() -> Iterator[None]:
    """The banks of these tests are smaller than what is packed otherwise."""
    patch = pytest.MonkeyPatch()
    patch.setattr(packing, "SMALLEST", {2: 1, 4: 1})
    yield
    patch.undo()


class Env:
    """Evaluates the activation of the references."""

    def dim(self, dim: Any) -> int:
        raise AssertionError(dim)

    def run(self, block: Block, args: Sequence[Any]) -> tuple[Any, ...]:
        return (gated(args),)

    def call(self, name: str, args: Sequence[Any]) -> tuple[Any, ...]:
        raise AssertionError(name)


class Case:
    """Random operands of an expert layer."""

    def __init__(self, seed: int, tokens: int, experts: int, k: int, dtype: torch.dtype, **kinds: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden, self.width = 16, 24
        self.experts, self.k = experts, k
        self.layout: str = kinds.get("layout", "concat")
        self.transposed: tuple[bool, bool] = kinds.get("transposed", (False, False))
        parts = 1 if self.layout == "single" else 2

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        self.x = draw(tokens, self.hidden)
        up = draw(experts, parts * self.width, self.hidden, scale=self.hidden**-0.5)
        down = draw(experts, self.hidden, self.width, scale=self.width**-0.5)
        self.up = up.mT.contiguous() if self.transposed[0] else up
        self.down = down.mT.contiguous() if self.transposed[1] else down
        bias = kinds.get("bias", False)
        self.up_bias = draw(experts, parts * self.width) if bias else None
        self.down_bias = draw(experts, self.hidden) if bias else None
        self.weights = torch.rand(tokens, k, generator=generator)
        routing = kinds.get("routing", "distinct")
        if routing == "one hot":
            self.ids = torch.full((tokens, k), experts - 1)
        elif routing == "skips":
            self.ids = torch.randint(-1, experts + 2, (tokens, k), generator=generator)
        else:
            self.ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :k]

    def reference(self, dtype: torch.dtype | None = None) -> Tensor:
        """The op's own reference, on operands converted to `dtype`."""

        def cast(tensor: Tensor | None) -> Any:
            return tensor if tensor is None or dtype is None else tensor.to(dtype)

        order, offsets = group_reference(self.ids, self.experts)
        x = cast(self.x)
        up, up_bias, down, down_bias = map(cast, (self.up, self.up_bias, self.down, self.down_bias))
        env: Any = Env()
        h = gather_gemm_reference(env, Block(), self.layout, x, order, offsets, up, up_bias, self.transposed[0], self.k)
        return gemm_combine_reference(h, order, offsets, self.weights, down, down_bias, self.transposed[1], x.dtype)

    def banks(self, pack: bool = True) -> tuple[Bank, Bank]:
        dtype = self.x.dtype
        up = Bank(self.up, self.up_bias, dtype, self.transposed[0], self.layout == "interleaved", pack)
        return up, Bank(self.down, self.down_bias, dtype, self.transposed[1], pack=pack)

    def run(self, batched: bool, pack: bool = True, fused: bool = True) -> Tensor:
        up, down = self.banks(pack)
        order, offsets = cpu_kernels.group(self.ids, self.experts)
        parts = 1 if self.layout == "single" else 2
        if fused:
            return cpu_kernels.experts(self.x, order, offsets, self.weights, up, down, gated, parts, batched)
        h = cpu_kernels.gather_gemm(self.x, order, offsets, up, self.k, gated, parts, batched)
        return cpu_kernels.gemm_combine(h, order, offsets, self.weights, down)


def centred(rows: Tensor) -> Tensor:
    """A tail that needs whole rows."""
    return rows - rows.mean(-1, keepdim=True)


def close(got: Tensor, wanted: Tensor, relative: float = 1e-5) -> bool:
    return bool((got - wanted).norm() <= relative * wanted.norm() + 1e-30) and got.shape == wanted.shape


LAYOUTS = st.sampled_from(["concat", "interleaved", "single"])
FLAGS = st.tuples(st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    tokens=st.sampled_from([0, 1, 2, 7, 16, 17, 40, 150]),
    experts=st.integers(1, 9),
    k=st.integers(1, 9),
    layout=LAYOUTS,
    transposed=FLAGS,
    bias=st.booleans(),
    routing=st.sampled_from(["distinct", "one hot", "skips"]),
    ways=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_experts_agree_with_the_reference(
    seed: int,
    tokens: int,
    experts: int,
    k: int,
    layout: str,
    transposed: tuple[bool, bool],
    bias: bool,
    routing: str,
    ways: tuple[bool, bool, bool],
) -> None:
    case = Case(
        seed,
        tokens,
        experts,
        min(k, experts),
        torch.float32,
        layout=layout,
        transposed=transposed,
        bias=bias,
        routing=routing,
    )
    got = case.run(*ways)
    assert close(got, case.reference())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    tokens=st.sampled_from([0, 1, 7, 17, 150]),
    ways=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    early=st.booleans(),
    late=st.booleans(),
    tail=st.sampled_from([None, centred]),
)
def test_rows_are_weighed_in_front_and_finished_behind(
    seed: int, tokens: int, ways: tuple[bool, bool, bool], early: bool, late: bool, tail: Any
) -> None:
    case = Case(seed, tokens, 5, 3, torch.float32, bias=True, routing="skips")
    skipped = (case.ids < 0) | (case.ids >= 5)
    case.weights[skipped] = torch.nan  # what is skipped may hold anything
    batched, pack, fused = ways
    up, down = case.banks(pack)
    order, offsets = cpu_kernels.group(case.ids, 5)
    front = case.weights if early else None
    if fused:
        got = cpu_kernels.experts(case.x, order, offsets, case.weights, up, down, gated, 2, batched, front, late, tail)
    else:
        h = cpu_kernels.gather_gemm(case.x, order, offsets, up, 3, gated, 2, batched, front)
        got = cpu_kernels.gemm_combine(h, order, offsets, case.weights, down, late, tail)
    env: Any = Env()
    h = gather_gemm_reference(env, Block(), "concat", case.x, order, offsets, case.up, case.up_bias, False, 3, front)
    wanted = gemm_combine_reference(
        h, order, offsets, case.weights, case.down, case.down_bias, False, case.x.dtype, late, tail
    )
    assert close(got, wanted)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), tokens=st.integers(0, 60), experts=st.integers(1, 200), k=st.integers(1, 8))
def test_group_is_a_stable_counting_sort(seed: int, tokens: int, experts: int, k: int) -> None:
    ids = torch.randint(-2, experts + 3, (tokens, k), generator=torch.Generator().manual_seed(seed))
    for got, wanted in zip(cpu_kernels.group(ids, experts), group_reference(ids, experts), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_group_takes_every_integer_type(dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 0], [2, 1]], dtype=dtype)
    order, offsets = cpu_kernels.group(ids, 3)
    assert order.tolist() == [1, 0, 3, 2]
    assert offsets.tolist() == [0, 1, 3, 4]


def test_every_expert_for_every_token() -> None:
    case = Case(0, 21, 5, 5, torch.float32)
    assert close(case.run(True), case.reference())
    assert close(case.run(False), case.reference())


@pytest.mark.parametrize("tokens", [3, 50])
def test_a_skipped_pair_adds_nothing_though_its_weight_is_nan(tokens: int) -> None:
    case = Case(1, tokens, 4, 2, torch.float32)
    case.ids[:, 1] = 4
    case.weights[:, 1] = float("nan")
    for batched in (True, False):
        got = case.run(batched)
        assert not got.isnan().any()
        assert close(got, case.reference())


@pytest.mark.parametrize("tokens", [1, 40])
def test_all_pairs_skipped_gives_zeros(tokens: int) -> None:
    case = Case(1, tokens, 4, 2, torch.bfloat16)
    case.ids[:] = -1
    for batched in (True, False):
        for fused in (True, False):
            assert not case.run(batched, fused=fused).any()


@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
@pytest.mark.parametrize("batched", [True, False])
def test_the_same_input_gives_the_same_bits(tokens: int, batched: bool) -> None:
    case = Case(2, tokens, 8, 4, torch.bfloat16)
    assert torch.equal(case.run(batched), case.run(batched))


def test_the_two_ways_give_the_same_bits_in_the_combine() -> None:
    y = torch.randn(40 * 4, 16)
    order, _ = cpu_kernels.group(torch.randint(0, 6, (40, 4)), 6)
    weights = torch.rand(40, 4)
    all_at_once = cpu_kernels.combine(y, order, 160, weights, torch.float32)
    place = order.long().argsort().view(40, 4)
    one_by_one = sum(y[place[:, slot]].double() * weights[:, slot, None].double() for slot in range(4))
    assert isinstance(one_by_one, Tensor)
    assert close(all_at_once.double(), one_by_one, 1e-6)


def eager(case: Case) -> Tensor:
    """As models compute in bf16: each expert's result is rounded, weighed and added in bf16."""
    out = torch.zeros_like(case.x)
    for e in range(case.experts):
        token, slot = torch.where(case.ids == e)
        projected = F.linear(case.x[token], case.up[e])
        h = gated(projected.chunk(2, -1))
        y = F.linear(h, case.down[e]) * case.weights[token, slot, None].to(case.x.dtype)
        out.index_add_(0, token, y)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 13, 200])
def test_half_precision_is_no_further_from_f32_than_eager(dtype: torch.dtype, tokens: int) -> None:
    case = Case(3, tokens, 8, 4, dtype)
    exact = case.reference(torch.float64)

    def distance(got: Tensor) -> float:
        return float((got.double() - exact).norm())

    for batched in (True, False):
        for pack in (True, False):
            assert distance(case.run(batched, pack)) <= 1.1 * distance(eager(case))


def test_weights_wider_than_the_rows_are_not_rounded() -> None:
    case = Case(4, 9, 4, 2, torch.float32)
    wide = case.reference()
    case.x = case.x.bfloat16()
    got = case.run(True)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - wide).norm() / wide.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_banks_are_not_packed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(packing, "SMALLEST", {2: 1 << 10, 4: 1 << 10})
    case = Case(5, 9, 4, 2, dtype)
    up, down = case.banks()
    assert not up.packed
    assert not down.packed
    if dtype == torch.float32:
        assert up.weights[1].data_ptr() == case.up[1].data_ptr()
    else:  # widened: their products are not rounded before the sum over slots
        assert up.weights[1].dtype == down.out == torch.float32
        assert torch.equal(up.weights[1], case.up[1].float())


def test_packed_banks_are_packed() -> None:
    up, down = Case(5, 9, 4, 2, torch.float32).banks()
    assert up.packed
    assert down.packed
    assert {weight.layout for weight in up.weights} == {torch._mkldnn}  # type: ignore[attr-defined]


def test_without_onednn_the_plain_weights_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(5, 9, 4, 2, torch.float32, layout="interleaved", transposed=(True, True), bias=True)
    no: Callable[[torch.dtype], bool] = lambda dtype: False  # noqa: E731
    monkeypatch.setattr(packing, "can_pack", no)
    up, _ = case.banks()
    assert not up.packed
    assert close(case.run(True), case.reference())


class TestLiveBanks:
    """Banks of weights that someone else holds."""

    def run(self, case: Case) -> Tensor:
        return run_experts(case.x, case.ids, case.weights, case.up, case.down, None, None, gated)

    def setup_method(self) -> None:
        forget()

    def test_a_bank_is_packed_when_seen_again(self) -> None:
        case = Case(6, 9, 4, 2, torch.float32)
        first = self.run(case)
        assert [entry.bank for entry in _seen.values()] == [None, None]
        second = self.run(case)
        assert all(entry.bank is not None and entry.bank.packed for entry in _seen.values())
        assert close(first, case.reference())
        assert close(second, case.reference())

    def test_a_change_in_place_is_noticed(self) -> None:
        case = Case(7, 9, 4, 2, torch.float32)
        for _ in range(3):
            self.run(case)
        case.up.mul_(2)
        for _ in range(3):
            assert close(self.run(case), case.reference())

    def test_packed_copies_die_with_the_weights(self) -> None:
        case = Case(8, 9, 4, 2, torch.float32)
        for _ in range(2):
            self.run(case)
        assert len(_seen) == 2
        del case
        assert not _seen

    def test_a_view_of_the_same_weights_is_the_same_bank(self) -> None:
        case = Case(9, 9, 4, 2, torch.float32)
        self.run(case)
        case.up, case.down = case.up.detach(), case.down.view_as(case.down)
        self.run(case)
        assert [entry.bank is not None for entry in _seen.values()] == [True, True]
