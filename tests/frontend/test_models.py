"""Models by name."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsec import cli
from sparsec.diagnostics import CompileError
from sparsec.frontend.capture import capture
from sparsec.frontend.models import describe_absence, load_model
from sparsec.runtime.artifact import open_artifact
from sparsec.runtime.blocks import find_scales, pack
from tests.frontend.helpers import mixtral, randomised, token_ids

FACTORY = """
import torch

def make():
    return torch.nn.Linear(3, 4), torch.randn(2, 3)

def wrong():
    return torch.nn.Linear(3, 4)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the configuration of a model and no weights."""
    model = mixtral()
    model.config.architectures = ["MixtralForCausalLM"]
    model.config.save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def test_a_folder_with_weights(folder: Path) -> None:
    model = mixtral()
    model.save_pretrained(folder)
    loaded = load_model(folder)
    ids = token_ids(1, 4)
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.name == folder.name
    assert next(load_model(folder, dtype=torch.bfloat16).model.parameters()).dtype is torch.bfloat16


def test_random_weights_are_always_the_same(folder: Path) -> None:
    first, second = (load_model(folder, random_weights=True, dtype=torch.bfloat16).model for _ in range(2))
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.dtype is torch.bfloat16 for a, b in pairs)
    assert any(a.float().std() > 0 for a, _ in pairs)


def test_a_model_without_memory(folder: Path) -> None:
    loaded = load_model(folder, meta=True)
    captured = capture(loaded.model, loaded.args, loaded.kwargs)
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"meta"}
    assert describe_absence(captured.module) is None


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, r"no weights.*\n.*--random-weights"),
        ({"architectures": ["NobodyForCausalLM"]}, "no architecture 'NobodyForCausalLM'"),
        ({"model_type": "nobody"}, "of model type 'nobody'"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder: Path, entries: dict[str, object], said: str) -> None:
    change(folder, **entries)
    with pytest.raises(CompileError, match=said):
        load_model(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CompileError, match="pickled ones, which are not read"):
        load_model(folder)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere", "no model nowhere"),
        ("nowhere.pt2", "no file nowhere.pt2"),
        ("nowhere.py:make", "no file nowhere.py"),
        ("nowhere.py", "does not say what makes the model"),
    ],
)
def test_what_is_not_there_is_said(spec: str, said: str) -> None:
    with pytest.raises(CompileError, match=said):
        load_model(spec)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"no config\.json"):
        load_model(tmp_path)


def test_a_factory(tmp_path: Path) -> None:
    file = tmp_path / "factory_of_test_models.py"
    file.write_text(FACTORY)
    loaded = load_model(f"{file}:make")
    assert isinstance(loaded.model, nn.Linear)
    assert [tuple(arg.shape) for arg in loaded.args] == [(2, 3)]
    with pytest.raises(CompileError, match="it has: make, wrong"):
        load_model(f"{file}:other")
    with pytest.raises(CompileError, match="returned a Linear"):
        load_model(f"{file}:wrong")


def test_an_exported_program(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 4), (torch.randn(2, 3),), strict=False)
    torch.export.save(program, tmp_path / "linear.pt2")
    loaded = load_model(tmp_path / "linear.pt2")
    assert isinstance(loaded.model, torch.export.ExportedProgram)
    warning = describe_absence(capture(loaded.model).module, loaded.name)
    assert warning is not None
    assert warning.message.startswith("linear is dense: 1 linear layers")


def rewritten(source: Path, target: Path, old: str, new: str) -> None:
    """A copy of an archive in which `old` stands for `new` in its JSON files."""
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as write:
        for name in read.namelist():
            data = read.read(name)
            if name.endswith(".json"):
                assert name.endswith("config.json") or old.encode() in data or "expr_str" not in new
                data = data.replace(old.encode(), new.encode())
            write.writestr(name, data)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"use_pickle": false', '"use_pickle": true', "is pickled"),
        ("Symbol('", "__import__('os').system('", "a size in it is"),
    ],
)
def test_programs_with_code_in_them_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(nn.Linear(3, 4), (torch.randn(2, 3),), dynamic_shapes=dynamic, strict=False)
    torch.export.save(program, tmp_path / "good.pt2")
    load_model(tmp_path / "good.pt2")
    rewritten(tmp_path / "good.pt2", tmp_path / "bad.pt2", old, new)
    with pytest.raises(CompileError, match=said):
        load_model(tmp_path / "bad.pt2")


def test_no_archive_at_all(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(CompileError, match="no exported program"):
        load_model(tmp_path / "text.pt2")


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "model"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_how_a_checkpoint_holds_its_weights(folder: Path, config: dict[str, object], stored: str) -> None:
    assert load_model(folder, meta=True).stored == "model"
    change(folder, quantization_config=config)
    assert load_model(folder, meta=True).stored == stored


def test_a_checkpoint_in_fp8_stays_so_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts' values come back bit by bit, though transformers widens them to bf16."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    model = randomised(transformers.MixtralForCausalLM(config)).bfloat16()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    given = dict[str, torch.Tensor]()
    for name, weight in load_file(file).items():
        if ".experts." in name:
            scales = find_scales(weight[None])
            given[name], given[f"{name}_scale_inv"] = pack(weight[None], scales)[0], scales[0]
        else:
            given[name] = weight
    save_file(given, file, metadata={"format": "pt"})
    skipped = ["lm_head", *(f"model.layers.{i}.self_attn" for i in range(8))]
    change(tmp_path / "model", quantization_config={
        "quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": skipped,
    })  # fmt: skip
    command = ["sparsec", "compile", str(tmp_path / "model"), "-o", str(tmp_path / "made"), "--target", "cuda:sm_90"]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    made = open_artifact(tmp_path / "made.sparsec")
    assert made.manifest["weights"] == "fp8"
    (down,) = [n for n in made.weights if n.endswith("layers.0.mlp.experts.down_proj.fp8")]
    (source,) = [n for n in given if n.endswith("layers.0.block_sparse_moe.experts.1.w2.weight")]
    assert torch.equal(made.weights[down][1].view(torch.uint8), given[source].view(torch.uint8))
