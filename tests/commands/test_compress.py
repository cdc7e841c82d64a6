"""``fnl-hf factorize`` and ``fnl-hf merge``: checkpoints of any architecture, with tokenizer and card."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    T5Config,
    T5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from fnl_hf import FnlBertConfig, FnlBertForMaskedLM
from fnl_hf.commands import cli, compress
from fnl_hf.commands.calibration import CalibrationText
from fnl_hf.publishing.cards import PIPELINE_TAGS
from tests.conftest import DIMENSIONS, ROOT, WITHOUT_FNL_HF
from tests.surgery.test_surgery import IDS, IMAGES, bert, factorized_names, gpt2, vit


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path / "bert"


def change_config(folder, **entries):
    """An entry that is None is left out."""
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


def tear(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_there_and_back(checkpoint, tmp_path, capsys):
    small, dense = tmp_path / "small", tmp_path / "dense"
    options = ["--target_ratio", "0.5", "--include", "Linear", "query", "--exclude", "layer.1.*"]
    cli.main(["factorize", str(checkpoint), str(small), *options])
    printed = capsys.readouterr().out
    assert "layer.0.attention.self.query" in printed and "layer.1" not in printed
    model = BertForMaskedLM.from_pretrained(small).eval()
    assert len(factorized_names(model)) == 3 and f"{model.num_parameters():,} parameters instead of" in printed
    card = (small / "README.md").read_text(encoding="utf-8")
    assert "import fnl_hf  # factorized layers\nfrom transformers import AutoModelForMaskedLM, AutoTokenizer\n" in card
    assert "license: mit" in card and "bibtex" in card
    assert "bert, with factorized layers" in card and "layer.0.attention.self.query" in card
    AutoTokenizer.from_pretrained(small)

    cli.main(["merge", str(small), str(dense)])
    assert "import fnl_hf" not in (dense / "README.md").read_text(encoding="utf-8")
    code = f"""{WITHOUT_FNL_HF}
import torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained({str(dense)!r}).eval()
torch.save(model(torch.load(sys.argv[1])).logits, sys.argv[2])
"""
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", code, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(IDS).logits, rtol=0, atol=1e-5)


def test_image_models(tmp_path, capsys):
    vit().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    cli.main(["factorize", str(tmp_path / "vit"), str(tmp_path / "new"), "--energy", "0.5"])
    assert (tmp_path / "new" / "preprocessor_config.json").exists()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "new").eval()
    assert model(IMAGES).logits.shape == (3, 3) and len(factorized_names(model)) == 13
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "from transformers import AutoModelForImageClassification, AutoProcessor\n" in card
    assert "pipeline_tag: image-classification" in card and "attention" not in card.split("## Method")[1]


@pytest.fixture
def fitting(checkpoint, tokenizer):
    """The checkpoint with a table for all of its tokenizer's ids."""
    model = bert()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(checkpoint)
    return checkpoint


def test_calibration(fitting, tmp_path, capsys):
    """70% of the whole model, by a text: other factors, attention's among them, sizes before and after."""
    text, table = tmp_path / "text.txt", tmp_path / "table.jsonl"
    lines = [f"the {word} of a list keeps {word} and {word}s" for word in "abcdefgh" * 9]
    text.write_text("\n\n".join(lines))
    table.write_text("".join(json.dumps({"title": "the list", "abstract": line}) + "\n" for line in lines))
    options = ["--model_ratio", "0.7", "--calibration_samples", "70", "--max_seq_length"]
    cli.main(["factorize", str(fitting), str(tmp_path / "new"), "--calibration_file", str(text), *options, "11"])
    printed, progress = capsys.readouterr()
    assert all(f"{phase}: 100%" in progress for phase in ("Calibrating", "Truncating", "Factorizing"))
    before, after = (
        BertForMaskedLM.from_pretrained(fitting).num_parameters(),
        BertForMaskedLM.from_pretrained(tmp_path / "new").num_parameters(),
    )
    assert 0.65 * before < after <= 0.7 * before and "attention.self.value" in printed
    assert (
        f"{after:,} parameters instead of {before:,}; " in printed
        and " GFLOP for the first calibration batch" in printed
    )
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "calibrated on at most 70 documents of text.txt, up to 11 tokens each" in card
    factors = BertForMaskedLM.from_pretrained(tmp_path / "new").state_dict()

    def differs(folder, *flags):
        cli.main(["factorize", str(fitting), str(tmp_path / folder), "--calibration_file", *flags])
        others = BertForMaskedLM.from_pretrained(tmp_path / folder).state_dict()
        return any(name not in others or not torch.equal(others[name], value) for name, value in factors.items())

    assert differs("short", str(text), *options, "5")
    for column, same in (("title", False), ("abstract", True)):
        assert differs(column, str(table), "--text_column_name", column, *options, "11") != same
    with pytest.raises(SystemExit):
        differs("none", str(table), *options, "11")
    assert "no column 'text', only ['title', 'abstract']: set --text_column_name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, words, message",
    [
        ("factorize", ["--model_ratio", "0.01"], "model_ratio (0.01) must be at least 0."),
        ("factorize", ["--calibration_file", "no.txt"], "no.txt"),
        ("factorize", ["--calibration_file", "no.txt", "--calibration_samples", "0"], "--calibration_samples (0) must"),
        ("factorize", ["--energy", "2"], "--energy (2.0) must be above 0 and at most 1"),
        ("factorize", ["--include", "layer.9.*"], "'layer.9.*' matches no layer that can be factorized"),
        ("merge", [], "has no factorized layers"),
    ],
)
def test_bad_input_leaves_nothing(fitting, tmp_path, capsys, command, words, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(fitting), str(tmp_path / "new"), *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "new").exists()


