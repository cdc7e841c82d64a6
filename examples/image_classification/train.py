#!/usr/bin/env python
"""Train an image classifier with factorized layers: low rank to keep, wide or deep to multiply back.

python examples/image_classification/train.py --dataset_name uoft-cs/cifar10 --resnet_depth 32 --output_dir dense
python ... --method low_rank --target_ratio 0.1 --output_dir low-rank        # spectral initialization, Frobenius decay
python ... --method wide --resnet_depth 56 --output_dir wide                 # the size of a ResNet56 once merged
python ... --method pruning --target_ratio 0.1 --model_name_or_path dense --learning_rate 0.01 --output_dir pruned
"""

import copy
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, set_seed

import fnl_hf
from data import ImageDataset, Images, Preparation, class_balanced, load_folders, load_hub, load_idx
from fnl_hf import FactorizationConfig, UserInputError
from fnl_hf.data.masking import collate_batch
from fnl_hf.layers import FactorizedLayer
from fnl_hf.training.arguments import FnlTrainingArguments, parse_arguments, run_script, validate_bounds
from fnl_hf.training.models import as_user_input
from fnl_hf.training.optimizers import OPTIMIZERS
from fnl_hf.training.runs import DATA_FINGERPRINT, VALIDATION_FINGERPRINT, validate_resume
from fnl_hf.training.sampling import epoch_sampler
from fnl_hf.training.scripts import ScriptRun
from fnl_hf.training.trainer import FnlTrainer, build_trainer, train_and_save
from pruning import layers_to_prune, make_permanent, prune_by_magnitude, remaining_parameters
from resnet import CifarResNetConfig, CifarResNetForImageClassification

MERGED_FOLDER = "merged"  # in the output folder
DESCRIPTIONS = {  # of the methods, for the model's card
    "dense": "An image classifier.",
    "low_rank": "An image classifier with factorized layers of low rank.",
    "wide": "An image classifier, trained with factorized layers of full rank.",
    "deep": "An image classifier, trained with layers that are products of three matrices.",
    "pruning": "An image classifier without its smallest weights.",
}
STEPPED = "constant_with_warmup"  # the schedule that --lr_milestones are for


