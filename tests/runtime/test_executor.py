"""Programs: what they compute, what they refuse."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec.codegen.emit import emit
from sparsec.ir.core import Module
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.executor import Program
from sparsec.runtime.plan import Call, Plan
from sparsec.runtime.plan_json import from_json, to_json
from tests.runtime.models import Layer, arange_module, cache_module, layer_module

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


def program(module: Module, weights: dict[str, torch.Tensor], **more: Any) -> Program:
    return Program(emit(module, "cpu").plan, weights, **more)


def plan_of(module: Module) -> Any:
    """A plan as JSON, to be damaged."""
    return to_json(emit(module, "cpu").plan)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(bias=True, layout="interleaved")


def expected(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The layer in plain torch, expert by expert."""
    w = layer.weights
    scores, ids = (x @ w["gate"].T).softmax(-1).topk(layer.k)
    scores = scores / scores.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for slot in range(layer.k):
            e = int(ids[token, slot])
            projected = w["up"][e] @ x[token] + w["up_bias"][e]
            h = torch.nn.functional.silu(projected[::2]) * projected[1::2]
            out[token] += scores[token, slot] * (w["down"][e] @ h + w["down_bias"][e])
    return out


@pytest.mark.parametrize("tokens", [0, 1, 5, 400])
def test_a_layer_at_any_number_of_tokens(layer: Layer, tokens: int) -> None:
    run = program(layer_module(layer), layer.weights)
    x = torch.randn(tokens, layer.hidden)
    y, logits = run(x)
    torch.testing.assert_close(y, expected(layer, x), rtol=1e-4, atol=1e-5)
    assert logits.shape == (tokens, layer.experts)


def test_banks_are_let_go_once_packed(layer: Layer) -> None:
    asked = list[str]()

    class Weights(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().__getitem__(name)

    run = program(layer_module(layer), Weights(layer.weights))
    assert sorted(asked) == sorted(layer.weights)
    held = [value for value in run._runner.base if isinstance(value, torch.Tensor)]
    assert [value.shape for value in held] == [layer.weights["gate"].shape]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_do_no_harm(bad: float) -> None:
    layer = Layer()
    x = torch.randn(6, layer.hidden)
    x[2] = bad
    y, _ = program(layer_module(layer), layer.weights)(x)
    plain, _ = program(layer_module(layer), layer.weights)(torch.cat([x[:2], x[3:]]))
    torch.testing.assert_close(torch.cat([y[:2], y[3:]]), plain, rtol=1e-5, atol=1e-6)


def test_sizes_that_only_a_run_decides() -> None:
    run = program(arange_module(), {})
    for rows in (3, 1, 5):
        y, found = run(torch.zeros(rows, 4), 2)
        assert y[:, 0].tolist() == [2.0 * i for i in range(rows)]
        assert found.tolist() == y.nonzero().reshape(-1).tolist()


def test_a_buffer_is_updated_in_place_and_reset() -> None:
    cache = torch.zeros(4, 3)
    module = cache_module()
    plan = emit(module, "cpu").plan
    assert next(step.op for step in plan.steps if isinstance(step, Call)) == "aten.index_copy_.default"
    run = Program(plan, {"cache": cache})
    assert run(torch.ones(1, 3), torch.tensor([0]))[0].tolist() == [1, 1, 1]
    assert run(torch.ones(1, 3), torch.tensor([2]))[0].tolist() == [2, 2, 2]
    assert not cache.any(), "the caller's tensor is the caller's"
    run.reset()
    assert run(torch.ones(1, 3), torch.tensor([1]))[0].tolist() == [1, 1, 1]


def test_an_operator_of_the_callers_changes_a_copy_whatever_its_name() -> None:
    library = torch.library.Library("sparsec_test_cache", "DEF")
    library.define("store(Tensor(a!) cache, int dim, Tensor at, Tensor x) -> Tensor(a!)")
    library.impl("store", lambda cache, dim, at, x: cache.index_copy_(dim, at, x), "CompositeExplicitAutograd")
    data = plan_of(cache_module())
    data["steps"][0]["op"] = "sparsec_test_cache.store.default"
    del data["outputs"][1]
    cache = torch.zeros(4, 3)
    run = Program(from_json(data), {"cache": cache}, allow=["sparsec_test_cache"])
    assert run(torch.ones(1, 3), torch.tensor([0]))[0].tolist() == [1, 1, 1]
    assert not cache.any()
    run.reset()
    assert run(torch.ones(1, 3), torch.tensor([1]))[0].tolist() == [1, 1, 1]


def test_an_output_that_is_a_buffer_stays_what_it_was() -> None:
    plan = emit(cache_module(), "cpu").plan
    new = next(output.slot for output in plan.outputs if output.kind == "mutation")
    outputs = [dataclasses.replace(plan.outputs[0], slot=new), *plan.outputs[1:]]
    run = Program(dataclasses.replace(plan, outputs=outputs), {"cache": torch.zeros(4, 3)})
    (first,) = run(torch.ones(1, 3), torch.tensor([0]))
    run(torch.full((1, 3), 5.0), torch.tensor([0]))
    assert first[0].tolist() == [1, 1, 1]


def test_a_buffer_without_an_in_place_form_is_copied_back() -> None:
    data = plan_of(cache_module())
    data["steps"][0]["op"] = "aten.index_copy.default"
    data["steps"][1]["slots"] = data["steps"][1]["slots"][:1]
    run = Program(from_json(data), {"cache": torch.zeros(4, 3)})
    run(torch.ones(1, 3), torch.tensor([0]))
    assert run(torch.ones(1, 3), torch.tensor([1]))[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((), "takes 1 inputs (x), 0 were given"),
        (("text",), "'x' is str, a tensor is needed"),
        ((torch.zeros(2, 32, dtype=torch.float64),), "'x' has dtype torch.float64, the program takes torch.float32"),
        ((torch.zeros(32),), "'x' has shape [32], the program takes [s0, 32]"),
        ((torch.zeros(2, 31),), "axis 1 must be 32"),
        ((torch.zeros(2, 32, device="meta"),), "'x' is on meta, the program runs on cpu"),
    ],
)
def test_wrong_inputs_are_named(layer: Layer, inputs: tuple[Any, ...], words: str) -> None:
    run = program(layer_module(layer), layer.weights)
    with pytest.raises(InputError) as error:
        run(*inputs)
    assert words in str(error.value)


