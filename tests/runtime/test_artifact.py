"""Artifacts: written whole, read with suspicion."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from sparsec.codegen import artifact as writer
from sparsec.codegen.artifact import write_artifact
from sparsec.codegen.emit import emit
from sparsec.runtime import load, open_artifact
from sparsec.runtime.artifact import digest_line
from sparsec.runtime.errors import ArtifactError
from tests.runtime.models import Layer, layer_module

LAYER = Layer(experts=3, width=16, hidden=8)
EMITTED = emit(layer_module(LAYER), "cpu")


def write(path: Path, weights: Mapping[str, Tensor] = LAYER.weights, **more: Any) -> Path:
    more = {"target": "cpu", "text": "module {}\n"} | more
    return write_artifact(path, EMITTED, weights, **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("saved") / "layer.sparsec")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "layer.sparsec"))


def files(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def rewrite_manifest(path: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest and make it valid again, as someone of ill will would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    raw = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(raw)
    (path / "manifest.sha256").write_bytes(digest_line(raw))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Change a file together with its entry in the manifest."""
    (path / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({name: entry}))


def refuse(path: Path, words: str, **more: Any) -> None:
    with pytest.raises(ArtifactError) as error:
        load(path, **more)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_artifact_runs_like_the_plan(saved: Path) -> None:
    x = torch.randn(5, LAYER.hidden)
    y, logits = load(saved).call((x,))
    torch.testing.assert_close(logits, x @ LAYER.weights["gate"].T)
    assert y.shape == x.shape
    wanted = ["manifest.json", "manifest.sha256", "module.sparsec", "plan.json"]
    assert files(saved) == [*wanted, "weights/00000.safetensors", "weights/00001.safetensors"]


def test_banks_have_files_of_their_own(saved: Path) -> None:
    names = [set(safe_open(saved / f"weights/0000{i}.safetensors", "pt").keys()) for i in range(2)]
    assert names == [{"gate"}, {"up", "down"}]


def test_the_name_gets_its_ending(tmp_path: Path) -> None:
    assert write(tmp_path / "deep" / "model").name == "model.sparsec"


def test_weights_are_split_into_shards_and_asked_for_once(tmp_path: Path) -> None:
    asked = list[str]()

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return LAYER.weights[name].clone()

        def __iter__(self) -> Iterator[str]:
            return iter(LAYER.weights)

        def __len__(self) -> int:
            return len(LAYER.weights)

    seen = list[tuple[int, int]]()
    path = write(tmp_path / "m.sparsec", Lazy(), shard=1000, progress=lambda done, total: seen.append((done, total)))
    assert sorted(asked) == sorted(LAYER.weights)
    assert len([name for name in files(path) if name.startswith("weights/")]) == 3
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    weights = open_artifact(path).weights
    assert set(weights) == set(LAYER.weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in LAYER.weights.items())


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    layer = Layer(hidden=8, width=4, experts=2, layout="single")
    whole = torch.randn(2, 4, 16)
    weights = {"gate": layer.weights["gate"], "up": whole[:, :, ::2], "down": whole.mT[:, :8]}
    path = write_artifact(tmp_path / "m.sparsec", emit(layer_module(layer), "cpu"), weights, target="cpu")
    read = open_artifact(path).weights
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    square = Layer(hidden=8, width=8, experts=2, layout="single")
    tied = square.weights | {"down": square.weights["up"]}
    path = write_artifact(tmp_path / "t.sparsec", emit(layer_module(square), "cpu"), tied, target="cpu", shard=1)
    assert open_artifact(path).manifest["aliases"] == {"down": "up"}
    x = torch.randn(3, 8)
    assert torch.equal(load(path)(x)[0], load(path)(x)[0])


def test_an_artifact_is_replaced_and_nothing_else_is(tmp_path: Path, saved: Path) -> None:
    path = write(tmp_path / "m.sparsec")
    write(path, text="module {second = true}\n")
    assert "second" in (path / "module.sparsec").read_text()
    other = tmp_path / "photos.sparsec"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="is no sparsec artifact: choose another name"):
        write(other)
    assert files(tmp_path / "photos.sparsec") == ["holiday.jpg"]
    assert sorted(os.listdir(tmp_path)) == ["m.sparsec", "photos.sparsec"]


@pytest.mark.parametrize(
    "trouble", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
@pytest.mark.parametrize("old", [False, True])
def test_trouble_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException, old: bool
) -> None:
    path = tmp_path / "m.sparsec"
    if old:
        write(path, text="module {old = true}\n")

    def fail(*args: Any) -> None:
        raise trouble

    monkeypatch.setattr(writer, "write_shard", fail)
    with pytest.raises(ArtifactError if isinstance(trouble, OSError) else type(trouble)) as error:
        write(path)
    if isinstance(trouble, OSError):
        assert "cannot be written: No space left on device" in str(error.value)
    assert os.listdir(tmp_path) == (["m.sparsec"] if old else [])
    if old:
        load(path)
        assert "old" in (path / "module.sparsec").read_text()


