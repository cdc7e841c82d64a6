"""What of an output folder a run may overwrite."""

from types import SimpleNamespace

import pytest

from fnl_hf.runs.ownership import begin_writing, others_files, output_of, record_written

TRAINING = output_of(SimpleNamespace(do_train=True))
EVALUATION = output_of(SimpleNamespace(do_train=False, push_to_hub=False))
PUSHED = output_of(SimpleNamespace(do_train=False, push_to_hub=True))


@pytest.fixture
def folder(tmp_path):
    """Of a run that is finished."""
    for name in ("run_arguments.json", "README.md", "model.safetensors", "modeling_fnl_bert.py", "eval_results.json"):
        (tmp_path / name).write_text("the run's")
    record_written(tmp_path, TRAINING.patterns)
    return tmp_path


@pytest.mark.parametrize("anew", [True, False])
def test_what_was_edited_is_somebody_elses_also_where_the_run_goes_on(folder, anew):
    assert others_files(folder, TRAINING, anew) == []
    for name in ("README.md", "config.json"):
        (folder / name).write_text("mine")
    assert others_files(folder, TRAINING, anew) == ["README.md", "config.json"]
    begin_writing(folder)
    assert others_files(folder, TRAINING, anew) == [], "the run was about to write them"


def test_what_no_run_writes_is_in_nobodys_way(folder):
    own = ("plot.py", "tokenizer_notes.md", "merged/model.safetensors", "tokenizers/a", "human_eval_results.json",
           "my_predictions.json", "old_null_odds.json")  # fmt: skip
    for name in own:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    assert others_files(folder, TRAINING) == []
    with_merged = output_of(SimpleNamespace(do_train=True), "merged")
    assert others_files(folder, with_merged) == ["merged/model.safetensors"]
    begin_writing(folder)
    assert all((folder / name).read_text() == "mine" for name in own) and not (folder / "eval_results.json").exists()


def test_an_evaluation_writes_a_model_only_to_push_it(tmp_path):
    for name in ("README.md", "config.json", "checkpoint-2/a", "spiece.model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    assert others_files(tmp_path, EVALUATION) == []
    assert others_files(tmp_path, PUSHED) == ["README.md", "config.json", "spiece.model"]
    (tmp_path / "all_results.json").write_text("mine")
    assert others_files(tmp_path, EVALUATION) == ["all_results.json"]
