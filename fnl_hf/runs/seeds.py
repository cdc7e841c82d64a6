"""One recipe with several seeds: a run per seed, each in its own folder, and the mean of their scores."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from fnl_hf.errors import UserInputError, validate_bounds
from fnl_hf.runs.ownership import RESULTS_FILE, write_json
from fnl_hf.runs.plan import (
    DATA_FINGERPRINT,
    LENGTH,
    START_WEIGHTS,
    TEACHER_WEIGHTS,
    VALIDATION_FINGERPRINT,
    read_started,
)

SEEDS_FILE = "seeds.json"
# Entries of the evaluation that are not scores.
NO_SCORES = ("_runtime", "_per_second", "_time", "_total", "_thresh")
# What must be the same in all runs, in addition to the arguments, which are compared when a run is resumed.
IN_COMMON = (DATA_FINGERPRINT, VALIDATION_FINGERPRINT, START_WEIGHTS, TEACHER_WEIGHTS, LENGTH)


def seed_folder(output_dir: str | Path, seed: int) -> Path:
    return Path(output_dir) / f"seed-{seed}"


def commands_of_seeds(argv: Sequence[str], args) -> list[list[str]]:
    """The command line of each run of ``args.seeds``.

    Raises:
        UserInputError: fewer than two seeds, one given twice, flags that make no sense for several runs, or a
            ``seeds.json`` that is no run's.
    """
    if len(args.seeds) < 2 or len(set(args.seeds)) < len(args.seeds):
        raise UserInputError(f"--seeds ({' '.join(map(str, args.seeds))}) must be two or more different seeds")
    for seed in args.seeds:
        validate_bounds("seeds", seed, 0, 2**32)
    if not (args.do_train and args.do_eval):
        raise UserInputError("--seeds compares the scores of several trained models: it needs --do_train and --do_eval")
    if args.push_to_hub:
        raise UserInputError(
            "--push_to_hub cannot be used with --seeds, which trains several models: push one of their folders "
            "afterwards"
        )
    if args.resume_from_checkpoint not in (None, "auto"):
        raise UserInputError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} is the checkpoint of one run: use 'auto' with "
            "--seeds"
        )
    _validate_summary(Path(args.output_dir, SEEDS_FILE))
    folders = [str(seed_folder(args.output_dir, seed)) for seed in args.seeds]
    return [[*argv, "--seed", str(seed), "--output_dir", folder] for seed, folder in zip(args.seeds, folders)]


def _validate_summary(file: Path) -> None:
    """Raise UserInputError if a file has the summary's name but is not a summary."""
    if not os.path.lexists(file):
        return
    try:
        is_summary = json.loads(file.read_text(encoding="utf-8")).keys() == {"seeds", "scores"}
    except (OSError, ValueError, AttributeError):
        is_summary = False
    if not is_summary:
        raise UserInputError(f"--output_dir {file.parent}: {file.name} in it was not written by --seeds: move it away")


def summarize_seeds(output_dir: str | Path, seeds: Sequence[int]) -> str:
    """Write mean and sample standard deviation of the runs' scores to ``seeds.json``; returns them as a table.

    Raises:
        UserInputError: a finished run is of other data, weights or length than the others.
    """
    started = {seed: read_started(seed_folder(output_dir, seed)) for seed in seeds}
    for name in IN_COMMON:
        found = {seed: started[seed].get(name) for seed in seeds}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{value} in {seed_folder(output_dir, seed)}" for seed, value in found.items())
            raise UserInputError(f"the runs of --seeds are not comparable: {name} is {listed}")
    results = [json.loads((seed_folder(output_dir, seed) / RESULTS_FILE).read_text("utf-8")) for seed in seeds]
    names = [name for name in results[0] if name.startswith("eval_") and not name.endswith(NO_SCORES)]
    summary = {}
    for name in names:
        values = [result[name] for result in results]
        summary[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}
    write_json(Path(output_dir, SEEDS_FILE), {"seeds": list(seeds), "scores": summary})
    width = max(map(len, names), default=0)
    lines = [f"mean ± standard deviation of {len(seeds)} seeds ({', '.join(map(str, seeds))})"]
    for name, score in summary.items():
        listed = ", ".join(f"{value:.2f}" for value in score["values"])
        lines.append(f"{name:<{width}}  {score['mean']:.2f} ± {score['std']:.2f}  ({listed})")
    return "\n".join(lines)