def deberta(**sizes):
    return DebertaV2ForMaskedLM(
        DebertaV2Config(**DIMENSIONS | sizes, relative_attention=True, pos_att_type=["p2c", "c2p"])
    )


def t5_encoder(vocab_size):
    sizes = {"d_model": 42, "d_kv": 6, "d_ff": 54, "num_layers": 1, "num_heads": 7}
    return T5EncoderModel(T5Config(vocab_size=vocab_size, **sizes))


def multiple_choice(**sizes):
    return BertForMultipleChoice(BertConfig(**DIMENSIONS | sizes))


@pytest.mark.parametrize(
    "make, error",
    [
        (deberta, None),
        (t5_encoder, None),
        (multiple_choice, "BertForMultipleChoice cannot be calibrated on text: "),
    ],
)
def test_models_of_many_kinds_are_calibrated_or_refused(make, error, checkpoint, tokenizer, tmp_path, capsys):
    """Relative positions that are weights, no positions at all, inputs of three dimensions."""
    make(vocab_size=len(tokenizer)).save_pretrained(checkpoint)
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {word} of a list" for word in "abcdefgh" * 9))
    command = ["factorize", str(checkpoint), str(tmp_path / "new"), "--calibration_file", str(tmp_path / "text.txt")]
    if error is None:
        cli.main(command)
        assert " GFLOP for the first calibration batch" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit):
            cli.main(command)
        assert error in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(checkpoint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["factorize", str(checkpoint), str(checkpoint)])
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: tear(folder / "model.safetensors"), "it cannot be read: SafetensorError: "),
        (lambda folder: change_config(folder, hidden_size="forty"), "Field 'hidden_size' expected int, got str"),
        (
            lambda folder: change_config(folder, vocab_size=60),
            "weights whose shapes do not fit BertForMaskedLM with this config.json: "
            "bert.embeddings.word_embeddings.weight (53, 42) instead of (60, 42), "
            "cls.predictions.bias (53,) instead of (60,)\n",
        ),
        (
            lambda folder: change_config(folder, architectures=None),
            "BertModel does not have these weights: cls.predictions.bias, ",
        ),
        (
            lambda folder: change_config(folder, architectures=["MyBertForMaskedLM"]),
            "names the model class MyBertForMaskedLM, which Transformers does not have: load it in Python",
        ),
        (
            lambda folder: change_config(folder, architectures=None, model_type="my", auto_map={"AutoModel": "my.My"}),
            "this checkpoint comes with its own model code, which fnl-hf does not run: load it in Python",
        ),
        (lambda folder: tear(folder / "tokenizer.json"), "its tokenizer cannot be read: "),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "its tokenizer has only its 5 special tokens and no vocabulary",
        ),
    ],
)
def test_broken_checkpoints_are_refused(checkpoint, tmp_path, capsys, damage, message):
    damage(checkpoint)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["factorize", str(checkpoint), str(tmp_path / "new")])
    *_, line = capsys.readouterr().err.splitlines(keepends=True)
    assert stopped.value.code == 2 and message in line and not (tmp_path / "new").exists()


def test_weights_that_are_missing_are_named(checkpoint, tmp_path, caplog):
    change_config(checkpoint, architectures=["BertForTokenClassification"])
    cli.main(["factorize", str(checkpoint), str(tmp_path / "new")])
    message = (
        "lacks weights of BertForTokenClassification, which are initialized at random: classifier.bias, classifier"
    )
    assert message in caplog.text and (tmp_path / "new" / "model.safetensors").exists()


