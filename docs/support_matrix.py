"""Write docs/models.md: what sparsec makes of every model family, from real runs.

    python -m docs.support_matrix run                 # all families and hand-written layers, then write the page
    python -m docs.support_matrix run mixtral zaya    # these again
    python -m docs.support_matrix write               # the page from the results that are there
    python -m docs.support_matrix write --check       # exit 1 where the page is not what the results say

Results are kept in docs/models.json. Every family runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

DOCS = Path(__file__).parent
RESULTS, PAGE = DOCS / "models.json", DOCS / "models.md"
NOTE = "<!-- Written by docs/support_matrix.py from docs/models.json: run it instead of editing. -->"
LIMIT = 600  # seconds for one family
TOLERANCE = 1e-4
WHOLE = ((3, 7), (1, 30))  # batch and length that a whole model is called with again


def measure(name: str) -> dict[str, Any]:
    """What became of one family: its expert layers alone, and its whole model."""
    import torch

    from tests.zoo.families import build
    from tests.zoo.layers import eager

    torch.set_num_threads(1)
    model = eager(build(name)[0])
    return {"layers": _layers(name, model), "bf16": _bf16(name), "whole": _whole(name, model)}


def _layers(name: str, model: Any) -> list[dict[str, Any]]:
    """The kinds of expert layers of a model; layers of which the same is to be said are one kind."""
    from sparsec.frontend.adapters import registry
    from tests.zoo.checks import alone, compile_layer, error, found, outputs
    from tests.zoo.layers import record_sizes

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
        same = [one for one in kinds if one | {"error": 0} == kind | {"error": 0}]
        if same and "error" in kind:
            same[0]["error"] = max(same[0]["error"], kind["error"])
        elif not same:
            kinds.append(kind)
    return kinds


def _how(layer: Any, compiled: Any) -> str:
    """How the bank came into the IR: as an operator, which a hook or an adapter emitted, or raised from plain ops."""
    from sparsec.frontend.adapters import registry

    replaced = registry.install(layer)
    registry.remove(replaced)
    if replaced:
        return "adapter"
    captured = any(op.name == "moe.experts" for op in compiled.result.ir("capture").walk())
    raised = any(op.name == "moe.experts" for op in compiled.result.ir("raise").walk())
    return "hook" if captured else "raised" if raised else "left"


def _bf16(name: str) -> dict[str, Any]:
    """The distance of the first expert layer in bf16 to the same weights in f32, of sparsec and of eager."""
    import copy

    import torch

    from tests.zoo.checks import alone, compile_layer, distance, outputs
    from tests.zoo.families import build
    from tests.zoo.layers import eager, halved, record

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


def _whole(name: str, model: Any) -> dict[str, Any]:
    """The whole model, captured once, called with other sizes; and whether it generates text with a static cache."""
    import sparsec
    from tests.zoo.checks import error, found
    from tests.zoo.families import inputs
    from tests.zoo.layers import record, run, tensors_of

    began = time.perf_counter()
    banks = len(record(name, model))
    try:
        compiled = sparsec.compile(model, (), inputs(name, model))
        got = found(compiled)
        seconds = time.perf_counter() - began
        errors = list[float]()
        for batch, length in WHOLE:
            expected = tensors_of(run(name, model, batch, length))[:1]
            errors.append(error(tensors_of(compiled(**inputs(name, model, batch, length)))[:1], expected))
    except Exception as problem:
        return {"works": False, "why": _sentence(problem)}
    return {
        "works": max(errors) <= TOLERANCE,
        "layers": banks,
        "found": {"routes": got.routes, "experts": got.experts, "linears": got.linears},
        "error": max(errors),
        "seconds": round(seconds, 1),
        "why": [warning.message for warning in compiled.warnings],
        "generation": _generation(model),
    }


def _generation(model: Any) -> str:
    import sparsec

    if not type(model).__name__.endswith("ForCausalLM"):
        return ""
    try:
        compiled = sparsec.compile_language_model(model, max_length=64)
    except Exception as problem:
        return _sentence(problem)
    assert compiled.generation is not None
    return str(compiled.generation["kind"])


def _sentence(problem: Exception) -> str:
    """The first line of an error, and the line of the user's code that it names."""
    lines = str(problem).splitlines() or [type(problem).__name__]
    source = lines[1].strip() if len(lines) > 1 and lines[1].startswith("    ") else ""
    text = lines[0] if hasattr(problem, "diagnostics") else f"{type(problem).__name__}: {lines[0]}"
    return text + (f" `{source}`" if source else "")


