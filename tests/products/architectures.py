"""Tiny models of many architectures, and by hand where the factors of their attention layers are."""

import copy
import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from tests.products.attention_by_hand import (
    Attention,
    MultiheadAttention,
    blocks,
    cross_attended_bert,
    encoder_layers,
    filled,
    halves,
    interleaved,
    multihead,
    neighbors,
    separate,
    t5,
    torch_encoder,
    vectors,
)

IDS = torch.tensor([[5, 9, 4, 7, 11, 6, 8], [8, 3, 10, 5, 5, 9, 12]])


class Architecture(NamedTuple):
    """``attentions``: those of a model, by hand. ``run``: its output, or None where factors act beside products.
    ``found``: products by kind."""

    build: Callable[[], nn.Module]
    attentions: Callable[[nn.Module], list[Attention]]
    found: dict[str, int]
    run: Callable[[nn.Module], torch.Tensor] | None


def of_transformers(folder, name, **sizes):
    """A model of Transformers: ``name`` without "Config" and "Model"."""

    def build():
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        configuration = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
        base, _, head = name.partition("+")
        config = getattr(configuration, f"{base}Config")(**sizes)
        config._attn_implementation = "eager"
        return getattr(modeling, f"{base}{head or 'Model'}")(config)

    return build


def hidden(model):
    return model(input_ids=IDS).last_hidden_state


def encoded(model):
    return model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).last_hidden_state


