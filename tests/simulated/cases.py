"""Inputs of every head and options of every optimizer.

For the tests on a simulated GPU, and for benchmarks/on_gpu.py on a real one, where pytest may be missing.
"""

import torch

from fnl_hf import (
    FnlBertConfig,
    FnlBertForMaskedLM,
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusMuon,
    FrobeniusSGD,
    Lamb,
    frobenius_param_groups,
    muon_param_groups,
)

B, S, K = 5, 11, 3


def inputs_of(head):
    ids = torch.randint(5, 53, (B, S))
    mask = (torch.arange(S) < torch.tensor([[11], [7], [11], [3], [9]])).long()
    documents = {"document_ids": torch.arange(S).expand(B, S) // 4, "position_ids": torch.arange(S).expand(B, S) % 4}
    masked = torch.where(torch.rand(B, S) < 0.3, ids, -100)
    positions = torch.rand(B, S).argsort(1)[:, :K].sort(1).values
    sparse = {"masked_positions": positions, "labels": ids.gather(1, positions)}
    pair = {"next_sentence_label": torch.tensor([0, 1, 1, 0, 1]), "token_type_ids": ids % 2}
    cases = {
        "FnlBertForMaskedLM": [
            {"labels": masked}, sparse, sparse | documents, sparse | {"attention_mask": mask},
            sparse | documents | {"attention_mask": mask}, {"labels": masked, "num_items_in_batch": 29},
        ],
        "FnlBertForPreTraining": [sparse | pair | {"attention_mask": mask}],
        "FnlBertForNextSentencePrediction": [{"labels": pair["next_sentence_label"], "attention_mask": mask}],
        "FnlBertForQuestionAnswering": [
            {"start_positions": torch.tensor([1, 2, 50, 0, 3]), "end_positions": torch.tensor([2, 5, 50, 0, 3]),
             "attention_mask": mask}
        ],
        "FnlBertForSequenceClassification": [
            {"labels": torch.tensor([0, 1, 1, 0, 1])}, {"labels": torch.rand(B, 2), "attention_mask": mask},
        ],
        "FnlBertForTokenClassification": [{"labels": torch.where(masked < 0, -100, masked % 2)}],
        "FnlBertForMultipleChoice": [
            {"input_ids": torch.stack([ids, ids.flip(1)], 1), "attention_mask": torch.stack([mask, mask], 1),
             "labels": torch.tensor([0, 1, 1, 0, 1])}
        ],
        "FnlBertModel": [{"attention_mask": mask}],
    }  # fmt: skip
    return [{"input_ids": ids} | case for case in cases[head]]


def loss_and_gradients(model, inputs):
    outputs = model(**inputs)
    loss = outputs.loss if hasattr(outputs, "loss") else outputs.last_hidden_state.square().mean()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- optimizers ----

KERNELS = {
    "default": {}, "fused": {"fused": True}, "foreach": {"foreach": True},
    "neither": {"foreach": False, "fused": False},
}  # fmt: skip
CASES = {
    **{f"adamw, {name}": (FrobeniusAdamW, kernel) for name, kernel in KERNELS.items()},
    "adamw, amsgrad": (FrobeniusAdamW, {"amsgrad": True, "maximize": True}),
    "adamw, capturable": (FrobeniusAdamW, {"capturable": True}),
    **{f"sgd, {name}": (FrobeniusSGD, {"momentum": 0.9, **kernel}) for name, kernel in KERNELS.items()},
    "sgd, decoupled": (FrobeniusSGD, {"momentum": 0.9, "nesterov": True, "decoupled": True}),
    "sgd, plain": (FrobeniusSGD, {}),
    **{f"lamb, {name}": (FrobeniusLamb, kernel) for name, kernel in KERNELS.items()},
    **{f"lamb inside, {name}": (FrobeniusLamb, {"decay": "in_trust_ratio", **k}) for name, k in KERNELS.items()},
    "lamb, not corrected": (FrobeniusLamb, {"bias_correction": False, "max_grad_norm": None}),
    "lamb, not corrected, foreach": (FrobeniusLamb, {"bias_correction": False, "foreach": True}),
    "lamb, clamped": (FrobeniusLamb, {"weight_norm_clamp": (0.1, 2.0), "trust_clamp": (0.0, 3.0)}),
    "plain lamb": (Lamb, {}),
    "plain lamb, foreach": (Lamb, {"foreach": True}),
}
if hasattr(torch.optim, "Muon"):
    CASES |= {"muon": (FrobeniusMuon, {"fused": True}), "muon, per head": (FrobeniusMuon, {"per_head": True})}
FUSED = [name for name in CASES if "fused" in name or name in ("lamb, default", "lamb inside, default", "plain lamb")]


def make_model(embedding_size=21):
    torch.manual_seed(2)
    sizes = {"vocab_size": 53, "hidden_size": 42, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = FnlBertConfig(**sizes, intermediate_size=35, attention_embedding_size=embedding_size)
    return FnlBertForMaskedLM(config)


def set_gradients(model, step):
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + index)
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.device)


def make_optimizer(model, case, lr=1e-2):
    optimizer_class, options = CASES[case]
    make_groups = muon_param_groups if optimizer_class is FrobeniusMuon else frobenius_param_groups
    groups = model.parameters() if optimizer_class is Lamb else make_groups(model, 0.1)
    return optimizer_class(groups, lr=lr, **options)
