"""Answer questions with a fine-tuned model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fnl_hf.bert.evaluation import evaluation_mode
from fnl_hf.data.tokenizer import load_tokenizer
from fnl_hf.errors import UserInputError, validate_bounds
from fnl_hf.squad.answers import AnswerOptions, answers_from_logits
from fnl_hf.squad.features import FeatureMaker, evaluation_features
from fnl_hf.training.models import ANSWER_LOGITS, load_question_answering_model, usable_positions


@overload
def ask(
    model: PreTrainedModel | str | Path, question: str, context: str, *args: Any, **kwargs: Any
) -> dict[str, Any]: ...


@overload
def ask(
    model: PreTrainedModel | str | Path, question: Sequence[str], context: Sequence[str], *args: Any, **kwargs: Any
) -> list[dict[str, Any]]: ...


def ask(
    model: PreTrainedModel | str | Path,
    question: str | Sequence[str],
    context: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_answer_length: int = 30,
    version_2_with_negative: bool = False,
    null_score_diff_threshold: float = 0.0,
    batch_size: int = 32,
    trust_remote_code: bool = False,
) -> dict[str, Any] | list[dict[str, Any]]:
    """Answer one question with a span of its context, or each of several questions with a span of its own context.

    Args:
        model: a question answering model, used on its current device, or the name or folder of one, loaded onto the
            GPU if there is one.
        question: one question, or a list.
        context: the context of the question, or a list as long as the list of questions.
        tokenizer: the model's tokenizer; by default the one saved with it.
        max_seq_length: tokens of the question and a window of the context together; limited by the model's positions.
        doc_stride: tokens from the start of one window of a context to the start of the next.
        max_answer_length: maximum number of tokens in an answer.
        version_2_with_negative: allow no answer, "" with start = end = 0.
        null_score_diff_threshold: give no answer if its score minus that of the best span is above this.
        batch_size: windows per forward pass.
        trust_remote_code: run the code that comes with the model or tokenizer.

    Returns:
        ``answer`` (text), ``start`` and ``end`` (characters in the context), ``score`` (probability among the n best);
        for a list of questions, a list of these.

    Raises:
        UserInputError: there is no such model or it has no trained question answering head, a question or context is
            empty, the lists differ in length, or the lengths leave no room for the context.
    """
    questions, contexts = _as_lists(question, context)
    validate_bounds("batch_size", batch_size, 1)
    options = AnswerOptions(
        max_answer_length=max_answer_length,
        version_2_with_negative=version_2_with_negative,
        null_score_diff_threshold=null_score_diff_threshold,
    )
    answering = model if isinstance(model, PreTrainedModel) else _load(str(model), trust_remote_code)
    _validate_head(answering)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(tokenizer or str(answering.name_or_path), trust_remote_code)
    if not questions:
        return []
    maker = FeatureMaker(tokenizer, min(max_seq_length, usable_positions(answering) or max_seq_length), doc_stride)
    examples = {"id": list(map(str, range(len(questions)))), "question": questions, "context": contexts}
    features = evaluation_features(examples, maker)
    start, end = _logits(answering, tokenizer, features, batch_size)
    answers = answers_from_logits(examples, features, start, end, options)
    found = []
    for name in examples["id"]:
        text = answers.text[name]
        entry = next(entry for entry in answers.nbest[name] if entry["text"] == text)
        first, last = entry["offsets"]
        found.append({"answer": text, "start": first, "end": last, "score": entry["probability"]})
    return found[0] if isinstance(question, str) else found


def _as_lists(question: str | Sequence[str], context: str | Sequence[str]) -> tuple[list[str], list[str]]:
    if isinstance(question, str) != isinstance(context, str):
        raise UserInputError("give one question and one context, or a list of each")
    questions, contexts = ([texts] if isinstance(texts, str) else list(texts) for texts in (question, context))
    if len(questions) != len(contexts):
        raise UserInputError(f"{len(questions)} questions and {len(contexts)} contexts: give one context per question")
    for index, texts in enumerate(zip(questions, contexts)):
        if not all(text.strip() for text in texts):
            raise UserInputError(f"question and context must not be empty, but number {index + 1} is {texts!r}")
    return questions, contexts


def _load(name: str, trust_remote_code: bool) -> PreTrainedModel:
    model: Any = load_question_answering_model(name, trust_remote_code=trust_remote_code)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _validate_head(model: PreTrainedModel) -> None:
    """Refuse a model passed by the caller that has no head for question answering."""
    logits = getattr(getattr(model, "qa_outputs", None), "out_features", ANSWER_LOGITS)
    if logits != ANSWER_LOGITS:
        raise UserInputError(
            f"this {type(model).__name__} returns {logits} logits per token (num_labels): question answering needs "
            f"{ANSWER_LOGITS}, for start and end"
        )


@torch.no_grad()
def _logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, features: dict[str, list], batch_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Start and end logits of each feature; long ones first, so that a batch has little padding."""
    lengths = [len(ids) for ids in features["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start, end = ([np.empty(0)] * len(order) for _ in range(2))
    with evaluation_mode(model):
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            columns = {name: [features[name][row] for row in rows] for name in tokenizer.model_input_names}
            outputs = model(**tokenizer.pad(columns, return_tensors="pt").to(model.device))
            if "start_logits" not in outputs:
                raise UserInputError(
                    f"this {type(model).__name__} is not a question answering model: it returns {', '.join(outputs)}"
                )
            for logits, kept in ((outputs.start_logits, start), (outputs.end_logits, end)):
                for row, values in zip(rows, logits.float().cpu().numpy()):
                    kept[row] = values[: lengths[row]]
    return start, end
