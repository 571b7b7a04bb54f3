"""Model families of transformers through every phase: what was captured, at two token counts."""

from __future__ import annotations

import pytest
import torch

from sparsec import pipeline
from sparsec.ir.interp import evaluate_module
from tests.frontend.helpers import zoo_model

QUICK = ("gpt_oss", "deepseek_v3")
FAMILIES = (
    *("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "qwen3_5_moe", "deepseek_v2", "granitemoe", "glm4_moe"),
    *("phimoe", "ernie4_5_moe", "mistral4", "minimax_m2", "gemma4", "aria"),
)


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_every_phase_gives_what_was_captured(family: str) -> None:
    from sparsec.frontend.capture import capture

    model, inputs = zoo_model(family)
    captured = capture(model, (), dict(inputs))
    ids = inputs["input_ids"]
    again = torch.randint(3, 128, (3, 7), generator=torch.Generator().manual_seed(3))
    runs = [(ids, evaluate_module(captured.module, [ids], captured.weights)) for ids in (ids, again)]
    result = pipeline.run(captured.module, target="cpu")
    assert not [remark for remark in result.remarks if remark.kind == "missed"]
    raised = [op.name for op in result.ir("raise").walk()]
    assert raised.count("moe.route") == raised.count("moe.experts") > 0
    for ids, wanted in runs:
        # A router is raised to a form that is exact but for rounding.
        raised_to = evaluate_module(result.ir("raise"), [ids], captured.weights)
        for new, old in zip(raised_to, wanted, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5 * float(old.abs().max()))
        for phase in pipeline.PHASES[2:]:
            # Packing turns transposed banks over, and their sums are rounded in another order then.
            exact = pipeline.PHASES.index(phase) < pipeline.PHASES.index("schedule")
            bound = 0.0 if exact else 1e-5
            for new, old in zip(evaluate_module(result.ir(phase), [ids], captured.weights), raised_to, strict=True):
                torch.testing.assert_close(new, old, rtol=bound, atol=bound * float(old.abs().max()), msg=phase)
    kernels = [name for name, func in result.module.funcs.items() if "backend" in func.attrs]
    assert kernels == ["layer_0"], "layers that are alike share kernels"
