"""SQuAD v1.1 and v2.0: questions from files, the Hub or the embedded sample, and their features.

A long context is cut into overlapping windows ("features"); each holds the whole question and a part of the context.
"""

import json
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from fnl_hf.errors import UserInputError

# BERT cuts questions to 64 tokens (``max_query_length`` of the original run_squad.py).
MAX_QUESTION_TOKENS = 64
SAMPLE_FILES = {"train": "squad_sample_train.json", "validation": "squad_sample_validation.json"}
EXAMPLE_FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "context": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
    }
)


def load_sample(split: str) -> Dataset:
    """The embedded sample about Python: 71 questions on 12 paragraphs to train on, 20 on 4 others to evaluate."""
    return read_squad_file(resources.files("fnl_hf.data") / SAMPLE_FILES[split])


def load_squad_hub(name: str, config: str | None, split: str, cache_dir: str | None = None) -> Dataset:
    """A data set on the Hub with the columns of ``rajpurkar/squad``."""
    try:
        loaded = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise UserInputError(f"--dataset_name {name}: {error}") from error
    if split == "test" and "answers" not in loaded.column_names:
        loaded = loaded.add_column("answers", [{"text": [], "answer_start": []}] * len(loaded))
    missing = [column for column in EXAMPLE_FEATURES if column not in loaded.column_names]
    if missing:
        raise UserInputError(f"--dataset_name {name} has no columns {missing}, only {loaded.column_names}")
    loaded = loaded.select_columns(list(EXAMPLE_FEATURES)).cast(EXAMPLE_FEATURES)
    for example in loaded:
        validate_answers(example, f"--dataset_name {name}")
    return loaded