def test_checkpoints_that_do_not_name_their_class(tmp_path, capsys):
    """Keys that Transformers ignores are no reason to refuse one; where there is no tokenizer, none is made up."""
    bert(BertModel).save_pretrained(tmp_path / "bert")
    change_config(tmp_path / "bert", architectures=None)
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    weights["embeddings.position_ids"] = torch.arange(19)[None]
    save_file(weights, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    cli.main(["factorize", str(tmp_path / "bert"), str(tmp_path / "new"), "--energy", "0.5"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("BertModel: ")
    assert "AutoModel.from_pretrained" in (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "new").glob("*token*"))


def test_fnl_berts_need_no_code_of_the_checkpoint(tmp_path):
    FnlBertForMaskedLM(FnlBertConfig(**DIMENSIONS)).save_pretrained(tmp_path / "fnl")
    assert "auto_map" in json.loads((tmp_path / "fnl" / "config.json").read_text())
    cli.main(["factorize", str(tmp_path / "fnl"), str(tmp_path / "new"), "--energy", "0.5"])
    assert factorized_names(FnlBertForMaskedLM.from_pretrained(tmp_path / "new"))


def test_processors_come_along(tmp_path):
    source, new = tmp_path / "speech", tmp_path / "new"
    sizes = {"vocab_size": 7, "hidden_size": 28, "num_hidden_layers": 1, "num_attention_heads": 7}
    convolutions = {"conv_dim": (12,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 3}
    small = {"intermediate_size": 44, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **convolutions, **small)).save_pretrained(source)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))).save_pretrained(source)
    assert not (source / "preprocessor_config.json").exists()

    cli.main(["factorize", str(source), str(new), "--energy", "0.5"])
    processor = AutoProcessor.from_pretrained(new)
    assert processor.feature_extractor.sampling_rate == 8000 and processor.tokenizer.get_vocab() == vocabulary
    card = (new / "README.md").read_text(encoding="utf-8")
    assert "from transformers import AutoModelForCTC, AutoProcessor\n" in card
    assert "pipeline_tag: automatic-speech-recognition" in card


@pytest.mark.parametrize("on_hub", [False, True])
def test_sentence_transformers_stay_usable(checkpoint, tmp_path, monkeypatch, on_hub):
    names = ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json")
    names += tuple(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "xlm-roberta"))
    (checkpoint / "1_Pooling").mkdir()
    for name in names:
        (checkpoint / name).write_text(json.dumps({"of": name}))
    if on_hub:  # as it lies in the cache
        repository = tmp_path / "cache" / "models--ada--bert"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("5" * 40)
        shutil.copytree(checkpoint, repository / "snapshots" / ("5" * 40))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cli.main(["factorize", "ada/bert" if on_hub else str(checkpoint), str(tmp_path / "new"), "--energy", "0.5"])
    assert [json.loads((tmp_path / "new" / name).read_text())["of"] for name in names] == list(names)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new")) == len(AutoTokenizer.from_pretrained(checkpoint))
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card
    assert "import fnl_hf\nfrom sentence_transformers import SentenceTransformer\n" in card


def test_a_pooling_that_is_missing_is_told(checkpoint, tmp_path, caplog):
    types = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in types.items()]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    cli.main(["factorize", str(checkpoint), str(tmp_path / "new"), "--energy", "0.5"])
    (said,) = [record.message for record in caplog.records if "sentence-transformers" in record.message]
    assert said.endswith("modules.json lists 1_Pooling, which has no config.json: sentence-transformers needs it")


def test_slips_are_told_as_what_they_are(checkpoint, tmp_path, caplog, capsys):
    with pytest.raises(SystemExit):
        cli.main(["factorize", str(tmp_path / "none" / "such"), str(tmp_path / "new"), "--energy", "0.5"])
    assert capsys.readouterr().err == f"fnl-hf: error: {tmp_path / 'none' / 'such'}: no such folder\n"
    (tmp_path / "text.jsonl").write_text('{"text": "some text"}\ntorn\n')
    text = CalibrationText(files=(str(tmp_path / "text.jsonl"),))
    assert len(list(text.batches(AutoTokenizer.from_pretrained(checkpoint)))) == 1
    (said,) = [record.message for record in caplog.records if "broken" in record.message]
    assert "1 of 2 lines are broken and were left out: 1 not JSON" in said and "--strict" not in said


def test_nothing_is_left_of_a_save_that_fails(checkpoint, tmp_path, monkeypatch, capsys):
    def full(folder, **_):
        assert (folder / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compress, "write_card", full)
    (tmp_path / "mine").mkdir()
    for name, left in (("new", False), ("mine", True)):  # a folder that was there is not removed
        with pytest.raises(SystemExit) as stopped:
            cli.main(["factorize", str(checkpoint), str(tmp_path / name), "--energy", "0.5"])
        assert stopped.value.code == 2 and "No space left on device" in capsys.readouterr().err
        assert (tmp_path / name).exists() == left


def test_cards_name_the_task_of_language_models(tmp_path):
    """Transformers lists GPT-2's class for pretraining, too."""
    assert all(hasattr(transformers, auto_class) for auto_class in PIPELINE_TAGS)
    gpt2().save_pretrained(tmp_path / "gpt2")
    cli.main(["factorize", str(tmp_path / "gpt2"), str(tmp_path / "new"), "--energy", "0.5"])
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in card and "AutoModelForCausalLM.from_pretrained" in card
