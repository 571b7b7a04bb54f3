"""Models named on a command line: a folder of transformers, a Python file with a factory, an exported program."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram

from sparsec.diagnostics import CompileError, Diagnostic
from sparsec.frontend import locations
from sparsec.frontend.pt2 import load_program
from sparsec.ir.core import Module

_EXAMPLE = (2, 12)  # batch and sequence of the example call
_SEED = 0


@dataclass(frozen=True)
class LoadedModel:
    """A model and an example call of it, `model(*args, **kwargs)`.

    Args:
        name: what to call it (the folder, file or factory).
        folder: the folder that it came from, where its tokenizer lies; None for others.
        config: transformers' configuration; None for others.
        stored: how its files hold the weights where a GPU can take them so: `fp8`, `mxfp4`, else `model`. They are
            widened as they are read.
    """

    model: nn.Module | ExportedProgram
    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    config: Any = None
    stored: str = "model"


def load_model(
    spec: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    random_weights: bool = False,
    meta: bool = False,
) -> LoadedModel:
    """The model that `spec` names.

    Args:
        spec: a folder with `config.json` and, as a rule, `*.safetensors`; `FILE.py:FACTORY`, whose factory is run as
            the user's own code and returns the model and its example inputs (a tuple of arguments, a dict of keyword
            arguments, or one tensor); or a `.pt2` file, which must be trusted.
        dtype: of the parameters; None: what the model says.
        random_weights: make weights by the model's own initialisation, always the same ones, instead of reading them.
        meta: parameters without memory, for everything that needs shapes only.

    Nothing is downloaded, and no code from a model's folder is run. Raises: CompileError.
    """
    text = os.fspath(spec)
    path, _, factory = text.rpartition(":")
    if path.endswith(".py"):
        return _from_factory(Path(path), factory, dtype)
    if text.endswith(".py"):
        raise CompileError(f"{text} does not say what makes the model", hint=f"name a function: {text}:make_model")
    if text.endswith(".pt2"):
        if random_weights or meta or dtype is not None:
            raise CompileError("an exported program has its own weights and dtype")
        return LoadedModel(load_program(Path(text)), Path(text).stem)
    if text.endswith(".sparsec") and os.path.exists(text):
        raise CompileError(
            f"{text} was made by sparsec: the model itself is needed here",
            hint="an artifact is for `run` and `info`, the text of a module for `compile` and `opt`",
        )
    if not os.path.isdir(text):
        raise CompileError(
            f"there is no model {text}",
            hint="give a folder with config.json, FILE.py:FACTORY, or a .pt2 file; models are not downloaded",
        )
    return _from_folder(Path(text), dtype, random_weights, meta)


def _from_folder(folder: Path, dtype: torch.dtype | None, random_weights: bool, meta: bool) -> LoadedModel:
    if not (folder / "config.json").is_file():
        raise CompileError(f"{folder} has no config.json, so it is no model of transformers")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise CompileError("reading a model folder needs transformers", hint="pip install 'sparsec[hf]'") from error
    config = _config(folder, transformers)
    cls = _architecture(folder, config, transformers)
    stored = any(folder.glob("*.safetensors"))
    kind, widened = _packing(config, transformers)
    if not (stored or random_weights or meta):
        pickled = " but pickled ones, which are not read" if any(folder.glob("*.bin")) else ""
        raise CompileError(
            f"{folder} has no weights (*.safetensors){pickled}",
            hint="add --random-weights to compile the shape of the model only",
        )
    if stored and not random_weights and not meta:
        model = _read(cls, folder, dtype, widened)
    else:
        try:
            model = _made(cls, config, dtype, meta)
        except Exception as error:
            raise CompileError(
                f"{cls.__name__} cannot be made from {folder / 'config.json'}: {_said(error)}",
                locations.of_exception(error),
            ) from error
    ids = torch.arange(_EXAMPLE[0] * _EXAMPLE[1]).reshape(_EXAMPLE) % int(config.get_text_config().vocab_size)
    return LoadedModel(model.eval(), folder.resolve().name, (), {"input_ids": ids}, folder, config, kind)


def _packing(config: Any, transformers: Any) -> tuple[str, Any]:
    """How a checkpoint holds its weights (`LoadedModel.stored`), and what has transformers widen them everywhere."""
    given = getattr(config, "quantization_config", None)
    given = given if isinstance(given, dict) or given is None else given.to_dict()
    method = (given or {}).get("quant_method")
    if method == "mxfp4":
        return "mxfp4", transformers.Mxfp4Config(dequantize=True)
    if method == "fp8":
        blocks = list((given or {}).get("weight_block_size") or [])
        return "fp8" if blocks == [128, 128] else "model", transformers.FineGrainedFP8Config(dequantize=True)
    return "model", None


def _config(folder: Path, transformers: Any) -> Any:
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CompileError(f"{file} is no JSON object: {error}") from error
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what a configuration's own checks raise differs from model to model
        raise CompileError(
            f"transformers {transformers.__version__} cannot read {file}, of model type '{kind}': {_said(error)}",
            hint="a newer transformers may; code that comes with a model is never run",
        ) from error


def _architecture(folder: Path, config: Any, transformers: Any) -> Any:
    names = list(getattr(config, "architectures", None) or [])
    if not names:
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) in mapping:
            return mapping[type(config)]
        raise CompileError(
            f"{folder / 'config.json'} names no architecture, and {type(config).__name__} has no default"
        )
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CompileError(
            f"transformers {transformers.__version__} has no architecture '{names[0]}' (from {folder / 'config.json'})",
            hint="a newer transformers may; code that comes with a model is never run",
        )
    return cls


def _read(cls: Any, folder: Path, dtype: torch.dtype | None, widened: Any) -> nn.Module:
    """The model with its stored weights; `widened` as of `_packing`.

    Raises: CompileError, also where some are missing or have other shapes.
    """
    try:
        model, report = cls.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **({} if widened is None else {"quantization_config": widened}),
        )
    except Exception as error:  # damaged files, other shapes: each library raises its own
        raise CompileError(f"the weights in {folder} cannot be read: {_said(error)}") from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CompileError(
            f"the weights in {folder} lack {shown}, which {cls.__name__} has",
            hint="the download may be incomplete; --random-weights makes all of them up",
        )
    return cast(nn.Module, model)


def _said(error: BaseException) -> str:
    """What an error of another's code says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _made(cls: Any, config: Any, dtype: torch.dtype | None, meta: bool) -> nn.Module:
    """The model by its own initialisation, each parameter made once, in its final dtype."""
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    if meta:
        with torch.device("meta"):
            return cls._from_config(config, dtype=wanted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return cls._from_config(config, dtype=wanted)


def _from_factory(path: Path, factory: str, dtype: torch.dtype | None) -> LoadedModel:
    make = _factory(path, factory)
    with _users_code(f"{path}:{factory}"):
        made = make()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise CompileError(
            f"{path}:{factory} returned a {type(made).__name__}",
            hint="return (model, inputs): a module, and a tuple, a dict or a tensor to call it with",
        )
    model, inputs = made
    model = model if dtype is None else model.to(dtype)
    if isinstance(inputs, Mapping):
        return LoadedModel(model.eval(), factory, (), dict(inputs))
    return LoadedModel(model.eval(), factory, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,))


@contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Say in a sentence, with the user's line, what the user's own code raises. Raises: CompileError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, CompileError):
            raise
        raise CompileError(f"{what} raised {_said(error)}", locations.of_exception(error)) from error


def _factory(path: Path, name: str) -> Callable[[], Any]:
    if not path.is_file():
        raise CompileError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that dataclasses and pickles in it find themselves
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _users_code(str(path)):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    found = getattr(module, name, None)
    if not callable(found):
        own = [
            n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == path.stem
        ]
        raise CompileError(f"{path} has no function '{name}'", hint=f"it has: {', '.join(own) or 'none'}")
    return found


def describe_absence(module: Module, name: str = "the model") -> Diagnostic | None:
    """A warning for a captured model in which nothing is sparse; None where there are `moe` ops."""
    ops = list(module.walk())
    if any(op.dialect == "moe" and op.regions for op in ops):
        return None
    linears = sum(op.name == "aten.linear" for op in ops)
    top_k = next((op for op in ops if op.name == "aten.topk"), None)
    if top_k is None:
        return Diagnostic(
            f"{name} is dense: {linears} linear layers, no experts and no routing, so there is nothing to compile",
            severity="warning",
            hint="run it with torch.compile; sparsec compiles sparse expert models",
        )
    return Diagnostic(
        f"{name} chooses the top k here, but no bank of experts was recognised after it",
        top_k.loc,
        severity="warning",
        hint="stack the experts' weights as [experts, out, in] and call torch.ops.sparsec.experts",
    )
