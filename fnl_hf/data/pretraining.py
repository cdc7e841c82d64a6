"""From a corpus to what a Trainer reads: packed sequences or segment pairs, with their masks."""

from dataclasses import dataclass

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.corpus import first_rows
from fnl_hf.data.masking import MaskedLMDataset, MaskingTransform
from fnl_hf.data.packing import data_fingerprint, pack_documents, unigram_entropy

# The attention kernels, and how each is told which tokens belong to one document.
ATTENTION_KERNELS = {"sdpa": "mask", "eager": "mask", "flash_attention_2": "varlen"}


@dataclass(frozen=True)
class PretrainingData:
    """Training data with masks that change in each epoch, held-out data with fixed ones.

    ``unigram_entropy``: of the held-out tokens, in nats. ``fingerprint``: of all rows, for the record of a run.
    """

    train: MaskedLMDataset
    held_out: MaskedLMDataset
    unigram_entropy: float
    fingerprint: str


def masking_transform(model_args, data_args, tokenizer: PreTrainedTokenizerBase, seed: int) -> MaskingTransform:
    """The masks that the command line asks for."""
    return MaskingTransform(
        tokenizer,
        data_args.mlm_probability,
        seed,
        whole_word_mask=data_args.whole_word_mask,
        sparse=model_args.sparse_prediction,
        documents=ATTENTION_KERNELS[model_args.attn_implementation] if data_args.attend_within_documents else None,
    )


def prepare_data(
    model_args, data_args, corpus: DatasetDict, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PretrainingData:
    """Tokenize and pack a corpus with splits "train" and "validation", or take from the cache what was."""
    rows = {}
    for split, limit in (("train", "max_train_samples"), ("validation", "max_eval_samples")):
        packed = pack_documents(
            corpus[split],
            tokenizer,
            data_args.max_seq_length,
            data_args.preprocessing_num_workers,
            data_args.cache_dir,
        )
        rows[split] = first_rows(packed, limit, getattr(data_args, limit))
    return PretrainingData(
        train=MaskedLMDataset(rows["train"], masking_transform(model_args, data_args, tokenizer, seed)),
        held_out=MaskedLMDataset(rows["validation"], masking_transform(model_args, data_args, tokenizer, 0), False),
        unigram_entropy=unigram_entropy(rows["validation"], tokenizer.all_special_ids),
        fingerprint=data_fingerprint(rows["train"], rows["validation"]),
    )
