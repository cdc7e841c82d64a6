"""Exported models compute what the model does, for any batch size and length."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

import fnl_hf
from fnl_hf.commands import cli
from fnl_hf.commands.export import export_onnx, export_program
from tests.conftest import DIMENSIONS, ROOT


@pytest.fixture(params=["fnl_bert", "bert"])
def model(request):
    """For question answering, weights large enough that attention counts; E halved, and the same as a stock BERT."""
    torch.manual_seed(0)
    ours = fnl_hf.FnlBertForQuestionAnswering(fnl_hf.FnlBertConfig(**DIMENSIONS, attention_embedding_size=21)).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    return ours if request.param == "fnl_bert" else ours.to_bert()


def inputs(batch, length):
    ids = torch.randint(DIMENSIONS["vocab_size"], (batch, length))
    mask = torch.ones_like(ids)
    mask[0, (length + 1) // 2 :] = 0
    return ids, mask, (torch.arange(length) > 2).long().expand(batch, -1)


def test_the_exported_program_and_the_onnx_file_give_the_same_outputs(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = export_program(model).module()
    file = tmp_path / "deep" / "model.onnx"
    assert export_onnx(model, file) < 1e-4
    session = onnxruntime.InferenceSession(str(file))
    assert [output.name for output in session.get_outputs()] == ["start_logits", "end_logits"]
    for sizes in ((2, 3), (5, 19), (1, 1)):
        given = inputs(*sizes)
        names = ("input_ids", "attention_mask", "token_type_ids")
        with torch.no_grad():
            expected = model(**dict(zip(names, given))).to_tuple()
            exported = program(*given)
        run = session.run(None, {name: value.numpy() for name, value in zip(names, given)})
        for theirs, ours, onnx in zip(expected, exported, run, strict=True):
            present = given[1].bool()
            torch.testing.assert_close(ours[present], theirs[present], atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.from_numpy(onnx)[present], theirs[present], atol=1e-4, rtol=0)
    with pytest.raises(fnl_hf.UserInputError, match="model.onnx exists: choose another file name"):
        export_onnx(model, file)
    file.rename(file.with_name("other.onnx.data"))
    with pytest.raises(fnl_hf.UserInputError, match="other.onnx.data exists: choose another file name"):
        export_onnx(model, file.with_name("other.onnx"))


@pytest.mark.parametrize("mode", ["low_rank", "wide", "deep"])
def test_factorized_layers_are_exported_for_any_size(mode):
    """Which of their ways is the cheapest depends on the number of rows, which a program must not."""
    torch.manual_seed(0)
    model = fnl_hf.FnlBertForQuestionAnswering(fnl_hf.FnlBertConfig(**DIMENSIONS)).eval()
    config = fnl_hf.FactorizationConfig(mode=mode, include=["intermediate.dense", "word_embeddings"])
    program = export_program(fnl_hf.factorize(model, config)).module()
    for sizes in ((2, 3), (5, 19), (1, 1)):
        given = inputs(*sizes)
        for theirs, ours in zip(model(*given).to_tuple(), program(*given), strict=True):
            torch.testing.assert_close(ours[given[1].bool()], theirs[given[1].bool()], atol=1e-5, rtol=0)


def test_what_a_configuration_asks_for_of_single_layers_is_left_out(tmp_path):
    """And the cache of a decoder: tuples are no outputs of a program."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    asked = {"output_hidden_states": True, "output_attentions": True, "attn_implementation": "eager"}
    model = BertLMHeadModel(BertConfig(**DIMENSIONS, **asked, is_decoder=True)).eval()
    given = inputs(3, 5)
    logits = model(*given).logits
    (found,) = export_program(model).module()(*given)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
    assert export_onnx(model, tmp_path / "model.onnx") < 1e-4


def test_bfloat16_inference_is_close_to_float32(model):
    ids, mask, segments = inputs(3, 11)
    with torch.no_grad():
        expected = model(ids, mask, segments).start_logits
        found = model.bfloat16()(ids, mask, segments).start_logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float()[mask.bool()], expected[mask.bool()], atol=0.1 * expected.std(), rtol=0.1)


def test_packages_that_are_missing_are_named_as_an_index_has_them(tmp_path, monkeypatch, capsys):
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["onnx"]
    expected = f"pip install {' '.join(requirement.partition('>=')[0] for requirement in extra)}"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(fnl_hf.UserInputError, match=f"^exporting to ONNX needs onnxscript: {expected}$"):
        export_onnx(fnl_hf.FnlBertModel(fnl_hf.FnlBertConfig(**DIMENSIONS)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", "--help"])
    assert f"Needs {expected}." in " ".join(capsys.readouterr().out.split())


def test_a_file_that_differs_is_not_kept_and_the_model_stays_as_it_is(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = fnl_hf.FnlBertForQuestionAnswering(fnl_hf.FnlBertConfig(**DIMENSIONS)).bfloat16()
    model.qa_outputs.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    monkeypatch.setattr("fnl_hf.commands.export.TOLERANCE", -1.0)
    with pytest.raises(fnl_hf.UserInputError, match="ONNX and PyTorch differ by"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    export_program(model)
    assert [module.training for module in model.modules()] == modes and set(modes) == {True, False}
    after = model.state_dict()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)


def test_the_command_exports_a_checkpoint(model, tmp_path, capsys, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "there.onnx").touch()
    for name, message in (
        ("model.txt", "the file name must end in .onnx"),
        ("model", "must end in .onnx"),
        ("", "file is empty"),
        ("model/config.json/x.onnx", "config.json is not a folder"),
        ("x" * 300 + ".onnx", "File name too long"),
        ("there.onnx", "exists: choose another"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["export", "no/such/model", str(tmp_path / name) if name else ""])
        assert message in capsys.readouterr().err
    monkeypatch.setattr(
        "fnl_hf.commands.export.export_onnx", lambda model, file: Path(file).write_text(type(model).__name__)
    )
    cli.main(["export", str(tmp_path / "model"), str(tmp_path / "model.onnx")])
    assert (tmp_path / "model.onnx").read_text() == type(model).__name__


def test_an_export_inside_autocast_is_the_one_outside(model, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.autocast("cpu", torch.bfloat16):
        assert export_onnx(model, tmp_path / "model.onnx") < 1e-4


def test_what_cannot_be_exported_is_refused_before_it_is_run(tmp_path):
    config = fnl_hf.FnlBertConfig(**DIMENSIONS)
    for model, message in (
        (fnl_hf.FnlBertForMultipleChoice(config), r"reads \(B, choices, S\): export its encoder"),
        ("model", "a str is not a model of Transformers: load the model first"),
        (torch.nn.Linear(2, 3), "a Linear is not a model of Transformers"),
    ):
        for export in (export_program, lambda model: export_onnx(model, tmp_path / "model.onnx")):
            with pytest.raises(fnl_hf.UserInputError, match=message):
                export(model)
    assert not list(tmp_path.iterdir())
