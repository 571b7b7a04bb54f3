"""The harness finds what it is there to find."""

from __future__ import annotations

import pytest
import torch

from sparsec.codegen.cpu.compiler import CompilerFailed
from tests.codegen.cpu import sanitize, scaler

OUTS: list[sanitize.Result] = [((5, scaler.WIDTH), torch.float32), ((1,), torch.int32)]


def run(source: str, isa: str = "avx2", threads: int = 1, sanitizers: str = sanitize.MEMORY) -> list[torch.Tensor]:
    if why := sanitize.missing(isa, sanitizers):
        pytest.skip(why)
    torch.manual_seed(0)
    ins = [torch.randn(5, scaler.WIDTH), torch.randn(scaler.WIDTH), None]
    outs = sanitize.run(source, isa, tokens=5, ins=ins, outs=OUTS, threads=threads, sanitizers=sanitizers)
    assert ins[0] is not None
    assert ins[1] is not None
    torch.testing.assert_close(outs[0], ins[0] * ins[1], rtol=0, atol=0)
    return outs


@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sound_kernel(isa: str, threads: int) -> None:
    assert run(scaler.source(), isa, threads)[1].item() == threads


def test_a_sound_kernel_has_no_races() -> None:
    assert run(scaler.source(), threads=3, sanitizers=sanitize.RACES)[1].item() == 3


def test_scratch_memory_that_is_too_small() -> None:
    with pytest.raises(sanitize.SanitizerFailed, match="heap-buffer-overflow"):
        run(scaler.source(scratch="tokens * 32 - 4"))


def test_undefined_arithmetic() -> None:
    with pytest.raises(sanitize.SanitizerFailed, match="shift exponent 33 is too large"):
        run(scaler.source(extra="0.0f * (1 << int(call->tokens + 28))"))


def test_scratch_memory_that_is_read_before_it_is_written() -> None:
    with pytest.raises(AssertionError):  # it starts as what is no number
        run(scaler.source(scratch="(tokens + 1) * 32", extra="row[call->tokens * 8]"))


def test_races() -> None:
    with pytest.raises(sanitize.SanitizerFailed, match="data race"):
        run(scaler.source("race"), threads=3, sanitizers=sanitize.RACES)


def test_a_kernel_that_refuses() -> None:
    if why := sanitize.missing("avx2"):
        pytest.skip(why)
    many = scaler.MOST_TOKENS + 1
    outs: list[sanitize.Result] = [((many, scaler.WIDTH), torch.float32), ((1,), torch.int32)]
    ins = [torch.zeros(many, scaler.WIDTH), torch.zeros(scaler.WIDTH), None]
    with pytest.raises(sanitize.SanitizerFailed, match="sparsec_run refused"):
        sanitize.run(scaler.source(), "avx2", tokens=many, ins=ins, outs=outs)


def test_a_source_that_is_wrong() -> None:
    if why := sanitize.missing("avx2"):
        pytest.skip(why)
    with pytest.raises(CompilerFailed, match="not declared"):
        run(scaler.source(extra="nothing"))
