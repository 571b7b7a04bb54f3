"""What Hopper's matrix instruction needs beside being there: nobody waits for each one, and loads run ahead of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from sparsec.codegen.triton.compile import Binary


def serialised(binary: Binary) -> list[str]:
    """What ptxas says where it waits for every wgmma of a loop, since registers of its sums are touched in between."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "ptxas"
    if not tool.is_file():
        pytest.skip("Triton comes without ptxas here")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "kernel.ptx")
        text.write_text(binary.assembly, encoding="utf-8")
        command: list[str | Path] = [tool, "-v", "--gpu-name=sm_90a", text, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in (said.stdout + said.stderr).splitlines() if "serialized" in line]


def under_way(binary: Binary) -> tuple[int, int]:
    """The most products that a loop leaves under way while it goes on, and the most asynchronous copies of rows."""
    products = re.findall(r"ttng\.warp_group_dot_wait .*pendings = (\d+)", binary.ttgir)
    copies = re.findall(r"ttg\.async_wait .*num = (\d+)", binary.ttgir)
    return max(map(int, products), default=0), max(map(int, copies), default=0)
