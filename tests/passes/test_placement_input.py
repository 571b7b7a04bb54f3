"""Files of strangers: what is wrong is said in one sentence, and nothing that is mutated ends in a traceback."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.cli import cli
from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import Loads, Options, parse_topology, plan, read_loads, read_plan, write_plan
from sparsec.passes.placement.loads import read_routing

COUNTS = np.arange(1, 33, dtype=np.float64).reshape(2, 2, 8)
ROUTED = np.arange(40).reshape(10, 2, 2) % 8
TRACE = {
    "version": 1,
    "layers": [{"path": f"model.layers.{at}.mlp", "experts": 4, "k": 1} for at in (1, 2)],
    "steps": [{"tokens": 2, "counts": [[1, 1, 0, 0], [0, 0, 1, 1]], "routed": [[[0], [1]], [[2], [3]]]}],
}


def header(shape: str, descr: str = "'<f8'") -> bytes:
    """An array of numpy's format that says it has a shape."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def bomb(path: Path, data: bytes, name: str = "load.npy") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)


def array(values: Any) -> bytes:
    np.save(file := io.BytesIO(), values, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.npy", b"", "is empty"),
        ("a.npz", b"", "is empty"),
        ("a.json", b"", "is empty"),
        ("a.csv", b"1,2", "is of no known kind"),
        ("a.npy", b"hello, this is no array", "is no array"),
        ("a.npz", b"PK\x03\x04 and no more", "cannot be read"),
        ("a.json", b"\xff\xfe[1]", "is no UTF-8"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b'{"load": [[1, "2"]]}', "these are texts"),
        ("a.json", b'{"load": [[true, false]]}', "these are true and false"),
        ("a.json", b'{"load": [[null, 1]]}', "these are not all numbers"),
        ("a.json", b'{"load": [[1, 2], [3]]}', "not all of one length"),
        ("a.json", b'{"load": [[1e400, 1]]}', "is infinite"),
        ("a.json", b'{"load": [[1e30, 1]]}', "is no count of tokens"),
        ("a.json", b'{"load": [[1]], "workload": 3}', "'workload' is a list of names"),
        ("a.json", b'{"other": [[1]]}', "has no entry"),
        ("a.json", b'{"layers": [], "steps": []}', "the trace has no step"),
        ("a.json", b'{"layers": [{}], "steps": [{"counts": [[1], [2]]}]}', "not a list of numbers for each"),
        ("a.npy", array(np.array([{}, 1], object)), "objects are never unpickled"),
        ("a.npy", array(np.array([["a"]])), "these are texts"),
        ("a.npy", array(np.zeros((2, 0))), r"is empty, of shape \[2 x 0\]"),
        ("a.npy", array(np.ones((2, 4)) * 1j), "not numbers"),
        ("a.npy", header("(1000000, 1000000)") + bytes(16), "has only 16 bytes"),
        ("a.npy", header("(2, 4)") + bytes(16), "has only 16 bytes"),
        ("a.npy", header("(-1, 4)") + bytes(16), "which is none"),
        ("a.npy", header("(1,) * 99"), "its header is broken"),
        ("a.npy", header("(2, 2)", "'|O'") + bytes(32), "objects are never unpickled"),
        ("a.npy", header("(2, 2)", "[('a', '<f8')]") + bytes(32), "objects are never unpickled"),
        ("a.npy", header("(2, 5000)") + np.ones(10_000).tobytes(), None),
        ("a.npy", header("(5000, 2)") + np.ones(10_000).tobytes(), "is more than"),
    ],
)
def test_what_is_no_load_is_named(tmp_path: Path, name: str, data: bytes, words: str | None) -> None:
    (path := tmp_path / name).write_bytes(data)
    if words is None:
        assert read_loads([path]).counts.shape == (1, 2, 5000)
        return
    with pytest.raises(SparsecError, match=words) as caught:
        read_loads([path])
    assert str(path) in str(caught.value)


def test_archives_that_unpack_to_too_much_are_not_unpacked(tmp_path: Path) -> None:
    bomb(huge := tmp_path / "huge.npz", header("(1, 400000000)") + bytes(1 << 20))
    with pytest.raises(SparsecError, match="has only 1048576 bytes"):
        read_loads([huge])
    with zipfile.ZipFile(many := tmp_path / "many.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(9):
            archive.writestr(f"{index}.npy", bytes(1 << 20))
    with pytest.raises(SparsecError, match="name the array"):
        read_loads([many])
    assert many.stat().st_size < 100_000
    lying = bytearray(huge.read_bytes())
    at = lying.rindex(b"PK\x01\x02")
    lying[at + 24 : at + 28] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "lie.npz").write_bytes(lying)
    with pytest.raises(SparsecError, match="unpacks to more than"):
        read_loads([tmp_path / "lie.npz"])


