"""Every attention implementation of transformers computes what "eager" does, at any E, through the Auto classes."""

import importlib.util
import shutil
import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertModel, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash

import fnl_hf

SIZES = (48, 24, 72)  # E = d, smaller, larger: r = 16, 8, 24
WITH_COMPILER = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="flex_attention on a CPU needs a C++ compiler: torch.compile makes its kernel",
)
# Of torch about itself, while it compiles flex_attention.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def folder(dimensions, tmp_path):
    """{E: folder of a masked language model}, weights large enough that attention counts."""

    def saved(embedding_size):
        sizes = dimensions | {"hidden_size": 48, "attention_embedding_size": embedding_size}
        model = fnl_hf.FnlBertForMaskedLM(fnl_hf.FnlBertConfig(**sizes, sparse_last_layer=True))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / str(embedding_size))
        return tmp_path / str(embedding_size)

    return saved


@torch.no_grad()
def states_and_logits(folder, implementation, batch, device="cpu", **options):
    """Hidden states, with and without padding, at the tokens that are there; logits at three positions of each row."""
    encoder, model = (
        kind.from_pretrained(folder, attn_implementation=implementation, **options).to(device).eval()
        for kind in (AutoModel, AutoModelForMaskedLM)
    )
    assert encoder.config._attn_implementation == model.config._attn_implementation == implementation
    batch = {name: value.to(device) for name, value in batch.items()}
    positions = torch.tensor([[1, 4, 9], [2, 3, 0], [5, 6, 10], [1, 2, 3], [4, 7, 8]], device=device)
    return [
        encoder(**batch).last_hidden_state[batch["attention_mask"].bool()],
        encoder(batch["input_ids"]).last_hidden_state,
        model(**batch, masked_positions=positions).logits,
    ]


def assert_as_eager(folder, implementation, batch):
    found = states_and_logits(folder, implementation, batch)
    for ours, expected in zip(found, states_and_logits(folder, "eager", batch), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("embedding_size", SIZES)
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=WITH_COMPILER)])
def test_each_computes_what_eager_does(folder, batch, implementation, embedding_size):
    assert_as_eager(folder(embedding_size), implementation, batch)


def attend(query, key, value, softmax_scale):
    """(S, H, r) each: bidirectional attention in float64."""
    query, key, value = (part.double().transpose(0, 1) for part in (query, key, value))
    return torch.softmax(query @ key.mT * softmax_scale, dim=-1).matmul(value).transpose(0, 1)


SEEN = set()


def checked(query, key, value, causal):
    heads = {part.shape[-2:] for part in (query, key, value)}
    assert len(heads) == 1 and heads.pop()[1] % 8 == 0 and not causal
    SEEN.add(query.dim())


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    checked(q, k, v, causal)
    return torch.stack([attend(*row, softmax_scale) for row in zip(q, k, v)]).to(q.dtype)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    checked(q, k, v, causal)
    bounds = zip(zip(cu_seqlens_q, cu_seqlens_q[1:]), zip(cu_seqlens_k, cu_seqlens_k[1:]))
    parts = [attend(q[a:b], k[c:d], v[c:d], softmax_scale) for (a, b), (c, d) in bounds]
    return torch.cat(parts).to(q.dtype)


@pytest.mark.parametrize("embedding_size", SIZES)
def test_flash_attention_is_given_what_its_kernels_take(folder, batch, monkeypatch, embedding_size):
    """Through all of transformers' own code for FlashAttention 3; its two kernels are loops in float64."""
    package = ModuleType("flash_attn_interface")
    package.__dict__.update(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=None
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    # The machine has neither the package nor a GPU.
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, **_: self._supports_flash_attn)
    SEEN.clear()
    assert_as_eager(folder(embedding_size), "flash_attention_3", batch)
    assert {3, 4} == SEEN, "padded sequences are packed, others are not"
    monkeypatch.setattr(flash, "_loaded_implementation", None)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="FlashAttention is installed")
@pytest.mark.skipif(importlib.util.find_spec("kernels") is not None, reason="kernels would load it from the Hub")
@pytest.mark.parametrize("version", [2, 3])
def test_what_is_not_installed_is_refused_as_for_a_stock_bert(folder, tmp_path, version):
    BertModel(BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3)).save_pretrained(tmp_path / "bert")
    refusals = []
    for source in (tmp_path / "bert", folder(24)):
        with pytest.raises(ImportError, match=f"FlashAttention{version} .* doesn't seem to be installed") as refusal:
            AutoModel.from_pretrained(source, attn_implementation=f"flash_attention_{version}")
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]
    assert paged_refusal(tmp_path / "bert") == paged_refusal(folder(24))


def paged_refusal(source):
    """What a model says to a standard forward with paged attention; None if, as from transformers 5.24 on, it computes
    what it does without."""
    ids = torch.tensor([[7, 5, 3]])
    try:
        found = AutoModel.from_pretrained(source, attn_implementation="paged|eager")(ids).last_hidden_state
    except ValueError as refusal:
        assert "`paged|eager` was called without a paged attention cache" in str(refusal)
        return str(refusal)
    assert torch.equal(found, AutoModel.from_pretrained(source, attn_implementation="eager")(ids).last_hidden_state)
    return None


@ON_GPU
@pytest.mark.parametrize("embedding_size", [48, 72])  # flex_attention takes head sizes from 16 on
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_each_computes_on_a_gpu_what_eager_does(folder, batch, implementation, embedding_size):
    if implementation == "flash_attention_2" and not flash.is_flash_attn_2_available():
        pytest.skip("FlashAttention is not installed")
    model = folder(embedding_size)
    exact = states_and_logits(model, "eager", batch)
    rounded = states_and_logits(model, "eager", batch, "cuda", dtype=torch.bfloat16)
    found = states_and_logits(model, implementation, batch, "cuda", dtype=torch.bfloat16)
    for expected, eager, ours in zip(exact, rounded, found, strict=True):
        rounding = (eager.float().cpu() - expected).abs().max()
        assert (ours.float().cpu() - expected).abs().max() < 2 * rounding
