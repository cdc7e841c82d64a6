# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""BERT whose self-attention is 2H factorized layers with an adjustable embedding dimension.

Khodak, Tenenholtz, Mackey and Fusi, "Initialization and Regularization of Factorized Neural Layers", ICLR 2021.
This file travels with checkpoints: it imports only torch, transformers, and its neighbors by relative name.

Shapes: B batch, S sequence, K masked positions, V vocabulary, H heads, d hidden size, E attention embedding size,
r = E/H, m and n outer sizes of a product.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForPreTrainingOutput,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.utils.generic import can_return_tuple

from .attention_fnl_bert import (
    FnlBertLayer,
    FnlBertSelfAttention,
    document_mask,
    factor_pairs,
    padding_mask,
    take_positions,
)
from .configuration_fnl_bert import FnlBertConfig
from .conversion_fnl_bert import BertConversion
from .factorization import Product, gram, spectral_factors

# The checkpoint of every head names all classes, so that it loads into any Auto class with ``trust_remote_code=True``.
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


class FnlBertPreTrainedModel(BertConversion):
    """Base of all FNL-BERT classes: the configuration, the factorized encoder and checkpoints that carry their code."""

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
            # The encoder has removed the flag from the configuration.
            if any(getattr(module, "gradient_checkpointing", False) for module in encoder.modules()):
                self.bert.gradient_checkpointing_enable()
        super().post_init()

    def factor_pairs(self) -> list[Product]:
        """Every product Q Kᵀ and V Oᵀ of this model: see :func:`factor_pairs`."""
        return factor_pairs(self)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers. Also saves the code beside the weights, for use without fnl_hf."""
        self.config.auto_map = dict(AUTO_MAP)
        own = type(self)
        # FSDP2 inserts a class of torch, whose code would be saved.
        self.__class__ = next(c for c in own.__mro__ if not c.__name__.startswith("FSDP"))
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = own


class FnlBertModel(FnlBertPreTrainedModel, BertModel):
    """BERT encoder with factorized attention."""

    _auto_class = "AutoModel"
    _no_split_modules = ["BertEmbeddings", "FnlBertLayer"]

    def post_init(self):
        for index in range(len(self.encoder.layer)):
            self.encoder.layer[index] = FnlBertLayer(self.config, layer_idx=index)
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
        document_ids=None,
        **kwargs,
    ):
        """As in transformers, encoder only.

        Args:
            document_ids: (B, S); a token attends only to tokens with the same number.
            output_positions: (B, K); limits ``last_hidden_state`` (B, K, d) and the last layer's attentions
                (B, H, K, S) to these positions. The pooler reads the first of them.
        """
        if encoder_hidden_states is not None or past_key_values is not None:
            raise ValueError(
                "FNL-BERT is an encoder: encoder_hidden_states and past_key_values must be None, because "
                "cross-attention and the key/value cache are not factorized"
            )
        implementation = self.config._attn_implementation
        if document_ids is not None:
            attention_mask = document_mask(document_ids, attention_mask, implementation, self.dtype)
        elif attention_mask is not None:
            attention_mask = padding_mask(attention_mask, implementation, self.dtype)
        return super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)

    def _initialize_weights(self, module, is_custom_code=False):
        # transformers calls this on the children first and on the model last, both from scratch and, for what the
        # checkpoint lacks, in from_pretrained. ``_init_weights`` is not called for custom code in the second case.
        is_last_call = module is self and not getattr(self, "_is_hf_initialized", False)
        super()._initialize_weights(module, is_custom_code)
        if is_last_call and self.config.attention_init != "normal":
            for pair in self.factor_pairs():
                is_loaded = any(getattr(weight, "_is_hf_initialized", False) for weight in pair.weights)
                if not is_loaded and pair.weights[0].device.type != "meta":
                    self._initialize_spectrally(pair)

    @torch.no_grad()
    def _initialize_spectrally(self, pair: Product):
        # The factors are drawn at the rank d/H that a stock BERT gives them, and their product is truncated to rank r.
        head_size = self.config.hidden_size // self.config.num_attention_heads
        factors = pair.factors()  # (H, m, r) and (H, n, r), views of the weights
        left, right = (  # (H, m, d/H) and (H, n, d/H)
            torch.empty(*factor.shape[:-1], head_size, device=factor.device, dtype=torch.float32).normal_(
                std=self.config.initializer_range
            )
            for factor in factors
        )
        truncated = spectral_factors(left, right, self.config.attention_rank)
        scale = self._product_scale(pair.kind, (left, right), truncated).sqrt()
        for factor, value in zip(factors, truncated):
            factor.copy_(scale * value)

    def _product_scale(self, kind: str, full, truncated) -> torch.Tensor:
        """The scale of the truncated products of H heads, (H, 1, 1), whose factors are ``full``.

        Scores are divided by √r instead of √r' at full head size r'.
        """
        init, scale = self.config.attention_init, full[0].new_ones(full[0].shape[0])  # (H,)
        if init != "spectral" and kind == "qk":
            scale *= (truncated[0].shape[-1] / full[0].shape[-1]) ** 0.5
        if init == "rescaled":
            whole, kept = ((gram(u) * gram(v)).sum(dim=(1, 2)).sqrt() for u, v in (full, truncated))  # ‖U Vᵀ‖_F (H,)
            scale *= whole / kept
        return scale[:, None, None]


def select_item_count(num_items: ItemCount, label_name: str) -> torch.Tensor | int | None:
    """The count for one label argument. A bare count, as ``transformers.Trainer`` passes it, belongs to ``labels``."""
    if isinstance(num_items, Mapping):
        return num_items.get(label_name)
    return num_items if label_name == "labels" else None


def mean_cross_entropy(logits, labels, num_items: torch.Tensor | int | None = None, ignore_index: int = -100):
    """Σ of the cross-entropies of the labels != ``ignore_index``, over ``num_items`` or, if None, their own number.

    Logits are (..., classes), labels (...). ``num_items`` is the number of such labels in the whole global batch, so
    that the losses of micro-batches and processes add up to the mean over all of it. Without any label the loss is 0,
    not NaN.
    """
    logits, labels = logits.reshape(-1, logits.size(-1)), labels.reshape(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # as autocast does; FSDP2 trains without it
    total = nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    if not isinstance(num_items, torch.Tensor):
        return total / max(num_items, 1)
    return total / num_items.to(total.device, non_blocking=True).clamp(min=1)


def add_loss(outputs: ModelOutput, loss) -> ModelOutput:
    """A copy of ``outputs`` with its loss, in the order that tuples of outputs have."""
    return type(outputs)(**{**outputs, "loss": loss})


class _LabeledHead:
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
        num_items = select_item_count(num_items_in_batch, "labels")
        return add_loss(outputs, self._compute_loss(outputs.logits, labels, num_items))

    def _compute_loss(self, logits, labels, num_items):
        return mean_cross_entropy(logits, labels, num_items)


class FnlBertForNextSentencePrediction(_LabeledHead, FnlBertPreTrainedModel, BertForNextSentencePrediction):
    """Next sentence prediction; the loss is the mean over the sentence pairs of the global batch."""

    _auto_class = "AutoModelForNextSentencePrediction"


class FnlBertForTokenClassification(_LabeledHead, FnlBertPreTrainedModel, BertForTokenClassification):
    """Token classification; the loss is the mean over the labeled tokens of the global batch."""

    _auto_class = "AutoModelForTokenClassification"


class FnlBertForMultipleChoice(_LabeledHead, FnlBertPreTrainedModel, BertForMultipleChoice):
    """Multiple choice; the loss is the mean over the questions of the global batch."""

    _auto_class = "AutoModelForMultipleChoice"


class FnlBertForSequenceClassification(_LabeledHead, FnlBertPreTrainedModel, BertForSequenceClassification):
    """Sequence classification or regression; the loss is the mean over the labels of the global batch."""

    _auto_class = "AutoModelForSequenceClassification"

    def _compute_loss(self, logits, labels, num_items):
        if self.config.problem_type is None:  # decided once from the first labels, as the stock head does
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        if self.config.problem_type == "single_label_classification":
            return super()._compute_loss(logits, labels, num_items)
        logits, targets = logits.reshape(-1), labels.reshape(-1).to(logits.dtype)
        if self.config.problem_type == "regression":
            total = nn.functional.mse_loss(logits, targets, reduction="sum")
        else:
            total = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return total / (labels.numel() if num_items is None else num_items)


class _MaskedLanguageModel:
    """Shared by the two heads that predict masked tokens: the positions at which they run."""

    bert: FnlBertModel
    config: FnlBertConfig

    def _encode(self, masked_positions, has_pooler: bool, **inputs):
        """The encoder's outputs and the hidden states for predictions: (B, S, d), or (B, K, d) at ``masked_positions``
        (B, K). With ``config.sparse_last_layer`` the last layer only runs at these positions and, for the pooler, at
        the first token."""
        if masked_positions is None or not self.config.sparse_last_layer:
            outputs = self.bert(return_dict=True, **inputs)
            hidden = outputs.last_hidden_state  # (B, S, d)
            return outputs, hidden if masked_positions is None else take_positions(hidden, masked_positions)
        positions = masked_positions
        if has_pooler:  # it reads the first position that the encoder returns, which must be token 0
            positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)  # (B, 1 + K)
        outputs = self.bert(return_dict=True, output_positions=positions, **inputs)
        return outputs, outputs.last_hidden_state[:, 1:] if has_pooler else outputs.last_hidden_state

    def _predict(self, head, hidden, labels, masked_positions):
        """Logits and labels; without ``masked_positions``, ``config.sparse_prediction`` selects the labeled
        positions."""
        if labels is not None and masked_positions is None and self.config.sparse_prediction:
            is_labeled = labels != -100  # (B, S)
            hidden, labels = hidden[is_labeled], labels[is_labeled]  # (labeled, d), (labeled,)
        return head(hidden), labels


class FnlBertForMaskedLM(_MaskedLanguageModel, FnlBertPreTrainedModel, BertForMaskedLM):
    """Masked language modeling; the loss is the mean over the masked tokens of the global batch."""

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
        masked_positions=None,
        num_items_in_batch: ItemCount = None,
        **kwargs,
    ):
        """As in transformers. ``num_items_in_batch`` is the number of masked tokens in the global batch.

        With ``masked_positions`` (B, K), the head runs at these positions only: ``labels`` are (B, K), ``logits``
        (B, K, V). To fill a row, label positions -100. With labels (B, S) and ``config.sparse_prediction``, ``logits``
        is (masked positions, V). This shape depends on the data, so a GPU waits for the host.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds, **kwargs}
        outputs, hidden = self._encode(masked_positions, has_pooler=False, **inputs)
        logits, labels = self._predict(self.cls, hidden, labels, masked_positions)
        loss = None
        if labels is not None:
            loss = mean_cross_entropy(logits, labels, select_item_count(num_items_in_batch, "labels"))
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class FnlBertForPreTraining(_MaskedLanguageModel, FnlBertPreTrainedModel, BertForPreTraining):
    """Masked language modeling and next sentence prediction; each loss is a mean over the global batch."""

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
        masked_positions=None,
        num_items_in_batch: ItemCount = None,
        **kwargs,
    ):
        """As in transformers, but either target is optional; the loss is the sum over the given targets.
        ``masked_positions`` works as in :class:`FnlBertForMaskedLM`.

        ``num_items_in_batch`` maps "labels" to the number of masked tokens and "next_sentence_label" to the number of
        sentence pairs in the global batch, as ``FnlTrainer`` passes it. If it is a single count of masked tokens
        (``transformers.Trainer``), the sentence loss is weighted by the micro-batch's share of the masked tokens. This
        is a weighted mean, not an exact one.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds, **kwargs}
        outputs, hidden = self._encode(masked_positions, has_pooler=True, **inputs)
        prediction_logits, labels = self._predict(self.cls.predictions, hidden, labels, masked_positions)
        sentence_logits = self.cls.seq_relationship(outputs.pooler_output)

        losses = []
        if labels is not None:
            num_items = select_item_count(num_items_in_batch, "labels")
            losses.append(mean_cross_entropy(prediction_logits, labels, num_items))
        if next_sentence_label is not None:
            num_items = select_item_count(num_items_in_batch, "next_sentence_label")
            sentence_loss = mean_cross_entropy(sentence_logits, next_sentence_label, num_items)
            if labels is not None and num_items is None and num_items_in_batch is not None:
                sentence_loss = sentence_loss * (labels != -100).sum() / num_items_in_batch
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
        batch. Positions outside the sequence are ignored and not counted."""
        kwargs["return_dict"] = True
        outputs = super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        if start_positions is None or end_positions is None:
            return outputs
        length = outputs.start_logits.size(1)  # S: the position that is ignored, as in the stock head
        loss = 0.5 * sum(
            mean_cross_entropy(
                logits, positions.clamp(0, length), select_item_count(num_items_in_batch, name), ignore_index=length
            )
            for name, logits, positions in (
                ("start_positions", outputs.start_logits, start_positions),
                ("end_positions", outputs.end_logits, end_positions),
            )
        )
        return add_loss(outputs, loss)


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
