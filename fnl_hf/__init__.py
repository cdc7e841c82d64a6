"""fnl_hf: factorized layers for Hugging Face Transformers.

BERT whose attention is products of matrices, optimizers that decay the products instead of their factors, and the
scripts that pretrain and fine-tune such models (Khodak et al., ICLR 2021).
"""

import transformers

from fnl_hf import modeling_fnl_bert
from fnl_hf.configuration_fnl_bert import FnlBertConfig
from fnl_hf.diagnostics import diagnose_products
from fnl_hf.errors import UserInputError
from fnl_hf.factorization import RANK_DIMS, Product, product_norms, spectral_factors
from fnl_hf.factorization_config import FactorizationConfig
from fnl_hf.factorized_checkpoints import load_factorized, record_layers, save_factorized
from fnl_hf.inference import ask
from fnl_hf.layers import FactorizedConv1D, FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from fnl_hf.modeling_fnl_bert import (
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
from fnl_hf.optim import FrobeniusAdamW, FrobeniusLamb, FrobeniusSGD, Lamb, frobenius_param_groups
from fnl_hf.products import find_products, register_product
from fnl_hf.surgery import factorization_table, factorize, merge

__version__ = "0.1.0"

transformers.AutoConfig.register("fnl_bert", FnlBertConfig, exist_ok=True)
transformers.AutoTokenizer.register(FnlBertConfig, fast_tokenizer_class=transformers.BertTokenizer, exist_ok=True)
for _auto_class, _name in modeling_fnl_bert.AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(FnlBertConfig, getattr(modeling_fnl_bert, _name), exist_ok=True)

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
    "product_norms",
    "record_layers",
    "register_product",
    "save_factorized",
    "spectral_factors",
]
