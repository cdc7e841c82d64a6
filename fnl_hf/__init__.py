"""fnl_hf: factorized layers for Hugging Face Transformers.

A BERT with factorized attention, optimizers that decay products of matrices instead of their factors, and the scripts
that pretrain and fine-tune such models (Khodak et al., ICLR 2021).
"""

import importlib
from typing import TYPE_CHECKING

import transformers

from fnl_hf.bert import modeling_fnl_bert
from fnl_hf.bert.configuration_fnl_bert import FnlBertConfig
from fnl_hf.bert.factorization import RANK_DIMS, Product, product_norms, spectral_factors
from fnl_hf.bert.modeling_fnl_bert import (
    FnlBertForMaskedLM,
    FnlBertForMultipleChoice,
    FnlBertForNextSentencePrediction,
    FnlBertForPreTraining,
    FnlBertForQuestionAnswering,
    FnlBertForSequenceClassification,
    FnlBertForTokenClassification,
    FnlBertModel,
    FnlBertPreTrainedModel,
    FnlBertSelfAttention,
    factor_pairs,
)
from fnl_hf.errors import UserInputError
from fnl_hf.layers import FactorizedConv1D, FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from fnl_hf.optim import (
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusMuon,
    FrobeniusSGD,
    Lamb,
    frobenius_param_groups,
    muon_param_groups,
)
from fnl_hf.products.diagnostics import diagnose_products
from fnl_hf.products.discovery import find_products, register_attention, register_product
from fnl_hf.surgery.checkpoints import load_factorized, record_layers, save_factorized
from fnl_hf.surgery.config import FactorizationConfig
from fnl_hf.surgery.factorize import factorization_table, factorize, merge
from fnl_hf.version import __version__ as __version__

if TYPE_CHECKING:
    from fnl_hf.squad.inference import ask

transformers.AutoConfig.register("fnl_bert", FnlBertConfig, exist_ok=True)
transformers.AutoTokenizer.register(FnlBertConfig, fast_tokenizer_class=transformers.BertTokenizer, exist_ok=True)
for _auto_class, _name in modeling_fnl_bert.AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(FnlBertConfig, getattr(modeling_fnl_bert, _name), exist_ok=True)


def __getattr__(name: str):
    """``ask`` is imported when it is used: it needs the libraries for data sets, which models and optimizers do not."""
    if name == "ask":
        return importlib.import_module("fnl_hf.squad.inference").ask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "FactorizationConfig",
    "FactorizedConv1D",
    "FactorizedConv2d",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "FnlBertConfig",
    "FnlBertForMaskedLM",
    "FnlBertForMultipleChoice",
    "FnlBertForNextSentencePrediction",
    "FnlBertForPreTraining",
    "FnlBertForQuestionAnswering",
    "FnlBertForSequenceClassification",
    "FnlBertForTokenClassification",
    "FnlBertModel",
    "FnlBertPreTrainedModel",
    "FnlBertSelfAttention",
    "FrobeniusAdamW",
    "FrobeniusLamb",
    "FrobeniusMuon",
    "FrobeniusSGD",
    "Lamb",
    "RANK_DIMS",
    "Product",
    "UserInputError",
    "ask",
    "diagnose_products",
    "factor_pairs",
    "factorization_table",
    "factorize",
    "find_products",
    "frobenius_param_groups",
    "load_factorized",
    "merge",
    "muon_param_groups",
    "product_norms",
    "record_layers",
    "register_attention",
    "register_product",
    "save_factorized",
    "spectral_factors",
]
