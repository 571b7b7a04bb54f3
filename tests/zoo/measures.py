"""Measurements of families and forms for the support matrix: what became of each, as JSON."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

import sparsec
from sparsec.diagnostics import SparsecError
from sparsec.frontend.adapters import registry
from tests.zoo.checks import alone, compile_layer, distance, error, found, outputs
from tests.zoo.families import build, inputs
from tests.zoo.handwritten import FORMS
from tests.zoo.layers import eager, halved, record, record_sizes, run, tensors_of
from tests.zoo.test_handwritten import TOKENS, layer_of, tokens_for
from tests.zoo.test_handwritten import compiled as compile_form

TOLERANCE = 1e-4  # of a whole model's outputs
WHOLE = ((3, 7), (1, 30))  # batch and length that a whole model is called with again


def layers(name: str) -> dict[str, Any]:
    """The kinds of expert layers of a family, each captured alone; and the first of them in bf16."""
    return {"kinds": _kinds(name, eager(build(name)[0])), "bf16": _bf16(name)}


def _kinds(name: str, model: Any) -> list[dict[str, Any]]:
    """Layers of which the same is to be said are one kind."""
    kinds = list[dict[str, Any]]()
    first, second, others = record_sizes(name, model)
    for path, call in first.items():
        layer = model.get_submodule(path)
        kind: dict[str, Any] = {"class": type(layer).__name__}
        try:
            compiled = compile_layer(layer, call, second[path])
            got = found(compiled)
            wanted = [alone(layer, calls[path])[1] for calls in others]
            kind |= {
                "how": _how(layer, compiled),
                "found": {"routes": got.routes, "experts": got.experts, "linears": got.linears},
                "router": got.router,
                "loose": list(got.loose),
                "error": max(error(outputs(compiled, call), call.tensors) for call in wanted),
                "why": [warning.message for warning in registry.warnings(layer)] + list(got.missed),
            }
        except Exception as problem:
            kind |= {"how": "refused", "why": [_sentence(problem)]}
        same = [one for one in kinds if one | {"error": 0, "why": []} == kind | {"error": 0, "why": []}]
        if same and "error" in kind:
            same[0]["error"] = max(same[0]["error"], kind["error"])
        elif not same:
            kinds.append(kind)
    return kinds


def _how(layer: Any, compiled: Any) -> str:
    """How the bank came into the IR: as an operator, which a hook or an adapter emitted, or raised from plain ops."""
    replaced = registry.install(layer)
    registry.remove(replaced)
    if replaced:
        return "adapter"
    captured = any(op.name == "moe.experts" for op in compiled.result.ir("capture").walk())
    raised = any(op.name == "moe.experts" for op in compiled.result.ir("raise").walk())
    return "hook" if captured else "raised" if raised else "left"


def _bf16(name: str) -> dict[str, Any]:
    """The distance of the first expert layer in bf16 to the same weights in f32, of sparsec and of eager."""
    model = halved(eager(build(name)[0]))
    exact = copy.deepcopy(model).float()
    calls = [record(name, exact, *size) for size in ((2, 12), (3, 17), (1, 300))]
    path = next(iter(calls[0]), None)
    if path is None:
        return {}
    layer = model.get_submodule(path)
    call, second, long = (each[path].to(torch.bfloat16) for each in calls)
    try:
        compiled = compile_layer(layer, call, second)
        f32 = outputs(exact.get_submodule(path), long.to(torch.float32))[0]
        return {
            "own": distance(outputs(compiled, alone(layer, long)[1])[0], f32),
            "eager": distance(outputs(layer, long)[0], f32),
        }
    except Exception as problem:
        return {"why": _sentence(problem)}


def whole(name: str) -> dict[str, Any]:
    """A family's whole model, captured once and called with other sizes.

    `sizes` says for which it works: "any", "captured" (that which it was captured by only) or "none".
    """
    model = eager(build(name)[0])
    banks, began = len(record(name, model)), time.perf_counter()
    try:
        compiled = sparsec.compile(model, (), inputs(name, model))
    except Exception as problem:
        return {"sizes": "none", "why": [_sentence(problem)]}
    got, seconds = found(compiled), time.perf_counter() - began
    why = [warning.message for warning in compiled.warnings]
    errors, sizes = list[float](), "none"
    try:
        for sizes_now, size in (("captured", (2, 12)), *(("any", size) for size in WHOLE)):
            expected = tensors_of(run(name, model, *size))[:1]
            errors.append(error(tensors_of(compiled(**inputs(name, model, *size)))[:1], expected))
            sizes = sizes_now
    except Exception as problem:
        sizes = "captured" if errors else "none"
        why.append(_sentence(problem))
    return {
        "sizes": sizes if max(errors, default=0) <= TOLERANCE else "none",
        "layers": banks,
        "found": {"routes": got.routes, "experts": got.experts, "linears": got.linears},
        "error": max(errors, default=0.0),
        "seconds": round(seconds, 1),
        "why": why,
    }


def generation(name: str) -> str:
    """How a family's model generates the text that eager does, or why it does not; "" for what is no decoder."""
    model = eager(build(name)[0])
    if not type(model).__name__.endswith("ForCausalLM"):
        return ""
    prompt = inputs(name, model, 1, 6)["input_ids"]
    try:
        compiled = sparsec.compile_language_model(model, max_length=64)
        assert compiled.generation is not None
        tokens = compiled.generate(prompt[0].tolist(), 4)
    except Exception as problem:
        return _sentence(problem)
    text = prompt
    for _ in tokens:
        with torch.no_grad():
            following = model(input_ids=text, use_cache=False).logits[:, -1:].argmax(-1)
        text = torch.cat([text, following], dim=1)
    same = text[0, prompt.shape[1] :].tolist() == tokens
    return str(compiled.generation["kind"]) if same else f"{compiled.generation['kind']}, but other tokens than eager"


def _sentence(problem: Exception) -> str:
    """The first line of an error, and the line of the user's code that it names."""
    lines = str(problem).splitlines() or [type(problem).__name__]
    source = lines[1].strip() if len(lines) > 1 and lines[1].startswith("    ") else ""
    text = lines[0] if hasattr(problem, "diagnostics") else f"{type(problem).__name__}: {lines[0]}"
    return text + (f" `{source}`" if source else "")


def form(name: str) -> dict[str, Any]:
    """What became of one hand-written layer."""
    about = {"form": (FORMS[name].__doc__ or "").splitlines()[0]}
    layer = layer_of(name)
    try:
        model = compile_form(layer)
    except SparsecError as problem:
        return about | {"became": "refused", "why": [_sentence(problem)]}
    got = found(model)
    with torch.no_grad():
        errors = [error([model(x)], [layer(x)]) for x in (tokens_for(layer, 1, count) for count in TOKENS)]
    became = "fused" if got.fused else "left" if got.experts == 0 else "in part"
    said = {"router": got.router, "loose": list(got.loose), "why": list(got.missed)}
    return (
        about | said | {"became": became, "error": max(errors), "dtype": str(FORMS[name].dtype).removeprefix("torch.")}
    )
