"""``python -m studies NAME``: run the missing runs of a study."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from studies.definitions import load_studies
from studies.records import read_lines
from studies.runner import Runner, done_of
from studies.study import RESULTS, WORK, Run, Study, identity, runs_of
from studies.verdicts import Outcome


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"studies: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m studies",
        description="Run the missing runs of a study. It can be stopped and started again at any time.",
    )
    parser.add_argument("name", nargs="?", help="name of the study")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="seeds to run; default: all of the study, including tuning seeds"
    )
    parser.add_argument(
        "--arms", default="*", metavar="PATTERN", help="arms to run, for example 'E128/weight-*'; default: all"
    )
    parser.add_argument(
        "--chosen",
        action="store_true",
        help="run only the arms that are compared: of several candidates, the best on the tuning seeds",
    )
    parser.add_argument(
        "--workers", type=int, help="parallel runs, with one thread each; default: 2, or 1 on a single core"
    )
    parser.add_argument(
        "--minutes", type=float, help="stop after this many minutes; unfinished runs continue the next time"
    )
    parser.add_argument("--list", action="store_true", help="show which runs are done and which are missing, and exit")
    return parser


def checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None, studies: Mapping[str, Study]):
    """The arguments, or exit status 2 with one line."""
    args = parser.parse_args(argv)
    args.workers = min(2, os.cpu_count() or 1) if args.workers is None else args.workers
    if args.name is None and not args.list:
        parser.error(f"give the name of a study ({', '.join(studies)}) or --list")
    if args.name is not None and args.name not in studies:
        parser.error(f"unknown study {args.name!r}: choose from {', '.join(studies)}")
    if args.workers < 1:
        parser.error(f"--workers ({args.workers}) must be at least 1")
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes ({args.minutes}) must be above 0")
    if args.seeds and (min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds)):
        parser.error(f"--seeds ({' '.join(map(str, args.seeds))}) must be different seeds of at least 0")
    lacking = [] if args.name is None or args.list else studies[args.name].lacking_places()
    if lacking:
        parser.error(
            f"{args.name} needs the environment variables {', '.join(lacking)}: set them to the paths of its files"
        )
    if args.name is not None and not studies[args.name].names(args.arms):
        parser.error(f"--arms {args.arms} matches no arm of {args.name}: {', '.join(studies[args.name].names())}")
    return args


def outlook(runs: Sequence[Run], results: Path, workers: int) -> str:
    """How many runs are done and missing, and how long the missing ones take, estimated from the others."""
    lines = read_lines(results)
    done = {identity(line) for line in lines}
    left = sum(run.identity not in done for run in runs)
    text = f"{len(runs) - left} of {len(runs)} runs recorded, {left} missing"
    if not (lines and left):
        return text
    seconds = fmean(line["seconds"] for line in lines)
    return (
        f"{text}, about {left * seconds / workers / 3600:.1f} h at {seconds:.0f} s per run with {workers} in parallel"
    )


def list_arms(runs: Sequence[Run], results: Path) -> None:
    done = done_of(results)
    for arm in dict.fromkeys(run.arm for run in runs):
        seeds = {run.seed: run.identity in done for run in runs if run.arm == arm}
        parts = [" ".join(str(seed) for seed in seeds if seeds[seed] == is_done) or "-" for is_done in (True, False)]
        print(f"  {arm:<24} done {parts[0]}; missing {parts[1]}")


def main(
    argv: Sequence[str] | None = None,
    studies: Mapping[str, Study] | None = None,
    results: Path = RESULTS,
    work: Path = WORK,
) -> int:
    """The command. ``studies``: those of ``definitions/`` unless given."""
    studies = load_studies() if studies is None else studies
    args = checked(build_parser(), argv, studies)
    for name in [args.name] if args.name else studies:
        study, file = studies[name], results / f"{name}.jsonl"
        runs = runs_of(name, study, args.seeds, args.arms)
        if args.chosen:
            chosen = Outcome(name, study, read_lines(file)).compared_arms()
            runs = [run for run in runs if run.arm in chosen]
        print(f"{name}: {study.question}\n  {outlook(runs, file, args.workers)}", file=sys.stderr, flush=True)
        if not args.list:
            return Runner(study, runs, file, work, args.workers, args.minutes).run()
        if args.name:
            list_arms(runs, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
