"""Native kernels, by one that is written by hand: chosen, trusted, loaded, launched."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec import launch
from sparsec.codegen.cpu import compiler
from sparsec.runtime import code_cache, isa, native, native_library
from sparsec.runtime.context import Choice, Context, KernelCall
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.plan import Kernel
from sparsec.runtime.plan import Tensor as Type
from tests.codegen.cpu import scaler

pytestmark = pytest.mark.skipif(
    not set(compiler.isas()) & set(isa.processor()), reason="nothing here compiles native code that runs here"
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    place = tmp_path_factory.getbasetemp() / "native-cache"
    monkeypatch.setenv("SPARSEC_CACHE", str(place))
    threads = torch.get_num_threads()
    yield place
    torch.set_num_threads(threads)


def built(source: str = "") -> dict[str, bytes]:
    """File -> content of a kernel's libraries."""
    return {f"kernels/scaler.{name}.so": made for name, made in compiler.build_all(source or scaler.source()).items()}


def kernel(files: dict[str, bytes], tokens: int | str = "t", bias: bool = False) -> Kernel:
    return scaler.kernel({name.split(".")[1]: name for name in files}, tokens, bias)


def bound(
    files: dict[str, bytes] | None = None, tokens: int | str = "t", bias: bool = False
) -> tuple[KernelCall | None, Context]:
    files = built() if files is None else files
    context = Context(torch.device("cpu"), files, lambda slot: None)
    return native.bind(kernel(files, tokens, bias), [0, 1, 2], context), context


def ready(tokens: int | str = "t", bias: bool = False, source: str = "") -> KernelCall:
    call, context = bound(built(source), tokens, bias)
    assert call is not None, context.paths
    return call


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, scaler.WIDTH), torch.randn(scaler.WIDTH)