@dataclass
class ModelArguments:
    """What to train, and as what products."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "An image classifier: folder or Hub name. Default: a new ResNet."}
    )
    resnet_depth: int = field(default=20, metadata={"help": "Layers of a new ResNet: 20, 32, 56, 110, ... (6n + 2)."})
    width_multiplier: int = field(default=1, metadata={"help": "Its channels, times 16, 32 and 64."})
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
    factor_init: str = field(
        default="spectral",
        metadata={"help": "Factors of the dense weights, or drawn at random.", "choices": ["spectral", "default"]},
    )
    include: list[str] | None = field(
        default=None, metadata={"help": "Only layers of these types or names. Default: Linear Conv2d, but no heads."}
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "No layers of these. Default: a ResNet's first, as in the authors' code."}
    )


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
            "help": "Hold out so many images of the training data for --eval_strategy; the final evaluation is on the "
            "test images all the same. Default: all evaluations are on the test images."
        },
    )
    crop_padding: int = field(default=4, metadata={"help": "Pixels of black around an image that is cropped anew."})
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror every other image."})
    lr_milestones: list[float] = field(
        default_factory=lambda: [0.5, 0.75],
        metadata={
            "help": f"Shares of the training after which the rate is divided by 10, with --lr_scheduler_type {STEPPED}."
        },
    )

    def __post_init__(self):
        given = [name for name in ("dataset_name", "train_dir", "idx_dir") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserInputError(f"give one of --dataset_name, --train_dir and --idx_dir, not {given or 'none'}")
        if (self.train_dir is None) != (self.validation_dir is None):
            raise UserInputError("--train_dir and --validation_dir go together")
        for name in ("image_size", "max_train_samples", "validation_samples"):
            validate_bounds(name, getattr(self, name), 1)
        validate_bounds("crop_padding", self.crop_padding, 0)
        for milestone in self.lr_milestones:
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


ARGUMENTS = (ModelArguments, DataArguments, ImageTrainingArguments)


class ImageTrainer(FnlTrainer):
    """FnlTrainer for images: epochs of whole batches, and a learning rate in steps.

    Args:
        milestones: shares of the training after which the rate is divided by 10.
    """

    def __init__(self, *, args, train_dataset, milestones: list[float], **kwargs):
        if args.do_train:  # what is refused is refused before the output folder is made
            epoch_sampler(train_dataset, args, args.train_batch_size)
        super().__init__(args=args, train_dataset=train_dataset, **kwargs)
        self.milestones = sorted(milestones)

    def _get_train_sampler(self, train_dataset=None):
        return epoch_sampler(train_dataset or self.train_dataset, self.args, self._train_batch_size)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.lr_scheduler_type != STEPPED:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        steps = [share * num_training_steps for share in self.milestones]

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (warmup + 1)) * 0.1 ** bisect_right(steps, step)

        chosen: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(chosen, factor)
        return self.lr_scheduler

    def evaluate_model(self, model: torch.nn.Module, dataset: ImageDataset, prefix: str) -> dict[str, float]:
        """``evaluate`` with another model in the place of the trained one."""
        trained = self.model, self.model_wrapped
        self.model = self.model_wrapped = model.to(self.args.device)
        try:
            return self.evaluate(dataset, metric_key_prefix=prefix)
        finally:
            self.model, self.model_wrapped = trained


def load_images(
    data_args: DataArguments, args: ImageTrainingArguments, name_or_path: str | None
) -> tuple[dict[str, Images], Preparation]:
    """Splits "train" and "test", and "validation" if some of the training images are to be held out, as the named model
    wants them; a new one takes them as they are."""
    prepare = Preparation()
    if name_or_path is not None:
        with as_user_input(name_or_path):
            prepare = Preparation.of_model(name_or_path, AutoConfig.from_pretrained(name_or_path))
    if data_args.image_size is not None:
        prepare = replace(prepare, size=(data_args.image_size, data_args.image_size))
    with args.main_process_first(desc="reading the images"):
        splits = read_splits(data_args, prepare)
    train, test = splits["train"], splits["test"]
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        shapes = " and ".join(str(tuple(images.pixels.shape[1:])) for images in (train, test))
        raise UserInputError(f"images to train and test have different shapes (H, W, C), {shapes}: give --image_size")
    held_out = data_args.validation_samples or 0
    if data_args.max_train_samples is not None or held_out:
        used = data_args.max_train_samples or len(train) - held_out
        subset, validation = class_balanced(train.labels, [used, held_out], train.names)
        splits["train"] = train[subset]
        if held_out:
            splits["validation"] = train[validation]
    return splits, prepare.completed(splits["train"])


def read_splits(data_args: DataArguments, prepare: Preparation) -> dict[str, Images]:
    """Splits "train" and "test" of the source that the flags name."""
    if data_args.idx_dir is not None:
        return load_idx(data_args.idx_dir, prepare)
    if data_args.train_dir is not None and data_args.validation_dir is not None:
        return load_folders(data_args.train_dir, data_args.validation_dir, prepare, data_args.cache_dir)
    columns = data_args.image_column_name, data_args.label_column_name
    name, config = data_args.dataset_name, data_args.dataset_config_name
    return load_hub(str(name), config, *columns, prepare, data_args.cache_dir)


def build_model(model_args: ModelArguments, images: Images) -> PreTrainedModel:
    """The named model, with a new head if it has other classes, or a new ResNet; dense."""
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(images.names)),
        "label2id": {n: i for i, n in enumerate(images.names)},
    }
    name = model_args.model_name_or_path
    with as_user_input(name or f"--resnet_depth {model_args.resnet_depth}"):
        if name is None:
            return CifarResNetForImageClassification(
                CifarResNetConfig(
                    depth=model_args.resnet_depth,
                    width_multiplier=model_args.width_multiplier,
                    num_channels=images.pixels.shape[-1],
                    **labels,
                )
            )
        return AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
        )


def apply_method(model: PreTrainedModel, model_args: ModelArguments, seed: int) -> Any:
    """Factorize or prune ``model`` as the flags say."""
    if model_args.method == "dense":
        return model
    selection = {name: getattr(model_args, name) for name in ("include", "exclude")}
    if model_args.exclude is None and isinstance(model, CifarResNetForImageClassification):
        selection["exclude"] = ["stem"]
    try:
        config = FactorizationConfig(
            mode="low_rank" if model_args.method == "pruning" else model_args.method,
            rank_scale=model_args.rank_scale,
            target_ratio=model_args.target_ratio,
            energy=model_args.energy,
            init=model_args.factor_init,
            seed=seed,
            **{name: patterns for name, patterns in selection.items() if patterns is not None},
        )
        if model_args.method != "pruning":
            return fnl_hf.factorize(model, config)
        prune_by_magnitude(*layers_to_prune(model, config))
        return model
    except ValueError as error:
        raise UserInputError(f"--method {model_args.method}: {error}") from error


def accuracy(prediction) -> dict[str, float]:
    """``compute_metrics``: the share of the images whose class has the largest logit."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def make_datasets(
    splits: dict[str, Images], data_args: DataArguments, prepare: Preparation, seed: int
) -> dict[str, ImageDataset]:
    """The splits, normalised; those to train on are augmented."""
    datasets = {name: ImageDataset(images, prepare) for name, images in splits.items()}
    augmentation = data_args.crop_padding, data_args.horizontal_flip
    return datasets | {"train": ImageDataset(splits["train"], prepare, seed, *augmentation)}


