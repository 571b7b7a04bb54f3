"""`sparsec info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsec.console import out, working
from sparsec.frontend.models import load_model
from sparsec.inspect.accounting import BATCHES
from sparsec.inspect.info import info, render, to_json


def run(model: str, batches: tuple[int, ...], as_json: bool) -> None:
    """Account for a model and print. Raises: SparsecError."""
    with working(as_json) as status:
        given: Any = Path(model)
        args, kwargs = (), dict[str, Any]()
        if not Path(model).is_dir():
            loaded = load_model(model)
            given, args, kwargs = loaded.model, loaded.args, loaded.kwargs
        found = info(given, args, kwargs, batches=batches or BATCHES, progress=status.say)
    if as_json:
        print(to_json(found))
    else:
        out.print(render(found))
