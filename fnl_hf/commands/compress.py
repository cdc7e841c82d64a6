"""Factorize or merge the layers of a checkpoint on disk or on the Hub, and save it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, PreTrainedModel

from fnl_hf.commands.calibration import WEIGHTS_ALONE, CalibrationText
from fnl_hf.commands.folders import complete_or_removed, refuse_bad_folder
from fnl_hf.errors import UserInputError
from fnl_hf.publishing.cards import FACTORIZED_LAYERS, describe_source, write_card
from fnl_hf.publishing.checkpoints import auto_class_of, copy_companions, find_companions, find_files, load_model
from fnl_hf.surgery.checkpoints import factorized_layers
from fnl_hf.surgery.config import FactorizationConfig
from fnl_hf.surgery.factorize import factorization_table, factorize, merge

TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


class ModelSize(NamedTuple):
    """The size of a model: parameters, bytes of its weights on disk, and floating point operations of a forward pass on
    the first calibration batch; None without calibration."""

    parameters: int
    bytes: int
    flops: int | None


class Compression(NamedTuple):
    """The new model, and the sizes of the original and of the new model."""

    model: PreTrainedModel
    original: ModelSize
    size: ModelSize


def factorize_checkpoint(
    source: str,
    folder: str | Path,
    config: FactorizationConfig,
    calibration: CalibrationText = WEIGHTS_ALONE,
) -> Compression:
    """:func:`fnl_hf.factorize` a checkpoint of any architecture, with its head, and save it in ``folder``.

    Args:
        calibration: text that says which directions of a trained model count; without any, the weights do.

    Raises:
        UserInputError: a folder in use or one that cannot be written, no such checkpoint, one that cannot be read or
            has code of its own, a configuration that does not fit it, or text for a model that reads none.
    """
    calibration.validate()

    def batches(model, tokenizer):
        if not calibration.files:
            return None
        if tokenizer is None:
            raise ValueError(
                f"{source} has no tokenizer, so --calibration_file cannot be used: calibrate it in Python, on its own "
                "inputs"
            )
        return list(calibration.cut_for(tokenizer, model).batches(tokenizer))

    what = "with factorized layers; not trained afterwards"
    if calibration.files:
        text = calibration.describe(calibration.samples)
        what = f"with factorized layers, calibrated on at most {text}; not trained afterwards"
    return _save_changed(source, folder, lambda model, data: factorize(model, config, data), what, batches)


def merge_checkpoint(source: str, folder: str | Path) -> Compression:
    """:func:`fnl_hf.merge` a checkpoint with factorized layers, and save it in ``folder``.

    Raises:
        UserInputError: as :func:`factorize_checkpoint`; a checkpoint without factorized layers.
    """

    def merged(model, data):
        if not factorized_layers(model):
            raise ValueError(f"{source} has no factorized layers to merge")
        return merge(model)

    return _save_changed(source, folder, merged, "with its factorized layers multiplied out")


def _save_changed(
    source: str,
    folder: str | Path,
    change: Callable[[Any, Any], Any],
    what: str,
    batches: Callable[[Any, Any], Any] = lambda model, tokenizer: None,
) -> Compression:
    folder = Path(folder)
    refuse_bad_folder(folder)
    model = load_model(source)
    tokenizer, companions = _load_tokenizer(source), find_companions(source)
    try:
        data = batches(model, tokenizer)
        before = _size_of(model, data)
        model = change(model, data)
        result = Compression(model, before, _size_of(model, data))
    except UserInputError:
        raise
    except (OSError, ValueError) as error:
        raise UserInputError(str(error)) from error
    with complete_or_removed(folder):
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        copy_companions(companions, folder)
        _write_card(folder, source, result, what)
    return result


def _size_of(model: PreTrainedModel, batches: Any) -> ModelSize:
    weights = {id(p): p for p in [*model.parameters(), *model.buffers()]}.values()  # tied ones are saved once
    flops = None
    if batches:
        # With gradients: without them, the counter refuses slices of weights as inputs of layers (DeBERTa).
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            try:
                model(**batches[0])
            except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
                raise ValueError(f"{type(model).__name__} cannot be calibrated on text: {error}") from error
        flops = counter.get_total_flops()
    return ModelSize(model.num_parameters(), sum(w.numel() * w.element_size() for w in weights), flops)


def _load_tokenizer(source: str) -> Any:
    """None if the checkpoint has no tokenizer files: Transformers would create a tokenizer without vocabulary.

    Raises:
        UserInputError: its files do not make a tokenizer.
    """
    if not find_files(source, TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other
        raise UserInputError(f"{source}: its tokenizer cannot be read: {error}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserInputError(f"{source}: its tokenizer has only its {len(tokenizer)} special tokens and no vocabulary")
    return tokenizer


def _write_card(folder: Path, source: str, result: Compression, what: str) -> None:
    name, metadata = describe_source(source)
    model = result.model
    layers = factorized_layers(model)
    parameters = f"{result.size.parameters:,} instead of {result.original.parameters:,}"
    facts = {"architecture": type(model).__name__, "parameters": parameters}
    write_card(
        folder,
        title=folder.resolve().name,
        description=f"{name}, {what}.",
        auto_class=auto_class_of(model),
        model=model,
        facts=facts | ({FACTORIZED_LAYERS: len(layers)} if layers else {}),
        metadata=metadata,
        section=f"## Layers\n\n```\n{factorization_table(model)}\n```" if layers else "",
        cites=True,
    )
