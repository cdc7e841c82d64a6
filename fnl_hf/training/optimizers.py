"""The optimizer that the command line describes."""

import ast
import inspect
from typing import Any

import torch
from transformers import get_scheduler

from fnl_hf.errors import UserInputError
from fnl_hf.optim import FrobeniusAdamW, FrobeniusLamb, FrobeniusSGD, Lamb, frobenius_param_groups
from fnl_hf.optim.lamb import DECAYS, FUSED_DEVICES

OPTIMIZERS = {"adamw": FrobeniusAdamW, "lamb": FrobeniusLamb, "sgd": FrobeniusSGD}
# Whose constructors take what ours pass on; what the command line sets elsewhere is not an argument of the optimizer's.
SIGNATURES = {
    "adamw": (torch.optim.AdamW,),
    "lamb": (Lamb, FrobeniusLamb),
    "sgd": (torch.optim.SGD, FrobeniusSGD),
}
SET_ELSEWHERE = ("self", "params", "lr", "betas", "eps", "weight_decay", "frobenius_decay", "max_grad_norm")
VARIADIC = ("args", "kwargs")
PREFERRED: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "lamb": {"max_grad_norm": None}}
WORDS = {"true": "True", "false": "False", "none": "None"} | {decay: repr(decay) for decay in DECAYS}


def build_optimizer(args, model: torch.nn.Module, sharded: bool = False) -> torch.optim.Optimizer:
    """The optimizer that ``FnlTrainingArguments`` describe, for any model with products.

    LAMB's own clipping is off: Trainer clips at ``--max_grad_norm``, whatever the optimizer. ``sharded``: FSDP2 will
    cut the parameters.
    """
    groups = frobenius_param_groups(model, args.weight_decay, args.frobenius_decay, args.decay_mode)
    options: dict[str, Any] = {"lr": args.learning_rate}
    if args.optimizer != "sgd":
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    own = parse_optimizer_arguments(args.optimizer, args.optim_args)
    if sharded and args.optimizer == "sgd":  # torch's fused kernel takes no cut parameters, and its default is a loop
        options["foreach"] = True
    elif not own.get("foreach"):
        options["fused"] = args.device.type in FUSED_DEVICES
    own = PREFERRED.get(args.optimizer, {}) | own
    try:
        return OPTIMIZERS[args.optimizer](groups, **options | own)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserInputError(f"--optimizer {args.optimizer} --optim_args {args.optim_args}: {error}") from error


def validate_optimization(args, model: torch.nn.Module) -> None:
    """Raise UserInputError for an optimizer or a schedule that cannot be built: each is, and thrown away."""
    optimizer = build_optimizer(args, model)
    steps = 100
    try:
        kwargs = args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, kwargs)
    except (ValueError, TypeError, ArithmeticError) as error:
        given = f"--lr_scheduler_type {args.lr_scheduler_type.value} --lr_scheduler_kwargs {kwargs}"
        raise UserInputError(f"{given}: {error}") from error


def parse_optimizer_arguments(optimizer: str, text: str | None) -> dict[str, Any]:
    """ "momentum=0.9,nesterov=true" as keyword arguments; values are numbers, booleans, tuples or LAMB's decays.

    Raises:
        UserInputError: no ``name=value``, a name that the optimizer does not have, or another value.
    """
    signatures = [inspect.signature(owner).parameters for owner in SIGNATURES[optimizer]]
    known = {name: parameter.default for signature in signatures for name, parameter in signature.items()}
    known = {name: default for name, default in known.items() if name not in (*SET_ELSEWHERE, *VARIADIC)}
    parsed: dict[str, Any] = {}
    for name, separator, value in (part.partition("=") for part in _split(text or "")):
        if not separator or name not in known:
            raise UserInputError(
                f"--optim_args {text}: {name!r} is not an argument of {optimizer}: name=value of {sorted(known)}"
            )
        try:
            parsed[name] = ast.literal_eval(WORDS.get(value.lower(), value))
        except (ValueError, SyntaxError) as error:
            raise UserInputError(f"--optim_args {text}: {name} ({value}) must be a number, true or false") from error
        if not _fits(parsed[name], known[name]):
            raise UserInputError(f"--optim_args {text}: {name} ({value}) must be like its default, {known[name]}")
    return parsed


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is a switch where the default is one, and a number where that is one; torch does not look."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (default is None or isinstance(default, bool))
    return isinstance(value, int | float) or not isinstance(default, int | float)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets: "trust_clamp=(0,10),decay=decoupled"."""
    parts, depth = [""], 0
    for character in text.replace(" ", ""):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]
