"""The passes. Importing this package registers every one under its name."""

from sparsec.passes import (
    canonicalize,
    canonicalize_routers,
    cse,
    dce,
    derive_weights,
    fuse,
    fuse_layer,
    inline,
    lower,
    pack_banks,
    raise_experts,
    raise_route,
    recompose,
    schedule,
)
from sparsec.passes.base import PASSES, Option, Pass, PassContext, options, parse_pipeline, print_pipeline

__all__ = [
    "PASSES",
    "Option",
    "Pass",
    "PassContext",
    "canonicalize",
    "canonicalize_routers",
    "cse",
    "dce",
    "derive_weights",
    "fuse",
    "fuse_layer",
    "inline",
    "lower",
    "options",
    "pack_banks",
    "parse_pipeline",
    "print_pipeline",
    "raise_experts",
    "raise_route",
    "recompose",
    "schedule",
]
