"""What is asked for by --devices and --plan, before anything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsec.config import Config
from sparsec.devices import ALONE, Devices
from sparsec.diagnostics import SparsecError
from sparsec.ir.parser import parse_module
from sparsec.passes.placement import Plan, parse_topology, write_plan

MODULE = """
module {phase = "place", version = 1}

func @main(
  %x: tensor<s0x4xf32> {kind = "input"},
  %slots.3: tensor<8xi64> {kind = "buffer", source = "placement/3/slots", experts = 6},
  %shares.3: tensor<8xf64> {kind = "buffer", source = "placement/3/shares", experts = 6}
) -> (tensor<s0x4xf32> {kind = "output"}) {
  return %x
}
"""
SLOTS = [[0, 1, 2, 3, 4, 5, 0, 3]]
SPLIT = [[0.25, 1, 1, 0.5, 1, 1, 0.75, 0.5]]


def plan_file(folder: Path, topology: str = "2x2", layer: int = 3, **changes: Any) -> Path:
    given: dict[str, Any] = {"experts": 6, "size": (2, 2, 2, 2), "slots": np.array(SLOTS), "split": np.array(SPLIT)}
    write_plan(Plan(parse_topology(topology), (layer,), **{**given, **changes}), folder / "plan.json")
    return folder / "plan.json"


def refused(words: str, **given: Any) -> None:
    with pytest.raises(SparsecError, match=words):
        Devices.of(Config.read({}, **given)).tables(parse_module(MODULE))


def test_devices_without_a_plan() -> None:
    assert Devices.of(Config.read({})) == ALONE
    assert Devices.of(Config.read({}, devices=8)) == Devices(8, 8)
    assert Devices.of(Config.read({"SPARSEC_DEVICES": "2x4"})) == Devices(8, 4)
    for text in ("0", "four", "2x", "2x0", "-1", "2x2x2"):
        refused("--devices is a number, or nodes x ranks", devices=text)


def test_even_tables() -> None:
    tables = Devices(4, 4).tables(parse_module(MODULE))
    assert tables["placement/3/slots"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert tables["placement/3/shares"].tolist() == [0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5]


def test_tables_of_a_plan(tmp_path: Path) -> None:
    module = parse_module(MODULE)
    plan = plan_file(tmp_path, "2x2:nvlink=300GB/s,ib=25GB/s")
    config = Config.read({}, plan=plan, policy="local", dispatch="node")
    devices = Devices.of(config)
    devices.mark(module, config)
    marked = {"devices": 4, "width": 2, "slots": 2, "dispatch": "node", "policy": "local"}
    assert module.attrs.items() >= (marked | {"inside": 300e9, "outside": 25e9}).items()
    assert devices.raw == (tmp_path / "plan.json").read_bytes()
    tables = devices.tables(module)
    assert torch.equal(tables["placement/3/slots"], torch.tensor(SLOTS[0]))
    assert torch.equal(tables["placement/3/shares"], torch.tensor(SPLIT[0], dtype=torch.float64))


def test_plans_that_do_not_fit(tmp_path: Path) -> None:
    plan = plan_file(tmp_path)
    refused("--devices is 8, the plan .* is for 2 nodes of 2 ranks", plan=plan, devices=8)
    refused("--devices is 1x4, the plan .* is for 2 nodes of 2 ranks", plan=plan, devices="1x4")
    refused("the plan is for the layers 7, the model has experts in 3", plan=plan_file(tmp_path, layer=7))
    wide = np.array([[0, 1, 2, 3, 4, 5, 6, 0]])
    split = np.array([[0.5, 1, 1, 1, 1, 1, 1, 0.5]])
    refused(
        "the plan is for 7 experts, layer 3 of the model has 6",
        plan=plan_file(tmp_path, experts=7, slots=wide, split=split),
    )
    refused("rank 0 has 3 slots, another one 2", plan=plan_file(tmp_path, "1x3", size=(3, 3, 2)))
    refused("nodes have 1 and 3 ranks", plan=plan_file(tmp_path, "1x3+1x1"))


def test_a_model_without_experts() -> None:
    module = parse_module('module {phase = "place", version = 1}\n\nfunc @main() -> () {\n  return\n}\n')
    with pytest.raises(SparsecError, match="no layers of experts to spread over 4 devices"):
        Devices(4, 4).tables(module)
    assert ALONE.tables(module) == {}
