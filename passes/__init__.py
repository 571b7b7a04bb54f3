"""The passes. Importing this package registers every one under its name."""

from sparsec.passes import (
    canonicalize,
    canonicalize_routers,
    cse,
    dce,
    derive_weights,
    fuse,
    inline,
    lower,
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
    "inline",
    "lower",
    "options",
    "parse_pipeline",
    "print_pipeline",
    "raise_experts",
    "raise_route",
    "recompose",
    "schedule",
]
