"""The machine's compiler: found, run, stopped, and its work kept."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsec.codegen.cpu import compiler
from sparsec.codegen.cpu.compiler import CompilerFailed, NoCompiler
from sparsec.diagnostics import CompileError
from sparsec.runtime import code_cache
from sparsec.runtime import isa as processor
from tests.codegen.cpu import scaler

pytestmark = pytest.mark.skipif(not compiler.isas(), reason="there is no C++ compiler for x86-64 here")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A cache of the test's own, and nothing known to the process."""
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(code_cache, "_made", set[str]())
    monkeypatch.setattr(code_cache, "_said", set[str]())
    yield tmp_path / "cache"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are compiled, as opposed to found."""
    seen, real = list[str](), compiler._compile

    def spy(found: compiler.Compiler, source: str, options: tuple[str, ...]) -> bytes:
        seen.append(source)
        return real(found, source, options)

    monkeypatch.setattr(compiler, "_compile", spy)
    return seen


def script(place: Path, body: str) -> str:
    """A program that says it is a compiler and then does something else."""
    answers = f"--version) echo mine 1;; -dumpmachine) echo x86_64-x;; *) {body};;"
    place.write_text(f'#!/bin/sh\nfor last; do :; done\ncase "$last" in {answers} esac\n')
    place.chmod(0o700)
    return str(place)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_builds_once_and_the_same_bytes_again(
    cache: Path, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scaler.source()
    first = compiler.build(source, "avx2")
    assert first.startswith(b"\x7fELF")
    assert compiler.build(source, "avx2") == first
    assert len(runs) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in cache.iterdir())
    assert not list(cache.glob(".*"))
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path / "other"))
    assert compiler.build(source, "avx2") == first
    assert len(runs) == 2


def test_source_isa_and_compiler_make_other_entries(
    cache: Path, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.build(scaler.source(), "avx2")
    compiler.build(scaler.source(), "avx512")
    compiler.build(scaler.source(extra="1"), "avx2")
    real = compiler.find().command[0]
    other = tmp_path / "my-c++"
    other.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo other 1; else exec {real} "$@"; fi\n')
    other.chmod(0o700)
    monkeypatch.setenv("SPARSEC_CXX", str(other))
    assert compiler.find().version == "other 1"
    compiler.build(scaler.source(), "avx2")
    assert len(runs) == len(list(cache.glob("*.key"))) == 4


def test_all_instruction_sets_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler.build_all(scaler.source())
    assert tuple(made) == compiler.isas()
    assert all(code_cache.made_here(hashlib.sha256(content).hexdigest()) for content in made.values())
    best = next(name for name in processor.allowed() if name in made)
    assert compiler.build_best(scaler.source()) == {best: made[best]}
    monkeypatch.setenv("SPARSEC_ISAS", "avx2,avx512")
    assert set(compiler.build_all(scaler.source())) == {"avx2", "avx512"} & set(compiler.isas())


def test_many_at_once_use_one_cache(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda i: compiler.build(scaler.source(), "avx2"), range(4)))) == 1
    assert {file.suffix for file in cache.iterdir()} == {".key", ".so"}


@pytest.mark.parametrize("what", ["flipped", "cut", "longer", "oversized", "key"])
def test_a_damaged_entry_is_made_again(
    what: str, cache: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiler.build(scaler.source(), "avx2")
    entry = only(cache, "*.so")
    damaged = {
        "flipped": first[:-1] + bytes([first[-1] ^ 1]),
        "cut": first[:100],
        "longer": first + b"\0",
        "oversized": first,
        "key": first,
    }
    entry.write_bytes(damaged[what])
    if what == "oversized":
        monkeypatch.setattr(code_cache, "MAX_LIBRARY", len(first) - 1)
    if what == "key":
        only(cache, "*.key").write_bytes(b"../../../../etc/passwd")
    assert compiler.build(scaler.source(), "avx2") == first
    assert len(runs) == 2


def test_a_link_in_the_cache_is_not_followed(cache: Path, runs: list[str], tmp_path: Path) -> None:
    first = compiler.build(scaler.source(), "avx2")
    entry = only(cache, "*.so")
    entry.rename(tmp_path / "elsewhere.so")
    entry.symlink_to(tmp_path / "elsewhere.so")
    assert compiler.build(scaler.source(), "avx2") == first
    assert len(runs) == 2
    assert not entry.is_symlink()


def test_a_folder_that_others_can_write_to_is_refused(
    cache: Path, runs: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiler.build(scaler.source(), "avx2")
    cache.chmod(0o770)
    assert compiler.build(scaler.source(), "avx2") == made
    compiler.build(scaler.source(), "avx2")
    assert len(runs) == 3
    assert [record.message for record in caplog.records] == [
        f"compiled kernels are not kept: others can write to {cache}: chmod go-w {cache}"
    ]
    digest = hashlib.sha256(made).hexdigest()
    assert code_cache.made_here(digest)  # this process made it
    monkeypatch.setattr(code_cache, "_made", set[str]())
    assert not code_cache.made_here(digest)
    cache.chmod(0o700)
    assert code_cache.made_here(digest)


def test_a_folder_of_somebody_else_is_refused(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.build(scaler.source(), "avx2")
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    compiler.build(scaler.source(extra="1"), "avx2")
    assert "belongs to another user" in caplog.text


def test_a_cache_that_cannot_be_made_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path / "file" / "cache"))
    assert compiler.build(scaler.source(), "avx2").startswith(b"\x7fELF")
    assert "compiled kernels are not kept" in caplog.text


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert code_cache.folder() == tmp_path / "x" / "sparsec" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert code_cache.folder() == tmp_path / ".cache" / "sparsec" / "kernels"


@pytest.mark.parametrize("digest", ["", "0" * 63, "../" + "0" * 61, "0" * 64, "A" * 64])
def test_what_was_not_made_here(digest: str) -> None:
    compiler.build(scaler.source(), "avx2")
    assert not code_cache.made_here(digest)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("SPARSEC_CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompiler, match=r"none of g\+\+, c\+\+, clang\+\+ is on the path"):
        compiler.build(scaler.source(), "avx2")
    assert compiler.isas() == ()


@pytest.mark.parametrize("value", ["/nowhere/g++", "g++ '", "false"])
def test_a_compiler_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CXX", value)
    with pytest.raises(NoCompiler, match="SPARSEC_CXX="):
        compiler.find()


def test_variables_choose_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSEC_CXX", raising=False)
    monkeypatch.setenv("CXX", script(tmp_path / "a", "exit 1") + " -one '-two three'")
    assert compiler.find().command == (str(tmp_path / "a"), "-one", "-two three")
    monkeypatch.setenv("SPARSEC_CXX", script(tmp_path / "b", "exit 1"))
    assert compiler.find() == compiler.Compiler((str(tmp_path / "b"),), "mine 1", "x86_64-x")


def test_a_source_that_is_wrong() -> None:
    with pytest.raises(CompilerFailed) as caught:
        compiler.build("int f() {\n  return nothing;\n}\n" + "unknown();\n" * 100, "avx2")
    assert isinstance(caught.value, CompileError)
    assert "failed with status 1" in str(caught.value)
    assert "kernel.cpp:2:10: error: 'nothing' was not declared" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= compiler.MESSAGE_LINES + 1


def test_symbols_that_nobody_defines_are_found_when_linking() -> None:
    with pytest.raises(CompilerFailed, match="undefined reference to `nowhere"):
        compiler.build('int nowhere();\nextern "C" int sparsec_run() { return nowhere(); }\n', "avx2")


FAILURES = {"exit 3": "status 3", "kill -9 $$": "status -9", "exit 0": "status 0"}


@pytest.mark.parametrize(("body", "message"), FAILURES.items())
def test_a_compiler_that_fails(body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CXX", script(tmp_path / "cxx", body))
    with pytest.raises(CompilerFailed, match=message):
        compiler.build("", "avx2")
    assert compiler.isas() == ()


def test_a_compiler_that_hangs_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_CXX", script(tmp_path / "cxx", f"sleep 60 & echo $! > {tmp_path}/child; wait"))
    monkeypatch.setattr(compiler, "TIMEOUT", 0.5)
    begin = time.monotonic()
    with pytest.raises(CompilerFailed, match=r"did not end in 0\.5 seconds"):
        compiler.build("", "avx2")
    assert time.monotonic() - begin < 20
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    for _ in range(100):
        if not child.exists() or ") Z " in child.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the compiler's child still runs")


def test_another_machine_has_no_instruction_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cross"
    place.write_text("#!/bin/sh\necho aarch64-linux-gnu\n")
    place.chmod(0o700)
    monkeypatch.setenv("SPARSEC_CXX", str(place))
    assert compiler.isas() == ()
    assert compiler.build_all(scaler.source()) == {}


def test_libraries_need_no_cpp_runtime_and_export_the_two_functions_only(tmp_path: Path) -> None:
    content = compiler.build(scaler.source(), "avx2")
    assert b"libstdc++" not in content
    assert b"libgomp" not in content
    assert b"sparsec_run" in content
    assert b"sparsec_scratch" in content
