"""Corpora, tokenizers, masking; SQuAD features and answers."""
