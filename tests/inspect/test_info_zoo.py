"""`sparsec info` on tiny models of every MoE family that transformers has, where the collection of them is at hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sparsec.inspect.info import info

ZOO = Path(__file__).parents[3] / "shared" / "zoo" / "zoo.py"
EXPERTS = 8  # of every model there, two per token unless listed


def families() -> dict[str, Any]:
    if not ZOO.is_file() or importlib.util.find_spec("transformers") is None:
        return {}
    spec = importlib.util.spec_from_file_location("sparsec_zoo", ZOO)
    assert spec is not None and spec.loader is not None
    sys.modules["sparsec_zoo"] = zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    return zoo.FAMILIES


FAMILIES = families()
DENSE = {"gemma3n", "vitpose_backbone"}  # activation sparsity; experts chosen by the caller
LOOPS = {"dbrx", "longcat_flash"}  # eager loops over flat or padded banks: some experts are not derived, and said so
LISTS = {"nllb_moe": 398336, "switch_transformers": 393216}  # experts are modules
TOP_1 = {"llama4", "switch_transformers", "zaya"}
BIASES = 4096  # of all experts of gpt-oss and its kin, at these sizes


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model and its inputs; skips the test where this transformers is too old for the family."""
    try:
        model, inputs = FAMILIES[name]()
    except ModuleNotFoundError as error:
        pytest.skip(f"this transformers has no {error.name}")
    return model, inputs


def banks(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim == 3 and p.shape[0] == EXPERTS)


@pytest.mark.skipif(not FAMILIES, reason="the collection of tiny models is not here")
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"doge"} - LOOPS))
def test_family(name: str) -> None:
    model, inputs = build(name)
    found = info(model, (), inputs)
    if name in DENSE:
        assert found.routed == [] and found.active == found.total
        return
    assert {(routed.experts, routed.k) for routed in found.routed} == {(EXPERTS, 1 if name in TOP_1 else 2)}
    bank = LISTS.get(name) or banks(model)
    assert found.total - found.active == sum(r.parameters - r.parameters * r.k // r.experts for r in found.routed)
    assert sum(r.parameters for r in found.routed) - bank in {0, BIASES}


@pytest.mark.skipif(not FAMILIES, reason="the collection of tiny models is not here")
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_what_is_not_derived_is_said(name: str) -> None:
    model, inputs = build(name)
    assert "traced in part" in " ".join(info(model, (), inputs).notes)
    assert "are taken to work for every token" in " ".join(info(model, (), inputs).notes)
