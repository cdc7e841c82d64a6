"""Imports go one way: a folder imports from those before it in the order below, and from none after it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up. A file of ``fnl_hf`` itself stands for its own name; ``__init__`` gathers the public names.
ORDER = ("errors", "version", "bert", "products", "layers", "optim", "surgery", "data", "runs", "reports", "publishing",
         "training", "squad", "commands", "__main__")  # fmt: skip
# What ``import fnl_hf`` imports: no data, no training.
MODELS_AND_OPTIMIZERS = ORDER[: ORDER.index("data")]
PACKAGE = ROOT / "fnl_hf"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, module) of each import of ``fnl_hf`` in a file, those within functions too; of those that are for type
    checkers alone none."""
    parents = path.relative_to(ROOT).parent.parts
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "fnl_hf"]


def room(name: str) -> str:
    """The folder, or the file of ``fnl_hf`` itself, that "fnl_hf.x.y" is in."""
    return name.split(".")[1]


def test_each_folder_of_the_package_has_its_place_in_the_order():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_imports_from_a_folder_above_its_own(path):
    parts = path.relative_to(PACKAGE).parts
    own = parts[0].removesuffix(".py")
    allowed = MODELS_AND_OPTIMIZERS if own == "__init__" else ORDER[: ORDER.index(own) + 1]
    upwards = [f"line {line}: {name}" for line, name in imported(path) if room(name) not in allowed]
    assert not upwards


def test_models_and_optimizers_need_no_libraries_for_data():
    program = """
import sys
sys.modules["datasets"] = sys.modules["evaluate"] = None
import fnl_hf
model = fnl_hf.FnlBertModel(fnl_hf.FnlBertConfig(num_hidden_layers=1))
fnl_hf.FrobeniusAdamW(fnl_hf.frobenius_param_groups(model, 0.1))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