def measure_form(name: str) -> dict[str, Any]:
    """What became of one hand-written layer."""
    import torch

    from sparsec.diagnostics import SparsecError
    from tests.zoo.checks import error, found
    from tests.zoo.handwritten import FORMS
    from tests.zoo.test_handwritten import TOKENS, compiled, layer_of, tokens_for

    torch.set_num_threads(1)
    form = FORMS[name]
    about = {"form": (form.__doc__ or "").splitlines()[0]}
    layer = layer_of(name)
    try:
        model = compiled(layer)
    except SparsecError as problem:
        return about | {"became": "refused", "why": [_sentence(problem)]}
    got = found(model)
    with torch.no_grad():
        errors = [error([model(x)], [layer(x)]) for x in (tokens_for(layer, 1, count) for count in TOKENS)]
    became = "fused" if got.fused else "left" if got.experts == 0 else "in part"
    said = {"router": got.router, "loose": list(got.loose), "why": list(got.missed)}
    return about | said | {"became": became, "error": max(errors), "dtype": str(form.dtype).removeprefix("torch.")}


def run(names: Sequence[str], workers: int) -> None:
    """Measure families and forms, some at a time, and keep the results."""

    def one(name: str) -> None:
        command = [sys.executable, "-m", "docs.support_matrix", "one", name]
        began = time.perf_counter()
        try:
            done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, timeout=LIMIT, check=False)
            failed = (done.stderr.strip().splitlines() or ["no output"])[-1]
            result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": failed}
        except subprocess.TimeoutExpired:
            result = {"failed": f"not done after {LIMIT} seconds"}
        with lock:
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results[name] = result
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {time.perf_counter() - began:.0f} s {result.get('failed', '')}", flush=True)

    lock = Lock()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, names))


def page(results: dict[str, Any]) -> str:
    """The text of docs/models.md."""
    families = {name: result for name, result in results.items() if not name[0].isupper()}
    forms = {name: result for name, result in results.items() if name[0].isupper()}
    rows = [row for name, result in families.items() for row in _family_rows(name, result)]
    first = ["family", "expert layer", "router", "captured", "error f32", "bf16 : eager", "unfused ops"]
    second = ["family", "whole model", "layers fused", "error f32", "generation", "why, or what to know"]
    third = ["layer", "what it is", "became", "router", "error", "why"]
    whole = [_whole_row(name, result) for name, result in families.items()]
    hand = [_form_row(name, result) for name, result in forms.items()]
    return (
        "\n\n".join(
            [
                f"{NOTE}\n# Models",
                _summary(families, forms),
                "## Expert layers of the families of transformers\n\n" + LAYERS_TEXT,
                _table(first, rows),
                "## Whole models\n\n" + WHOLE_TEXT,
                _table(second, whole),
                "## Layers written by hand\n\n" + FORMS_TEXT,
                _table(third, hand),
            ]
        )
        + "\n"
    )


