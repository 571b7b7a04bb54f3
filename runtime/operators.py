"""Which PyTorch operators a plan may call, and whether the arguments it gives them fit their schemas.

A plan comes out of a file, so an operator runs only if it is functional, computes from its arguments alone, and is not
known to read beyond them: `aten`'s public functional operators, some private ones, a few in-place updates of buffers,
and the operators of other namespaces that the caller of `load` allows by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

import torch

from sparsec.runtime.dims import compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRIVATE = _words(
    "_to_copy _unsafe_view _unsafe_index _softmax _log_softmax _grouped_mm _scaled_mm _weight_norm "
    "_reshape_copy _conj _adaptive_avg_pool2d _adaptive_avg_pool3d _native_multi_head_attention _euclidean_dist "
    "_cdist_forward _fft_c2c _fft_c2r _fft_r2c _scaled_dot_product_flash_attention_for_cpu _assert_async "
    "_assert_scalar _safe_softmax _local_scalar_dense _cast_Float _cast_Half _cast_Long _stack _unique2 "
)
"""Private operators of aten that exported programs use and that check their arguments."""

IN_PLACE = _words(
    "copy_ index_copy_ index_put_ index_add_ index_fill_ scatter_ scatter_add_ fill_ zero_ add_ mul_ masked_fill_ "
    "masked_scatter_ "
)
"""In-place operators that may update a buffer, their first argument."""

DENIED = _words(
    "from_file set set_data resize resize_as as_strided_scatter empty_quantized data retain_grad requires_grad_ "
    "pin_memory record_stream rename refine_names sym_storage_offset ctc_loss native_batch_norm "
)
"""Functional by their schemas, but they read files, reinterpret storage, act on more than their arguments, or do not
compare sizes and indices."""

DENIED_PREFIXES = ("cudnn_", "fbgemm_", "miopen_", "mkldnn_", "quantized_", "segment_reduce", "sparse_", "sym_")
"""Families that read packed weights or indices as they are given. So do backward operators, which inference lacks."""

MEMORY_FORMATS: dict[str, torch.memory_format] = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}

CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": {**DTYPES},
    "memory_format": {**MEMORY_FORMATS},
    "float": {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")},
}
"""What argument trees such as `{"dtype": "bf16"}` and `{"float": "inf"}` stand for."""


@lru_cache(None)
def _find(name: str) -> torch._ops.OpOverload | None:
    parts = name.split(".")
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        return None
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    found = getattr(packet, parts[2], None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def resolve(name: str, allow: Collection[str] = ()) -> torch._ops.OpOverload:
    """The operator `namespace.name.overload`.

    Args:
        allow: what else may be called beside aten's: namespaces (`mylib`) or operators (`mylib.rotate`).

    Raises:
        ArtifactError: this torch has no such operator, or a plan may not call it.
    """
    namespace, _, rest = name.partition(".")
    short = rest.partition(".")[0]
    if namespace != "aten" and namespace not in allow and f"{namespace}.{short}" not in allow:
        raise ArtifactError(
            f"the plan calls '{name}', which is not allowed; to allow it, load with allow=['{namespace}']"
        )
    op = _find(name)
    if op is None:
        raise ArtifactError(f"the plan calls '{name}', which torch {torch.__version__} does not have")
    if namespace == "aten":
        mutable = op._schema.is_mutable
        private = short.startswith("_") and short not in PRIVATE
        denied = short in DENIED or short.startswith(DENIED_PREFIXES) or "_backward" in short
        if private or denied or (mutable and short not in IN_PLACE) or "Stream" in str(op._schema):
            raise ArtifactError(f"the plan calls '{name}', which a plan may not call")
    return op


def updates(op: torch._ops.OpOverload) -> bool:
    """Whether the operator changes its first argument."""
    return op._schema.is_mutable


def slots_of(tree: Any) -> Iterator[int]:
    """The slots that an argument tree mentions, in order."""
    if isinstance(tree, list):
        for item in tree:
            yield from slots_of(item)
    elif isinstance(tree, dict) and "slot" in tree:
        yield tree["slot"]


def dims_of(tree: Any) -> Iterator[str]:
    """The dimension expressions that an argument tree mentions."""
    if isinstance(tree, list):
        for item in tree:
            yield from dims_of(item)
    elif isinstance(tree, dict) and "dim" in tree:
        yield tree["dim"]


def problems(op: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any]) -> Iterator[str]:
    """Where the argument trees of a call do not fit the operator's schema, in words."""
    params = op._schema.arguments
    positional = [param for param in params if not param.kwarg_only]
    by_name = {param.name: param for param in params}
    if len(args) > len(positional):
        yield f"gives {len(args)} positional arguments, the operator takes {len(positional)}"
    given = set[str]()
    for param, tree in zip(positional, args, strict=False):
        given.add(param.name)
        if (why := _misfit(tree, _kind(param))) is not None:
            yield f"argument '{param.name}' {why}"
    for name, tree in kwargs.items():
        if name not in by_name or name in given:
            yield f"gives '{name}' {'twice' if name in given else 'which the operator does not take'}"
        elif (why := _misfit(tree, _kind(by_name[name]))) is not None:
            yield f"argument '{name}' {why}"
        given.add(name)
    for param in params:
        if param.name not in given and not param.has_default_value():
            yield f"lacks argument '{param.name}'"


def _kind(param: torch.Argument) -> str:
    """The type of a parameter: `Tensor`, `int`, `ScalarType`, `Optional[...]`, `List[...]` ..."""
    return str(param.real_type)


def _misfit(tree: Any, kind: str) -> str | None:
    """Why an argument tree is not of a schema type, or None if it is."""
    if kind.startswith("Optional["):
        return None if tree is None else _misfit(tree, kind[9:-1])
    if not kind.startswith("List["):
        return _scalar_misfit(tree, kind)
    inner = kind[5:-1]
    if not isinstance(tree, list):
        # Schemas such as int[1] take a lone number too.
        return _scalar_misfit(tree, inner) if inner in ("int", "float") else f"is {_short(tree)}, not a list"
    return next((why for item in tree if (why := _misfit(item, inner)) is not None), None)


def _scalar_misfit(tree: Any, kind: str) -> str | None:
    tag = next(iter(tree), "") if isinstance(tree, dict) and len(tree) == 1 else ""
    number = isinstance(tree, int | float) or tag in ("slot", "dim", "float")
    good = {
        "Tensor": tag == "slot",
        "int": (isinstance(tree, int) and not isinstance(tree, bool)) or tag in ("slot", "dim"),
        "float": (number and not isinstance(tree, bool)),
        "number": number,
        "Scalar": number,
        "bool": isinstance(tree, bool) or tag == "slot",
        "str": isinstance(tree, str),
        "ScalarType": tag == "dtype",
        "MemoryFormat": tag == "memory_format",
        "Device": tag == "device",
    }.get(kind)
    if good is None:
        return f"is of type {kind}, which a plan cannot hold"
    return None if good and _tag_is_sound(tree, tag) else f"is {_short(tree)}, not of type {kind}"


def _tag_is_sound(tree: Any, tag: str) -> bool:
    if not tag:
        return True
    value = tree[tag]
    if tag == "slot":
        return isinstance(value, int) and not isinstance(value, bool)
    if tag == "dim":
        compile_dim(value)
        return True
    return value is True if tag == "device" else isinstance(value, str) and value in CONSTANTS[tag]


def _short(tree: Any) -> str:
    text = repr(tree)
    return text if len(text) < 50 else text[:47] + "..."
