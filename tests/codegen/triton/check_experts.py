"""The GEMM kernels and grouping in Triton's interpreter, against the ops' own references."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.dialects.moe import gather_gemm_reference, gemm_combine_reference, group_reference
from tests.codegen.triton import build
from tests.codegen.triton.interpret import kernel

TINY = ({"up_to": None, "block_m": 16, "block_n": 16, "block_k": 32},)
LARGE = ({"up_to": 4, "block_m": 16, "block_n": 32, "block_k": 16}, {"block_m": 32, "block_n": 32, "block_k": 16})


class TorchEnv:
    """Runs an activation as plain PyTorch."""

    def __init__(self, fn: Callable[..., torch.Tensor]) -> None:
        self.fn = fn

    def run(self, block: Any, args: Any) -> tuple[torch.Tensor, ...]:
        return (self.fn(*args),)


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


def clamped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.clamp(max=7.0), b.clamp(min=-7.0, max=7.0)
    return (b + 1) * (a * torch.sigmoid(a * 1.702))


def squared(a: torch.Tensor) -> torch.Tensor:
    return torch.relu(a) ** 2


def gelu(a: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(a, approximate="tanh")


def loads(tokens: int, k: int, experts: int, kind: str) -> torch.Tensor:
    """Expert ids with the given pattern of loads."""
    if kind == "hot":
        return torch.zeros(tokens, k, dtype=torch.int64) + torch.arange(k) % experts
    if kind == "skip":
        return torch.randint(-1, experts + 2, (tokens, k))
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)] or [torch.zeros(k).long()])[:tokens]


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = 1e-5 if wanted.dtype is torch.float32 else 2e-3
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def check_up(
    tokens: int, k: int, experts: int, layout: str, bias: bool, transposed: bool, dtype: torch.dtype, kind: str,
    hidden: int = 40, width: int = 24, variants: Any = LARGE,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    activations: dict[str, Callable[..., torch.Tensor]] = {"single": squared, "interleaved": clamped}
    activation = activations.get(layout, silu)
    func = build.gather_gemm(activation, hidden, width, experts, k, dtype, layout, bias, transposed, variants)
    columns = width if layout == "single" else 2 * width
    x = torch.randn(tokens, hidden, dtype=dtype)
    up = torch.randn((experts, hidden, columns) if transposed else (experts, columns, hidden), dtype=dtype) * 0.2
    up_bias = torch.randn(experts, columns, dtype=dtype) if bias else None
    order, offsets = group_reference(loads(tokens, k, experts, kind), experts)
    operands = [x, order, offsets, up] + ([up_bias] if bias else [])
    (h,) = kernel(func)(operands)
    env: Any = TorchEnv(activation)
    body: Any = func.body.ops[0].regions[0]
    # In f32 throughout: kernels round once, after the activation.
    wide = [None if t is None else t.float() for t in (x, up, up_bias)]
    wanted = gather_gemm_reference(env, body, layout, wide[0], order, offsets, wide[1], wide[2], transposed, k)  # type: ignore[arg-type]
    used = int(offsets[-1])
    assert h.shape == wanted.shape
    close(h[:used], wanted[:used].to(dtype))


def check_down(
    tokens: int, k: int, experts: int, bias: bool, transposed: bool, dtype: torch.dtype, kind: str,
    hidden: int = 40, width: int = 24, variants: Any = LARGE,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    func = build.gemm_combine(hidden, width, experts, k, dtype, bias, transposed, variants)
    ids = loads(tokens, k, experts, kind)
    order, offsets = group_reference(ids, experts)
    h = torch.randn(tokens * k, width, dtype=dtype)
    weights = torch.rand(tokens, k)
    weights[(ids < 0) | (ids >= experts)] = float("nan")  # a skipped pair adds nothing whatever its weight
    down = torch.randn((experts, width, hidden) if transposed else (experts, hidden, width), dtype=dtype) * 0.2
    down_bias = torch.randn(experts, hidden, dtype=dtype) if bias else None
    (y,) = kernel(func)([h, order, offsets, weights, down] + ([down_bias] if bias else []))
    close(y, gemm_combine_reference(h, order, offsets, weights, down, down_bias, transposed, dtype))


@pytest.mark.parametrize("layout", ["concat", "interleaved", "single"])
@pytest.mark.parametrize(("bias", "transposed"), itertools.product([False, True], repeat=2))
def test_up_layouts(layout: str, bias: bool, transposed: bool) -> None:
    check_up(7, 2, 5, layout, bias, transposed, torch.float32, "skip", variants=TINY)


@pytest.mark.parametrize(("bias", "transposed"), itertools.product([False, True], repeat=2))
def test_down_layouts(bias: bool, transposed: bool) -> None:
    check_down(7, 2, 5, bias, transposed, torch.float32, "skip", variants=TINY)


@pytest.mark.parametrize("tokens", [0, 1, 3, 33])
@pytest.mark.parametrize("kind", ["even", "hot", "skip"])
def test_token_counts(tokens: int, kind: str) -> None:
    check_up(tokens, 2, 6, "concat", False, False, torch.float32, kind)
    check_down(tokens, 2, 6, False, False, torch.float32, kind)


@pytest.mark.parametrize("k", [1, 4])
def test_k_from_one_to_all(k: int) -> None:
    check_up(9, k, 4, "concat", True, False, torch.float32, "even")
    check_down(9, k, 4, True, False, torch.float32, "even")


@pytest.mark.parametrize("ids", [[0, 1, 2], [1, 2, 0], [2, 0, 1]])
def test_rows_are_added_in_the_order_of_slots(ids: list[int]) -> None:
    """Whatever the order of experts is: rounding tells."""
    values = torch.tensor([1e8, -1e8, 1.0])
    down = torch.zeros(3, 16, 16)
    down[:, :, 0] = values[:, None]
    order, offsets = group_reference(torch.tensor([ids]), 3)
    run = kernel(build.gemm_combine(16, 16, 3, 3, torch.float32, variants=TINY))
    (y,) = run([torch.ones(3, 16), order, offsets, torch.ones(1, 3), down])
    first, second, third = values[ids].tolist()
    total = torch.tensor(first) + torch.tensor(second) + torch.tensor(third)
    assert torch.equal(y, total.expand(1, 16))


def test_half_precision_and_whole_tiles() -> None:
    check_up(17, 2, 4, "concat", True, False, torch.float16, "even", hidden=64, width=32)
    check_down(17, 2, 4, True, False, torch.float16, "even", hidden=64, width=32)


def test_groups_of_row_blocks() -> None:
    """One expert with more row blocks than share a column block."""
    check_up(150, 1, 2, "concat", False, False, torch.float32, "hot", variants=TINY, hidden=32)


def test_gelu_near_and_far_from_zero() -> None:
    func = build.gather_gemm(gelu, 16, 16, 1, 1, torch.float32, "single", variants=TINY)
    x = torch.diag(torch.linspace(-9, 9, 16)).roll(3, 0) * torch.logspace(-4, 0, 16)[:, None]
    order, offsets = group_reference(torch.zeros(16, 1).long(), 1)
    (h,) = kernel(func)([x, order, offsets, torch.eye(16)[None]])
    torch.testing.assert_close(h, gelu(x), rtol=1e-5, atol=1e-7)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(0, 20), st.integers(1, 3), st.integers(3, 9), st.sampled_from(["even", "hot", "skip"]),
    st.integers(3, 50), st.integers(3, 50),
)  # fmt: skip
def test_any_size(tokens: int, k: int, experts: int, kind: str, hidden: int, width: int) -> None:
    check_up(tokens, k, experts, "concat", False, False, torch.float32, kind, hidden, width, TINY)
    check_down(tokens, k, experts, False, False, torch.float32, kind, hidden, width, TINY)


@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 17, 70])
@pytest.mark.parametrize("kind", ["even", "hot", "skip"])
def test_group(tokens: int, kind: str) -> None:
    """By one program and by blocks: the stable sort of the reference, skipped pairs last."""
    torch.manual_seed(tokens)
    ids = loads(tokens, 3, 11, kind)
    wanted = group_reference(ids, 11)
    for variants in ((), ({"up_to": None, "block_rows": 4},)):
        got = kernel(build.group(11, 3, variants=variants))([ids])
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])
