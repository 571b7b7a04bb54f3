"""Adapters for peers: what they take from a folder, and what they say where it lacks something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.device import Rehearsal
from benchmarks.gpu.engines import PEERS, Missing, Setting, makers
from benchmarks.gpu.peers import vllm
from benchmarks.shapes import Shape, bank

pytest.importorskip("transformers")
pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
H100 = "NVIDIA H100 80GB HBM3"


def test_kernels_in_their_place_are_right() -> None:
    """In a process of its own, in which Triton interprets."""
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-o", "python_files=check_*.py", "tests/benchmarks/check_peer_kernels.py"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "passed" in done.stdout


def test_without_files_peers_are_missing(tmp_path: Path) -> None:
    shape = Shape.parse("4x64x32x1")
    for folder, why in ((None, "its files were not given"), (tmp_path, "DIR has no folder")):
        made = makers(Setting(shape, bank(shape), Rehearsal(), folder))
        for name in PEERS[2:]:
            with pytest.raises(Missing, match=why):
                made[name]()


def test_configurations_of_vllm(tmp_path: Path) -> None:
    """The chip's own file; else that of the chip that is most like it; else none."""
    folder = tmp_path / "configs"
    folder.mkdir()
    own, other = {"1": {"BLOCK_SIZE_M": 16}, "64": {"BLOCK_SIZE_M": 64}}, {"triton_version": "3.5", "8": {}}
    (folder / "E=8,N=32,device_name=NVIDIA_H100_80GB_HBM3.json").write_text(json.dumps(own))
    (folder / "E=8,N=64,device_name=NVIDIA_H200.json").write_text(json.dumps(other))
    assert vllm.tuned_configs(tmp_path, 8, 32, H100) == (
        "file of NVIDIA_H100_80GB_HBM3", {1: {"BLOCK_SIZE_M": 16}, 64: {"BLOCK_SIZE_M": 64}}
    )  # fmt: skip
    assert vllm.tuned_configs(tmp_path, 8, 64, H100) == ("file of NVIDIA_H200", {8: {}})
    assert vllm.tuned_configs(tmp_path, 8, 96, H100) is None


def test_vllm_is_called_as_its_own_code_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that imports what vLLM's does, and looks its configuration up as it does."""
    folder = tmp_path / "vllm"
    folder.mkdir()
    (folder / "fused_moe.py").write_text(
        "import vllm.envs as envs\n"
        "import vllm.model_executor.layers.fused_moe.modular_kernel as mk\n"
        "from vllm import _custom_ops as ops\n"
        "from vllm.model_executor.layers.fused_moe.activation import MoEActivation\n"
        "from vllm.platforms import current_platform\n"
        "def get_moe_configs(*args): raise AssertionError\n"
        "def fused_experts_impl(x, w1, w2, weights, ids):\n"
        "    from vllm.model_executor.layers.fused_moe import get_config\n"
        "    assert get_moe_configs(1) is None and not current_platform.is_rocm()\n"
        "    assert mk.FusedMoEExpertsModular.adjust_N_for_activation(64, MoEActivation.SILU) == 32\n"
        "    return x if get_config() is None else x * get_config()['BLOCK_SIZE_M']\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *args: H100)
    (folder / "configs").mkdir()
    config = {"1": {"BLOCK_SIZE_M": 2}, "64": {"BLOCK_SIZE_M": 3}}
    (folder / "configs" / "E=4,N=32,device_name=NVIDIA_H100_80GB_HBM3.json").write_text(json.dumps(config))
    shape = Shape.parse("4x64x32x1")
    setting = Setting(shape, bank(shape), Rehearsal(), tmp_path)
    case = SimpleNamespace(x=bank(shape).down_proj[0, :5, :].float())
    tuned, default = vllm.engine(setting, tuned=True), vllm.engine(setting, tuned=False)
    ids: object = None
    for tokens, factor in ((1, 2), (5, 2)):
        x = case.x[:tokens]
        assert (tuned.run(x, ids, ids) == factor * x).all()  # type: ignore[arg-type]
        assert (default.run(x, ids, ids) == x).all()  # type: ignore[arg-type]
    assert tuned.path(1).startswith("file of NVIDIA_H100_80GB_HBM3; its align and sum by this benchmark")
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter takes is more than what the compiler takes."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.gpu.peers import kernels

    i32, bf16 = "*i32", "*bf16"
    blocks = {"E": 12, "BINS": 16, "SIZE": 32, "COUNTED": False, "BLOCK": 1024}
    entries: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "_silu_and_mul": ({"wide": bf16, "out": bf16}, {"WIDTH": 96, "BLOCK": 1024}),
        "_sum": ({"parts": bf16, "out": bf16}, {"K": 4, "H": 200, "BLOCK": 1024}),
        "_count": ({"ids": i32, "counts": i32, "PAIRS": "i32"}, {"BLOCK": 256}),
        "_blocks": (
            {**dict.fromkeys(("ids", "counts", "starts", "rows", "owners", "total"), i32), "PAIRS": "i32"}, blocks
        ),
        "_place": ({"ids": i32, "starts": i32, "rows": i32, "PAIRS": "i32"}, {"BLOCK": 256}),
    }  # fmt: skip
    cache: Any = knobs.cache
    with cache.scope():
        cache.dir = str(tmp_path)
        for name, (types, constants) in entries.items():
            signature = {**types, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(getattr(kernels, name), signature, constexprs=constants)
            made: Any = compile(source, target=GPUTarget("cuda", 90, 32))
            assert made.asm["cubin"]
