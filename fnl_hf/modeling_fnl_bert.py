# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""BERT whose self-attention is 2H factorized layers with an adjustable embedding dimension.

Khodak, Tenenholtz, Mackey and Fusi, "Initialization and Regularization of Factorized Neural Layers", ICLR 2021.
This file travels with checkpoints: it imports only torch, transformers, and its two neighbours by relative name.

Shapes: B batch, S sequence, V vocabulary, H heads, d hidden size, E attention embedding size, r = E/H.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForPreTrainingOutput,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    BertSelfAttention,
)
from transformers.utils.generic import can_return_tuple

from .configuration_fnl_bert import FnlBertConfig
from .factorization import Product, spectral_factors

# Every head's checkpoint names every class, so that it loads into any Auto class with ``trust_remote_code=True``.
AUTO_CLASSES = {
    "AutoModel": "FnlBertModel",
    "AutoModelForPreTraining": "FnlBertForPreTraining",
    "AutoModelForMaskedLM": "FnlBertForMaskedLM",
    "AutoModelForNextSentencePrediction": "FnlBertForNextSentencePrediction",
    "AutoModelForQuestionAnswering": "FnlBertForQuestionAnswering",
    "AutoModelForSequenceClassification": "FnlBertForSequenceClassification",
    "AutoModelForTokenClassification": "FnlBertForTokenClassification",
    "AutoModelForMultipleChoice": "FnlBertForMultipleChoice",
}
AUTO_MAP = {
    "AutoConfig": "configuration_fnl_bert.FnlBertConfig",
    **{auto: f"modeling_fnl_bert.{name}" for auto, name in AUTO_CLASSES.items()},
}

# A count of loss terms in the global batch: one tensor, or one per label argument of ``forward``.
ItemCount = torch.Tensor | int | Mapping[str, torch.Tensor] | None


class FnlBertSelfAttention(BertSelfAttention):
    """Self-attention of width E: query, key and value map d to E, each head has rank r = E/H and scale 1/√r."""

    def __init__(self, config: FnlBertConfig, layer_idx: int | None = None):
        super().__init__(config, is_causal=False, layer_idx=layer_idx)
        self.attention_head_size = config.attention_rank
        self.all_head_size = config.mha_embedding_size
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)


def factor_pairs(model: nn.Module) -> list[Product]:
    """Every product of the BERT attention layers in ``model``, in layer order, Q Kᵀ before V Oᵀ.

    Works on FNL-BERT and stock BERT models, and on any module that contains one (DistributedDataParallel, a
    compiled module, a user's own model).
    """
    pairs = []
    for name, module in model.named_modules():
        if not isinstance(module, BertAttention) or module.is_cross_attention:
            continue
        heads = module.self.num_attention_heads
        stem = f"{name}." if name else ""
        for kind, left, right in (("qk", "self.query", "self.key"), ("vo", "self.value", "output.dense")):
            pairs.append(
                Product(
                    name=f"{stem}{kind}",
                    kind=kind,
                    num_heads=heads,
                    weights=(module.get_submodule(left).weight, module.get_submodule(right).weight),
                    weight_names=(f"{stem}{left}.weight", f"{stem}{right}.weight"),
                )
            )
    return pairs


