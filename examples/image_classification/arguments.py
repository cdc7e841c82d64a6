"""The command line of train.py."""

from dataclasses import dataclass, field
from typing import Any

from fnl_hf import FactorizationConfig, UserInputError
from fnl_hf.errors import validate_bounds
from fnl_hf.layers.base import INITS, MODES
from fnl_hf.surgery.config import TYPES
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.optimizers import OPTIMIZERS
from pruning import SPARSITIES

STEPPED = "constant_with_warmup"  # the schedule that --lr_milestones are for
MILESTONES = [0.5, 0.75]


def refuse_unused(arguments: Any, names: tuple[str, ...], why: str) -> None:
    """
    Raises:
        UserInputError: a flag that would change nothing.
    """
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserInputError(f"--{name} ({getattr(arguments, name)}) has no effect: {why}")


@dataclass
class ModelArguments:
    """What to train, and as what products."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Image classifier: folder or Hub name. Default: a new ResNet."}
    )
    resnet_depth: int | None = field(
        default=None, metadata={"help": "Depth of a new ResNet: 20, 32, 56, 110, ... (6n + 2). Default: 20."}
    )
    width_multiplier: int | None = field(
        default=None,
        metadata={"help": "Width of a new ResNet: its 16, 32 and 64 channels times this factor. Default: 1."},
    )
    method: str = field(
        default="dense",
        metadata={
            "help": "dense; factorization: low_rank, wide or deep; or pruning: in the layers that low_rank would "
            "factorize, keep the largest weights, as many as the factors would have.",
            "choices": ["dense", "low_rank", "wide", "deep", "pruning"],
        },
    )
    rank_scale: float | None = field(default=None, metadata={"help": "Rank as a share of the full rank."})
    target_ratio: float | None = field(
        default=None, metadata={"help": "Parameters of the factorized layers as a share of those of the dense layers."}
    )
    energy: float | None = field(default=None, metadata={"help": "Share of the squared norm of each weight to keep."})
    factor_init: str | None = field(
        default=None,
        metadata={
            "help": "Initialize the factors from the SVD of the dense weights (spectral) or at random (default). "
            "Default: spectral.",
            "choices": list(INITS),
        },
    )
    sparsity: str | None = field(
        default=None,
        metadata={
            "help": "With --method pruning, for a model trained from scratch: a random mask that is fixed (fixed) or "
            "changes during training (dynamic), or the largest weights after half of the steps (magnitude), reset to "
            "their early values (lottery).",
            "choices": list(SPARSITIES),
        },
    )
    include: list[str] | None = field(
        default=None,
        metadata={"help": "Types or names of the layers to factorize or prune. Default: Linear Conv2d, except heads."},
    )
    exclude: list[str] | None = field(
        default=None,
        metadata={
            "help": "Types or names of layers to leave dense. Default: the first layer of a ResNet, as in the "
            "authors' code."
        },
    )

    def __post_init__(self):
        layers = ("rank_scale", "target_ratio", "energy", "include", "exclude")
        if self.method == "dense":
            refuse_unused(self, (*layers, "factor_init"), "--method dense factorizes nothing")
        elif self.method == "pruning":
            refuse_unused(self, ("factor_init",), "--method pruning factorizes nothing")
        if self.model_name_or_path is not None:
            refuse_unused(self, ("resnet_depth", "width_multiplier"), "--model_name_or_path determines the model")
        elif self.method == "pruning" and self.sparsity is None:
            raise UserInputError("--method pruning needs --model_name_or_path (a trained model to prune) or --sparsity")
        if self.method != "pruning":
            refuse_unused(self, ("sparsity",), f"--method {self.method} prunes nothing")
        self.factorization()

    def factorization(self, seed: int = 0, excluded: list[str] | None = None) -> FactorizationConfig:
        """What the flags say of the layers.

        Args:
            excluded: where no flag names any.

        Raises:
            UserInputError: values out of their ranges, or two sizes.
        """
        exclude = self.exclude if self.exclude is not None else excluded
        try:
            return FactorizationConfig(
                mode=self.method if self.method in MODES else MODES[0],
                rank_scale=self.rank_scale,
                target_ratio=self.target_ratio,
                energy=self.energy,
                init=self.factor_init or INITS[0],
                include=TYPES if self.include is None else self.include,
                exclude=exclude or (),
                seed=seed,
            )
        except ValueError as error:
            raise UserInputError(f"--method {self.method}: {error}") from error


@dataclass
class DataArguments:
    """One source of images, and how they are changed in training."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, for example uoft-cs/cifar10."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with the images. Default: the only image column."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the classes. Default: the only class column."}
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with one subfolder of training images per class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Folder with one subfolder of test images per class."}
    )
    idx_dir: str | None = field(
        default=None, metadata={"help": "Folder with the four files of MNIST or Fashion-MNIST, gzipped or not."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Cache folder for data sets."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Resize all images to this size. Default: that of the model, else the size of the images."},
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on this number of images, the same for every --seed, balanced over the classes."},
    )
    validation_samples: int | None = field(
        default=None,
        metadata={
            "help": "Hold out this number of training images for --eval_strategy; the final evaluation uses the test "
            "images in any case. Default: the validation split of the data set, else the test images."
        },
    )
    crop_padding: int = field(default=4, metadata={"help": "Random crops: pixels of black padding around each image."})
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror images at random, half of them."})
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": f"With --lr_scheduler_type {STEPPED}: points of the training, as shares of its length, after "
            f"which the learning rate is divided by 10. Default: {' '.join(map(str, MILESTONES))}."
        },
    )

    def __post_init__(self):
        given = [name for name in ("dataset_name", "train_dir", "idx_dir") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserInputError(f"give one of --dataset_name, --train_dir and --idx_dir, not {given or 'none'}")
        if (self.train_dir is None) != (self.validation_dir is None):
            raise UserInputError("--train_dir and --validation_dir must be given together")
        if self.dataset_name is None:
            columns = ("dataset_config_name", "image_column_name", "label_column_name")
            refuse_unused(self, columns, "it needs --dataset_name")
        for name in ("image_size", "max_train_samples", "validation_samples"):
            validate_bounds(name, getattr(self, name), 1)
        validate_bounds("crop_padding", self.crop_padding, 0)
        for milestone in self.lr_milestones or ():
            validate_bounds("lr_milestones", milestone, 0, 1, above=True)


@dataclass
class ImageTrainingArguments(FnlTrainingArguments):
    """FnlTrainingArguments with the recipe of the authors' ResNets."""

    optimizer: str = field(
        default="sgd", metadata={"help": "The optimizer. SGD uses momentum 0.9.", "choices": list(OPTIMIZERS)}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "Initial learning rate."})
    weight_decay: float = field(
        default=1e-4, metadata={"help": "Weight decay of all weights except the factors of products."}
    )
    num_train_epochs: float = field(default=200.0, metadata={"help": "Number of epochs."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per process and micro-batch."})
    per_device_eval_batch_size: int = field(default=500, metadata={"help": "Images per process and evaluation batch."})
    lr_scheduler_type: str = field(default=STEPPED, metadata={"help": "Learning rate schedule."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Clip the gradient to this norm; 0 turns clipping off."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When to save checkpoints."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Number of checkpoints to keep."})
    ddp_find_unused_parameters: bool | None = field(
        default=None, metadata={"help": "Whether DDP looks for parameters without a gradient. Default: Trainer's."}
    )
