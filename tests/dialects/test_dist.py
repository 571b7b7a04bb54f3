"""Experts on several ranks: every way to dispatch gives what one device gives, and what cannot run is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsec import pipeline
from sparsec.diagnostics import CompileError
from sparsec.dialects.dist import ADJOINTS, row_bytes, rows_sent
from sparsec.dialects.dist.references import Dispatched, combine, splits
from sparsec.ir.core import Module
from sparsec.ir.equal import clone_module
from sparsec.ir.interp import DerivedWeights, evaluate_func, evaluate_module, evaluate_ranks
from sparsec.ir.opdef import REGISTRY
from sparsec.ir.parser import parse_module
from sparsec.ir.types import DType
from sparsec.ir.verify import verify_module

RANKS, SLOTS, EXPERTS = 4, 3, 8
WAYS = [("none", "flat"), ("none", "two_level"), ("rank", "flat"), ("rank", "two_level"), ("node", "two_level")]

LAYER = """
module {phase = "raise", version = 1}

func @main(
  %x: tensor<s0x16xf32>, %i: tensor<s0xKxi64>, %w: tensor<s0xKxf32>,
  %up: tensor<8x24x16xf32> {kind = "param", source = "up"},
  %down: tensor<8x16x12xf32> {kind = "param", source = "down"}
) -> (tensor<s0x16xf32>) {
  loc "model.py":7 in "layers.5.mlp"  // y = self.experts(x, i, w)
  %y = moe.experts(%x, %i, %w, %up, %down) : tensor<s0x16xf32> {
    activation(%a: tensor<rx12xf32>, %b: tensor<rx12xf32>):
      %h = aten.mul.Tensor(%a, %b) : tensor<rx12xf32>
      yield %h
  }
  return %y
}
"""


@pytest.fixture(scope="module")
def banks() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "up": torch.randn(8, 24, 16, generator=rng) * 0.3,
        "down": torch.randn(8, 16, 12, generator=rng) * 0.3,
        # Expert 0 has three replicas, 1 and 2 two each; no rank holds one twice.
        "placement/5/slots": torch.tensor([0, 1, 2, 0, 3, 4, 5, 0, 1, 6, 2, 7]),
        "placement/5/shares": torch.tensor([0.5, 0.25, 0.5, 0.3, 1, 1, 1, 0.2, 0.75, 1, 0.5, 1], dtype=torch.float64),
    }


def inputs(k: int, counts: tuple[int, ...] = (5, 0, 9, 1)) -> list[list[torch.Tensor]]:
    """Of each rank: tokens, experts (some out of range), weights. One rank has no token."""
    rng, given = torch.Generator().manual_seed(k), list[list[torch.Tensor]]()
    for tokens in counts:
        ids = torch.stack(
            [torch.randperm(EXPERTS, generator=rng)[:k] for _ in range(tokens)] or [torch.zeros(k).long()]
        )
        ids = ids[:tokens]
        if tokens > 4:
            ids[1, 0], ids[3] = EXPERTS, -1  # a pick that is skipped, and a token without any
        given.append([torch.randn(tokens, 16, generator=rng), ids, torch.rand(tokens, k, generator=rng)])
    return given


def placed(k: int, dedup: str, algo: str, policy: str = "static", to: str = "place", target: str = "cpu") -> Module:
    module = parse_module(LAYER.replace("K", str(k)))
    module.attrs |= {"devices": RANKS, "width": 2, "slots": SLOTS}
    module.attrs |= {"dispatch": dedup, "algo": algo, "policy": policy}
    return pipeline.run(module, to=to, target=target).module


@pytest.mark.parametrize(("payload", "error"), [("bf16", 1e-2), ("fp8", 0.1)])
def test_narrow_payloads_are_near_and_send_less(banks: dict[str, torch.Tensor], payload: str, error: float) -> None:
    alone, given = parse_module(LAYER.replace("K", "2")), inputs(2)
    module = parse_module(LAYER.replace("K", "2"))
    module.attrs |= {"devices": RANKS, "width": 2, "slots": SLOTS, "payload": payload}
    narrow = pipeline.run(module, to="place").module
    for (y,), one in zip(evaluate_ranks(narrow, given, banks), given, strict=True):
        (wanted,) = evaluate_module(alone, one, banks)
        assert not wanted.numel() or 0 < (y - wanted).abs().max() < error * max(1.0, float(wanted.abs().max()))
    assert row_bytes(300, DType.f32, payload) == {"bf16": 600, "fp8": 3 * (128 + 4)}[payload]


@pytest.mark.parametrize(("dedup", "algo"), WAYS)
@pytest.mark.parametrize("k", [1, 3])
def test_every_way_equals_one_device(banks: dict[str, torch.Tensor], k: int, dedup: str, algo: str) -> None:
    alone = parse_module(LAYER.replace("K", str(k)))
    module = placed(k, dedup, algo)
    given = inputs(k)
    for rank, ((y,), one) in enumerate(zip(evaluate_ranks(module, given, banks), given, strict=True)):
        (wanted,) = evaluate_module(alone, one, banks)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5, msg=f"rank {rank}")


@pytest.mark.parametrize(("policy", "target"), [("local", "cpu"), ("batch", "cuda:sm_90")])
def test_every_policy_and_phase_equals_one_device(banks: dict[str, torch.Tensor], policy: str, target: str) -> None:
    alone, given = parse_module(LAYER.replace("K", "2")), inputs(2)
    wanted = [evaluate_module(alone, one, banks)[0] for one in given]
    for to in ("place", "lower"):
        module = placed(2, "auto", "auto", policy, to, target)
        for (y,), one in zip(evaluate_ranks(module, given, banks), wanted, strict=True):
            torch.testing.assert_close(y, one, rtol=1e-5, atol=1e-5)


def test_chunks_equal_one_device(banks: dict[str, torch.Tensor]) -> None:
    alone, given = parse_module(LAYER.replace("K", "2")), inputs(2)
    module = parse_module(LAYER.replace("K", "2"))
    module.attrs |= {"devices": RANKS, "width": 2, "slots": SLOTS, "chunks": 3}
    placed_ = pipeline.run(module).module
    assert [op.name for op in placed_.main.body.ops].count("dist.dispatch_wait") == 3
    for (y,), one in zip(evaluate_ranks(placed_, given, banks), given, strict=True):
        torch.testing.assert_close(y, evaluate_module(alone, one, banks)[0], rtol=1e-5, atol=1e-5)


def test_another_placement_needs_no_other_program(banks: dict[str, torch.Tensor]) -> None:
    module, given = placed(2, "rank", "flat"), inputs(2)
    even = {name: banks[name] for name in ("up", "down")}
    turned = even | {
        "placement/5/slots": banks["placement/5/slots"].flip(0),
        "placement/5/shares": banks["placement/5/shares"].flip(0),
    }
    runs = [evaluate_ranks(module, given, weights) for weights in (banks, even, turned)]
    for rank in range(RANKS):
        for other in runs[1:]:
            torch.testing.assert_close(other[rank][0], runs[0][rank][0], rtol=1e-5, atol=1e-5)


def test_ranks_hold_their_own_slots(banks: dict[str, torch.Tensor]) -> None:
    module = placed(2, "rank", "flat")
    for rank in range(RANKS):
        held = DerivedWeights(module, banks, rank)["derived/up.here"]
        assert torch.equal(held, banks["up"][banks["placement/5/slots"][rank * SLOTS : (rank + 1) * SLOTS]])
    local = next(func for func in module.funcs.values() if func.body.ops[0].name == "dist.local")
    (last,) = evaluate_func(module, local, [banks["up"], banks["placement/5/slots"]], rank=3)
    assert torch.equal(last, banks["up"][[6, 2, 7]])


def test_a_module_for_several_ranks_runs_on_the_same_inputs(banks: dict[str, torch.Tensor]) -> None:
    module, seen = placed(2, "rank", "flat"), list[str]()
    x, ids, weights = inputs(2)[0]
    (y,) = evaluate_module(module, [x, ids, weights], banks, observer=lambda op, _: seen.append(op.name))
    (wanted,) = evaluate_module(parse_module(LAYER.replace("K", "2")), [x, ids, weights], banks)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert seen.count("dist.dispatch_start") == 1, "one rank is observed"
    with pytest.raises(CompileError, match="placed on 4 devices, there are inputs for 1"):
        evaluate_ranks(module, [[x, ids, weights]], banks)


def test_a_rank_that_fails_stops_the_others(banks: dict[str, torch.Tensor]) -> None:
    given = inputs(2)
    given[2][1] = given[2][1].float()
    with pytest.raises(CompileError, match=r"%i is torch.float32"):
        evaluate_ranks(placed(2, "rank", "flat"), given, banks)


@pytest.mark.parametrize("single", [True, False])
def test_dispatch_and_combine_are_adjoint(single: bool) -> None:
    """<dispatch(x), y> = <x, combine(y)>, summed over ranks, so each is the other's gradient."""
    rng = torch.Generator().manual_seed(3)
    given = []
    for tokens in (4, 0, 7, 2):
        where = torch.randint(-1, RANKS * SLOTS + 1, (tokens, 3), generator=rng)
        given.append((torch.randn(tokens, 5, generator=rng), where, torch.rand(tokens, 3, generator=rng)))
    ranks = [Dispatched(given, rank, SLOTS, single, "model") for rank in range(RANKS)]
    rows = [rank.received()[0] for rank in ranks]
    ys = [torch.randn(row.shape, generator=rng) for row in rows]
    sent = [splits(y, rank) for y, rank in zip(ys, ranks, strict=True)]
    back = [combine(sent, rank) for rank in ranks]
    there = sum(float((row * y).sum()) for row, y in zip(rows, ys, strict=True))
    here = sum(float((x * out).sum()) for (x, *_), out in zip(given, back, strict=True))
    assert sum(map(len, rows)) > 10
    assert there == pytest.approx(here, rel=1e-5)