class FnlBertPreTrainedModel(BertPreTrainedModel):
    """What all FNL-BERT classes share: the configuration, the encoder swap and checkpoints that carry their code."""

    config: FnlBertConfig
    config_class = FnlBertConfig

    def post_init(self):
        # Attributes changed after the configuration was made (``from_pretrained(..., is_decoder=True)``) were not
        # validated yet.
        self.config.validate()
        # The stock heads build a stock encoder; initialization and loading start only here, so swapping is safe.
        encoder = getattr(self, "bert", None)
        if isinstance(encoder, BertModel) and not isinstance(encoder, FnlBertModel):
            self.bert = FnlBertModel(self.config, add_pooling_layer=encoder.pooler is not None)
        super().post_init()

    def factor_pairs(self) -> list[Product]:
        """Every product Q Kᵀ and V Oᵀ of this model: see :func:`factor_pairs`."""
        return factor_pairs(self)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the code is saved beside the weights, for use without fnl_hf."""
        self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(*args, **kwargs)


class FnlBertModel(FnlBertPreTrainedModel, BertModel):
    """BERT encoder with factorized attention."""

    _auto_class = "AutoModel"

    def post_init(self):
        for index, layer in enumerate(self.encoder.layer):
            layer.attention.self = FnlBertSelfAttention(self.config, layer_idx=index)
            layer.attention.output.dense = nn.Linear(self.config.mha_embedding_size, self.config.hidden_size)
        super().post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        past_key_values=None,
        **kwargs,
    ):
        """As in transformers, encoder only."""
        if encoder_hidden_states is not None or past_key_values is not None:
            raise ValueError(
                "FNL-BERT is an encoder: encoder_hidden_states and past_key_values must be None, because "
                "cross-attention and the key/value cache are not factorized"
            )
        return super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)

    def _initialize_weights(self, module, is_custom_code=False):
        # transformers calls this on the children first and on the model last, both from scratch and, for what the
        # checkpoint lacks, in from_pretrained. ``_init_weights`` is not called for custom code in the second case.
        last = module is self and not getattr(self, "_is_hf_initialized", False)
        super()._initialize_weights(module, is_custom_code)
        if last and self.config.attention_init == "spectral":
            for pair in self.factor_pairs():
                loaded = [getattr(weight, "_is_hf_initialized", False) for weight in pair.weights]
                if not any(loaded) and pair.weights[0].device.type != "meta":
                    self._spectral_init(pair)

    @torch.no_grad()
    def _spectral_init(self, pair: Product):
        head_size = self.config.hidden_size // self.config.num_attention_heads
        factors = pair.factors()
        drawn = [
            torch.empty(*factor.shape[:-1], head_size, device=factor.device, dtype=torch.float32).normal_(
                std=self.config.initializer_range
            )
            for factor in factors
        ]
        for factor, value in zip(factors, spectral_factors(drawn[0], drawn[1], self.config.attention_rank)):
            factor.copy_(value)


def items_of(num_items: ItemCount, label_name: str) -> torch.Tensor | int | None:
    """The count for one label argument. A bare count, as ``transformers.Trainer`` passes it, belongs to ``labels``."""
    if isinstance(num_items, Mapping):
        return num_items.get(label_name)
    return num_items if label_name == "labels" else None


def mean_cross_entropy(logits, labels, num_items: torch.Tensor | int | None = None, ignore_index: int = -100):
    """Σ of the cross-entropies of the labels != ``ignore_index``, over ``num_items`` or, if None, their own number.

    ``num_items`` is the number of such labels in the whole global batch, so that the losses of micro-batches and
    processes add up to the mean over all of it. Without any label the loss is 0, not NaN.
    """
    total = nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def with_loss(outputs: ModelOutput, loss) -> ModelOutput:
    """A copy of ``outputs`` with its loss, in the order that tuples of outputs have."""
    return type(outputs)(**{**outputs, "loss": loss})


class _LabelledHead:
    """Forward of the heads whose only target is ``labels``: the stock logits, the loss over the global batch."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        num_items_in_batch: ItemCount = None,
        **kwargs,
    ):
        """As in transformers. ``num_items_in_batch`` is the number of labels in the global batch."""
        kwargs["return_dict"] = True
        outputs = super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        if labels is None:
            return outputs
        return with_loss(outputs, self._head_loss(outputs.logits, labels, items_of(num_items_in_batch, "labels")))

    def _head_loss(self, logits, labels, num_items):
        return mean_cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), num_items)


class FnlBertForNextSentencePrediction(_LabelledHead, FnlBertPreTrainedModel, BertForNextSentencePrediction):
    """Next sentence prediction; the loss is the mean over the sentence pairs of the global batch."""

    _auto_class = "AutoModelForNextSentencePrediction"


class FnlBertForTokenClassification(_LabelledHead, FnlBertPreTrainedModel, BertForTokenClassification):
    """Token classification; the loss is the mean over the labelled tokens of the global batch."""

    _auto_class = "AutoModelForTokenClassification"


class FnlBertForMultipleChoice(_LabelledHead, FnlBertPreTrainedModel, BertForMultipleChoice):
    """Multiple choice; the loss is the mean over the questions of the global batch."""

    _auto_class = "AutoModelForMultipleChoice"


class FnlBertForSequenceClassification(_LabelledHead, FnlBertPreTrainedModel, BertForSequenceClassification):
    """Sequence classification or regression; the loss is the mean over the labels of the global batch."""

    _auto_class = "AutoModelForSequenceClassification"

    def _head_loss(self, logits, labels, num_items):
        if self.config.problem_type is None:  # decided once from the first labels, as the stock head does
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        if self.config.problem_type == "single_label_classification":
            return super()._head_loss(logits, labels, num_items)
        logits, targets = logits.reshape(-1), labels.reshape(-1).to(logits.dtype)
        if self.config.problem_type == "regression":
            total = nn.functional.mse_loss(logits, targets, reduction="sum")
        else:
            total = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return total / (labels.numel() if num_items is None else num_items)


