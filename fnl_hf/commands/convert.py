"""Convert a checkpoint on disk or on the Hub: BERT, RoBERTa and others to FNL-BERT with another attention size, and
back to BERT."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from fnl_hf.bert import modeling_fnl_bert
from fnl_hf.bert.conversion_fnl_bert import embedding_size_of, needed_kernel, read_as_bert
from fnl_hf.bert.head_mixing import Truncation
from fnl_hf.bert.other_names import NAMINGS, head_of
from fnl_hf.commands.calibration import WEIGHTS_ALONE, CalibrationText
from fnl_hf.commands.folders import complete_or_removed, refuse_bad_folder
from fnl_hf.data.tokenizer import load_tokenizer
from fnl_hf.errors import UserInputError
from fnl_hf.publishing.cards import FACTORIZED_LAYERS, architecture_facts, describe_source, write_card
from fnl_hf.publishing.checkpoints import copy_companions, find_companions, reading, refuse_misfits
from fnl_hf.surgery.checkpoints import factorized_layers
from fnl_hf.surgery.factorize import merge

logger = logging.get_logger(__name__)
SPECTRA_FILE = "spectra.png"
TITLES = {"qk": "$Q_h K_h^T$", "vo": "$V_h O_h^T$"}

TRUNCATION = """## Truncation

Each product's Frobenius norm, what was kept of it and what was lost, (Σ σ²)^½ over its heads:

```
{table}
```