def pixels(model):
    return model(pixel_values=IMAGE.to(next(model.parameters()).dtype)).last_hidden_state


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.7}
BERT = {
    "vocab_size": 31,
    "hidden_size": 15,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 7,
    "max_position_embeddings": 20,
}
DECODER = BERT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = DECODER | {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
TWO = {"qk": 2, "vo": 2}


def bert_like(model):
    layers = model.encoder.layer
    names = ("query", "key", "value", "output.dense")
    return [separate(layer.attention.self, names, 3, output=layer.attention) for layer in layers]


def decoder(heads, keys=None, pairs=(), names=QKVO):
    return lambda model: [separate(layer.self_attn, names, heads, keys, pairs) for layer in model.layers]


def rotated(count, partial=False):
    return {"rotary": count, "vo": count} | ({"qk": count} if partial else {})


def cross(model):
    states = torch.randn(2, 5, 15, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    return model(input_ids=IDS, encoder_hidden_states=states).last_hidden_state


def gpt2_cross(model):
    found = []
    for block in model.h:
        found.append(blocks(block.attn.c_attn.weight.T, block.attn.c_proj.weight, 3))
        both = block.crossattention
        rows = torch.cat([both.q_attn.weight.T, both.c_attn.weight.T])
        found.append(blocks(rows, both.c_proj.weight, 3))
    return found


def bart(model):
    modules = [m for name, m in model.named_modules() if name.endswith(("self_attn", "encoder_attn"))]
    return [separate(module, QKV_OUT, 3) for module in modules]


GPT2 = {"vocab_size": 31, "n_positions": 20, "n_embd": 15, "n_layer": 2, "n_head": 3, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BART = {"vocab_size": 31, "d_model": 15, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3}
BART |= {"decoder_attention_heads": 3, "encoder_ffn_dim": 7, "decoder_ffn_dim": 7, "max_position_embeddings": 20}
WHISPER = BART | {"d_model": 18, "num_mel_bins": 5, "max_source_positions": 6, "max_target_positions": 20}
VIT = {"hidden_size": 15, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 7, "image_size": 8}
VIT |= {"patch_size": 4}
NEOX = DECODER | {"hidden_size": 18, "rotary_pct": 0.7}

ARCHITECTURES = {
    "bert with cross-attention": Architecture(
        of_transformers("bert", "Bert", **BERT, is_decoder=True, add_cross_attention=True),
        cross_attended_bert,
        {"qk": 4, "vo": 4},
        cross,
    ),
    **{
        folder: Architecture(of_transformers(folder, name, **BERT), bert_like, TWO, hidden)
        for folder, name in [
            ("roberta", "Roberta"),
            ("xlm_roberta", "XLMRoberta"),
            ("camembert", "Camembert"),
            ("electra", "Electra"),
        ]
    },
    "albert": Architecture(  # one layer, used twice
        of_transformers("albert", "Albert", **BERT, embedding_size=5),
        lambda model: [
            separate(layer.attention, ("query", "key", "value", "dense"), 3)
            for layer in model.encoder.albert_layer_groups[0].albert_layers
        ],
        {"qk": 1, "vo": 1},
        hidden,
    ),
    "distilbert": Architecture(
        of_transformers("distilbert", "DistilBert", vocab_size=31, dim=15, n_layers=2, n_heads=3, hidden_dim=7),
        lambda model: [
            separate(layer.attention, ("q_lin", "k_lin", "v_lin", "out_lin"), 3) for layer in model.transformer.layer
        ],
        TWO,
        hidden,
    ),
    "mpnet": Architecture(
        of_transformers("mpnet", "MPNet", **BERT),
        lambda model: [separate(layer.attention.attn, ("q", "k", "v", "o"), 3) for layer in model.encoder.layer],
        TWO,
        hidden,
    ),
    "deberta_v2": Architecture(  # of its content; the queries meet positions, too
        of_transformers("deberta_v2", "DebertaV2", **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        lambda model: [
            separate(
                layer.attention.self,
                ("query_proj", "key_proj", "value_proj", "output.dense"),
                3,
                output=layer.attention,
            )
            for layer in model.encoder.layer
        ],
        TWO,
        None,
    ),
    "deberta": Architecture(
        of_transformers("deberta", "Deberta", **BERT),
        lambda model: [
            interleaved(layer.attention.self.in_proj.weight, layer.attention.output.dense.weight.T, 3)
            for layer in model.encoder.layer
        ],
        TWO,
        hidden,
    ),
    "vit": Architecture(
        of_transformers("vit", "ViT", **VIT),
        lambda model: [separate(m, QKVO, 3) for m in model.modules() if type(m).__name__ == "ViTAttention"],
        TWO,
        pixels,
    ),
    "deit": Architecture(
        of_transformers("deit", "DeiT", **VIT),
        lambda model: [separate(m, QKVO, 3) for m in model.modules() if type(m).__name__ == "DeiTAttention"],
        TWO,
        pixels,
    ),
    "clip": Architecture(
        of_transformers("clip", "CLIPText+Model", **BERT, bos_token_id=1, eos_token_id=2),
        lambda model: [separate(m, QKV_OUT, 3) for m in model.modules() if type(m).__name__ == "CLIPAttention"],
        TWO,
        hidden,
    ),
    "blip": Architecture(  # as in timm's vision Transformers
        of_transformers("blip", "BlipVision+Model", **VIT),
        lambda model: [blocks(m.qkv.weight, m.projection.weight.T, 3) for m in model.modules() if hasattr(m, "qkv")],
        TWO,
        pixels,
    ),
    "whisper": Architecture(
        of_transformers("whisper", "Whisper", **WHISPER, **SPECIAL),
        bart,
        {"qk": 3, "vo": 3},
        lambda model: (
            model(
                input_features=IMAGE.flatten(1)[:, :60].reshape(2, 5, 12).to(next(model.parameters()).dtype),
                decoder_input_ids=IDS,
            ).last_hidden_state
        ),
    ),
    "bart": Architecture(of_transformers("bart", "Bart", **BART), bart, {"qk": 3, "vo": 3}, encoded),
    "opt": Architecture(
        of_transformers("opt", "OPT", **DECODER, ffn_dim=7, word_embed_proj_dim=15),
        lambda model: [separate(layer.self_attn, QKV_OUT, 3) for layer in model.decoder.layers],
        TWO,
        hidden,
    ),
    "t5": Architecture(  # 2 heads of 5 rows beside a width of 11
        of_transformers("t5", "T5", vocab_size=31, d_model=11, d_kv=5, num_heads=2, num_layers=1, d_ff=7),
        t5,
        {"qk": 3, "vo": 3},
        encoded,
    ),
    "gpt2": Architecture(
        of_transformers("gpt2", "GPT2", **GPT2),
        lambda model: [blocks(block.attn.c_attn.weight.T, block.attn.c_proj.weight, 3) for block in model.h],
        TWO,
        hidden,
    ),
    "gpt2 with cross-attention": Architecture(
        of_transformers("gpt2", "GPT2", **GPT2, add_cross_attention=True), gpt2_cross, {"qk": 4, "vo": 4}, cross
    ),
    "gpt_bigcode": Architecture(  # one key for three heads
        of_transformers("gpt_bigcode", "GPTBigCode", **GPT2, multi_query=True),
        lambda model: [blocks(block.attn.c_attn.weight, block.attn.c_proj.weight.T, 3, 1) for block in model.h],
        TWO,
        hidden,
    ),
    "gpt_bigcode with all keys": Architecture(
        of_transformers("gpt_bigcode", "GPTBigCode", **GPT2, multi_query=False),
        lambda model: [interleaved(block.attn.c_attn.weight, block.attn.c_proj.weight.T, 3) for block in model.h],
        TWO,
        hidden,
    ),
    "mpt": Architecture(
        of_transformers("mpt", "Mpt", vocab_size=31, d_model=15, n_heads=3, n_layers=2, max_seq_len=20),
        lambda model: [blocks(block.attn.Wqkv.weight, block.attn.out_proj.weight.T, 3) for block in model.blocks],
        TWO,
        hidden,
    ),
    "bloom": Architecture(
        of_transformers("bloom", "Bloom", vocab_size=31, hidden_size=15, n_layer=2, n_head=3),
        lambda model: [
            interleaved(block.self_attention.query_key_value.weight, block.self_attention.dense.weight.T, 3)
            for block in model.h
        ],
        TWO,
        hidden,
    ),
    "gpt_neox": Architecture(  # 4 of 6 rows are rotated
        of_transformers("gpt_neox", "GPTNeoX", **NEOX),
        lambda model: [
            interleaved(layer.attention.query_key_value.weight, layer.attention.dense.weight.T, 3, pairs=halves(4))
            for layer in model.layers
        ],
        rotated(2, partial=True),
        hidden,
    ),
    "modernbert": Architecture(
        of_transformers("modernbert", "ModernBert", **DECODER | {"hidden_size": 18}),
        lambda model: [
            blocks(layer.attn.Wqkv.weight, layer.attn.Wo.weight.T, 3, pairs=halves(6)) for layer in model.layers
        ],
        rotated(2),
        hidden,
    ),
    "llama": Architecture(of_transformers("llama", "Llama", **GROUPED), decoder(4, 2, halves(6)), rotated(2), hidden),
    "mistral": Architecture(
        of_transformers("mistral", "Mistral", **GROUPED), decoder(4, 2, halves(6)), rotated(2), hidden
    ),
    "qwen2": Architecture(
        of_transformers("qwen2", "Qwen2", **GROUPED | {"hidden_size": 24}), decoder(4, 2, halves(6)), rotated(2), hidden
    ),
    "qwen3": Architecture(  # normalizes queries and keys: the product is not all that counts
        of_transformers("qwen3", "Qwen3", **GROUPED), decoder(4, 2, halves(6)), rotated(2), None
    ),
    "gemma": Architecture(  # one key for all heads
        of_transformers("gemma", "Gemma", **GROUPED | {"num_key_value_heads": 1}),
        decoder(4, 1, halves(6)),
        rotated(2),
        hidden,
    ),
    "phi3": Architecture(
        of_transformers("phi3", "Phi3", **GROUPED | {"hidden_size": 24}),
        lambda model: [
            blocks(layer.self_attn.qkv_proj.weight, layer.self_attn.o_proj.weight.T, 4, 2, halves(6))
            for layer in model.layers
        ],
        rotated(2),
        hidden,
    ),
    "stablelm": Architecture(  # 4 of 6 rows are rotated
        of_transformers("stablelm", "StableLm", **GROUPED | {"hidden_size": 24, "rope_parameters": ROPE}),
        decoder(4, 2, halves(4)),
        rotated(2, partial=True),
        hidden,
    ),
    "smollm3": Architecture(  # the second layer without rotary embeddings
        of_transformers("smollm3", "SmolLM3", **GROUPED | {"hidden_size": 24}, no_rope_layers=[1, 0]),
        lambda model: [
            separate(layer.self_attn, QKVO, 4, 2, pairs) for layer, pairs in zip(model.layers, (halves(6), ()))
        ],
        {"rotary": 1, "qk": 1, "vo": 2},
        hidden,
    ),
    "cohere": Architecture(
        of_transformers("cohere", "Cohere", **GROUPED | {"hidden_size": 24}),
        decoder(4, 2, neighbors(6)),
        rotated(2),
        hidden,
    ),
    "glm": Architecture(  # half of the rows are rotated
        of_transformers("glm", "Glm", **GROUPED | {"head_dim": 8}),
        decoder(4, 2, neighbors(4)),
        rotated(2, partial=True),
        hidden,
    ),
    "gptj": Architecture(
        of_transformers("gptj", "GPTJ", **GPT2 | {"n_embd": 18}, rotary_dim=4),
        lambda model: [separate(block.attn, QKV_OUT, 3, pairs=neighbors(4)) for block in model.h],
        rotated(2, partial=True),
        hidden,
    ),
    "falcon with one key": Architecture(
        of_transformers("falcon", "Falcon", **DECODER | {"hidden_size": 18}, multi_query=True, alibi=True),
        lambda model: [
            interleaved(block.self_attention.query_key_value.weight, block.self_attention.dense.weight.T, 3, 1)
            for block in model.h
        ],
        TWO,
        hidden,
    ),
    "falcon": Architecture(
        of_transformers(
            "falcon",
            "Falcon",
            **DECODER | {"hidden_size": 24, "num_attention_heads": 4},
            new_decoder_architecture=True,
            num_kv_heads=2,
        ),
        lambda model: [
            interleaved(
                block.self_attention.query_key_value.weight, block.self_attention.dense.weight.T, 4, 2, halves(6)
            )
            for block in model.h
        ],
        rotated(2),
        hidden,
    ),
    "nn.MultiheadAttention": Architecture(MultiheadAttention, multihead, {"qk": 1, "vo": 1}, vectors),
    "nn.MultiheadAttention with kdim": Architecture(
        functools.partial(MultiheadAttention, kdim=5, vdim=8), multihead, {"qk": 1, "vo": 1}, vectors
    ),
    "nn.TransformerEncoder": Architecture(torch_encoder, encoder_layers, TWO, vectors),
}


@functools.cache
def _built(name):
    torch.manual_seed(0)
    return filled(ARCHITECTURES[name].build())


def model_of(name):
    """In float64, with weights of a size at which attention is no mean, and without biases."""
    return copy.deepcopy(_built(name))
