"""Plans that may not run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen.emit import emit
from sparsec.runtime.check import check_plan
from sparsec.runtime.dims import compile_dim, parse
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.executor import Program
from sparsec.runtime.operators import resolve
from sparsec.runtime.plan_json import from_json, to_json
from tests.runtime.models import Layer, arange_module, cache_module, layer_module

LAYER = Layer()
PLANS: dict[str, Any] = {
    "layer": to_json(emit(layer_module(LAYER), "cpu").plan),
    "cache": to_json(emit(cache_module(), "cpu").plan),
    "arange": to_json(emit(arange_module(), "cpu").plan),
}
WEIGHTS = {"layer": LAYER.weights, "cache": {"cache": torch.zeros(4, 3)}, "arange": {}}


def refuse(data: Any, words: str) -> None:
    with pytest.raises(ArtifactError) as error:
        check_plan(from_json(data))
    assert words in str(error.value)


def changed(name: str, change: Callable[[Any], None]) -> Any:
    data = copy.deepcopy(PLANS[name])
    change(data)
    return data


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("arange", "steps.0.op", "aten.from_file.default", "may not call"),
        ("arange", "steps.0.op", "aten.nothing.default", "does not have"),
        ("arange", "steps.0.op", "os.system.default", "load with allow=['os']"),
        ("arange", "steps.0.op", "aten.arange", "does not have"),
        ("arange", "steps.0.args.0", "many", "argument 'end' is 'many', not of type number"),
        ("arange", "steps.0.args.0.dim", "__import__('os')", "not a dimension expression"),
        ("arange", "steps.0.args.0.dim", "s9", "uses the symbol 's9', which has no value there"),
        ("arange", "steps.0.kwargs.dtype.dtype", "f31", "argument 'dtype'"),
        ("arange", "steps.0.kwargs.color", 1, "gives 'color' which the operator does not take"),
        ("arange", "steps.1.args.0.slot", 77, "reads slot 77, which holds no value"),
        ("arange", "steps.1.args.1", 3.5, "argument 'shape'"),
        ("arange", "steps.0.outs.0", 10**9, "beyond the 1000000"),
        ("arange", "args.1.symbol", "", "neither a type nor a symbol"),
        ("arange", "args.1.slot", 0, "takes slot 0, which is taken"),
        ("cache", "steps.0.args.0.slot", 1, "changes a value that is no buffer"),
        ("cache", "outputs.1.source", "other", "which is no buffer"),
        ("cache", "outputs.0.slot", 0, "which holds no value at the end"),
        ("cache", "args.0.type.shape.0", -1, "has the size -1"),
        ("cache", "structure.items.0.index", 5, "its structure has leaves [5]"),
        ("cache", "structure.kind", "set", "of kind 'set'"),
        ("cache", "inputs.args.items.0.index", 1, "its structure has leaves [1, 1]"),
        ("layer", "kernels.route_group_0.regions.body.steps.0.op", "aten.add_.Tensor", "gives 3 positional arguments"),
        ("layer", "kernels.route_group_0.source", "kernels/a.cpp", "has files of C++, but its backend is 'onednn'"),
        ("layer", "kernels.route_group_0.binaries", {"amx": 1}, "binaries.amx is 1, not the name of a file"),
        ("layer", "kernels.route_group_0.regions", [], "'regions' is missing or not of type dict"),
        ("layer", "kernels.route_group_0.variants", [], "do not cover every token count"),
        ("layer", "kernels.route_group_0.name", "x", "calls itself 'x'"),
        ("layer", "kernels.gather_gemm_0.results.0.shape.0", "q*2", "uses the symbol 'q'"),
        ("layer", "kernels.gather_gemm_0.regions.activation.outs.0", 9, "activation yields a slot that holds no value"),
    ],
)
def test_what_is_wrong_is_said(name: str, path: str, value: Any, words: str) -> None:
    def change(data: Any) -> None:
        *way, last = path.split(".")
        for part in way:
            data = data[int(part)] if isinstance(data, list) else data[part]
        data[int(last) if isinstance(data, list) else last] = value

    refuse(changed(name, change), words)


def test_a_launch_must_fit_its_kernel() -> None:
    place = next(i for i, step in enumerate(PLANS["layer"]["steps"]) if step.get("kernel") == "gather_gemm_0")
    refuse(changed("layer", lambda data: data["steps"][place]["ins"].pop()), "the operands that it takes")
    refuse(changed("layer", lambda data: data["kernels"].pop("gather_gemm_0")), "which the plan does not have")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda kernel: kernel.update(backend="abacus"), "for backend 'abacus'"),
        (lambda kernel: kernel["regions"].clear(), "lacks its region 'activation'"),
    ],
)
def test_kernels_that_nobody_runs_are_refused(change: Callable[[Any], None], words: str) -> None:
    data = changed("layer", lambda data: change(data["kernels"]["gather_gemm_0"]))
    with pytest.raises(ArtifactError, match=words):
        Program(from_json(data), LAYER.weights)


def test_operators_of_other_libraries_need_leave() -> None:
    library = torch.library.Library("sparsec_test_lib", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    data = changed("arange", lambda data: data["steps"][0].clear() or data["steps"][0].update(_twice(data)))
    refuse(data, "allow=['sparsec_test_lib']")
    check_plan(from_json(data), allow=["sparsec_test_lib"])
    check_plan(from_json(data), allow=["sparsec_test_lib.twice"])


def _twice(data: Any) -> dict[str, Any]:
    out = PLANS["arange"]["steps"][0]["outs"]
    op = "sparsec_test_lib.twice.default"
    return {"step": "call", "op": op, "args": [{"slot": 0}], "kwargs": {}, "outs": out, "binds": []}


@pytest.mark.parametrize(
    "name",
    [
        "set.source_Tensor",
        "resize.default",
        "sub_.Tensor",
        "fbgemm_pack_gemm_matrix_fp16.default",
        "_reshape_alias.default",
        "ctc_loss.IntList",
        "max_pool2d_with_indices_backward.default",
        "native_batch_norm.default",
    ],
)
def test_operators_that_reach_further_are_denied(name: str) -> None:
    with pytest.raises(ArtifactError, match="may not call"):
        resolve(f"aten.{name}")


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [path, *(leaf for key, item in items for leaf in leaves(item, (*path, key)))]
    return [path]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(2**62, 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["s0", "s0//0", "2*s0", "aten.relu.default", "leaf", "f32", "call", "free"]),
    st.just([]),
    st.just({}),
    st.builds(lambda slot: {"slot": slot}, st.integers(-1, 20)),
)


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(PLANS)), data=st.data(), junk=JUNK)
def test_damaged_plans_are_refused_or_run(name: str, data: Any, junk: Any) -> None:
    """Replacing any part by junk gives an ArtifactError at load, or a plan that runs or fails in words."""
    plan = copy.deepcopy(PLANS[name])
    *way, last = data.draw(st.sampled_from(leaves(plan)[1:]))
    place = plan
    for key in way:
        place = place[key]
    place[last] = junk
    try:
        program = Program(from_json(plan), WEIGHTS[name])
    except ArtifactError:
        return
    inputs = [torch.zeros(2, 32)] if name == "layer" else [torch.ones(1, 3), torch.tensor([0])]
    try:
        program(*([torch.ones(3, 4), 2] if name == "arange" else inputs))
    except (InputError, RuntimeError):
        return


@given(st.text(max_size=30))
def test_dimension_text_is_parsed_or_refused(text: str) -> None:
    try:
        size = parse(text)
    except ArtifactError:
        return
    assert all(name.isidentifier() for name in size.symbols)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2*s0+1", 11), ("-s0", -5), ("s0//2 % 2", 0), ("max(s0, 9)", 9), ("min(s0, 9, 3)", 3), ("(s0)", 5)],
)
def test_dimension_expressions(text: str, value: int) -> None:
    assert parse(text)({"s0": 5}) == value


@pytest.mark.parametrize("text", ["s0**2", "s0.x", "s0[0]", "lambda: 1", "True", "1.5", "max()", "f(s0)", "a" * 2000])
def test_anything_else_is_no_dimension(text: str) -> None:
    with pytest.raises(ArtifactError):
        compile_dim(text)


def test_sizes_stay_within_64_bits() -> None:
    with pytest.raises(InputError, match="too large"):
        parse("s0*s0*s0")({"s0": 2**30})
    with pytest.raises(InputError, match="divides by zero"):
        parse("1//s0")({"s0": 0})
    with pytest.raises(ArtifactError, match="too large"):
        compile_dim(2**63)
    assert json.loads(json.dumps(to_json(from_json(PLANS["layer"])))) == PLANS["layer"]
