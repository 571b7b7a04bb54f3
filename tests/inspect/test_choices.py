"""`sparsec schedule`: what it says of every number of tokens, and of families that were not chosen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Group

from sparsec import cli, pipeline
from sparsec.differentiable import backward
from sparsec.inspect.choices import SHOWN, explain, render
from sparsec.ir.parser import parse_module
from sparsec.passes.cost import FAMILIES
from tests.codegen.triton.gradients import Bank
from tests.passes.test_schedule import TEXT


def test_every_number_of_tokens_has_its_reasons() -> None:
    module = pipeline.run(parse_module(TEXT), target="cuda:sm_90", to="schedule").module
    up, down = explain(module, "cuda:sm_90")
    assert up.title.startswith("up-projection 2048 -> 2 x 768, 8 of 128 experts, bf16") and up.ops == 1
    assert len(up.orders) == 1 and up.loss < 0.03
    for one, op in ((up, module.main.body.ops[1]), (down, module.main.body.ops[2])):
        assert [choice.tokens for choice in one.choices] == list(SHOWN)
        scheduled = {variant["kernel"] for variant in op.attrs["variants"]}  # type: ignore[union-attr, index, call-overload]
        assert {choice.chosen.family for choice in one.choices} == scheduled
        for choice in one.choices:
            assert sorted(offer.family for offer in choice.offers) == sorted(FAMILIES)
            assert choice.chosen.why == "chosen" and all(offer.why for offer in choice.offers)
            assert all(choice.chosen.us <= 1.04 * offer.us for offer in choice.offers if offer.variant)


def test_families_that_cannot_do_it_say_why() -> None:
    module = pipeline.run(parse_module(TEXT), target="cuda:sm_80", to="schedule").module
    up, down = explain(module, "cuda:sm_80", [1, 4096])
    said = {offer.family: offer.why for offer in up.choices[0].offers}
    assert said["swap"] == said["tma"] == "NVIDIA A100 SXM 80 GB has no copy engine for tensors"
    assert said["persistent"] == "rows that are gathered do not come by the copy engine"
    assert {o.family: o.why for o in down.choices[1].offers}["rows"] == "more pairs than a program looks through"


def test_every_variant_that_was_compared() -> None:
    """Its time and what limits it; those of a family are no faster than the one that stands for the family."""
    module = pipeline.run(parse_module(TEXT), target="cuda:sm_90", to="schedule").module
    for one, few in zip(explain(module, "cuda:sm_90", [64], True), explain(module, "cuda:sm_90", [64]), strict=True):
        (choice,), (short,) = one.choices, few.choices
        assert choice.chosen == short.chosen and len(choice.offers) > 100
        variants = [offer.variant for offer in choice.offers if offer.variant]
        assert len({*variants}) == len(variants)
        assert all(offer.us > 0 and offer.limiter in offer.roofs and offer.why for offer in choice.offers if offer.us)
        assert {offer.variant for offer in short.offers} <= {offer.variant for offer in choice.offers}
        times = [offer.us for offer in choice.offers[1 : len(variants)]]
        assert times == sorted(times)


def test_backward_ops_have_their_reasons_too() -> None:
    bank = Bank(16, 2, 512, 256, dtype=torch.bfloat16)
    module = backward(bank.kinds()[1], [True] * 4 + [False] * 2, "cuda:sm_90")
    found = {one.title.partition(",")[0]: one for one in explain(module, "cuda:sm_90", [1, 64, 8192])}
    inside, up = found["gradients inside the experts 512 -> 2 x 256 -> 512"], found["gradient of a bank 512 x 512"]
    assert len(found) == 4 and "gradient of a bank 512 x 256" in found  # and that of x, a down-projection
    for one in (inside, up):
        assert not one.orders
        for choice in one.choices:
            assert {offer.family for offer in choice.offers} == {"tiles", "tma"} and all(o.why for o in choice.offers)
            assert choice.chosen.why == "chosen" and choice.chosen.limiter in choice.chosen.roofs
    assert {o.family: o.why for o in up.choices[0].offers}["tma"] == "fewer tokens than a block of rows"
    every = explain(module, "cuda:sm_90", [8192], every=True)
    assert max(len(one.choices[0].offers) for one in every) > 10
    assert all(isinstance(render(found, detailed), Group) for found in (every, [inside]) for detailed in (True, False))


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    path = tmp_path / "layer.sparsec"
    path.write_text(TEXT)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sparsec", "schedule", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command(layer: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, layer, "--target", "cuda:sm_90", "--json") == 0
    monkeypatch.delenv("COLUMNS", raising=False)
    found = json.loads(capfd.readouterr().out)
    assert len(found) == 2 and len(found[0]["choices"]) == len(SHOWN)
    assert run(monkeypatch, layer, "--target", "cuda:sm_90", "--tokens", 16) == 0
    printed = capfd.readouterr().out
    assert "chosen" in printed and "swap" in printed and "limiter" in printed
    assert "and adds in another order" in printed  # a pipe has room for the reasons in one line
    assert run(monkeypatch, layer, "--target", "cuda:sm_90", "--tokens", 16, "--all") == 0
    assert len(capfd.readouterr().out.splitlines()) > 100
    assert run(monkeypatch, layer, "--target", "cuda:sm_90", "--all") == 1
    assert "add --tokens N" in capfd.readouterr().err
    assert run(monkeypatch, layer) == 1
    assert "kernels for CPUs choose by themselves" in capfd.readouterr().err
