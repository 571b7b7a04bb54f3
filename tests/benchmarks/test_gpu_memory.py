"""What the benchmark of the GPU holds in memory, and engines that fail while it runs; no GPU takes part."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.engines import Engine
from benchmarks.shapes import bank, cases, reference
from tests.benchmarks.test_gpu import ONE, TINY, bench


def lacking(_: object) -> Any:
    raise RuntimeError("no memory")


def test_what_is_not_trained_is_let_go_meanwhile() -> None:
    """Weights of its own would lie beside the gradients."""
    made, calls = bench(lambda y: y, untrained="it is a stub"), list[str]()
    engine = made.engines["it"]

    def again() -> Any:
        calls.append("made again")
        return engine

    made._makers["it"] = again
    made.check(Cell("8x64x32x2", 5, "uniform", "training"))
    assert made.engines == {}
    assert made.time(ONE, ["it"], 5.0, 5)["failed"] == {} and calls == ["made again"]
    made._makers["it"] = partial(lacking, None)
    made.check(Cell("8x64x32x2", 5, "uniform", "training"))
    assert made.check(ONE)["failed"] == made.time(ONE, ["it"], 5.0, 5)["failed"] == {"it": "no memory"}


def test_an_engine_that_fails_while_it_is_timed_leaves_the_others() -> None:
    made, turns = bench(lambda y: y), list[int]()
    fine = made.engines["it"]

    def breaks(*given: torch.Tensor) -> torch.Tensor:
        turns.append(1)
        return fine.run(*given) if len(turns) < 20 else lacking(None)

    made.engines["other"] = Engine(breaks, lambda tokens: "")
    answer = made.time(ONE, ["it", "other"], 60.0, 9)
    assert answer["failed"] == {"other": "no memory"} and answer["engines"]["it"]["rounds"] == 9
    assert list(answer["engines"]) == ["it"]


def test_a_reference_keeps_no_weights_in_f64_for_its_gradients() -> None:
    """Those of a large layer are more than a GPU holds."""
    module, (case,), kept = bank(TINY), cases(TINY, 5, "uniform", 1), list[tuple[int, ...]]()
    x = case.x.double().requires_grad_()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = reference(module, type(case)(x, case.ids, case.weights), torch.arange(5), torch.float64)
    assert kept and not {(64, 64), (64, 32), (32, 64)} & set(kept)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert bool(dx.abs().sum() > 0)
