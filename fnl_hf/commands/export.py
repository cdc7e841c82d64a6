"""Models for serving: ``torch.export`` programs and ONNX files.

Shapes: B batch, S sequence, both free in what is written.
"""

import copy
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fnl_hf.bert.evaluation import evaluation_mode
from fnl_hf.bert.factorization import without_autocast
from fnl_hf.commands.folders import refuse_bad_file
from fnl_hf.errors import UserInputError

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SUFFIX = ".onnx"
INSTALL = "pip install onnx onnxscript onnxruntime"
TOLERANCE = 1e-4  # maximum absolute difference between ONNX Runtime and PyTorch


class _PositionalModel(nn.Module):
    """A model with the three inputs in order and a tuple of tensors as outputs, as exporters require: without what is
    no tensor, such as the hidden states that some configurations ask for."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids):
        return tuple(self.named(input_ids, attention_mask, token_type_ids).values())

    def named(self, input_ids, attention_mask, token_type_ids) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        outputs = self.model(**inputs, return_dict=True)
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def export_program(model: PreTrainedModel) -> torch.export.ExportedProgram:
    """The forward pass as a program of (input_ids, attention_mask, token_type_ids), (B, S) each; B and S are free. The
    program is of evaluation mode; the mode of the model does not change.

    It returns the model's outputs as a tuple, logits first, without the hidden states and attention weights of single
    layers.

    Raises:
        UserInputError: no model of Transformers, or a head for multiple choice, whose inputs have one dimension more.
    """
    _validate_model(model)
    dimensions = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with (
        evaluation_mode(model),
        without_autocast(model.parameters()),
        warnings.catch_warnings(action="ignore"),  # exporters warn about their own internals
    ):
        return torch.export.export(
            _PositionalModel(model), _example_inputs(model, 3, 7), dynamic_shapes=dict.fromkeys(INPUTS, dimensions)
        )


def export_onnx(model: PreTrainedModel, file: str | Path) -> float:
    """Write the forward pass as ONNX and compare it with PyTorch in ONNX Runtime, at other sizes than those of tracing.

    Both use a copy of the model, in float32 on the CPU.

    Returns:
        The largest difference of any output, in absolute terms.

    Raises:
        UserInputError: a package is missing, the file is no .onnx, exists or cannot be written, or the difference is
            above 1e-4; then there is no file.
    """
    file = Path(file)
    refuse_bad_file(file, SUFFIX)
    refuse_bad_file(file.with_name(f"{file.name}.data"), ".data")  # weights of a model above 2 GB
    _validate_model(model)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UserInputError(f"exporting to ONNX needs {error.name}: {INSTALL}") from error
    model = copy.deepcopy(model).float().cpu().eval()
    with without_autocast(model.parameters()):
        return _write_checked(model, file)


def _validate_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UserInputError(f"a {type(model).__name__} is not a model of Transformers: load the model first")
    if "MultipleChoice" in type(model).__name__:
        raise UserInputError(f"{type(model).__name__} reads (B, choices, S): export its encoder instead")


def _write_checked(model: PreTrainedModel, file: Path) -> float:
    import onnxruntime

    names = list(_PositionalModel(model).named(*_example_inputs(model, 2, 5)))
    with warnings.catch_warnings(action="ignore"):
        program: Any = torch.onnx.export(
            export_program(model), input_names=list(INPUTS), output_names=names, dynamo=True, verbose=False
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:
            program.save(f"{folder}/{file.name}")
            session = onnxruntime.InferenceSession(f"{folder}/{file.name}", providers=["CPUExecutionProvider"])
            found = [_largest_difference(session, model, *sizes) for sizes in ((1, 1), (2, 13), (5, 8))]
            difference = torch.tensor(found).max().item()  # Python's max may lose a NaN
            if not difference <= TOLERANCE:
                raise UserInputError(
                    f"{file}: the outputs of ONNX and PyTorch differ by {difference:.2g}, more than {TOLERANCE}"
                )
            for written in Path(folder).iterdir():  # next to the file, its weights if they are too large for it
                written.replace(file.parent / written.name)
    except OSError as error:
        raise UserInputError(f"{file}: {error}") from error
    return difference


@torch.no_grad()
def _largest_difference(session, model: PreTrainedModel, batch: int, length: int) -> float:
    inputs = _example_inputs(model, batch, min(length, model.config.max_position_embeddings))
    present = inputs[1].bool()
    found = session.run(None, {name: value.numpy() for name, value in zip(INPUTS, inputs)})
    expected = _PositionalModel(model)(*inputs)
    pairs = [(torch.from_numpy(ours), theirs) for ours, theirs in zip(found, expected, strict=True)]
    differences = [
        (ours - theirs)[present if theirs.shape[:2] == present.shape else ...].abs().max() for ours, theirs in pairs
    ]
    return torch.stack(differences).max().item()


def _example_inputs(model: PreTrainedModel, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random ids, a mask that pads the last row by a third, two segments; each (B, S)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 3 :] = 0
    segments = (torch.arange(length) >= length // 2).long().expand(batch, -1)
    segments = segments.clamp(max=model.config.type_vocab_size - 1)
    return ids.to(model.device), mask.to(model.device), segments.to(model.device)
