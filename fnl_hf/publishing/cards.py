"""The README.md of a saved model, as the Hub shows it: what it is, how it is loaded, what is to be cited."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers import BertPreTrainedModel, PreTrainedModel
from transformers.utils import cached_file, logging

from fnl_hf.bert.conversion_fnl_bert import embedding_size_of
from fnl_hf.bert.modeling_fnl_bert import FnlBertPreTrainedModel
from fnl_hf.surgery.checkpoints import factorized_layers

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
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
}
# What prepares a model's inputs: the file that tells of it -> a name, and the class that loads it.
PREPARATIONS = {
    "processor_config.json": ("processor", "AutoProcessor"),  # with a tokenizer in it, where there is one
    "preprocessor_config.json": ("processor", "AutoProcessor"),
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
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
{imports}

{preparation}model = {auto_class}.from_pretrained("{repository}"{remote})
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

ATTENTION = """The attention of each layer is 2H factorized layers, Q_h K_hᵀ and V_h O_hᵀ, with an adjustable embedding
dimension E. """
LAYERS = "The weights of its factorized layers ({count}) are products of two or three matrices. "
METHOD = """
## Method

{what}The method is that of Khodak, Tenenholtz, Mackey and Fusi, *Initialization and Regularization of Factorized
Neural Layers*, ICLR 2021, [arXiv:2105.01029](https://arxiv.org/abs/2105.01029).
"""
CITATION = """
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
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    metadata: Mapping[str, Any],
    section: str = "",
    cites: bool = False,
    repository: str | None = None,
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
    """
    own, layers = isinstance(model, FnlBertPreTrainedModel), factorized_layers(model)
    task = TASKS.get(auto_class)
    tags = [*["fnl_bert"] * own, *["factorized-layers"] * (own or bool(layers)), *([task] if task else ())]
    data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=tags or None, **metadata)
    remote = ", trust_remote_code=True" if model._auto_class is not None and not (own and layers) else ""
    names = {"auto_class": auto_class, "repository": repository or UNNAMED}
    what = (ATTENTION if own else "") + (LAYERS.format(count=len(layers)) if layers else "")
    imports, preparation = _loading_code(Path(folder), bool(layers), remote, **names)
    card = CARD.format(
        metadata=data.to_yaml(),
        title=title,
        description=description,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        section=f"\n{section}\n" if section else "",
        imports=imports,
        preparation=preparation,
        remote=remote,
        with_fnl_hf=WITH_FNL_HF.format(**names) if own and not layers else "",
        method=METHOD.format(what=what) + CITATION if what or cites else "",
        **names,
    )
    ModelCard(card).save(Path(folder) / CARD_FILE)


def _loading_code(folder: Path, with_package: bool, remote: str, auto_class: str, repository: str) -> tuple[str, str]:
    """The imports of the code that loads the model, and its line for what prepares the inputs."""
    found = next((entry for file, entry in PREPARATIONS.items() if (folder / file).exists()), None)
    classes = ", ".join(sorted([auto_class, *([found[1]] if found else ())]))
    imports = f"import fnl_hf  # {FACTORIZED_LAYERS}\n" if with_package else ""
    # A tokenizer is none of the model's code; a processor is looked for by the model's configuration.
    own_code = remote if found and found[1] == "AutoProcessor" else ""
    line = f'{found[0]} = {found[1]}.from_pretrained("{repository}"{own_code})\n' if found else ""
    return f"{imports}from transformers import {classes}", line


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
