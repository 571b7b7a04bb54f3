"""Tensors in huge pages: where they lie, what they hold, and what becomes of mapped ones."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsec.runtime import huge_pages
from sparsec.runtime.artifact import Weights
from sparsec.runtime.huge_pages import SIZE, InHugePages, empty
from sparsec.runtime.tiles import pack, unpack


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors from 1 MB on count as large."""
    monkeypatch.setattr(huge_pages, "SMALLEST", 1 << 20)


linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")


@linux
def test_a_large_tensor_begins_on_a_huge_page() -> None:
    tensor = empty((3, 1 << 18), torch.bfloat16)
    assert tensor.shape == (3, 1 << 18) and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    assert tensor.data_ptr() % SIZE == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    tensor.fill_(2)
    assert tensor.float().sum() == 6 << 18
    gone = weakref.ref(tensor.untyped_storage())
    del tensor
    gc.collect()
    assert gone() is None


def test_a_small_tensor_is_an_ordinary_one() -> None:
    assert empty((0, 3), torch.float32).shape == (0, 3)
    assert empty((5,), torch.int8).dtype == torch.int8


@linux
def test_banks_are_packed_into_huge_pages() -> None:
    bank = torch.randn(4, 256, 512)
    packed = pack(bank)
    assert packed.data_ptr() % SIZE == 0
    assert torch.equal(unpack(packed, None, "tiles", 1, 256, 512), bank)


@linux
def test_mapped_tensors_are_copied_once(tmp_path: Path) -> None:
    from sparsec.codegen.shards import write_shard

    tensors = {"large": torch.randn(700, 1000), "small": torch.randn(7)}
    write_shard(tmp_path / "x", tensors)
    mapped = Weights(tmp_path, ["x"], {"other": "large"})
    held = InHugePages(mapped)
    assert set(held) == {"large", "small", "other"} and len(held) == 3
    found: dict[str, Tensor] = {name: held[name] for name in held}
    assert torch.equal(found["large"], tensors["large"]) and torch.equal(found["small"], tensors["small"])
    assert found["large"].data_ptr() % SIZE == 0
    assert found["other"] is found["large"]
    assert torch.equal(mapped["large"], tensors["large"])  # its pages are let go of, and come back when read
