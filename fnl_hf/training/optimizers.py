"""Build the optimizer that the command line describes."""

import ast
import inspect
from typing import Any

import torch
from transformers import get_scheduler

from fnl_hf.errors import UserInputError
from fnl_hf.optim import (
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusMuon,
    FrobeniusSGD,
    frobenius_param_groups,
    muon_param_groups,
)
from fnl_hf.optim.lamb import DECAYS, FUSED_DEVICES
from fnl_hf.optim.muon import ADJUSTMENTS
from fnl_hf.products.discovery import discover

# To add an optimizer, add a line here: flags and --optim_args follow from its constructor.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": FrobeniusAdamW,
    "lamb": FrobeniusLamb,
    "muon": FrobeniusMuon,
    "sgd": FrobeniusSGD,
}
# Functions that make the parameter groups, if not frobenius_param_groups.
PARAM_GROUPS = {"muon": muon_param_groups}
# Defaults that differ from those of the classes.
PREFERRED: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "lamb": {"max_grad_norm": None}}
# Arguments that --optim_args cannot set because flags set them, with a value of their type. If an optimizer uses the
# name for something else, as Adafactor does for its two eps, --optim_args sets it.
SET_BY_FLAGS: dict[str, Any] = {
    "params": None,
    "lr": 0.0,
    "betas": (0.0, 0.0),
    "eps": 0.0,
    "weight_decay": 0.0,
    "frobenius_decay": 0.0,
    "max_grad_norm": 0.0,
}
VAR_POSITIONAL, VAR_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
WORDS = {"true": "True", "false": "False", "none": "None"} | {word: repr(word) for word in (*DECAYS, *ADJUSTMENTS)}


def build_optimizer(args, model: torch.nn.Module, sharded: bool = False) -> torch.optim.Optimizer:
    """The optimizer that ``FnlTrainingArguments`` describe, for any model with products.

    LAMB's own clipping is off, because Trainer clips at ``--max_grad_norm`` for all optimizers. ``sharded``: FSDP2 will
    shard the parameters.

    Raises:
        UserInputError: arguments that the optimizer does not take, or a ``--frobenius_decay`` that decays nothing.
    """
    groups = _param_groups(args, model)
    own = parse_optimizer_arguments(args.optimizer, args.optim_args)
    flags = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fused": args.device.type in FUSED_DEVICES,
    }
    optimizer_class: Any = OPTIMIZERS[args.optimizer]
    taken = constructor_arguments(optimizer_class)
    options = {name: value for name, value in flags.items() if name in taken and _fits(value, taken[name])}
    if sharded and issubclass(optimizer_class, torch.optim.SGD):
        options.pop("fused")  # torch's fused kernel does not accept sharded parameters, and its default is a loop
        options["foreach"] = True
    elif own.get("foreach"):
        options.pop("fused", None)
    try:
        return optimizer_class(groups, **options | PREFERRED.get(args.optimizer, {}) | own)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserInputError(f"--optimizer {args.optimizer} --optim_args {args.optim_args}: {error}") from error


def _param_groups(args, model: torch.nn.Module) -> list[dict[str, Any]]:
    decay = args.frobenius_decay
    if decay is None and not any(discover(model)):
        decay = 0.0  # no decay is expected in a dense model
    try:
        make_groups = PARAM_GROUPS.get(args.optimizer, frobenius_param_groups)
        return make_groups(model, args.weight_decay, decay, args.decay_mode)
    except ValueError as error:
        raise UserInputError(str(error)) from error


def validate_optimization(args, model: torch.nn.Module) -> None:
    """Raise UserInputError for an optimizer or schedule that cannot be built, by building and discarding it."""
    optimizer = build_optimizer(args, model)
    steps = 100
    try:
        kwargs = args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, kwargs)
    except (ValueError, TypeError, ArithmeticError) as error:
        given = f"--lr_scheduler_type {args.lr_scheduler_type.value} --lr_scheduler_kwargs {kwargs}"
        raise UserInputError(f"{given}: {error}") from error


def parse_optimizer_arguments(optimizer: str, text: str | None) -> dict[str, Any]:
    """ "momentum=0.9,nesterov=true" as keyword arguments; values are numbers, booleans, tuples or the words of
    LAMB's and Muon's options.

    Raises:
        UserInputError: no ``name=value``, a name that the optimizer does not have, or another value.
    """
    taken = constructor_arguments(OPTIMIZERS[optimizer])
    known = {
        name: default
        for name, default in taken.items()
        if name not in SET_BY_FLAGS or not _fits(SET_BY_FLAGS[name], default)
    }
    parsed: dict[str, Any] = {}
    for name, separator, value in (part.partition("=") for part in _split(text or "")):
        if not separator or name not in known:
            raise UserInputError(
                f"--optim_args {text}: {name!r} is not an argument of {optimizer}. Write name=value, with a name "
                f"from {sorted(known)}"
            )
        try:
            parsed[name] = ast.literal_eval(WORDS.get(value.lower(), value))
        except (ValueError, SyntaxError) as error:
            raise UserInputError(f"--optim_args {text}: {name} ({value}) must be a number, true or false") from error
        if not _fits(parsed[name], known[name]):
            raise UserInputError(
                f"--optim_args {text}: {name} ({value}) must have the form of its default, {known[name]}"
            )
    return parsed


def constructor_arguments(optimizer_class: type) -> dict[str, Any]:
    """The arguments of a class's constructor with their defaults, including those that it passes on to its base
    classes."""
    found: dict[str, Any] = {}
    for each in inspect.getmro(optimizer_class):
        if "__init__" not in vars(each):
            continue
        _, *parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
        named = [parameter for parameter in parameters if parameter.kind not in (VAR_POSITIONAL, VAR_KEYWORD)]
        found = {parameter.name: parameter.default for parameter in named} | found
        if len(named) == len(parameters):  # it passes nothing to its base class
            break
    return found


def _fits(value: Any, default: Any) -> bool:
    """Whether a value has the form of the default: a switch, a number, a tuple of the same length or a word; torch does
    not check.

    A missing default, or None, allows any value.
    """
    return default in (None, inspect.Parameter.empty) or _kind(value) == _kind(default)


def _kind(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return len(value)
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets: "trust_clamp=(0,10),decay=decoupled"."""
    parts, depth = [""], 0
    for character in text.replace(" ", ""):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]
