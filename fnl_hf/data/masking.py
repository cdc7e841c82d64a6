"""Dynamic masking for masked language modeling, as a pure function of (seed, epoch, sample).

Masks drawn from a global generator depend on workers, processes and the time of a resume. Here, each token's draw is a
hash of (seed, epoch, sample, position), so a mask is the same wherever and whenever it is computed.

All sequences have the same number of masked positions, a rounded share of the tokens (as in Devlin et al. 2019). So the
heads have the same shape in every step, which compiled models need. Sequences of single documents are as long as the
longest of their batch, and so are their heads.

Shapes: B sequences, S tokens, K masked positions, T token ids, V the largest of them + 1, D documents
of a batch.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.rows import Column, Rows
from fnl_hf.data.streaming import StreamedRows, StreamState
from fnl_hf.data.tokenizer import name_of, vocabulary_ids, vocabulary_size
from fnl_hf.errors import UserInputError

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # shares of the masked tokens; the rest is unchanged (Devlin et al. 2019)
IGNORED = -100  # the label that cross-entropy ignores
HELD_OUT_SEED = 0  # seed for the masks of held-out rows, so that runs with different seeds can be compared
# The attention kernels, and how they are given the documents of the tokens.
ATTENTION_KERNELS = {"sdpa": "mask", "eager": "mask", "flash_attention_2": "varlen"}
# Mark of a space before a word -> marks of all white space: SentencePiece has one, byte-level BPE four.
SPACE_MARKS = {"▁": ("▁",), "Ġ": ("Ġ", "Ċ", "ĉ", "č")}
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LARGEST_LENGTH = 2**16  # of a sequence
_POSITION_BITS = np.uint64(LARGEST_LENGTH - 1)  # of a key
_LARGEST_KEY = np.uint64(2**64 - 1)


# ---- which tokens, and what stands in their place ----


def _scatter(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection that scatters 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_bits(seed: int, epoch: int, samples: np.ndarray, length: int) -> np.ndarray:
    """64 random bits (B, S) per token, a function of seed, epoch, sample index (B,) and position."""
    with np.errstate(over="ignore"):
        key = _scatter(np.asarray([seed], dtype=np.int64).view(np.uint64) * _GOLDEN + np.uint64(epoch))
        of_samples = _scatter(key + np.asarray(samples).astype(np.uint64) * _GOLDEN)  # (B,)
        return _scatter(of_samples[:, None] + np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN)


def masked_count(length: int, mlm_probability: float) -> int:
    """K, the positions to predict in a sequence of ``length`` tokens: at least one."""
    return max(1, round(length * mlm_probability))


def choose_positions(
    bits: np.ndarray, is_maskable: np.ndarray, mlm_probability: float, word_starts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The positions to mask: the share ``mlm_probability`` of each row's maskable tokens, rounded, drawn at random.

    Args:
        bits: (B, S) 64 random bits a token.
        is_maskable: (B, S) which tokens may be chosen.
        word_starts: (B, S) where the word of each token begins, to mask whole words: they are taken in random order
            while they fit into the row's share. A first word that does not fit is masked in part.

    Returns:
        positions (B, K), ascending, and which of them count (B, K); the others fill the row and are 0.
    """
    length, most = bits.shape[1], masked_count(bits.shape[1], mlm_probability)  # S, K
    draws = bits if word_starts is None else np.take_along_axis(bits, word_starts, axis=1)  # (B, S)
    # The position is in the low bits: all keys differ, the tokens of a word stay together, and sorted keys are
    # sorted positions.
    keys = np.where(is_maskable, (draws & ~_POSITION_BITS) | np.arange(length, dtype=np.uint64), _LARGEST_KEY)  # (B, S)
    if most + 1 < length:  # one more than K, which shows whether a word ends with the K-th
        keys = np.partition(keys, most, axis=1)[:, : most + 1]  # (B, K + 1)
    order = (np.sort(keys, axis=1) & _POSITION_BITS).astype(np.int64)  # (B, K + 1), or (B, S) if that is less
    available = is_maskable.sum(axis=1)  # (B,)
    counts = np.minimum(np.maximum(np.rint(available * mlm_probability).astype(np.int64), 1), available)  # (B,)
    if word_starts is not None:
        starts = np.take_along_axis(word_starts, np.minimum(order, length - 1), axis=1)
        starts = np.pad(starts, ((0, 0), (0, most + 1 - starts.shape[1])), constant_values=-1)  # (B, K + 1)
        counts = _count_whole_words(starts, counts, available)
    is_chosen = np.arange(most) < counts[:, None]  # (B, K)
    positions = np.sort(np.where(is_chosen, order[:, :most], length), axis=1)  # (B, K): padding comes last
    is_chosen = positions < length
    return np.where(is_chosen, positions, 0), is_chosen