def test_weights_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the weights lack 'up'"):
        write(tmp_path / "m", {name: tensor for name, tensor in LAYER.weights.items() if name != "up"})
    with pytest.raises(ArtifactError, match="'up' is on the meta device"):
        write(tmp_path / "m", LAYER.weights | {"up": LAYER.weights["up"].to("meta")})
    with pytest.raises(ArtifactError, match="in the plan"):
        write(tmp_path / "m", LAYER.weights | {"up": LAYER.weights["up"].half()})
    assert not os.listdir(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), way=st.sampled_from(["flip", "truncate", "grow", "remove"]))
def test_any_damage_is_noticed(saved: Path, tmp_path: Path, data: Any, way: str) -> None:
    name = data.draw(st.sampled_from(files(saved)))
    path = tmp_path / "damaged.sparsec"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(saved, path)
    content = bytearray((path / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if way == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif way == "truncate":
        del content[at:]
    else:
        content.insert(at, data.draw(st.integers(0, 255)))
    (path / name).write_bytes(content)
    if way == "remove":
        (path / name).unlink()
    with pytest.raises(ArtifactError) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), junk=st.one_of(st.none(), st.integers(-2, 9), st.text(max_size=4), st.just([]), st.just({})))
def test_a_manifest_of_ill_will_is_refused_or_harmless(saved: Path, tmp_path: Path, data: Any, junk: Any) -> None:
    path = tmp_path / "evil.sparsec"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(saved, path)

    def change(manifest: Any) -> None:
        place = manifest
        for _ in range(data.draw(st.integers(0, 2))):
            inner = [value for value in place.values() if isinstance(value, dict) and value]
            place = data.draw(st.sampled_from(inner)) if inner else place
        place[data.draw(st.sampled_from([*place, "new"]))] = junk

    rewrite_manifest(path, change)
    try:
        load(path)
    except ArtifactError:
        return


def test_without_verification_sizes_and_headers_still_count(copied: Path) -> None:
    shard = copied / "weights/00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    load(copied, verify=False)
    refuse(copied, "is damaged: 'weights/00000.safetensors' is not what was written")
    shard.write_bytes(bytes(content[:-1]))
    refuse(copied, "bytes of", verify=False)


def test_what_is_no_artifact(tmp_path: Path, copied: Path) -> None:
    refuse(tmp_path / "nothing", "does not exist")
    refuse(tmp_path, "is no sparsec artifact")
    rewrite_manifest(copied, lambda manifest: manifest.update(format="zip"))
    refuse(copied, "its manifest says 'zip'")


def test_newer_and_foreign_artifacts(copied: Path) -> None:
    rewrite_manifest(copied, lambda manifest: manifest.update(version=99))
    refuse(copied, "has format version 99 (sparsec 0.1.0), this sparsec reads up to 3: update sparsec")
    rewrite_manifest(copied, lambda manifest: manifest.update(version=1))
    refuse(copied, "has format version 1, this sparsec reads version 3: compile the model again")
    rewrite_manifest(copied, lambda manifest: manifest.update(version=3, target="cuda:sm_90"))
    if not torch.cuda.is_available():
        refuse(copied, "was compiled for cuda:sm_90, and torch sees no GPU")
    refuse(copied, "was compiled for cuda:sm_90 and cannot run on cpu", device="cpu")


@pytest.mark.parametrize(
    "name", ["../plan.json", "/etc/passwd", "weights/../../x", ".hidden", "a//b", "", "a/./b", "a\\b"]
)
def test_names_that_could_leave_the_folder(copied: Path, name: str) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    rewrite_manifest(copied, lambda manifest: manifest["files"].update({name: entry}))
    refuse(copied, "list of files is not sound")


def test_links_are_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "plan.json").rename(tmp_path / "plan.json")
    (copied / "plan.json").symlink_to(tmp_path / "plan.json")
    refuse(copied, "'plan.json' is a link")
    (copied / "plan.json").unlink()
    (tmp_path / "plan.json").rename(copied / "plan.json")
    (copied / "weights").rename(tmp_path / "weights")
    (copied / "weights").symlink_to(tmp_path / "weights")
    refuse(copied, "is a link")


def test_weights_and_plan_must_fit(copied: Path) -> None:
    plan = json.loads((copied / "plan.json").read_text())
    plan["args"][1]["type"]["shape"][0] = 7
    replace_file(copied, "plan.json", json.dumps(plan).encode())
    refuse(copied, "'gate' is [3, 8] F32 in the weights, [7, 8] f32 in the plan")
    replace_file(copied, "plan.json", b"[" * 100_000)
    refuse(copied, "'plan.json' is not JSON")
    replace_file(copied, "plan.json", b"{}")
    refuse(copied, "plan: 'args' is missing")
    replace_file(copied, "weights/00000.safetensors", b"\xff" * 64)
    refuse(copied, "plan: 'args'")


def test_shards_that_are_none(copied: Path) -> None:
    replace_file(copied, "weights/00000.safetensors", b"\xff" * 64)
    refuse(copied, "is no safetensors file")
