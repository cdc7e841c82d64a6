"""Optimizers with Frobenius decay, and LAMB."""

from fnl_hf.optim.adamw import FrobeniusAdamW
from fnl_hf.optim.lamb import FrobeniusLamb, Lamb
from fnl_hf.optim.param_groups import frobenius_param_groups
from fnl_hf.optim.sgd import FrobeniusSGD

__all__ = ["FrobeniusAdamW", "FrobeniusLamb", "FrobeniusSGD", "Lamb", "frobenius_param_groups"]
