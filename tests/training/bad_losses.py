"""Losses that are not finite, which no data make, and steps that are left out."""

from transformers import Trainer

from fnl_hf.training.trainer import FnlTrainer

COMPUTE_LOSS, GET_GRAD_NORM = Trainer.compute_loss, FnlTrainer._get_grad_norm


def add_to_losses(values, setattr=setattr):
    """Add a value to the loss in these steps, counted from 0. It changes no gradient by itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = COMPUTE_LOSS(self, model, inputs, True, num_items_in_batch)
        if loss.requires_grad:
            loss = loss + values.get(self.state.global_step, 0.0)
        return (loss, outputs) if return_outputs else loss

    setattr(Trainer, "compute_loss", compute_loss)


def spoil_gradients(steps, setattr=setattr):
    """Make one gradient infinite in these steps; the loss is as it was."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = COMPUTE_LOSS(self, model, inputs, True, num_items_in_batch)
        if loss.requires_grad and self.state.global_step in steps:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return (loss, outputs) if return_outputs else loss

    setattr(Trainer, "compute_loss", compute_loss)


def leave_out_steps(steps, setattr=setattr):
    """No update of the weights in these steps."""

    def get_grad_norm(self, model, grad_norm=None):
        grad_norm = GET_GRAD_NORM(self, model, grad_norm)
        if self.state.global_step in steps:
            model.zero_grad(set_to_none=True)
        return grad_norm

    setattr(FnlTrainer, "_get_grad_norm", get_grad_norm)
