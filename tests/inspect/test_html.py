"""The page of a dump: what it is made of, and how it behaves in a browser."""

from __future__ import annotations

import json
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sparsec import pipeline
from sparsec.cli import cli
from sparsec.diagnostics import SparsecError
from sparsec.inspect.dump import Dump, diff
from sparsec.inspect.html.page import write_index
from sparsec.inspect.html.read_dump import diff_blocks, read_dump
from sparsec.inspect.trace import Step, Trace, TracedLayer
from sparsec.ir.parser import parse_module
from tests.inspect.browser import Browser

LAYERS, OPS = 50, 100
MAX_BYTES, MAX_MS = 5_000_000, 2_000
EVIL = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 1'>"

MODEL = """
module {{phase = "capture", version = 1}}

func @main(
  %x: tensor<s0x8xf32> {{kind = "input"}},
  %gate: tensor<4x8xf32> {{kind = "param", source = "gate"}},
  %up: tensor<4x12x8xf32> {{kind = "param", source = "up"}},
  %down: tensor<4x8x6xf32> {{kind = "param", source = "down"}}
) -> (tensor<s0x8xf32> {{kind = "output"}}) {{
  loc "model.py":10 in "layers.0.gate"  // logits = self.gate(x) {evil}
  %logits = aten.linear(%x, %gate) : tensor<s0x4xf32>
  loc "model.py":11 in "layers.0.gate"  // scores = logits.softmax(-1)
  %p = aten.softmax.int(%logits) {{dim = -1}} : tensor<s0x4xf32>
  loc "model.py":12 in "layers.0.gate"  // weights, ids = scores.topk(2)
  %w, %e = aten.topk(%p) {{k = 2}} : tensor<s0x2xf32>, tensor<s0x2xi64>
  loc "model.py":20 in "layers.0.experts"  // y = self.experts(x, ids, weights)
  %y = moe.experts(%x, %e, %w, %up, %down) : tensor<s0x8xf32> {{
    activation(%g: tensor<s0x6xf32>, %u: tensor<s0x6xf32>):
      %a = aten.relu(%g) : tensor<s0x6xf32>
      %b = aten.mul.Tensor(%a, %u) : tensor<s0x6xf32>
      yield %b
  }}
  return %y
}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small model, its source written by someone unkind."""
    dump = Dump(tmp_path_factory.mktemp("dump"), "tiny")
    pipeline.run(parse_module(MODEL.format(evil=EVIL)), instruments=[dump])
    steps = (Step(8, ((9, 5, 2, 0),)), Step(1, ((1, 1, 0, 0),)))
    trace = Trace("tiny", (TracedLayer("layers.0.gate", 4, 2),), steps, ((0, 0, 1, 1),))
    (dump.folder / "trace.json").write_text(json.dumps(trace.json()))
    write_index(dump.folder)
    return dump.folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 ops in 50 layers, and eight passes that each change every tenth op."""
    folder = tmp_path_factory.mktemp("large")
    draw, text, entries = random.Random(0), _large(0), list[dict[str, Any]]()
    for number in range(9):
        new = _large(number)
        name = f"{number:02}-pass"
        (folder / f"{name}.sparsec").write_text(new)
        entry: dict[str, Any] = {"number": number, "phase": "raise" if number else "capture", "file": f"{name}.sparsec"}
        if number:
            (folder / f"{name}.diff").write_text(diff(text, new))
            entry |= {"pass": f"pass-{number}", "diff": f"{name}.diff", "ms": draw.random() * 50, "changed": True}
            entry |= {"ops_before": LAYERS * OPS, "ops_after": LAYERS * OPS, "rules": {"rule (a.py:1)": 500}}
        entries.append(entry)
        text = new
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "state": "done", "passes": entries}))
    place = {"file": "model.py", "line": 3, "scope": "model.layers.3", "source": "x"}
    remark = {
        "kind": "missed",
        "pass_name": "raise",
        "rule": "r",
        "message": "declined",
        "suggestion": "",
        "loc": place,
    }
    (folder / "remarks.jsonl").write_text(f"{json.dumps(remark)}\n" * 500)
    row = {
        "op": "aten.add.Tensor",
        "file": "model.py",
        "line": 3,
        "bytes": 3,
        "flops": 1,
        "us": 0.5,
        "limiter": "memory",
    }
    (folder / "costs.json").write_text(json.dumps({"chip": "chip", "sizes": {"s0": 1}, "ops": [row] * LAYERS * OPS}))
    write_index(folder)
    return folder


def _large(number: int) -> str:
    lines = ["func @main(%v: tensor<s0x64xf32>) -> (tensor<s0x64xf32>) {"]
    for layer in range(LAYERS):
        for i in range(OPS):
            at = layer * OPS + i
            part = ("input_layernorm", "self_attn", "mlp")[i * 3 // OPS]
            source = f"hidden_states = self.{part}(hidden_states, position_embeddings)  # {i}"
            lines.append(
                f'  loc "transformers/models/some/modeling.py":{100 + i} in "model.layers.{layer}.{part}"  // {source}'
            )
            name = "mul" if i % 10 < number % 3 else "add"
            lines.append(f"  %v_{at} = aten.{name}.Tensor(%v{f'_{at - 1}' if at else ''}, %v) : tensor<s0x64xf32>")
    return "\n".join([*lines, f"  return %v_{LAYERS * OPS - 1}", "}", ""])


def test_nothing_of_a_dump_can_end_its_element(tiny: Path) -> None:
    assert EVIL in (tiny / "00-capture.sparsec").read_text()
    page = (tiny / "index.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "taken" not in page
    assert "innerHTML" not in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_page_of_5000_ops_is_small(large: Path) -> None:
    assert (large / "index.html").stat().st_size < MAX_BYTES


def test_blocks_of_a_diff_are_its_changed_lines() -> None:
    rng = random.Random(1)
    for _ in range(50):
        before = [f"{rng.randrange(6)}\n" for _ in range(40)]
        after = [line for line in before if rng.random() > 0.1]
        after = [new for line in after for new in ([line, "x\n"] if rng.random() < 0.1 else [line])]
        made, at = list[str](), 0
        for from_, gone, to, come in diff_blocks(diff("".join(before), "".join(after))):
            made += before[at:from_]
            assert len(made) == to
            made += after[to : to + come]
            at = from_ + gone
        assert made + before[at:] == after


def test_what_cannot_be_read_is_left_out_with_a_note(tmp_path: Path, tiny: Path) -> None:
    manifest = json.loads((tiny / "manifest.json").read_text())
    first = manifest["passes"][0]
    (tmp_path / first["file"]).write_text((tiny / first["file"]).read_text())
    passes = [first, {"file": "../../etc/passwd"}, 7]
    (tmp_path / "manifest.json").write_text(json.dumps({"passes": passes}))
    (tmp_path / "costs.json").write_text("{")
    (tmp_path / "trace.json").write_text('{"version": 1, "layers": []}')
    data = read_dump(tmp_path)
    assert len(data["passes"]) == len(data["texts"]) == 1
    assert data["costs"] is None and data["trace"] is None
    assert len(data["notes"]) == 4 and "../../etc/passwd" in data["notes"][0]


def test_view_writes_the_page_of_the_newest_run(tiny: Path, tmp_path: Path) -> None:
    (tiny / "index.html").unlink()
    result = CliRunner().invoke(cli, ["view", str(tiny.parent)])
    assert result.output.strip() == str(tiny / "index.html")
    assert (tiny / "index.html").is_file()
    with pytest.raises(SparsecError, match="holds no run of a dump"):
        CliRunner().invoke(cli, ["view", str(tmp_path)], catch_exceptions=False)


# ---------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture
def page(chromium: Browser, tiny: Path) -> Generator[Browser]:
    chromium.open(tiny / "index.html")
    yield chromium
    assert not chromium.errors


TAB = '[role=tab][aria-selected="true"]'


def test_a_page_of_5000_ops_is_shown_within_two_seconds(chromium: Browser, large: Path) -> None:
    assert chromium.open(large / "index.html") < MAX_MS
    for key, tab in enumerate(("Phases", "Graph", "Experts", "Costs", "Remarks", "Timeline"), 1):
        chromium.press(str(key))
        assert tab in chromium.text(TAB)
    chromium.press("2")
    assert "0\u201349 \u00d750" in chromium.text("svg")  # the layers are one
    assert chromium.count(".node") < 100
    assert not chromium.errors


def test_a_page_of_nothing_says_so(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"passes": [], "state": "failed"}')
    chromium.open(write_index(tmp_path))
    titles = ("No passes", "No ops", "No routing trace", "No costs", "No remarks", "0 ms")
    for key, title in enumerate(titles, 1):
        chromium.press(str(key), "j")
        assert title in chromium.text("#view")
    chromium.press("1", "/", "x", "Escape")
    assert not chromium.errors


def test_texts_of_strangers_are_texts(page: Browser) -> None:
    assert EVIL in page.evaluate("document.querySelector('.source').textContent")
    assert page.evaluate("window.taken") is None
    assert page.count("img") == 0


def test_passes_are_gone_through_by_keys(page: Browser) -> None:
    seen = [page.text('.chip[aria-selected="true"]')]
    for _ in range(3):
        page.press("j")
        seen.append(page.text('.chip[aria-selected="true"]'))
    assert len(set(seen)) == 4
    page.press("k")
    assert page.text('.chip[aria-selected="true"]') == seen[-2]
    assert page.count(".row.added") and page.count(".row.removed")


def test_hover_lights_what_comes_from_the_same_line(page: Browser) -> None:
    page.press("j")
    key = page.evaluate("document.querySelector('.source .row[data-keys]').dataset.keys")
    page.point(f'.source .row[data-keys="{key}"]')
    assert page.count(".source .lit") == 1
    assert page.count(".ir .lit:not(.loc)") >= 2  # before and after
    assert "model.py:10" in page.text("#status")
    page.point("#name")
    assert page.count(".lit") == 0


def test_a_pinned_line_opens_its_kernel(page: Browser) -> None:
    page.point(".source .row:last-child", click=True)
    assert "y = self.experts" in page.text(".source .pin")
    assert page.evaluate("document.querySelector('.kernel select').value").startswith("@layer")
    assert page.count(".kernel .lit")
    page.press("Escape")
    assert page.count(".pin") == 0


def test_search_finds_and_goes_on(page: Browser) -> None:
    page.press("/", *"softmax")
    assert page.text("#hits").startswith("1 of ")
    page.press("Enter")
    assert page.text("#hits").startswith("2 of ") or page.text("#hits") == "1 of 1"
    assert page.count("mark")
    page.press("Escape")
    assert page.text("#hits") == ""


def test_experts_show_load_padding_and_devices(page: Browser) -> None:
    page.press("3")
    shown = page.text(".experts")
    assert "1 of 4\nexperts without a token" in shown
    # Prompt: tiles of 16 rows for 3 experts with 16 tokens; the other step: 2 tiles with 1 token each.
    padding = 1 - (16 + 2) / (3 * 16 + 2 * 16)
    assert shown.count(f"{100 * padding:.0f} %") == 2  # this layer, and all of them
    assert "Tokens per device" in shown
    assert page.count(".bar1.dead") == 1


def test_costs_are_sorted_by_their_headings(page: Browser) -> None:
    page.press("4")
    page.point(".grid.head .c-op", click=True)
    names = page.evaluate("[...document.querySelectorAll('.rows .c-op')].map((cell) => cell.textContent)")
    assert names == sorted(names) and len(names) > 1


def test_colours_follow_the_system_until_someone_switches(chromium: Browser, tiny: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    chromium.open(tiny / "index.html", theme="light")
    light = chromium.evaluate(background)
    chromium.open(tiny / "index.html", theme="dark")
    dark = chromium.evaluate(background)
    chromium.press("t")
    assert light != dark and chromium.evaluate(background) == light
    chromium.evaluate("localStorage.clear()")