LAYERS_TEXT = """Tiny models with random weights, run on a CPU. Each kind of expert layer is captured alone, once, and
compared to transformers' own loop over the experts for 1, 37 and 300 tokens; the error is the greatest difference
relative to the greatest value. For bf16 it is the median over 300 tokens of a row's distance to the same weights in
f32, and the ratio of it to that of eager. The router is the ops of the layer's `moe.route`, views and casts left out.
*hook*: the experts come in by transformers' experts interface; *adapter*: by an adapter of sparsec; *raised*: from
plain ops. Unfused are ops between the logits and the sum over experts that stayed outside."""
WHOLE_TEXT = f"""Captured once at batch 2 and 12 tokens, then compared to eager at {", ".join(map(str, WHOLE))}.
A model is listed as working if the greatest difference is below {TOLERANCE:.0e} of the greatest value. Generation:
`static-cache` holds keys and values in buffers of the program; `recompute` runs the whole text for each token, for
models whose state is not only keys and values."""
FORMS_TEXT = """Layers of `tests/zoo/handwritten.py`, none of which calls sparsec. *fused*: one router and one bank of
experts; *left*: runs as it is written; *refused*: torch.export cannot trace it, and the error names the line and the
change that helps."""


def _summary(families: dict[str, Any], forms: dict[str, Any]) -> str:
    plain = {name: result for name, result in families.items() if "+" not in name}
    with_layers = {name: result for name, result in plain.items() if result.get("layers")}
    fused = [name for name, result in with_layers.items() if all(map(_fused, result["layers"]))]
    whole = [name for name, result in plain.items() if result.get("whole", {}).get("works")]
    became = [result.get("became") for result in forms.values()]
    return (
        f"Of {len(with_layers)} families with experts {len(fused)} are fused completely; of {len(plain)} whole models "
        f"{len(whole)} compile and agree with eager. Of {len(forms)} layers written by hand {became.count('fused')} "
        f"are fused, {became.count('left')} left as they are and {became.count('refused')} refused."
    )


def _fused(kind: dict[str, Any]) -> bool:
    got = kind.get("found", {})
    return bool(got.get("routes") and (got["experts"] or got["linears"]) and not kind["loose"])


def _family_rows(name: str, result: dict[str, Any]) -> list[list[str]]:
    if "failed" in result:
        return [[name, result["failed"], "", "", "", "", ""]]
    bf16 = result["bf16"]
    ratio = f"{bf16['own'] / bf16['eager']:.2f}" if bf16.get("eager") else bf16.get("why", "")
    rows = list[list[str]]()
    for kind in result["layers"]:
        error = f"{kind['error']:.0e}" if "error" in kind else ""
        router = kind.get("router") or _first(kind["why"])
        loose = " ".join(kind.get("loose", ())) if kind.get("found", {}).get("experts") else ""
        rows.append([name, kind["class"], router, kind["how"], error, ratio if not rows else "", loose])
    return rows or [[name, "no expert layer", "", "", "", "", ""]]


def _whole_row(name: str, result: dict[str, Any]) -> list[str]:
    whole = result.get("whole", {"works": False, "why": result.get("failed", "")})
    if "found" not in whole:
        return [name, "no", "", "", "", whole["why"]]
    count = whole["found"]["experts"] + whole["found"]["linears"] // 2
    done = "yes" if whole["works"] else "no"
    error, why = f"{whole['error']:.0e}", "; ".join(whole["why"])
    return [name, done, f"{count} of {whole['layers']}", error, whole["generation"], why]


def _form_row(name: str, result: dict[str, Any]) -> list[str]:
    if "failed" in result:
        return [name, "", "failed", "", "", result["failed"]]
    error = f"{result['error']:.0e}" + (" (bf16)" if result["dtype"] == "bfloat16" else "") if "error" in result else ""
    why = "" if result["became"] == "fused" else _first(result["why"])
    return [name, result["form"], result["became"], result.get("router", ""), error, why]


def _first(texts: Sequence[str]) -> str:
    return texts[0] if texts else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def main() -> int:
    """The command line. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["run", "one", "write"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page is not fresh")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    given = parser.parse_intermixed_args()
    if given.what == "one":
        (name,) = given.names
        print(json.dumps(measure_form(name) if name[0].isupper() else measure(name)))
        return 0
    if given.what == "run":
        from tests.zoo.families import FAMILIES
        from tests.zoo.test_handwritten import FORMS

        run(given.names or [*FAMILIES, *FORMS], given.workers)
    text = page(json.loads(RESULTS.read_text()))
    if given.check:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
