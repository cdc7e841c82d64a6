"""``transformers.Trainer`` with our optimizers, and with losses that are means over the whole global batch."""

import inspect
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from fnl_hf.errors import EX_INTERRUPTED, EX_TEMPFAIL, Preempted, UserInputError
from fnl_hf.reports.callbacks import TrainingClockCallback, add_fnl_callbacks
from fnl_hf.reports.throughput import ThroughputMeter
from fnl_hf.runs.checkpoints import (
    STAGING_FOLDER,
    STATE_FILE,
    drop_checkpoints,
    finalize_checkpoint,
    is_disk_full,
    remove,
)
from fnl_hf.runs.ownership import begin_writing
from fnl_hf.runs.preemption import (
    SIGNALS,
    PreemptionCallback,
    ignore_signals,
    signals_handled_by,
    surviving_signals,
)
from fnl_hf.runs.processes import gather_objects
from fnl_hf.runs.provenance import copy_provenance
from fnl_hf.training.cpu import keep_freed_memory, warn_of_idle_cores
from fnl_hf.training.guard import LossGuard, nan_unless_finite
from fnl_hf.training.optimizers import build_optimizer, validate_optimization
from fnl_hf.training.precision import keeping_weights
from fnl_hf.training.pushing import PushCallback, PushingTrainer
from fnl_hf.training.resuming import ResumeCallback, complete_metrics, loading_tied_weights, without_mended_warnings
from fnl_hf.training.sampling import EpochCallback, keeping_last_batch

MATMUL_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The label arguments of BERT's heads; each loss is a mean over the entries of one of them.
LABEL_NAMES = ("labels", "next_sentence_label", "start_positions", "end_positions")


def build_trainer(trainer_class: type["FnlTrainer"], **kwargs) -> "FnlTrainer":
    """A trainer with our callbacks. What its constructor refuses (trackers, sharding, evaluation, a folder that cannot
    be made) is bad input. An optimizer or schedule that cannot be built is refused before the folder is made."""
    if kwargs["args"].do_train:
        validate_optimization(kwargs["args"], kwargs["model"])
    try:
        trainer = trainer_class(**kwargs)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise UserInputError(str(error)) from error
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_deepspeed_enabled or (plugin is not None and plugin.fsdp_version == 1):
        raise UserInputError(
            "DeepSpeed and FSDP1 flatten parameters, so the factors of a product cannot be found: use FSDP2 "
            "(fsdp_version: 2 in Accelerate's configuration)"
        )
    if plugin is not None and (trainer.args.bf16_full_eval or trainer.args.fp16_full_eval):
        raise UserInputError(
            "--bf16_full_eval and --fp16_full_eval cast the model, which does not work with FSDP2: set --bf16 "
            "true, which also applies to evaluation"
        )
    add_fnl_callbacks(trainer)
    trainer.add_callback(EpochCallback)
    if trainer.args.device.type == "cpu":
        keep_freed_memory()
        warn_of_idle_cores()
    return trainer


def train_and_save(trainer: "FnlTrainer", checkpoint: str | None) -> dict[str, float]:
    """Train, from ``checkpoint`` if given, and save model, tokenizer and state immediately, so that the trained model
    exists even if an evaluation fails afterwards. Returns the training metrics."""
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.args.should_save:
        begin_writing(Path(trainer.args.output_dir))
    trainer.save_end()
    return metrics


