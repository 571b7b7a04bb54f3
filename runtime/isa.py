"""Which instruction sets native kernels come in, and which of them this processor has."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

from sparsec.runtime.errors import ArtifactError

_V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")

ISAS = {"amx": (*_V4, "amx_tile", "amx_bf16", "amx_int8"), "avx512": _V4, "avx2": _V3}
"""Name -> what it takes, as /proc/cpuinfo spells it; best first."""

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def processor() -> tuple[str, ...]:
    """The sets that this processor and its kernel run, best first; AMX only once the kernel has allowed it."""
    return tuple(isa for isa, takes in ISAS.items() if features().issuperset(takes) and (isa != "amx" or _amx()))


def wanted() -> tuple[str, ...]:
    """The sets that native code is made for and run with: all, or those that `$SPARSEC_ISAS` lists (`avx512,avx2`).

    Raises: ArtifactError for a set that there is not.
    """
    given = os.environ.get("SPARSEC_ISAS", "").replace(",", " ").split()
    if unknown := [name for name in given if name not in ISAS]:
        raise ArtifactError(f"SPARSEC_ISAS names '{unknown[0]}': there are {', '.join(ISAS)}")
    return tuple(name for name in ISAS if not given or name in given)


def allowed() -> tuple[str, ...]:
    """The sets to choose from, best first: those of `wanted` that the processor has. Raises: ArtifactError."""
    return tuple(name for name in processor() if name in wanted())


@cache
def features() -> frozenset[str]:
    """What Linux says that the processor can do and that it saves the registers of; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((value.split() for key, _, value in lines if key.strip() == "flags"), ()))


@cache
def huge_pages() -> str:
    """Whether memory can lie in huge pages: `always`, `madvise`, `never`, or "" where the kernel does not say."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return ""
    return next((word[1:-1] for word in text.split() if word.startswith("[")), "")


def _amx() -> bool:
    """Ask the kernel to save the tile registers of this process's threads; it may refuse."""
    if platform.machine() != "x86_64":
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    arguments = (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return bool(syscall(*map(ctypes.c_long, arguments)) == 0)
