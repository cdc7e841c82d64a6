"""The flags that all training scripts share: Trainer's and ours, with their bounds."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.utils import logging

from fnl_hf.errors import UserInputError, validate_bounds
from fnl_hf.optim.param_groups import DECAY_MODES
from fnl_hf.training.optimizers import OPTIMIZERS, parse_optimizer_arguments

logger = logging.get_logger(__name__)

# flag -> smallest value, and the bound that it must stay below
BOUNDS = {
    "learning_rate": (0.0, float("inf")),
    "weight_decay": (0.0, float("inf")),
    "frobenius_decay": (0.0, float("inf")),
    "adam_beta1": (0.0, 1.0),
    "adam_beta2": (0.0, 1.0),
    "adam_epsilon": (0.0, float("inf")),
    "max_grad_norm": (0.0, float("inf")),
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
    "per_device_train_batch_size": (1, float("inf")),
    "per_device_eval_batch_size": (1, float("inf")),
    "gradient_accumulation_steps": (1, float("inf")),
    "product_norms_steps": (1, float("inf")),
    "max_skipped_steps": (0, float("inf")),
    "warmup_steps": (0.0, float("inf")),
    "dataloader_num_workers": (0, float("inf")),
    "eval_accumulation_steps": (1, float("inf")),
    "dataloader_prefetch_factor": (1, float("inf")),
    "neftune_noise_alpha": (0.0, float("inf")),
}
POSITIVE = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
# flag of Trainer's that does not work here -> what to use instead
UNSUPPORTED = {
    "optim": f"set --optimizer, one of {list(OPTIMIZERS)}",
    "label_smoothing_factor": "leave it out",
    "label_names": "leave it out",
    "auto_find_batch_size": "it would change the global batch; set --per_device_train_batch_size",
    "save_on_each_node": "leave it out, and let --output_dir be on a disk that all machines share",
    "use_liger_kernel": "leave it out",
    "eval_do_concat_batches": "leave it out",
    "batch_eval_metrics": "leave it out",
    "save_only_model": "a run cannot go on from such checkpoints, leave it out",
}


@dataclass
class FnlTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the optimizer, its Frobenius decay, and what happens to an output folder in use."""

    optimizer: str = field(
        default="adamw", metadata={"help": "The optimizer, with Frobenius decay.", "choices": list(OPTIMIZERS)}
    )
    optim_args: str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the optimizer: 'momentum=0.9,nesterov=True' (sgd; its momentum is 0.9 by "
            "default), 'decay=in_trust_ratio' (lamb), 'adamw_lr=1e-3,per_head=True' (muon), 'amsgrad=True' (adamw)."
        },
    )
    weight_decay: float = field(
        default=0.01,
        metadata={"help": "Weight decay of all matrices but the factors of products."},
    )
    frobenius_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of the products, of attention and of factorized layers. Default: equal to --weight_decay."
        },
    )
    decay_mode: str = field(
        default="frobenius",
        metadata={
            "help": "How products are decayed, at --frobenius_decay: the product's Frobenius norm, the "
            "factors' own (weight), or not at all. Every other decay is untouched.",
            "choices": DECAY_MODES,
        },
    )
    product_norms_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between logs of the products' norms and other diagnostics. Default: --logging_steps."},
    )
    global_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences in an optimizer step, of all processes: --gradient_accumulation_steps follows from it, "
            "so that one recipe fits any number of them."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or 'auto': go on from the newest complete checkpoint in --output_dir, "
            "start when there is none, end at once when the run is finished."
        },
    )
    optimizer_state_from: str | None = field(
        default=None,
        metadata={
            "help": "A run's folder: start from the optimizer state of its checkpoint whose weights this run starts "
            "from, with its own learning rate, schedule and decay."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start anew in an output folder that is in use: what a run wrote there is replaced, its "
            "checkpoints are deleted, other files stay."
        },
    )
    allow_other_world_size: bool = field(
        default=False,
        metadata={
            "help": "Let a run go on with another number of processes, at the same sample position. Its global batch "
            "must stay: change --gradient_accumulation_steps the other way."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run the code that comes with a model or tokenizer: read it first. Without this flag, one that "
            "needs it is refused."
        },
    )
    hub_license: str | None = field(
        default=None, metadata={"help": "The licence that the model card names, as apache-2.0. Default: none."}
    )
    hub_language: str | None = field(
        default=None,
        metadata={"help": "The language that the model card names, as en. Default: that of the base model's card."},
    )
    report_to: None | str | list[str] = field(
        default=None,
        metadata={"help": "Trackers, 'all' that are installed, or 'none'. Default: tensorboard if installed."},
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "A step whose loss or gradient is not finite is skipped; more than so many end the run, with exit "
            "status 3."
        },
    )
    enable_jit_checkpoint: bool = field(
        default=True,
        metadata={
            "help": "On SIGTERM save a checkpoint on all processes together and end with exit status 75, so that a "
            "scheduler can start the same command again."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Look in each step for parameters without gradient, of which BERT's heads have none."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide non-finite losses from the logs. Synchronizes in every step."}
    )

    def __post_init__(self):
        if not (self.do_train or self.do_eval or self.do_predict):  # before an eval_strategy sets do_eval
            self.do_train = self.do_eval = True
        self._validate_flags()
        if self.report_to is None:
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
        given = self.accelerator_config is not None
        super().__post_init__()
        accelerator_config: Any = self.accelerator_config
        self._use_one_gpu()
        if self.global_train_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation_for(self.global_train_batch_size)
        parse_optimizer_arguments(self.optimizer, self.optim_args)
        self.remove_unused_columns = False  # our datasets have none, and return whole batches
        if self.device.type == "cpu":  # pinned memory would only bring a warning
            self.dataloader_pin_memory = False
        elif not given:  # else the host waits for each batch to be copied
            accelerator_config.non_blocking = self.dataloader_pin_memory

    def _validate_flags(self) -> None:
        for name, (smallest, bound) in BOUNDS.items():
            validate_bounds(name, getattr(self, name), smallest, bound)
        for name in POSITIVE:
            validate_bounds(name, getattr(self, name), 0, above=True)
        if self.max_steps != -1:  # Trainer's default, for --num_train_epochs
            validate_bounds("max_steps", self.max_steps, 1)
        defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
        for name, instead in UNSUPPORTED.items():
            if getattr(self, name) != defaults[name]:
                raise UserInputError(f"--{name} ({getattr(self, name)}) is not supported: {instead}")
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(self, name) and self.dataloader_num_workers == 0:
                raise UserInputError(f"--{name} needs --dataloader_num_workers (0) of at least 1")
        for name in self._VALID_DICT_FIELDS:
            _validate_json(name, getattr(self, name))

    def _use_one_gpu(self) -> None:
        """Trainer would wrap the model in DataParallel, which neither batch sizes nor packed sequences allow for."""
        if self.n_gpu > 1:
            logger.warning(
                f"{self.n_gpu} GPUs are visible, but a process trains on one: to use all, start the script with "
                f"`torchrun --nproc_per_node {self.n_gpu}` or `accelerate launch --multi_gpu --num_processes "
                f"{self.n_gpu}`"
            )
            self._n_gpu = 1

    def __getstate__(self) -> dict[str, Any]:
        """All but the Hub token: what is pickled, ``training_args.bin``, is uploaded. Copies have no token either."""
        return vars(self) | {"hub_token": None}

    def _accumulation_for(self, global_batch: int) -> int:
        together = self.per_device_train_batch_size * self.world_size
        steps, rest = divmod(global_batch, together)
        if rest or steps < 1:
            raise ValueError(
                f"--global_train_batch_size ({global_batch}) must be a multiple of {together}: {self.world_size} "
                f"process(es) x --per_device_train_batch_size ({self.per_device_train_batch_size})"
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"--global_train_batch_size ({global_batch}) makes {steps} accumulation steps, not the "
                f"{self.gradient_accumulation_steps} of --gradient_accumulation_steps: give one of them"
            )
        return steps


def _validate_json(name: str, value: Any) -> None:
    if isinstance(value, str) and value.startswith("{"):  # else it names a file
        try:
            json.loads(value)
        except ValueError as error:
            raise UserInputError(f"--{name} ({value}) is not JSON: {error}") from error
