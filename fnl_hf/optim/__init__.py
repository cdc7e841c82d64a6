"""Optimizers with decoupled Frobenius decay."""

from fnl_hf.optim.adamw import FrobeniusAdamW
from fnl_hf.optim.param_groups import frobenius_param_groups

__all__ = ["FrobeniusAdamW", "frobenius_param_groups"]
