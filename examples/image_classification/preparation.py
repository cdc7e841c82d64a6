"""How a model wants its images. Transformers' processor scales and crops them, batches are normalised later."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import get_image_processor_config

from fnl_hf.errors import UserInputError


@dataclass(frozen=True)
class Preparation:
    """Makes pixels of images; None where the data decide.

    Args:
        processor: one of Transformers, for Pillow (those for torchvision need it); None takes images as they are.
        channels: 1 (grey) or 3.
        mean, std: of the channels, for pixels from 0 to 1.
    """

    processor: Any = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of_model(cls, name: str, config: Any) -> "Preparation":
        """As the processor beside a model's weights says; without one, at the model's size.

        Raises:
            UserInputError: a processor that does more than scale, crop and normalise.
        """
        entries, channels = get_image_processor_config(name), getattr(config, "num_channels", 3)
        if not entries:
            size = getattr(config, "image_size", None)
            return cls(None if size is None else cropping_processor(size), channels)
        processor = _processor_of(name, entries)
        if getattr(processor, "rescale_offset", False):
            raise UserInputError(f"{name}: its processor, {type(processor).__name__}, shifts pixels (rescale_offset)")
        mean, std = (0.0,) * channels, (1.0,) * channels
        if processor.do_normalize:
            mean, std = (_per_channel(values, channels) for values in (processor.image_mean, processor.image_std))
        unit = 255 * processor.rescale_factor if processor.do_rescale else 255.0
        return cls(processor, channels, tuple(m / unit for m in mean), tuple(s / unit for s in std))

    def resized(self, size: int) -> "Preparation":
        """The same for images of another size, with the same share of them cut off at the edges."""
        if self.processor is None:
            return replace(self, processor=cropping_processor(size))
        before = dict(self.processor.size)
        target, crop = {"height": size, "width": size}, getattr(self.processor, "crop_size", None)
        if getattr(self.processor, "do_center_crop", False) and crop is not None:
            self.processor.size = {key: round(edge * size / crop["height"]) for key, edge in before.items()}
            self.processor.crop_size = target
        else:
            self.processor.size = {"shortest_edge": size} if "shortest_edge" in before else target
        return self

    def completed(self, train: Any) -> "Preparation":
        """With all that was left open as the training :class:`data.Images` have it."""
        _, height, width, channels = train.pixels.shape
        mean, std = train.mean_and_std()
        processor = transformers.ViTImageProcessorPil(size={"height": height, "width": width}, resample=2)
        found = {"processor": processor, "channels": channels, "mean": mean, "std": std}
        return replace(self, **{name: value for name, value in found.items() if getattr(self, name) is None})

    def save(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``, for this script and for Transformers."""
        self.processor.image_mean, self.processor.image_std = self.mean, self.std
        self.processor.do_normalize = self.processor.do_rescale = True
        self.processor.rescale_factor = 1 / 255
        self.processor.save_pretrained(folder)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 (H, W, C).

        Raises:
            ValueError: pixels of more than 16 bits.
        """
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels have 32 bits (mode {image.mode}), of what range is not known")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        grey = image.mode in ("1", "L") if self.channels is None else self.channels == 1
        image = image.convert("L").convert("RGB") if grey else image.convert("RGB")
        pixels = np.asarray(image)
        if self.processor is not None:
            scaled = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
            pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        return pixels[:, :, :1] if grey else pixels


def cropping_processor(size: Any) -> Any:
    """Scales the shorter side to ``size`` and cuts the longer one; a pair (H, W) is stretched to."""
    if not isinstance(size, int):
        return transformers.ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, resample=2)
    square = {"height": size, "width": size}
    return transformers.BitImageProcessorPil(size={"shortest_edge": size}, crop_size=square, resample=2)


def _processor_of(name: str, entries: dict[str, Any]) -> Any:
    kind = entries.get("image_processor_type") or entries.get("feature_extractor_type", "")
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    processor_class = getattr(transformers, f"{kind}Pil", None) if kind else None
    if processor_class is None:
        raise UserInputError(f"{name}: its image processor ({kind or 'of no known type'}) has no version for Pillow")
    return processor_class.from_dict(entries)


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """Those of a processor; for a model of one channel the mean of the three."""
    if isinstance(values, int | float):
        return (float(values),) * channels
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
