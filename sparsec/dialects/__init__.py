"""The dialects. Importing this package registers every op."""

from sparsec.dialects import aten, builtin, dist, kernel, moe

__all__ = ["aten", "builtin", "dist", "kernel", "moe"]
