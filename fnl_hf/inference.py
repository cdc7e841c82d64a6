"""One question, one answer."""

from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from fnl_hf.data.squad import EXAMPLE_FEATURES, FeatureMaker
from fnl_hf.data.squad_answers import answers_from_logits
from fnl_hf.data.tokenizer import load_tokenizer
from fnl_hf.errors import UserInputError


@torch.no_grad()
def ask(
    model: PreTrainedModel | str | Path,
    question: str,
    context: str,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_answer_length: int = 30,
    version_2_with_negative: bool = False,
    null_score_diff_threshold: float = 0.0,
) -> dict[str, Any]:
    """Answer one question with a span of its context.

    Args:
        model: a question answering model, or the name or folder of one.
        tokenizer: its tokenizer; by default the one saved with the model.
        version_2_with_negative: allow no answer, "" with start = end = 0.

    Returns:
        ``answer`` (text), ``start`` and ``end`` (characters in the context), ``score`` (probability among the n best).

    Raises:
        UserInputError: an empty question or context, or lengths that leave no room for the context.
    """
    if not question.strip() or not context.strip():
        raise UserInputError("question and context must not be empty")
    if isinstance(model, str | Path):
        model = cast(PreTrainedModel, AutoModelForQuestionAnswering.from_pretrained(model))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(tokenizer or str(model.name_or_path))
    max_seq_length = min(max_seq_length, model.config.max_position_embeddings)
    row = {"id": "0", "question": question, "context": context, "answers": {"text": [], "answer_start": []}}
    examples = Dataset.from_list([row], features=EXAMPLE_FEATURES)
    features = FeatureMaker(tokenizer, max_seq_length, doc_stride).evaluation(examples)
    inputs = tokenizer.pad({name: features[name] for name in tokenizer.model_input_names}, return_tensors="pt")
    was_training = model.training
    outputs = model.eval()(**inputs.to(model.device))
    model.train(was_training)
    answers = answers_from_logits(
        examples,
        features,
        outputs.start_logits.float().cpu().numpy(),
        outputs.end_logits.float().cpu().numpy(),
        max_answer_length=max_answer_length,
        version_2_with_negative=version_2_with_negative,
        null_score_diff_threshold=null_score_diff_threshold,
    )
    text = answers.text["0"]
    entry = next(entry for entry in answers.nbest["0"] if entry["text"] == text)
    start, end = entry["offsets"]
    return {"answer": text, "start": start, "end": end, "score": entry["probability"]}
