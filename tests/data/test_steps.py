"""The data's way is a line, source, documents, tokenizer, rows, masked batches: files import from those before them."""

from tests.conftest import ROOT
from tests.project.test_imports import imported

LINE = ("arrow_cache", "zstd", "readers", "source", "corpus", "tokenizer", "encoding", "packing", "pairs", "streaming",
        "rows", "masking")  # fmt: skip


def test_each_file_imports_from_those_before_it_in_the_line():
    folder = ROOT / "fnl_hf" / "data"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(LINE)
    for position, name in enumerate(LINE):
        found = [module.split(".")[2] for _, module in imported(folder / f"{name}.py") if ".data." in module]
        assert set(found) <= set(LINE[:position]), name
