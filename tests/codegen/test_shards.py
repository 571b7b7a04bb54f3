"""Files of tensors: what safetensors reads back, where tensors begin, and the hash that is told."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sparsec.codegen.shards import ALIGNMENT, write_shard
from sparsec.runtime.dtypes import DTYPES


def read(place: Path) -> dict[str, Tensor]:
    with safe_open(place, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_tensors_come_back_and_begin_on_cache_lines(tmp_path: Path) -> None:
    gen = torch.Generator().manual_seed(0)
    base = torch.randn(6, 40, generator=gen)
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "one": torch.tensor(3.5),
        "none": torch.ones(0, 4, dtype=torch.bfloat16),
        "lines": torch.randn(3, 5, 32, generator=gen).bfloat16(),
        "turned": base.t(),
        "slice": base[1:4, 3:19],
        "whole": torch.randint(-9, 9, (4, 64), generator=gen).to(torch.int8),
        "wide": torch.randn(3, dtype=torch.float64, generator=gen),
    }
    size, digest = write_shard(tmp_path / "x", tensors)
    content = (tmp_path / "x").read_bytes()
    assert len(content) == size and hashlib.sha256(content).hexdigest() == digest
    found = read(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].data_ptr() % tensor.itemsize == 0
        if tensor.nbytes % ALIGNMENT == 0:
            assert found[name].data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (16,)).to(dtype)
    write_shard(tmp_path / "x", {"t": tensor})
    found = read(tmp_path / "x")["t"]
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_no_tensors(tmp_path: Path) -> None:
    write_shard(tmp_path / "x", {})
    assert read(tmp_path / "x") == {}
