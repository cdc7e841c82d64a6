"""Held-out loss and accuracy of masked language modeling and next sentence prediction, weighted by token and pair."""

import numpy as np
import torch


@torch.no_grad()
def pretraining_statistics(logits, labels) -> torch.Tensor:
    """Per sequence: number of masked tokens, sum of their cross-entropies, number of correct predictions: (B, 3). For
    pairs also the cross-entropy of the sentence label and whether it was predicted: (B, 5).

    For ``Trainer(preprocess_logits_for_metrics=...)``: processes gather one row per sequence instead of B·S·V logits.

    Args:
        logits: (B, S, V), or (B, K, V) at given positions; with (B, 2) sentence logits as a tuple.
        labels: (B, S) or (B, K), -100 where nothing is predicted; with (B,) sentence labels as a tuple.
    """
    if isinstance(labels, tuple):
        labels, sentence_labels = labels
        sentence = torch.nn.functional.cross_entropy(logits[1].float(), sentence_labels, reduction="none")
        correct = (logits[1].argmax(-1) == sentence_labels).float()
        return torch.cat([_masked_tokens(logits[0], labels), torch.stack([sentence, correct], dim=1)], dim=1)
    return _masked_tokens(logits[0] if isinstance(logits, tuple) else logits, labels)


def _masked_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    targets, logits = labels[rows, columns], logits[rows, columns]
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    values = torch.stack([torch.ones_like(losses), losses, (logits.argmax(-1) == targets).float()], dim=1)
    return torch.zeros(len(labels), 3, device=labels.device).index_add_(0, rows, values)


def pretraining_metrics(prediction) -> dict[str, float]:
    """``compute_metrics`` on the rows above: loss, accuracy and perplexity over all masked tokens; for pairs also
    ``nsp_loss`` and ``nsp_accuracy``, and ``loss`` is the sum of ``mlm_loss`` and ``nsp_loss``."""
    rows = np.asarray(prediction.predictions, dtype=np.float64)
    tokens, loss, correct = rows[:, :3].sum(axis=0)
    mlm_loss = loss / tokens
    metrics = {"loss": mlm_loss, "accuracy": correct / tokens, "perplexity": float(np.exp(min(mlm_loss, 700.0)))}
    if rows.shape[1] == 3:
        return metrics
    nsp_loss, nsp_accuracy = rows[:, 3:].mean(axis=0)
    return metrics | {
        "loss": mlm_loss + nsp_loss,
        "mlm_loss": mlm_loss,
        "nsp_loss": nsp_loss,
        "nsp_accuracy": nsp_accuracy,
    }