![spectra]({plot})"""


class Conversion(NamedTuple):
    """The original and the converted model, and what each product lost."""

    original: PreTrainedModel
    model: PreTrainedModel
    truncations: list[Truncation]


def convert_checkpoint(
    source: str,
    folder: str | Path,
    to: str = "fnl_bert",
    attention_embedding_size: int | None = None,
    calibration: CalibrationText = WEIGHTS_ALONE,
) -> Conversion:
    """Convert the checkpoint ``source``, with its head, and save it in ``folder``, with its tokenizer and other files
    such as those of sentence-transformers.

    Args:
        to: "fnl_bert" or "bert", whose layers are dense: factorized ones are multiplied out.
        attention_embedding_size: E of an FNL-BERT; by default that of ``source``.
        calibration: text that says which directions count; without any, the weights do. At the same E it has no
            effect, with a warning. Its documents are cut to what ``source`` reads.

    Returns:
        Both models, and what each product lost. The folder has a model card, too; where E became smaller, the spectra
        of the products are drawn in ``spectra.png``.

    Raises:
        UserInputError: a folder in use or one that cannot be written, no such checkpoint, one that cannot be read,
            another architecture, a head that computes something else than BERT's, or sizes that do not fit.
    """
    folder = Path(folder)
    refuse_bad_folder(folder)
    if to == "bert" and (attention_embedding_size is not None or calibration.files):
        raise UserInputError("a BERT has no attention_embedding_size of its own: truncate first, then convert to BERT")
    calibration.validate()
    tokenizer, companions = load_tokenizer(source), find_companions(source)
    original = load_model(source)
    fnl_class = _fnl_class(type(original).__name__)
    if calibration.files and attention_embedding_size in (None, embedding_size_of(original.config)):
        logger.warning("calibration_file has no effect: only a smaller attention_embedding_size truncates")
        calibration = WEIGHTS_ALONE
    if calibration.files:
        calibration = calibration.cut_for(tokenizer, original)
    try:
        batches = list(calibration.batches(tokenizer))
        if to == "bert":
            result = Conversion(original, _to_bert(original), [])
        else:
            shown = logging.tqdm(batches, desc="Calibrating", unit="batch") if batches else None
            converted = fnl_class.from_bert(original, attention_embedding_size, shown, True)
            result = Conversion(original, *converted)
    except UserInputError:
        raise
    except (OSError, ValueError) as error:
        raise UserInputError(str(error)) from error
    documents = sum(len(batch["input_ids"]) for batch in batches)
    text = calibration.describe(documents) if documents else None
    with complete_or_removed(folder):
        result.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_companions(companions, folder)
        if result.truncations:
            plot_spectra(result.truncations, folder / SPECTRA_FILE)
        _write_conversion_card(folder, source, result, text)
    return result


def _to_bert(model: PreTrainedModel) -> PreTrainedModel:
    """The stock BERT, with dense layers, that computes the same as ``model``, which does not change."""
    if isinstance(model, modeling_fnl_bert.FnlBertPreTrainedModel):
        return model.to_bert()
    merged: Any = merge(copy.deepcopy(model)) if factorized_layers(model) else model
    return as_bert(merged)


def as_bert(model: PreTrainedModel) -> PreTrainedModel:
    """A RoBERTa or another BERT by another name as the stock BERT that it is; any other model unchanged."""
    if model.config.model_type not in NAMINGS:
        return model
    return read_as_bert(model, head_of(type(model).__name__) or "Model")


def _fnl_class(name: str) -> type[modeling_fnl_bert.FnlBertPreTrainedModel]:
    """Our class for the head of a class, stock or ours; our encoder if we have no such head."""
    return getattr(modeling_fnl_bert, f"FnlBert{head_of(name)}", modeling_fnl_bert.FnlBertModel)


def load_model(source: str) -> PreTrainedModel:
    """The BERT, BERT by another name or FNL-BERT of a checkpoint, with its head; without the head, and with a warning,
    if we have none for its task.

    Raises:
        UserInputError: no such checkpoint, one that cannot be read, another architecture, a head that computes
            something else than BERT's, or weights that do not fit.
    """
    with reading(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        saved_class, *_ = config.architectures or ["BertModel"]
        fnl_class = _fnl_class(saved_class)
        found: Any = fnl_class.load_bert(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **needed_kernel(config.to_dict())
        )
        if fnl_class is modeling_fnl_bert.FnlBertModel and head_of(saved_class) != "Model":
            logger.warning(
                f"{source}: the head of {saved_class} is left out, because FNL-BERT has no head for its task"
            )
    model, info = found
    refuse_misfits(source, model, info)
    return model


def _write_conversion_card(folder: Path, source: str, result: Conversion, calibration: str | None) -> None:
    """Write ``folder/README.md``; license, language and base model are those of the original's card.

    Args:
        calibration: the text whose activations weighed the truncation; None for a truncation by the weights alone.
    """
    original, model, truncations = result
    is_fnl_bert = isinstance(model, modeling_fnl_bert.FnlBertPreTrainedModel)
    name, metadata = describe_source(source)
    kind = "An FNL-BERT" if is_fnl_bert else "A stock BERT"
    description, section, truncated = f"{kind} that computes what {name} does.", "", "none"
    if truncations:
        description = f"{kind} with smaller attention, truncated from {name} and not trained afterwards."
        section = TRUNCATION.format(table=truncation_table(truncations), plot=SPECTRA_FILE)
        way = f"SVD calibrated on {calibration}" if calibration else "plain SVD"
        truncated = f"each Q_h K_hᵀ and V_h O_hᵀ to rank {truncations[0].rank} by {way}"
    facts = {
        "converted from": f"{name}, {type(original).__name__}",
        "E before": embedding_size_of(original.config),
        "parameters before": f"{original.num_parameters():,}",
        "truncation": truncated,
    }
    if products := len(factorized_layers(original)) - len(factorized_layers(model)):
        facts[FACTORIZED_LAYERS] = f"{products} of the original, multiplied out"
    head = type(model).__name__.removeprefix("Fnl")
    write_card(
        folder,
        title=folder.resolve().name,
        description=description,
        auto_class=next(auto for auto, ours in modeling_fnl_bert.AUTO_CLASSES.items() if ours == f"Fnl{head}"),
        model=model,
        facts=architecture_facts(model) | facts,
        metadata=metadata,
        section=section,
        cites=True,
    )


def truncation_table(truncations: Sequence[Truncation]) -> str:
    """One line per product: its norm, and the kept and the lost part of it."""
    lines = [f"{'product':<44}{'rank':>6}{'norm':>10}{'kept':>10}{'lost':>10}{'lost²':>9}"]
    for product in truncations:
        norm = (product.kept**2 + product.lost**2) ** 0.5
        share = product.lost**2 / norm**2 if norm else 0.0
        sizes = f"{product.rank:>6}{norm:>10.4g}{product.kept:>10.4g}{product.lost:>10.4g}{share:>9.2%}"
        lines.append(f"{product.name:<44}{sizes}")
    return "\n".join(lines)


def plot_spectra(truncations: Sequence[Truncation], file: str | Path) -> None:
    """Write a PNG: for each kind of product the singular values of its heads, a line for the median head of each layer
    and a shade from the smallest to the largest, and the rank that was kept."""
    kinds = list(dict.fromkeys(product.kind for product in truncations))
    figure, rows = plt.subplots(1, len(kinds), figsize=(6.4 * len(kinds), 4.4), layout="constrained", squeeze=False)
    for axes, kind in zip(rows[0], kinds):
        chosen = [product for product in truncations if product.kind == kind]
        for layer, product in enumerate(chosen):
            values = product.singular_values.cpu()  # (heads, rank before)
            index = range(1, values.shape[1] + 1)
            color = plt.get_cmap("viridis")(0.9 * layer / max(1, len(chosen) - 1))
            axes.plot(index, values.median(dim=0).values, color=color, label=f"layer {layer}")
            axes.fill_between(index, values.amin(dim=0), values.amax(dim=0), color=color, alpha=0.08, linewidth=0)
        axes.axvline(chosen[0].rank + 0.5, color="black", linestyle="--", linewidth=1)
        axes.set(yscale="log", title=TITLES[kind], xlabel=f"index (the first {chosen[0].rank} are kept: dashed line)")
    figure.suptitle("lines: median head of each layer; shaded: range over its heads", fontsize=10)
    rows[0][0].set_ylabel("singular values of the heads")
    rows[0][0].legend(fontsize=8, ncols=2)
    figure.savefig(file, dpi=120)
    plt.close(figure)
