"""The family `rows` compiles to wide copies and plain arithmetic without spills; and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sparsec import pipeline
from sparsec.codegen.triton.compile import TARGETS, Binary
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel, sketch_kernel
from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import gather_gemm_reference, gemm_combine_reference, group_reference
from sparsec.ir.core import Func
from sparsec.runtime.dims import compile_dim
from tests.codegen.layers import LAYERS
from tests.codegen.triton import build
from tests.codegen.triton.packed import packed
from tests.codegen.triton.test_compile import silu

pytest.importorskip("triton")
ROWS: dict[str, Any] = {"kernel": "rows", "up_to": 16, "num_warps": 4, "num_stages": 4}
BF16 = torch.bfloat16

ISSUED = 132 * 4 * 32 * 1.755e9
"""Instructions of threads that an H100 issues in a second: 4 warps per multiprocessor and clock."""

BANDWIDTH = 3.0e12
"""Bytes per second that a copy reaches on it."""


def qwen_up(block_m: int = 1) -> Func:
    tile = {"block_m": block_m, "block_n": 8, "block_k": 256}
    return build.gather_gemm(silu, 2048, 768, 128, 8, BF16, variants=({**ROWS, **tile},))


def qwen_down() -> Func:
    return build.gemm_combine(2048, 768, 128, 8, BF16, variants=({**ROWS, "block_n": 4, "block_k": 128},))


def oss_up() -> Func:
    tile = {"block_m": 1, "block_n": 32, "block_k": 64}
    return build.gather_gemm(silu, 2880, 2880, 32, 4, BF16, "interleaved", True, True, variants=({**ROWS, **tile},))


def oss_down() -> Func:
    tile = {"block_n": 32, "block_k": 32, "split": 4}
    return build.gemm_combine(2880, 2880, 32, 4, BF16, True, True, variants=({**ROWS, **tile},))


def mixtral_down() -> Func:
    return build.gemm_combine(4096, 14336, 8, 2, BF16, variants=({**ROWS, "block_n": 8, "block_k": 256},))


def first(kernel: TritonKernel) -> tuple[Binary, dict[str, Any]]:
    launch = kernel.variants[0].config["launches"][0]
    return kernel.binaries[launch["file"]], launch


def inner_loop(ptx: str) -> list[str]:
    """The instructions of the loop that copies weights."""
    lines = [re.sub(r"^@!?%p\d+\s+", "", line.strip()) for line in ptx.splitlines()]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}
    for i, line in enumerate(lines):
        target = re.match(r"bra(?:\.uni)?\s+(\$L\w+);", line)
        if target and labels.get(target[1], i) < i:
            body = lines[labels[target[1]] : i + 1]
            if any("cp.async.cg" in inner for inner in body):
                return [inner for inner in body if re.match(r"[a-z]", inner)]
    raise AssertionError("no loop copies anything")


@pytest.mark.parametrize(
    ("func", "step"),
    [
        (qwen_up, 2 * 8 * 256),
        (lambda: qwen_up(4), 2 * 8 * 256),
        (qwen_down, 8 * 4 * 128),
        (oss_up, 2 * 32 * 64),
        (oss_down, 4 * 32 * 32),
    ],
)
def test_arithmetic_keeps_up_with_memory(func: Any, step: int) -> None:
    """`step` weights are copied 16 bytes at a time, and take less than half of what can be issued meanwhile."""
    binary, launch = first(emit_kernel(func(), "cuda:sm_90"))
    loop = inner_loop(binary.assembly)
    copies = [line for line in loop if line.startswith("cp.async.cg.shared.global")]
    assert all("0x10, %r" in line for line in copies)
    assert len(copies) * 16 * launch["threads"] == step * 2
    assert sum(line.startswith("fma.rn.f32") for line in loop) >= step // launch["threads"]
    assert "mma" not in binary.assembly
    assert ("atom." in binary.assembly) == (launch["constants"].get("SPLIT", 1) > 1)
    per_byte = len(loop) * launch["threads"] / (step * 2)
    assert per_byte * BANDWIDTH < ISSUED / 2


@pytest.mark.parametrize(("packing", "most"), [("fp8", 1.0), ("mxfp4", 1.9)])
def test_widening_and_memory(packing: str, most: float) -> None:
    """Bytes of fp8 are widened as they come; the two weights of a byte of mxfp4 take longer to widen than to read."""
    tile = {"block_n": {"fp8": 8, "mxfp4": 16}[packing], "block_k": 128}
    func = build.gemm_combine(2048, 768, 128, 8, BF16, variants=({**ROWS, **tile},))
    binary, launch = first(emit_kernel(packed(func, packing), "cuda:sm_90"))
    loop = [line for line in inner_loop(binary.assembly) if not line.startswith("mov")]
    assert len([line for line in loop if line.startswith("cp.async.cg.shared.global")]) * 16 * launch["threads"] == 8192
    per_byte = len(loop) * launch["threads"] / 8192
    assert per_byte * BANDWIDTH < ISSUED * most
    assert binary.spills == 0 and "mma" not in binary.assembly


def test_weights_are_asked_for_before_h_is_ready() -> None:
    kernel = emit_kernel(qwen_down(), "cuda:sm_90")
    (launch,) = kernel.variants[0].config["launches"]
    text = kernel.binaries[launch["file"]].assembly
    assert launch["pdl"] and launch["args"][-2:] == [{"out": 0}, {"size": "t"}]
    wait = text.index("griddepcontrol.wait")
    assert 0 < text.index("prefetch.global.L2") < wait < text.index("cp.async.cg")
    assert text.rindex("prefetch.global.L2") < wait


def test_parts_are_added_by_who_arrives_last() -> None:
    """Threads store their parts, meet, and count, which releases and acquires; then the parts are read, past L1."""
    kernel = emit_kernel(oss_down(), "cuda:sm_90")
    (launch,) = kernel.variants[0].config["launches"]
    assert kernel.variants[0].config["state"] == [16 * 90 * 4]
    text = kernel.binaries[launch["file"]].assembly
    count = re.search(r"atom\.global\.gpu\.acq_rel\.add\.u32", text)
    assert count and len(re.findall(r"\batom\.", text)) == 1
    stored = text[: count.start()].rindex("st.global")
    assert "bar.sync" in text[stored : count.start()]
    parts = [m.start() for m in re.finditer(r"ld\.global\.cg", text)]
    assert len(parts) >= 4 and min(parts) > count.start() and "bar.sync" in text[count.start() : min(parts)]


def test_early_starts_are_for_hopper_and_later() -> None:
    binary, launch = first(emit_kernel(qwen_down(), "cuda:sm_80"))
    assert not launch["pdl"] and "prefetch" not in binary.assembly and "cp.async.cg" in binary.assembly


def test_many_programs_even_for_one_token() -> None:
    """At least two for each multiprocessor of an H100, in one launch."""
    for func in (qwen_up(), qwen_down(), oss_up(), oss_down(), mixtral_down()):
        launches = sketch_kernel(func).schedules[0].entries
        rows, blocks = (compile_dim(size) for size in launches[0].grid)
        assert (rows if isinstance(rows, int) else rows({"t": 1})) * int(str(blocks)) >= 2 * 132
        assert len(launches) == 1


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_100", "hip:gfx942", "hip:gfx950"])
@pytest.mark.slow
def test_every_target(target: str) -> None:
    for func in (qwen_up(), qwen_up(2), qwen_up(4), qwen_down(), oss_up(), oss_down(), mixtral_down()):
        for binary in emit_kernel(func, target).binaries.values():
            assert binary.spills in (0, None) and binary.shared <= TARGETS[target].shared_limit // 4


def test_few_registers() -> None:
    """Enough programs of 128 threads fit a multiprocessor to keep four of them there."""
    for func in (qwen_up(), qwen_down(), oss_up(), oss_down()):
        for binary in emit_kernel(func, "cuda:sm_90").binaries.values():
            assert binary.spills in (0, None) and (binary.registers or 0) <= 128
            assert 4 * binary.shared <= TARGETS["cuda:sm_90"].shared_limit


@pytest.mark.parametrize(
    ("experts", "k", "variant", "message"),
    [
        (8, 2, {**ROWS, "up_to": None}, "at most 1024 pairs, a variant is for any number of"),
        (8, 2, {**ROWS, "up_to": 513}, "at most 1024 pairs, a variant is for 1026"),
        (
            8,
            1,
            {**ROWS, "up_to": 1024, "block_n": 1, "split": 2},
            "the parts of 262144 totals at a time, not of 524288",
        ),
        (64, 33, ROWS, "32 experts of a token side by side, this has 33"),
    ],
)
def test_what_is_too_many_is_refused(experts: int, k: int, variant: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        sketch_kernel(build.gemm_combine(512, 32, experts, k, BF16, variants=(variant,)))


def test_tails_are_refused() -> None:
    func = pipeline.run(LAYERS["tail"].module(), target="cuda:sm_90").module.funcs["gemm_combine_0"]
    func.body.ops[0].attrs["variants"] = (ROWS,)
    with pytest.raises(CompileError, match="the tail takes whole rows"):
        sketch_kernel(func)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transposed", [False, True])
def test_bits_do_not_depend_on_the_batch_on_a_gpu(transposed: bool) -> None:
    """Close to the reference, and the same bits for tokens by themselves, in batches, and with rows in groups."""
    from tests.codegen.triton.on_gpu import bound
    from tests.codegen.triton.test_gpu import SiluEnv

    torch.manual_seed(0)
    tokens, k, experts, hidden, width = 16, 4, 12, 512, 384
    last = {"block_m": 16, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}
    tile = {"block_n": 32, "block_k": 32} if transposed else {"block_n": 8, "block_k": 256}
    x, weights = torch.randn(tokens, hidden).to(BF16), torch.rand(tokens, k)
    ids = torch.randint(0, experts + 1, (tokens, k))
    up = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(BF16)
    down = (torch.randn(experts, hidden, width) / width**0.5).to(BF16)
    up, down = (bank.transpose(1, 2).contiguous() if transposed else bank for bank in (up, down))
    found = list[torch.Tensor]()
    for block_m, batch in ((1, tokens), (1, 1), (2, 5), (4, tokens)):
        variants = ({**ROWS, **tile, "block_m": block_m, "split": 2}, last)
        first = bound(build.gather_gemm(silu, hidden, width, experts, k, BF16, "concat", False, transposed, variants))
        second = bound(build.gemm_combine(hidden, width, experts, k, BF16, False, transposed, variants))
        parts = list[torch.Tensor]()
        for part in torch.arange(tokens).split(batch):
            order, offsets = group_reference(ids[part], experts)
            (h,) = first([item.cuda() for item in (x[part], order, offsets, up)])
            parts += second([h, *(item.cuda() for item in (order, offsets, weights[part], down))])
        found.append(torch.cat(parts).cpu())
    order, offsets = group_reference(ids, experts)
    env: Any = SiluEnv()
    wide = gather_gemm_reference(env, None, "concat", x.float(), order, offsets, up.float(), None, transposed, k)  # type: ignore[arg-type]
    wanted = gemm_combine_reference(wide, order, offsets, weights, down.float(), None, transposed, torch.float32)
    torch.testing.assert_close(found[0].float(), wanted, rtol=3e-2, atol=3e-2)
    assert all(torch.equal(found[0], other) for other in found[1:])
