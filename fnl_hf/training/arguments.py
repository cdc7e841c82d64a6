"""The flags that all training scripts share: Trainer's and ours, with their bounds."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments
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
    "save_on_each_node": "leave it out, and put --output_dir on a disk that all machines share",
    "use_liger_kernel": "leave it out",
    "eval_do_concat_batches": "leave it out",
    "batch_eval_metrics": "leave it out",
    "save_only_model": "leave it out: a run cannot resume from such checkpoints",
}

FOLLOWING_METRICS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


@dataclass
class FnlTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the optimizer, its Frobenius decay, and the handling of an output folder that is in
    use."""

    optimizer: str = field(
        default="adamw",
        metadata={"help": "The optimizer. All of them support Frobenius decay.", "choices": list(OPTIMIZERS)},
    )
    optim_args: str | None = field(
        default=None,
        metadata={
            "help": "More arguments of the optimizer, for example 'momentum=0.9,nesterov=True' (sgd; default "
            "momentum: 0.9), 'decay=in_trust_ratio' (lamb), 'adamw_lr=1e-3,per_head=True' (muon) or 'amsgrad=True' "
            "(adamw)."
        },
    )
    weight_decay: float = field(
        default=0.01,
        metadata={"help": "Weight decay of all matrices except the factors of products."},
    )
    frobenius_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of the products in attention and in factorized layers. Default: the value of --weight_decay."
        },
    )
    decay_mode: str = field(
        default="frobenius",
        metadata={
            "help": "What --frobenius_decay applies to: the Frobenius norm of each product (frobenius), the norms of "
            "its factors (weight), or nothing (none). Other weights are not affected.",
            "choices": DECAY_MODES,
        },
    )
    product_norms_steps: int | None = field(
        default=None,
        metadata={
            "help": "Log the products' norms and other diagnostics every so many steps. Default: --logging_steps."
        },
    )
    global_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences per optimizer step over all processes. Sets --gradient_accumulation_steps, so that "
            "one recipe works with any number of processes."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or 'auto': resume from the newest complete checkpoint in --output_dir, "
            "start a new run if there is none, and exit at once if the run is finished."
        },
    )
    optimizer_state_from: str | None = field(
        default=None,
        metadata={
            "help": "The folder of a run. Load the optimizer state of the checkpoint that this run takes its weights "
            "from; learning rate, schedule and decay are those of this run."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start a new run in an output folder that is in use: replaces the files of the old run and "
            "deletes its checkpoints. Other files are kept."
        },
    )
    allow_other_world_size: bool = field(
        default=False,
        metadata={
            "help": "Resume with another number of processes, at the same sample position. The global batch must "
            "stay the same: change --gradient_accumulation_steps to match."
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
        default=None, metadata={"help": "License named in the model card, for example apache-2.0. Default: none."}
    )
    hub_language: str | None = field(
        default=None,
        metadata={"help": "Language named in the model card, for example en. Default: that of the base model's card."},
    )
    report_to: None | str | list[str] = field(
        default=None,
        metadata={
            "help": "Experiment trackers to report to: names, 'all' (all that are installed) or 'none'. Default: "
            "tensorboard if it is installed."
        },
    )
    # None: not given
    do_train: bool = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Train. Default: if neither evaluation nor prediction is asked for."}
    )
    do_eval: bool = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Evaluate. Default: if neither training nor prediction is asked for."}
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "Skip a step if its loss or gradient is not finite. After more than this number of skipped steps "
            "the run ends with exit status 3."
        },
    )
    enable_jit_checkpoint: bool = field(
        default=True,
        metadata={
            "help": "On SIGTERM, save a checkpoint on all processes and end with exit status 75, so that a scheduler "
            "can restart the same command."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "In DDP, search every step for parameters without a gradient. BERT's heads have none."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide non-finite losses in the logs. Synchronizes the device in every step."}
    )

    def __post_init__(self):
        self._choose_work()  # before an eval_strategy sets do_eval
        self._validate_flags()
        if self.report_to is None:
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
        given = self.accelerator_config is not None
        super().__post_init__()
        accelerator_config: Any = self.accelerator_config
        _validate_accelerator(accelerator_config)
        self._choose_direction()
        self._use_one_gpu()
        if self.global_train_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation_for(self.global_train_batch_size)
        parse_optimizer_arguments(self.optimizer, self.optim_args)
        self.remove_unused_columns = False  # our data sets have no such columns and return whole batches
        if self.device.type == "cpu":  # pinned memory is useless on a CPU and causes a warning
            self.dataloader_pin_memory = False
        elif not given:  # without this, the host waits for each batch to be copied
            accelerator_config.non_blocking = self.dataloader_pin_memory

    def _choose_work(self) -> None:
        """If nothing is asked for, do what is not switched off."""
        is_default = not (self.do_train or self.do_eval or self.do_predict)
        if is_default and self.do_train is False and self.do_eval is False:
            raise UserInputError("--do_train false --do_eval false: there is nothing to do")
        self.do_train, self.do_eval = (
            is_default if given is None else given for given in (self.do_train, self.do_eval)
        )

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
                raise UserInputError(f"--{name} needs --dataloader_num_workers to be at least 1, not 0")
        for name in self._VALID_DICT_FIELDS:
            _validate_json(name, getattr(self, name))
        if self.torch_compile_mode is not None:
            modes = list(torch._inductor.list_mode_options())
            if self.torch_compile_mode not in modes:
                raise UserInputError(f"--torch_compile_mode ({self.torch_compile_mode}) must be one of {modes}")

    def _choose_direction(self) -> None:
        """Schedules that follow a metric would take a higher F1 for a worse one."""
        if self.lr_scheduler_type in FOLLOWING_METRICS and self.greater_is_better:
            given: Any = self.lr_scheduler_kwargs or {}
            self.lr_scheduler_kwargs = {"mode": "max"} | given

    def _use_one_gpu(self) -> None:
        """Prevent DataParallel: neither our batch sizes nor packed sequences work with it."""
        if self.n_gpu > 1:
            logger.warning(
                f"{self.n_gpu} GPUs are visible, but each process trains on one. To use all of them, start the "
                f"script with `torchrun --nproc_per_node {self.n_gpu}` or `accelerate launch --multi_gpu "
                f"--num_processes {self.n_gpu}`"
            )
            self._n_gpu = 1

    def __getstate__(self) -> dict[str, Any]:
        """All fields except the Hub token, because ``training_args.bin`` is a pickle that is uploaded. Copies have no
        token, either."""
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
                f"--global_train_batch_size ({global_batch}) requires {steps} accumulation steps, but "
                f"--gradient_accumulation_steps is {self.gradient_accumulation_steps}: leave one of the two flags "
                "out"
            )
        return steps


def _validate_accelerator(config: Any) -> None:
    """Refuse second ways to set the batch, which would not count for the order of the data."""
    if "num_steps" in (config.gradient_accumulation_kwargs or {}):
        raise UserInputError("--accelerator_config: num_steps is not supported: set --gradient_accumulation_steps")
    if config.split_batches:
        raise UserInputError(
            "--accelerator_config: split_batches (True) is not supported: --per_device_train_batch_size is the batch "
            "of each process"
        )


def _validate_json(name: str, value: Any) -> None:
    if isinstance(value, str) and value.startswith("{"):  # else it names a file
        try:
            json.loads(value)
        except ValueError as error:
            raise UserInputError(f"--{name} ({value}) is not valid JSON: {error}") from error