def _count_whole_words(starts: np.ndarray, counts: np.ndarray, available: np.ndarray) -> np.ndarray:
    """How many of the tokens in random order (their words' starts: (B, K + 1)) form whole words within ``counts``."""
    tokens = np.arange(1, starts.shape[1])  # (K,)
    ends_word = (starts[:, 1:] != starts[:, :-1]) | (tokens == available[:, None])  # (B, K)
    whole = np.where(ends_word & (tokens <= counts[:, None]), tokens, 0).max(axis=1)  # (B,)
    return np.where(whole > 0, whole, counts)


def corrupt(
    input_ids: np.ndarray,
    positions: np.ndarray,
    is_chosen: np.ndarray,
    bits: np.ndarray,
    vocabulary: np.ndarray,
    mask_id: int,
) -> np.ndarray:
    """A copy of ``input_ids`` (B, S) with [MASK] at 80% of the positions and a random token at 10%; 10% are unchanged.

    Args:
        vocabulary: (T,) the token ids to draw from.
        positions, is_chosen: (B, K), from :func:`choose_positions`.
        bits: (B, S), those that chose the positions: the low ones, which hardly mattered there, decide here.
    """
    rows, columns = np.nonzero(is_chosen)
    columns = positions[rows, columns]
    drawn = bits[rows, columns]
    share = ((drawn >> np.uint64(24)) & np.uint64(0xFFFF)).astype(np.float64) / 2**16
    random_ids = vocabulary[(drawn & np.uint64(0xFFFFFF)) * np.uint64(len(vocabulary)) >> np.uint64(24)]
    unmasked = np.where(share < MASK_SHARE + RANDOM_SHARE, random_ids, input_ids[rows, columns])
    corrupted = input_ids.copy()
    corrupted[rows, columns] = np.where(share < MASK_SHARE, mask_id, unmasked)
    return corrupted


# ---- a batch ----


