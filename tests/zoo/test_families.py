"""The expert layers of every family of transformers, and whole models.

A third of the families runs always, all of them with `pytest -m zoo`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import pytest
import torch

import sparsec
from tests.zoo.checks import Found, alone, compile_layer, distance, error, found, outputs
from tests.zoo.families import FAMILIES, build, inputs
from tests.zoo.layers import eager, halved, record, record_sizes, run, tensors_of
from tests.zoo.measures import whole

ALWAYS = (
    *("afmoe", "axk2", "bailing_hybrid", "cohere2_moe", "cohere2_moe+sigmoid", "dbrx", "deepseek_v4", "glm5_next"),
    *("hunyuan_v1_moe", "hy_v4", "inkling", "jetmoe", "laguna", "lfm2_moe", "llama4", "longcat_flash", "minimax_m3_vl"),
    *("muse_spark", "nemotron_h", "openai_privacy_filter", "phimoe", "qwen4_exp", "step3p7", "switch_transformers"),
    *("unlimited_ocr", "zaya"),
)
LEFT = {
    "doge": "experts depend on the other tokens",
    "nllb_moe": "expert_0 and expert_1 are the only ones",
}
NO_EXPERTS = ("gemma3n", "vitpose_backbone")


def families(always: tuple[str, ...] = (), without: Collection[str] = (*LEFT, *NO_EXPERTS)) -> list[Any]:
    """Families to fuse; those not in `always` run with `-m zoo` only."""
    names = [name for name in FAMILIES if name not in without]
    return [name if name in always else pytest.param(name, marks=pytest.mark.zoo) for name in names]


def expected_counts(name: str, path: str) -> tuple[int, int, int]:
    """Routers, banks and grouped linears of a layer."""
    if name == "ernie4_5_vl_moe+images":
        return 2, 2, 0  # one bank for text, one for images
    if name == "jetmoe" and path.endswith("self_attention"):
        return 1, 0, 2  # one before the attention, one after it
    return 1, 1, 0


@pytest.mark.parametrize("name", families(ALWAYS))
def test_a_layer_is_one_router_and_one_bank(name: str) -> None:
    model = eager(build(name)[0])
    first, second, others = record_sizes(name, model)
    assert first
    for path, call in first.items():
        layer = model.get_submodule(path)
        compiled = compile_layer(layer, call, second[path])
        got: Found = found(compiled)
        assert (got.routes, got.experts, got.linears) == expected_counts(name, path), got
        assert got.loose == (), got
        for calls in others:
            wanted = calls[path]
            assert error(outputs(compiled, alone(layer, wanted)[1]), wanted.tensors) <= 1e-5


BF16_ALWAYS = ("gpt_oss", "inkling", "laguna", "muse_spark", "nemotron_h", "step3p7")


@pytest.mark.parametrize("name", families(BF16_ALWAYS))
def test_a_layer_in_bf16_is_as_near_to_f32_as_eager(name: str) -> None:
    model = eager(build(name)[0])
    exact = copy.deepcopy(halved(model)).float()
    path, call = next(iter(record(name, exact).items()))
    second = record(name, exact, 3, 17)[path]
    long = record(name, exact, 1, 300)[path].to(torch.bfloat16)
    layer = model.get_submodule(path)
    compiled = compile_layer(layer, call.to(torch.bfloat16), second.to(torch.bfloat16))
    f32 = outputs(exact.get_submodule(path), long.to(torch.float32))[0]
    own, theirs = outputs(compiled, alone(layer, long)[1])[0], outputs(layer, long)[0]
    assert distance(own, f32) <= 1.2 * distance(theirs, f32) + 1e-3


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.zoo) for name in NO_EXPERTS])
def test_a_model_without_experts_passes_unharmed(name: str) -> None:
    model, given = build(name)
    compiled = sparsec.compile(model, (), given)
    assert found(compiled).experts == 0
    for batch, length in ((2, 12), (3, 7)):
        expected = run(name, model, batch, length)
        result = compiled(**inputs(name, model, batch, length))
        assert error(tensors_of(result), tensors_of(expected)) <= 1e-5


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_routing_stays_dense_and_says_why(name: str) -> None:
    model = eager(build(name)[0])
    first, second, others = record_sizes(name, model)
    path, call = next(iter(first.items()))
    compiled = compile_layer(model.get_submodule(path), call, second[path])
    assert found(compiled).experts == 0
    assert any(LEFT[name] in warning.message.replace("\n", " ") for warning in compiled.warnings)
    for calls in others:
        wanted = alone(model.get_submodule(path), calls[path])[1]
        assert error(outputs(compiled, wanted), wanted.tensors) <= 1e-5


NOT_EVERY_SIZE = {
    "diffusion_gemma": ("none", "DynamicCache"),  # its encoder returns its cache, whatever it is asked
    "jamba": ("captured", "fixed to"),  # its Mamba layers loop over the sequence
    "minimax": ("captured", "depends on sizes"),  # its lightning attention loops over blocks
    "qwen4_exp": ("none", "known only at run time"),  # its indexer branches on a number of blocks
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_runs_at_other_sizes_or_says_why_not(name: str) -> None:
    result = whole(name)
    sizes, why = NOT_EVERY_SIZE.get(name, ("any", ""))
    assert result["sizes"] == sizes, result
    assert not why or any(why in text for text in result["why"])
    if sizes != "none" and name not in {*LEFT, *NO_EXPERTS}:
        assert result["found"]["routes"] >= result["layers"]
