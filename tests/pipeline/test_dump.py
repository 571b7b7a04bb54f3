"""The dump folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sparsec import pipeline
from sparsec.diagnostics import CompileError
from sparsec.inspect.dump import Dump, diff, new_run, write_atomic
from sparsec.ir.equal import equal
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module

TEXT = """
module {phase = "capture"}

func @main(%x: tensor<s0x8xf32> {kind = "input"}) -> (tensor<s0x8xf32> {kind = "output"}) {
  loc "m.py":7
  %p = aten.softmax.int(%x) {dim = 1} : tensor<s0x8xf32>
  return %p
}
"""


def test_layout(tmp_path: Path) -> None:
    dump = Dump(tmp_path, "tiny model")
    result = pipeline.run(parse_module(TEXT), target="cpu", to="raise", instruments=[dump])
    assert dump.folder == tmp_path / "tiny-model-0001"
    files = sorted(path.name for path in dump.folder.iterdir())
    assert files == [
        "00-capture.sparsec",
        "02-canonicalize.diff",
        "02-canonicalize.sparsec",
        "costs.json",
        "index.html",
        "made.json",
        "manifest.json",
        "remarks.jsonl",
    ]
    manifest = json.loads((dump.folder / "manifest.json").read_text())
    assert manifest["state"] == "done"
    first, idle, changed, *others = manifest["passes"]
    assert first["file"] == "00-capture.sparsec"
    assert changed["changed"] and changed["ops_before"] == changed["ops_after"] == 2
    assert changed["rules"] and changed["ms"] > 0
    assert [entry["pass"] for entry in others] == [record.name for record in result.records[2:]]
    assert not any(entry["changed"] for entry in (idle, *others))
    text = (dump.folder / "02-canonicalize.sparsec").read_text()
    assert hashlib.sha256(text.encode()).hexdigest() == changed["sha256"] == others[-1]["sha256"]
    assert equal(parse_module(text), parse_module(TEXT.replace("dim = 1", "dim = -1")))
    lines = (dump.folder / "02-canonicalize.diff").read_text().splitlines()
    assert [line for line in lines if line[:2] in ("- ", "+ ")] == [
        "-  %p = aten.softmax.int(%x) {dim = 1} : tensor<s0x8xf32>",
        "+  %p = aten.softmax.int(%x) {dim = -1} : tensor<s0x8xf32>",
    ]


def test_remarks_are_lines_of_json(tmp_path: Path) -> None:
    text = TEXT.replace("softmax.int(%x) {dim = 1}", "exp(%x)").replace(
        "  return", "  %i, %w = moe.route(%p) : tensor<s0x2xi64>, tensor<s0x2xf32> {\n    body(%z: tensor<s0x8xf32>):\n"
        "      %v, %e = aten.topk(%z) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>\n      yield %e, %v\n  }\n  return",
    )  # fmt: skip
    dump = Dump(tmp_path)
    pipeline.run_passes(parse_module(text), "fuse-route-group", instruments=[dump])
    (line,) = (dump.folder / "remarks.jsonl").read_text().splitlines()
    remark = json.loads(line)
    assert (remark["kind"], remark["loc"]["file"], remark["loc"]["line"]) == ("missed", "m.py", 7)
    assert remark["rule"].startswith("fuse_route_group (passes/fuse.py:")


def test_a_run_never_writes_into_another(tmp_path: Path) -> None:
    (tmp_path / "m-0007").mkdir()
    (tmp_path / "m-0007" / "mine").write_text("kept")
    assert [new_run(tmp_path, "m").name for _ in range(2)] == ["m-0008", "m-0009"]
    assert new_run(tmp_path, "../m").name == "m-0010"
    assert (tmp_path / "m-0007" / "mine").read_text() == "kept"


def test_a_failure_leaves_the_reproducer_in_the_folder(tmp_path: Path) -> None:
    dump = Dump(tmp_path)
    module = parse_module(TEXT.replace("softmax.int(%x) {dim = 1}", "mul.Scalar(%x) {other = 2}"))
    del module.main.body.ops[0].attrs["other"]
    with pytest.raises(CompileError, match=r"sparsec opt .*module-0001/crash\.sparsec"):
        pipeline.run_passes(module, "canonicalize", instruments=[dump])
    text = (dump.folder / "crash.sparsec").read_text()
    assert pipeline.reproducer_header(text) == ("canonicalize", "cpu")
    assert json.loads((dump.folder / "manifest.json").read_text())["state"] == "failed"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \udc80")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_diff_names_its_sides() -> None:
    text = print_module(parse_module(TEXT))
    assert diff(text, text) == ""
    assert diff("a\n", "b\n", "x", "y").splitlines()[:2] == ["--- x", "+++ y"]
