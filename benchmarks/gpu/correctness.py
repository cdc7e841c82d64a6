"""Check that a GPU computes the same as the CPU and what waits for it, and test varlen and CUDA graphs."""

import copy
import re
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

import fnl_hf
from fnl_hf import FnlBertConfig, FrobeniusAdamW, frobenius_param_groups
from fnl_hf.bert.modeling_fnl_bert import AUTO_CLASSES
from gpu import throughput
from gpu.records import ROOT, Recorder
from tests.simulated import cases

# The tests that are skipped without CUDA.
NEED_A_GPU = {
    "tests/bert/test_attention.py": "on_a_gpu",
    "tests/squad/test_inference.py": "the_models_device",
    "tests/training/test_fsdp.py": "on_a_gpu",
}
SIZES = {"vocab_size": 53, "hidden_size": 42, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 35,
         "max_position_embeddings": 19, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
DOCUMENT = 37  # tokens of each but the last one


def run_tests(run: Recorder) -> None:
    if not run.needs("pytest", "datasets", "evaluate"):
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *NEED_A_GPU]
    command += ["-k", " or ".join(NEED_A_GPU.values()), *(["--collect-only"] if run.tiny else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    run.record("pytest", re.sub(r" in [\d.]+s.*", "", summary), goal="no failure")
    if done.returncode:
        print(done.stdout[-8000:])


@contextmanager
def waits(run: Recorder):
    """A list of the lines that made the host wait for the device, as torch reports them; none on a CPU."""
    found: list[str] = []
    if not run.is_gpu:
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
        found += [f"{line} ({count})" for line, count in lines.items()]


def largest_difference(found, expected) -> float:
    """Over all tensors, relative to the largest value of each."""
    return max(
        float((ours.detach().cpu() - theirs.detach()).abs().max() / theirs.detach().abs().max().clamp(min=1e-6))
        for ours, theirs in zip(found, expected, strict=True)
    )


def compare_heads(run: Recorder) -> None:
    heads = sorted(AUTO_CLASSES.values())
    for head in heads[:2] if run.tiny else heads:
        worst, waited = 0.0, []
        for inputs in cases.inputs_of(head):
            config = FnlBertConfig(**SIZES, attention_embedding_size=21, sparse_last_layer=True)
            model = getattr(fnl_hf, head)(config)
            expected_loss, expected = cases.loss_and_gradients(copy.deepcopy(model), inputs)
            model = model.to(run.device)
            there = {k: v.to(run.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            with waits(run) as found:
                loss, gradients = cases.loss_and_gradients(model, there)
            worst = max(worst, largest_difference([loss, *gradients.values()], [expected_loss, *expected.values()]))
            waited += found
        run.record(f"{head}, largest difference from the CPU", worst, goal="<= 1e-3")
        run.record(f"{head}, waits per step", len(waited), spread=waited or None, goal="0")


def compare_optimizers(run: Recorder) -> None:
    names = [name for name in cases.CASES if run.is_gpu or "capturable" not in name]
    for case in names[::8] if run.tiny else names:
        expected, model = cases.make_model(), cases.make_model().to(run.device)
        reference = "adamw, foreach" if "capturable" in case else case
        pairs = [(expected, cases.make_optimizer(expected, reference)), (model, cases.make_optimizer(model, case))]
        waited: list[str] = []
        for step in range(3):
            for each, optimizer in pairs:
                cases.set_gradients(each, step)
                with waits(run) as found:
                    optimizer.step()
                waited += found if step and each is model else []
        worst = largest_difference(model.parameters(), expected.parameters())
        run.record(f"{case}, largest difference from the CPU", worst, goal="<= 1e-3")
        run.record(f"{case}, waits per step", len(waited), spread=waited or None, goal="0")


def measure_precision(run: Recorder) -> None:
    """Relative errors of the loss and of all gradients together, against float64 on the same device."""
    preset = "tiny" if run.tiny else "base"
    model = throughput.make_side("ours", preset, "sdpa").to(run.device)
    inputs = _masked_batch(run, model.config.vocab_size)

    def gradients(dtype=torch.float32, autocast=False):
        own = copy.deepcopy(model).to(dtype)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=autocast):
            loss = own(**inputs).loss
        loss.backward()
        return torch.cat([p.grad.flatten().double() for p in own.parameters() if p.grad is not None]), loss.double()

    exact, exact_loss = gradients(torch.float64)
    for name, tf32, autocast in (("float32", False, False), ("TF32", True, False), ("bf16 autocast", False, True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32 and run.is_gpu
        found, loss = gradients(autocast=autocast)
        run.record(f"{name}, error of the gradient", ((found - exact).norm() / exact.norm()).item())
        run.record(f"{name}, error of the loss", ((loss - exact_loss).abs() / exact_loss).item())
    torch.backends.cuda.matmul.allow_tf32 = False


def compare_varlen(run: Recorder) -> None:
    """Hidden states of packed documents: FlashAttention with cu_seq_lens, sdpa with document_ids, both in bfloat16."""
    if not run.is_gpu or not throughput.has_flash():
        run.skip("varlen", "needs FlashAttention and a GPU")
        return
    model = throughput.make_side("ours", "small", "sdpa").to(run.device, torch.bfloat16).eval()
    flash = copy.deepcopy(model)
    flash.set_attn_implementation("flash_attention_2")
    batch, length = 4, 128
    ids = torch.randint(1000, 30000, (batch, length), device=run.device)
    position_ids = (torch.arange(length, device=run.device) % DOCUMENT).expand(batch, -1)
    documents = (torch.arange(length, device=run.device) // DOCUMENT).expand(batch, -1)
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([batch * length])]).int()
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": DOCUMENT, "max_length_k": DOCUMENT}
    with torch.no_grad():
        exact = copy.deepcopy(model).float().bert(ids, position_ids=position_ids, document_ids=documents)[0]
        sdpa = model.bert(ids, position_ids=position_ids, document_ids=documents)[0]
        varlen = flash.bert(ids, position_ids=position_ids, **lengths)[0]
    for name, states in (("sdpa", sdpa), ("varlen", varlen)):
        run.record(f"{name}, error against float32", ((states - exact).norm() / exact.norm()).item())


def try_graphs(run: Recorder) -> None:
    preset = "tiny" if run.tiny else "base"
    model = throughput.make_side("ours", preset, "sdpa").to(run.device)
    inputs = _masked_batch(run, model.config.vocab_size)
    explained = torch._dynamo.explain(model)(**inputs)
    run.record("torch.compile, graph breaks of forward", explained.graph_break_count, goal="0")
    torch._dynamo.reset()
    if not run.is_gpu:
        run.skip("CUDA graphs", "not available on a CPU")
        return
    expected = copy.deepcopy(model)
    optimizers = [
        FrobeniusAdamW(frobenius_param_groups(each, 0.1), lr=torch.tensor(1e-3, device=run.device), capturable=True)
        for each in (model, expected)
    ]
    for each, optimizer in zip((model, expected), optimizers):
        for step in range(2):
            cases.set_gradients(each, step)
            optimizer.step()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=side):
        optimizers[0].step()
    graph.replay()
    optimizers[1].step()
    run.synchronize()
    differ = largest_difference(model.parameters(), [p.cpu() for p in expected.parameters()])
    run.record("a captured step of FrobeniusAdamW, largest difference", differ, goal="<= 1e-5")


def _masked_batch(run: Recorder, vocab_size: int):
    batch, length = (2, 16) if run.tiny else (8, 128)
    ids = torch.randint(1000, vocab_size, (batch, length), device=run.device)
    positions = torch.arange(length, device=run.device)[::7].expand(batch, -1).contiguous()
    return {"input_ids": ids, "labels": ids.gather(1, positions), "masked_positions": positions}