class UnmaskedTransform:
    """From rows of token ids to the inputs of a model, as torch tensors.

    Args:
        documents: see :class:`MaskingTransform`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: str | None = None):
        self.sep_token_id, self.documents = tokenizer.sep_token_id, documents

    def with_seed(self, seed: int) -> Self:
        """Returns itself: nothing is random."""
        return self

    def __call__(self, input_ids: np.ndarray, samples: np.ndarray, epoch: int = 0) -> dict[str, torch.Tensor | int]:
        """Inputs of the model for rows (B, S) of token ids with these sample indices (B,)."""
        ids = input_ids.astype(np.int64)
        return _to_tensors({"input_ids": ids} | self._document_inputs(ids))

    def _document_inputs(self, ids: np.ndarray) -> dict[str, np.ndarray | int]:
        if self.documents is None:
            return {}
        return document_inputs(ids == self.sep_token_id, varlen=self.documents == "varlen")


def _to_tensors(inputs: Mapping[str, np.ndarray | int]) -> dict[str, torch.Tensor | int]:
    return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in inputs.items()}


class MaskingTransform(UnmaskedTransform):
    """From rows of token ids to the inputs of a masked language model, as torch tensors.

    Args:
        mlm_probability: share of the tokens to predict, above 0 and below 1.
        seed: masks are a function of (seed, epoch, sample index, position).
        whole_word_mask: choose words, not single tokens; see :func:`find_continuations`.
        sparse: give ``masked_positions`` and labels (B, K) instead of labels (B, S).
        documents: keep attention within documents: "mask" gives ``document_ids`` and ``position_ids`` that begin
            anew in each, "varlen" the latter and the ``cu_seq_lens`` that FlashAttention takes. A document ends with
            [SEP]. None: attention across documents.

    Raises:
        UserInputError: a probability out of bounds, or whole words of a vocabulary that does not show them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float,
        seed: int,
        whole_word_mask: bool = False,
        sparse: bool = True,
        documents: str | None = None,
    ):
        if not 0.0 < mlm_probability < 1.0:
            raise UserInputError(f"--mlm_probability ({mlm_probability}) must be above 0 and below 1")
        super().__init__(tokenizer, documents)
        self.mlm_probability, self.seed, self.sparse = mlm_probability, seed, sparse
        self.mask_token_id = tokenizer.mask_token_id
        self.vocabulary = vocabulary_ids(tokenizer)  # (T,)
        self.is_maskable = np.ones(self.vocabulary[-1] + 1, dtype=bool)  # (V,)
        self.is_maskable[tokenizer.all_special_ids] = False
        self.continues_word = find_continuations(tokenizer) if whole_word_mask else None  # (V,)

    def with_seed(self, seed: int) -> Self:
        """A copy with other masks."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def __call__(self, input_ids: np.ndarray, samples: np.ndarray, epoch: int = 0) -> dict[str, torch.Tensor | int]:
        """Inputs of the model for rows (B, S) of token ids with these sample indices (B,)."""
        ids = input_ids.astype(np.int64)
        bits = draw_bits(self.seed, epoch, samples, ids.shape[1])  # (B, S)
        word_starts = None if self.continues_word is None else _find_word_starts(self.continues_word[ids])  # (B, S)
        is_maskable = self.is_maskable[ids]  # (B, S)
        positions, is_chosen = choose_positions(bits, is_maskable, self.mlm_probability, word_starts)  # (B, K)
        labels = np.where(is_chosen, np.take_along_axis(ids, positions, axis=1), IGNORED)  # (B, K)
        corrupted = corrupt(ids, positions, is_chosen, bits, self.vocabulary, self.mask_token_id)  # (B, S)
        inputs: dict[str, np.ndarray | int] = {"input_ids": corrupted}
        if self.sparse:
            inputs |= {"labels": labels, "masked_positions": positions}
        else:
            dense_labels = np.full_like(ids, IGNORED)  # (B, S)
            dense_labels[np.nonzero(is_chosen)[0], positions[is_chosen]] = labels[is_chosen]
            inputs["labels"] = dense_labels
        return _to_tensors(inputs | self._document_inputs(ids))


def find_continuations(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(V,) which ids continue a word.

    In WordPiece, these start with "##". SentencePiece and byte-level BPE mark the white space before a word instead, as
    "▁" and "Ġ": tokens without this mark that are not special or added tokens continue a word. A word is then
    everything between white space, including punctuation, as in fairseq (Ott et al. 2019) and CamemBERT (Martin et al.
    2020).

    Raises:
        UserInputError: the vocabulary shows none of this.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(vocabulary_size(tokenizer))))
    marks = SPACE_MARKS.get(_space_mark(tokenizer))
    if marks is None:
        continues_word = np.array([piece is not None and piece.startswith("##") for piece in pieces])
    else:
        continues_word = np.array([piece is not None and not piece.startswith(marks) for piece in pieces])
        continues_word[[*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()]] = False
    if not continues_word.any():
        raise UserInputError(
            "--whole_word_mask needs a tokenizer that marks word pieces with '##', '▁' or 'Ġ': that of "
            f"{name_of(tokenizer)} does not"
        )
    return continues_word


def _space_mark(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer turns a space between words into, before it splits them into pieces."""
    backend, text = tokenizer.backend_tokenizer, "a a"
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is not None:
        text = "".join(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return text.split("a")[1]


def _find_word_starts(continues_word: np.ndarray) -> np.ndarray:
    """(B, S) the position at which the word of each token begins."""
    positions = np.arange(continues_word.shape[1])
    return np.maximum.accumulate(np.where(continues_word, 0, positions), axis=1)


def document_inputs(is_last: np.ndarray, varlen: bool) -> dict[str, np.ndarray | int]:
    """The inputs that keep attention within documents, from the last tokens of documents (B, S): see
    :class:`MaskingTransform`."""
    is_first = np.ones_like(is_last)  # (B, S)
    is_first[:, 1:] = is_last[:, :-1]
    positions = np.arange(is_last.shape[1])
    position_ids = positions - np.maximum.accumulate(np.where(is_first, positions, 0), axis=1)  # (B, S)
    if not varlen:
        return {"position_ids": position_ids, "document_ids": np.cumsum(is_first, axis=1)}
    bounds = np.append(np.flatnonzero(is_first), is_last.size).astype(np.int32)  # (D + 1,), in the concatenated rows
    longest = int(np.diff(bounds).max())
    lengths: dict[str, np.ndarray | int] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    return {"position_ids": position_ids, **lengths, "max_length_q": longest, "max_length_k": longest}


def pair_inputs(
    input_ids: np.ndarray, first_length: np.ndarray, length: np.ndarray, next_sentence_label: np.ndarray
) -> dict[str, torch.Tensor]:
    """BERT's inputs in addition to the tokens (B, S) of segment pairs [CLS] A [SEP] B [SEP] and padding, from the
    lengths (B,) of [CLS] A [SEP] and of the pair, and the labels (B,)."""
    positions = np.arange(input_ids.shape[1])
    is_token = positions < length[:, None]  # (B, S)
    inputs = {
        "token_type_ids": is_token & (positions >= first_length[:, None]),
        "attention_mask": is_token,
        "next_sentence_label": next_sentence_label,
    }
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in inputs.items()}


