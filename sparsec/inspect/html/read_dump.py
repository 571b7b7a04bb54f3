"""What the page shows, read from a dump's folder. Files may be missing, and come from anyone: names and sizes are
checked before a file is read, and what is not of its form is left out with a note."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from sparsec.diagnostics import SparsecError
from sparsec.inspect.trace import read_trace

MAX_FILE = 64 << 20
"""Bytes of one file that are read at most."""
MAX_KERNEL = 256 << 10
"""Bytes of one kernel's source; longer ones are cut."""
MAX_KERNELS = 4 << 20
"""Bytes of all kernels' sources."""
KERNEL_SUFFIXES = (".py", ".cpp", ".c", ".h", ".ttir", ".ttgir", ".ptx", ".ll", ".amdgcn", ".s", ".txt", ".json")
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")

JsonT = TypeVar("JsonT")


def read_dump(folder: Path) -> dict[str, Any]:
    """The data of the page, ready for JSON.

    Returns: `name`; `state`; `passes`, each with `text` (an index into `texts`, of the last text up to it), `blocks`
    of changed lines [first before, count, first after, count], from 0, and `made`, the rule by line, from 1; `texts`;
    `remarks`; `kernels`, each with `name` and `text`; `costs`, `trace` or None; `notes` on files that could
    not be read.

    Raises: SparsecError if the folder has no manifest of a dump.
    """
    if not (folder / "manifest.json").is_file():
        raise SparsecError(f"{folder} is no run of a dump: it has no manifest.json")
    notes: list[str] = []
    manifest = _try(lambda: _object(_json(folder / "manifest.json")), notes)
    if manifest is None or not isinstance(manifest.get("passes"), list):
        raise SparsecError(f"{folder / 'manifest.json'} is no manifest of a dump: {'; '.join(notes) or 'no passes'}")
    texts: list[str] = []
    passes = list[dict[str, Any]]()
    made = _optional(folder / "made.json", lambda path: _object(_json(path)), notes) or {}
    for entry in manifest["passes"]:
        shown = _try(partial(_pass, folder, entry, texts, made), notes)
        passes += [shown] if shown is not None else []
    if (crash := folder / "crash.sparsec").is_file():
        notes.append(f"a pass failed; reproduce with: sparsec opt {crash.name}")
    return {
        "name": folder.resolve().name,
        "state": str(manifest.get("state", "")),
        "passes": passes,
        "texts": texts,
        "remarks": _optional(folder / "remarks.jsonl", _remarks, notes) or [],
        "costs": _optional(folder / "costs.json", _costs, notes),
        "trace": _optional(folder / "trace.json", lambda path: read_trace(path).counted().json(), notes),
        "kernels": _kernels(folder / "kernels", notes),
        "notes": notes,
    }


def _pass(folder: Path, given: object, texts: list[str], made: dict[str, Any]) -> dict[str, Any]:
    entry = _object(given)
    shown: dict[str, Any] = {
        "phase": str(entry.get("phase", "")),
        "name": str(entry.get("pass", "capture")),
        "ms": _number(entry.get("ms")),
        "before": _number(entry.get("ops_before")),
        "after": _number(entry.get("ops_after")),
        "rules": {str(rule): _number(count) for rule, count in _object(entry.get("rules") or {}).items()},
        "blocks": [],
        "made": {},
    }
    changed = "file" in entry
    if changed:
        texts.append(_text(_inside(folder, entry["file"])))
        shown["made"] = {str(line): str(rule) for line, rule in _object(made.get(entry["file"]) or {}).items()}
    if "diff" in entry:
        shown["blocks"] = diff_blocks(_text(_inside(folder, entry["diff"])))
    return shown | {"text": len(texts) - 1, "changed": changed}


def diff_blocks(diff: str) -> list[tuple[int, int, int, int]]:
    """The changed lines of a unified diff: (first before, count, first after, count), counted from 0."""
    blocks = list[tuple[int, int, int, int]]()
    before = after = 0
    start: tuple[int, int] | None = None
    for line in [*diff.split("\n"), "@@ -1 +1 @@"]:
        if line.startswith(("--- ", "+++ ")) and not (before or after):
            continue
        kind = line[:1]
        if kind in "-+" and kind:
            start = start or (before, after)
            before, after = before + (kind == "-"), after + (kind == "+")
            continue
        if start is not None:
            blocks.append((start[0], before - start[0], start[1], after - start[1]))
            start = None
        if found := _HUNK.match(line):
            before, after = int(found[1]) - 1, int(found[2]) - 1
        else:
            before, after = before + 1, after + 1
    return blocks


def _remarks(path: Path) -> list[dict[str, Any]]:
    found = list[dict[str, Any]]()
    for line in _text(path).splitlines():
        one = _object(json.loads(line))
        loc = _object(one.get("loc") or {})
        texts = {key: str(one.get(key, "")) for key in ("kind", "pass_name", "rule", "message", "suggestion")}
        place = {key: str(loc.get(key, "")) for key in ("file", "scope", "source")}
        found.append({**texts, **place, "line": _number(loc.get("line"))})
    return found


def _costs(path: Path) -> dict[str, Any]:
    data = _object(_json(path))
    rows = list[dict[str, Any]]()
    for item in _list(data.get("ops")):
        row = _object(item)
        texts = {key: str(row.get(key, "")) for key in ("op", "callee", "value", "file", "scope", "limiter")}
        rows.append({**texts, **{key: _number(row.get(key)) for key in ("line", "bytes", "flops", "us")}})
    taken = {str(name): _number(size) for name, size in _object(data.get("sizes") or {}).items()}
    return {"chip": str(data.get("chip", "")), "sizes": taken, "ops": rows}


def _kernels(folder: Path, notes: list[str]) -> list[dict[str, str]]:
    if not folder.is_dir():
        return []
    found, left = list[dict[str, str]](), MAX_KERNELS
    files = [path for path in folder.rglob("*") if path.suffix in KERNEL_SUFFIXES and path.is_file()]
    for path in sorted(files, key=lambda path: (KERNEL_SUFFIXES.index(path.suffix), str(path))):
        if left <= 0:
            notes.append(f"kernels beyond {MAX_KERNELS >> 20} MB are left out, {path.name} first")
            break
        with path.open("rb") as file:
            data = file.read(min(left, MAX_KERNEL) + 1)
        cut = len(data) > min(left, MAX_KERNEL)
        left -= len(data)
        text = data.decode(errors="replace") + ("\n... (cut)" if cut else "")
        found.append({"name": path.relative_to(folder).as_posix(), "text": text})
    return found


# ------------------------------------------------------------------------------------------------ files of strangers
def _optional(path: Path, read: Callable[[Path], JsonT], notes: list[str]) -> JsonT | None:
    return _try(lambda: read(path), notes) if path.is_file() else None


def _try(read: Callable[[], JsonT], notes: list[str]) -> JsonT | None:
    try:
        return read()
    except (OSError, ValueError, RecursionError, SparsecError) as error:
        notes.append(str(error))
        return None


def _inside(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"the manifest names {name!r}, which is no file of the dump")
    return folder / name


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_FILE:
        raise ValueError(f"{path.name} has {size >> 20} MB, more than the {MAX_FILE >> 20} MB that are read")
    return path.read_text(encoding="utf-8", errors="replace")


def _json(path: Path) -> object:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an object is expected, not {str(value)[:40]!r}")
    return cast("dict[str, Any]", value)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"a list is expected, not {str(value)[:40]!r}")
    return cast("list[Any]", value)


def _number(value: object) -> float:
    return value if isinstance(value, int | float) and abs(value) < 1e300 else 0
