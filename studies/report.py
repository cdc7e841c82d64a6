"""``python -m studies.report`` renders ``docs/results.md`` and its plots from the recorded lines."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from studies.definitions import load_studies
from studies.intervals import Difference, paired_difference
from studies.plots import plot_study
from studies.records import read_lines
from studies.study import RESULTS, ROOT, Comparison, Study
from studies.verdicts import UNKNOWN, Outcome

HEAD = """# Results

This page tests the claims of the article (Khodak et al., "Initialization and Regularization of Factorized Neural
Layers", ICLR 2021) at a small scale, on tasks and runs of this project, and says how certain each result is. `make
results` renders it from `studies/results`, which has one line per run. `studies/definitions` defines the studies, and
`make studies` runs the missing runs of a study. All arms of a study have the same data in the same order and the same
budget. Except for what is compared, they also have the same hyperparameters.

Differences are paired: each is between runs with the same seed. The brackets contain the 95% interval of the mean, by
Student's t and not corrected for the number of comparisons. A fixed rule gives the verdict:

1. The arms are *as good* as each other if the whole interval is closer to 0 than the smallest difference that counts.
2. Otherwise, an arm is *better* or *worse* if the interval does not include 0.
3. Otherwise, the result is *undecided at this scale*.

The detectable difference is the one that such a test finds with a probability of 80%. If the best of several arms is
compared, it is chosen on tuning seeds, which are not reported. `--chosen` runs the reported seeds for this arm only;
the tables leave out arms without reported seeds.

Groups named `range-0.05` or `muon` start from an `initializer_range` of 0.05, like the quickstart. All other language
models that are recorded here start from BERT's 0.02, which is small for their hidden size of 128: a larger one lowers
their loss ([low_rank](#low_rank)) and most of the difference between the decays ([decay](#decay)), but neither that
between optimizers ([optimizers](#optimizers)) nor what a warm start loses ([warm_start](#warm_start)).
"""
DASH = "–"
CLAIM_HEADER = ["verdict", "difference", "mean [95% interval]", "seeds", "detectable difference"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    if not values:
        return DASH
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def interval(difference: Difference | None, digits: int) -> str:
    if difference is None:
        return DASH
    mean, low, high = (f"{value:+.{digits}f}" for value in (difference.mean, difference.low, difference.high))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def detectable(difference: Difference | None, digits: int) -> str:
    return DASH if difference is None else f"{difference.detectable:.{digits}f}"


def claims_table(outcomes: Sequence[Outcome]) -> str:
    """The verdicts on the article's claims, and below them the claims without recorded runs."""
    rows, waiting = [], []
    for outcome in outcomes:
        for comparison in (comparison for comparison in outcome.study.comparisons if comparison.article):
            if not outcome.groups_of(comparison):
                waiting.append(f"- {comparison.claim} ([{outcome.name}](#{outcome.name}))")
                continue
            for index, group in enumerate(outcome.groups_of(comparison)):
                claim = "" if index else comparison.claim
                study = f"[{outcome.name}](#{outcome.name}), {group}"
                rows.append([claim, study, *claim_cells(outcome, group, comparison)])
    parts = [table(["claim of the article", "study", *CLAIM_HEADER], rows)] if rows else []
    if waiting:
        parts += ["Not run yet:", "\n".join(waiting)]
    return "\n\n".join(parts)


def comparisons_table(outcome: Outcome) -> str:
    rows = [
        ["" if index else comparison.claim, group, *claim_cells(outcome, group, comparison)]
        for comparison in outcome.study.comparisons
        for index, group in enumerate(outcome.groups_of(comparison))
    ]
    return table(["claim", "", *CLAIM_HEADER], rows)


def claim_cells(outcome: Outcome, group: str, comparison: Comparison) -> list[str]:
    """Below ``CLAIM_HEADER``."""
    arm, reference, difference = outcome.compare(group, comparison)
    digits = outcome.study.digits
    if arm is not None and arm == reference:
        said = outcome.claim(comparison, difference)
        return [f"**{said}, on the tuning seeds only**", f"both are {arm}", DASH, DASH, DASH]
    return [
        f"**{outcome.claim(comparison, difference)}**",
        f"{arm} − {reference}" if arm and reference else DASH,
        interval(difference, digits),
        DASH if difference is None else str(difference.count),
        detectable(difference, digits),
    ]


def answer(outcome: Outcome) -> str:
    """One sentence, from the first comparison of the study."""
    parts, comparison = [], outcome.study.comparisons[0]
    for group in outcome.groups_of(comparison):
        arm, reference, difference = outcome.compare(group, comparison)
        said = outcome.rule(difference)
        if arm is not None and arm == reference:
            parts.append(f"{group}: {arm} is the best on the tuning seeds")
            continue
        if difference is None:
            parts.append(f"{group}: {said}")
            continue
        found = f"a difference of {interval(difference, outcome.study.digits)} on {difference.count} seeds"
        if said == UNKNOWN:
            verdict = f"whether {arm} is better than {reference} is {said}"
            found += f", detectable difference {detectable(difference, outcome.study.digits)}"
        elif said == "same":
            verdict = f"{arm} is as good as {reference} within ± {outcome.study.effect:g}"
        else:
            verdict = f"{arm} is {said} than {reference}"
        parts.append(f"{group}: {verdict} ({found})")
    return ("; ".join(parts) or "not run yet") + "."


def arms_table(outcome: Outcome, group: str) -> str:
    study = outcome.study
    measures = [
        (f"{title} {part}".strip(), path) for title, parts in study.measures.items() for part, path in parts.items()
    ]
    reference = outcome.values(f"{group}/{study.reference}")
    rows = []
    for name in study.arms[group]:
        values, diverged = outcome.values(f"{group}/{name}"), outcome.count_diverged(f"{group}/{name}")
        if not values and not diverged:
            continue
        difference = paired_difference(values, reference) if name != study.reference else None
        found = [spread(list(values.values()), study.digits)] * bool(values)
        found += [f"{diverged} diverged" if values else "diverged"] * bool(diverged)
        row = [name, ", ".join(found), str(len(values) + diverged)]
        row += [interval(difference, study.digits), detectable(difference, study.digits)]
        for _, path in measures:
            measured = outcome.values(f"{group}/{name}", path)
            row.append(f"{fmean(measured.values()):.3g}" if measured else DASH)
        rows.append(row)
    header = [group, study.label, "seeds", f"minus {study.reference} [95% interval]", "detectable difference"]
    return table([*header, *(title for title, _ in measures)], rows)


def valleys_table(outcome: Outcome) -> str:
    """Along the axis: the value chosen on the tuning seeds, and the values that are as good as the best."""
    study, rows = outcome.study, []
    axis = str(study.axis)
    for group in study.arms:
        for curve, places in study.curves(group).items():
            means = {
                place: fmean(v.values()) for place, arm in places if (v := outcome.values(arm)) and place is not None
            }
            if not means:
                continue
            lowest = outcome.pick(means.values())
            within = [f"{place:g}" for place in sorted(means) if abs(means[place] - lowest) < study.effect]
            best = outcome.best([arm for _, arm in places])
            chosen = DASH if best is None else f"{study.flags(best)[axis]:g}"
            loss = DASH if best is None else spread(list(outcome.values(best).values()), study.digits)
            rows.append([group, curve, chosen, loss, f"{lowest:.{study.digits}f}", ", ".join(within)])
    seeds = ", ".join(map(str, study.tuning_seeds))
    header = ["", "arms", f"{axis} chosen on seeds {seeds}", f"its {study.label}", "best mean",
              f"{axis} within {study.effect} of the best mean"]  # fmt: skip
    return table(header, rows)


def origins(outcome: Outcome) -> str:
    """Command, seeds, machine, hours and versions of the recorded runs."""
    lines = [line for line in outcome.lines if "copy_of" not in line]
    reported = sorted({line["seed"] for line in lines} - {*outcome.study.tuning_seeds})
    tuning = sorted({line["seed"] for line in lines} & {*outcome.study.tuning_seeds})
    machines = sorted({f"{line['machine']['cpu']}, {line['machine']['threads']} thread per run" for line in lines})
    versions = sorted(
        {f"torch {line['versions']['torch']}, transformers {line['versions']['transformers']}" for line in lines}
    )
    revisions = sorted({f"`{str(line['revision'])[:9]}`" for line in lines})
    hours = sum(line["seconds"] for line in lines) / 3600
    seeds = f"Seeds {', '.join(map(str, reported))}"
    if tuning:
        seeds += f"; tuning seeds {', '.join(map(str, tuning))}"
    of = f"{'; '.join(machines)}; {'; '.join(versions)}; revision {', '.join(revisions)}"
    return f"{seeds}. {len(lines)} runs, {hours:.1f} hours. {of}."


def section(outcome: Outcome, docs: Path) -> str:
    study = outcome.study
    parts = [f"## {outcome.name}", study.question]
    if study.costs:
        from studies.costs import COST_HEADER, cost_rows  # imports torch, which nothing else here needs

        parts.append(table(COST_HEADER, cost_rows(study.costs)))
    if not outcome.reported_lines:
        tuned = f" {len(outcome.lines)} tuning runs are recorded." if outcome.lines else ""
        return "\n\n".join([*parts, f"Not run yet.{tuned}", command(outcome)]) + "\n"
    picture = Path("results") / f"{outcome.name}.png"
    plot_study(outcome, docs / picture)
    waiting = [group for group in study.arms if group not in outcome.groups]
    left = f" Not run yet: {', '.join(waiting)}." if waiting else ""
    parts += [
        f"**Answer.** {answer(outcome)}{left}",
        f"Smallest difference that counts: {study.effect:g} in {study.label}.",
    ]
    parts += [f"![{outcome.name}]({picture.as_posix()})", comparisons_table(outcome)]
    parts += [arms_table(outcome, group) for group in outcome.groups]
    if study.axis is not None:
        parts.append(valleys_table(outcome))
    return "\n\n".join([*parts, origins(outcome), command(outcome)]) + "\n"


def command(outcome: Outcome) -> str:
    places = "".join(f"{variable}=... " for variable in outcome.study.places.values())
    return f"```bash\n{places}make studies STUDY={outcome.name}\n```"


def render(studies: Mapping[str, Study], results: Path, docs: Path) -> Path:
    """Write ``results.md`` and ``results/*.png`` in ``docs``; returns the page."""
    shutil.rmtree(docs / "results", ignore_errors=True)
    outcomes = [Outcome(name, study, read_lines(results / f"{name}.jsonl")) for name, study in studies.items()]
    sections = [section(outcome, docs) for outcome in outcomes]
    page = docs / "results.md"
    page.write_text("\n".join([HEAD, claims_table(outcomes) + "\n", *sections]), encoding="utf-8")
    return page


if __name__ == "__main__":
    print(render(load_studies(), RESULTS, ROOT / "docs"))
