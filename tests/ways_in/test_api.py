"""The Python way in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import sparsec
from sparsec import InputError, SparsecError
from sparsec.inspect.check import relative
from sparsec.ir.equal import equal
from sparsec.ir.parser import parse_module
from sparsec.pipeline import PHASES, run
from tests.ways_in import tiny


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.model("mixtral")


@pytest.fixture(scope="module")
def compiled(model: torch.nn.Module) -> sparsec.CompiledModel:
    return sparsec.compile(model, kwargs={"input_ids": tiny.ids(2, 12)})


@pytest.mark.parametrize("shape", [(2, 12), (1, 1), (3, 7)])
def test_same_structure_and_numbers(
    model: torch.nn.Module, compiled: sparsec.CompiledModel, shape: tuple[int, int]
) -> None:
    ids = tiny.ids(*shape)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False)
    found = compiled(input_ids=ids)
    assert type(found) is type(expected)
    assert relative(found.logits, expected.logits) < 1e-5


def test_saved_and_loaded(compiled: sparsec.CompiledModel, tmp_path: Path) -> None:
    path = compiled.save(tmp_path / "m.sparsec")
    again = sparsec.load(path)
    ids = tiny.ids(2, 5)
    assert torch.equal(again(input_ids=ids).logits, compiled(input_ids=ids).logits)


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_goes_on_from_its_text(compiled: sparsec.CompiledModel, phase: str) -> None:
    module = parse_module(compiled.ir(phase), phase)
    assert equal(run(module, to="lower").module, compiled.result.module)


def test_no_tokens(compiled: sparsec.CompiledModel) -> None:
    try:
        assert compiled(input_ids=tiny.ids(1, 0)).logits.shape == (1, 0, 64)
    except InputError as error:
        assert "empty" in str(error)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"input_ids": torch.zeros(2, 3)}, "dtype"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "shape"),
        ({}, "input_ids"),
    ],
)
def test_bad_inputs_are_named(compiled: sparsec.CompiledModel, given: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(InputError, match=said):
        compiled(**given)


def test_all_tokens_on_one_expert_and_nan_logits(model: torch.nn.Module) -> None:
    layer = model.model.layers[0].mlp  # type: ignore[union-attr,index]
    held = sparsec.compile(layer, (torch.randn(2, 3, 32),))
    same = torch.randn(1, 1, 32).expand(2, 9, 32).contiguous()
    with torch.no_grad():
        assert relative(_first(held(same)), _first(layer(same))) < 1e-5  # type: ignore[operator]
    assert bool(_first(held(torch.full((1, 4, 32), float("nan")))).isnan().all())


def test_targets(model: torch.nn.Module) -> None:
    with pytest.raises(SparsecError, match="did you mean 'cuda:sm_90'"):
        sparsec.compile(model, kwargs={"input_ids": tiny.ids(2, 4)}, target="cuda:sm90")


def test_language_model_generates_what_transformers_does(model: torch.nn.Module, tmp_path: Path) -> None:
    compiled = sparsec.compile_language_model(model, max_length=32)
    prompt = tiny.ids(1, 5)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 5:].tolist()  # type: ignore[operator]
    assert compiled.generate(prompt[0].tolist(), 12) == expected
    from sparsec.runtime.generate import Generator

    generator = Generator.load(compiled.save(tmp_path / "lm"))
    assert [token.id for token in generator.stream(prompt[0].tolist(), 12)] == expected


def _first(output: object) -> torch.Tensor:
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, torch.Tensor)
    return first
