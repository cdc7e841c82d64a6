"""``fnl-hf convert`` of models with byte-level BPE and SentencePiece, and both scripts on what comes out."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer

import run_pretrain
import run_squad
from fnl_hf import FnlBertForQuestionAnswering, ask
from fnl_hf.commands import cli
from fnl_hf.data.tokenizer import vocabulary_size
from tests.conftest import SENTENCES, pretraining, weights
from tests.small_tokenizers import KINDS

CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
POSITIONS = 40  # that a text may have


@pytest.fixture(scope="module", params=KINDS)
def original(request, tmp_path_factory):
    """A checkpoint with its tokenizer: kind, folder, model, tokenizer."""
    folder, kind = tmp_path_factory.mktemp("original") / "model", request.param
    tokenizer = KINDS[kind](SENTENCES * 3, model_max_length=POSITIONS)
    config = getattr(transformers, f"{CLASSES[kind]}Config")(
        vocab_size=vocabulary_size(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=37, type_vocab_size=1, max_position_embeddings=POSITIONS + tokenizer.pad_token_id + 1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = getattr(transformers, f"{CLASSES[kind]}ForMaskedLM")(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return kind, folder, model, tokenizer


@pytest.fixture(scope="module")
def converted(original):
    _, folder, *_ = original
    new = folder.parent / "new"
    cli.main(["convert", str(folder), str(new)])
    return new


def test_the_folder_has_model_and_tokenizer_under_the_same_names(original, converted, capsys):
    kind, folder, model, tokenizer = original
    found, loaded = AutoTokenizer.from_pretrained(converted), AutoModelForMaskedLM.from_pretrained(converted).eval()
    tokens = {name: getattr(found, f"{name}_token") for name in ("cls", "sep", "pad", "mask", "unk", "bos", "eos")}
    assert tokens == {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>", "bos": "<s>",
                      "eos": "</s>"}  # fmt: skip
    texts = ["the quick <mask> fox", "a bird flies over größer 東京!", SENTENCES[3]]
    inputs = found(texts, padding=True, return_tensors="pt")
    assert found.get_vocab() == tokenizer.get_vocab() and "token_type_ids" not in inputs
    assert inputs["input_ids"].tolist() == tokenizer(texts, padding=True)["input_ids"]
    assert loaded.config.max_position_embeddings == POSITIONS and loaded.config.pad_token_id == found.pad_token_id == 1
    present = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits[present], model(**inputs).logits[present], atol=1e-5, rtol=0)
    card = (converted / "README.md").read_text(encoding="utf-8")
    assert f"| converted from | model, {CLASSES[kind]}ForMaskedLM |" in card
    assert f"| parameters before | {model.num_parameters():,} |" in card


def test_a_long_calibration_text_is_cut_to_the_positions_that_padding_leaves(original, tmp_path, capsys):
    _, folder, *_ = original
    text, small, bert = tmp_path / "text.txt", tmp_path / "small", tmp_path / "bert"
    text.write_text("\n".join([" ".join(SENTENCES)] * 3))
    words = ["--attention_embedding_size", "16", "--calibration_file", str(text), "--max_seq_length", "999"]
    cli.main(["convert", str(folder), str(small), *words])
    assert "bert.encoder.layer.0.attention.qk" in capsys.readouterr().out
    cli.main(["convert", str(folder), str(bert), "--to", "bert"])
    assert type(AutoModelForMaskedLM.from_pretrained(bert)).__name__ == "BertForMaskedLM"


def questions(file):
    """On contexts of the corpus's words, with an accent, spaces and a line break between them."""
    paragraphs = []
    for index, sentence in enumerate(SENTENCES[:12]):
        context = f"É  {sentence}\nand {sentence}"
        animal = sentence.split()[3]
        answer = {"text": animal, "answer_start": context.index(animal)}
        qas = [{"id": f"q{index}", "question": "what jumps over the dog", "answers": [answer]}]
        paragraphs.append({"context": context, "qas": qas})
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return {qas["id"]: paragraph["context"] for paragraph in paragraphs for qas in paragraph["qas"]}


def test_both_scripts_take_it(original, converted, corpus, tmp_path):
    kind, *_ = original
    if kind == "camembert":
        pytest.skip("pieces as XLM-R's")
    flags = {"model_name_or_path": converted, "vocab_size": None, "config_overrides": None, "whole_word_mask": "true",
             "max_seq_length": 24, "max_steps": 3, "save_strategy": "no", "save_steps": None}  # fmt: skip
    run_pretrain.run(pretraining(corpus, tmp_path / "pretrained", **flags))
    before, after = weights(converted), weights(tmp_path / "pretrained")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys() and len(moved) > 0.8 * len(before)
    assert "of the whole words |" in (tmp_path / "pretrained" / "README.md").read_text(encoding="utf-8")

    contexts = questions(tmp_path / "squad.json")
    flags = {"model_name_or_path": tmp_path / "pretrained", "output_dir": tmp_path / "squad", "use_cpu": "true",
             "train_file": tmp_path / "squad.json", "validation_file": tmp_path / "squad.json", "doc_stride": 7,
             "max_seq_length": POSITIONS, "max_steps": 3, "save_strategy": "no", "report_to": "none",
             "cache_dir": tmp_path / "cache"}  # fmt: skip
    run_squad.run([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    predictions = json.loads((tmp_path / "squad" / "eval_predictions.json").read_text(encoding="utf-8"))
    assert predictions.keys() == contexts.keys()
    assert any(predictions.values()) and all(answer in contexts[name] for name, answer in predictions.items())
    model = FnlBertForQuestionAnswering.from_pretrained(tmp_path / "squad")
    answer = ask(model, "what jumps", contexts["q0"], AutoTokenizer.from_pretrained(tmp_path / "squad"),
                 max_seq_length=POSITIONS, doc_stride=7)  # fmt: skip
    assert answer["answer"] in contexts["q0"]
