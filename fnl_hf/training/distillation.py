"""Distillation: a student learns the hidden states and logits of a teacher, on text without labels.

Shapes: B sequences, S tokens, L layers, d hidden size, C classes or tokens of the vocabulary.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from fnl_hf.bert.evaluation import evaluation_mode
from fnl_hf.bert.moments import POSITION_LOGITS
from fnl_hf.errors import UserInputError
from fnl_hf.training.pretraining_trainer import PretrainingTrainer
from fnl_hf.training.trainer import LABEL_NAMES

OF_TOKENS, OF_SEQUENCES, OF_POSITIONS = "tokens", "sequences", "positions"  # what logits classify
SMALLEST_NORM = 1e-12  # avoids division by zero for hidden states of zeros


# ---- the loss ----


def hidden_state_errors(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """The squared error of each token's hidden states, relative to the teacher's: the mean over the layers l of ‖h_l -
    t_l‖² / ‖t_l‖².

    Each token has its own scale. So no layer or token with large activations dominates, and the loss is a sum over
    tokens, however a batch is split.

    Args:
        student: L + 1 tensors (B, S, d), the embeddings' output first.
        teacher: k·L + 1 likewise, of which every k-th counts (Jiao et al. 2020, arXiv 1909.10351, uniform mapping).

    Returns:
        (B, S), float32.
    """
    stride = (len(teacher) - 1) // (len(student) - 1)
    errors = [
        (own.float() - other.float()).square().sum(-1) / other.float().square().sum(-1).clamp_min(SMALLEST_NORM)
        for own, other in zip(student, teacher[::stride], strict=True)
    ]
    return torch.stack(errors).mean(dim=0)


def logit_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) over the last dimension, in nats; T² keeps the gradient's
    scale (Hinton et al. 2015, arXiv 1503.02531)."""
    target = (teacher.float() / temperature).log_softmax(dim=-1)
    log_odds = target - (student.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * (target.exp() * log_odds).sum(dim=-1)


def answer_divergence(student: Any, teacher: Any, mask: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The mean (B,) of the :func:`logit_divergence` of the answer's start and end; positions of padding, where ``mask``
    (B, S) is 0, are excluded."""
    divergences = [
        logit_divergence(_at_tokens(student[name], mask), _at_tokens(teacher[name], mask), temperature)
        for name in POSITION_LOGITS
    ]
    return torch.stack(divergences).mean(dim=0)


def _at_tokens(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)


def distillation_sums(student: Any, teacher: Any, mask: torch.Tensor, logits: Mapping[str, str]) -> torch.Tensor:
    """The terms of the loss, one row per sequence.

    Args:
        student, teacher: outputs of the models, with ``hidden_states`` and these logits, of one shape.
        mask: (B, S), 0 at padding.
        logits: the logits to compare, see :func:`match_models`.

    Returns:
        (B, 3), sums over a sequence's tokens: 1, :func:`hidden_state_errors`, cosine of the last hidden states. With
        logits (B, 5): also the :func:`logit_divergence` of its tokens, and that of the sequence itself.
    """
    mask = mask.float()
    errors = (hidden_state_errors(student.hidden_states, teacher.hidden_states) * mask).sum(dim=1)
    with torch.no_grad():
        last, target = student.hidden_states[-1].float(), teacher.hidden_states[-1].float()
        cosines = functional.cosine_similarity(last, target, dim=-1)
    columns = [mask.sum(dim=1), errors, (cosines * mask).sum(dim=1)]
    if logits:
        of_tokens, of_sequences = torch.zeros_like(errors), torch.zeros_like(errors)
        for name, kind in logits.items():
            own, other = student[name], teacher[name]
            if kind == OF_TOKENS:
                of_tokens = of_tokens + (logit_divergence(own, other) * mask).sum(dim=1)
            elif kind == OF_POSITIONS:
                of_sequences = of_sequences + logit_divergence(_at_tokens(own, mask), _at_tokens(other, mask))
            else:
                of_sequences = of_sequences + logit_divergence(own, other)
        columns += [of_tokens, of_sequences]
    return torch.stack(columns, dim=1)


def distillation_metrics(prediction: Any) -> dict[str, float]:
    """``compute_metrics`` on the rows of :func:`distillation_sums`: "loss", its parts "hidden_loss" and, if both models
    have logits, "logit_loss", and "cosine", the mean over tokens of the cosine of the last hidden states."""
    rows = np.asarray(prediction.predictions, dtype=np.float64)
    tokens, errors, cosines = rows[:, :3].sum(axis=0)
    metrics = {"loss": errors / tokens, "hidden_loss": errors / tokens, "cosine": cosines / tokens}
    if rows.shape[1] > 3:
        metrics["logit_loss"] = rows[:, 3].sum() / tokens + rows[:, 4].mean()
        metrics["loss"] += metrics["logit_loss"]
    return metrics


# ---- the models ----


class Teacher:
    """A frozen model in evaluation mode. It is not a module, so no student saves, trains, casts or wraps it."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.model = model.requires_grad_(False).eval().to(device)
        self.parameters = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
        """The teacher's outputs for a student's inputs, without labels and without token types that the teacher does
        not accept."""
        left_out = {*LABEL_NAMES, *({"token_type_ids"} - set(self.parameters))}
        given = {name: value for name, value in inputs.items() if name not in left_out}
        return self.model(**given, return_dict=True, **kwargs)


def match_models(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, str]:
    """Check that the layers of two models can be compared: each layer of the student with one layer of the teacher, or
    with the last of k layers. Freeze parameters of the student that the loss does not reach, such as the pooler if
    hidden states are compared: DDP waits for the gradients of all trainable parameters.

    Returns:
        The names of the logits that both models have, and what they classify: OF_TOKENS, OF_SEQUENCES, or, as a
        distribution over the tokens, OF_POSITIONS. Without those that are no distribution over classes: one of a
        sequence (a regression) or one of each token (ELECTRA's discriminator).

    Raises:
        UserInputError: a model without hidden states, a number of layers that is no multiple of the student's, other
            sizes, or logits of other shapes.
    """
    tokens = 2 + (student.config.num_labels == 2)  # another number than that of the classes
    own, other = _probe(student, tokens), _probe(teacher.requires_grad_(False), tokens)
    sizes = [(len(found.hidden_states) - 1, found.hidden_states[-1].shape[-1]) for found in (own, other)]
    (layers, size), (teachers_layers, teachers_size) = sizes
    if size != teachers_size or layers == 0 or teachers_layers % layers:
        raise UserInputError(
            "the teacher must have as many layers as the student, or a multiple, and the same hidden size: the "
            f"student has {layers} layers of size {size}, the teacher {teachers_layers} of size {teachers_size}"
        )
    shared = [name for name in own if name.endswith("logits") and name in other]
    for name in shared:
        if own[name].shape != other[name].shape:
            raise UserInputError(
                f"the student's {name} have {own[name].shape[-1]} classes, the teacher's {other[name].shape[-1]}: "
                "they must have the same number"
            )
    logits = {name: _kind_of(name, own[name]) for name in shared if _is_of_classes(name, own[name], tokens)}
    compared = [*own.hidden_states, *(own[name] for name in logits)]
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    total = torch.stack([values.float().sum() for values in compared]).sum()
    for weight, gradient in zip(weights, torch.autograd.grad(total, weights, allow_unused=True)):
        weight.requires_grad_(gradient is not None)
    return logits


def _kind_of(name: str, logits: torch.Tensor) -> str:
    if name in POSITION_LOGITS:
        return OF_POSITIONS
    return OF_TOKENS if logits.dim() == 3 else OF_SEQUENCES


def _is_of_classes(name: str, logits: torch.Tensor, tokens: int) -> bool:
    of_each_token = logits.dim() == 2 and logits.shape[1] == tokens and name not in POSITION_LOGITS
    return logits.shape[-1] > 1 and not of_each_token


def _probe(model: PreTrainedModel, tokens: int) -> Any:
    """The outputs for a text."""
    ids = torch.arange(tokens, device=model.device)[None] % 2
    try:
        with _evaluating_eagerly(model), torch.enable_grad():
            outputs = model(input_ids=ids, output_hidden_states=True, return_dict=True)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise UserInputError(f"{type(model).__name__} cannot be distilled: {error}") from error
    if outputs.get("hidden_states") is None:
        raise UserInputError(
            f"{type(model).__name__} cannot be distilled: it does not return the hidden states of one encoder"
        )
    return outputs


def drop_nothing(model: nn.Module) -> None:
    """Turn off dropout, whose noise is larger than the remaining errors. The saved configuration keeps its dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # T5's and ModernBERT's attention has a number instead
                setattr(module, name, 0.0)


@contextmanager
def _evaluating_eagerly(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode with eager attention, the only kernel that runs on every device in every precision."""
    kernel = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        with evaluation_mode(model):
            yield
    finally:
        model.set_attn_implementation(kernel)


# ---- training ----


class DistillationTrainer(PretrainingTrainer):
    """PretrainingTrainer with a distillation loss: the mean of :func:`hidden_state_errors` over the tokens of the
    global batch without padding. If both models have logits, their :func:`logit_divergence` is added: as a mean over
    the tokens, or over the sequences for logits of whole sequences.

    Args:
        model: the student; what of it no loss reaches is frozen.
        teacher: with as many layers of the same size, or a multiple of them; its inputs are the student's.

    Raises:
        UserInputError: see :func:`match_models`.
    """

    def __init__(self, model: PreTrainedModel, args=None, *, teacher: PreTrainedModel, **kwargs):
        self.logits = match_models(model, teacher)  # before Trainer's constructor makes the output folder
        drop_nothing(model)
        super().__init__(model, args, **kwargs)
        self.teacher = Teacher(teacher, self.args.device)

    def _count_items(self, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
        if not batches:
            return None
        masks = [token_mask(batch) for batch in batches]
        sizes = [torch.stack([mask.ne(0).sum(), mask.new_tensor(len(mask))]) for mask in masks]
        return dict(zip(("tokens", "sequences"), self.sum_over_processes(torch.stack(sizes).sum(dim=0))))

    def _loss_and_outputs(self, model, inputs: dict[str, Any], items) -> Any:
        """The loss and, as outputs, the rows of :func:`distillation_sums`."""
        with self.accelerator.autocast():
            target = self.teacher(inputs, output_hidden_states=True)
        outputs = model(**inputs, output_hidden_states=True, return_dict=True)
        rows = distillation_sums(outputs, target, token_mask(inputs), self.logits)
        processes = self.processes_to_average() if items else 1
        items = items or {"tokens": rows[:, 0].sum(), "sequences": len(rows)}
        loss = rows[:, 1].sum() / items["tokens"]
        if rows.shape[1] > 3:
            loss = loss + rows[:, 3].sum() / items["tokens"] + rows[:, 4].sum() / items["sequences"]
        return loss * processes, rows

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        """Like Trainer's, with the rows of :func:`distillation_sums` as predictions. Trainer computes metrics only if
        there are labels, so the numbers of tokens are returned as labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, rows = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, rows, rows[:, 0])


def token_mask(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B, S), 0 at padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask
