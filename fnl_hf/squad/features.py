"""SQuAD v1.1 and v2.0: questions from files, the Hub or the embedded sample, and their features.

A long context is cut into overlapping windows ("features"); each contains the whole question and a part of the context.
Windows, the answers in them, and the choice of the window for each token are those of ``run_squad.py`` in
google-research/bert. But answers are characters of the context, so its search for the words of word pieces is not
needed.

Shapes: W windows of a context, N tokens of the context.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from fnl_hf.data.arrow_cache import cached_dataset
from fnl_hf.data.encoding import plain_backend, threads_for
from fnl_hf.data.tokenizer import warn_of_unknown_tokens
from fnl_hf.errors import UserInputError, validate_bounds

MAX_QUESTION_TOKENS = 64  # ``max_query_length`` of the original run_squad.py
FEATURES_VERSION = 1  # raise it when the same questions give other features, so that older caches are not used
BATCH_SIZE = 500  # number of questions whose features are computed at once
# columns for evaluation, in addition to the model's inputs
ANSWER_COLUMNS = ("example_id", "offset_mapping", "token_is_max_context")
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
    return read_squad_file(resources.files("fnl_hf.squad") / SAMPLE_FILES[split])


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
        raise UserInputError(f"--dataset_name {name} lacks the columns {missing}: it has {loaded.column_names}")
    try:
        loaded = loaded.select_columns(list(EXAMPLE_FEATURES)).cast(EXAMPLE_FEATURES)
        for example in loaded:
            validate_answers(example, f"--dataset_name {name}")
    except (pa.ArrowException, UnicodeDecodeError, TypeError) as error:  # Arrow's JSON reader accepts any bytes as text
        raise UserInputError(f"--dataset_name {name} does not have the layout of rajpurkar/squad: {error}") from error
    return loaded


def read_squad_file(file: str | Path | Any) -> Dataset:
    """Questions of a JSON file in the layout of SQuAD v1.1 or v2.0; unanswerable ones have no answers.

    Raises:
        UserInputError: a missing, empty or malformed file, or an answer whose offset does not match its context.
    """
    path = Path(file) if isinstance(file, str) else file
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserInputError(f"{file}: no such file") from error
    except IsADirectoryError as error:
        raise UserInputError(f"{file}: not a file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"{file}: cannot be read: {error}") from error
    if not text.strip():
        raise UserInputError(f"{file}: the file is empty")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{file}: not JSON: {error}") from error
    try:
        examples = [
            _flatten(question, paragraph["context"])
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except UserInputError as error:
        raise UserInputError(f"{file}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserInputError(f"{file}: not in SQuAD's layout (data, paragraphs, qas): {error!r}") from error
    if not examples:
        raise UserInputError(f"{file}: contains no questions")
    for example in examples:
        validate_answers(example, str(file))
    return Dataset.from_list(examples, features=EXAMPLE_FEATURES)


def _flatten(question: dict[str, Any], context: str) -> dict[str, Any]:
    name, impossible = question["id"], question.get("is_impossible", False)
    if type(name) not in (str, int):
        raise TypeError(f"the id of a question must be a string, not {name!r}")
    if not isinstance(impossible, bool):
        raise TypeError(f"question {name!r}: is_impossible must be true or false, not {impossible!r}")
    answers = [] if impossible else question.get("answers", [])
    if not isinstance(answers, list):
        raise TypeError(f"question {name!r}: answers must be a list, not {answers!r}")
    texts = [context, question["question"], *(answer["text"] for answer in answers)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"question {name!r}: context, question and answers must be strings, not {texts}")
    for text in (str(name), *texts):
        validate_unicode(text, f"question {name!r}")
    if not all(type(answer["answer_start"]) is int for answer in answers):
        raise TypeError(f"question {name!r}: answer_start must be an integer")
    return {
        "id": str(name),
        "question": question["question"],
        "context": context,
        "answers": {
            "text": [answer["text"] for answer in answers],
            "answer_start": [answer["answer_start"] for answer in answers],
        },
    }


def validate_unicode(text: str, where: str) -> None:
    """Raise UserInputError for half of a surrogate pair, which JSON and command lines can contain but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserInputError(f"{where}: the character at position {error.start} is not Unicode: {text!r}") from error


def validate_answers(example: dict[str, Any], where: str) -> None:
    """Raise UserInputError unless every answer is in the context at its offset."""
    for text, start in zip(example["answers"]["text"], example["answers"]["answer_start"], strict=True):
        found = example["context"][start : start + len(text)] if start >= 0 else ""
        if not text or found != text:
            raise UserInputError(
                f"{where}: question {example['id']}: the answer {text!r} is not at offset {start} of its context, "
                f"which has {found!r} there"
            )


