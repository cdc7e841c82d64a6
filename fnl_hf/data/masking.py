"""Dynamic masking for masked language modelling, as a pure function of (seed, epoch, sample).

Masks drawn from a global generator depend on workers, processes and the moment of a resume. Here each token's draw is
a hash of (seed, epoch, sample, position), so that a mask is the same wherever and whenever it is made.
"""

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fnl_hf.errors import UserInputError

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens; the rest stay as they are (Devlin et al. 2019)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that scatters them."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed_words(seed: int, epoch: int, samples: np.ndarray, length: int) -> np.ndarray:
    """Random 64-bit words (B, S), a function of seed, epoch, sample index (B,) and position."""
    with np.errstate(over="ignore"):
        key = _mix(np.asarray([seed], dtype=np.int64).view(np.uint64) * _GOLDEN + np.uint64(epoch))
        rows = _mix(key + np.asarray(samples).astype(np.uint64) * _GOLDEN)
        return _mix(rows[:, None] + np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN)


def mask_tokens(
    input_ids: np.ndarray, words: np.ndarray, maskable: np.ndarray, mlm_probability: float, mask_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """80% [MASK], 10% a random token, 10% unchanged, of a share ``mlm_probability`` of the tokens that may be masked.

    Args:
        input_ids: (B, S) token ids.
        words: (B, S) random 64-bit words; disjoint bits of one word decide the three questions.
        maskable: (V,) which ids may be chosen.

    Returns:
        inputs and labels, (B, S) int64; labels are -100 where nothing is to be predicted.
    """
    ids = input_ids.astype(np.int64)
    choice = (words >> np.uint64(40)).astype(np.float64) / 2**24
    kind = ((words >> np.uint64(24)) & np.uint64(0xFFFF)).astype(np.float64) / 2**16
    chosen = (choice < mlm_probability) & maskable[ids]
    labels = np.where(chosen, ids, -100)
    random_ids = ((words & np.uint64(0xFFFFFF)) * np.uint64(len(maskable)) >> np.uint64(24)).astype(np.int64)
    inputs = np.where(chosen & (kind < MASK_SHARE), mask_token_id, ids)
    inputs = np.where(chosen & (kind >= MASK_SHARE) & (kind < MASK_SHARE + RANDOM_SHARE), random_ids, inputs)
    return inputs, labels


class MaskedLMDataset(torch.utils.data.Dataset):
    """Packed sequences, masked anew in each epoch; a batch is fetched and masked at once.

    Use it with :func:`collate_batch` and ``EpochCallback``.

    Args:
        sequences: a dataset with a column "input_ids" of fixed length.
        mlm_probability: share of the tokens to predict, above 0 and below 1.
        seed: masks are a function of (seed, epoch, sample index, position).
        dynamic: False keeps the masks of epoch 0, for evaluation.
    """

    def __init__(
        self,
        sequences: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float,
        seed: int,
        dynamic: bool = True,
    ):
        if not 0.0 < mlm_probability < 1.0:
            raise UserInputError(f"--mlm_probability ({mlm_probability}) must be above 0 and below 1")
        self.sequences = sequences.with_format("numpy")
        self.mlm_probability = mlm_probability
        self.seed = seed
        self.dynamic = dynamic
        self.mask_token_id = tokenizer.mask_token_id
        self.maskable = np.ones(len(tokenizer), dtype=bool)
        self.maskable[tokenizer.all_special_ids] = False
        # In shared memory, so that workers that outlive an epoch see it change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        if self.dynamic:
            self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        ids = self.sequences[indices]["input_ids"]
        words = hashed_words(self.seed, int(self.epoch), np.asarray(indices), ids.shape[1])
        inputs, labels = mask_tokens(ids, words, self.maskable, self.mlm_probability, self.mask_token_id)
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}


def collate_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collator of datasets that return whole batches."""
    return batch
