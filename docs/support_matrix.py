"""Write docs/models.md: what sparsec makes of every model family, from real runs.

    python -m docs.support_matrix run                       # all of it, then write the page
    python -m docs.support_matrix run mixtral zaya          # these again
    python -m docs.support_matrix run --parts whole llama4  # a part of it: layers, whole, generation
    python -m docs.support_matrix write                     # the page from the results that are there

Results are kept in docs/models.json. Every part of a family runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tests.zoo import measures
from tests.zoo.families import FAMILIES
from tests.zoo.handwritten import FORMS

DOCS = Path(__file__).parent
RESULTS, PAGE = DOCS / "models.json", DOCS / "models.md"
NOTE = "<!-- Written by docs/support_matrix.py from docs/models.json: run it instead of editing. -->"
LIMIT = 600  # seconds for one part of one family
PARTS: dict[str, Callable[[str], Any]] = {
    "layers": measures.layers,
    "whole": measures.whole,
    "generation": measures.generation,
}


def run(todo: Sequence[tuple[str, str]], workers: int) -> None:
    """Measure parts of families and forms, some at a time, and keep the results as they come."""
    waiting, running = list(todo), dict[Connection, tuple[str, str, Any, float]]()
    fork = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < workers:
            name, part = waiting.pop(0)
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_measure, args=(name, part, theirs))
            process.start()
            theirs.close()
            running[ours] = (name, part, process, time.perf_counter())
        ready = wait(list(running), timeout=1)
        for ours, (name, part, process, began) in list(running.items()):
            seconds = time.perf_counter() - began
            if ours in ready:
                try:
                    result = ours.recv()
                except EOFError:
                    result = {"failed": f"the process ended with status {process.exitcode}"}
            elif seconds > LIMIT:
                process.kill()
                result = {"failed": f"not done after {LIMIT} seconds"}
            else:
                continue
            del running[ours]
            process.join()
            _keep(name, part, result)
            failed = result.get("failed", "") if isinstance(result, dict) else ""
            print(f"{name} {part}: {seconds:.0f} s {failed}", flush=True)


def _measure(name: str, part: str, answer: Connection) -> None:
    """In a process of its own: one part of one family, or a form."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    try:
        answer.send(PARTS[part](name) if part in PARTS else measures.form(name))
    except Exception as problem:
        answer.send({"failed": f"{type(problem).__name__}: {problem}".splitlines()[0]})


def _keep(name: str, part: str, result: Any) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"families": {}, "forms": {}}
    if part in PARTS:
        results["families"].setdefault(name, {})[part] = result
    else:
        results["forms"][name] = result
    kept = {kind: dict(sorted(of.items())) for kind, of in results.items()}
    RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


LAYERS_TEXT = """Tiny models with random weights, run on a CPU. Each kind of expert layer is captured alone, once, and
compared to transformers' own loop over the experts for 1, 37 and 300 tokens; the error is the greatest difference
relative to the greatest value. For bf16 it is the median over 300 tokens of a row's distance to the same weights in
f32, and the ratio of it to that of eager. The router is the ops of the layer's `moe.route`, views and casts left out.
*hook*: the experts come in by transformers' experts interface; *adapter*: by an adapter of sparsec; *raised*: from
plain ops. Unfused are ops between the logits and the sum over experts that stayed outside."""
SIZES = ", ".join(map(str, measures.WHOLE))
WHOLE_TEXT = f"""Captured once at batch 2 and 12 tokens, then compared to eager at {SIZES}. A model works if
the greatest difference is below {measures.TOLERANCE:.0e} of the greatest value. Generation, of four tokens by greedy
search, equal to eager's: `static-cache` holds keys and values in buffers of the program; `recompute` runs the whole
text for each token, for models whose state is not only keys and values."""
FORMS_TEXT = """Layers of `tests/zoo/handwritten.py`, none of which calls sparsec. *fused*: one router and one bank of
experts; *left*: runs as it is written; *refused*: torch.export cannot trace it, and the error names the line and the
change that helps."""


