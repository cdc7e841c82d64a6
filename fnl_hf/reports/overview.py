"""A description of a run in one block at its start, and its result in one line at its end."""

from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from fnl_hf.runs.seeds import NO_SCORES

PRECISIONS = {"no": "float32", "bf16": "mixed, bfloat16", "fp16": "mixed, float16"}
# Suffixes of metrics that are not results.
NO_RESULTS = (*NO_SCORES, "_samples")


class OverviewCallback(TrainerCallback):
    """Prints what is trained as soon as Trainer knows the number of steps, above its progress bar.

    Args:
        trainer: the Trainer it is added to.
        facts, notice: see :func:`describe_start`.
    """

    def __init__(self, trainer, facts: Mapping[str, str], notice: str | None):
        self.trainer, self.facts, self.notice = trainer, facts, notice

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            tqdm.write(describe_start(self.trainer, self.facts, self.notice))


def describe_start(trainer, facts: Mapping[str, str], notice: str | None = None) -> str:
    """A block with model, data, steps, global batch, precision, devices and folder of a run.

    Args:
        trainer: with ``do_train``, after its state has got its steps.
        facts: {label: text} of what Trainer does not know: where the model comes from, what the data are.
        notice: a line that is not to be overlooked.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = {"model": f"{type(model).__name__}, {count:,} parameters"} | dict(facts)
    if args.do_train:
        rows["steps"] = _steps(args, trainer.state)
        together = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows["global batch"] = (
            f"{together:,} = {args.train_batch_size} x {args.gradient_accumulation_steps} accumulation step(s) x "
            f"{args.world_size} process(es)"
        )
    rows["precision"] = describe_precision(trainer)
    rows["device"] = _device(args)
    rows["folder"] = str(args.output_dir)
    width = max(map(len, rows))
    lines = [f"  {label:<{width}}  {text}" for label, text in rows.items()]
    return "\n".join(["", *lines, *([f"  {notice}"] if notice else []), ""])


def describe_recipe(args, has_products: bool) -> str:
    """Optimizer, peak rate and decays in one line, for the title of a picture."""
    decay = f"; decay of the products: {describe_decay(args)}" if has_products else ""
    return describe_optimizer(args) + decay


def describe_optimizer(args) -> str:
    """Its name, arguments, peak rate and decay."""
    options = f" ({args.optim_args})" if args.optim_args else ""
    return f"{args.optimizer}{options}, peak learning rate {args.learning_rate}, weight decay {args.weight_decay}"


def describe_decay(args) -> str:
    """How products are decayed."""
    decay = args.weight_decay if args.frobenius_decay is None else args.frobenius_decay
    return args.decay_mode + (f", λ = {decay}" if args.decay_mode != "none" else "")


def describe_end(args, seconds: float, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The location of a run's results, its duration, and what it reached.

    Args:
        metrics: by split, as Trainer returns them; losses and scores are named, not speeds.
    """
    results = {
        name: value
        for split, values in metrics.items()
        for name, value in values.items()
        if (name == "train_loss" if split == "train" else _is_result(name)) and isinstance(value, int | float)
    }
    listed = ", ".join(f"{name} {_figure(value)}" for name, value in results.items())
    done = "trained and saved" if args.do_train else "done, results"
    return f"{done} in {args.output_dir}, in {duration(seconds)}" + (f": {listed}" if listed else "")


def describe_precision(trainer) -> str:
    """Of the matrix multiplications; weights are float32."""
    return PRECISIONS.get(trainer.accelerator.mixed_precision, trainer.accelerator.mixed_precision)


def _steps(args, state) -> str:
    text = f"{state.max_steps:,}"
    if args.max_steps <= 0:
        text += f", {args.num_train_epochs:g} epoch(s)"
    return f"{text}, from step {state.global_step:,} on" if state.global_step else text


def _device(args) -> str:
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.world_size} x {args.device.type}, {torch.get_num_threads()} thread(s)"


def _is_result(name: str) -> bool:
    return name != "epoch" and not name.endswith(NO_RESULTS)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """As "1 h 2 min 3 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(hours or minutes) + [f"{rest} s"]
    return " ".join(parts)
