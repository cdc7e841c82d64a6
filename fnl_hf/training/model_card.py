"""The README.md of a saved model: what it is, how it was trained, how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD = """---
{metadata}
---

# {title}

{description}

| | |
|---|---|
{facts}

## Results

| metric | value |
|---|---|
{metrics}
{plot}
## Use
{note}
```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")
model = {auto_class}.from_pretrained("path/to/this/model"{remote})
```
{method}"""

NOTE = """
With fnl_hf installed, `import fnl_hf` instead of `trust_remote_code=True`.
"""

METHOD = """
## Method

The attention of each layer is 2H factorized layers, Q_h K_hᵀ and V_h O_hᵀ, with an adjustable embedding dimension E
(Khodak, Tenenholtz, Mackey and Fusi, *Initialization and Regularization of Factorized Neural Layers*, ICLR 2021,
[arXiv:2105.01029](https://arxiv.org/abs/2105.01029)).
"""


def write_model_card(
    folder: str | Path,
    title: str,
    description: str,
    auto_class: str,
    factorized: bool,
    facts: dict[str, Any],
    metrics: dict[str, float],
    tags: list[str],
    plot: str | None = None,
) -> None:
    """Write ``folder/README.md`` from the facts and metrics given; ``factorized`` for models of ours."""
    tags = ["fnl_bert", "factorized-layers", *tags] if factorized else tags
    data = ModelCardData(library_name="transformers", tags=tags)
    shown = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in metrics.items()
        if not name.endswith(("_runtime", "_per_second", "epoch"))
    }
    card = CARD.format(
        metadata=data.to_yaml(),
        title=title,
        description=description,
        auto_class=auto_class,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        metrics="\n".join(f"| {name} | {value} |" for name, value in shown.items()),
        note=NOTE if factorized else "",
        remote=", trust_remote_code=True" if factorized else "",
        method=METHOD if factorized else "",
        plot=f"\n![training report]({plot})\n" if plot else "",
    )
    ModelCard(card).save(Path(folder) / "README.md")


def run_facts(start: dict[str, Any], metrics: dict[str, Any]) -> dict[str, str]:
    """The rows that describe software, data and speed: from ``provenance.json``'s last start and training metrics."""
    versions = start["versions"]
    names = ("fnl_hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "python")
    facts = {"versions": ", ".join(f"{name} {versions[name]}" for name in names)}
    for key, name in (("git_revision", "git revision"), ("data_fingerprint", "data fingerprint")):
        if start[key] is not None:
            facts[name] = start[key]
    devices = ", ".join(sorted(set(start["devices"])))
    facts["trained on"] = f"{start['world_size']} process{'es' * (start['world_size'] > 1)}, {devices}"
    if "train_tokens_per_second" in metrics:
        facts["throughput"] = (
            f"{metrics['train_tokens_per_second']:,.0f} non-padding tokens/s, waiting for data "
            f"{metrics['train_data_wait']:.1%} of the time"
        )
    if "train_mfu" in metrics:
        facts["model FLOPs utilisation"] = f"{metrics['train_mfu']:.1%} of {metrics['train_mfu_peak']}"
    if "train_peak_memory_gb" in metrics:
        facts["peak memory"] = f"{metrics['train_peak_memory_gb']:.2f} GB a process"
    return facts


def model_facts(model, args, data: str) -> dict[str, Any]:
    """The rows that describe architecture, data and optimizer."""
    config = model.config
    options = f" ({args.optim_args})" if args.optim_args else ""
    embedding_size = getattr(config, "mha_embedding_size", config.hidden_size)
    return {
        # Sharded, the model is of a class of FSDP2's.
        "architecture": f"{config.architectures[0]}, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, {config.num_attention_heads} heads",
        "attention embedding dimension E": f"{embedding_size} ({embedding_size / config.hidden_size:.0%} of d)",
        "parameters": f"{model.num_parameters():,}",
        "data": Path(data).name if Path(data).is_file() else data,  # not where it lies on this machine
        "optimizer": f"{args.optimizer}{options}, learning rate {args.learning_rate}, weight decay {args.weight_decay}",
        "decay of the attention pairs": args.decay_mode
        if args.decay_mode == "none"
        else f"{args.decay_mode}, λ = {args.weight_decay if args.frobenius_decay is None else args.frobenius_decay}",
    }
