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
            raise UserInputError(f"--{name} ({getattr(arguments, name)}) would change nothing: {why}")


@dataclass
class ModelArguments:
    """What to train, and as what products."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "An image classifier: folder or Hub name. Default: a new ResNet."}
    )
    resnet_depth: int | None = field(
        default=None, metadata={"help": "Layers of a new ResNet: 20, the default, 32, 56, 110, ... (6n + 2)."}
    )
    width_multiplier: int | None = field(
        default=None, metadata={"help": "Its channels, times 16, 32 and 64. Default: 1."}
    )
    method: str = field(
        default="dense",
        metadata={
            "help": "dense; low_rank, wide or deep factorization; or pruning: of the layers that low_rank would "
            "factorize, keep the largest weights, as many as the factors would have.",
            "choices": ["dense", "low_rank", "wide", "deep", "pruning"],
        },
    )
    rank_scale: float | None = field(default=None, metadata={"help": "Rank, as a share of the full one."})
    target_ratio: float | None = field(
        default=None, metadata={"help": "Parameters of the factorized layers, as a share of what they had."}
    )
    energy: float | None = field(default=None, metadata={"help": "Share of each weight's squared norm to keep."})
    factor_init: str | None = field(
        default=None,
        metadata={
            "help": "Factors of the dense weights (spectral, the default), or drawn at random (default).",
            "choices": list(INITS),
        },
    )
    sparsity: str | None = field(
        default=None,
        metadata={
            "help": "With --method pruning, of a model that is trained from the beginning: a random pattern that stays "
            "(fixed) or changes (dynamic), or the largest weights after half of the steps (magnitude), which then go "
            "back to their early values (lottery).",
            "choices": list(SPARSITIES),
        },
    )
    include: list[str] | None = field(
        default=None, metadata={"help": "Only layers of these types or names. Default: Linear Conv2d, but no heads."}
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "No layers of these. Default: a ResNet's first, as in the authors' code."}
    )

    def __post_init__(self):
        layers = ("rank_scale", "target_ratio", "energy", "include", "exclude")
        if self.method == "dense":
            refuse_unused(self, (*layers, "factor_init"), "--method dense factorizes nothing")
        elif self.method == "pruning":
            refuse_unused(self, ("factor_init",), "--method pruning factorizes nothing")
        if self.model_name_or_path is not None:
            refuse_unused(self, ("resnet_depth", "width_multiplier"), "--model_name_or_path names a model")
        elif self.method == "pruning" and self.sparsity is None:
            raise UserInputError("--method pruning needs --model_name_or_path, a trained model to prune, or --sparsity")
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

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, as uoft-cs/cifar10."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: the only column of images."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: the only column of classes."})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with a folder of images for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise, to evaluate on."})
    idx_dir: str | None = field(
        default=None, metadata={"help": "A folder with the four files of MNIST or Fashion-MNIST, gzipped or not."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets are kept and found again."})
    image_size: int | None = field(
        default=None, metadata={"help": "Bring all images to this size. Default: that of the model, or their own."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many images, of all classes alike, the same for every --seed."}
    )
    validation_samples: int | None = field(
        default=None,
        metadata={
            "help": "Hold out so many images of the training data, for --eval_strategy; the final evaluation is on the "
            "test images all the same. Default: the data set's own split to validate, or else the test images."
        },
    )
    crop_padding: int = field(default=4, metadata={"help": "Pixels of black around an image that is cropped anew."})
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror every other image."})
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the training after which the rate is divided by 10, with --lr_scheduler_type "
            f"{STEPPED}. Default: {' '.join(map(str, MILESTONES))}."
        },
    )

    def __post_init__(self):
        given = [name for name in ("dataset_name", "train_dir", "idx_dir") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserInputError(f"give one of --dataset_name, --train_dir and --idx_dir, not {given or 'none'}")
        if (self.train_dir is None) != (self.validation_dir is None):
            raise UserInputError("--train_dir and --validation_dir go together")
        if self.dataset_name is None:
            columns = ("dataset_config_name", "image_column_name", "label_column_name")
            refuse_unused(self, columns, "there is no --dataset_name")
        for name in ("image_size", "max_train_samples", "validation_samples"):
            validate_bounds(name, getattr(self, name), 1)
        validate_bounds("crop_padding", self.crop_padding, 0)
        for milestone in self.lr_milestones or ():
            validate_bounds("lr_milestones", milestone, 0, 1, above=True)


@dataclass
class ImageTrainingArguments(FnlTrainingArguments):
    """FnlTrainingArguments with the recipe of the authors' ResNets."""

    optimizer: str = field(
        default="sgd", metadata={"help": "The optimizer; SGD's momentum is 0.9.", "choices": list(OPTIMIZERS)}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of all weights but the factors."})
    num_train_epochs: float = field(default=200.0, metadata={"help": "Epochs to train."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a process in a micro-batch."})
    per_device_eval_batch_size: int = field(default=500, metadata={"help": "Images of a process to evaluate at once."})
    lr_scheduler_type: str = field(default=STEPPED, metadata={"help": "The schedule of the learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients at this norm; 0 does not."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save checkpoints."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep."})
    ddp_find_unused_parameters: bool | None = field(
        default=None, metadata={"help": "Whether processes look for parameters without a gradient. Default: Trainer's."}
    )
