"""The model card (README.md) of a saved model: what it is, how it was trained, how it is loaded, what is to be cited.

Its text is in ``card_template.md``.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from transformers import BertPreTrainedModel, PreTrainedModel, SchedulerType
from transformers.utils import cached_file, logging

from fnl_hf.bert.conversion_fnl_bert import embedding_size_of
from fnl_hf.bert.modeling_fnl_bert import FnlBertPreTrainedModel
from fnl_hf.products.discovery import find_products
from fnl_hf.reports.overview import describe_decay, describe_optimizer, duration
from fnl_hf.surgery.checkpoints import factorized_layers

logger = logging.get_logger(__name__)
CARD_FILE = "README.md"
TEMPLATE_FILE = Path(__file__).with_name("card_template.md")
SIGNATURE = "<!-- Written by fnl_hf -->"
PLACEHOLDER = "path/to/this/model"  # where the repository is not known
KEPT_METADATA = ("license", "license_name", "license_link", "language", "base_model")  # of the original's card
FACTORIZED_LAYERS = "factorized layers"
# auto class -> the Hub's name of its task, where it has one
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForPreTraining": "fill-mask",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
}
MODULES_FILE = "modules.json"  # of sentence-transformers: the modules after the model, each in a folder of its own
# file of what prepares a model's inputs -> the class that loads it
PREPROCESSORS = {
    "processor_config.json": "AutoProcessor",  # with a tokenizer in it, where there is one
    "preprocessor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
}
# metric of an evaluation -> its identifier on the Hub, and a name
HUB_METRICS = {
    "eval_f1": ("f1", "F1"),
    "eval_exact_match": ("exact_match", "Exact match"),
    "eval_exact": ("exact_match", "Exact match"),
    "eval_accuracy": ("accuracy", "Accuracy"),
    "eval_perplexity": ("perplexity", "Perplexity of masked tokens"),
    "eval_nsp_accuracy": ("accuracy", "Accuracy of next sentence prediction"),
}
# metric -> its name in the table of results, where it needs another
RESULTS = {
    **{metric: name for metric, (_, name) in HUB_METRICS.items()},
    "eval_loss": "Held-out loss",
    "unigram_entropy": "Unigram entropy of the held-out text",
}


def write_card(
    folder: str | Path,
    title: str,
    description: str,
    auto_class: str,
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    metadata: Mapping[str, Any],
    section: str = "",
    cites: bool = False,
    repository: str | None = None,
    results: Mapping[str, Any] | None = None,
    plot: str | None = None,
) -> None:
    """Write ``folder/README.md`` beside a model and what prepares its inputs.

    Args:
        auto_class: what loads the model; the Hub's task follows from it.
        model: what is in the folder. With factorized layers it loads where fnl_hf is imported; else, if its class is
            not one of Transformers, by its code, which comes with it.
        facts: the rows of a table.
        metadata: more entries of ``huggingface_hub.ModelCardData``.
        section: Markdown between the facts and how the model is loaded.
        cites: cite the method where nothing of the model is a product, too.
        repository: the Hub's name of the model, None if there is none.
        results: the rows of a table of metrics.
        plot: a picture in the folder.
    """
    is_fnl_bert, layers = isinstance(model, FnlBertPreTrainedModel), len(factorized_layers(model))
    has_code = model._auto_class is not None and not (is_fnl_bert and layers)
    embeds_sentences = Path(folder, MODULES_FILE).exists()
    library = "sentence-transformers" if embeds_sentences else "transformers"
    tag = "sentence-similarity" if embeds_sentences else PIPELINE_TAGS.get(auto_class)
    tags = {"fnl_bert": is_fnl_bert, "factorized-layers": is_fnl_bert or layers, str(tag): tag}
    data = ModelCardData(
        library_name=library,
        pipeline_tag=tag,
        tags=[name for name, holds in tags.items() if holds] or None,
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        str(TEMPLATE_FILE),
        signature=SIGNATURE,
        title=title,
        description=description,
        facts=facts,
        section=section,
        cites=cites,
        results=results,
        plot=plot,
        auto_class=auto_class,
        preprocessor=next((name for file, name in PREPROCESSORS.items() if Path(folder, file).exists()), None),
        repository=repository or PLACEHOLDER,
        remote=", trust_remote_code=True" if has_code else "",
        is_fnl_bert=is_fnl_bert,
        layers=layers,
        embeds_sentences=embeds_sentences,
    )
    card.save(Path(folder, CARD_FILE))


def write_run_card(
    folder: str | Path,
    title: str,
    description: str,
    auto_class: str,
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    dataset: str | None = None,
    repository: str | None = None,
    license: str | None = None,
    language: str | None = None,
    base_model: str | None = None,
    plot: str | None = None,
    teacher: str | None = None,
    section: str = "",
) -> None:
    """Write the card of a trained model: how it was trained, on what, and how good it is.

    Args:
        base_model: the checkpoint that it started from: folder or Hub name. What its card says of base model, license
            and language holds here, too, where nothing else is given.
        facts: as for :func:`write_card`; their "data" is what the metrics are said to be measured on.
        metrics: of the evaluation.
        dataset: the Hub's name of the data; None for the user's own.
        license: the Hub's identifier, as "apache-2.0"; None for none.
        language: that of the data, as "en".
        teacher: the checkpoint that it was distilled from: folder or Hub name. For the Hub it is a base model, too.
        section: as for :func:`write_card`.
    """
    if dataset is not None and os.path.exists(dataset):  # one of the user's own
        dataset = None
    kept: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if base_model is not None:
        origin["base model"], kept = describe_source(base_model)
        if license is not None:
            kept = {entry: value for entry, value in kept.items() if not entry.startswith("license")}
    if teacher is not None:
        origin["teacher"], of_teacher = describe_source(teacher)
        bases = dict.fromkeys([*_as_list(kept.get("base_model")), *_as_list(of_teacher.get("base_model"))])
        kept["base_model"] = next(iter(bases), None) if len(bases) < 2 else list(bases)
    given = {"license": license, "language": language}
    metadata = {
        **kept,
        **{entry: value for entry, value in given.items() if value is not None},
        "datasets": None if dataset is None else [dataset],
        "model_name": title,
        "eval_results": evaluation_results(metrics, PIPELINE_TAGS.get(auto_class), dataset, facts["data"]) or None,
    }
    results = {
        RESULTS.get(name, name): f"{value:.4g}" if isinstance(value, float) else value
        for name, value in metrics.items()
        if not name.endswith(("_runtime", "_per_second", "epoch"))
    }
    write_card(
        folder, title, description, auto_class, model, {**origin, **facts}, metadata,
        repository=repository, results=results, plot=plot, section=section,
    )  # fmt: skip


def _as_list(entry: Any) -> list[str]:
    return entry if isinstance(entry, list) else [] if entry is None else [entry]


def evaluation_results(
    metrics: Mapping[str, float], task: str | None, dataset: str | None, data: str
) -> list[EvalResult]:
    """Those of the metrics that the Hub shows, for the card's model index; none without a task."""
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
        for key, (kind, name) in HUB_METRICS.items()
        if key in metrics and task is not None
    ]


