"""Text for pretraining: corpora, tokenizers, packed rows and pairs, streams, masks."""
