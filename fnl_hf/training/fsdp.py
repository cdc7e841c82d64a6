"""FSDP2 under ``transformers.Trainer``: models with tied parameters, and checkpoints in the format of unsharded runs.

Checkpoints that Accelerate writes under FSDP2 can only be read under FSDP2, and with sharded state dicts there is no
model at the end. Here, a run writes the files of an unsharded run, whatever ``fsdp_state_dict_type`` is, so that any
run can resume from them. Gathering models of BERT's sizes takes little time.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from fnl_hf.errors import UserInputError


class ShardedTrainer(Trainer):
    """Trainer that trains, saves and loads under FSDP2 as without sharding; without FSDP it is Trainer.

    Saving gathers one tensor after the other, so all processes must call it.

    Raises:
        UserInputError: the wrapping policy puts parameters that are tied into different groups of FSDP2's.
    """

    model: Any
    lr_scheduler: Any

    def _prepare_for_training(self, *args, **kwargs):
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # Accelerate's hook would add up gradients and return the loss in half precision.
            policy = dataclasses.replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = policy
        tied = _tied_names(self._whole_model())
        with _one_group_for_tied_parameters(self.model):
            prepared = super()._prepare_for_training(*args, **kwargs)
        untied = tied - _tied_names(self._whole_model())
        if untied:
            raise UserInputError(
                f"FSDP2: {' and '.join(sorted(untied)[0])} are one tied parameter, but FSDP2 puts them into two "
                "groups: set fsdp_transformer_layer_cls_to_wrap in Accelerate's configuration to the encoder's "
                "layer only, as in configs/accelerate/fsdp2.yaml"
            )
        return prepared

    def evaluation_loop(self, *args, **kwargs):
        if self.is_fsdp_enabled and not self.accelerator._models:
            # Without training there is no optimizer, and Accelerate only shards a model together with an optimizer.
            self.accelerator.prepare_model(self.model.to(self.args.device), evaluation_mode=True)
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        weights = whole_weights(self._whole_model(), keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights = load_file(Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME))
        self._issue_warnings_after_load(load_whole_weights(self._whole_model(), weights))

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True, mmap=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_whole_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(schedule)

    def _whole_model(self) -> torch.nn.Module:
        """The model itself, compiled or not; FSDP2 changes modules in place."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def whole_weights(model: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor | None]:
    """``model.state_dict()`` as unsharded tensors on the CPU; tied parameters are the same tensor.

    All processes must call this; processes that do not ``keep`` the tensors get None for them.
    """
    gathered: dict[int, torch.Tensor | None] = {}
    state = model.state_dict(keep_vars=True)
    for value in state.values():
        if id(value) not in gathered:
            gathered[id(value)] = _whole(value.detach(), keep)
    return {name: gathered[id(value)] for name, value in state.items()}


def load_whole_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Any:
    """Load a state dict of an unsharded model; returns what ``load_state_dict`` returns."""
    own = model.state_dict(keep_vars=True)
    parts = {name: _part(value, own[name]) if name in own else value for name, value in weights.items()}
    return model.load_state_dict(parts, strict=False)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` with unsharded tensors, gathered like :func:`whole_weights`."""
    saved = optimizer.state_dict()
    state = {
        index: {name: _whole(value, keep) if isinstance(value, DTensor) else value for name, value in entries.items()}
        for index, entries in saved["state"].items()
    }
    return saved | {"state": state}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the ``state_dict`` of an optimizer whose unsharded parameters are in the same order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            # An entry with the parameter's shape is elementwise, so it is sharded like the parameter.
            name: _part(value, parameters[index])
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entries.items()
        }
        for index, entries in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})


def _whole(value: torch.Tensor, keep: bool) -> torch.Tensor | None:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.cpu() if keep else None


def _part(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's shard. Every process has the whole tensor, so nothing is communicated."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _tied_names(model: torch.nn.Module) -> set[tuple[str, ...]]:
    names: dict[torch.nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return {tuple(several) for several in names.values() if len(several) > 1}


@contextmanager
def _one_group_for_tied_parameters(model: Any) -> Iterator[None]:
    """Make Accelerate leave the embeddings in the root group, together with everything that is in no layer.

    By default, Accelerate gives the embeddings a group of their own, together with an output layer that is tied to
    them. BERT's output layer also has a bias that is tied to a parameter outside of this group: torch 2.13 then refuses
    the model, and earlier versions do not train the bias.
    """
    names = ("get_input_embeddings", "get_output_embeddings")
    for name in names:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)
