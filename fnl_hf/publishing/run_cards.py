"""The card of a trained model: how it was trained, on what, and how good it is."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import PreTrainedModel

from fnl_hf.products.discovery import find_products
from fnl_hf.publishing.cards import TASKS, architecture_facts, write_card

# The metrics that the Hub shows: of the evaluation -> its identifier there, and a name.
SHOWN_METRICS = {
    "eval_f1": ("f1", "F1"),
    "eval_exact_match": ("exact_match", "Exact match"),
    "eval_exact": ("exact_match", "Exact match"),
    "eval_accuracy": ("accuracy", "Accuracy"),
    "eval_perplexity": ("perplexity", "Perplexity of masked tokens"),
    "eval_nsp_accuracy": ("accuracy", "Accuracy of next sentence prediction"),
}
RESULTS = """## Results

| metric | value |
|---|---|
{metrics}"""


def write_model_card(
    folder: str | Path,
    title: str,
    description: str,
    auto_class: str,
    model: PreTrainedModel,
    facts: dict[str, Any],
    metrics: dict[str, float],
    dataset: str | None = None,
    repository: str | None = None,
    license: str | None = None,
    plot: str | None = None,
) -> None:
    """Write ``folder/README.md`` from the facts and metrics given.

    Args:
        auto_class: what loads the model.
        model: what is in the folder.
        facts: their "data" is what the metrics are said to be measured on.
        dataset: the Hub's name of the data; None for the user's own.
        repository: the Hub's name of the model, None if there is none.
        license: the Hub's identifier, as "apache-2.0"; None for none.
        plot: a picture in the folder.
    """
    if dataset is not None and Path(dataset).exists():  # one of the user's own
        dataset = None
    metadata = {
        "license": license,
        "datasets": None if dataset is None else [dataset],
        "model_name": title,
        "eval_results": evaluation_results(metrics, TASKS[auto_class], dataset, facts["data"]) or None,
    }
    shown = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in metrics.items()
        if not name.endswith(("_runtime", "_per_second", "epoch"))
    }
    results = RESULTS.format(metrics="\n".join(f"| {name} | {value} |" for name, value in shown.items()))
    picture = f"\n\n![training report]({plot})" if plot else ""
    write_card(folder, title, description, auto_class, model, facts, metadata, results + picture, repository=repository)


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
    for unit, name in (("tokens", "non-padding tokens"), ("images", "images")):
        if f"train_{unit}_per_second" in metrics:
            rate, waited = metrics[f"train_{unit}_per_second"], metrics["train_data_wait"]
            facts["throughput"] = f"{rate:,.0f} {name}/s, waiting for data {waited:.1%} of the time"
    if "train_mfu" in metrics:
        facts["model FLOPs utilisation"] = f"{metrics['train_mfu']:.1%} of {metrics['train_mfu_peak']}"
    if "train_peak_memory_gb" in metrics:
        facts["peak memory"] = f"{metrics['train_peak_memory_gb']:.2f} GB a process"
    return facts


def model_facts(model, args, data: str) -> dict[str, Any]:
    """The rows that describe architecture, data and optimizer."""
    options = f" ({args.optim_args})" if args.optim_args else ""
    facts = architecture_facts(model) | {
        "data": Path(data).name if Path(data).exists() else data,  # not where it lies on this machine
        "optimizer": f"{args.optimizer}{options}, learning rate {args.learning_rate}, weight decay {args.weight_decay}",
    }
    if find_products(model):
        decay = args.weight_decay if args.frobenius_decay is None else args.frobenius_decay
        facts["decay of the products"] = args.decay_mode + (f", λ = {decay}" if args.decay_mode != "none" else "")
    return facts
