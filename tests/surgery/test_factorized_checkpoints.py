"""Models with factorized layers are saved, loaded, converted and trained on like every other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    EncoderDecoderModel,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainingArguments,
)

import fnl_hf
from fnl_hf import FactorizationConfig, UserInputError, factorize, load_factorized, merge, save_factorized
from fnl_hf.layers import FactorizedEmbedding
from tests.conftest import DIMENSIONS
from tests.surgery.test_surgery import (
    FULL,
    IDS,
    IMAGES,
    MODES,
    Small,
    bert,
    config_of,
    factorized_names,
    gpt2,
    quietly,
    t5,
)


def test_fnl_bert_is_factorized_beside_its_attention(tmp_path):
    config = fnl_hf.FnlBertConfig(**DIMENSIONS, attention_embedding_size=21, tie_word_embeddings=False)
    model = fnl_hf.FnlBertForMaskedLM(config).eval()
    factorize(model, FactorizationConfig(target_ratio=0.6, include=["Linear", "Embedding"], exclude=["token_type*"]))
    assert [p.kind for p in fnl_hf.find_products(model)] == ["qk", "vo"] * 2 + ["linear"] * 6
    assert isinstance(model.bert.embeddings.word_embeddings, FactorizedEmbedding)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits) and again.config.attention_embedding_size == 21


def test_factorized_layers_stay_through_conversion(tmp_path):
    """From a BERT to an FNL-BERT of a smaller E and back; attention that is factorized itself is refused."""
    model = factorize(bert(BertForSequenceClassification), FactorizationConfig(include=["Linear", "classifier"]))
    same = fnl_hf.FnlBertForSequenceClassification.from_bert(model)
    assert torch.equal(same(IDS).logits, model(IDS).logits)
    small = fnl_hf.FnlBertForSequenceClassification.from_bert(model, attention_embedding_size=21)
    assert factorized_names(small) == factorized_names(model) and len(factorized_names(small)) == 6
    small.save_pretrained(tmp_path)
    again = fnl_hf.FnlBertForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again.to_bert()(IDS).logits, small(IDS).logits, rtol=0, atol=1e-5)
    assert not hasattr(merge(again).config, "quantization_config")
    quietly(model, FactorizationConfig(rank_scale=0.5, include=["query"]))
    with pytest.raises(ValueError, match=r"layer.0.attention.self.query is a product of matrices: make it dense first"):
        fnl_hf.FnlBertModel.from_bert(model)


@pytest.mark.parametrize(
    "make, include",
    [(bert, ["decoder"]), (bert, ["word_embeddings"]), (bert, ["word_embeddings", "decoder"]), (t5, ["lm_head"])],
)
def test_tied_layers_that_are_named_have_weights_of_their_own_for_ever(make, include, tmp_path):
    """Trained, saved and loaded, with factors and merged. Then the configuration says so to every loader, except a
    T5's, in which it would untie the encoder, too."""
    model = make()
    inputs = {"input_ids": IDS, "labels": IDS}
    before = model(**inputs).logits.detach()
    quietly(model, FactorizationConfig(rank_scale=1.0, include=include))
    torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    after = model(**inputs).logits
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, after)
    merge(model).save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**inputs).logits, after, rtol=0, atol=1e-4)
    merged = type(model).from_pretrained(tmp_path)
    merge(merged).tie_weights()
    merged.resize_token_embeddings(60)
    torch.testing.assert_close(merged(**inputs).logits[..., : after.shape[-1]], after, rtol=0, atol=1e-4)
    assert again.config.tie_word_embeddings == (make is t5)
    for source in (model, merged) if make is bert else ():
        logits = source(**inputs).logits.detach()
        ours = fnl_hf.FnlBertForMaskedLM.from_bert(source)
        ours.tie_weights()
        torch.testing.assert_close(ours(**inputs).logits, logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.to_bert()(**inputs).logits, logits, rtol=0, atol=1e-4)


def test_untied_weights_of_a_roberta_survive_conversion():
    """Merged, its two tables differ although it is of a kind whose configuration ties them."""
    torch.manual_seed(0)
    model = RobertaForMaskedLM(RobertaConfig(**DIMENSIONS, pad_token_id=1)).eval()
    merge(quietly(model, FactorizationConfig(rank_scale=0.3, include=["word_embeddings"])))
    model.config.tie_word_embeddings = True  # as in a folder that an older version wrote
    ours = fnl_hf.FnlBertForMaskedLM.from_bert(model)
    for other in (ours, ours.to_bert()):
        torch.testing.assert_close(other(IDS + 2).logits, model(IDS + 2).logits, rtol=0, atol=1e-5)


