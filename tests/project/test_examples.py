"""The examples run, and so does the code in CONTRIBUTING.md, as a new engineer would follow it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- run: (\w+) -->\n```python\n(.*?)```", re.DOTALL)


def run(*command: str, cwd: Path = ROOT) -> str:
    """What a command prints; fails with its error output."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_add_a_pass() -> None:
    printed = run("examples/add_a_pass.py")
    assert "+  %centred = aten.sub.Tensor(%x, %y)" in printed
    assert "model.py:12: %mirrored has another reader" in printed
    assert "same results before and after" in printed


def test_custom_moe() -> None:
    pytest.importorskip("transformers")
    printed = run("examples/custom_moe.py")
    assert "moe.route(%linear, %router.bias)" in printed
    assert "100 tokens: equal to eager" in printed


def test_register_experts() -> None:
    printed = run("examples/register_experts.py")
    assert "moe.capacity(%ids) {num_experts = 8, capacity = 24}" in printed
    assert "200 tokens: equal to eager" in printed
    assert "torch.compile: equal too" in printed


def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed = run(str(ROOT / "examples" / "demo.py"), cwd=tmp_path)
    assert "are those of transformers' greedy search" in printed
    assert (tmp_path / "out" / "tinymoe.sparsec" / "plan.json").is_file()


@pytest.mark.slow
def test_expert_parallel() -> None:
    pytest.importorskip("transformers")
    printed = run("-m", "torch.distributed.run", "--nproc-per-node", "4", "examples/expert_parallel.py")
    assert printed.count("steps of moving: True") == 4


def test_the_guide_to_a_new_op(tmp_path: Path) -> None:
    """The op and its test in CONTRIBUTING.md work as they stand there."""
    blocks = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))
    assert set(blocks) == {"op", "test"}
    (tmp_path / "new_op.py").write_text(blocks["op"])
    (tmp_path / "test_new_op.py").write_text("import new_op\n" + blocks["test"])
    assert "2 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_new_op.py", cwd=tmp_path)