def _masked_lm_logits(head, hidden, labels, sparse):
    """Logits (positions, V) and labels (positions,) of the labelled positions if ``sparse``, else (B, S, V), (B, S)."""
    if labels is not None and sparse:
        labelled = labels != -100
        hidden, labels = hidden[labelled], labels[labelled]
    return head(hidden), labels


class FnlBertForMaskedLM(FnlBertPreTrainedModel, BertForMaskedLM):
    """Masked language modelling; the loss is the mean over the masked tokens of the global batch."""

    _auto_class = "AutoModelForMaskedLM"

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        num_items_in_batch: ItemCount = None,
        **kwargs,
    ):
        """As in transformers. ``num_items_in_batch`` is the number of masked tokens in the global batch.

        With labels and ``config.sparse_prediction``, ``logits`` is (masked positions, V) instead of (B, S, V).
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits, labels = _masked_lm_logits(self.cls, outputs.last_hidden_state, labels, self.config.sparse_prediction)
        loss = None
        if labels is not None:
            items = items_of(num_items_in_batch, "labels")
            loss = mean_cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1), items)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class FnlBertForPreTraining(FnlBertPreTrainedModel, BertForPreTraining):
    """Masked language modelling and next sentence prediction; each loss is a mean over the global batch."""

    _auto_class = "AutoModelForPreTraining"

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        next_sentence_label=None,
        num_items_in_batch: ItemCount = None,
        **kwargs,
    ):
        """As in transformers, but either target may be left out; the loss is the sum over those given.

        ``num_items_in_batch`` maps "labels" to the masked tokens and "next_sentence_label" to the sentence pairs
        of the global batch, as ``FnlTrainer`` passes it. From a bare count of masked tokens (``transformers.Trainer``)
        the sentence loss is weighted by the micro-batch's share of them: a weighted mean, not an exact one.
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        masked_labels = labels
        prediction_logits, labels = _masked_lm_logits(
            self.cls.predictions, outputs.last_hidden_state, labels, self.config.sparse_prediction
        )
        sentence_logits = self.cls.seq_relationship(outputs.pooler_output)

        losses = []
        if labels is not None:
            items = items_of(num_items_in_batch, "labels")
            flat_logits = prediction_logits.reshape(-1, prediction_logits.size(-1))
            losses.append(mean_cross_entropy(flat_logits, labels.reshape(-1), items))
        if next_sentence_label is not None:
            items = items_of(num_items_in_batch, "next_sentence_label")
            sentence_loss = mean_cross_entropy(sentence_logits, next_sentence_label.reshape(-1), items)
            if masked_labels is not None and items is None and num_items_in_batch is not None:
                sentence_loss = sentence_loss * (masked_labels != -100).sum() / num_items_in_batch
            losses.append(sentence_loss)
        return BertForPreTrainingOutput(
            loss=sum(losses) if losses else None,
            prediction_logits=prediction_logits,
            seq_relationship_logits=sentence_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FnlBertForQuestionAnswering(FnlBertPreTrainedModel, BertForQuestionAnswering):
    """Extractive question answering; the loss is the mean over the questions of the global batch."""

    _auto_class = "AutoModelForQuestionAnswering"

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        num_items_in_batch: ItemCount = None,
        **kwargs,
    ):
        """As in transformers. ``num_items_in_batch["start_positions"]`` is the number of questions in the global
        batch; positions outside the sequence are ignored and not counted."""
        kwargs["return_dict"] = True
        outputs = super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        if start_positions is None or end_positions is None:
            return outputs
        length = outputs.start_logits.size(1)
        loss = 0.5 * sum(
            mean_cross_entropy(
                logits, positions.reshape(-1).clamp(0, length), items_of(num_items_in_batch, name), length
            )
            for name, logits, positions in (
                ("start_positions", outputs.start_logits, start_positions),
                ("end_positions", outputs.end_logits, end_positions),
            )
        )
        return with_loss(outputs, loss)


__all__ = [
    "FnlBertForMaskedLM",
    "FnlBertForMultipleChoice",
    "FnlBertForNextSentencePrediction",
    "FnlBertForPreTraining",
    "FnlBertForQuestionAnswering",
    "FnlBertForSequenceClassification",
    "FnlBertForTokenClassification",
    "FnlBertModel",
    "FnlBertPreTrainedModel",
    "FnlBertSelfAttention",
    "factor_pairs",
]
