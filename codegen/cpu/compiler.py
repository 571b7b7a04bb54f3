"""The machine's own C++ compiler, and what it has compiled before.

It is `$SPARSEC_CXX`, `$CXX`, or the first of g++, c++ and clang++ on the path. Libraries are kept by the hash of
source, flags and compiler (`sparsec.runtime.code_cache`); the flags name an instruction set, never the machine's own,
so the processor is no part of the hash.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsec.diagnostics import CompileError
from sparsec.runtime import code_cache
from sparsec.runtime import isa as isa_names
from sparsec.runtime.isa import ISAS

TIMEOUT = 300.0
"""Seconds that one run of the compiler may take."""

MESSAGE_LINES = 12
"""Lines of the compiler's message that an error shows."""

_NAMES = ("g++", "c++", "clang++")
_ARCH = {
    "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
    "avx2": ("-march=x86-64-v3",),
}
_WIDE = ("-mprefer-vector-width=512",)
_MACRO = {"amx": "__AMX_BF16__", "avx512": "__AVX512BF16__", "avx2": "__AVX2__"}
_LANGUAGE = ("-std=c++17", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-fno-strict-aliasing")
# Sums may be contracted to fused multiply-adds; nothing else about floats is loosened.
_FLOATS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_LIBRARY = ("-shared", "-fPIC", "-fvisibility=hidden", "-Wl,--as-needed", "-Wl,-z,defs,-z,now,-z,relro,-z,noexecstack")


class NoCompiler(CompileError):
    """There is no C++ compiler on this machine."""


class CompilerFailed(CompileError):
    """The C++ compiler refused a source, crashed or did not end; holds the first lines of its message."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Args:
        command: how to run it.
        version: the first line of what it says of itself.
        machine: what it compiles for (`x86_64-linux-gnu`).
    """

    command: tuple[str, ...]
    version: str
    machine: str


def find() -> Compiler:
    """The compiler, asked for its version once per process. Raises: NoCompiler."""
    chosen = next((name for name in ("SPARSEC_CXX", "CXX") if os.environ.get(name)), "")
    return _find(chosen, os.environ.get(chosen, ""), os.environ.get("PATH", ""))


def isas() -> tuple[str, ...]:
    """The instruction sets that the compiler can build for, best first; none without a compiler."""
    try:
        return _isas(find())
    except NoCompiler:
        return ()


def flags(isa: str) -> tuple[str, ...]:
    """How a library is compiled for an instruction set of `sparsec.runtime.isa`."""
    return ("-O3", *arch_flags(isa), *_LANGUAGE, *_FLOATS, *_LIBRARY)


def arch_flags(isa: str) -> tuple[str, ...]:
    """The part of the flags that depends on the instruction set."""
    return (f"-DSPARSEC_{isa.upper()}=1", *_ARCH[isa], *(() if isa == "avx2" else _WIDE))


def build(source: str, isa: str) -> bytes:
    """The shared library that a source makes for an instruction set; equal ones are compiled once per user.

    Raises: NoCompiler, CompilerFailed.
    """
    compiler = find()
    parts = (*compiler.command, compiler.version, compiler.machine, *flags(isa), source)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    content = code_cache.get(key)
    if content is None:
        content = _compile(compiler, source, flags(isa))
        code_cache.put(key, content)
    return content


def build_all(source: str) -> dict[str, bytes]:
    """The libraries of a source for all instruction sets that the compiler knows (and `$SPARSEC_ISAS` lists).

    They are made in parallel. Raises: NoCompiler, CompilerFailed.
    """
    wanted = isa_names.wanted()
    return _build(source, [isa for isa in _isas(find()) if isa in wanted])


def build_best(source: str) -> dict[str, bytes]:
    """The library for the best instruction set of this processor that the compiler knows; none if it knows none.

    Raises: NoCompiler, CompilerFailed.
    """
    known = _isas(find())
    return _build(source, [isa for isa in isa_names.allowed() if isa in known][:1])


def _build(source: str, chosen: Sequence[str]) -> dict[str, bytes]:
    with ThreadPoolExecutor(max_workers=min(len(chosen) or 1, os.cpu_count() or 1)) as pool:
        return dict(zip(chosen, pool.map(lambda isa: build(source, isa), chosen), strict=True))


@cache
def _find(variable: str, value: str, path: str) -> Compiler:
    try:
        candidates = [shlex.split(value)] if variable else [[name] for name in _NAMES]
    except ValueError:
        candidates = []
    for command in candidates:
        found = shutil.which(command[0], path=path) if command else None
        if found is None:
            continue
        full = (os.path.abspath(found), *command[1:])
        said = [run([*full, question], timeout=20) for question in ("--version", "-dumpmachine")]
        if all(status == 0 and text for status, text in said):
            version, machine = (text.splitlines()[0].strip() for _, text in said)
            return Compiler(full, version, machine)
    what = f"{variable}={value!r} runs none" if variable else f"none of {', '.join(_NAMES)} is on the path and runs"
    raise NoCompiler(f"there is no C++ compiler: {what}", hint="install g++, or set SPARSEC_CXX to a compiler")


@cache
def _isas(compiler: Compiler) -> tuple[str, ...]:
    if not compiler.machine.startswith("x86_64"):
        return ()
    ask = ("-E", "-dM", "-x", "c++", os.devnull)
    said = {isa: run([*compiler.command, *arch_flags(isa), *ask], timeout=20) for isa in ISAS}
    return tuple(isa for isa, (status, text) in said.items() if status == 0 and f"{_MACRO[isa]} 1" in text)


def _compile(compiler: Compiler, source: str, options: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        Path(folder, "kernel.cpp").write_text(source, encoding="utf-8")
        # Names without a folder: the same source makes the same bytes wherever it is compiled.
        status, text = run([*compiler.command, *options, "-o", "kernel.so", "kernel.cpp"], folder, TIMEOUT)
        made = Path(folder, "kernel.so")
        if status != 0 or not made.is_file():
            lines = text.splitlines()
            first = next((i for i, line in enumerate(lines) if "error" in line or "undefined" in line), 0)
            what = f"did not end in {TIMEOUT:g} seconds" if status is None else f"failed with status {status}"
            shown = lines[first : first + MESSAGE_LINES] if status else lines[:MESSAGE_LINES]
            raise CompilerFailed("\n  ".join([f"'{compiler.command[0]}' {what}", *shown]))
        return made.read_bytes()


def disassembled(library: bytes) -> str:
    """The assembly of a shared library, with what it calls by name; "" where there is no objdump."""
    tool = shutil.which("objdump")
    if tool is None:
        return ""
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        Path(folder, "kernel.so").write_bytes(library)
        show = ("--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text")
        status, text = run([tool, *show, "kernel.so"], folder)
    return text if status == 0 else ""


def run(command: Sequence[str], folder: str | None = None, timeout: float = TIMEOUT) -> tuple[int | None, str]:
    """Run a program without a shell: its status (None: stopped after `timeout` seconds) and all that it printed."""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a compiler has children: they are stopped with it
        )
    except OSError as error:
        return 127, f"error: {error.strerror}"
    try:
        text, _ = process.communicate(timeout=timeout)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
