"""Held-out loss and accuracy of masked language modelling, weighted by token."""

import numpy as np
import torch


@torch.no_grad()
def masked_lm_statistics(logits, labels: torch.Tensor) -> torch.Tensor:
    """Per sequence: masked tokens, Σ of their cross-entropies, correct predictions: (B, 3).

    For ``Trainer(preprocess_logits_for_metrics=...)``: one row a sequence is what has to be gathered, not B·S·V logits.

    Args:
        logits: (B, S, V), or (labelled positions, V) from a head with ``sparse_prediction``.
        labels: (B, S), -100 where nothing is predicted.
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    targets = labels[rows, columns]
    if logits.dim() == 3:
        logits = logits[rows, columns]
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    correct = (logits.argmax(-1) == targets).float()
    values = torch.stack([torch.ones_like(losses), losses, correct], dim=1)
    return torch.zeros(len(labels), 3, device=labels.device).index_add_(0, rows, values)


def masked_lm_metrics(prediction) -> dict[str, float]:
    """``compute_metrics`` on the rows above: loss, accuracy and perplexity over all masked tokens."""
    tokens, loss, correct = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    mean_loss = loss / tokens
    return {"loss": mean_loss, "accuracy": correct / tokens, "perplexity": float(np.exp(min(mean_loss, 700.0)))}
