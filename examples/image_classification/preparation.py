"""How a model wants its images. Transformers' processor scales and crops them, batches are normalized later."""

import copy
from dataclasses import dataclass
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
        channels: 1 (gray) or 3.
        mean, std: what the processor normalizes the channels by, for pixels from 0 to 1; None if it does not.
    """

    processor: Any = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of_model(cls, name: str, config: Any) -> "Preparation":
        """As the processor beside a model's weights says; without one, at the model's size.

        Raises:
            UserInputError: a processor that does more than scale, crop and normalize.
        """
        entries, channels = get_image_processor_config(name), getattr(config, "num_channels", 3)
        if not entries:
            size = getattr(config, "image_size", None)
            return cls(None if size is None else cropping_processor(size), channels)
        processor = _processor_of(name, entries)
        if channels == 1 and len(processor.image_mean or ()) == 3:
            for entry in ("image_mean", "image_std"):
                setattr(processor, entry, [float(np.mean(getattr(processor, entry)))])
        blank = _prepared_blank(name, processor, channels)
        mean, std = -blank[0] / (blank[1] - blank[0]), 1 / (blank[1] - blank[0])
        return cls(processor, channels, tuple(mean[:, 0, 0].tolist()), tuple(std[:, 0, 0].tolist()))

    def resized(self, size: int) -> "Preparation":
        """The same for square images of another size.

        Raises:
            UserInputError: a processor that cannot make such.
        """
        if self.mean is None or self.channels is None:
            return Preparation(cropping_processor(size), self.channels)
        processor = copy.deepcopy(self.processor)
        before, square = dict(processor.size or {}), {"height": size, "width": size}
        crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        if crop is None:
            processor.size = {"shortest_edge": size} if "shortest_edge" in before else square
        else:
            processor.size = {key: round(edge * size / crop["height"]) for key, edge in before.items()}
            processor.crop_size = square
        found = _prepared_blank("--image_size", processor, self.channels).shape[2:]
        if found != (size, size):
            raise UserInputError(f"--image_size {size}: {type(processor).__name__} changes it to {found}")
        return Preparation(processor, self.channels, self.mean, self.std)

    def completed(self, train: Any) -> "Preparation":
        """With all that was left open as the training :class:`data.Images` have it."""
        if self.mean is not None:
            return self
        _, height, width, channels = train.pixels.shape
        mean, std = train.mean_and_std()
        processor = copy.deepcopy(self.processor) or cropping_processor((height, width))
        processor.do_rescale = processor.do_normalize = True
        processor.image_mean, processor.image_std = mean, std
        return Preparation(processor, channels, mean, std)

    def save(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``, for this script and for Transformers."""
        self.processor.save_pretrained(folder)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8 (H, W, C).

        Raises:
            ValueError: pixels of more than 16 bits.
        """
        if image.mode in ("I", "F"):
            raise ValueError(f"it has 32-bit pixels (mode {image.mode}) of unknown range")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        gray = image.mode in ("1", "L") if self.channels is None else self.channels == 1
        image = image.convert("L" if gray else "RGB")
        if self.processor is None:
            pixels = np.asarray(image)
            return pixels[:, :, None] if gray else pixels
        pixels = self.processor(image, return_tensors="np")["pixel_values"][0]
        if self.mean is not None:  # back to bytes, as they were between scaling and normalizing
            mean, std = (np.array(values)[:, None, None] for values in (self.mean, self.std))
            pixels = np.clip(np.rint(255 * (pixels * std + mean)), 0, 255)
        return pixels.astype(np.uint8).transpose(1, 2, 0)


def cropping_processor(size: int | tuple[int, int]) -> Any:
    """Scales the shorter side to ``size`` and cuts the longer one, or stretches to (H, W). Normalizes nothing."""
    plain: dict[str, Any] = {"resample": Image.Resampling.BILINEAR, "do_rescale": False, "do_normalize": False}
    if not isinstance(size, int):
        return transformers.ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, **plain)
    square = {"height": size, "width": size}
    return transformers.BitImageProcessorPil(size={"shortest_edge": size}, crop_size=square, **plain)


def _processor_of(name: str, entries: dict[str, Any]) -> Any:
    kind = entries.get("image_processor_type") or entries.get("feature_extractor_type", "")
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    processor_class = getattr(transformers, f"{kind}Pil", None) if kind else None
    if processor_class is None:
        raise UserInputError(f"{name}: its image processor ({kind or 'of unknown type'}) has no version for Pillow")
    return processor_class.from_dict(entries)


def _prepared_blank(name: str, processor: Any, channels: int) -> np.ndarray:
    """A black and a white image (2, C, H, W) as the processor makes them: normalizing is the line between the two.

    Raises:
        UserInputError: they are not of one color then, or no images at all.
    """
    blanks = [Image.new("L", (300, 260), level) for level in (0, 255)]
    try:
        images = [blank if channels == 1 else blank.convert("RGB") for blank in blanks]
        made = np.stack([processor(image, return_tensors="np")["pixel_values"][0] for image in images]).astype(float)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserInputError(f"{name}: {type(processor).__name__} cannot be used: {error}") from error
    is_plain = made.ndim == 4 and made.shape[1] == channels and np.ptp(made, axis=(2, 3)).max() < 1e-5
    if not is_plain or not (made[1] > made[0]).all():
        raise UserInputError(
            f"{name}: {type(processor).__name__} must only scale, crop and normalize images, but does more"
        )
    return made
