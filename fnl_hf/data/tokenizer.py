"""Tokenizers: any fast one, and WordPiece that is trained on a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from fnl_hf.errors import UserInputError, reason_of

if TYPE_CHECKING:  # models are built where no library for data sets is installed
    from datasets import Dataset

logger = logging.get_logger(__name__)

ALPHABET_FLOOR = 1000  # characters that are kept even if fewer cover the text; the library's own limit
ALPHABET_COVERAGE = 0.9995  # SentencePiece's default for languages with many characters
UNKNOWN_BOUND = 0.005  # share of unknown tokens above which a tokenizer does not fit a text


def validate_coverage(alphabet_coverage: float) -> None:
    """Raise UserInputError unless it is a share of a text's characters."""
    if not 0.0 < alphabet_coverage <= 1.0:
        raise UserInputError(f"--alphabet_coverage ({alphabet_coverage}) must be above 0 and at most 1")


def train_tokenizer(
    documents: Dataset, vocab_size: int, model_max_length: int, alphabet_coverage: float = ALPHABET_COVERAGE
) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer as BERT's, trained on the column "text"; the same each time.

    ``tokenizers`` numbers the pieces "##c" in the order of a randomly seeded hash map and breaks ties between merges by
    number, so that two trainings on one text differ. Numbered beforehand, as if they were special tokens, they do not.

    Args:
        alphabet_coverage: share of the text's characters that have an entry of their own, the most frequent first, at
            most 1; not reached where the vocabulary is too small. A word with another character is one [UNK].
    """
    if vocab_size < 10:
        raise UserInputError(f"--vocab_size ({vocab_size}) must be at least 10: five special tokens and some text")
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
    """The most frequent characters that cover their share of a text, and those of them that may stand inside a word.

    Each takes one entry of the vocabulary to begin a word and one to go on with it. A Chinese character, which the
    normalizer makes a word of its own, takes one.
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
    """Warn if too many of some token ids, special ones aside, are [UNK]: the tokenizer does not fit the text."""
    unknown = tokenizer.unk_token_id
    others = [i for i in tokenizer.all_special_ids if i != unknown]
    if unknown is None or unknown in (tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id):
        return  # of bytes, which are all known
    count, total = int((ids == unknown).sum()), int((~np.isin(ids, others)).sum())
    if count > UNKNOWN_BOUND * total:
        name = tokenizer.name_or_path or "trained on the corpus"
        logger.warning(
            f"{where}: {count / total:.1%} of {total:,} tokens are {tokenizer.unk_token}: the tokenizer ({name}) does "
            "not fit this text. Another --tokenizer_name may; one that is trained on the corpus knows more with a "
            "larger --vocab_size or --alphabet_coverage"
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
        raise UserInputError(f"the tokenizer of {name_or_path} is a slow one ({type(tokenizer).__name__})")
    return tokenizer


def vocabulary_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All token ids, ascending. They may have holes: ``len(tokenizer)`` counts them and bounds none."""
    return np.unique(np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id + 1: what a table indexed by ids must hold."""
    return int(vocabulary_ids(tokenizer)[-1]) + 1


def validate_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise UserInputError for a tokenizer with ids that a model of this vocabulary has not."""
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        raise UserInputError(
            f"by its largest id the tokenizer has {size} tokens, more than the model's vocab_size ({vocab_size})"
        )


def validate_tokenizer(tokenizer: PreTrainedTokenizerBase, needed: Sequence[str]) -> None:
    """Raise UserInputError unless the tokenizer has others than special tokens, and those that are ``needed``, as
    "mask_token"."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    missing = [token for token in needed if getattr(tokenizer, token) is None]
    if missing:
        raise UserInputError(f"the tokenizer of {name} has no {missing}")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # Transformers makes one where tokenizer.json is missing
        raise UserInputError(f"the tokenizer of {name} has no vocabulary, only {len(tokenizer)} special tokens")


def validate_same_vocabulary(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Raise UserInputError unless each token has the same id in both, that of the teacher and that of its student."""
    here, there = tokenizer.get_vocab(), other.get_vocab()
    if here != there:
        token = min(here.items() ^ there.items(), key=lambda entry: entry[1])[0]
        raise UserInputError(
            f"the teacher ({other.name_or_path}) must have the vocabulary of its student: {token!r} has the id "
            f"{there.get(token)} there and {here.get(token)} here"
        )
