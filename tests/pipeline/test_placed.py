"""Model families on two devices; and what people see of a placed module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsec import pipeline
from sparsec.diagnostics import CompileError
from sparsec.inspect.cost_text import print_costs
from sparsec.inspect.costs import op_costs, roof, sizes
from sparsec.inspect.dump import Dump
from sparsec.inspect.explain import explain, of_dump, of_result
from sparsec.ir.core import Module
from sparsec.ir.interp import evaluate_module, evaluate_ranks
from sparsec.ir.parser import parse_module
from tests.frontend.helpers import zoo_model

SHARED = Path(__file__).parents[1] / "passes/overlap/shared.sparsec"
FAMILIES = (
    *("deepseek_v3", "mixtral", "olmoe", "qwen3_moe", "qwen2_moe"),
    *("deepseek_v2", "granitemoe", "glm4_moe", "phimoe", "minimax_m2"),
)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_devices_give_what_one_gives(family: str) -> None:
    """Each with tokens of its own, after every phase from `place` on."""
    from sparsec.frontend.capture import capture

    model, inputs = zoo_model(family)
    captured = capture(model, (), dict(inputs))
    captured.module.attrs |= {"devices": 2, "width": 1}
    result = pipeline.run(captured.module)
    assert not [remark.message for remark in result.remarks if remark.kind == "missed"]
    alone, rng = result.ir("raise"), torch.Generator().manual_seed(1)
    del alone.attrs["devices"]
    given = [torch.randint(3, 128, shape, generator=rng) for shape in ((3, 7), (1, 4))]
    wanted = [evaluate_module(alone, [ids], captured.weights) for ids in given]
    for phase in ("place", "lower"):
        for ours, theirs in zip(
            evaluate_ranks(result.ir(phase), [[ids] for ids in given], captured.weights), wanted, strict=True
        ):
            for new, old in zip(ours, theirs, strict=True):
                torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5 * float(old.abs().max()), msg=phase)
    placed = [op.name for op in result.ir("place").main.body.ops]
    here = placed.index("dist.dispatch_start")
    between = placed[here + 1 : placed.index("dist.dispatch_wait")]
    if family.startswith(("deepseek", "qwen2", "glm")):
        assert "aten.linear" in between, "a shared expert runs while tokens are under way"


def shared() -> Module:
    return parse_module(SHARED.read_text().partition("// ----- expect")[0])


def test_what_people_see_of_a_placed_module(tmp_path: Path) -> None:
    result = pipeline.run(shared(), instruments=[Dump(tmp_path, "placed")])
    chip = roof("cuda:sm_90")
    for history in (of_result(result), of_dump(next(tmp_path.iterdir()))):
        placed = [one.what for one in explain(history, chip, {}) if one.kind == "placed"]
        assert len(placed) == 2
        assert placed[0].startswith("4 experts on 2 ranks of 2 slots; a token goes once to each rank; for 1024 tokens")
        assert placed[1] == "3 ops run while tokens of this layer are under way"
    costs = op_costs(result.module, sizes(result.module, {"s0": 100, "u0": 50}), chip)
    by_name = {op.name: cost for op, cost in costs.items()}
    # Half of the tokens choose an expert of the other rank: 1 - (1 - 1/2) ** 2 of them, with 2 slots and weights each.
    sent = 100 * 0.75 * (16 * 4 + 2 * 8)
    assert by_name["dist.dispatch_start"].bytes == 100 * (16 * 4 + 2 * 8 + 2 * 4) + sent
    assert by_name["dist.dispatch_wait"].bytes == 50 * (16 * 4 + 2 * 8 + 2 * 4)
    text = print_costs(result.module, {"s0": 100, "u0": 50}, chip)
    (begun,) = (line for line in text.splitlines() if "dist.dispatch_start" in line)
    assert begun.endswith("sends 6 kB in its node, 0 B to others")


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"devices": 4, "width": 3}, "4 devices do not make nodes of 3: every node needs as many ranks"),
        ({"devices": 0}, "'devices' must be a whole number, not 0"),
        ({"devices": 2, "dispatch": "ranks"}, "'dispatch' is auto or none or rank or node, not 'ranks'"),
        ({"devices": 2, "dispatch": "node", "algo": "flat"}, "drop algo=flat, or dispatch=node"),
        ({"devices": 2, "policy": "dynamic"}, "'policy' is static or local or batch, not 'dynamic'"),
        ({"devices": 2, "outside": 0.0}, "'outside' must be bytes/s, not 0.0"),
        ({"devices": 2, "chunks": 0}, "'chunks' must be a whole number from 1, not 0"),
    ],
)
def test_what_cannot_be_placed_is_said(attrs: dict[str, int | str], message: str) -> None:
    module = shared()
    module.attrs |= attrs
    with pytest.raises(CompileError) as caught:
        pipeline.run(module, to="place")
    assert message in str(caught.value)


def test_one_device_changes_nothing() -> None:
    module = shared()
    del module.attrs["devices"]
    result = pipeline.run(module, to="place")
    assert not any(record.changed for record in result.records if record.phase == "place")
