"""examples/image_classification: its images, from files to batches."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTConfig

import train
from data import ImageDataset, Images, class_balanced, crop_and_flip, load_folders, load_idx, to_images
from fnl_hf import UserInputError
from preparation import Preparation
from tests.conftest import IMAGE_CLASSES, IMAGE_HEIGHT, IMAGE_WIDTH, picture


def test_idx_files(idx_dir):
    splits = load_idx(str(idx_dir), Preparation())
    pixels = splits["train"].pixels
    assert pixels.shape == (84, IMAGE_HEIGHT, IMAGE_WIDTH, 1) and pixels.dtype == torch.uint8
    assert splits["test"].labels.tolist() == [n % IMAGE_CLASSES for n in range(35)]
    assert splits["train"].names == ["0", "1", "2", "3", "4", "5", "6"]
    generator = np.random.default_rng(0)
    assert torch.equal(splits["train"].pixels[0, ..., 0], torch.from_numpy(picture(generator, 0)))
    mean, std = splits["train"].mean_and_std()
    pixels = splits["train"].pixels.double() / 255
    assert (mean[0], std[0]) == pytest.approx((pixels.mean().item(), pixels.std(correction=0).item()))


@pytest.mark.parametrize("padding, flip", [(2, True), (3, False), (0, True)])
def test_crop_and_flip_against_a_loop(padding, flip):
    generator = np.random.default_rng(1)
    pixels = torch.from_numpy(generator.integers(1, 256, (50, 5, 7, 3), dtype=np.uint8))
    words = generator.integers(0, 2**64, (50, 3), dtype=np.uint64)
    found = crop_and_flip(pixels, words, padding, flip)
    seen = set()
    for image, word, result in zip(pixels, words.tolist(), found):
        top, left, mirror = word[0] % (2 * padding + 1), word[1] % (2 * padding + 1), flip and word[2] >= 2**63
        seen.add((top, left, mirror))
        for row in range(5):
            for column in range(7):
                y, x = row + top - padding, (6 - column if mirror else column) + left - padding
                inside = 0 <= y < 5 and 0 <= x < 7
                assert result[row, column].tolist() == (image[y, x].tolist() if inside else [0, 0, 0])
    assert len(seen) > 1


def test_augmentation_is_a_function_of_seed_epoch_and_sample():
    images = Images(torch.randint(0, 256, (29, 5, 7, 3), dtype=torch.uint8), torch.zeros(29, dtype=torch.int64), ["a"])
    prepare = Preparation().completed(images)
    dataset = ImageDataset(images, prepare, 5, 2, True)
    whole = dataset.__getitems__(list(range(29)))["pixel_values"]
    parts = [dataset.__getitems__(part)["pixel_values"] for part in ([11, 3], [28])]
    assert torch.equal(torch.cat(parts), whole[[11, 3, 28]])
    assert whole.shape == (29, 3, 5, 7) and whole.is_contiguous(memory_format=torch.channels_last)
    dataset.set_epoch(1)
    others = [dataset, ImageDataset(images, prepare, 6, 2, True), ImageDataset(images, prepare)]
    for other in others:
        assert not torch.equal(other.__getitems__(list(range(29)))["pixel_values"], whole)
    plain = others[-1].__getitems__(list(range(29)))["pixel_values"].double()
    assert plain.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert plain.std(dim=(0, 2, 3), correction=0).sub(1).abs().max() < 1e-5


def test_subsets_are_balanced_and_disjoint():
    labels = torch.tensor([0, 1, 2] * 9)
    first, second = class_balanced(labels, [8, 6], ["a", "b", "c"])
    assert torch.bincount(labels[first]).tolist() == [3, 3, 2] and torch.bincount(labels[second]).tolist() == [2, 2, 2]
    assert not set(first.tolist()) & set(second.tolist())
    again, _ = class_balanced(labels, [8, 1], ["a", "b", "c"])
    assert torch.equal(first, again), "the training images do not depend on how many are held out"
    with pytest.raises(UserInputError, match="need 11 images of class a, but there are 9"):
        class_balanced(labels, [28, 1], ["a", "b", "c"])


def test_all_but_the_held_out_images_are_trained_on():
    pixels, labels = torch.arange(49, dtype=torch.uint8).view(49, 1, 1, 1), torch.tensor([0] * 30 + [1] * 12 + [2] * 7)
    images = Images(pixels, labels, ["a", "b", "c"])
    used, held_out = train.hold_out(images, None, 5)
    assert torch.bincount(held_out.labels).tolist() == [2, 2, 1]
    assert sorted([*used.pixels.flatten().tolist(), *held_out.pixels.flatten().tolist()]) == list(range(49))


@pytest.mark.parametrize(
    "kind, entries, resized",
    [
        ("ViT", {"size": {"height": 9, "width": 14}, "resample": 3, "image_std": [0.2, 0.3, 0.5]}, (11, 11)),
        ("ViT", {"size": 12, "do_normalize": False}, (11, 11)),
        ("DeiT", {"size": 16, "crop_size": 12, "image_mean": [0.3, 0.4, 0.5], "do_rescale": False}, (11, 11)),
        ("ConvNext", {"size": {"shortest_edge": 12}, "crop_pct": 0.75}, (11, 11)),
        ("ConvNext", {"size": {"shortest_edge": 384}}, (11, 11)),
        ("Bit", {"size": {"shortest_edge": 16}, "crop_size": 12}, (11, 11)),
        ("EfficientNet", {"size": {"height": 12, "width": 12}, "image_std": [0.5, 0.4, 0.3]}, (11, 11)),
        ("EfficientNet", {"size": {"height": 12, "width": 12}, "include_top": False, "rescale_offset": True}, (11, 11)),
    ],
)
def test_images_are_prepared_as_transformers_does(kind, entries, resized, tmp_path):
    """Scaled, cropped and normalized by its processor for Pillow, and by the one that is saved."""
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(entries | {"image_processor_type": f"{kind}ImageProcessor"})
    )
    rows, columns = np.mgrid[0:32, 0:41]
    image = Image.fromarray(np.stack([7 * rows, 6 * columns, 3 * (rows + columns)], axis=-1).astype(np.uint8))
    processor = getattr(transformers, f"{kind}ImageProcessorPil")

    def prepared(prepare):
        images = Images(torch.from_numpy(prepare(image)[None]), torch.zeros(1, dtype=torch.int64), ["a"])
        return ImageDataset(images, prepare.completed(images)).__getitems__([0])["pixel_values"][0]

    prepare = Preparation.of_model(str(tmp_path), ViTConfig())
    expected = torch.from_numpy(processor.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"][0])
    torch.testing.assert_close(prepared(prepare), expected.float(), rtol=1e-5, atol=1e-5)
    prepare.save(tmp_path / "saved")
    again = Preparation.of_model(str(tmp_path / "saved"), ViTConfig())
    torch.testing.assert_close(prepared(again), expected.float(), rtol=1e-5, atol=1e-5)
    assert prepared(prepare.resized(11)).shape[1:] == resized


@pytest.mark.parametrize("kind, message", [("ImageGPT", "cannot be used"), ("Pix2Struct", "cannot be used")])
def test_processors_that_do_something_else_are_refused(kind, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": f"{kind}ImageProcessor"}))
    with pytest.raises(UserInputError, match=message):
        Preparation.of_model(str(tmp_path), ViTConfig())


def test_grey_models(tmp_path):
    """The mean of a processor's three channels; what was trained here is prepared likewise when it is loaded."""
    entries = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 5, "width": 7},
        "image_mean": [0.1, 0.2, 0.6],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    prepare = Preparation.of_model(str(tmp_path), ViTConfig(num_channels=1))
    assert prepare.mean == pytest.approx((0.3,)) and prepare(Image.new("L", (9, 9), 7)).tolist() == [[[7]] * 7] * 5
    images = to_images([Image.new("L", (7, 5), level) for level in (3, 90)], [0, 0], ["a"], Preparation(), "here")
    own = Preparation().completed(images)
    own.save(tmp_path / "own")
    again = Preparation.of_model(str(tmp_path / "own"), ViTConfig(num_channels=1))
    assert again.mean == pytest.approx(own.mean) and again.std == pytest.approx(own.std)


