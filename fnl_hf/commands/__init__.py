"""The command ``fnl-hf``: operations on trained checkpoints."""

from fnl_hf.commands.compress import Compression, ModelSize, factorize_checkpoint, merge_checkpoint
from fnl_hf.commands.export import export_onnx, export_program

__all__ = ["Compression", "ModelSize", "export_onnx", "export_program", "factorize_checkpoint", "merge_checkpoint"]
