"""The README.md of a saved model, as the Hub shows it: what it is, how it is loaded, what is to be cited."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers.utils import cached_file, logging

from fnl_hf.conversion_fnl_bert import embedding_size_of
from fnl_hf.factorized_checkpoints import factorized_layers

logger = logging.get_logger(__name__)
CARD_FILE = "README.md"
KEPT_METADATA = ("license", "license_name", "license_link", "language", "base_model")  # of the original's card
FACTORIZED_LAYERS = "factorized layers"
UNNAMED = "path/to/this/model"  # where the repository is not known
# auto class -> the Hub's name of its task, where it has one
TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForPreTraining": "fill-mask",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMultipleChoice": "multiple-choice",
}

CARD = """---
{metadata}
---

# {title}

{description}

| | |
|---|---|
{facts}
{section}
## Use

```python
{imports}from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = {auto_class}.from_pretrained("{repository}"{remote})
```
{with_fnl_hf}{method}"""

WITH_FNL_HF = """
The code of the model comes with its weights. Where fnl_hf is installed, its own is used:

```python
import fnl_hf
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repository}")
```
"""

METHOD = """
## Method

The attention of each layer is 2H factorized layers, Q_h K_hᵀ and V_h O_hᵀ, with an adjustable embedding dimension E
(Khodak, Tenenholtz, Mackey and Fusi, *Initialization and Regularization of Factorized Neural Layers*, ICLR 2021,
[arXiv:2105.01029](https://arxiv.org/abs/2105.01029)).

```bibtex
@inproceedings{khodak2021initialization,
  title = {Initialization and Regularization of Factorized Neural Layers},
  author = {Khodak, Mikhail and Tenenholtz, Neil and Mackey, Lester and Fusi, Nicol{\\`o}},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  eprint = {2105.01029},
  archivePrefix = {arXiv}
}
```
"""


def write_card(
    folder: str | Path,
    title: str,
    description: str,
    auto_class: str,
    factorized: bool,
    facts: Mapping[str, Any],
    metadata: Mapping[str, Any],
    section: str = "",
    cites: bool = False,
    repository: str | None = None,
) -> None:
    """Write ``folder/README.md``.

    Args:
        auto_class: what loads the model; the Hub's task follows from it.
        factorized: a model of ours, whose code comes with it, not a stock one.
        facts: the rows of a table; with :data:`FACTORIZED_LAYERS` among them the model is loaded with fnl_hf only.
        metadata: more entries of ``huggingface_hub.ModelCardData``.
        section: Markdown between the facts and how the model is loaded.
        cites: explain and cite the method for a stock model, too.
        repository: the Hub's name of the model, None if there is none.
    """
    task = TASKS.get(auto_class)
    tags = [*(("fnl_bert", "factorized-layers") if factorized else ()), *([task] if task else ())]
    data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=tags or None, **metadata)
    with_package = FACTORIZED_LAYERS in facts
    names = {"auto_class": auto_class, "repository": repository or UNNAMED}
    card = CARD.format(
        metadata=data.to_yaml(),
        title=title,
        description=description,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        section=f"\n{section}\n" if section else "",
        imports=f"import fnl_hf  # {FACTORIZED_LAYERS}\n" if with_package else "",
        remote=", trust_remote_code=True" if factorized and not with_package else "",
        with_fnl_hf=WITH_FNL_HF.format(**names) if factorized and not with_package else "",
        method=METHOD if factorized or cites else "",
        **names,
    )
    ModelCard(card).save(Path(folder) / CARD_FILE)


def describe_source(source: str) -> tuple[str, dict[str, Any]]:
    """A checkpoint's name for the card of what is made from it, and what its own card says that also holds there."""
    on_hub = not Path(source).exists()
    name = source if on_hub else Path(source).resolve().name  # not where it lies on this machine
    try:
        found = metadata_load(str(cached_file(source, CARD_FILE))) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.info(f"{source} has no model card that can be read: {error}")
        found = {}
    kept = {entry: found[entry] for entry in KEPT_METADATA if found.get(entry) is not None}
    return name, kept | ({"base_model": source} if on_hub else {})


def name_repository(card: Path, repository: str) -> None:
    """Let a card that was written before its model had a place on the Hub load it from there."""
    if card.is_file() and UNNAMED in (text := card.read_text(encoding="utf-8")):
        card.write_text(text.replace(UNNAMED, repository), encoding="utf-8")


def architecture_facts(model) -> dict[str, Any]:
    """The rows that describe the architecture."""
    config = model.config
    size = embedding_size_of(config)
    ranks = [entry["rank"] for entry in factorized_layers(model).values()]
    layers = {FACTORIZED_LAYERS: f"{len(ranks)}, of rank {min(ranks)} to {max(ranks)}"} if ranks else {}
    return {
        # Sharded, the model is of a class of FSDP2's.
        "architecture": f"{config.architectures[0]}, {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, {config.num_attention_heads} heads",
        "attention embedding dimension E": f"{size} ({size / config.hidden_size:.0%} of d)",
        "parameters": f"{model.num_parameters():,}",
        **layers,
    }