def check(results: Sequence[Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(results[0], expected, rtol=0, atol=0)


# ---- choosing ---------------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_taken() -> None:
    _, context = bound()
    best = next(name for name in isa.allowed() if name in compiler.isas())
    assert context.paths == {"scaler": Choice(best)}
    assert str(context.paths["scaler"]) == f"native code for {best}"


@pytest.mark.parametrize("most", ["amx", "avx512", "avx2"])
def test_every_instruction_set_that_is_here_runs(most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if most not in isa.processor() or most not in compiler.isas():
        pytest.skip(f"no {most} here")
    monkeypatch.setenv("SPARSEC_ISAS", most)
    call, context = bound()
    assert context.paths["scaler"].isa == most
    assert call is not None
    x, w = inputs(3)
    check(call([x, w, None]), x * w)


def test_an_instruction_set_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_ISAS", "avx2, sse9")
    with pytest.raises(ArtifactError, match="SPARSEC_ISAS names 'sse9': there are amx, avx512, avx2"):
        isa.allowed()


def test_without_amx_or_avx512_the_next_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = isa.features() - {"amx_tile"}
    monkeypatch.setattr(isa, "features", lambda: plain)
    isa.processor.cache_clear()
    assert "amx" not in isa.processor()
    monkeypatch.setattr(isa, "features", frozenset[str])
    isa.processor.cache_clear()
    call, context = bound()
    monkeypatch.undo()
    isa.processor.cache_clear()
    assert call is None
    assert "this processor has none of amx, avx512, avx2" in context.paths["scaler"].why


def test_amx_is_left_where_the_kernel_does_not_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx512" not in isa.processor():
        pytest.skip("no avx512 here")
    monkeypatch.setattr(isa, "_amx", lambda: False)
    isa.processor.cache_clear()
    assert isa.processor()[0] == "avx512"
    monkeypatch.undo()
    isa.processor.cache_clear()


def test_no_libraries() -> None:
    call, context = bound({})
    assert call is None
    assert context.paths["scaler"].why == "there was no C++ compiler when it was compiled"


def test_a_missing_file() -> None:
    files = built()
    with pytest.raises(ArtifactError, match="kernel 'scaler' lacks its file 'kernels/scaler"):
        native.bind(kernel(files), [0, 1, 2], Context(torch.device("cpu"), {}, lambda slot: None))


# ---- trust ------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Libraries that this user's compiler has not made."""
    files = {name: content + b"\0" for name, content in built().items()}  # an ELF file may be longer than it says
    assert not any(code_cache.made_here(hashlib.sha256(content).hexdigest()) for content in files.values())
    return files


def test_what_was_compiled_elsewhere_needs_leave(foreign: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    call, context = bound(foreign)
    assert call is None
    again = native.bind(kernel(foreign), [0, 1, 2], context)
    assert again is None
    (line,) = (record.message for record in caplog.records)  # said once
    assert line.startswith("experts run on PyTorch's oneDNN: the native code was not compiled here")
    assert "--trust-code" in line
    trusting = Context(torch.device("cpu"), foreign, lambda slot: None, trust_code=True)
    call = native.bind(kernel(foreign), [0, 1, 2], trusting)
    assert call is not None
    x, w = inputs(2)
    check(call([x, w, None]), x * w)


def test_trust_outlives_the_process_that_compiled(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    files = built()
    monkeypatch.setattr(code_cache, "_made", set[str]())
    assert bound(files)[0] is not None
    for kept in cache.glob("*.so"):
        kept.unlink()
    monkeypatch.setattr(code_cache, "_made", set[str]())
    assert bound(files)[0] is None


def test_a_file_of_that_name_alone_is_no_trust(
    foreign: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    for content in foreign.values():
        (cache / f"{hashlib.sha256(content).hexdigest()}.so").write_bytes(b"something else")
    assert bound(foreign)[0] is None


# ---- loading ----------------------------------------------------------------------------------------------------


def test_one_content_is_loaded_once() -> None:
    content = next(iter(built().values()))
    with ThreadPoolExecutor(4) as pool:
        libraries = set(map(id, pool.map(lambda i: native_library.load(content), range(8))))
    assert len(libraries) == 1


def test_two_kernels_of_one_name_are_two_libraries() -> None:
    one, other = ready(), ready(source=scaler.source(extra="1"))
    x, w = inputs(3)
    check(one([x, w, None]), x * w)
    check(other([x, w, None]), x * w + 1)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a library at all" * 100])
def test_what_is_no_library(content: bytes) -> None:
    with pytest.raises(native_library.LibraryRefused, match="it cannot be loaded"):
        native_library.load(content)


def test_a_library_that_is_no_kernel() -> None:
    content = compiler.build('extern "C" __attribute__((visibility("default"))) int f() { return 1; }\n', "avx2")
    with pytest.raises(native_library.LibraryRefused, match="it lacks sparsec_run or sparsec_scratch"):
        native_library.load(content)


def test_a_trusted_library_that_does_not_load_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    files = dict.fromkeys(built(), b"not a library")
    context = Context(torch.device("cpu"), files, lambda slot: None, trust_code=True)
    assert native.bind(kernel(files), [0, 1, 2], context) is None
    assert "it cannot be loaded" in context.paths["scaler"].why


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(native_library, "_libraries", dict[str, native_library.Library]())
    x, w = inputs(3)
    check(ready()([x, w, None]), x * w)
    assert list(tmp_path.iterdir()) == []


def test_where_the_temporary_folder_cannot_be_used_the_cache_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = next(iter(built(scaler.source(extra="7")).values()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert native_library.load(content).scratch(2, 1) == 64


# ---- launching --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(0, 200), threads=st.integers(1, 5), bias=st.booleans(), strided=st.booleans())
def test_any_number_of_tokens_and_threads(tokens: int, threads: int, bias: bool, strided: bool) -> None:
    torch.set_num_threads(threads)
    x, w = inputs(tokens)
    if strided:
        x = torch.randn(scaler.WIDTH, tokens).T
    b = torch.randn(scaler.WIDTH) if bias else None
    y, team = ready(bias=bias)([x, w, b])
    check([y], x * w + b if b is not None else x * w)
    assert y.is_contiguous()
    assert team.item() == (threads if tokens else 0)


def test_weights_that_change_are_read_anew() -> None:
    call = ready()
    x, w = inputs(3)
    check(call([x, w, None]), x * w)
    w.mul_(2)
    check(call([x, w, None]), x * w)
    w.data = torch.randn(scaler.WIDTH)
    check(call([x, w, None]), x * w)
    other = torch.randn(2 * scaler.WIDTH)[::2]  # not dense: copied at every launch
    check(call([x, other, None]), x * other)
    other.mul_(3)
    check(call([x, other, None]), x * other)


def test_a_fixed_number_of_tokens() -> None:
    call = ready(tokens=4)
    x, w = inputs(4)
    check(call([x, w, None]), x * w)
    x.add_(1)
    check(call([x, w, None]), x * w)
    with pytest.raises(InputError, match=r"operand 0 .* \[5, 8\] on cpu, not torch.float32 \[4, 8\]"):
        call([torch.randn(5, scaler.WIDTH), w, None])


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (torch.zeros(3, 8), torch.zeros(7), r"operand 1 of kernel 'scaler' is torch.float32 \[7\] on cpu"),
        (torch.zeros(3, 8), torch.zeros(8, dtype=torch.float64), "operand 1 .* is torch.float64"),
        (torch.zeros(3, 8), None, "operand 1 .* is nothing"),
        (torch.zeros(3, 9), torch.zeros(8), r"operand 0 .* not torch.float32 \[3, 8\]"),
        (torch.zeros(3, 8, device="meta"), torch.zeros(8), "operand 0 .* on meta"),
        (None, torch.zeros(8), "operand 0 .* has no axis 0"),
        (torch.zeros(()), torch.zeros(8), "operand 0 .* has no axis 0"),
    ],
)
def test_operands_that_do_not_fit(x: Tensor | None, w: Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ready()([x, w, None])


def test_a_kernel_that_refuses() -> None:
    torch.set_num_threads(1)
    x, w = inputs(scaler.MOST_TOKENS + 1)
    with pytest.raises(RuntimeError, match=r"kernel 'scaler' refused 1001 tokens on 1 threads \(status 3\)"):
        ready()([x, w, None])


@pytest.mark.parametrize("size", ["-1", "int64_t(1) << 62"])
def test_scratch_memory_that_cannot_be_had(size: str) -> None:
    x, w = inputs(2)
    with pytest.raises(RuntimeError, match=r"scratch"):
        ready(source=scaler.source(scratch=size))([x, w, None])


def test_a_size_that_the_tokens_do_not_give() -> None:
    files = built()
    entry = kernel(files, tokens="t")
    odd = replace(entry, results=(Type(("s0", 8), "f32"), entry.results[1]))
    with pytest.raises(ArtifactError, match=r"has the shape \['s0', 8\], which 't' does not give"):
        native.bind(odd, [0, 1, 2], Context(torch.device("cpu"), files, lambda slot: None))


def test_python_threads_share_a_kernel() -> None:
    call, gate = ready(), threading.Barrier(4)

    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        torch.set_num_threads(1 + seed % 2)
        gate.wait()
        for tokens in range(1, 60):
            x, w = (torch.randn(*shape, generator=generator) for shape in ((tokens, 8), (8,)))
            if not torch.equal(call([x, w, None])[0], x * w):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_forked_child_runs_on_one_thread() -> None:
    torch.set_num_threads(2)
    call = ready()
    x, w = inputs(5)
    assert call([x, w, None])[1].item() == 2
    child = os.fork()
    if child == 0:
        y, team = call([x, w, None])
        os._exit(0 if torch.equal(y, x * w) and team.item() == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert call([x, w, None])[1].item() == 2


def test_without_an_openmp_library_there_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(native_library, "team", lambda: None)
    x, w = inputs(5)
    y, team = ready()([x, w, None])
    check([y], x * w)
    assert team.item() == 1


def test_no_second_openmp_library_is_loaded() -> None:
    found = native_library.team()
    assert found is not None
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert len(loaded) == 1


def test_scratch_memory_grows_and_is_kept() -> None:
    scratch = native_library.Scratch()
    small = scratch.at_least(100)
    assert small % native_library.HUGE_PAGE == 0
    assert scratch.at_least(1000) == small
    ctypes.memset(small, 255, 1000)
    large = scratch.at_least(5 << 20)
    assert large % native_library.HUGE_PAGE == 0
    ctypes.memset(large, 255, 5 << 20)
    assert scratch.at_least(100) == large
    others = list[int]()
    worker = threading.Thread(target=lambda: others.append(scratch.at_least(100)))
    worker.start()
    worker.join()
    assert others != [large]


# ---- as a torch operator ----------------------------------------------------------------------------------------


def registered(files: dict[str, bytes]) -> str:
    return launch.register(kernel(files), torch.device("cpu"), files)


def test_the_operator_is_sound() -> None:
    x, w = inputs(5)
    torch.library.opcheck(launch.launch, (registered(built()), [x, w, None]))


def test_other_libraries_get_another_name() -> None:
    assert registered(built()) == registered(built())
    assert registered(built()) != registered(built(scaler.source(extra="2")))


def test_under_torch_compile() -> None:
    name = registered(built())

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = torch.ops.sparsec.launch(name, [x + 1, w, None])
        return y * 2, y

    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for tokens in (5, 3, 9, 0):
        x, w = inputs(tokens)
        with torch.no_grad():
            check(compiled(x, w), (x + 1) * w * 2)
