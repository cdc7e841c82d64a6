"""FNL-BERT, and the mathematics of products.

Every file here but this one travels with checkpoints: they lie flat and import torch, transformers, huggingface_hub and
each other by relative name.
"""
