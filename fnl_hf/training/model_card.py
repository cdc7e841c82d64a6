"""The README.md of a saved model: what it is, how it was trained, how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD_FILE = "README.md"
UNNAMED = "path/to/this/model"  # where the repository is not known
# The metrics that the Hub shows: of the evaluation -> its identifier there, and a name.
SHOWN_METRICS = {
    "eval_f1": ("f1", "F1"),
    "eval_exact_match": ("exact_match", "Exact match"),
    "eval_exact": ("exact_match", "Exact match"),
    "eval_accuracy": ("accuracy", "Accuracy on masked tokens"),
    "eval_perplexity": ("perplexity", "Perplexity of masked tokens"),
    "eval_nsp_accuracy": ("accuracy", "Accuracy of next sentence prediction"),
}

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

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = {auto_class}.from_pretrained("{repository}"{remote})
```
{method}"""

METHOD = """
The code of the model comes with its weights. Where fnl_hf is installed, its own is used:

```python
import fnl_hf
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repository}")
```

## Method

The attention of each layer is 2H factorized layers, Q_h K_hᵀ and V_h O_hᵀ, with an adjustable embedding dimension E
(Khodak, Tenenholtz, Mackey and Fusi, *Initialization and Regularization of Factorized Neural Layers*, ICLR 2021,
[arXiv:2105.01029](https://arxiv.org/abs/2105.01029)).

```bibtex
@inproceedings{{khodak2021initialization,
  title = {{Initialization and Regularization of Factorized Neural Layers}},
  author = {{Khodak, Mikhail and Tenenholtz, Neil and Mackey, Lester and Fusi, Nicol{{\\`o}}}},
  booktitle = {{International Conference on Learning Representations}},
  year = {{2021}},
  eprint = {{2105.01029}},
  archivePrefix = {{arXiv}}
}}
```
"""


def write_model_card(
    folder: str | Path,
    title: str,
    description: str,
    auto_class: str,
    factorized: bool,
    facts: dict[str, Any],
    metrics: dict[str, float],
    task: str,
    dataset: str | None = None,
    repository: str | None = None,
    license: str | None = None,
    plot: str | None = None,
) -> None:
    """Write ``folder/README.md`` from the facts and metrics given.

    Args:
        factorized: a model of ours, not a stock one.
        facts: their "data" is what the metrics are said to be measured on.
        task: the Hub's name for it, as "question-answering".
        dataset: the Hub's name of the data; None for the user's own.
        repository: the Hub's name of the model, None if there is none.
        license: the Hub's identifier, as "apache-2.0"; None for none.
    """
    if dataset is not None and Path(dataset).exists():  # one of the user's own
        dataset = None
    metadata = ModelCardData(
        library_name="transformers",
        license=license,
        pipeline_tag=task,
        tags=["fnl_bert", "factorized-layers", task] if factorized else [task],
        datasets=None if dataset is None else [dataset],
        model_name=title,
        eval_results=evaluation_results(metrics, task, dataset, facts["data"]) or None,
    )
    shown = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in metrics.items()
        if not name.endswith(("_runtime", "_per_second", "epoch"))
    }
    names = {"auto_class": auto_class, "repository": repository or UNNAMED}
    card = CARD.format(
        metadata=metadata.to_yaml(),
        title=title,
        description=description,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        metrics="\n".join(f"| {name} | {value} |" for name, value in shown.items()),
        remote=", trust_remote_code=True" if factorized else "",
        method=METHOD.format(**names) if factorized else "",
        plot=f"\n![training report]({plot})\n" if plot else "",
        **names,
    )
    ModelCard(card).save(Path(folder) / CARD_FILE)


def evaluation_results(metrics: dict[str, float], task: str, dataset: str | None, data: str) -> list[EvalResult]:
    """Those of the metrics that the Hub shows, for the card's model index."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset or "custom",
            dataset_name=data,
            dataset_split="validation",
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(metrics[key]), 4),
        )
        for key, (kind, name) in SHOWN_METRICS.items()
        if key in metrics
    ]


def name_repository(card: Path, repository: str) -> None:
    """Let a card that was written before its model had a place on the Hub load it from there."""
    if card.is_file() and UNNAMED in (text := card.read_text(encoding="utf-8")):
        card.write_text(text.replace(UNNAMED, repository), encoding="utf-8")


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
        "data": Path(data).name if Path(data).exists() else data,  # not where it lies on this machine
        "optimizer": f"{args.optimizer}{options}, learning rate {args.learning_rate}, weight decay {args.weight_decay}",
        "decay of the attention pairs": args.decay_mode
        if args.decay_mode == "none"
        else f"{args.decay_mode}, λ = {args.weight_decay if args.frobenius_decay is None else args.frobenius_decay}",
    }