def test_the_adjoint_table_goes_both_ways() -> None:
    assert ADJOINTS.keys() == {name for name in REGISTRY if name.endswith(("_start", "_wait"))}
    for op, adjoint in ADJOINTS.items():
        assert ADJOINTS[adjoint] == op
        assert op.endswith("_start") == adjoint.endswith("_wait"), "the way back begins where the way there ended"


def test_rows_that_are_sent() -> None:
    """Counted for 20000 tokens that choose 3 of 8 ranks' slots independently, 2 ranks in a node."""
    rng, ranks, width, k = torch.Generator().manual_seed(0), 8, 2, 3
    chosen = torch.randint(0, ranks, (20000, k), generator=rng)
    home = torch.randint(0, ranks, (20000, 1), generator=rng)
    hit = torch.zeros(20000, ranks, dtype=torch.bool).scatter_(1, chosen, True)
    near = torch.arange(ranks) // width == home // width
    other = torch.arange(ranks) != home
    nodes = hit.view(-1, ranks // width, width).any(2)
    rail = torch.arange(ranks) % width == home % width  # where a row to a node arrives
    counted = {
        ("none", "flat"): ((near.gather(1, chosen) & (chosen != home)).sum(), (~near.gather(1, chosen)).sum()),
        ("rank", "flat"): ((hit & near & other).sum(), (hit & ~near).sum()),
        ("rank", "two_level"): ((hit & ~rail).sum(), (hit & ~near).sum()),
        ("node", "two_level"): (
            (hit & ~rail).sum(),
            (nodes.sum(1) - (nodes.gather(1, home // width)[:, 0]).long()).sum(),
        ),
    }
    for (dedup, algo), found in counted.items():
        expected = rows_sent(k, ranks, width, dedup, algo)
        for rows, want in zip(found, expected, strict=True):
            assert float(rows) / 20000 == pytest.approx(want, rel=0.03), (dedup, algo)


def test_more_dedup_never_sends_more() -> None:
    for k, width in itertools.product((1, 2, 8), (1, 2, 4, 8)):
        none, rank, node = (
            rows_sent(k, 8, width, *way) for way in (("none", "flat"), ("rank", "flat"), ("node", "two_level"))
        )
        assert node[1] <= rank[1] + 1e-9 <= none[1] + 2e-9
        assert rank[0] <= none[0] + 1e-9


MOVE = """
module {devices = 4}

func @main(%up: tensor<8x5xf32>, %old: tensor<12xi64>, %new: tensor<12xi64>) -> (tensor<3x5xf32>, tensor<3x5xf32>) {
  %here = dist.local(%up, %old) {ranks = 4, slots = 3} : tensor<3x5xf32>
  %moved = dist.migrate(%old, %new, %here) {ranks = 4, slots = 3, budget = 100} : tensor<3x5xf32>
  %there = dist.local(%up, %new) {ranks = 4, slots = 3} : tensor<3x5xf32>
  return %moved, %there
}
"""


def test_migration_is_what_the_new_placement_would_have_given(banks: dict[str, torch.Tensor]) -> None:
    module, old = parse_module(MOVE), banks["placement/5/slots"]
    verify_module(module)
    up = torch.randn(8, 5)
    for rank, (moved, there) in enumerate(evaluate_ranks(module, [[up, old, old.flip(0)]] * RANKS, {})):
        assert torch.equal(moved, there), f"rank {rank}"
        assert not torch.equal(moved, up[old[rank * SLOTS :][:SLOTS]])
    with pytest.raises(CompileError, match="expert 7 is in no slot that it could come from"):
        evaluate_ranks(module, [[up, old.clamp_max(6), old]] * RANKS, {})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budget = 100", "budget = -1", "a budget of -1 bytes moves nothing"),
        ("slots = 3, budget", "slots = 2, budget", "4 ranks of 2 slots need tensor<8xi64>"),
        ("(%old, %new, %here)", "(%old, %new, %up)", "part %up is tensor<8x5xf32>: a rank has 3 slots of each bank"),
    ],
)
def test_migration_is_checked(old: str, new: str, message: str) -> None:
    assert old in MOVE
    with pytest.raises(CompileError) as caught:
        verify_module(parse_module(MOVE.replace(old, new)))
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ refusals
PLACED = """
module {phase = "place", version = 1, devices = 4}

func @main(
  %x: tensor<s0x16xf32>, %i: tensor<s0x2xi64>, %w: tensor<s0x2xf32>,
  %slots: tensor<12xi64> {kind = "buffer", source = "placement/0/slots", experts = 8},
  %shares: tensor<12xf64> {kind = "buffer", source = "placement/0/shares", experts = 8},
  %up: tensor<3x24x16xf32>, %down: tensor<3x16x12xf32>
) -> (tensor<s0x16xf32>) {
  loc "model.py":7 in "layers.0.mlp"  // y = self.experts(x, i, w)
  %where = dist.remap(%i, %slots, %shares) {experts = 8, ranks = 4, width = 2} : tensor<s0x2xi64>
  %h = dist.dispatch_start(%x, %where, %w) {ranks = 4, width = 2, slots = 3, dedup = "rank"} : handle
  %rows, %local, %w_1 = dist.dispatch_wait(%h) : tensor<u0x16xf32>, tensor<u0x2xi64>, tensor<u0x2xf32>
  %z = moe.experts(%rows, %local, %w_1, %up, %down) : tensor<u0x16xf32> {
    activation(%a: tensor<rx12xf32>, %b: tensor<rx12xf32>):
      %g = aten.mul.Tensor(%a, %b) : tensor<rx12xf32>
      yield %g
  }
  %c = dist.combine_start(%z, %h) : handle
  %y = dist.combine_wait(%c) : tensor<s0x16xf32>
  return %y
}
"""
AGAIN = """  %rows2, %local2, %w_2 = dist.dispatch_wait(%h) : tensor<u1x16xf32>, tensor<u1x2xi64>, tensor<u1x2xf32>
  %c = """
BACK = """  %c2 = dist.combine_start(%z, %h) : handle
  %y2 = dist.combine_wait(%c2) : tensor<s0x16xf32>
  %c = """
WHOLE = "%up: tensor<8x24x16xf32>, %down: tensor<8x16x12xf32>"
WRONG = {
    "never waited for": (
        "  %y = dist.combine_wait(%c) : tensor<s0x16xf32>\n  return %y",
        "  return %x",
        "'dist.combine_start' is begun and never waited for: add `dist.combine_wait(%c)`",
    ),
    "waited for twice": (
        "  %c = ",
        AGAIN,
        "'dist.dispatch_start' is waited for 2 times: a handle is used once, so begin another exchange",
    ),
    "sent back twice": ("  %c = ", BACK, "is the way back of 2 'dist.combine_start': a handle is used once"),
    "other rows": (
        "dist.combine_start(%z, %h)",
        "dist.combine_start(%x, %h)",
        "sends tensor<s0x16xf32> back; the dispatch received tensor<u0x16xf32>: it needs a row",
    ),
    "other handle": ("combine_wait(%c)", "combine_wait(%h)", "takes a handle that no 'dist.combine_start' gives"),
    "node": ('dedup = "rank"', 'dedup = "node"', 'sends a token once to a node, so it needs algo = "two_level"'),
    "slots": ('slots = 3, dedup = "rank"', 'slots = 4, dedup = "rank"', "this is for 4 ranks of 4 slots"),
    "width": ("width = 2}", "width = 3}", "has 4 ranks in nodes of 3: each node needs as many ranks"),
    "uneven": ("tensor<12xi64>", "tensor<13xi64>", "13 slots cannot be shared out to 4 ranks: every rank needs as"),
    "too few": ("= 8, ranks", "= 13, ranks", "12 slots cannot hold 13 experts: 4 for each of 4 ranks can"),
    "too many": ("= 8, ranks", "= 2, ranks", "a rank has 3 slots for 2 experts, and needs none twice"),
    "shares": ("tensor<12xf64>", "tensor<12xf32>", "shares are tensor<12xf32>, must be tensor<12xf64>"),
    "whole banks": (
        "%up: tensor<3x24x16xf32>, %down: tensor<3x16x12xf32>",
        WHOLE,
        "gives slots of 3 to 'moe.experts', whose banks have 8: banks of a rank come from dist.local",
    ),
    "choices": ("<u0x2xi64>, tensor<u0x2xf32>", "<u0x1xi64>, tensor<u0x1xf32>", "result 'local' is tensor<u0x1xi64>"),
    "devices": ("devices = 4", "devices = 2", "is for 4 ranks, the module for 2 devices"),
}


@pytest.mark.parametrize(("old", "new", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_run_is_refused_at_the_users_line(old: str, new: str, message: str) -> None:
    verify_module(parse_module(PLACED))
    assert old in PLACED
    with pytest.raises(CompileError) as caught:
        verify_module(parse_module(PLACED.replace(old, new)))
    text = str(caught.value)
    assert message in text
    assert "model.py:7" in text and "y = self.experts(x, i, w)" in text


def test_every_rank_must_reach_an_exchange() -> None:
    """Not so in a region, nor in a function that computes weights."""
    module = parse_module(PLACED)
    start = next(op for op in module.walk() if op.name == "dist.dispatch_start")
    experts = next(op for op in module.walk() if op.name == "moe.experts")
    module.main.body.ops.remove(start)
    experts.regions[0].insert_before(experts.regions[0].ops[0], start)
    with pytest.raises(CompileError, match=r"stands in a region of 'moe.experts': all ranks must reach it"):
        verify_module(module)
    text = PLACED.replace("@main(", "@derive_0(").replace(
        ") -> (tensor<s0x16xf32>) {", ') -> (tensor<s0x16xf32>) {role = "derive"} {'
    )
    text += "\nfunc @main(%x: tensor<4xf32>) -> (tensor<4xf32>) {\n  return %x\n}\n"
    with pytest.raises(CompileError, match=r"stands in @derive_0, which computes weights once, while no other rank"):
        verify_module(parse_module(text))


def test_an_exchange_among_others_than_it_is_for_is_an_error(banks: dict[str, torch.Tensor]) -> None:
    module = clone_module(placed(2, "rank", "flat"))
    del module.attrs["devices"]
    with pytest.raises(CompileError, match="it is for 4 ranks and runs on 1"):
        evaluate_module(module, inputs(2)[0], banks)
