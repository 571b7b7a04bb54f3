"""Routing traces: what is counted, and what is read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sparsec import pipeline
from sparsec.cli import cli
from sparsec.diagnostics import SparsecError
from sparsec.inspect.trace import read_trace, record
from sparsec.ir.parser import parse_module
from sparsec.passes.placement import read_loads, read_routing
from tests.ways_in import tiny

ROUTER = """
module {phase = "raise", version = 1}

func @main(
  %x: tensor<1xs0xi64> {kind = "input"},
  %table: tensor<4x4xf32> {kind = "param", source = "table"}
) -> (tensor<1xs0x4xf32> {kind = "output"}) {
  loc "model.py":3 in "model.layers.0.mlp"  // logits = self.gate(x)
  %logits = aten.embedding(%table, %x) : tensor<1xs0x4xf32>
  %rows = aten.reshape(%logits) {shape = [s0, 4]} : tensor<s0x4xf32>
  %ids, %weights = moe.route(%rows) : tensor<s0x2xi64>, tensor<s0x2xf32> {
    body(%z: tensor<s0x4xf32>):
      %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x4xf32>
      %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
      yield %e, %w
  }
  return %logits
}
"""
TABLE = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3], [0, 3, 1, 2]])
"""Logits of token 0, 1, 2 and 3: the first two choose experts 0 and 1, 2 chooses 3 and 2, 3 chooses 1 and 3."""


def inputs(ids: Sequence[int]) -> list[torch.Tensor]:
    return [torch.tensor([list(ids)])]


def traced(prompt: Sequence[int], new_tokens: int = 0) -> Any:
    return record(parse_module(ROUTER), {"table": TABLE}, inputs, prompt, name="m", new_tokens=new_tokens)


def test_every_choice_of_every_token_is_counted() -> None:
    trace = traced([0, 1, 2])
    assert [(layer.path, layer.experts, layer.k) for layer in trace.layers] == [("model.layers.0.mlp", 4, 2)]
    assert [(step.tokens, step.counts) for step in trace.steps] == [(3, ((2, 2, 1, 1),))]
    assert trace.steps[0].routed == (((0, 1), (0, 1), (3, 2)),)
    assert "routed" not in json.dumps(trace.counted().json())


def test_a_trace_is_a_load_and_a_routing_to_plan_for(tmp_path: Path) -> None:
    (path := tmp_path / "trace.json").write_text(json.dumps(traced([0, 1, 2], new_tokens=1).json()))
    loads = read_loads([path])
    assert loads.counts.tolist() == [[[2, 3, 1, 2]]]
    assert loads.names == ("trace",) and loads.layers == (0,)
    assert read_routing(path, loads.layers, 4).tolist() == [[[0, 1]], [[0, 1]], [[3, 2]], [[1, 3]]]


def test_a_step_of_decoding_counts_its_own_token_alone() -> None:
    trace = traced([0, 2], new_tokens=2)
    # Token 2's likeliest next one is 3, and 3's is 1.
    assert [(step.tokens, step.counts[0]) for step in trace.steps] == [
        (2, (1, 1, 1, 1)),
        (1, (0, 1, 0, 1)),
        (1, (1, 1, 0, 0)),
    ]


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    (path := tmp_path / "trace.json").write_text(json.dumps(traced([0, 3], new_tokens=1).json()))
    assert read_trace(path) == traced([0, 3], new_tokens=1)


def test_the_command_traces_a_model_into_its_dump(tmp_path: Path) -> None:
    model = tiny.folder(tmp_path, "qwen3_moe")
    (run := tmp_path / "run").mkdir()
    (run / "manifest.json").write_text('{"passes": []}')
    given = ["trace", str(model), "--prompt-ids", "3,4,5,6,7", "-n", "1", "-o", str(run)]
    result = CliRunner().invoke(cli, given, catch_exceptions=False)
    assert str(run / "index.html") in result.output.replace("\n", "")
    trace = read_trace(run / "trace.json")
    assert [layer.path for layer in trace.layers] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert [step.tokens for step in trace.steps] == [5, 1]
    assert [[sum(row) for row in step.counts] for step in trace.steps] == [[10, 10], [2, 2]]
    # The prompt's choices are those of eager PyTorch.
    model = tiny.model("qwen3_moe")
    logits = model(torch.tensor([[3, 4, 5, 6, 7]]), output_router_logits=True).router_logits
    for row, layer in zip(trace.steps[0].counts, logits, strict=True):
        assert list(row) == torch.bincount(layer.topk(2).indices.flatten(), minlength=4).tolist()


def test_a_module_without_a_router_has_no_trace() -> None:
    module = parse_module(ROUTER)
    pipeline.run_passes(module, "dce")
    with pytest.raises(SparsecError, match=r"no `moe\.route`"):
        record(module, {"table": TABLE}, inputs, [0])


def valid() -> dict[str, Any]:
    layer = {"path": "a", "experts": 2, "k": 1}
    return {"version": 1, "model": "m", "layers": [layer], "steps": [{"tokens": 3, "counts": [[1, 2]]}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "not of version 1"),
        ({"layers": 3}, "`layers` is no list"),
        ({"layers": [{"path": "a", "experts": 10**9, "k": 1}]}, "chooses 1 of 1000000000 experts"),
        ({"layers": [{"path": "a", "experts": 2, "k": 3}]}, "chooses 3 of 2 experts"),
        ({"steps": [{"tokens": 3, "counts": [[1, 2], [1, 2]]}]}, "not for 1 layers"),
        ({"steps": [{"tokens": 3, "counts": [[1, 2, 0]]}]}, "not 2 numbers"),
        ({"steps": [{"tokens": 3, "counts": [[1, -2]]}]}, "whole numbers from 0"),
        ({"steps": [{"tokens": 3, "counts": [[True, 1]]}]}, "whole numbers from 0"),
        ({"steps": [{"tokens": 3, "counts": [[2, 2]]}]}, "4 choices of 3 tokens"),
        ({"placement": [[0]]}, "not 2 numbers"),
    ],
)
def test_sizes_that_do_not_agree_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (path := tmp_path / "trace.json").write_text(json.dumps(valid()))
    assert read_trace(path).steps[0].counts == ((1, 2),)
    path.write_text(json.dumps(valid() | change))
    with pytest.raises(SparsecError, match=message):
        read_trace(path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "trace.json").write_text("[" * 100_000)
    with pytest.raises(SparsecError, match="no routing trace"):
        read_trace(path)
