"""Optimizers with Frobenius decay, and LAMB."""

from fnl_hf.optim.adamw import FrobeniusAdamW
from fnl_hf.optim.lamb import FrobeniusLamb, Lamb
from fnl_hf.optim.muon import FrobeniusMuon
from fnl_hf.optim.muon_groups import muon_param_groups
from fnl_hf.optim.param_groups import frobenius_param_groups
from fnl_hf.optim.sgd import FrobeniusSGD

__all__ = [
    "FrobeniusAdamW",
    "FrobeniusLamb",
    "FrobeniusMuon",
    "FrobeniusSGD",
    "Lamb",
    "frobenius_param_groups",
    "muon_param_groups",
]
