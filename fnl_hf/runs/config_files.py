"""Config files: YAML or JSON mappings of flags to values, as command lines."""

import json
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from fnl_hf.errors import UserInputError

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


def with_config_files(argv: Sequence[str]) -> list[str]:
    """A command line in which config files, the words before its first flag, are replaced by their flags.

    A later file overrides an earlier one, and its ``null`` unsets a flag.

    Raises:
        UserInputError: see :func:`read_config` and :func:`as_arguments`.
    """
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    config: dict[str, Any] = {}
    for file in files:
        config |= read_config(file)
    return as_arguments(config) + list(argv[len(files) :])


class _FlagsLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last. Words like ``no`` are text and ``010`` is
    10, as in YAML 1.2 and on a command line."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


_RESOLVED = {
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?[0-9][0-9_]*",
}
_FlagsLoader.yaml_implicit_resolvers = {
    start: [resolver for resolver in resolvers if resolver[0] not in _RESOLVED]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _RESOLVED.items():
    _FlagsLoader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list("tTfF-+0123456789"))
_FlagsLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def read_config(file: str) -> dict[str, Any]:
    """The entries of a YAML or JSON mapping of flags to values.

    Raises:
        UserInputError: a file that cannot be read, or no such mapping; ``phases:``, which earlier versions took.
    """
    path = Path(file)
    if path.suffix.lower() not in CONFIG_SUFFIXES:
        raise UserInputError(f"{file}: only config files may come before the flags ({', '.join(CONFIG_SUFFIXES)})")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _FlagsLoader)  # JSON is YAML
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserInputError(f"{file}: cannot be read: {line}{error.problem}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserInputError(f"{file}: cannot be read: {error}") from error
    flags = _as_flags(file, config)
    if "phases" in flags:
        raise UserInputError(
            f"{file}: 'phases' is no longer a flag: each phase is a command of its own. Write what the second phase "
            f"changes into a file (with preset: null) and run it: {file} SECOND.yaml --model_name_or_path FIRST "
            "--optimizer_state_from FIRST --output_dir SECOND"
        )
    return flags


def _as_flags(file: str, config: Any) -> dict[str, Any]:
    """The entries of a mapping of flags to values; "max-steps" and "max_steps" are the same."""
    if not isinstance(config, dict):
        raise UserInputError(f"{file}: must contain a mapping of flags to values, not a {type(config).__name__}")
    for key in config:
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z][\w-]*", key):
            raise UserInputError(f"{file}: {key!r} is not a flag's name")
    flags = {key.replace("-", "_"): value for key, value in config.items()}
    if len(flags) < len(config):
        raise UserInputError(f"{file}: a flag is given twice, with '-' and with '_'")
    return flags


def as_arguments(config: dict[str, Any]) -> list[str]:
    """Entries of a config file as a command line, so that they pass the same checks.

    Raises:
        UserInputError: a value that cannot be written on one, or would be another flag there.
    """
    arguments = []
    for key, value in config.items():
        if value is None:
            continue
        arguments.append(f"--{key}")
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, list) or (isinstance(entry, dict) and key not in TrainingArguments._VALID_DICT_FIELDS):
                raise UserInputError(f"--{key} does not accept a {type(entry).__name__} ({entry})")
            try:
                word = json.dumps(entry) if isinstance(entry, dict | bool) else str(entry)
            except (TypeError, ValueError) as error:
                raise UserInputError(f"--{key}: {error}") from error
            if re.match(r"-[^\d.]", word):
                raise UserInputError(f"--{key} ({word}) must not start with '-'")
            arguments.append(word)
    return arguments