def page(results: dict[str, Any]) -> str:
    """The text of docs/models.md."""
    families, forms = results["families"], results["forms"]
    first = ["family", "expert layer", "router", "captured", "error f32", "bf16 : eager", "unfused ops"]
    second = ["family", "whole model", "banks of layers", "error f32", "generation", "why, or what to know"]
    third = ["layer", "what it is", "became", "router", "error", "why"]
    parts = [
        f"{NOTE}\n# Models",
        _summary(families, forms),
        "## Expert layers of the families of transformers",
        LAYERS_TEXT,
        _table(first, [row for name, result in families.items() for row in _layer_rows(name, result.get("layers"))]),
        "## Whole models",
        WHOLE_TEXT,
        _table(second, [_whole_row(name, result) for name, result in families.items()]),
        "## Layers written by hand",
        FORMS_TEXT,
        _table(third, [_form_row(name, result) for name, result in forms.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(families: dict[str, Any], forms: dict[str, Any]) -> str:
    plain = [result for name, result in families.items() if "+" not in name]
    kinds = [result["layers"].get("kinds", ["failed"]) for result in plain if "layers" in result]
    fused = [of for of in kinds if of and all(map(_fused, of))]
    works = [result for result in plain if result.get("whole", {}).get("sizes") == "any"]
    became = [result.get("became") for result in forms.values()]
    return (
        f"Of {len([of for of in kinds if of])} families with expert layers {len(fused)} are fused completely; of "
        f"{len(plain)} whole models {len(works)} compile and agree with eager. Of {len(forms)} layers written by hand "
        f"{became.count('fused')} are fused, {became.count('left')} are left as they are and "
        f"{became.count('refused')} are refused."
    )


def _fused(kind: Any) -> bool:
    got = kind.get("found", {}) if isinstance(kind, dict) else {}
    return bool(got.get("routes") and (got["experts"] or got["linears"]) and not kind["loose"])


def _layer_rows(name: str, result: dict[str, Any] | None) -> list[list[str]]:
    if result is None or "failed" in result:
        return [[name, "not run" if result is None else result["failed"], *[""] * 5]]
    bf16 = result["bf16"]
    ratio = f"{bf16['own'] / bf16['eager']:.2f}" if bf16.get("eager") else bf16.get("why", "")
    rows = list[list[str]]()
    for kind in result["kinds"]:
        error = f"{kind['error']:.0e}" if "error" in kind else ""
        router = kind.get("router") or "; ".join(kind["why"][:1])
        loose = " ".join(kind.get("loose", ())) if kind.get("found", {}).get("experts") else ""
        rows.append([name, kind["class"], router, kind["how"], error, ratio if not rows else "", loose])
    return rows or [[name, "no experts", *[""] * 5]]


def _whole_row(name: str, result: dict[str, Any]) -> list[str]:
    whole, generation = result.get("whole", {"failed": "not run"}), result.get("generation", "")
    generation = generation.get("failed", "") if isinstance(generation, dict) else generation
    if "found" not in whole:
        return [name, "no", "", "", generation, whole.get("failed", "") or "; ".join(whole["why"])]
    count = whole["found"]["experts"] + whole["found"]["linears"] // 2
    works = {"any": "yes", "captured": "at the captured sizes", "none": "no"}[whole["sizes"]]
    return [name, works, f"{count} of {whole['layers']}", f"{whole['error']:.0e}", generation, "; ".join(whole["why"])]


def _form_row(name: str, result: dict[str, Any]) -> list[str]:
    if "failed" in result:
        return [name, "", "failed", "", "", result["failed"]]
    error = f"{result['error']:.0e}" + (" (bf16)" if result["dtype"] == "bfloat16" else "") if "error" in result else ""
    why = "" if result["became"] == "fused" else "; ".join(result["why"][:1])
    return [name, result["form"], result["became"], result.get("router", ""), error, why]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("](", "] (")  # no link in quoted code


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("names", nargs="*", help="families and forms; all by default")
    parser.add_argument("--parts", default=",".join(PARTS), help="of families, separated by commas")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    given = parser.parse_intermixed_args()
    if given.what == "run":
        names = given.names or [*FAMILIES, *FORMS]
        todo = [(name, part) for part in given.parts.split(",") for name in names if name in FAMILIES]
        run(todo + [(name, "form") for name in names if name in FORMS], given.workers)
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