def describe_source(source: str) -> tuple[str, dict[str, Any]]:
    """A checkpoint's name for the card of what is made from it, and what its own card says that also holds there."""
    is_on_hub = not os.path.exists(source)
    name = source if is_on_hub else Path(source).resolve().name  # not where it lies on this machine
    try:
        found = metadata_load(str(cached_file(source, CARD_FILE))) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.info(f"{source} has no readable model card: {error}")
        found = {}
    kept = {entry: found[entry] for entry in KEPT_METADATA if found.get(entry) is not None}
    return name, kept | ({"base_model": source} if is_on_hub else {})


def name_repository(card: Path, repository: str) -> None:
    """Let a card of ours that was written before its model had a place on the Hub load it from there; a user's own
    stays as it is."""
    placeholder = f'from_pretrained("{PLACEHOLDER}"'.encode()
    content = card.read_bytes() if card.is_file() else b""
    if SIGNATURE.encode() in content and placeholder in content:
        card.write_bytes(content.replace(placeholder, f'from_pretrained("{repository}"'.encode()))


def architecture_facts(model) -> dict[str, Any]:
    """The rows that describe the architecture."""
    config = model.config
    facts = {"architecture": config.architectures[0]}  # sharded, the model is of a class of FSDP2's
    if isinstance(model, BertPreTrainedModel):
        size = embedding_size_of(config)
        facts["architecture"] += (
            f", {config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads"
        )
        facts["attention embedding dimension E"] = f"{size} ({size / config.hidden_size:.0%} of d)"
    facts["parameters"] = f"{model.num_parameters():,}"
    ranks = [entry["rank"] for entry in factorized_layers(model).values()]
    if ranks:
        facts[FACTORIZED_LAYERS] = f"{len(ranks)}, of rank {min(ranks)} to {max(ranks)}"
    return facts