def test_pixels_of_more_than_eight_bits():
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(Preparation()(Image.fromarray(257 * ramp))[:, :, 0], ramp)
    for kind in (np.int32, np.float32):
        with pytest.raises(UserInputError, match="here: an image cannot be read: it has 32-bit pixels"):
            to_images([Image.fromarray(ramp.astype(kind))], [0], ["a"], Preparation(), "here")


def test_names_of_splits_in_folders_mean_nothing(tmp_path):
    for split in ("a [1]", "b"):
        for label in ("bus", "train"):
            (tmp_path / split / label).mkdir(parents=True)
            for name in ("my-train-0.png", "test_0.png", "7.png"):
                Image.new("RGB", (5, 7)).save(tmp_path / split / label / name)
    splits = load_folders(str(tmp_path / "a [1]"), str(tmp_path / "b"), Preparation(), str(tmp_path / "cache"))
    for images in splits.values():
        assert images.names == ["bus", "train"] and images.labels.tolist() == [0] * 3 + [1] * 3


def damage(name, change):
    def apply(folder):
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return apply


@pytest.mark.parametrize(
    "apply, message",
    [
        (damage("t10k-images-idx3-ubyte", lambda b: b[:3] + b"\x01" + b[4:]), "starts with 0x00000801 instead of 0x"),
        (damage("t10k-images-idx3-ubyte", lambda b: b[:-1]), r"header, \(35, 11, 13\): it contains 5004 bytes"),
        (damage("t10k-images-idx3-ubyte", lambda b: b[:9]), "not an IDX file of bytes in 3 dimension"),
        (damage("t10k-images-idx3-ubyte", lambda b: b""), "starts with 0x instead of 0x00000803"),
        (damage("train-images-idx3-ubyte.gz", lambda b: b[:90]), "train-images-idx3-ubyte.gz: cannot be read"),
        (damage("train-images-idx3-ubyte.gz", lambda b: b"P6" + b), "cannot be read: Not a gzipped file"),
        (damage("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x07"), "label 7, but the training images only 0"),
        (damage("t10k-labels-idx1-ubyte", lambda b: b[:7] + b"\x22" + b[8:-1]), "has 35 images and 34 labels"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").unlink(), "neither train-labels-idx1-ubyte nor .*gz"),
    ],
)  # fmt: skip
def test_bad_idx_files_are_refused(apply, message, idx_dir, tmp_path):
    shutil.copytree(idx_dir, tmp_path / "idx")
    apply(tmp_path / "idx")
    with pytest.raises(UserInputError, match=message):
        load_idx(str(tmp_path / "idx"), Preparation())
