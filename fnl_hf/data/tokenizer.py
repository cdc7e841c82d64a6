"""Tokenizers: loading fast ones, and training WordPiece on a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from fnl_hf.errors import UserInputError, reason_of

if TYPE_CHECKING:  # models are built even if no library for data sets is installed
    from datasets import Dataset

logger = logging.get_logger(__name__)

ALPHABET_FLOOR = 1000  # minimum number of characters to keep; the library's own limit
ALPHABET_COVERAGE = 0.9995  # SentencePiece's default for languages with many characters
UNKNOWN_BOUND = 0.005  # maximum share of unknown tokens in a text that a tokenizer fits


def validate_coverage(alphabet_coverage: float) -> None:
    """Raise UserInputError unless it is a share of a text's characters."""
    if not 0.0 < alphabet_coverage <= 1.0:
        raise UserInputError(f"--alphabet_coverage ({alphabet_coverage}) must be above 0 and at most 1")


def train_tokenizer(
    documents: Dataset, vocab_size: int, model_max_length: int, alphabet_coverage: float = ALPHABET_COVERAGE
) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer like BERT's, trained on the column "text"; deterministic.

    ``tokenizers`` numbers the pieces "##c" in the order of a randomly seeded hash map and breaks ties between merges by
    number, so two trainings on one text differ. Numbering the pieces beforehand, as if they were special tokens,
    prevents this.

    Args:
        alphabet_coverage: share of the text's characters that have an entry of their own, the most frequent first, at
            most 1; not reached where the vocabulary is too small. A word with another character is one [UNK].
    """
    if vocab_size < 10:
        raise UserInputError(f"--vocab_size ({vocab_size}) must be at least 10, for five special tokens and some text")
    validate_coverage(alphabet_coverage)
    blank = BertTokenizer()
    backend = Tokenizer(models.WordPiece(unk_token=blank.unk_token))
    backend.normalizer = blank.backend_tokenizer.normalizer
    backend.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    batches = [range(start, min(start + 1000, len(documents))) for start in range(0, len(documents), 1000)]
    letters: Counter[str] = Counter()
    for batch in batches:
        letters.update(backend.normalizer.normalize_str(" ".join(documents[batch]["text"])))
    specials = [str(blank.convert_ids_to_tokens(i)) for i in range(len(blank))]
    alphabet, inside = _choose_alphabet(letters, backend.normalizer, vocab_size - len(specials), alphabet_coverage)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=specials + [f"##{letter}" for letter in sorted(inside)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator((documents[batch]["text"] for batch in batches), trainer)
    return BertTokenizer(vocab=backend.get_vocab(with_added_tokens=False), model_max_length=model_max_length)


def _choose_alphabet(
    letters: Counter[str], normalizer: normalizers.Normalizer, entries: int, coverage: float
) -> tuple[list[str], list[str]]:
    """The most frequent characters that cover their share of a text, and those that may occur inside a word.

    Such a character takes one entry of the vocabulary for the start of a word and one for its continuation. A Chinese
    character, which the normalizer makes a word of its own, takes one.
    """
    alphabet: list[str] = []
    inside: list[str] = []
    covered, total = 0, sum(count for letter, count in letters.items() if not letter.isspace())
    for letter in sorted(sorted(letters), key=lambda letter: -letters[letter]):
        if len(alphabet) >= ALPHABET_FLOOR and covered >= coverage * total:
            break
        goes_on = not letter.isspace() and normalizer.normalize_str(letter) == letter
        if len(alphabet) + len(inside) + 1 + goes_on > entries:
            break
        alphabet.append(letter)
        inside += [letter] * goes_on
        covered += 0 if letter.isspace() else letters[letter]
    return alphabet, inside


def warn_of_unknown_tokens(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, where: str) -> None:
    """Warn if too many of the token ids, except special ones, are [UNK], because the tokenizer does not fit the
    text."""
    unknown = tokenizer.unk_token_id
    others = [i for i in tokenizer.all_special_ids if i != unknown]
    if unknown is None or unknown in (tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id):
        return  # byte-level tokenizers know all text
    count, total = int((ids == unknown).sum()), int((~np.isin(ids, others)).sum())
    if count > UNKNOWN_BOUND * total:
        name = tokenizer.name_or_path or "trained on the corpus"
        logger.warning(
            f"{where}: {count / total:.1%} of {total:,} tokens are {tokenizer.unk_token}: the tokenizer ({name}) "
            "does not fit this text. Choose another --tokenizer_name; if it was trained on the corpus, raise "
            "--vocab_size or --alphabet_coverage"
        )


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a folder or the Hub.

    Raises:
        UserInputError: there is none, or it is a slow one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # its files are read without checks
        raise UserInputError(f"no tokenizer in {name_or_path}: {reason_of(error)}") from error
    if not tokenizer.is_fast:
        raise UserInputError(
            f"the tokenizer of {name_or_path} ({type(tokenizer).__name__}) is a slow one: a fast tokenizer is needed"
        )
    return tokenizer


def vocabulary_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All token ids, ascending. They may have gaps: ``len(tokenizer)`` counts them but does not bound them."""
    return np.unique(np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id + 1: the size of a table indexed by ids."""
    return int(vocabulary_ids(tokenizer)[-1]) + 1


def validate_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, whose: str = "the model's") -> None:
    """Raise UserInputError for a tokenizer with ids outside of the model's vocabulary."""
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        raise UserInputError(
            f"the largest token id of the tokenizer needs a vocabulary of {size}, more than {whose} vocab_size "
            f"({vocab_size})"
        )


def validate_tokenizer(tokenizer: PreTrainedTokenizerBase, needed: Sequence[str]) -> None:
    """Raise UserInputError unless the tokenizer has tokens in addition to special ones, and the special tokens
    ``needed``, for example "mask_token"."""
    name = name_of(tokenizer)
    missing = [token for token in needed if getattr(tokenizer, token) is None]
    if missing:
        raise UserInputError(f"the tokenizer of {name} has no {missing}")
    # Transformers creates an empty one if tokenizer.json is missing
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserInputError(f"the tokenizer of {name} has only its {len(tokenizer)} special tokens and no vocabulary")


def validate_same_vocabulary(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Raise UserInputError unless each token has the same id for the teacher and the student."""
    validate_tokenizer(other, ())
    here, there = tokenizer.get_vocab(), other.get_vocab()
    if here != there:
        token = min(here.items() ^ there.items(), key=lambda entry: entry[1])[0]
        raise UserInputError(
            f"the teacher ({other.name_or_path}) must have the vocabulary of its student: {token!r} has the id "
            f"{there.get(token)} in the teacher's and {here.get(token)} in the student's"
        )


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Its folder or its name on the Hub; its class if it has neither."""
    return tokenizer.name_or_path or type(tokenizer).__name__