def line_inputs(input_ids: np.ndarray, length: np.ndarray) -> dict[str, torch.Tensor]:
    """The attention mask of rows (B, S) with ``length`` (B,) tokens before their padding."""
    is_token = np.arange(input_ids.shape[1]) < length[:, None]  # (B, S)
    return {"attention_mask": torch.from_numpy(is_token.astype(np.int64))}


# ---- all batches ----


class MaskedLMDataset(torch.utils.data.Dataset):
    """Rows with new masks in each epoch; a batch is fetched and masked at once.

    Use it with :func:`collate_batch` and ``EpochCallback``.

    Args:
        sequences: the rows of :func:`fnl_hf.data.packing.pack_documents`, :func:`fnl_hf.data.pairs.pair_documents` or
            :func:`fnl_hf.data.packing.separate_documents`. A batch of single documents is as long as its longest.
        transform: masks them.
        dynamic: False keeps the masks of epoch 0, for evaluation.
    """

    def __init__(self, sequences: Dataset, transform: UnmaskedTransform, dynamic: bool = True):
        self.columns = {name: Column(sequences, name) for name in sequences.column_names}
        self.transform = transform
        self.dynamic = dynamic
        # In shared memory, so that persistent workers see it change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        if self.dynamic:
            self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor | int]:
        samples = np.asarray(indices)
        values = {name: column[samples] for name, column in self.columns.items()}
        if "first_length" in values:
            return self._transformed(values["input_ids"], samples) | pair_inputs(**values)
        if "length" in values:
            ids = values["input_ids"][:, : values["length"].max()]
            return self._transformed(ids, samples) | line_inputs(ids, values["length"])
        return self._transformed(values["input_ids"], samples)

    def _transformed(self, input_ids: np.ndarray, samples: np.ndarray) -> dict[str, torch.Tensor | int]:
        return self.transform(input_ids, samples, int(self.epoch))


class MaskedStream(torch.utils.data.IterableDataset):
    """The micro-batches of streamed rows, masked; each contains its "cursor" for :meth:`StreamState.advance`."""

    def __init__(self, rows: StreamedRows, transform: UnmaskedTransform):
        self.rows, self.transform = rows, transform

    @property
    def state(self) -> StreamState:
        """The position of the run in its stream."""
        return self.rows.state

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.rows:
            yield {**self.transform(batch["input_ids"], batch["sample_ids"]), "cursor": batch["cursor"]}


@dataclass(frozen=True)
class MaskedBatches:
    """Training data whose masks change in each epoch, and held-out data with fixed masks."""

    train: MaskedLMDataset | MaskedStream
    held_out: MaskedLMDataset


def mask_rows(rows: Rows, transform: UnmaskedTransform) -> MaskedBatches:
    """The rows' batches; ``transform`` masks the training data."""
    held_out = MaskedLMDataset(rows.held_out, transform.with_seed(HELD_OUT_SEED), dynamic=False)
    if isinstance(rows.train, StreamedRows):
        return MaskedBatches(MaskedStream(rows.train, transform), held_out)
    return MaskedBatches(MaskedLMDataset(rows.train, transform), held_out)


def collate_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collator for data sets that return whole batches."""
    return batch
