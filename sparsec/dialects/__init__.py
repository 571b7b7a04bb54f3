"""The dialects. Importing this package registers every op."""

from sparsec.dialects import aten, builtin, kernel, moe

__all__ = ["aten", "builtin", "kernel", "moe"]
