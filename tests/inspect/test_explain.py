"""What was fused and what was not, with the user's lines, rules, suggestions and gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from sparsec import pipeline
from sparsec.cli import cli
from sparsec.diagnostics import SparsecError
from sparsec.frontend.capture import capture
from sparsec.inspect.costs import roof
from sparsec.inspect.dump import Dump
from sparsec.inspect.explain import Finding, explain, of_dump, of_result, select
from sparsec.ir.core import Module
from sparsec.ir.loc import Loc
from sparsec.ir.parser import parse_module
from tests.inspect.test_costs import LAYER

ON = roof("cuda:sm_90")


class Layer(nn.Module):
    """An expert layer whose router can be told to look across tokens."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.across = across
        self.gate = nn.Linear(32, 8, bias=False)
        self.up = nn.Parameter(torch.randn(8, 96, 32))
        self.down = nn.Parameter(torch.randn(8, 32, 48))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        if self.across:
            logits = logits - logits.logsumexp(0, keepdim=True)  # over all tokens
        weights, ids = logits.softmax(-1).topk(2)
        gate, up = (
            torch.einsum("tki,teoi->tkeo", x[:, None].expand(-1, 2, -1), self.up[None])
            .gather(2, ids[..., None, None].expand(-1, -1, 1, 96))
            .squeeze(2)
            .chunk(2, -1)
        )
        rows = torch.einsum("tko,tkho->tkh", torch.nn.functional.silu(gate) * up, self.down[ids])
        return (rows * weights[..., None]).sum(1)


def found(module: Module, target: str = "cpu") -> list[Finding]:
    result = pipeline.run(module, target=target)
    return explain(of_result(result), ON, {})


def test_what_was_fused() -> None:
    """The rule's own line, the user's line, and the ops that went in."""
    findings = found(parse_module(LAYER.replace('"raise"', '"capture"')), "cuda:sm_90")
    assert [one.kind for one in findings] == ["fused"] * len(findings)
    made = {one.what.partition(" from ")[0]: one for one in findings}
    assert {"moe.route_group", "moe.gather_gemm", "moe.gemm_combine"} <= made.keys()
    file, line = made["moe.gather_gemm"].rule.split(" ")[0].split(":")
    assert "def split_experts" in "".join(Path(file).read_text().splitlines()[int(line) - 1 : int(line) + 1])


@pytest.mark.parametrize("across", [False, True])
def test_a_router_that_looks_across_tokens(across: bool) -> None:
    findings = found(capture(Layer(across), (torch.randn(5, 32),)).module)
    missed = [one for one in findings if one.kind == "missed"]
    assert bool(missed) == across, [str(one) for one in missed]
    for one in missed:
        assert one.place.file.endswith("test_explain.py") and one.try_
    if across:
        assert any("logsumexp" in one.place.source for one in missed), [one.place.source for one in missed]


def test_gain() -> None:
    """Launches less one, and the tensors that only those ops pass on, written and read."""
    text = """func @main(%x: tensor<1024x256xf32> {kind = "input"}) -> (tensor<1024x256xf32> {kind = "output"}) {
      loc "model.py":7 in "layer"
      %a = aten.exp(%x) : tensor<1024x256xf32>
      %b = aten.neg(%a) : tensor<1024x256xf32>
      %c = aten.abs(%b) : tensor<1024x256xf32>
      return %c
    }
    """
    from sparsec.diagnostics import Remark

    result = pipeline.run(parse_module(text))
    remark = Remark("missed", "some-pass", "", Loc("model.py", 7, "layer"), "it is a test", "pass it")
    (one,) = explain(of_result(result, [remark]), ON, {})
    assert one.gain is not None and one.gain.launches == 2
    assert one.gain.bytes == 2 * 2 * 1024 * 256 * 4
    assert one.gain.us == pytest.approx(2 * 3.0 + one.gain.bytes / ON.bandwidth * 1e6)


def test_filters() -> None:
    def at(layer: str, file: str, line: int, rule: str) -> Finding:
        return Finding("missed", layer, Loc(file, line, layer), "why", rule)

    a, b = at("model.layers.1.mlp", "model.py", 7, "raise-route"), at("model.layers.11", "other.py", 8, "pack-banks")
    assert select([a, b]) == [a, b]
    assert select([a, b], layer="model.layers.1") == [a]
    assert select([a, b], layer="model.layers.*.mlp") == [a]
    assert select([a, b], file="other.py") == [b]
    assert select([a, b], file="model.py:7") == [a]
    assert select([a, b], file="model.py:8") == []
    assert select([a, b], rule="pack") == [b]


def test_command(tmp_path: Path) -> None:
    (text := tmp_path / "layer.sparsec").write_text(LAYER)
    said = CliRunner().invoke(cli, ["explain", str(text), "--target", "cuda:sm_90", "--json"], catch_exceptions=False)
    assert {one["what"].split()[0] for one in json.loads(said.output)} >= {"moe.gather_gemm", "moe.gemm_combine"}
    said = CliRunner().invoke(cli, ["explain", str(text), "--target", "cuda:sm_90"], catch_exceptions=False)
    assert "moe.gather_gemm" in said.output and "passes/fuse.py" in said.output


def test_a_dump_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run wrote down says the same as the run itself, and another target does compile."""
    module = capture(Layer(across=True), (torch.randn(5, 32),)).module
    dump = Dump(tmp_path)
    result = pipeline.run(module, target="cuda:sm_90", instruments=[dump])
    assert explain(of_dump(dump.folder), ON, {}) == explain(of_result(result), ON, {})

    compiled = list[str]()
    run = pipeline.run

    def counted(*args: Any, **kwargs: Any) -> pipeline.Result:
        compiled.append("")
        return run(*args, **kwargs)

    monkeypatch.setattr(pipeline, "run", counted)
    said = CliRunner().invoke(cli, ["explain", str(dump.folder)])
    assert said.exit_code == 0 and "works across tokens" in said.output and not compiled
    assert CliRunner().invoke(cli, ["explain", str(dump.folder), "--target", "cpu"]).exit_code == 0 and compiled
    (dump.folder / "manifest.json").write_text("{}")
    with pytest.raises(SparsecError, match="no whole run of a dump"):
        of_dump(dump.folder)
