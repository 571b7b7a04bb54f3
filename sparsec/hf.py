"""Importing this module makes `model.set_experts_implementation("sparsec")` work for transformers' MoE models."""

from sparsec.eager import run
from sparsec.frontend.experts_hook import NAME, register

register()

__all__ = ["NAME", "run"]
