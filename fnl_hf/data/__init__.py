"""Corpora, tokenizers, packed rows and pairs, streams, masking; SQuAD features and answers."""
