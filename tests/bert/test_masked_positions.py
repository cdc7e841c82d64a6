"""Heads and last layer on the masked positions alone, and attention within documents: the same values as everywhere."""

import pytest
import torch
import transformers
from torch import nn

import fnl_hf
from fnl_hf import FnlBertConfig

HEADS = ("ForMaskedLM", "ForPreTraining")


def build(head, dimensions, **entries):
    dimensions |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = getattr(fnl_hf, f"FnlBert{head}")(FnlBertConfig(**dimensions, attention_embedding_size=6, **entries))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def masked(batch):
    """Positions (5, 3) and labels; the last entry of row 1 only fills the row."""
    positions = torch.tensor([[1, 4, 9], [2, 3, 0], [5, 6, 10], [1, 2, 3], [4, 7, 8]])
    labels = batch["input_ids"].gather(1, positions)
    labels[1, 2] = -100
    return positions, labels


def everywhere(positions, labels, length):
    full = torch.full((len(labels), length), -100)
    for row, column, label in zip(torch.arange(len(labels)).repeat_interleave(3), positions.ravel(), labels.ravel()):
        if label != -100:
            full[row, column] = label
    return full


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("sparse_last_layer", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_masked_positions_give_the_full_heads_values(
    dimensions, batch, head, sparse_last_layer, padded, implementation
):
    model = build(head, dimensions, sparse_last_layer=sparse_last_layer)
    model.set_attn_implementation(implementation)
    positions, labels = masked(batch)
    inputs = batch if padded else {"input_ids": batch["input_ids"]}
    full = model(**inputs, labels=everywhere(positions, labels, 11))
    full.loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    outputs = model(**inputs, labels=labels, masked_positions=positions)
    outputs.loss.backward()
    name = "logits" if head == "ForMaskedLM" else "prediction_logits"
    logits = outputs[name]
    assert logits.shape == (5, 3, 53)
    torch.testing.assert_close(logits, full[name][torch.arange(5)[:, None], positions], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, full.loss)
    if head == "ForPreTraining":
        torch.testing.assert_close(outputs.seq_relationship_logits, full.seq_relationship_logits, atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_the_last_layer_is_run_on_the_masked_positions_alone(dimensions, batch):
    positions, labels = masked(batch)
    widths = []
    for sparse in (True, False):
        model = build("ForMaskedLM", dimensions, sparse_last_layer=sparse)
        seen = []
        for layer in model.bert.encoder.layer:
            layer.intermediate.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.shape[1]))
        model(**batch, labels=labels, masked_positions=positions)
        widths.append(seen)
    assert widths == [[11, 3], [11, 11]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_every_layer_gives_its_attentions_and_hidden_states(dimensions, batch, head, checkpointing):
    """Those of the last layer at its positions, the values that the full layer has there."""
    model = build(head, dimensions, sparse_last_layer=True).train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.set_attn_implementation("eager")
    positions, _ = masked(batch)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    full, sparse = model(**batch, **wanted), model(**batch, **wanted, masked_positions=positions)
    if head == "ForPreTraining":  # the pooler reads token 0
        positions = torch.cat([torch.zeros(5, 1, dtype=torch.long), positions], dim=1)
    index = positions[:, None, :, None].expand(-1, 3, -1, 11)
    assert len(sparse.attentions) == 2 and len(sparse.hidden_states) == 3
    torch.testing.assert_close(sparse.attentions[0], full.attentions[0])
    torch.testing.assert_close(sparse.attentions[1], full.attentions[1].gather(2, index), atol=1e-5, rtol=1e-5)
    rows = full.hidden_states[2][torch.arange(5)[:, None], positions]
    torch.testing.assert_close(sparse.hidden_states[2], rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sparse_last_layer", [True, False])
def test_documents_in_one_sequence_are_as_documents_alone(dimensions, batch, implementation, sparse_last_layer):
    """Oracle: stock BERT on each document by itself."""
    model = build("ForMaskedLM", dimensions | {"num_hidden_layers": 2}, sparse_last_layer=sparse_last_layer)
    model.config.attention_embedding_size = 6
    model.set_attn_implementation(implementation)
    model.eval()
    lengths, ids = (2, 5, 4), batch["input_ids"][:1]
    parts = ids.split(lengths, dim=1)
    expected = torch.cat([model(part).logits for part in parts], dim=1)
    together = {
        "document_ids": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    torch.testing.assert_close(model(ids, **together).logits, expected, atol=1e-5, rtol=1e-5)
    positions = torch.tensor([[1, 3, 9]])
    outputs = model(ids, **together, masked_positions=positions, labels=ids.gather(1, positions))
    torch.testing.assert_close(outputs.logits, expected[:, positions[0]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2), "without them, documents see each other"


def test_padding_and_documents_combine(dimensions, batch):
    model = build("Model", dimensions).eval()
    documents = torch.zeros_like(batch["input_ids"])
    states = model(**batch, document_ids=documents).last_hidden_state
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(states[valid], model(**batch).last_hidden_state[valid], atol=1e-5, rtol=1e-5)


def test_flash_attention_is_given_documents_in_its_own_way(dimensions, batch):
    """Its kernels take ``cu_seq_lens``: they reach the attention function, and masks are refused."""
    seen = {}

    def varlen(module, query, key, value, attention_mask, **kwargs):
        seen.update(kwargs, shape=query.shape)
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("varlen", varlen)
    model = build("ForMaskedLM", dimensions, sparse_last_layer=True)
    model.config._attn_implementation = "varlen"
    lengths = torch.tensor([0, 4, 11, 13], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7}
    positions, labels = masked(batch)
    outputs = model(batch["input_ids"], **bounds, masked_positions=positions, labels=labels)
    assert outputs.logits.shape == (5, 3, 53) and seen["shape"] == (5, 3, 11, 2), "queries are everywhere"
    assert torch.equal(seen["cu_seq_lens_q"], lengths) and seen["max_length_k"] == 7
    with pytest.raises(ValueError, match="document_ids needs attention 'sdpa' or 'eager', not 'varlen'"):
        model(batch["input_ids"], document_ids=torch.zeros_like(batch["input_ids"]))


def test_flash_attention_is_given_padding_in_its_own_way(dimensions, batch):
    """Its mask is (B, S), which has as many queries as keys; the values are those that sdpa gives."""

    def padded(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape, attention_mask.shape))
        kwargs = {"dropout": 0.0, "scaling": kwargs["scaling"]}
        return transformers.AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask[:, None, None].bool(), **kwargs
        )

    transformers.AttentionInterface.register("padded", padded)
    transformers.AttentionMaskInterface.register("padded", lambda *_, attention_mask=None, **__: attention_mask)
    seen = []
    model = build("ForMaskedLM", dimensions, sparse_last_layer=True).eval()
    positions, _ = masked(batch)
    expected = model(**batch, masked_positions=positions).logits
    model.config._attn_implementation = "padded"
    torch.testing.assert_close(model(**batch, masked_positions=positions).logits, expected)
    assert set(seen) == {((5, 3, 11, 2), (5, 11))}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("entries", [{}, {"sparse_last_layer": True}])
def test_the_training_forward_compiles_without_graph_breaks(dimensions, batch, head, entries):
    model = build(head, dimensions, **entries).train()
    positions, labels = masked(batch)
    inputs = {"input_ids": batch["input_ids"], "labels": labels, "masked_positions": positions}
    inputs["num_items_in_batch"] = {"labels": torch.tensor(14)}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
    inputs |= {"document_ids": torch.zeros_like(batch["input_ids"]), "position_ids": torch.arange(11)[None]}
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