def test_symbols_must_agree() -> None:
    data = plan_of(arange_module())
    data["args"][1] |= {"type": {"shape": ["s0", "2*s0"], "dtype": "f32"}, "symbol": ""}
    (scale,) = [step for step in data["steps"] if step.get("op") == "aten.mul.Scalar"]
    scale["args"][1] = 1
    run = Program(from_json(data), {})
    run(torch.zeros(3, 4), torch.zeros(3, 6))
    with pytest.raises(InputError, match="another input makes s0 = 3"):
        run(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"size 5 in axis 1, 2\*s0 = 6 is needed"):
        run(torch.zeros(3, 4), torch.zeros(3, 5))


def test_an_index_beyond_its_table_is_an_error_of_the_input() -> None:
    run = program(cache_module(), {"cache": torch.zeros(4, 3)})
    with pytest.raises(InputError, match=r"beyond its table.*aten\.index_copy_\.default failed"):
        run(torch.ones(1, 3), torch.tensor([9]))


def test_weights_must_fit_the_plan(layer: Layer) -> None:
    plan = emit(layer_module(layer), "cpu").plan
    with pytest.raises(ArtifactError, match="the weights lack 'down'"):
        Program(plan, {name: value for name, value in layer.weights.items() if name != "down"})
    with pytest.raises(ArtifactError, match=r"'gate' is \[1\] f32 in the weights, \[6, 32\] f32 in the plan"):
        Program(plan, layer.weights | {"gate": torch.zeros(1)})


def test_plans_survive_json(layer: Layer) -> None:
    for module in (layer_module(layer), cache_module(), arange_module()):
        plan = emit(module, "cpu").plan
        assert from_json(json.loads(json.dumps(to_json(plan), allow_nan=False))) == plan


def test_the_runtime_loads_no_compiler_module() -> None:
    code = (
        "import sys, sparsec.runtime as r\n"
        "from sparsec.runtime import artifact, executor, experts, generate, backends\n"
        "r.load, r.Program\n"
        "parts = {name.split('.')[1] for name in sys.modules if name.startswith('sparsec.')}\n"
        "print(sorted(parts), sorted({'lark', 'triton', 'transformers', 'networkx'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['runtime'] []"


def test_a_plan_without_steps_runs() -> None:
    tree = {"kind": "tuple", "items": []}
    empty = Plan([], [], [], {}, {"args": tree, "kwargs": {"kind": "dict", "keys": [], "items": []}}, tree)
    assert Program(empty, {}).call() == ()