def make_trainer(
    model: Any, args: ImageTrainingArguments, datasets: dict[str, ImageDataset], milestones: list[float]
) -> Any:
    """An ImageTrainer whose evaluations in training are on the held-out images, or else on the test images."""
    during = {"validation": datasets["validation"]} if "validation" in datasets else datasets["test"]
    return build_trainer(
        ImageTrainer,
        model=model.to(memory_format=torch.channels_last),
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=during,
        data_collator=collate_batch,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        milestones=milestones,
    )


def evaluate(trainer: ImageTrainer, test: ImageDataset, prepare: Preparation) -> dict[str, dict[str, float]]:
    """Loss, accuracy and parameters of the model and, if it is factorized, of the one that it is multiplied out to;
    after training that is saved, too."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    metrics = {"eval": trainer.evaluate(test) | {"eval_parameters": remaining_parameters(model)}}
    if not any(isinstance(module, FactorizedLayer) for module in model.modules()):
        return metrics
    merged: Any = fnl_hf.merge(copy.deepcopy(model))
    parameters = remaining_parameters(merged)
    metrics["merged"] = trainer.evaluate_model(merged, test, "merged") | {"merged_parameters": parameters}
    if trainer.args.do_train and trainer.args.should_save:
        folder = Path(str(trainer.args.output_dir), MERGED_FOLDER)
        merged.save_pretrained(folder)
        prepare.save(folder)
    return metrics


def run(argv):
    model_args, data_args, args = parse_arguments(ARGUMENTS, argv)
    name = model_args.model_name_or_path
    if model_args.method == "pruning" and name is None:
        raise UserInputError("--method pruning needs --model_name_or_path: a trained model to prune")
    if args.do_predict:
        raise UserInputError("--do_predict: there is nothing to predict; use --do_eval")
    planned = ScriptRun(args, argv, model_args, data_args)
    if planned.is_finished(name):
        return
    set_seed(args.seed)
    splits, prepare = load_images(data_args, args, name)
    model = apply_method(build_model(model_args, splits["train"]), model_args, args.seed)
    checkpoint = planned.plan.checkpoint
    if checkpoint is not None:
        validate_resume(checkpoint, model)
    used = {"train": (args.do_train, DATA_FINGERPRINT), "test": (args.do_eval, VALIDATION_FINGERPRINT)}
    planned.uses_data({name: splits[split].fingerprint() for split, (does, name) in used.items() if does})
    datasets = make_datasets(splits, data_args, prepare, args.seed)
    trainer = make_trainer(model, args, datasets, data_args.lr_milestones)
    planned.start()

    metrics = {}
    if args.do_train:
        metrics["train"] = train_and_save(trainer, checkpoint)
    if args.do_eval:
        metrics |= evaluate(trainer, datasets["test"], prepare)
    if model_args.method == "pruning":
        make_permanent(model)
        if args.do_train:  # it was saved with its masks
            trainer.save_model(_internal_call=True)
    if args.do_train and args.should_save:
        prepare.save(args.output_dir)
    planned.finish(
        trainer,
        metrics,
        source=data_args.dataset_name or str(data_args.train_dir or data_args.idx_dir),
        title=Path(str(args.output_dir)).resolve().name,
        description=DESCRIPTIONS[model_args.method],
        auto_class="AutoModelForImageClassification",
        dataset=data_args.dataset_name,
    )


if __name__ == "__main__":
    run_script(run)