def small_clip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 28, "num_hidden_layers": 1, "num_attention_heads": 7, "intermediate_size": 44}
    vision = sizes | {"image_size": 20, "patch_size": 5}
    text = sizes | {"vocab_size": 53, "bos_token_id": 1, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()


class OwnModel(nn.Module):
    """A model of Transformers with a head of one's own."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(42, 5)


def test_parts_of_models_are_saved_too(tmp_path):
    """A Transformers model in one's own, its two towers, an encoder and a decoder that were put together."""
    own = factorize(OwnModel(bert(BertModel)))
    own.encoder.save_pretrained(tmp_path / "part")
    part = AutoModel.from_pretrained(tmp_path / "part").eval()
    assert torch.equal(part(IDS).pooler_output, own.encoder(IDS).pooler_output)
    merge(OwnModel(part)).encoder.save_pretrained(tmp_path / "merged")
    again = BertModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(IDS).pooler_output, part(IDS).pooler_output) and factorized_names(again) == []

    whole = bert()
    factorize(whole.bert)
    fnl_hf.record_layers(whole)
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path / "whole")(IDS).logits, whole(IDS).logits)

    towers = factorize(small_clip())
    towers.save_pretrained(tmp_path / "towers")
    for kind in (CLIPVisionModel, CLIPVisionModelWithProjection):
        tower = kind.from_pretrained(tmp_path / "towers").eval()
        assert torch.equal(tower(IMAGES).last_hidden_state, towers.vision_model(IMAGES).last_hidden_state)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "towers")(IDS, IMAGES).logits_per_image,
                       towers(IDS, IMAGES).logits_per_image)  # fmt: skip

    decoder = BertLMHeadModel(BertConfig(**DIMENSIONS, is_decoder=True, add_cross_attention=True))
    pair = EncoderDecoderModel(encoder=own.encoder, decoder=decoder).eval()
    fnl_hf.record_layers(pair)
    pair.save_pretrained(tmp_path / "pair")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "pair").eval()
    assert torch.equal(again(IDS, decoder_input_ids=IDS).logits, pair(IDS, decoder_input_ids=IDS).logits)
    assert len(again.config.quantization_config.factorizations) == 1


def test_a_model_that_shares_its_configuration_stays_dense(tmp_path):
    config = BertConfig(**DIMENSIONS)
    first, second = BertForMaskedLM(config), BertForMaskedLM(config)
    config.inner = first.cls.config = BertConfig()  # one of a module that is no model of Transformers
    factorize(first)
    assert first.bert.config is first.config is not config and first.cls.config is first.config.inner
    del config.inner
    second.save_pretrained(tmp_path)
    assert factorized_names(BertForMaskedLM.from_pretrained(tmp_path)) == []


def test_dense_weights_are_loaded_whatever_the_configuration_lists(tmp_path):
    """Of a model that was made from a factorized one's configuration, and of a part that was merged by itself."""
    model = factorize(bert(BertForSequenceClassification))
    dense = BertForSequenceClassification(model.config).eval()
    dense.save_pretrained(tmp_path / "dense")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert torch.equal(again(IDS).logits, dense(IDS).logits) and not hasattr(again.config, "quantization_config")
    merge(model.bert.encoder)
    model.save_pretrained(tmp_path / "partly", max_shard_size="10KB")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "partly")
    assert torch.equal(again(IDS).logits, model(IDS).logits) and factorized_names(again) == ["bert.pooler.dense"]
    assert list(again.config.quantization_config.layers) == ["pooler.dense"]
    encoder = AutoModel.from_pretrained(tmp_path / "partly")
    assert torch.equal(encoder(IDS).pooler_output, model.bert(IDS).pooler_output)


