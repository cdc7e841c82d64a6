"""The report, from lines made by hand: what is chosen, compared, said, drawn."""

import json

import pytest
from matplotlib import pyplot as plt

from studies.definitions import load_studies
from studies.plots import curve_colors, plot_panel
from studies.records import append_line
from studies.report import render
from studies.study import Comparison, runs_of
from studies.verdicts import Outcome
from tests.studies.fakes import fake_study

NONE = {1: 4.0, 2: 4.25, 3: 4.5}
# up-0.1 is the lowest where it counts and the highest where it is chosen; seed 11 is for the choice.
LOSSES = {"none": NONE, "up-0.1": {1: 1.0, 2: 1.5, 3: 1.5, 11: 5.0}, "up-1": {1: 3.7, 2: 4.15, 3: 4.3, 11: 4.5}}
FAILS = "not confirmed here:"
CLAIM = Comparison("Up is lower", "up-*", "none", article=True)


def study_of(folder, **changes):
    arms = {"none": {"mode": "none"}, **{f"up-{rate:g}": {"mode": "up", "rate": rate} for rate in (0.1, 1)}}
    values = {"reference": "none", "comparisons": (CLAIM,), "axis": "rate", "seeds": (1, 2, 3)}
    values["measures"] = {"rank": {"QK": "spectra/qk/rank"}}
    return fake_study(folder, **{"arms": {"A": arms}, **values, **changes})


def lines_of(study, losses=LOSSES):
    lines = []
    for name, found in losses.items():
        for seed, loss in found.items():
            line = {
                "study": "up",
                "arm": f"A/{name}",
                "seed": seed,
                "flags": study.flags(f"A/{name}"),
                "seconds": 900.0,
            }
            line |= {"diverged": True} if loss is None else {}
            line |= {"metrics": loss and {"eval_loss": loss}, "curves": {"eval_loss": [[500, 6.0], [1000, loss]]}}
            line |= {"spectra": {"qk": {"rank": 2.0 * seed}}, "revision": "0123456789ab"}
            line |= {"versions": {"torch": "2.9", "transformers": "5.2"}, "machine": {"cpu": "Z80", "threads": 1}}
            lines.append(line)
    return lines


@pytest.fixture
def page(tmp_path):
    """The rendered page of a study as in ``study_of``."""

    def make(lines=None, **changes):
        study = study_of(tmp_path, **changes)
        for line in lines_of(study) if lines is None else lines:
            append_line(tmp_path / "results" / "up.jsonl", line)
        (tmp_path / "docs").mkdir()
        return render({"up": study}, tmp_path / "results", tmp_path / "docs").read_text()

    return make


def test_the_page_says_what_the_lines_say(page, tmp_path):
    text = page()
    difference = "−0.200 [−0.448, +0.048]"  # 4.30265 · 0.1/√3 = 0.2484; 5.36331 · 0.1/√3 = 0.3097
    verdict = "undecided at this scale"
    row = f"| Up is lower | [up](#up), A | **{verdict}** | up-1 − none | {difference} | 3 | 0.310 |\n"
    assert row in text
    assert (
        f"**Answer.** A: whether up-1 is better than none is {verdict} (a difference of {difference} on 3 seeds, "
        "detectable difference 0.310).\n"
    ) in text
    assert "| none | 4.250 ± 0.250 | 3 | – | – | 4 |\n" in text
    assert f"| up-1 | 4.050 ± 0.312 | 3 | {difference} | 0.310 | 4 |\n" in text  # √(0.195/2)
    assert "| A | up | 1 | 4.050 ± 0.312 | 1.333 | 0.1 |\n" in text
    assert "Seeds 1, 2, 3; tuning seeds 11. 11 runs, 2.8 hours. Z80, 1 thread per run; torch 2.9" in text
    assert "make studies STUDY=up\n" in text
    assert (tmp_path / "docs" / "results" / "up.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "values, better, effect, said, claimed",
    [
        ((3.79, 4.05, 4.31), "lower", 0.1, "up-1 is better than none", "confirmed here"),
        ((3.79, 4.05, 4.31), "higher", 0.1, "up-1 is worse than none", f"{FAILS} worse"),
        ((4.21, 4.45, 4.69), "lower", 0.1, "up-1 is worse than none", f"{FAILS} worse"),
        # 0.2 + 4.30265 · 0.01/√3 = 0.2248
        (
            (3.79, 4.05, 4.31),
            "lower",
            0.225,
            "up-1 is as good as none within ± 0.225",
            f"{FAILS} as good",
        ),
        ((3.79, 4.05, 4.31), "lower", 0.224, "up-1 is better than none", "confirmed here"),
    ],
)
def test_the_rule(tmp_path, page, values, better, effect, said, claimed):
    chosen = {"up-0.1": {11: 5.0 if better == "lower" else 4.0}, "up-1": {11: 4.5, **dict(zip((1, 2, 3), values))}}
    lines = lines_of(study_of(tmp_path), LOSSES | chosen)
    text = page(lines, better=better, effect=effect)
    assert f"**Answer.** A: {said} (a difference of" in text and f"| **{claimed}** |" in text


