"""ResNets for small images (He, Zhang, Ren and Sun 2015, arXiv 1512.03385, section 4.2), as Transformers models.

Three stages of n blocks of two 3×3 convolutions with 16, 32 and 64 channels: depth 6n + 2. Shortcuts have no parameters
(option A). This file travels with checkpoints, so it imports nothing but torch and transformers.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

CHANNELS = (16, 32, 64)  # of the stages, at width 1


@strict
class CifarResNetConfig(PreTrainedConfig):
    """Configuration of :class:`CifarResNetForImageClassification`.

    Args:
        depth: layers, 6n + 2: 20, 32, 44, 56, 110, ...
        width_multiplier: times 16, 32 and 64 channels.
        num_channels: of the images.

    Raises:
        StrictDataclassError: a depth that is not 6n + 2, or no channels.
    """

    model_type = "cifar_resnet"

    depth: int = 20
    width_multiplier: int = 1
    num_channels: int = 3

    def validate_sizes(self):
        """Part of ``@strict``'s validation."""
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"depth ({self.depth}) must be 6n + 2: 8, 14, 20, 26, 32, 38, 44, 50, 56, ... 110")
        for name in ("width_multiplier", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))); where the stride is 2 or channels are added, the shortcut takes every
    other pixel and pads the channels with zeros on both sides."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride = stride
        before = (channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, channels - in_channels - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        if any(self.padding):
            shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], self.padding)
        x = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(shortcut + self.norm2(self.conv2(x)))


class CifarResNet(nn.Module):
    """Images (B, C, H, W) of any size to features (B, D): the means over the last stage's channels."""

    def __init__(self, config: CifarResNetConfig):
        super().__init__()
        widths = [config.width_multiplier * channels for channels in CHANNELS]
        self.stem = nn.Conv2d(config.num_channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks, before = [], widths[0]
        for stage, width in enumerate(widths):
            for index in range((config.depth - 2) // 6):
                blocks.append(BasicBlock(before, width, stride=2 if stage > 0 and index == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(pixel_values)))
        return self.blocks(x).mean(dim=(2, 3))


class CifarResNetForImageClassification(PreTrainedModel):
    """Images (B, C, H, W) to logits (B, K); with labels (B,), the mean cross-entropy."""

    config_class = CifarResNetConfig
    config: CifarResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.resnet = CifarResNet(config)
        classes: int = config.num_labels  # type: ignore[assignment]
        self.classifier = nn.Linear(CHANNELS[-1] * config.width_multiplier, classes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Kaiming's normal initialization of the weights, as in the authors' code."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_normal_(module.weight)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutputWithNoAttention | tuple[torch.Tensor, ...]:
        logits = self.classifier(self.resnet(pixel_values))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register("cifar_resnet", CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
