"""While a model trains: the norms of its products, a progress bar that stays readable, new masks in each epoch."""

import torch
from transformers import ProgressCallback, TrainerCallback

from fnl_hf.factorization import product_norms
from fnl_hf.modeling_fnl_bert import factor_pairs

NORM_PREFIX = "norms/"


@torch.no_grad()
def factor_pair_norms(model: torch.nn.Module) -> dict[str, float]:
    """{"norms/layer_0/qk_frobenius": ...}: the norms of :func:`fnl_hf.product_norms` for every product of the model.

    All norms come to the host in one transfer.
    """
    names, values = [], []
    for index, pair in enumerate(factor_pairs(model)):
        u, v = pair.factors()
        for norm, value in product_norms(u.float(), v.float()).items():
            names.append(f"{NORM_PREFIX}layer_{index // 2}/{pair.kind}_{norm}")
            values.append(value)
    return dict(zip(names, torch.stack(values).tolist(), strict=True)) if values else {}


class ProductNormsCallback(TrainerCallback):
    """Logs the norms of all products through the Trainer's trackers, at each logging step.

    Args:
        trainer: the Trainer it is added to (``trainer.add_callback(ProductNormsCallback(trainer))``).
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.trainer.log(factor_pair_norms(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # DefaultFlowCallback comes first and has decided whether this step, or this epoch, is logged.
        if control.should_log:
            self.trainer.log(factor_pair_norms(model))
            control.should_log = True  # logging cleared it; the loss of this step is still to come

    on_epoch_end = on_step_end


class EpochCallback(TrainerCallback):
    """Tells the training data its epoch. On several processes Accelerate stops at the sampler and does not."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        set_epoch = getattr(train_dataloader.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch + 1e-6))


class ReadableProgressCallback(ProgressCallback):
    """Trainer's progress bar without the lines of norms, which are for plots and trackers."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not any(name.startswith(NORM_PREFIX) for name in logs):
            super().on_log(args, state, control, logs=logs, **kwargs)


def add_fnl_callbacks(trainer) -> None:
    """Give a Trainer the callbacks above."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ReadableProgressCallback)
    trainer.add_callback(ProductNormsCallback(trainer))
    trainer.add_callback(EpochCallback)
