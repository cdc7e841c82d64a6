"""Figures in README and docs: each table names the script that prints it, and recorded figures are as recorded."""

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

RENDERED = {"docs/results.md", "docs/gpu.md"}  # written by scripts that have tests of their own
PAGES = sorted(
    {"examples/image_classification/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))}
    - RENDERED
)
# Sections whose numbers are not measured: versions, numbers of articles, hyperparameters, counts of parameters, sizes.
NOT_MEASURED = {
    "# Versions", "## Sources of each part", "## Methods", "## Attention is 2H factorized layers",
    "## What there is on the Hub",
}  # fmt: skip
SCRIPT = re.compile(r"(?:benchmarks/\w+\.py|python -m [\w.]+|run_\w+\.py|examples/\w+/\w+\.py|make \w+)")
FIGURE = re.compile(r"\d+\.\d+|\d{1,3}(?:,\d{3})+")


def sections_of(page):
    return re.split(r"(?m)^(?=##? )", (ROOT / page).read_text(encoding="utf-8"))[1:]


def slug(heading):
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_figures_name_their_script(page):
    without = []
    for section in sections_of(page):
        heading = section.splitlines()[0]
        tables = re.findall(r"(?m)(?:^\|.*\n)+", section)
        if heading not in NOT_MEASURED and any(FIGURE.search(table) for table in tables) and not SCRIPT.search(section):
            without.append(heading)
    assert without == []


def test_figures_of_the_readme_are_those_of_the_sections_they_link_to():
    """A range or a change is several figures; the linked section has each, in a table or a sentence."""
    rows = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    links = [link for row in rows for link in re.findall(r"\[([^\]]*\d[^\]]*)\]\(([\w/.]+)#([\w-]+)\)", row)]
    assert len(links) >= 6
    missing, cells = [], 0
    for text, page, anchor in links:
        (section,) = [each for each in sections_of(page) if slug(each.splitlines()[0]) == anchor]
        for figure in re.findall(r"\d+\.\d+|\d{2,}", text):
            cells += 1
            if not re.search(rf"(?<![\d.])(?<!\d,){re.escape(figure)}(?!\d|[.,]\d)", section):
                missing.append((figure, page, anchor))
    assert cells >= 15 and missing == []
    assert [row for row in rows if FIGURE.search(re.sub(r"\[[^\]]*\]\([^)]*\)", "", row))] == []


def test_the_compression_table_is_what_was_recorded():
    lines = (ROOT / "benchmarks" / "results" / "compression.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    original = next(line for line in recorded if line["encoder"] == "original")["milliseconds"]
    page = (ROOT / "docs" / "factorization.md").read_text(encoding="utf-8")
    for line in recorded:
        millions = "–" if line["parameters"] is None else f"{line['parameters'] / 1e6:.2f}"
        cells = [line["encoder"], millions, *(f"{line[name]:.3f}" for name in ("cosine", "mrr", "first"))]
        times = line["milliseconds"]
        if times[0] is None:
            cells += ["–"] * 3
        else:
            cells += [f"{times[0]:.1f}", f"{times[1]:.0f}", f"{original[1] / times[1]:.2f}"]
        assert f"| {' | '.join(cells)} |" in page, cells


def test_the_serving_table_is_what_was_recorded():
    lines = (ROOT / "benchmarks" / "results" / "serving.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    slowest = max(line["milliseconds"][1] for line in recorded)
    page = (ROOT / "docs" / "compress_and_serve.md").read_text(encoding="utf-8")
    assert [line["encoder"] for line in recorded if line["milliseconds"][1] == slowest] == ["original"]
    for line in recorded:
        one, many = line["milliseconds"]
        made = "" if line["seconds"] is None else f"{line['seconds'] / 60:.1f}"
        parameters = "" if line["parameters"] is None else f"{line['parameters'] / 1e6:.2f}"
        cells = [line["encoder"], parameters, made, f"{line['bytes'] / 1e6:.1f}", f"{one:.0f}"]
        cells += [f"{many:.0f}", f"{slowest / many:.2f}", f"{line['mrr']:.3f}"]
        assert f"| {' | '.join(cells)} |" in page, cells


@pytest.mark.parametrize(
    "command",
    [
        "squad_after_compression.py --arms --model none --train_file none --validation_file none --text_file none",
        "classifier_after_compression.py --seeds",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_benchmarks_table_is_what_was_recorded(command):
    script, *flags = command.split()
    printed = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *flags], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert len(printed.splitlines()) > 5 and printed in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_the_picture_of_a_head_can_be_drawn_again(tmp_path):
    command = [sys.executable, "docs/head_diagram.py", str(tmp_path / "head.svg")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    drawn, kept = (path.read_text() for path in (tmp_path / "head.svg", ROOT / "docs" / "_static" / "head.svg"))
    labels = [re.findall(r"<!-- (.*?) -->", text) for text in (drawn, kept)]
    assert labels[0] == labels[1] and len(labels[0]) > 10
