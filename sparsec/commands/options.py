"""What several commands' options mean."""

from __future__ import annotations

PHASES = ("capture", "raise", "place", "fuse", "schedule", "lower", "emit")
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
"""`--dtype` as torch spells it."""
TEXTS = (".sparsec", ".mlir")
"""How names of texts of modules end."""