def test_a_claim_of_no_difference(tmp_path):
    study = study_of(tmp_path, effect=0.225)
    losses = LOSSES | {"up-1": {1: 3.79, 2: 4.05, 3: 4.31, 11: 4.5}}
    outcome, claim = Outcome("up", study, lines_of(study, losses)), Comparison("", "up-1", "none", expected="same")
    difference = outcome.compare("A", claim)[2]
    assert outcome.claim(claim, difference) == "confirmed here"
    smaller = Outcome("up", study_of(tmp_path, effect=0.1), lines_of(study, losses))
    assert smaller.claim(claim, difference) == f"{FAILS} better"


def test_an_arm_is_not_compared_with_itself(page):
    """The choice on the tuning seeds says all there is: no interval, and no detectable difference of 0."""
    text = page(comparisons=(Comparison("One rate", "up-1", "up-*", expected="same", article=True),))
    row = "**confirmed here, on the tuning seeds only** | both are up-1 | – | – | – |"
    assert text.count(row) == 2 and "+0.000" not in text


def test_diverged_runs_are_told_and_never_chosen(tmp_path, page):
    """up-0.1 is chosen by its loss of 4.25 on seed 11 alone; on seed 12 it diverges."""
    changes = {"tuning_seeds": (11, 12)}
    losses = {
        "none": NONE | {2: None, 3: None},
        "up-0.1": {1: None, 11: 4.25, 12: None},
        "up-1": {1: 3.75, 2: 4.0, 3: 4.5, 11: 4.5, 12: 4.5},
    }
    text = page(lines_of(study_of(tmp_path, **changes), losses), **changes)
    assert "| A | up | 1 | 4.083 ± 0.382 |" in text  # √(0.2917/2)
    assert "| up-0.1 | diverged | 1 | – | – | – |\n" in text
    assert "| none | 4.000, 2 diverged | 3 | – | – | 2 |\n" in text


@pytest.mark.parametrize("has_run", [True, False])
def test_a_claim_is_reported_for_its_groups(tmp_path, page, has_run):
    arms = {"A": {"none": {"mode": "none"}, "up-1": {"mode": "up", "rate": 1}}, "B": {"none": {"mode": "down"}}}
    changes = {"arms": arms, "comparisons": (Comparison("Up is lower", "up-1", "none", article=True, groups=("A",)),)}
    lines = lines_of(study_of(tmp_path, **changes), {name: LOSSES[name] for name in arms["A"]})
    of_b = lines[0] | {"arm": "B/none", "flags": study_of(tmp_path, **changes).flags("B/none")}
    text = page([*(lines if has_run else ()), of_b], **changes)
    assert ("[up](#up), A |" in text) == has_run and "[up](#up), B |" not in text
    assert ("**Answer.** A: " in text) == has_run and "B: " not in text and "| B | held-out loss" in text
    assert ("- Up is lower ([up](#up))" in text) != has_run and ("**Answer.** not run yet." in text) != has_run


def test_nothing_is_chosen_before_its_tuning_seeds_have_run(page):
    text = page(tuning_seeds=(11, 12))
    assert "| **too few runs so far** | – | – | – | – |" in text and "**Answer.** A: too few runs so far.\n" in text


