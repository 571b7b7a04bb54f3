"""Expert layers as functions of tensors, for models and for adapters (`sparsec.register_experts`).

Each call is one operator of a captured graph. In eager mode it runs too: by the runtime's kernels once
`sparsec.eager` is imported, which `sparsec.use_experts` does, otherwise expert by expert in plain PyTorch.
"""

from sparsec.frontend.functional import capacity, experts, glu, grouped_linear

__all__ = ["capacity", "experts", "glu", "grouped_linear"]