def test_what_a_checkpoint_lacks_is_initialized(tmp_path):
    """One factor of a layer, whose others stay as they are; a head that was factorized, for other classes."""
    model = bert(BertForSequenceClassification)
    quietly(model, FactorizationConfig(ranks={"classifier": 2, "intermediate.dense": 3}))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.bias"] += 7.0
    weights.pop("classifier.left")
    (tmp_path / "part").mkdir()
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    (tmp_path / "part" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    head = BertForSequenceClassification.from_pretrained(tmp_path / "part").classifier
    assert torch.equal(head.right, model.classifier.right) and (head.bias > 6).all() and head.left.abs().min() > 0
    try:
        again = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    except ValueError as error:  # older versions of transformers have loaded them by then
        assert "classifier.left has shape (2, 2) in the checkpoint and (5, 2) in" in str(error)
        pytest.skip("this version of transformers takes weights of another shape")
    head, bound = again.classifier, 42**-0.5
    assert 0 < head.bias.abs().max() <= bound and 0.1 * bound < head.right.std() < bound
    dense = again.bert.encoder.layer[0].intermediate.dense
    assert torch.equal(dense.left, model.bert.encoder.layer[0].intermediate.dense.left)


@MODES
def test_saved_and_loaded_as_every_model(mode, tmp_path):
    """Into the same class, the base model, another head, half precision; and trained on by the Trainer."""
    model = quietly(bert(), config_of(mode, include=["Linear", "query"]))
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "fnl_factorized" and "encoder.layer.0.intermediate.dense" in entry["layers"]
    settings = {"mode": mode, "rank_scale": FULL[mode], "init": "spectral", "include": ["Linear", "query"]}
    assert entry["factorizations"] == [settings | {"exclude": [], "seed": 0}]
    for again in (BertForMaskedLM.from_pretrained(tmp_path), AutoModelForMaskedLM.from_pretrained(tmp_path)):
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert [p.kind for p in fnl_hf.find_products(again)] == [p.kind for p in fnl_hf.find_products(model)]
        again.half().float()
    dense = AutoModel.from_config(again.config)
    assert factorized_names(dense) == []
    factorize(dense, FactorizationConfig(seed=7))
    assert [made["seed"] for made in dense.config.quantization_config.factorizations] == [7]
    base = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert torch.equal(base(IDS).last_hidden_state, model.bert(IDS).last_hidden_state)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert factorized_names(head) == factorized_names(model)
    quietly(head, FactorizationConfig(ranks={"classifier": 2}, seed=5))
    head.save_pretrained(tmp_path / "head")
    entry = json.loads((tmp_path / "head" / "config.json").read_text())["quantization_config"]
    assert [made["seed"] for made in entry["factorizations"]] == [0, 5]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head", dtype=torch.bfloat16)
    assert again.bert.encoder.layer[0].intermediate.dense.left.dtype == torch.bfloat16


def test_gpt2(tmp_path):
    """Its layers are Conv1D, again after merging: stock GPT-2 loads what is merged."""
    model = gpt2()
    before = model(IDS).logits
    quietly(model, FactorizationConfig(rank_scale=1.0)).save_pretrained(tmp_path)
    assert len(factorized_names(model)) == 8 and model.lm_head.weight is model.transformer.wte.weight
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    merge(again).save_pretrained(tmp_path / "merged")
    assert all(parameter.is_contiguous() for parameter in again.parameters())  # as FSDP2 wants them
    dense = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert factorized_names(dense) == []
    torch.testing.assert_close(dense(IDS).logits, before, rtol=0, atol=1e-5)


def test_one_line_for_the_model_and_one_for_the_optimizer(tmp_path):
    """In a stock Trainer, with everything by default; its checkpoints resume."""
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}, {"input_ids": IDS[1], "labels": IDS[1]}]

    def trainer(**arguments):
        model = factorize(bert())
        optimizer = fnl_hf.FrobeniusAdamW(fnl_hf.frobenius_param_groups(model), lr=1e-2)
        options = {"use_cpu": True, "report_to": "none", "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}
        args = TrainingArguments(str(tmp_path), **options, **arguments)
        return Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None))

    whole = trainer(max_steps=4)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    resumed = trainer(max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name
    again = BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert torch.equal(again(IDS).logits, whole.model.eval()(IDS).logits)


@MODES
def test_models_that_are_not_transformers(mode, tmp_path):
    model = quietly(Small(), config_of(mode, include=["Linear", "Conv2d", "head"]))
    save_factorized(model, tmp_path)
    with torch.device("meta"):
        empty = Small()
    for fresh in (Small(), empty):
        again = load_factorized(fresh, tmp_path)
        assert torch.equal(again(IDS[:, :3] % 11), model(IDS[:, :3] % 11))
        assert again.out.weight is again.table.weight
        save_factorized(again, tmp_path / "again")
        texts = [(folder / "factorized_layers.json").read_text() for folder in (tmp_path, tmp_path / "again")]
        assert texts[0] == texts[1]
    assert json.loads(texts[0])["factorizations"][0]["mode"] == mode
    own = bert(BertForSequenceClassification)
    quietly(own, config_of(mode, include=["Linear", "classifier"]))
    for whole, dense in ((own, bert(BertForSequenceClassification)), (factorize(nn.Linear(8, 8)), nn.Linear(8, 8))):
        save_factorized(whole, tmp_path / "whole")
        again = load_factorized(dense, tmp_path / "whole")
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    with pytest.raises(UserInputError, match="has no dense layer '0'"):
        save_factorized(factorize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))), tmp_path / "whole")
        load_factorized(nn.ModuleDict({"other": nn.Sequential(nn.Linear(8, 8))}), tmp_path / "whole")
    with pytest.raises(UserInputError, match="has no dense layer 'image'"):
        load_factorized(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    torn = tmp_path / "torn"
    shutil.copytree(tmp_path / "again", torn)
    (torn / "model.safetensors").write_bytes(b"torn")
    other, larger, smaller = Small(), Small(), Small()
    other.norm, larger.more, smaller.norm = nn.LayerNorm(9), nn.Linear(2, 3), nn.Identity()
    for untouched, folder, message in (
        (Small(), torn, "header"),
        (other, tmp_path / "again", r"norm.(weight|bias) has shape \(7,\), in Small \(9,\)"),
        (larger, tmp_path / "again", "it lacks the weight 'more.weight' of Small"),
        (smaller, tmp_path / "again", "Small has no weight 'norm.(weight|bias)'"),
    ):
        before = {name: tensor.clone() for name, tensor in untouched.state_dict().items()}
        with pytest.raises(UserInputError, match=message):
            load_factorized(untouched, folder)
        assert factorized_names(untouched) == [] and before.keys() == untouched.state_dict().keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in untouched.state_dict().items())
    with pytest.raises(UserInputError, match="factorized_layers.json"):
        load_factorized(Small(), tmp_path / "nowhere")