def validate_ids(examples: Dataset, split: str) -> None:
    """Raise UserInputError if two questions share an id: answers are stored, written and scored by id."""
    for name, count in Counter(examples["id"]).most_common(1):
        if count > 1:
            raise UserInputError(f"question id {name!r} occurs {count} times among the {split} questions")


def questions_fingerprint(examples: Dataset) -> str:
    """A checksum of all questions, contexts and answers, independent of their file."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(examples), BATCH_SIZE):
        digest.update(repr(examples[start : start + BATCH_SIZE]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class FeatureMaker:
    """Makes features of questions: [CLS] question [SEP] window of the context [SEP].

    Args:
        tokenizer: a fast one; it says where each token stands in the context.
        max_seq_length: tokens in a feature, at most.
        doc_stride: tokens of the context from the start of one window to that of the next.
        cache_dir: where features are kept and found again; by default the cache of ``datasets``.
        num_proc: processes that make them, one thread each.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int = 384
    doc_stride: int = 128
    cache_dir: str | None = None
    num_proc: int | None = None

    def __post_init__(self):
        if self.tokenizer.cls_token_id is None or self.tokenizer.sep_token_id is None:
            raise UserInputError(f"{type(self.tokenizer).__name__} has no [CLS] or [SEP] token")
        for name in ("max_seq_length", "doc_stride"):
            validate_bounds(name, getattr(self, name), 1)
        if self.tokenizer.padding_side != "right":  # answers are counted from the left
            raise UserInputError(
                f"the tokenizer's padding_side ({self.tokenizer.padding_side!r}) must be 'right' for question answering"
            )

    def train_dataset(self, examples: Dataset) -> Dataset:
        """Features with ``start_positions`` and ``end_positions``; both are the [CLS] token if the window does not
        contain the whole answer."""
        position = Value("int32")
        return self._cached("train", train_features, examples, {"start_positions": position, "end_positions": position})

    def eval_dataset(self, examples: Dataset) -> Dataset:
        """Features with ``example_id``, ``offset_mapping``: (start, end) in the context, (-1, -1) elsewhere, and
        ``token_is_max_context``: the tokens that no other window shows with more context around them."""
        kinds = (Value("string"), List(List(Value("int32"))), List(Value("bool")))
        return self._cached("evaluation", evaluation_features, examples, dict(zip(ANSWER_COLUMNS, kinds)))

    def _cached(self, kind: str, make: Callable, examples: Dataset, columns: dict[str, Any]) -> Dataset:
        inputs = {name: List(Value("int32")) for name in self.tokenizer.model_input_names}
        digest = xxhash.xxh3_128()
        lengths, tokenizer = (self.max_seq_length, self.doc_stride), plain_backend(self.tokenizer).to_str()
        for part in (FEATURES_VERSION, kind, questions_fingerprint(examples), lengths, tokenizer, list(inputs)):
            digest.update(repr(part).encode())
        pieces = [(start, min(start + BATCH_SIZE, len(examples))) for start in range(0, len(examples), BATCH_SIZE)]
        features = Features(inputs | columns)
        arguments = {"make": make, "examples": examples, "maker": self, "schema": features.arrow_schema}
        with threads_for(self.num_proc):
            return cached_dataset(
                "squad", _tables, pieces, arguments, features, digest.hexdigest(), self.cache_dir, self.num_proc
            )

    def warn_of_unknown_tokens(self, features: Dataset, where: str) -> None:
        """Warn if the tokenizer does not fit the text of some features."""
        ids = features[:: max(1, len(features) // 1000)]["input_ids"]
        warn_of_unknown_tokens(self.tokenizer, np.concatenate(ids), where)

    def encode(self, questions: list[str], contexts: list[str]) -> Iterator[BatchEncoding]:
        """The windows of the context for each question, in order; questions longer than 64 tokens are cut.

        Special tokens spelled out in a text stay text.

        Raises:
            UserInputError: a question leaves no room for a token of the context, or a text is not Unicode.
        """
        options: dict[str, Any] = {"return_offsets_mapping": True, "split_special_tokens": True, "verbose": False}
        for text in (*questions, *contexts):
            validate_unicode(text, "question and context")
        questions = [question.strip() for question in questions]
        alone = self.tokenizer(questions, add_special_tokens=False, **options)["offset_mapping"]
        for question, offsets, context in zip(questions, alone, contexts, strict=True):
            if len(offsets) > MAX_QUESTION_TOKENS:
                question = question[: offsets[MAX_QUESTION_TOKENS - 1][1]]
            length = min(len(offsets), MAX_QUESTION_TOKENS)
            window = self.max_seq_length - length - self.tokenizer.num_special_tokens_to_add(pair=True)
            if window < 1:
                raise UserInputError(
                    f"--max_seq_length ({self.max_seq_length}) leaves no room for the context after a question of "
                    f"{length} tokens and the special tokens"
                )
            yield self.tokenizer(
                [question],
                [context],
                truncation="only_second",
                max_length=self.max_seq_length,
                # the tokenizer's stride: tokens that neighboring windows share
                stride=max(0, window - self.doc_stride),
                return_overflowing_tokens=True,
                **options,
            )


def _tables(pieces, make, examples, maker, schema) -> Iterator[pa.Table]:
    for start, stop in pieces:
        yield pa.Table.from_pydict(make(examples[start:stop], maker), schema=schema)


def _context_offsets(windows: BatchEncoding, context: str) -> list[list[tuple[int, int]]]:
    """(start, end) in the context for each window's tokens; (-1, -1) for tokens of the question and special tokens."""
    found = []
    for index, offsets in enumerate(windows["offset_mapping"]):
        owned = [pair if sequence == 1 else (-1, -1) for pair, sequence in zip(offsets, windows.sequence_ids(index))]
        found.append(owned if context.isascii() else [(start, _with_marks(context, end)) for start, end in owned])
    return found


def _with_marks(context: str, end: int) -> int:
    """The end of a character including its accents if ``end`` would cut them off, because an uncased tokenizer drops
    accents."""
    while 0 < end < len(context) and unicodedata.category(context[end]) == "Mn":
        end += 1
    return end


def train_features(batch: dict[str, list], maker: FeatureMaker) -> dict[str, list]:
    """Features of a batch of questions, with the first answer's token positions."""
    inputs = maker.tokenizer.model_input_names
    columns: dict[str, list] = {name: [] for name in (*inputs, "start_positions", "end_positions")}
    encoded = maker.encode(batch["question"], batch["context"])
    for windows, context, answers in zip(encoded, batch["context"], batch["answers"], strict=True):
        for index, offsets in enumerate(_context_offsets(windows, context)):
            no_answer = windows["input_ids"][index].index(maker.tokenizer.cls_token_id)
            span = _token_span(offsets, answers["text"][0], answers["answer_start"][0]) if answers["text"] else None
            for name in inputs:
                columns[name].append(windows[name][index])
            for name, position in zip(("start_positions", "end_positions"), span or (no_answer, no_answer)):
                columns[name].append(position)
    return columns


def _token_span(offsets: list[tuple[int, int]], text: str, start: int) -> tuple[int, int] | None:
    """The tokens that cover the answer ``text``, or None if the window lacks a part of it."""
    end = start + len(text.rstrip())
    start += len(text) - len(text.lstrip())  # white space has no token
    context = [token for token, (first, _) in enumerate(offsets) if first >= 0]
    covering = [token for token in context if offsets[token][0] < end and offsets[token][1] > start]
    if not covering or offsets[context[0]][0] > start or offsets[context[-1]][1] < end:
        return None
    return covering[0], covering[-1]


def evaluation_features(batch: dict[str, list], maker: FeatureMaker) -> dict[str, list]:
    """Features of a batch of questions, with what is needed to turn positions into text."""
    inputs = maker.tokenizer.model_input_names
    columns: dict[str, list] = {name: [] for name in (*inputs, *ANSWER_COLUMNS)}
    encoded = maker.encode(batch["question"], batch["context"])
    for example_id, windows, context in zip(batch["id"], encoded, batch["context"], strict=True):
        offset_mapping = _context_offsets(windows, context)
        in_context = [[start >= 0 for start, _ in offsets] for offsets in offset_mapping]
        for name in inputs:
            columns[name] += windows[name]
        columns["example_id"] += [example_id] * len(offset_mapping)
        columns["offset_mapping"] += offset_mapping
        columns["token_is_max_context"] += _max_context(in_context, maker.doc_stride)
    return columns


def _max_context(in_context: list[list[bool]], doc_stride: int) -> list[list[bool]]:
    """For each window's tokens, whether this window has the most context on the shorter side, of all windows with the
    token. Ties are decided by 0.01 of the length and then by order (``_check_is_max_context`` of the original)."""
    lengths = np.array([sum(window) for window in in_context])[:, None]  # (W, 1)
    starts = np.arange(len(lengths))[:, None] * min(lengths[0, 0], doc_stride)  # (W, 1)
    positions = np.arange(starts[-1, 0] + lengths[-1, 0])  # (N,)
    poorer_side = np.minimum(positions - starts, starts + lengths - 1 - positions)  # (W, N)
    best = np.where(poorer_side >= 0, poorer_side + 0.01 * lengths, -1.0).argmax(axis=0)  # (N,)
    marked = []
    for index, window in enumerate(in_context):
        flags = np.zeros(len(window), dtype=bool)
        flags[np.flatnonzero(window)] = best[starts[index, 0] : starts[index, 0] + lengths[index, 0]] == index
        marked.append(flags.tolist())
    return marked