def test_layers_that_differ_between_files_are_named(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(TRACE))
    np.save(array_ := tmp_path / "two.npy", np.ones((2, 4)))
    with pytest.raises(SparsecError, match=r"has layer 0 where .*one\.json has layer 1"):
        read_loads([one, array_])
    two.write_text(json.dumps(TRACE | {"steps": [{"counts": [[1, 1, 1, 1], [0, 0, 0, 0]]}]}))
    with pytest.raises(SparsecError, match=r"two\.json: scenario 'two': layer 2 is missing"):
        read_loads([one, two])
    with pytest.raises(SparsecError, match="step 0 of the trace has no 'routed'"):
        read_routing(two, (1, 2), 4)


@pytest.mark.parametrize(
    ("tokens", "numbers", "words"),
    [
        ([0, 0, 1, 1, 1], None, (2, 3, 4)),  # the first are dense
        ([0, 1, 0, 1, 0, 1], None, (1, 3, 5)),  # every other one is
        ([0, 1, 0, 1, 0], None, (1, 3)),
        ([1, 1, 0, 1], None, "layer 2 is missing: it has no tokens in any scenario"),
        ([1, 1, 1, 0], None, "layer 3 is missing"),
        ([0, 1, 0, 0, 0, 1, 0, 1], None, "layer 3 is missing"),
        ([1, 1, 1], [1, 4, 5], (1, 4, 5)),
        ([0, 1, 1], [1, 4, 5], "layer 1 is missing"),
        ([1, 1], [1, 1], "'layers' are not the numbers of 2 layers, each once"),
        ([1, 1], [1], "'layers' are not the numbers of 2 layers"),
        ([1, 1], "ab", "'layers' are not the numbers of 2 layers"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_a_layer_without_tokens_is_dense_or_missing(
    tmp_path: Path, tokens: list[int], numbers: Any, words: str | tuple[int, ...], suffix: str
) -> None:
    path, held = tmp_path / f"load.{suffix}", {"load": [[count] * 4 for count in tokens]}
    given = held | ({} if numbers is None else {"layers": numbers})
    if suffix == "json":
        path.write_text(json.dumps(given))
    elif numbers is None:
        np.savez(path, load=np.array(held["load"]))
    else:
        np.savez(path, load=np.array(held["load"]), layers=np.array(numbers))
    if isinstance(words, tuple):
        assert read_loads([path]).layers == words
        return
    with pytest.raises(SparsecError, match=words):
        read_loads([path])


@pytest.mark.parametrize(
    ("routed", "words"),
    [
        (np.zeros((4, 2, 0), int), "is empty"),
        (np.zeros((4, 2)), "routing is"),
        (np.zeros((4, 3, 2), int), "routing of 3 layers, but the loads have 2"),
        (np.full((4, 2, 2), 8), "token 0 in layer 0 goes to expert 8, but there are 8"),
        (np.full((4, 2, 2), -1), "goes to expert -1"),
        (np.full((4, 2, 2), 1 << 63, np.uint64), "goes to expert 9223372036854775808"),
    ],
)
def test_bad_routing_is_named(tmp_path: Path, routed: Any, words: str) -> None:
    np.savez(path := tmp_path / "r.npz", routed=routed)
    with pytest.raises(SparsecError, match=words):
        read_routing(path, (0, 1), 8)


# ----------------------------------------------------------------------------------------------------- the command
def command(tmp_path: Path, *extra: str) -> Result:
    np.save(load := tmp_path / "load.npy", COUNTS)
    given = ["plan", "--load", str(load), "--rounds", "1", "--workers", "1", "--seconds", "1", "--slots", "3"]
    return CliRunner().invoke(cli, [*given, "--topology", "2x2", "-o", str(tmp_path / "plan.json"), *extra])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--topology", "2x2:memory=1MB", "--expert-bytes", "1e6"), r"rank 0 \(node 0\) cannot hold 3 slots"),
        (("--topology", "1x2"), "2 ranks with 6 slots cannot hold 8 experts\n  hint: --slots 4"),
        (("--topology", "2x2:speed=0"), "has no value above 0"),
        (("--topology", "2x2:speed=1e9"), "is not from 0.001 to 1000"),
        (("--topology", "2x2:ib=nan"), "has no value above 0"),
        (("--topology", "+" * 5000), "more than 4096 characters"),
        (("--expert-bytes", "nan"), "--expert-bytes is a number, not nan"),
        (("-o", "{tmp}"), "is a folder"),
        (("-o", "{tmp}/none/plan.json"), "there is no folder"),
        (("--html", "/dev/null/page.html"), "there is no folder"),
        (("--load", "{tmp}"), "is no file"),
        (("--load", "{tmp}/gone.npy"), "no such file"),
        (("--old", "{tmp}/gone.json"), "no such file"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, extra: tuple[str, ...], words: str) -> None:
    result = command(tmp_path, *(part.format(tmp=tmp_path) for part in extra))
    assert isinstance(result.exception, SparsecError)
    assert result.exit_code == 1 and not (tmp_path / "plan.json").exists()
    with pytest.raises(SparsecError, match=words):
        raise result.exception


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((2, 2, 4), "experts per layer are 4, not 8"),
        ((2, 3, 8), "layers are 3 layers .0 to 2., not 2 layers"),
        ((1, 2, 8), None),
    ],
)
def test_an_old_plan_of_another_model_is_named(tmp_path: Path, change: tuple[int, ...], words: str | None) -> None:
    other = Loads(np.ones(change), tuple("ab"[: change[0]]), tuple(range(change[1])))
    write_plan(plan(other, parse_topology("2x2"), Options(3, rounds=1)), tmp_path / "old.json")
    result = command(tmp_path, "--old", str(tmp_path / "old.json"))
    if words is None:
        assert result.exit_code == 0, result.output
        result = command(tmp_path, "--old", str(tmp_path / "old.json"), "--slots", "4")
        words = "slots are 12, not 16"
    assert isinstance(result.exception, SparsecError)
    with pytest.raises(SparsecError, match=words):
        raise result.exception


def test_names_of_strangers_are_shown_as_text(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"load": COUNTS.tolist(), "workload": ["[/]\x1b[31m" + "x" * 99, "[bold]b"]}))
    result = command(tmp_path, "--load", str(path))
    assert result.exit_code == 0 and "[/]?[31m" in result.output and "[bold]b" in result.output
    assert "\x1b" not in result.output


