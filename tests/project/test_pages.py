"""Pages that quote the project: each message, flag, version and name on them is the one that is in force."""

import ast
import re
import tomllib
from typing import Any

import yaml

from fnl_hf.training.arguments import UNSUPPORTED, FnlTrainingArguments
from fnl_hf.training.pretraining_arguments import DataArguments, ModelArguments
from tests.conftest import ROOT

VALUE = "…"  # as the page writes what differs from case to case


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def strings_of_the_code():
    """All strings of the package and its scripts, with ``VALUE`` in the places of an f-string's values."""
    for path in [*(ROOT / "fnl_hf").rglob("*.py"), *ROOT.glob("run_*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_are_those_of_the_code():
    messages = re.findall(r"^\*\*`(.+)`\*\*$", text_of("docs/troubleshooting.md"), flags=re.MULTILINE)
    strings = list(strings_of_the_code())
    shortened = [message.removesuffix(f" {VALUE}") for message in messages]
    assert len(messages) >= 25 and [each for each in shortened if not any(each in string for string in strings)] == []


def test_flags_of_run_mlm_are_here_or_not():
    page = text_of("docs/from_run_mlm.md")
    kinds: tuple[Any, ...] = (ModelArguments, DataArguments, FnlTrainingArguments)
    known = {name for kind in kinds for name in kind.__dataclass_fields__}
    rows = dict(re.findall(r"^\| `(\w+)` \| (same|absent) \|", page, flags=re.MULTILINE))
    assert len(rows) == 25 and {name for name, place in rows.items() if (place == "same") != (name in known)} == set()
    refused = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*) \| refused", page, flags=re.MULTILINE)))
    assert len(refused) == 6 and set(refused) <= set(UNSUPPORTED)


def test_versions_are_those_of_pyproject_and_constraints():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["onnx"]]
    admitted = dict(re.fullmatch(r"([\w-]+)(.*)", requirement).groups() for requirement in requirements)
    admitted |= {"Python": project["requires-python"]}
    pinned = dict(line.split("==") for line in text_of("constraints.txt").splitlines() if "==" in line)
    pinned |= {"Python": "–"}
    rows = re.findall(r"^\| ([\w-]+) \| `(.+?)` \| (\S+) \|", text_of("docs/versions.md"), flags=re.MULTILINE)
    assert len(rows) == 11 and rows == [(name, admitted[name], pinned[name]) for name, *_ in rows]


def test_the_citation_is_that_of_the_model_cards():
    (paper,) = yaml.safe_load(text_of("CITATION.cff"))["references"]
    entry = text_of("fnl_hf/publishing/card_template.md").replace(r"Nicol{\`o}", "Nicolò")
    names = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    number = paper["url"].rpartition("/")[2]
    for fact in (paper["title"], names, paper["collection-title"], str(paper["year"]), number):
        assert f"{{{fact}}}" in entry