class FnlTrainer(PushingTrainer):
    """Trainer for ``FnlTrainingArguments`` and any BERT-like or image model, ours or stock.

    Under gradient accumulation and on several processes, each loss is the mean over all items of the global batch
    (masked tokens, sentence pairs, questions), not a mean of micro-batch means. Logs of the loss and the training
    metrics include the speed.
    """

    def __init__(self, model=None, args=None, **kwargs):
        self._staging: Path | None = None  # where a checkpoint is being written
        self._is_saving = False
        self._save_error: Exception | None = None
        self.preemption = PreemptionCallback()
        with _without_jit_checkpoint(args):
            super().__init__(model, args, **kwargs)
        if self.args.enable_jit_checkpoint:
            self.add_callback(self.preemption)
        self.guard = LossGuard(self)
        self.add_callback(self.guard)
        self.resuming = ResumeCallback()
        self.add_callback(self.resuming)
        if self.args.push_to_hub:
            self.add_callback(PushCallback(self))
        unwrapped = self.accelerator.unwrap_model(self.model)
        self._model_takes_counts = "num_items_in_batch" in inspect.signature(unwrapped.forward).parameters
        self.model_accepts_loss_kwargs = True
        dtype = MATMUL_DTYPES.get(self.accelerator.mixed_precision, torch.float32)
        self.throughput = ThroughputMeter(unwrapped, self.args.device, dtype, self.accelerator.gather)
        self.add_callback(TrainingClockCallback(self.throughput))
        self.measure_model()

    def measure_model(self) -> None:
        """Measure the model's size for throughput figures; call it after layers were replaced."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        count = getattr(unwrapped, "num_parameters", None)
        self._num_parameters = count(exclude_embeddings=True) if count else None
        self.throughput.watch(unwrapped)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Like Trainer's.

        Raises:
            Preempted: SIGTERM or Ctrl-C, and ``enable_jit_checkpoint``; the checkpoint is written.
            KeyboardInterrupt: a second Ctrl-C.
            UserInputError: an evaluation does not have the metric for the best model.
        """
        checkpoint: Any = resume_from_checkpoint or None
        self.resuming.checkpoint = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        with ExitStack() as contexts:
            contexts.enter_context(without_mended_warnings())
            contexts.enter_context(loading_tied_weights(self.model))
            contexts.enter_context(self._refusing_unknown_metrics())
            if self.args.enable_jit_checkpoint:
                self.preemption.reset()
                contexts.enter_context(signals_handled_by(self.preemption.request))
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def _refusing_unknown_metrics(self) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            evaluated = next((row for row in reversed(self.state.log_history) if any(map(_is_metric, row))), {})
            known = ", ".join(name.removeprefix("eval_") for name in filter(_is_metric, evaluated))
            raise UserInputError(
                f"--metric_for_best_model ({self.args.metric_for_best_model}) must be one of {known}"
            ) from error

    def _run_epoch(self, *args, **kwargs):
        """Like Trainer's, which trains one step too many if it resumes from the last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial, *args):
        if not self.preemption.is_stopping:
            with self._keeping_checkpoints():
                return super()._finalize_training(trial, *args)
        if self.preemption.saved_step != self.state.global_step:
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        step = self.state.global_step
        number = self.preemption.signal
        raise Preempted(
            f"stopped by {SIGNALS[number]} after step {step} of {self.state.max_steps}, saved in "
            f"{Path(self._get_output_dir(None), f'{PREFIX_CHECKPOINT_DIR}-{step}')}: start the same command with "
            "--resume_from_checkpoint auto to continue",
            EX_INTERRUPTED if number == signal.SIGINT else EX_TEMPFAIL,
        )

    @contextmanager
    def _keeping_checkpoints(self) -> Iterator[None]:
        """With a limit of one, Trainer deletes all checkpoints except the best at the end, whoever wrote them, and even
        if the model is not the best but the last one."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.load_best_model_at_end and limit == 1 and best is not None:
            drop_checkpoints(Path(self._get_output_dir(None)), 1, best, keep_newest=False)

    def get_train_dataloader(self) -> DataLoader:
        return self._with_own_generator(super().get_train_dataloader())

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        with keeping_last_batch(self.args):
            return self._with_own_generator(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args, **kwargs) -> DataLoader:
        with keeping_last_batch(self.args):
            return self._with_own_generator(super().get_test_dataloader(*args, **kwargs))

    def _with_own_generator(self, loader: DataLoader) -> DataLoader:
        """The loader with its own generator, and workers that ignore SIGTERM and Ctrl-C."""
        if getattr(loader.worker_init_fn, "func", None) is ignore_signals:  # kept with its workers
            return loader
        # Iterators draw from the global generator, like dropout; how often depends on whether workers persist.
        generator = torch.Generator().manual_seed(self.args.seed)
        for part in {loader, getattr(loader, "base_dataloader", loader)}:  # Accelerate's is a wrapper
            part.generator = generator
            part.worker_init_fn = surviving_signals(part.worker_init_fn)
        return loader

    def evaluation_loop(self, *args, **kwargs):
        """Like Trainer's, which casts the model in place for ``bf16_full_eval`` and ``fp16_full_eval`` and leaves it
        cast when it is saved, pushed or trained further."""
        if not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            return super().evaluation_loop(*args, **kwargs)
        with keeping_weights(self.accelerator.unwrap_model(self.model)):
            return super().evaluation_loop(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.args, model or self.model, sharded=self.is_fsdp_enabled)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of a step, on the device, and the number of items per label argument in the global
        batch."""
        # For streams and after a resume within an epoch, Accelerate leaves copying to Trainer, which waits for each
        # copy.
        pinned = self.args.dataloader_pin_memory
        on_device = (send_to_device(batch, device, non_blocking=pinned) for batch in epoch_iterator)
        batches = list(islice(self.throughput.batches(on_device), num_batches))
        return batches, self._count_items(batches)

    def _count_items(self, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
        """Items per label argument; Trainer itself knows only ``labels``."""
        names = [name for name in LABEL_NAMES if batches and name in batches[0]]
        if not names:
            return None
        items = [[labels_of(batch, name).ne(-100).sum() for batch in batches] for name in names]
        counts = torch.stack([torch.stack(micro_batches).sum() for micro_batches in items])
        return dict(zip(names, self.sum_over_processes(counts)))

    def sum_over_processes(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over processes of the items of a step, if losses are means over all processes."""
        if not self.args.average_tokens_across_devices:
            return counts
        return self.accelerator.gather(counts[None]).sum(dim=0)

    def processes_to_average(self) -> int:
        """The factor for a part of a mean over ``sum_over_processes``: data parallelism averages gradients."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Like Trainer's. Logs of the loss include the figures since the last such log, metrics those of the whole
        run."""
        if "loss" in logs:
            logs.update(self.throughput.close_window())
        if "train_loss" in logs:
            logs.update(self.throughput.close_run())
            first_step = self.resuming.first_step
            logs["train_loss"] = self.guard.mean_of_trained(logs["train_loss"], self.state.global_step - first_step)
            if first_step:
                complete_metrics(logs, self.state.log_history, first_step, self.state.global_step)
        super().log(logs, start_time)
        if "train_mfu" in logs:  # trackers take only numbers
            logs["train_mfu_peak"] = self.throughput.peak()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Like Trainer's, which iterates over all parameters of the model in every micro-batch."""
        if self._num_parameters is None:
            return super().floating_point_ops(inputs)
        return 6 * inputs[self.model.main_input_name].numel() * self._num_parameters

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        loss, outputs = self._loss_and_outputs(model, inputs, num_items_in_batch)
        if loss.requires_grad:
            loss = nan_unless_finite(loss)
        return (loss, outputs) if return_outputs else loss

    def _loss_and_outputs(self, model, inputs: dict[str, Any], items) -> Any:
        if self._model_takes_counts or items is None:
            return super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        # A stock head returns the mean over its micro-batch: convert it into its part of the global mean.
        # A bare count, which Trainer passes in an evaluation, refers to ``labels``.
        name, count = next(iter((items if isinstance(items, Mapping) else {"labels": items}).items()))
        own = labels_of(inputs, name).ne(-100).sum()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return loss * own * self.processes_to_average() / count, outputs

    def _get_grad_norm(self, model, grad_norm=None):
        """Like Trainer's, which is called when the gradients of a step are complete and clipped."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.guard.examine(grad_norm)
        return grad_norm

    def _save_checkpoint(self, model, trial) -> None:
        """Like Trainer's, but under a temporary name that is changed when the checkpoint is complete; older ones are
        only deleted then. If one process cannot write, the save ends on all of them.

        Raises:
            UserInputError: the disk is full; what was there before is as it was.
        """
        self.guard.count()
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._staging = checkpoint.parent / STAGING_FOLDER
        staged = self._staging / checkpoint.name
        try:
            if self.args.should_save:
                remove(self._staging)
            self.accelerator.wait_for_everyone()
            with self._failing_together(checkpoint):
                super()._save_checkpoint(model, trial)
                self.save_data_position(staged)
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(checkpoint)
            with self._failing_together(checkpoint):
                if self.args.should_save:
                    self._finalize_checkpoint(staged, checkpoint)
        finally:
            self._staging = None

    def save_data_position(self, folder: Path) -> None:
        """Add the position of this process's training data to a checkpoint, if it does not follow from the step."""

    def save_end(self) -> None:
        """Save model, tokenizer and state in the output folder. All processes leave together, as after saving a
        checkpoint: another machine's first process may read immediately what this one's has written.

        Raises:
            UserInputError: the disk is full.
        """
        with self._failing_together(Path(self.args.output_dir)):
            self.save_model(_internal_call=True)  # it is pushed after its card is written
            self.save_state()

    @contextmanager
    def _failing_together(self, folder: Path) -> Iterator[None]:
        """All processes leave the context together, with an error if one of them had one."""
        self._save_error, self._is_saving = None, True
        try:
            with self._deferring_error():
                yield
        finally:
            self._is_saving = False
        error = self._save_error
        failures = [failure for failure in gather_objects(error and (is_disk_full(error), str(error))) if failure]
        if not failures:
            return
        if self.args.should_save and self._staging is not None:
            remove(self._staging)
        full = [text for is_full, text in failures if is_full]
        if full:
            raise UserInputError(
                f"{folder} could not be written: the disk is full ({full[0]}). Earlier checkpoints are intact: free "
                "some space and resume with --resume_from_checkpoint auto"
            ) from error
        raise error or RuntimeError(f"another process could not write {folder}: {failures[0][1]}")

    @contextmanager
    def _deferring_error(self) -> Iterator[None]:
        """Within a save, defer an error to the end: until then the other processes wait for this one's part."""
        try:
            yield
        except Exception as error:
            if not self._is_saving:
                raise
            self._save_error = self._save_error or error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like Trainer's, with the record of the run's starts."""
        with self._deferring_error():
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                copy_provenance(self.args.output_dir, output_dir or self.args.output_dir)

    def _finalize_checkpoint(self, staged: Path, checkpoint: Path) -> None:
        self.state.save_to_json(str(staged / STATE_FILE))  # it may be its own best checkpoint
        finalize_checkpoint(staged, checkpoint)
        remove(staged.parent)
        if self.is_pushing():  # from an older checkpoint that the next save deletes
            return
        if self.args.save_total_limit:
            drop_checkpoints(checkpoint.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial) -> str:
        return str(self._staging or super()._get_output_dir(trial))


@contextmanager
def _without_jit_checkpoint(args) -> Iterator[None]:
    """Disable Trainer's own SIGTERM handler: it acts on one process, waits, and marks a folder that is not written
    yet."""
    enabled = getattr(args, "enable_jit_checkpoint", False)
    if enabled:
        args.enable_jit_checkpoint = False
    try:
        yield
    finally:
        if enabled:
            args.enable_jit_checkpoint = True


def _is_metric(name: str) -> bool:
    return name.startswith("eval_")


def labels_of(batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """One label argument, with -100 where BERT's loss ignores it: answer positions outside the sequence."""
    labels = batch[name]
    if name in ("start_positions", "end_positions"):
        length = (batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]).shape[1]
        return labels.masked_fill(labels >= length, -100)
    return labels
