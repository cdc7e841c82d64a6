"""Layers whose weight is a product of two or three matrices."""

from fnl_hf.layers.base import Dense, FactorizedLayer
from fnl_hf.layers.conv import FactorizedConv2d
from fnl_hf.layers.embedding import FactorizedEmbedding
from fnl_hf.layers.linear import FactorizedConv1D, FactorizedLinear

__all__ = [
    "Dense",
    "FactorizedConv1D",
    "FactorizedConv2d",
    "FactorizedEmbedding",
    "FactorizedLayer",
    "FactorizedLinear",
]
