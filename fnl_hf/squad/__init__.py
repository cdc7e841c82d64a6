"""Extractive question answering on SQuAD: features, answers, scores, training, and ``ask``."""