def test_lines_of_an_older_definition_do_not_count(tmp_path, page):
    old = lines_of(study_of(tmp_path, base={"steps": 7}))
    text = page([*old, *lines_of(study_of(tmp_path))])
    assert " 11 runs, " in text


def test_a_study_without_lines_is_not_run_yet(page, tmp_path):
    assert "Is it lower?\n\nNot run yet.\n" in page([])
    assert not (tmp_path / "docs" / "results").exists()


def test_tuning_runs_alone_answer_nothing(page, tmp_path):
    tuning = [line for line in lines_of(study_of(tmp_path)) if line["seed"] == 11]
    text = page(tuning)
    assert "Is it lower?\n\nNot run yet. 2 tuning runs are recorded.\n" in text
    assert "- Up is lower ([up](#up))\n" in text
    assert not (tmp_path / "docs" / "results").exists()


def test_what_is_drawn(tmp_path):
    study = study_of(tmp_path)
    _, axis = plt.subplots()
    outcome = Outcome("up", study, lines_of(study))
    plot_panel(axis, outcome, "A", {"": study.metric}, curve_colors(outcome))
    drawn = [list(line.get_ydata()) for line in axis.lines]
    assert [4.25, 4.25] in drawn  # a line across, at the mean of "none"
    assert [4.0, 4.25, 4.5] not in drawn
    assert pytest.approx([4 / 3, 4.05]) in drawn
    assert [1.0, 1.5, 1.5, 3.7, 4.15, 4.3] in drawn
    plt.close("all")


def of_parts(titles):
    return [path for parts in titles.values() for path in parts.values()]


def test_every_study_renders(tmp_path):
    """Those of the repository, on lines of no meaning."""
    studies = load_studies()
    assert "decay" in studies
    for name, study in studies.items():
        paths = dict.fromkeys([study.metric, *of_parts(study.measures)])
        paths |= {path: [[500, 6.0], [1000, 5.0]] for path in of_parts(study.courses)}
        for number, run in enumerate(runs_of(name, study)):
            line = {**vars(run), "flags": dict(run.flags), "seconds": 1.0, "revision": None}
            line |= {"versions": {"torch": "2", "transformers": "5"}, "machine": {"cpu": "Z80", "threads": 1}}
            for path, value in paths.items():
                first, *rest, last = path.split("/")
                entry = line.setdefault(first, {})
                for part in rest:
                    entry = entry.setdefault(part, {})
                entry[last] = float(number % 7) if value is None else value
            append_line(tmp_path / "results" / f"{name}.jsonl", json.loads(json.dumps(line)))
    (tmp_path / "docs").mkdir()
    text = render(studies, tmp_path / "results", tmp_path / "docs").read_text()
    assert "too few" not in text and "Not run yet" not in text
    assert {file.stem for file in (tmp_path / "docs" / "results").iterdir()} == {*studies}


def test_arms_of_decay_differ_in_what_is_compared_alone():
    study = load_studies()["decay"]
    flags = [study.flags(arm) for arm in study.names()]
    compared = {"decay_mode", "frobenius_decay", "attention_embedding_size"}
    common = [{name: value for name, value in arm.items() if name not in compared} for arm in flags]
    without_range = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    assert study.base["config_overrides"] == f"{without_range},initializer_range=0.05"
    assert common == [study.base] * 26 + [study.base | {"config_overrides": without_range}] * 13
    assert study.base["max_steps"] == 4000 and study.base["weight_decay"] == 0.1
    found = [(arm["attention_embedding_size"], arm["decay_mode"], arm.get("frobenius_decay")) for arm in flags]
    decays = [(mode, rate) for mode in ("weight", "frobenius") for rate in (0.03, 0.1, 0.3, 1, 3, 10)]
    assert found == [(size, *decay) for size in (128, 64, 128) for decay in [("none", None), *decays]]
    runs = runs_of("decay", study)
    group = "E128-range-0.05"
    assert [(run.arm, run.seed) for run in runs[12:14]] == [(f"{group}/frobenius-10", 1), (f"{group}/none", 101)]
    assert {run.arm.partition("/")[0] for run in runs[:91]} == {group}
