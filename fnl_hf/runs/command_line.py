"""Command lines of the scripts: dataclasses, optional YAML or JSON files, overriding flags, and the exit status."""

import gc
import json
import os
import re
import signal
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from fnl_hf.errors import EX_INTERRUPTED, Preempted, TrainingDiverged, UserInputError
from fnl_hf.runs.config_files import with_config_files

NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # as argparse knows it before Python 3.14
# flags that name a file, a folder, something on the Hub or a package
NAMES = ("output_dir", "cache_dir", "train_file", "validation_file", "dataset_name", "tokenizer_name", "config_name",
         "model_name_or_path", "resume_from_checkpoint", "optimizer_state_from", "report_to")  # fmt: skip


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        """None is no default that a reader can use: the help says what it means. HfArgumentParser gives ``--no_flag``
        the help of ``--flag``."""
        if action.nargs == 0 and action.const is False:
            return f"The same as --{action.dest} false."
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message):
        """argparse would print two hundred flags and exit."""
        raise UserInputError(message)


def parse_arguments(dataclass_types: Any, argv: Sequence[str]) -> tuple[Any, ...]:
    """Instances of the dataclasses from ``[config.yaml ...] [--flag value ...]``. A later file overrides an earlier
    one, and flags override all files; "~" at the start of a value is the home folder.

    Raises:
        UserInputError: an unreadable file, an unknown flag or key, or a value of the wrong kind.
    """
    argv = expand_home(with_config_files(expand_home(argv)))
    for flag, word in zip(["", *argv], argv):
        if "\0" in word:
            raise UserInputError(f"{flag} ({word!r}) must not contain a null byte")
    argv = join_negative_numbers(argv)
    parser = _Parser(dataclass_types, formatter_class=_HelpFormatter, allow_abbrev=False)
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except UserInputError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:  # raised by the dataclasses' own checks
        raise UserInputError(str(error)) from error
    if unknown:
        raise _describe_unknown(argv, unknown, parser)
    for name, value in ((name, value) for instance in instances for name, value in vars(instance).items()):
        if name in NAMES and value is not None and "" in ([value] if isinstance(value, str) else value):
            raise UserInputError(f"--{name} is empty: leave it out")
    return tuple(instances)


def expand_home(argv: Sequence[str]) -> list[str]:
    """Replace "~" at the start of values by the home folder: shells do not expand it in ``--flag=~/x``, and nothing
    does in a config file."""
    expanded = []
    for word in argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        expanded.append(f"{flag}{equals}{os.path.expanduser(value)}" if value.startswith("~") else word)
    return expanded


def join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """``--flag -1e9`` as ``--flag=-1e9``: before Python 3.14 argparse takes such a number for a flag."""
    words: list[str] = []
    for word in argv:
        if words and words[-1].startswith("--") and _is_unknown_number(word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _is_unknown_number(word: str) -> bool:
    """Whether a word is a negative number that argparse does not recognize as one."""
    if not word.startswith("-") or NEGATIVE_NUMBER.fullmatch(word):
        return False
    try:
        float(word)
    except ValueError:
        return False
    return True


def _describe_unknown(argv: list[str], unknown: list[str], parser: HfArgumentParser) -> UserInputError:
    """Words that belong to no flag: an unknown flag, or a superfluous value."""
    word = unknown[0]
    if not word.startswith("-"):
        for index, (before, found) in enumerate(zip(argv, argv[1:])):
            if found == word and not before.startswith("-"):
                flag = next(flag for flag in reversed(argv[: index + 1]) if flag.startswith("-"))
                return UserInputError(f"{flag} takes one value: remove {word}")
    flags = [flag for action in parser._actions if action.dest != "help" for flag in action.option_strings]
    close = [flag for given in unknown for flag in get_close_matches(given.partition("=")[0], flags, n=1, cutoff=0.8)]
    hint = f" (did you mean {' '.join(close)}?)" if close else ""
    return UserInputError(f"unknown argument: {' '.join(unknown)}{hint}")


def run_script(run: Callable[[Sequence[str]], None]) -> None:
    """Run a script's ``main`` with the command line, and turn every expected end into one line and an exit status.

    2 is bad input; 3 too many losses that are not finite; 75 (``EX_TEMPFAIL``) a stop by SIGTERM and 130 one by Ctrl-C,
    during training after a checkpoint, otherwise immediately. ``torchrun`` and ``accelerate launch`` turn every status
    into 1. Their report of it ends in the same line if they ask the processes; ``accelerate launch --quiet`` with one
    process leaves it out.
    """
    script = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _stop_at_once)
    try:
        run(sys.argv[1:])
        _end_process_group()
    except UserInputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        _tell_launcher(str(error))
        _end_process_group(together=False)
        sys.exit(2)
    except TrainingDiverged as error:
        _print_once(f"{script}: error: {error}")
        _tell_launcher(str(error))
        _end_process_group()
        sys.exit(3)
    except Preempted as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _print_once(f"{script}: {stop.message}")
        _tell_launcher(stop.message)
        _end_process_group()
        raise
    except KeyboardInterrupt:
        _print_once(f"{script}: stopped by Ctrl-C")
        _end_process_group(together=False)
        sys.exit(EX_INTERRUPTED)


def _print_once(message: str) -> None:
    """Print what all processes have to say on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr)


def _tell_launcher(message: str) -> None:
    """Make torchrun's report of this process give the reason, in the form that ``torch.distributed.elastic`` reads, but
    without a traceback."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        reply = {"message": message, "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):  # the script has printed it
            Path(file).write_text(json.dumps({"message": reply}), encoding="utf-8")


def _end_process_group(together: bool = True) -> None:
    """End the process group before the interpreter ends.

    A thread of gloo that has just finished the last collective frees its tensors, for which it needs the interpreter;
    if the interpreter is shutting down, the process aborts after all work is done. NCCL does not need this, and may
    wait for the other processes: it is ended only if all of them get here ``together``.

    gloo's threads end with the last reference to the group. The wrapped model holds one, and is in reference cycles.
    It must not be the last: a wrapped model that ends waits for these threads without releasing the interpreter, for
    which a thread that is freeing its tensors may be waiting.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if together or torch.distributed.get_backend() == "gloo":
        group = torch.distributed.group.WORLD
        torch.distributed.destroy_process_group()
        gc.collect()
        del group  # releases the interpreter while it waits
        time.sleep(0.1)  # the traceback of an error may hold the model, too: gives that thread the interpreter


def _stop_at_once(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers may send it again
    raise Preempted("stopped by SIGTERM: start the same command with --resume_from_checkpoint auto to continue")