def run_facts(starts: Sequence[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, str]:
    """The rows that describe software, data and speed: from ``provenance.json``'s starts, of which the last counts, and
    training metrics."""
    start = starts[-1]
    versions = start["versions"]
    names = ("fnl_hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "python")
    facts = {"versions": ", ".join(f"{name} {versions[name]}" for name in names)}
    for key, name in (("git_revision", "git revision"), ("data_fingerprint", "data fingerprint")):
        if start[key] is not None:
            facts[name] = start[key]
    devices = ", ".join(sorted(set(start["devices"])))
    facts["trained on"] = f"{start['world_size']} process{'es' * (start['world_size'] > 1)}, {devices}"
    if "train_runtime" in metrics:
        since = f", since the last of {len(starts)} starts" if len(starts) > 1 else ""
        facts["training time"] = duration(metrics["train_runtime"]) + since
    for unit, name in (("tokens", "non-padding tokens"), ("images", "images")):
        if f"train_{unit}_per_second" in metrics:
            rate, waited = metrics[f"train_{unit}_per_second"], metrics["train_data_wait"]
            facts["throughput"] = f"{rate:,.0f} {name}/s, waiting for data {waited:.1%} of the time"
    if "train_mfu" in metrics:
        facts["model FLOPs utilization"] = f"{metrics['train_mfu']:.1%} of {metrics['train_mfu_peak']}"
    if "train_peak_memory_gb" in metrics:
        facts["peak memory"] = f"{metrics['train_peak_memory_gb']:.2f} GB a process"
    return facts


def model_facts(model, args, data: str) -> dict[str, Any]:
    """The rows that describe architecture, data and optimizer."""
    facts = architecture_facts(model) | {
        "data": Path(data).name if os.path.exists(data) else data,  # not where it lies on this machine
        "optimizer": describe_optimizer(args),
    }
    return facts | ({"decay of the products": describe_decay(args)} if find_products(model) else {})


def training_facts(args, steps: int) -> dict[str, Any]:
    """The rows that describe how long a run of ``TrainingArguments`` trained, on which batches, schedule and seed."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    warmup = args.get_warmup_steps(steps)
    return {
        "steps": f"{steps:,}" + (f" ({args.num_train_epochs:g} epochs)" if args.max_steps <= 0 else ""),
        "batch": f"{batch:,} a step: {args.world_size} process{'es' * (args.world_size > 1)} x "
        f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated",
        "schedule": f"{SchedulerType(args.lr_scheduler_type).value}, {warmup:,} steps of warm-up",
        "seed": args.seed,
    }