def read_squad_file(file: str | Path | Any) -> Dataset:
    """Questions of a JSON file in the layout of SQuAD v1.1 or v2.0; unanswerable ones have no answers.

    Raises:
        UserInputError: a missing, empty or malformed file, or an answer whose offset does not match its context.
    """
    path = Path(file) if isinstance(file, str) else file
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserInputError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"{file}: cannot be read: {error}") from error
    if not text.strip():
        raise UserInputError(f"{file}: the file is empty")
    try:
        articles = json.loads(text)["data"]
        examples = [
            _flatten(question, paragraph["context"])
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except json.JSONDecodeError as error:
        raise UserInputError(f"{file}: not JSON: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserInputError(f"{file}: not in SQuAD's layout (data, paragraphs, qas): {error!r}") from error
    if not examples:
        raise UserInputError(f"{file}: no questions")
    seen: set[str] = set()
    for example in examples:
        if example["id"] in seen:
            raise UserInputError(f"{file}: question id {example['id']!r} occurs twice")
        seen.add(example["id"])
        validate_answers(example, str(file))
    return Dataset.from_list(examples, features=EXAMPLE_FEATURES)


def _flatten(question: dict[str, Any], context: str) -> dict[str, Any]:
    answers = [] if question.get("is_impossible", False) else question.get("answers", [])
    texts = [context, question["question"], *(answer["text"] for answer in answers)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"question {question['id']}: context, question and answers must be texts, got {texts}")
    if not all(type(answer["answer_start"]) is int for answer in answers):
        raise TypeError(f"question {question['id']}: answer_start must be an integer")
    return {
        "id": str(question["id"]),
        "question": question["question"],
        "context": context,
        "answers": {
            "text": [answer["text"] for answer in answers],
            "answer_start": [answer["answer_start"] for answer in answers],
        },
    }


def validate_answers(example: dict[str, Any], where: str) -> None:
    """Raise UserInputError unless every answer stands in the context at its offset."""
    for text, start in zip(example["answers"]["text"], example["answers"]["answer_start"], strict=True):
        found = example["context"][start : start + len(text)] if start >= 0 else ""
        if not text or found != text:
            raise UserInputError(
                f"{where}: question {example['id']}: the answer {text!r} is not at offset {start} of its context, "
                f"{found!r} is"
            )


@dataclass(frozen=True)
class FeatureMaker:
    """Makes features of questions: [CLS] question [SEP] window of the context [SEP].

    Args:
        tokenizer: a fast one; it says where each token stands in the context.
        max_seq_length: tokens in a feature.
        doc_stride: tokens that neighbouring windows share.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int = 384
    doc_stride: int = 128

    def train(self, examples: Dataset, num_proc: int | None = None) -> Dataset:
        """Features with ``start_positions`` and ``end_positions``; both are the [CLS] token's where the window
        lacks the answer."""
        return self._map(examples, partial(train_features, maker=self), num_proc)

    def evaluation(self, examples: Dataset, num_proc: int | None = None) -> Dataset:
        """Features with ``example_id`` and ``offset_mapping``: (start, end) in the context, (-1, -1) elsewhere."""
        return self._map(examples, partial(evaluation_features, maker=self), num_proc)

    def _map(self, examples, function, num_proc):
        self.check()
        return examples.map(
            function, batched=True, num_proc=num_proc, remove_columns=examples.column_names, desc="Making features"
        )

    def check(self) -> None:
        """Raise UserInputError for lengths that leave no room for a context."""
        if self.tokenizer.cls_token_id is None or self.tokenizer.sep_token_id is None:
            raise UserInputError(f"{type(self.tokenizer).__name__} has no [CLS] or [SEP] token")
        if self.doc_stride < 0 or self.max_seq_length - self.tokenizer.num_special_tokens_to_add(pair=True) < 2:
            raise UserInputError(
                f"--max_seq_length ({self.max_seq_length}) leaves no room for a question and a context, or "
                f"--doc_stride ({self.doc_stride}) is negative"
            )

    def encode(self, questions: list[str], contexts: list[str]):
        """Tokenize pairs with overflow; questions longer than 64 tokens are cut.

        Raises:
            UserInputError: a question leaves a window no longer than ``doc_stride``.
        """
        questions = [question.strip() for question in questions]
        encoded = self.tokenizer(
            questions, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        longest = 0
        for index, offsets in enumerate(encoded["offset_mapping"]):
            if len(offsets) > MAX_QUESTION_TOKENS:
                questions[index] = questions[index][: offsets[MAX_QUESTION_TOKENS - 1][1]]
            longest = max(longest, min(len(offsets), MAX_QUESTION_TOKENS))
        window = self.max_seq_length - longest - self.tokenizer.num_special_tokens_to_add(pair=True)
        if window <= self.doc_stride:
            raise UserInputError(
                f"--doc_stride ({self.doc_stride}) must be smaller than the window for the context ({window}): "
                f"--max_seq_length ({self.max_seq_length}) less the longest question ({longest}) and special tokens"
            )
        return self.tokenizer(
            questions,
            contexts,
            truncation="only_second",
            padding=False,
            max_length=self.max_seq_length,
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )


def train_features(batch: dict[str, list], maker: FeatureMaker) -> dict[str, list]:
    """Features of a batch of questions, with the first answer's token positions."""
    encoded = maker.encode(batch["question"], batch["context"])
    owners = encoded.pop("overflow_to_sample_mapping")
    offset_mapping = encoded.pop("offset_mapping")
    starts, ends = [], []
    for index, offsets in enumerate(offset_mapping):
        answers = batch["answers"][owners[index]]
        no_answer = encoded["input_ids"][index].index(maker.tokenizer.cls_token_id)
        span = None
        if answers["text"]:
            start_char = answers["answer_start"][0]
            span = _token_span(offsets, encoded.sequence_ids(index), start_char, start_char + len(answers["text"][0]))
        start, end = span or (no_answer, no_answer)
        starts.append(start)
        ends.append(end)
    return {**encoded, "start_positions": starts, "end_positions": ends}


def _token_span(offsets, sequence_ids, start_char: int, end_char: int) -> tuple[int, int] | None:
    """The tokens of the context that cover the characters, or None where the window lacks some of them."""
    context = [token for token, sequence in enumerate(sequence_ids) if sequence == 1]
    covering = [token for token in context if offsets[token][0] < end_char and offsets[token][1] > start_char]
    if not covering or offsets[context[0]][0] > start_char or offsets[context[-1]][1] < end_char:
        return None
    return covering[0], covering[-1]


def evaluation_features(batch: dict[str, list], maker: FeatureMaker) -> dict[str, list]:
    """Features of a batch of questions, with what is needed to turn positions into text."""
    encoded = maker.encode(batch["question"], batch["context"])
    owners = encoded.pop("overflow_to_sample_mapping")
    offset_mapping = [
        [list(offset) if sequence == 1 else [-1, -1] for offset, sequence in zip(offsets, encoded.sequence_ids(index))]
        for index, offsets in enumerate(encoded.pop("offset_mapping"))
    ]
    return {**encoded, "example_id": [batch["id"][owner] for owner in owners], "offset_mapping": offset_mapping}
