"""Reading exported programs from `.pt2` files, which torch would partly unpickle and evaluate."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from sparsec.diagnostics import CompileError
from sparsec.frontend import experts_op
from sparsec.frontend.failures import quiet

# Size expressions are strings that sympy evaluates as Python: calls of these on symbols and numbers, nothing else.
_WORD = re.compile(
    "Symbol|Integer|Rational|Add|Mul|Pow|Mod|Max|Min|FloorDiv|CleanDiv|CeilDiv|PythonMod|ModularIndexing|IntTrueDiv|"
    "FloatTrueDiv|PowByNatural|FloatPow|ToFloat|Identity|Eq|Ne|Lt|Le|Gt|Ge|Not|And|Or|StrictLessThan|LessThan|"
    "StrictGreaterThan|GreaterThan|Equality|Unequality|Piecewise|Where|TruncToInt|CeilToInt|FloorToInt|RoundToInt|Abs|"
    r"int_oo|oo|True|False|positive|nonnegative|negative|integer|real|finite|zero|even|odd|[suz]f?\d+"
)
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<symbol>'[A-Za-z_]\w*')|[\d.]+(?:e-?\d+)?|[-+*/%(),=<>!&|~])")


def load_program(path: Path) -> ExportedProgram:
    """The exported program in a `.pt2` file.

    Torch unpickles some parts of such files and evaluates the sizes in them. What is seen to need either is refused;
    that is a safeguard and no proof, so read only files that you trust.

    Raises: CompileError.
    """
    if not path.is_file():
        raise CompileError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            problem = next(_problems(archive), None)
            records = any(b"transformers.modeling_outputs" in archive.read(name) for name in _graphs(archive))
    except (zipfile.BadZipFile, ValueError, KeyError, RecursionError) as error:
        raise CompileError(f"{path} is no exported program: {error}") from error
    if problem is not None:
        raise CompileError(f"{path} is refused: {problem}", hint="export the model anew, with plain tensors only")
    if records and importlib.util.find_spec("transformers"):
        importlib.import_module("transformers.modeling_outputs")  # tells torch what these results are made of
    assert experts_op.TARGET  # programs may hold it, so that it must be registered
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CompileError(
            f"{path} is no exported program that torch {torch.__version__} can read: {said}",
            hint="write it with torch.export.save, by the same version of torch",
        ) from error


def _problems(archive: zipfile.ZipFile) -> Iterator[str]:
    names = archive.namelist()
    if not list(_graphs(archive)):
        raise ValueError("it holds no models/model.json")
    for name in names:
        base = name.rpartition("/")[2]
        if name.endswith(("_weights_config.json", "_constants_config.json")):
            for tensor, entry in json.loads(archive.read(name))["config"].items():
                if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                    yield f"'{tensor}' is pickled"
        elif "/sample_inputs/" in name and base.endswith(".pt"):
            yield from _sample_problems(archive.read(name))
        elif base.endswith((".pt", ".pkl", ".so")) or base.startswith(("custom_obj_", "opaque_obj_")):
            yield f"'{name}' is pickled or native code"
        elif "/models/" in name and base.endswith(".json"):
            for text in _expressions(json.loads(archive.read(name))):
                if not _is_size(text):
                    yield f"a size in it is {text[:60]!r}"


def _graphs(archive: zipfile.ZipFile) -> Iterator[str]:
    return (name for name in archive.namelist() if "/models/" in name and name.endswith(".json"))


def _sample_problems(data: bytes) -> Iterator[str]:
    try:
        if data:
            torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # torch would read it again, without the restriction
        yield f"its sample inputs are more than tensors ({type(error).__name__})"


def _expressions(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if isinstance(text := tree.get("expr_str"), str):
            yield text
        for child in tree.values():
            yield from _expressions(child)
    elif isinstance(tree, list):
        for child in tree:
            yield from _expressions(child)


def _is_size(text: str) -> bool:
    """Whether `text` holds only known calls, symbols and numbers."""
    place = 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            return False
        if token["name"] and not _WORD.fullmatch(token["name"]):
            return False
        place = token.end()
    return True
