"""Lay out a folder of peers for `--peers DIR` from their wheels: `python -m benchmarks.gpu.gather DIR WHEEL...`.

Takes what the adapters need of vLLM's wheel (its Triton kernel, configurations, triton_kernels) and all of Liger's, a
few MB; `--operators` adds vLLM's compiled `_moe_C` (46 MB). ScatterMoE has no wheel: copy the folder `scattermoe` of
its repository to DIR.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

EXPERTS = "vllm/model_executor/layers/fused_moe"
TAKEN = (
    (re.compile(rf"{EXPERTS}/(fused_moe\.py|configs/.*\.json)"), EXPERTS, "vllm"),
    (re.compile(r"vllm/third_party/triton_kernels/.*\.py"), "vllm/third_party", ""),
    (re.compile(r"liger_kernel/.*\.py"), "", ""),
)
OPERATORS = (re.compile(r"vllm/_moe_C.*\.so"), "vllm", "vllm")


def gather(folder: Path, wheels: Sequence[Path], operators: bool = False) -> int:
    """Take out of `wheels` what the adapters need. Returns: the number of files."""
    count = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                for pattern, root, below in (*TAKEN, *([OPERATORS] if operators else [])):
                    if pattern.fullmatch(name) and ".." not in PurePosixPath(name).parts:
                        path = folder / below / PurePosixPath(name).relative_to(root)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(archive.read(name))
                        count += 1
    return count


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.gather", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--operators", action="store_true")
    options = parser.parse_args(words)
    print(f"{gather(options.folder, options.wheels, options.operators)} files in {options.folder}")


if __name__ == "__main__":
    main()
