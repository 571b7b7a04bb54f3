"""The benchmark of a whole model, on a small one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.cpu import machine
from benchmarks.cpu.model import SIZES, build, measure_model

pytest.importorskip("transformers")
SMALL = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_prefill_and_decode_are_measured() -> None:
    kwargs = {"prompt": 6, "threads": [1], "rounds": 1, "seconds": 1.0, "peers": ["eager", "grouped_mm"]}
    rows = list(measure_model(1, sizes=SMALL, **kwargs))  # type: ignore[arg-type]
    assert [(row["phase"], row["tokens"], row["clock"]) for row in rows] == [
        ("prefill", 6, "cpu"),
        ("decode", 1, "cpu"),
    ]
    for row in rows:
        assert row["model"] == "OLMoE-1B-7B shape, 1 of 16 layers"
        assert set(row["engines"]) == {"transformers eager", "transformers grouped_mm", "sparsec"}
        assert row["missing"] == {}
        assert all(figures["error"] < 0.1 for figures in row["engines"].values())
        assert row["engines"]["sparsec"]["error"] > 0  # other kernels, other rounding: it did run by itself


def test_a_model_that_does_not_fit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda: 4 << 30)
    with pytest.raises(MemoryError, match=r"16 layers .* need 27\.4 GiB, 4\.0 are free: use fewer --layers"):
        build(16, SIZES, 600)
