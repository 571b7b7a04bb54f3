"""The command line: what it does, and what it says of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from sparsec import cli
from sparsec.runtime.artifact import open_artifact
from sparsec.runtime.tiles import unpack
from tests.ways_in import tiny


@dataclass
class Outcome:
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def sparsec(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*args: Any) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sparsec", *map(str, args)])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Outcome(status, out, err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("artifacts") / "mixtral.sparsec"
    subprocess.run(
        [sys.executable, "-m", "sparsec", "compile", str(model), "-o", str(place), "--max-length", "40"], check=True
    )
    return place


def test_compile_and_run(artifact: Path, model: Path, sparsec: Run) -> None:
    prompt = tiny.ids(1, 6)
    found = sparsec("run", artifact, "--prompt-ids", ",".join(map(str, prompt[0].tolist())), "-n", 8, "--json")
    assert found.status == 0, found.err
    expected = tiny.model("mixtral").generate(prompt, max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    assert json.loads(found.out)["tokens"] == expected


@pytest.mark.slow
def test_several_devices(model: Path, sparsec: Run, tmp_path: Path) -> None:
    """A text and an artifact for several devices, its accounts, and that one process cannot run it."""
    text, placed = tmp_path / "lower.sparsec", tmp_path / "placed.sparsec"
    found = sparsec("compile", model, "--devices", "2x2", "--dispatch", "node", "--to", "lower", "-o", text)
    assert found.status == 0, found.err
    assert 'dedup = "node"' in text.read_text() and "dist.combine_wait" in text.read_text()
    assert sparsec("compile", model, "--devices", "2x2", "--dispatch", "node", "-o", placed).status == 0
    assert len(list(placed.glob("weights/ranks/*"))) == 4
    accounts = json.loads(sparsec("info", placed, "--json").out)
    assert accounts["placed"]["devices"] == 4 and accounts["placed"]["slots"] == 1 and accounts["moe_layers"] == 2
    found = sparsec("run", placed, "--prompt-ids", "3,4")
    assert found.status == 1 and "torchrun --nproc-per-node 4" in found.err.replace("\n", " ")
    again = sparsec("compile", text, "--weights", placed, "-o", tmp_path / "again.sparsec")
    assert again.status == 0, again.err
    for file in placed.glob("weights/**/*.safetensors"):
        assert (tmp_path / "again.sparsec" / file.relative_to(placed)).read_bytes() == file.read_bytes()
    found = sparsec("compile", text, "--devices", "4", "--weights", placed, "-o", tmp_path / "x.sparsec")
    assert found.status == 1 and "experts are placed already: go on from 'raise'" in found.err.replace("\n", " ")
    assert sparsec("run", placed, "--prompt-ids", "3", "--prompt-ids", "4").status == 2


def test_check(model: Path, sparsec: Run) -> None:
    found = sparsec("check", model, "--tokens", "1,5", "--json")
    assert found.status == 0, found.err
    report = json.loads(found.out)
    assert report["ok"] and {c["what"] for c in report["comparisons"]} == {"route", "experts", "output"}


def test_check_low_precision(model: Path, sparsec: Run) -> None:
    assert sparsec("check", model, "--tokens", "9", "--dtype", "bf16").status == 0


def test_check_fails_beyond_tolerance(model: Path, sparsec: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.runtime import executor
    from sparsec.runtime.backends import bind as right

    def wrong(*args: Any) -> Any:
        kernel = right(*args)
        return lambda ins: [result * 1.001 if result.is_floating_point() else result for result in kernel(ins)]

    monkeypatch.setattr(executor, "bind", wrong)
    found = sparsec("check", model, "--tokens", "3")
    assert found.status == 1 and "exceed their bound" in found.err


def test_phases_by_text(model: Path, artifact: Path, tmp_path: Path, sparsec: Run) -> None:
    fused, lowered, again = tmp_path / "fuse.sparsec", tmp_path / "lower.sparsec", tmp_path / "again.sparsec"
    assert sparsec("compile", model, "--to", "fuse", "-o", fused, "--max-length", 40).status == 0
    assert "moe.layer" in fused.read_text()
    assert sparsec("compile", fused, "--to", "lower", "-o", lowered).status == 0
    assert "kernel.launch" in lowered.read_text()
    assert sparsec("compile", fused, "--weights", artifact, "-o", again).status == 0
    first, second = (sparsec("run", path, "--prompt-ids", "5,6,7", "--json") for path in (artifact, again))
    assert json.loads(first.out)["tokens"] == json.loads(second.out)["tokens"]


def test_opt_reads_and_writes_text(model: Path, tmp_path: Path, sparsec: Run) -> None:
    captured = tmp_path / "capture.sparsec"
    assert sparsec("compile", model, "--to", "capture", "-o", captured, "--no-cache").status == 0
    found = sparsec("opt", captured, "--passes", "canonicalize,cse,dce,raise-route")
    assert found.status == 0 and "moe.route(" in found.out
    generic = sparsec("opt", captured, "--passes", "dce", "--generic")
    assert '"moe.experts"(' in generic.out


def test_dump(model: Path, tmp_path: Path, sparsec: Run) -> None:
    assert (
        sparsec("compile", model, "--to", "lower", "-o", tmp_path / "l.sparsec", "--dump", tmp_path / "d").status == 0
    )
    (run,) = (tmp_path / "d").iterdir()
    names = {path.name for path in run.iterdir()}
    assert {"manifest.json", "00-capture.sparsec"} <= names and any(name.endswith(".diff") for name in names)


def test_info(model: Path, artifact: Path, sparsec: Run) -> None:
    found = json.loads(sparsec("info", model, "--json").out)
    assert found["total"] == sum(p.numel() for p in tiny.model("mixtral").parameters())
    assert found["routed"][0]["experts"] == 4 and found["routed"][0]["k"] == 2
    held = json.loads(sparsec("info", artifact, "--json").out)
    assert (held["total"], held["active"]) == (found["total"], found["active"])


def test_factory(tmp_path: Path, sparsec: Run) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import tiny\n"
        "def factory():\n"
        "    return tiny.model('olmoe').model.layers[0].mlp, (torch.randn(2, 5, 32),)\n"
    )
    found = sparsec("compile", f"{tmp_path}/mine.py:factory", "-o", tmp_path / "mine")
    assert found.status == 0, found.err
    assert open_artifact(tmp_path / "mine.sparsec").target == "cpu"


def test_targets(sparsec: Run) -> None:
    rows = json.loads(sparsec("targets", "--json").out)
    assert {"cpu", "cuda:sm_90", "hip:gfx942"} <= {row["target"] for row in rows}
    assert next(row for row in rows if row["target"] == "cpu")["runs_here"]


def test_targets_say_how_experts_run_on_the_cpu(sparsec: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = next(row for row in json.loads(sparsec("targets", "--json").out) if row["target"] == "cpu")
    assert set(cpu["builds"]) <= set(cpu["isas"])
    runner = f"native code for {cpu['builds'][0]}" if cpu["builds"] else "PyTorch's oneDNN: "
    assert f"experts on cpu: {runner}" in sparsec("targets").out
    monkeypatch.setenv("SPARSEC_CXX", str(tmp_path / "none"))
    assert "experts on cpu: PyTorch's oneDNN: " in sparsec("targets").out


def test_info_says_who_runs_the_kernels(artifact: Path, sparsec: Run) -> None:
    notes = json.loads(sparsec("info", artifact, "--json").out)["notes"]
    assert any("run by native code for" in note or "run by PyTorch's oneDNN" in note for note in notes), notes


# What it says of bad input. Nothing may be left behind.


def test_a_folder_without_config(tmp_path: Path, sparsec: Run) -> None:
    found = sparsec("compile", tmp_path, "-o", tmp_path / "x")
    assert found.status == 1 and "has no config.json" in found.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_weights(model: Path, tmp_path: Path, sparsec: Run) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    found = sparsec("compile", tmp_path, "-o", tmp_path / "x")
    assert found.status == 1 and "no weights" in found.err and "--random-weights" in found.err
    assert sparsec("compile", tmp_path, "-o", tmp_path / "x", "--random-weights", "--dtype", "bf16").status == 0


def test_a_dense_model(tmp_path: Path, sparsec: Run) -> None:
    import transformers as t

    sizes = {k: v for k, v in tiny.SIZES.items() if "expert" not in k}
    t.LlamaForCausalLM(t.LlamaConfig(**sizes, intermediate_size=48)).save_pretrained(tmp_path / "dense")
    found = sparsec("compile", tmp_path / "dense", "-o", tmp_path / "x")
    assert found.status == 1 and "error: dense is dense" in found.err
    assert not (tmp_path / "x.sparsec").exists()


@pytest.mark.parametrize(
    "command", [("compile", "nowhere", "-o", "x"), ("info", "nowhere"), ("run", "nowhere.sparsec")]
)
def test_what_is_not_there(command: tuple[str, ...], tmp_path: Path, sparsec: Run, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    extra = ("--prompt-ids", "1") if command[0] == "run" else ()
    found = sparsec(*command, *extra)
    assert found.status == 1 and "nowhere" in found.err


def test_a_wrong_command_line(sparsec: Run, artifact: Path) -> None:
    assert sparsec("compile").status == 2
    assert sparsec("run", artifact).status == 2
    assert sparsec("check", artifact, "--tokens", "a").status == 2


@pytest.mark.parametrize("tokens", ["0", "-3", "4,0"])
def test_token_counts_that_are_none(tokens: str, model: Path, sparsec: Run) -> None:
    found = sparsec("check", model, "--tokens", tokens)
    assert found.status == 2 and "from 1 on" in found.err


@pytest.mark.parametrize("ids", ["64", "3,1000000", str(1 << 70), "-1"])
def test_token_ids_that_are_none(ids: str, artifact: Path, sparsec: Run) -> None:
    found = sparsec("run", artifact, "--prompt-ids", ids)
    assert found.status == 1 and "token id" in found.err and not found.out.strip()


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("import nowhere\n", "No module named 'nowhere'"),
        ("def f(:\n", "SyntaxError"),
        ("def f():\n    raise ValueError('boom')\n", "users.py:2: error"),
        ("def f():\n    raise SystemExit(3)\n", "SystemExit: 3"),
        ("def f(x):\n    return x\n", "missing 1 required positional argument"),
    ],
)
def test_a_factory_that_raises(factory: str, said: str, tmp_path: Path, sparsec: Run) -> None:
    (tmp_path / "users.py").write_text(factory)
    found = sparsec("compile", f"{tmp_path / 'users.py'}:f", "-o", tmp_path / "x")
    assert found.status == 1 and said in found.err
    assert not (tmp_path / "x.sparsec").exists()


@pytest.mark.parametrize(("damage", "said"), [("cut", "cannot be read"), ("lack", "lack lm_head.weight"), ("size", "")])
def test_weights_that_do_not_fit(damage: str, said: str, tmp_path: Path, sparsec: Run) -> None:
    from safetensors.torch import load_file, save_file

    place = tiny.folder(tmp_path)
    file = place / "model.safetensors"
    tensors = load_file(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "lack":
        save_file({name: tensors[name] for name in tensors if name != "lm_head.weight"}, file, {"format": "pt"})
    else:
        save_file({**tensors, "lm_head.weight": torch.zeros(65, 32)}, file, {"format": "pt"})
    found = sparsec("compile", place, "-o", tmp_path / "x", "--max-length", 8)
    assert found.status == 1 and f"the weights in {place} {said}" in found.err
    assert not (tmp_path / "x.sparsec").exists()


def test_a_configuration_that_is_none(tmp_path: Path, sparsec: Run) -> None:
    place = tiny.folder(tmp_path)
    config = json.loads((place / "config.json").read_text())
    for change, said in ({"hidden_size": "x"}, "cannot read"), ({"hidden_act": "nowhere"}, "'nowhere'"):
        (place / "config.json").write_text(json.dumps({**config, **change}))
        found = sparsec("compile", place, "-o", tmp_path / "x", "--random-weights")
        assert found.status == 1 and said in found.err


@pytest.mark.parametrize("output", [".", "/"])
def test_an_output_without_a_name(output: str, model: Path, sparsec: Run) -> None:
    found = sparsec("compile", model, "-o", output, "--max-length", 8)
    assert found.status == 1 and "no name for an artifact" in found.err


def test_a_text_to_standard_output_and_to_a_folder(model: Path, tmp_path: Path, sparsec: Run) -> None:
    found = sparsec("compile", model, "--to", "capture", "-o", "-", "--no-cache")
    assert found.status == 0 and found.out.startswith("module {") and not Path("-").exists()
    (tmp_path / "text").write_text(found.out)
    found = sparsec("opt", tmp_path / "text", "--passes", "dce", "-o", tmp_path)
    assert found.status == 1 and f"{tmp_path}: Is a directory" in found.err


def test_bytes_that_are_no_text(tmp_path: Path, sparsec: Run) -> None:
    (tmp_path / "x.sparsec").write_bytes(bytes(range(256)))
    for command in (
        ("compile", tmp_path / "x.sparsec", "--to", "fuse", "-o", tmp_path / "y"),
        ("opt", tmp_path / "x.sparsec"),
    ):
        found = sparsec(*command)
        assert found.status == 1 and "no UTF-8" in found.err


def test_opt_list_needs_no_text(sparsec: Run) -> None:
    assert "raise-route" in sparsec("opt", "--list").out
    assert sparsec("opt").status == 2


def test_what_sparsec_made_is_no_model(artifact: Path, sparsec: Run) -> None:
    found = sparsec("check", artifact)
    assert found.status == 1 and "made by sparsec" in found.err


def test_a_typo_in_a_text(tmp_path: Path, sparsec: Run) -> None:
    text = 'module {phase = "fuse"}\n\nfunc @main(%x: tensor<2xf32>) -> (tensor<2xf32>) {\n'
    text += "  %y = moe.rout(%x) : tensor<2xf32>\n  return %y\n}\n"
    (tmp_path / "typo.sparsec").write_text(text)
    found = sparsec("opt", tmp_path / "typo.sparsec", "--passes", "dce")
    assert found.status == 1
    assert "typo.sparsec:4:8" in found.err and "^" in found.err and "did you mean 'moe.route'" in found.err


@pytest.mark.parametrize("damage", ["flip", "truncate", "version", "target"])
def test_a_damaged_artifact(damage: str, artifact: Path, tmp_path: Path, sparsec: Run) -> None:
    import hashlib
    import shutil

    copy = tmp_path / "copy.sparsec"
    shutil.copytree(artifact, copy)
    if damage in ("flip", "truncate"):
        weights = next((copy / "weights").iterdir())
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw if damage == "flip" else raw[:-8])
    else:
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["version" if damage == "version" else "target"] = 999 if damage == "version" else "cuda:sm_90"
        raw_manifest = json.dumps(manifest).encode()
        (copy / "manifest.json").write_bytes(raw_manifest)
        (copy / "manifest.sha256").write_bytes(hashlib.sha256(raw_manifest).hexdigest().encode() + b"\n")
    found = sparsec("run", copy, "--prompt-ids", "1,2")
    said = {"flip": "damaged", "truncate": "damaged", "version": "update sparsec", "target": "sm_90"}
    assert found.status == 1 and said[damage] in found.err


def test_a_prompt_that_is_too_long(artifact: Path, sparsec: Run) -> None:
    found = sparsec("run", artifact, "--prompt-ids", ",".join(["3"] * 50))
    assert found.status == 1 and "40 positions" in found.err


def test_a_full_disk(model: Path, tmp_path: Path, sparsec: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.codegen import artifact as writer

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_shard", full)
    found = sparsec("compile", model, "-o", tmp_path / "x", "--max-length", 8)
    assert found.status == 1 and "No space left" in found.err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(model: Path, tmp_path: Path) -> None:
    # A shell that runs the tests in the background makes its children deaf to Ctrl-C: have this one listen.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import sparsec.__main__"
    command = [sys.executable, "-c", listen, "compile", str(model), "-o", str(tmp_path / "x.sparsec")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    while "capture" not in process.stderr.readline():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "interrupted" in said
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_the_artifact_are_those_of_the_model(artifact: Path) -> None:
    weights = open_artifact(artifact).weights
    for name, tensor in tiny.model("mixtral").state_dict().items():
        if name in weights:
            assert torch.equal(weights[name], tensor)
        else:
            parts = 2 if name.endswith("gate_up_proj") else 1
            tiles = weights[f"derived/{name}.tiles"]
            assert torch.equal(unpack(tiles, None, "tiles", parts, *tensor.shape[1:]), tensor)
