"""Images in memory: from IDX files, folders or the Hub; cropped, flipped and normalized a batch at a time.

All images of a split are one uint8 tensor. Shapes: N images, B of a batch, height H, width W, C channels.
"""

import glob
import gzip
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import xxhash
from datasets import ClassLabel, Dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from fnl_hf.data.masking import draw_bits
from fnl_hf.errors import UserInputError
from preparation import Preparation

IDX_SPLITS = {"train": "train", "test": "t10k"}  # as the files of MNIST and Fashion-MNIST are named
IDX_UINT8 = 0x08
SUBSET_SEED = 0  # runs with different seeds train on the same subset


@dataclass(frozen=True)
class Images:
    """One split: ``pixels`` (N, H, W, C) uint8, ``labels`` (N,) int64, the names of the classes."""

    pixels: torch.Tensor
    labels: torch.Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: torch.Tensor) -> "Images":
        return Images(self.pixels[indices], self.labels[indices], self.names)

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the channels, over all pixels from 0 to 1."""
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.pixels.unbind(-1)]).double()
        shares, values = counts / counts.sum(dim=1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
        mean = shares @ values
        std = (shares @ values.square() - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
        return tuple(mean.tolist()), tuple(std.tolist())

    def fingerprint(self) -> str:
        """A checksum of pixels and labels."""
        digest = xxhash.xxh3_128(str(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file (yann.lecun.com/exdb/mnist), gzipped or not, as an array of so many dimensions.

    Raises:
        UserInputError: a file that cannot be read, another magic number, or sizes that are not those of the data.
    """
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserInputError(f"{file}: cannot be read: {error}") from error
    magic = bytes([0, 0, IDX_UINT8, dimensions])
    header = 4 + 4 * dimensions
    if content[:4] != magic or len(content) < header:
        raise UserInputError(
            f"{file}: not an IDX file of bytes in {dimensions} dimension(s): it starts with 0x{content[:4].hex()} "
            f"instead of 0x{magic.hex()}"
        )
    shape = tuple(np.frombuffer(content[4:header], dtype=">u4").tolist())
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise UserInputError(
            f"{file}: does not have the size in its header, {shape}: it contains {len(content) - header} bytes"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def load_idx(folder: str, prepare: Preparation) -> dict[str, Images]:
    """Splits "train" and "test" from the four files of MNIST or Fashion-MNIST; classes are named by their numbers.

    Raises:
        UserInputError: see :func:`read_idx`; a missing file, as many images as labels there are not, or labels to test
            that do not occur in training.
    """
    arrays = {}
    for split, prefix in IDX_SPLITS.items():
        pixels = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"), 3)
        labels = read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"), 1)
        if len(pixels) != len(labels) or not len(pixels):
            raise UserInputError(
                f"--idx_dir {folder}: the {split} split has {len(pixels)} images and {len(labels)} labels"
            )
        arrays[split] = (pixels, labels)
    classes = int(arrays["train"][1].max()) + 1
    largest = int(arrays["test"][1].max())
    if largest >= classes:
        raise UserInputError(
            f"--idx_dir {folder}: the test images have label {largest}, but the training images only 0 to {classes - 1}"
        )
    names = [str(label) for label in range(classes)]
    return {
        split: to_images(map(Image.fromarray, pixels), labels.tolist(), names, prepare, f"--idx_dir {folder}")
        for split, (pixels, labels) in arrays.items()
    }


def _idx_file(folder: str, name: str) -> Path:
    for file in (Path(folder, name), Path(folder, f"{name}.gz")):
        if os.path.isfile(file):
            return file
    raise UserInputError(f"--idx_dir {folder}: it contains neither {name} nor {name}.gz")


def load_folders(train_dir: str, validation_dir: str, prepare: Preparation, cache_dir: str | None) -> dict[str, Images]:
    """Splits "train" and "test" from two folders with one folder of images for each class.

    Raises:
        UserInputError: a folder without images, one image that cannot be read, or other classes to validate.
    """
    splits = {}
    for split, flag, folder in (("train", "train_dir", train_dir), ("test", "validation_dir", validation_dir)):
        if not os.path.isdir(folder):
            raise UserInputError(f"--{flag} {folder}: no such folder")
        # Given a folder's name, `datasets` would take "train" and "test" in names of files and classes for splits.
        files = {"train": f"{glob.escape(folder)}/**"}
        loaded = _load(f"--{flag} {folder}", "imagefolder", data_files=files, split="train", cache_dir=cache_dir)
        splits[split] = from_columns(loaded, "image", "label", prepare, f"--{flag} {folder}")
    train, test = (set(splits[split].names) for split in ("train", "test"))
    if train != test:
        raise UserInputError(
            f"--validation_dir {validation_dir}: it must have the classes of --train_dir, {sorted(train)}, but has "
            f"{sorted(test)}"
        )
    return splits


def load_hub(
    name: str, config: str | None, image: str | None, label: str | None, prepare: Preparation, cache_dir: str | None
) -> dict[str, Images]:
    """Splits "train", "test" and, if there is one, "validation" of a data set on the Hub; where there is none to test,
    the one to validate takes its place.

    Args:
        image, label: the columns; None for the only one that holds images, or classes.

    Raises:
        UserInputError: no such data set, splits or columns, or labels out of range.
    """
    where = f"--dataset_name {name}"
    loaded = _load(where, name, config, cache_dir=cache_dir)
    sources = {"train": "train", "test": "test", "validation": "validation"}
    if "test" not in loaded:
        sources = {"train": "train", "test": "validation"}
    sources = {split: source for split, source in sources.items() if source in loaded}
    if not {"train", "test"} <= set(sources):
        raise UserInputError(f"{where} needs a train split and a test or validation split: it has {sorted(loaded)}")
    features = loaded["train"].features
    image = image or _only_column(features, datasets.Image, "image_column_name", where)
    label = label or _only_column(features, ClassLabel, "label_column_name", where)
    return {
        split: from_columns(loaded[source], image, label, prepare, f"{where}, {source}")
        for split, source in sources.items()
    }


def _load(where: str, *args, **kwargs) -> Any:
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise UserInputError(f"{where}: {error}") from error


def _only_column(features, kind: type, flag: str, where: str) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise UserInputError(f"{where}: choose one of its columns with --{flag}: {found or sorted(features)}")
    return found[0]


def from_columns(dataset: Dataset, image: str, label: str, prepare: Preparation, where: str) -> Images:
    """A split of ``datasets`` in memory."""
    feature = dataset.features.get(label)
    if image not in dataset.features or not isinstance(feature, ClassLabel):
        raise UserInputError(
            f"{where}: {image} must be a column of images and {label} a column of classes: {dataset.features}"
        )
    pictures = (row[image] for row in dataset.select_columns([image]))
    return to_images(pictures, dataset[label], list(feature.names), prepare, where)


def to_images(
    pictures: Iterable[Image.Image], labels: list[int], names: list[str], prepare: Preparation, where: str
) -> Images:
    """Prepared pictures as one tensor.

    Raises:
        UserInputError: one that cannot be read, different sizes, or labels that no class has.
    """
    wrong = [label for label in labels if label is None or not 0 <= label < len(names)]
    if wrong:
        raise UserInputError(f"{where}: label {wrong[0]} is not one of the {len(names)} classes")
    try:
        arrays = [prepare(picture) for picture in pictures]
    except (OSError, ValueError, AttributeError, Image.DecompressionBombError) as error:
        raise UserInputError(f"{where}: an image cannot be read: {error}") from error
    if len({array.shape[2] for array in arrays}) > 1:  # gray ones among others
        arrays = [np.broadcast_to(array, (*array.shape[:2], 3)) for array in arrays]
    sizes = sorted({array.shape[:2] for array in arrays})
    if len(sizes) > 1:
        raise UserInputError(
            f"{where}: images of {len(sizes)} sizes, such as {sizes[0]} and {sizes[1]}: give --image_size"
        )
    return Images(torch.from_numpy(np.stack(arrays)), torch.tensor(labels), names)


def class_balanced(labels: torch.Tensor, counts: list[int], names: list[str]) -> list[torch.Tensor]:
    """Disjoint subsets of the samples, of ``counts`` each, all with every class equally often or, where the count is no
    multiple of theirs, the first ones once more. Drawn with a seed of their own.

    Raises:
        UserInputError: a class has too few samples.
    """
    generator = np.random.default_rng(SUBSET_SEED)
    pieces: list[list[np.ndarray]] = [[] for _ in counts]
    for label, name in enumerate(names):
        members = generator.permutation(np.flatnonzero(labels.numpy() == label))
        sizes = [count // len(names) + (label < count % len(names)) for count in counts]
        if sum(sizes) > len(members):
            raise UserInputError(
                f"--max_train_samples and --validation_samples need {sum(sizes)} images of class {name}, but there "
                f"are {len(members)}"
            )
        for piece, part in zip(pieces, np.split(members, np.cumsum(sizes))):
            piece.append(part)
    return [torch.from_numpy(np.sort(np.concatenate(piece))) for piece in pieces]


def crop_and_flip(pixels: torch.Tensor, words: np.ndarray, padding: int, flip: bool) -> torch.Tensor:
    """Each image (B, H, W, C) padded with black, cut to its size again at a random place, and mirrored or not.

    Args:
        words: (B, 3) random 64-bit words: row, column, mirror.
    """
    _, height, width, _ = pixels.shape
    places = torch.from_numpy((words % np.uint64(2 * padding + 1)).astype(np.int64))
    rows = places[:, 0, None] + torch.arange(height)
    columns = places[:, 1, None] + torch.arange(width)
    if flip:
        mirrored = torch.from_numpy((words[:, 2] >> np.uint64(63)).astype(bool))
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(pixels, (0, 0, padding, padding, padding, padding))
    batch = torch.arange(len(pixels))
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


class ImageDataset(torch.utils.data.Dataset):
    """Normalized images (B, C, H, W), channels last in memory; a batch is fetched at once: use it with
    :func:`fnl_hf.data.masking.collate_batch`.

    Crops and flips are a function of (seed, epoch, sample), so that they do not depend on workers and resumes.

    Args:
        prepare: its mean and std are subtracted and divided by.
        seed: of the augmentation; None for none.
    """

    def __init__(
        self,
        images: Images,
        prepare: Preparation,
        seed: int | None = None,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
    ):
        self.images, self.seed, self.crop_padding, self.horizontal_flip = images, seed, crop_padding, horizontal_flip
        self.mean, self.std = 255 * torch.tensor(prepare.mean), 255 * torch.tensor(prepare.std)
        # In shared memory, so that workers that outlive an epoch see it change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        pixels = self.images.pixels[indices]
        if self.seed is not None:
            words = draw_bits(self.seed, int(self.epoch), np.asarray(indices), 3)
            pixels = crop_and_flip(pixels, words, self.crop_padding, self.horizontal_flip)
        values = (pixels.float() - self.mean) / self.std
        return {"pixel_values": values.permute(0, 3, 1, 2), "labels": self.images.labels[indices]}
