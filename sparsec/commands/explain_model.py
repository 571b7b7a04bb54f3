"""`sparsec explain`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.text import Text

from sparsec import pipeline
from sparsec.codegen.emit import emit
from sparsec.commands.read_module import is_dump, module_of
from sparsec.config import Config
from sparsec.console import Status, out, working
from sparsec.diagnostics import Remark, SparsecError
from sparsec.inspect.cost_text import quantity, size_of, time
from sparsec.inspect.costs import SERVER, roof
from sparsec.inspect.explain import Finding, History, explain, of_dump, of_result, select
from sparsec.targets import Target


def run(
    model: str,
    target: str | None,
    cost: str | None,
    sizes: Sequence[str],
    layer: str,
    file: str,
    rule: str,
    missed: bool,
    as_json: bool,
) -> None:
    """Say what was fused in a model, what was not, and why. Raises: SparsecError."""
    with working(as_json) as status:
        status.say(f"read {model}")
        history, target = _history(model, target, status)
        on = roof(cost) if cost else SERVER if target == "cpu" else roof(target)
        found = explain(history, on, dict(map(size_of, sizes)))
    chosen = select(found, layer=layer, file=file, rule=rule)
    chosen = [one for one in chosen if one.kind == "missed" or not missed]
    if as_json:
        print(json.dumps([asdict(one) for one in chosen]))
        return
    if found and not chosen:
        raise SparsecError(f"none of the {len(found)} findings is what you ask for\n  hint: leave a filter out")
    for name, group in groupby(chosen, key=lambda one: one.layer):
        out.print(Text(name or "(the model itself)", "bold"))
        for one in group:
            out.print(render(one), soft_wrap=True)
    counts = Counter(str(one.kind) for one in chosen)
    kinds = [kind for kind in ("fused", "placed", "missed") if kind == "missed" or (counts[kind] and not missed)]
    out.print(f"{', '.join(f'{counts[kind]} {kind}' for kind in kinds)}; gains on {on.name}")


def _history(model: str, target: str | None, status: Status) -> tuple[History, str]:
    """What became of a model, and its target: as a dump has it if that is the target asked for, else by compiling."""
    if is_dump(Path(model)):
        history = of_dump(Path(model))
        compiled = str(history.final.attrs.get("target", ""))
        if compiled and target in (None, compiled):
            return history, compiled
    module = module_of(model, "capture")
    target = Config.read(target=target or str(module.attrs.get("target", "")) or None).target
    Target.parse(target)
    status.say("compile")
    result = pipeline.run(module, target=target)
    return of_result(result, _emitted(result, target)), target


def render(one: Finding) -> Text:
    """A finding in a few lines."""
    text = Text("  ")
    text.append(f"{one.kind:<7}", "yellow" if one.kind == "missed" else "green").append(one.what)
    text.append(f"\n         at {one.place}  {one.place.source.strip()}", "dim")
    text.append(f"\n         by {one.rule}", "dim")
    if one.try_:
        text.append(f"\n         try: {one.try_}")
    if one.gain is not None:
        gain = one.gain
        launches = f"{gain.launches} launch{'es' if gain.launches > 1 else ''}"
        text.append(f"\n         worth about {time(gain.us)}: {launches}, {quantity(gain.bytes)}B")
    return text


def _emitted(result: pipeline.Result, target: str) -> tuple[Remark, ...]:
    """What code generation declined; kernels for GPUs need no GPU, but a while: their text alone is written."""
    if target != "cpu":
        return ()
    return emit(result.module, target).remarks
