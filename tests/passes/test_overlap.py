"""Whatever stands around an exchange, moving it computes the same, and moving it again changes nothing."""

from __future__ import annotations

import random

import pytest
import torch

from sparsec import pipeline
from sparsec.ir.equal import clone_module, equal
from sparsec.ir.interp import evaluate_ranks
from sparsec.ir.parser import parse_module

HEAD = """
module {phase = "place", version = 1, devices = 2}

func @main(
  %x: tensor<s0x8xf32>, %i: tensor<s0x2xi64>, %w: tensor<s0x2xf32>, %u: tensor<8x8xf32>,
  %slots: tensor<4xi64> {kind = "buffer", source = "placement/0/slots", experts = 4},
  %shares: tensor<4xf64> {kind = "buffer", source = "placement/0/shares", experts = 4}
) -> (tensor<s0x8xf32>) {
  %where = dist.remap(%i, %slots, %shares) {experts = 4, ranks = 2, width = 2} : tensor<s0x2xi64>
"""
OURS = [
    '  %h = dist.dispatch_start(START, %where, %w) {ranks = 2, width = 2, slots = 2, dedup = "rank"} : handle',
    "  %rows, %local, %v = dist.dispatch_wait(%h) : tensor<u0x8xf32>, tensor<u0x2xi64>, tensor<u0x2xf32>",
    "  %z = aten.tanh(%rows) : tensor<u0x8xf32>",
    "  %c = dist.combine_start(%z, %h) : handle",
    "  %y = dist.combine_wait(%c) : tensor<s0x8xf32>",
]


def program(seed: int) -> str:
    """Sums and products of random values, around the ops of an exchange and between them."""
    rng, seen, lines, ours = random.Random(seed), ["%x"], list[str](), list(OURS)
    while ours or rng.random() < 0.8:
        if ours and rng.random() < 0.4:
            lines.append(ours.pop(0).replace("START", rng.choice(seen)))
            if not ours:
                seen.append("%y")
            continue
        name, a, b = f"%t{len(lines)}", rng.choice(seen), rng.choice(seen)
        what = rng.choice([f"aten.add.Tensor({a}, {b})", f"aten.linear({a}, %u)", f"aten.tanh({a})"])
        lines.append(f"  {name} = {what} : tensor<s0x8xf32>")
        seen.append(name)
    while len(seen) > 1:
        name = f"%s{len(seen)}"
        lines.append(f"  {name} = aten.add.Tensor({seen.pop(0)}, {seen.pop(0)}) : tensor<s0x8xf32>")
        seen.append(name)
    return HEAD + "\n".join([*lines, f"  return {seen[0]}\n}}\n"])


@pytest.mark.parametrize("seed", range(25))
def test_moving_changes_no_result(seed: int) -> None:
    before = parse_module(program(seed))
    after = clone_module(before)
    pipeline.run_passes(after, "overlap")
    again, cut = clone_module(after), clone_module(before)
    pipeline.run_passes(again, "overlap")
    assert equal(again, after)
    pipeline.run_passes(cut, "overlap{chunks=3}")
    rng = torch.Generator().manual_seed(seed)
    u = torch.randn(8, 8, generator=rng) * 0.3
    given = [
        [
            torch.randn(t, 8, generator=rng),
            torch.randint(0, 4, (t, 2), generator=rng),
            torch.rand(t, 2, generator=rng),
            u,
        ]
        for t in (5, 2)
    ]
    wanted = evaluate_ranks(before, given, {})
    for module in (after, cut):
        for (ours,), (theirs,) in zip(evaluate_ranks(module, given, {}), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_something_moves() -> None:
    counts = [pipeline.run_passes(parse_module(program(seed)), "overlap").records[0].changed for seed in range(25)]
    assert sum(counts) > 8