# ------------------------------------------------------------------------------------------------------- mutations
def mutated(data: bytes, seed: int) -> bytes:
    """Some bytes changed, removed, doubled or cut off."""
    draw = random.Random(seed)
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(found) or 1)
        match draw.randrange(5):
            case 0:
                found[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del found[at : at + draw.randint(1, 20)]
            case 2:
                found[at:at] = found[at : at + draw.randint(1, 50)]
            case 3:
                found[at:at] = draw.choice([b"-1", b"1e999", b"NaN", b"[", b"]", b"null", b"\xff", b"0" * 400, b'""'])
            case _:
                del found[at:]
    return bytes(found)


def files() -> dict[str, bytes]:
    """Files that are good, by name."""
    np.savez_compressed(packed := io.BytesIO(), load=COUNTS, workload=np.array(["a", "b"]))
    np.savez(routed := io.BytesIO(), routed=ROUTED)
    return {
        "load.npy": array(COUNTS),
        "load.npz": packed.getvalue(),
        "load.json": json.dumps({"load": COUNTS.tolist(), "workload": ["a", "b"]}).encode(),
        "trace.json": json.dumps(TRACE).encode(),
        "routed.npz": routed.getvalue(),
    }


GOOD = files()
READERS: dict[str, Callable[[Path], object]] = {
    "load.npy": lambda path: read_loads([path]),
    "load.npz": lambda path: read_loads([path]),
    "load.json": lambda path: read_loads([path]),
    "trace.json": lambda path: (read_loads([path]), read_routing(path, (1, 2), 4)),
    "routed.npz": lambda path: read_routing(path, (0, 1), 8),
    "plan.json": read_plan,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated")
    loads = Loads(COUNTS, ("a", "b"), (0, 1))
    write_plan(plan(loads, parse_topology("2x2"), Options(3, rounds=1)), folder / "good.json")
    return folder


@pytest.mark.parametrize("name", sorted(READERS))
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=150, deadline=None)
def test_mutated_files_are_read_or_refused(folder: Path, name: str, seed: int) -> None:
    good = GOOD.get(name) or (folder / "good.json").read_bytes()
    READERS[name](_written(folder / name, good))
    path = _written(folder / name, mutated(good, seed))
    try:
        READERS[name](path)
    except SparsecError as error:
        assert str(path) in str(error) and len(str(error)) < 2000


@given(seed=st.integers(0, 1 << 32), name=st.sampled_from(["load.npy", "load.json", "load.npz"]))
@settings(max_examples=25, deadline=None)
def test_mutated_loads_are_planned_or_refused(folder: Path, seed: int, name: str) -> None:
    path = _written(folder / f"planned-{name}", mutated(GOOD[name], seed))
    given = ["plan", "--load", str(path), "--rounds", "1", "--workers", "1", "--seconds", "1", "--topology", "2x2"]
    result = CliRunner().invoke(cli, [*given, "--slots", "4", "-o", str(folder / "made.json")])
    assert result.exit_code in (0, 1)
    assert result.exception is None or isinstance(result.exception, SparsecError), result.exception


@given(st.text(st.sampled_from("0123456789x:+,=.eGBMKi/s nvlinkbmeoryspdtKé٣\x00"), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_topology_or_refused(text: str) -> None:
    for spec in (text, f"2x2:{text}", f"2x2+{text}", f"2x2:speed={text}"):
        try:
            assert parse_topology(spec).ranks
        except SparsecError as error:
            assert "topology" in str(error)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
