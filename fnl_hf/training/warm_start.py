"""Warm start: after some dense steps, the layers of the encoder become products of two factors.

Pufferfish (Wang et al. 2021, arXiv 2103.03936) and Cuttlefish (Wang et al. 2023, arXiv 2305.02538) train this way.
Here, the layers are truncated like by :func:`fnl_hf.factorize` with calibration, on training data that only depend on
the step. The optimizer's moments are projected; the learning rate schedule continues.

Shapes: W = U Vᵀ (m, n) with r < min(m, n): U (m, r), V (n, r); G the gradient by W.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from fnl_hf.data.masking import MaskedLMDataset, MaskedStream
from fnl_hf.errors import TrainingDiverged, UserInputError
from fnl_hf.layers import FactorizedLinear
from fnl_hf.layers.base import INITS
from fnl_hf.runs.processes import gather_objects
from fnl_hf.surgery.checkpoints import factorized_layers, restore_layers
from fnl_hf.surgery.config import FactorizationConfig
from fnl_hf.surgery.factorize import factorize, selected_layers
from fnl_hf.training.optimizers import build_optimizer
from fnl_hf.training.sampling import count_steps
from fnl_hf.training.trainer import LABEL_NAMES

ENCODER = ("encoder.layer.*",)
SAMPLES = 256  # sequences to calibrate the truncation on
NO_INPUTS = (*LABEL_NAMES, "cursor")  # entries of a batch that do not affect the outputs
FIRST_MOMENTS, SECOND_MOMENTS = ("exp_avg", "momentum_buffer"), ("exp_avg_sq", "max_exp_avg_sq")
FACTORIZED = "factorized_layers"  # entry of the log at the step from which layers are products: their number
# attributes of schedules with one entry per parameter group
OF_EACH_GROUP = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "_init_lrs", "_last_lr")


@dataclass(frozen=True)
class WarmStart:
    """The model is dense in the first ``step`` steps of a run; then layers become products according to ``config``."""

    step: int
    config: FactorizationConfig
    is_calibrated: bool

    def __str__(self) -> str:
        layers = "the encoder's layers" if self.config.include == ENCODER else ", ".join(self.config.include)
        ratio = self.config.target_ratio
        kind = f"{self.config.mode} products" if ratio is None else f"products with {ratio:.3g} of their parameters"
        return f"dense for {self.step:,} steps, then {layers} as {kind}"


def as_done(warm_start: WarmStart | None, log_history: Sequence[Mapping[str, Any]]) -> WarmStart | None:
    """The warm start with the step at which it happened: a run that was made longer has its switch behind it."""
    done = next((int(entry["step"]) for entry in log_history if FACTORIZED in entry), None)
    return warm_start if warm_start is None or done is None else replace(warm_start, step=done)


def plan_factorization(model_args, seed: int, model: PreTrainedModel, step: int) -> tuple[FactorizationConfig, bool]:
    """Which layers become products at this step, how, and whether they are calibrated.

    Raises:
        UserInputError: patterns without a layer, or an initialization that is not for the mode.
    """
    mode = model_args.factorize_mode
    # What an untrained network does to its inputs says nothing of what its layers will need.
    is_trained = step > 0 or model_args.model_name_or_path is not None
    init = model_args.factorize_init or ("calibrated" if mode == "low_rank" and is_trained else "spectral")
    is_calibrated = init == "calibrated"
    if mode != "low_rank" and init not in INITS:
        raise UserInputError(f"--factorize_init {init} needs --factorize_mode low_rank, not {mode}")
    config = FactorizationConfig(
        mode=mode,
        target_ratio=model_args.factorize_target_ratio if mode == "low_rank" else None,
        init="spectral" if is_calibrated else init,
        include=ENCODER if model_args.factorize_include is None else tuple(model_args.factorize_include),
        seed=seed,
    )
    try:
        selected_layers(model, config, is_calibrated)
    except ValueError as error:
        raise UserInputError(f"--factorize_include: {error}") from error
    return config, is_calibrated


def plan_warm_start(model_args, args, model: PreTrainedModel, train_dataset) -> WarmStart | None:
    """The warm start that ``--factorize_at_step`` requests; None without this flag or without training.

    Raises:
        UserInputError: a step that the run does not reach, a model with factorized layers, FSDP or torch.compile, which
            hold on to the layers that would go; see also :func:`plan_factorization`.
    """
    given = model_args.factorize_at_step
    if given is None or not args.do_train:
        return None
    if layers := factorized_layers(model):
        raise UserInputError(
            f"--factorize_at_step ({given:g}) needs a dense model: {len(layers)} layers of "
            f"{model_args.model_name_or_path} are factorized already"
        )
    held_by = {
        "FSDP": parse_flag_from_env("ACCELERATE_USE_FSDP"),
        "torch.compile": args.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no",
    }
    if holders := [what for what, is_used in held_by.items() if is_used]:
        raise UserInputError(
            f"--factorize_at_step ({given:g}) works without FSDP and torch.compile, which keep "
            f"references to the layers that it replaces; this run uses {' and '.join(holders)}"
        )
    last = count_steps(args, train_dataset)
    step = int(given) if given >= 1 else int(given * last + 1e-6)  # 0.29 * 100 is a little less than 29
    if step >= last:
        raise UserInputError(f"--factorize_at_step ({given:g}) must be below the number of steps of the run ({last})")
    return WarmStart(step, *plan_factorization(model_args, args.seed, model, step))


def take_structure(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Factorize the layers of a dense model that are factorized in a run's checkpoint, to load its weights.

    Raises:
        UserInputError: its configuration cannot be read.
    """
    file = Path(checkpoint, "config.json")
    try:
        entry = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        if entry is not None:
            restore_layers(model, entry["layers"], entry["factorizations"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserInputError(f"checkpoint {checkpoint}: {file.name} cannot be read: {error}") from error


class WarmStartCallback(TrainerCallback):
    """Factorizes layers of the encoder, in place, before the first step after ``warm_start.step``.

    A checkpoint saved at this step is still dense: a run that resumes from it makes the same products from the same
    data. No random number generator is advanced. The best checkpoint is chosen anew among later ones, because earlier
    ones do not fit the model.

    Args:
        trainer: the Trainer it is added to.
        warm_start: when, and to which size.
    """

    def __init__(self, trainer, warm_start: WarmStart):
        self.trainer, self.warm_start = trainer, warm_start

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.is_done = bool(factorized_layers(model))

    def on_step_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if self.is_done or state.global_step < self.warm_start.step:
            return
        self.is_done = True
        with self.trainer.throughput.paused():
            like = self._factorize(args, model, getattr(optimizer, "optimizer", optimizer))  # Accelerate's is a wrapper
        resize_schedule(lr_scheduler, like)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self.trainer.measure_model()
        self.trainer.log({FACTORIZED: len(factorized_layers(model))})

    def _factorize(self, args, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[int]:
        before, size = dict(model.named_parameters()), model.num_parameters()
        calibration = None
        if self.warm_start.is_calibrated:
            calibration = calibration_batches(self.trainer.train_dataset, args.train_batch_size)
        try:
            factorize(model, self.warm_start.config, calibration)
        except ValueError as error:  # the run's choices were checked before, so weights must be non-finite
            raise TrainingDiverged(f"--factorize_at_step, at step {self.trainer.state.global_step}: {error}") from error
        reduce_new_gradients(self.trainer)
        state = carry_state(optimizer.state, before, model)
        like = replace_parameters(optimizer, build_optimizer(args, model), state)
        if args.process_index == 0:
            layers = len(factorized_layers(model))
            tqdm.write(
                f"step {self.warm_start.step}: factorized {layers} layers of the encoder; the model now has "
                f"{model.num_parameters():,} parameters instead of {size:,}"
            )
        return like


def reduce_new_gradients(trainer) -> None:
    """Have DDP, in place because Trainer's loop holds it, average the gradients of the parameters that its module has
    now. They become those of the first process."""
    wrapped = trainer.model_wrapped
    if isinstance(wrapped, DistributedDataParallel):
        handler = trainer.accelerator.ddp_handler
        kwargs = {} if handler is None else handler.to_kwargs()
        devices = {"device_ids": wrapped.device_ids, "output_device": wrapped.output_device}
        DistributedDataParallel.__init__(wrapped, wrapped.module, **devices, **kwargs)


def calibration_batches(dataset: MaskedLMDataset | MaskedStream, batch_size: int) -> Iterator[dict[str, Any]]:
    """Inputs of some training sequences, the same on all processes: evenly spaced in a data set, or the next ones of a
    stream. Neither the order of the data nor the position in a stream changes."""
    batches: Iterable[Mapping[str, Any]]
    if isinstance(dataset, MaskedStream):
        own = islice(iter(dataset), ceil(SAMPLES / (batch_size * dataset.rows.order.world_size)))
        batches = chain.from_iterable(zip(*gather_objects(list(own))))
    else:
        chosen = np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).astype(int).tolist()
        parts = (chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size))
        batches = (dataset.__getitems__(part) for part in parts)
    for batch in batches:
        left_out = {*NO_INPUTS}
        if "attention_mask" in batch:  # rows of different lengths have different numbers of masked positions
            left_out.add("masked_positions")
        yield {name: value for name, value in batch.items() if name not in left_out}


def carry_state(
    state: Mapping[torch.Tensor, dict[str, Any]], before: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[torch.Tensor, dict[str, Any]]:
    """The optimizer state of a model whose layers were factorized; products of three factors start without a state.

    Args:
        state: of the parameters before.
        before: name -> parameter of the dense model.
    """
    carried: dict[torch.Tensor, dict[str, Any]] = {
        parameter: state[before[name]]
        for name, parameter in model.named_parameters()
        if name in before and before[name] in state
    }
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear) and not layer.deep and before[f"{name}.weight"] in state:
            moments = project_moments(state[before[f"{name}.weight"]], layer.left.detach(), layer.right.detach())
            carried[layer.left], carried[layer.right] = moments
    return carried


def project_moments(
    entries: Mapping[str, Any], left: torch.Tensor, right: torch.Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of U and V that correspond to the state of W = U Vᵀ, for Adam, LAMB and SGD.

    The gradient with respect to U is G V, with respect to V it is Gᵀ U. So the first moments are projections of those
    of W: m_U = m_W V and m_V = m_Wᵀ U. The second moments assume that the entries of G are uncorrelated: v_U = v_W
    (V∘V), v_V = v_Wᵀ (U∘U).

    Args:
        entries: of a weight (m, n).
        left, right: U (m, r), Vᵀ (r, n), as a FactorizedLinear stores them.
    """
    of_left, of_right = dict(entries), dict(entries)
    for name, moment in entries.items():
        if isinstance(moment, torch.Tensor):
            u, v = (left.square(), right.square()) if name in SECOND_MOMENTS else (left, right)
            is_moment = name in FIRST_MOMENTS + SECOND_MOMENTS
            of_left[name] = moment @ v.T if is_moment else moment.clone()
            of_right[name] = u.T @ moment if is_moment else moment.clone()
    return of_left, of_right


def replace_parameters(
    optimizer: torch.optim.Optimizer, new: torch.optim.Optimizer, state: Mapping[torch.Tensor, dict[str, Any]]
) -> list[int]:
    """Give an optimizer the parameter groups of another optimizer of its class, in place, because Trainer, Accelerate,
    the schedule and the loss guard hold a reference to it. It keeps its learning rates: one for all groups or, with
    Muon, one for each rule.

    Returns:
        For each new group the index of the old one whose rate it has.
    """
    rules = [group.get("use_muon") for group in optimizer.param_groups]
    like = [rules.index(group.get("use_muon")) for group in new.param_groups]
    rates = [{name: group[name] for name in ("lr", "initial_lr") if name in group} for group in optimizer.param_groups]
    optimizer.param_groups[:] = [group | rates[index] for group, index in zip(new.param_groups, like)]
    optimizer.state = defaultdict(dict, state)
    return like


def resize_schedule(scheduler: Any, like: Sequence[int]) -> None:
    """Make a schedule continue with other parameter groups, each at the rate of the old group with the given index."""
    for name in OF_EACH_GROUP:
        if name in vars(scheduler):
            values = getattr(scheduler, name)
            setattr(scheduler, name, [values[index] for index in like])
