"""Tokenizers of RoBERTa's, XLM-R's and CamemBERT's kinds, trained on a little text."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CamembertTokenizer, PreTrainedTokenizerBase, RobertaTokenizer, XLMRobertaTokenizer

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]  # in the order that these models have; <mask> comes last


def byte_level(texts, **options) -> PreTrainedTokenizerBase:
    """Byte-level BPE, as RoBERTa's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary = model["vocab"] | {"<mask>": len(model["vocab"])}
    return RobertaTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]], **options)


def _unigram_pieces(texts) -> list[tuple[str, float]]:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, max_piece_length=5
    )
    backend.train_from_iterator(texts, trainer)
    return [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"][len(SPECIALS) :]]


def xlm_roberta(texts, **options) -> PreTrainedTokenizerBase:
    """SentencePiece's Unigram, as XLM-R's."""
    vocabulary = [(token, 0.0) for token in SPECIALS] + _unigram_pieces(texts) + [("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocabulary, **options)


def camembert(texts, **options) -> PreTrainedTokenizerBase:
    """SentencePiece's Unigram, as CamemBERT's, whose table has places that no text takes."""
    places = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
    vocabulary = [(token, 0.0) for token in places] + _unigram_pieces(texts) + [("<mask>", 0.0)]
    return CamembertTokenizer(vocab=vocabulary, **options)


KINDS = {"roberta": byte_level, "xlm-roberta": xlm_roberta, "camembert": camembert}
