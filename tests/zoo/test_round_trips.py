"""The text of every phase of every family, for a CPU and for a GPU, in the short form and in MLIR's generic form."""

from __future__ import annotations

import pytest

from sparsec import pipeline
from sparsec.diagnostics import SparsecError
from sparsec.frontend.capture import capture
from sparsec.ir.core import Module
from sparsec.ir.equal import clone_module, equal
from sparsec.ir.mlir import print_generic
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from tests.zoo.families import build, inputs
from tests.zoo.layers import eager
from tests.zoo.test_families import NOT_EVERY_SIZE, families

ALWAYS = ("afmoe",)


@pytest.mark.parametrize("name", families(ALWAYS))
def test_every_phase_is_read_back(name: str) -> None:
    model = eager(build(name)[0])
    try:
        captured = capture(model, (), inputs(name, model))
    except SparsecError:
        assert NOT_EVERY_SIZE.get(name, ("",))[0] == "none", "a model that is supported is captured"
        return
    for target in ("cpu", "cuda:sm_90"):
        result = pipeline.run(clone_module(captured.module), target=target)
        assert set(result.phases) == {*pipeline.PHASES}
        for phase, module in result.phases.items():
            check(module, f"{name} after {phase} for {target}")


def check(module: Module, what: str) -> None:
    text = print_module(module)
    again = parse_module(text)
    assert equal(again, module), what
    assert print_module(again) == text, f"{what}: names, locations"
    assert equal(parse_module(print_generic(module)), module), f"{what}, as MLIR"
