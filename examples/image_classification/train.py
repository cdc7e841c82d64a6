#!/usr/bin/env python
"""Train an image classifier with factorized layers: low rank to keep, wide or deep to multiply back.

python examples/image_classification/train.py --dataset_name uoft-cs/cifar10 --resnet_depth 32 --output_dir dense
python ... --method low_rank --target_ratio 0.1 --output_dir low-rank        # spectral initialization, Frobenius decay
python ... --method wide --resnet_depth 56 --output_dir wide                 # the size of a ResNet56 once merged
python ... --method pruning --target_ratio 0.1 --model_name_or_path dense --learning_rate 0.01 --output_dir pruned
"""

import copy
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TrainerCallback, set_seed

import fnl_hf
from arguments import MILESTONES, STEPPED, DataArguments, ImageTrainingArguments, ModelArguments, refuse_unused
from data import ImageDataset, Images, class_balanced, load_folders, load_hub, load_idx
from fnl_hf import UserInputError
from fnl_hf.data.masking import collate_batch
from fnl_hf.layers import FactorizedLayer
from fnl_hf.publishing.cards import model_facts, run_facts, write_run_card
from fnl_hf.runs.command_line import parse_arguments, run_script
from fnl_hf.runs.locks import folders_in_use
from fnl_hf.runs.plan import DATA_FINGERPRINT, VALIDATION_FINGERPRINT
from fnl_hf.runs.provenance import read_starts
from fnl_hf.runs.same_model import validate_same_model
from fnl_hf.training.models import as_user_input
from fnl_hf.training.sampling import epoch_sampler
from fnl_hf.training.scripts import ScriptRun
from fnl_hf.training.trainer import FnlTrainer, build_trainer, train_and_save
from fnl_hf.training.unused_flags import warn_of_unused_flags
from preparation import Preparation
from pruning import SparseTraining, layers_to_prune, make_permanent, prune_by_magnitude, remaining_parameters
from resnet import CifarResNetConfig, CifarResNetForImageClassification

MERGED_FOLDER = "merged"  # in the output folder
DESCRIPTIONS = {  # of the methods, for the model's card
    "dense": "An image classifier.",
    "low_rank": "An image classifier with low-rank factorized layers.",
    "wide": "An image classifier, trained with factorized layers of full rank.",
    "deep": "An image classifier, trained with layers that are products of three matrices.",
    "pruning": "An image classifier whose smallest weights were pruned.",
}
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

    def evaluation_loop(self, *args, **kwargs):
        """As Trainer's, with the running statistics that are saved: each process has gathered its own."""
        if self.args.world_size > 1:
            for buffer in self.accelerator.unwrap_model(self.model).buffers():
                broadcast(buffer)
        return super().evaluation_loop(*args, **kwargs)

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
    """Splits "train" and "test", and "validation" if some of the training images are to be held out or the data set has
    one, as the named model wants them; a new one takes them as they are."""
    prepare = Preparation()
    if name_or_path is not None:
        with as_user_input(name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=args.trust_remote_code)
            prepare = Preparation.of_model(name_or_path, config)
    if data_args.image_size is not None:
        prepare = prepare.resized(data_args.image_size)
    with args.main_process_first(desc="reading the images"):
        splits = read_splits(data_args, prepare)
    train = splits["train"]
    shapes = {split: tuple(images.pixels.shape[1:]) for split, images in splits.items()}
    if len(set(shapes.values())) > 1:
        raise UserInputError(f"the splits have images of different shapes (H, W, C), {shapes}: give --image_size")
    used, held_out = data_args.max_train_samples, data_args.validation_samples
    if used is not None or held_out is not None:  # else no image is copied
        splits["train"], validation = hold_out(train, used, held_out or 0)
        if len(validation):
            splits["validation"] = validation
    return splits, prepare.completed(splits["train"])


def hold_out(images: Images, used: int | None, held_out: int) -> tuple[Images, Images]:
    """``used`` images to train on, or all that are left, and ``held_out`` others; of all classes alike."""
    subset, validation = class_balanced(images.labels, [used or 0, held_out], images.names)
    if used is None:
        is_used = torch.ones(len(images), dtype=torch.bool)
        is_used[validation] = False
        subset = is_used.nonzero().flatten()
    return images[subset], images[validation]


def read_splits(data_args: DataArguments, prepare: Preparation) -> dict[str, Images]:
    """Splits "train", "test" and perhaps "validation" of the source that the flags name."""
    if data_args.idx_dir is not None:
        return load_idx(data_args.idx_dir, prepare)
    if data_args.train_dir is not None and data_args.validation_dir is not None:
        return load_folders(data_args.train_dir, data_args.validation_dir, prepare, data_args.cache_dir)
    columns = data_args.image_column_name, data_args.label_column_name
    name, config = data_args.dataset_name, data_args.dataset_config_name
    return load_hub(str(name), config, *columns, prepare, data_args.cache_dir)


def build_model(
    model_args: ModelArguments, images: Images, is_trained: bool, trust_remote_code: bool
) -> PreTrainedModel:
    """The named model, if it is trained with a new head where it has other classes, or a new ResNet; dense."""
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(images.names)),
        "label2id": {n: i for i, n in enumerate(images.names)},
    }
    name = model_args.model_name_or_path
    with as_user_input(name or f"--resnet_depth {model_args.resnet_depth}"):
        if name is None:
            given = {"depth": model_args.resnet_depth, "width_multiplier": model_args.width_multiplier}
            sizes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
            config = CifarResNetConfig(**sizes, num_channels=images.pixels.shape[-1], **labels)
            return CifarResNetForImageClassification(config)
        new_head = is_trained and model_args.method != "pruning"
        kwargs: dict[str, Any] = {"ignore_mismatched_sizes": new_head, "trust_remote_code": trust_remote_code}
        return AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32, **kwargs, **labels)


def apply_method(model: PreTrainedModel, model_args: ModelArguments, seed: int) -> tuple[Any, list[TrainerCallback]]:
    """Factorize or prune ``model`` as the flags say; returns it, and what prunes it while it is trained."""
    if model_args.method == "dense":
        return model, []
    is_ours = isinstance(model, CifarResNetForImageClassification)
    config = model_args.factorization(seed, excluded=["stem"] if is_ours else None)
    try:
        if model_args.method != "pruning":
            return fnl_hf.factorize(model, config), []
        if model_args.sparsity is not None:
            return model, [SparseTraining(*layers_to_prune(model, config), model_args.sparsity, seed)]
        prune_by_magnitude(*layers_to_prune(model, config))
        return model, []
    except ValueError as error:
        raise UserInputError(f"--method {model_args.method}: {error}") from error


def accuracy(prediction) -> dict[str, float]:
    """``compute_metrics``: the share of the images whose class has the largest logit."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def make_datasets(
    splits: dict[str, Images], data_args: DataArguments, prepare: Preparation, seed: int
) -> dict[str, ImageDataset]:
    """The splits, normalized; those to train on are augmented."""
    datasets = {name: ImageDataset(images, prepare) for name, images in splits.items()}
    augmentation = data_args.crop_padding, data_args.horizontal_flip
    return datasets | {"train": ImageDataset(splits["train"], prepare, seed, *augmentation)}


def describe_data(splits: dict[str, Images], source: str) -> dict[str, str]:
    """What a start says of the data."""
    facts = {}
    for split, images in splits.items():
        height, width, channels = images.pixels.shape[1:]
        facts[f"{split} data"] = f"{source}: {len(images):,} images of {height} x {width} x {channels}"
    return facts | {"classes": f"{len(splits['train'].names):,}"}


def choose_by_validation(args: ImageTrainingArguments, splits: dict[str, Images]) -> None:
    """Let the best checkpoint be that with the best score on held-out images.

    Raises:
        UserInputError: there are none: the test images would choose.
    """
    if not args.load_best_model_at_end:
        return
    if "validation" not in splits:
        raise UserInputError(
            "--load_best_model_at_end needs held-out images: set --validation_samples, because test images must "
            "not select the model"
        )
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    args.metric_for_best_model = metric if metric.startswith("validation_") else f"validation_{metric}"


def make_trainer(
    model: Any, args: ImageTrainingArguments, datasets: dict[str, ImageDataset], milestones: list[float]
) -> Any:
    """An ImageTrainer whose evaluations in training are on the held-out images, or else on the test images."""
    eval_dataset = {"validation": datasets["validation"]} if "validation" in datasets else datasets["test"]
    return build_trainer(
        ImageTrainer,
        model=model.to(memory_format=torch.channels_last),
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=eval_dataset,
        data_collator=collate_batch,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        milestones=milestones,
    )


def evaluate(trainer: ImageTrainer, test: ImageDataset) -> tuple[dict[str, dict[str, float]], Any]:
    """Loss, accuracy and parameters of the model and, if it is factorized, of the one that it is multiplied out to; and
    that one, or None."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    metrics = {"eval": trainer.evaluate(test) | {"eval_parameters": remaining_parameters(model)}}
    if not any(isinstance(module, FactorizedLayer) for module in model.modules()):
        return metrics, None
    merged: Any = fnl_hf.merge(copy.deepcopy(model))
    parameters = remaining_parameters(merged)
    metrics["merged"] = trainer.evaluate_model(merged, test, "merged") | {"merged_parameters": parameters}
    return metrics, merged


def save_merged(
    merged: Any,
    args: Any,
    prepare: Preparation,
    metrics: dict[str, dict[str, float]],
    source: str,
    card: dict[str, Any],
) -> None:
    """Save the model that is multiplied out in a folder of its own, with a card."""
    folder = Path(args.output_dir, MERGED_FOLDER)
    merged.save_pretrained(folder)
    prepare.save(folder)
    write_run_card(
        folder,
        model=merged,
        facts=model_facts(merged, args, source) | run_facts(read_starts(args.output_dir), metrics["train"]),
        metrics={name.replace("merged_", "eval_"): value for name, value in metrics["merged"].items()},
        license=args.hub_license,
        **card | {"description": f"{card['description']} This version is multiplied out: its layers are dense."},
    )


@folders_in_use()
def run(argv):
    model_args, data_args, args = parse_arguments(ARGUMENTS, argv)
    name = model_args.model_name_or_path
    if args.do_predict:
        raise UserInputError("--do_predict: there is nothing to predict; use --do_eval")
    if args.lr_scheduler_type != STEPPED:
        refuse_unused(data_args, ("lr_milestones",), f"--lr_scheduler_type is {args.lr_scheduler_type.value}")
    if args.do_train and args.eval_strategy == "no":
        refuse_unused(
            data_args,
            ("validation_samples",),
            "it needs --eval_strategy, to evaluate on held-out images during training",
        )
    planned = ScriptRun(args, argv, model_args, data_args, also=[MERGED_FOLDER])
    warn_of_unused_flags(argv, model_args, data_args, args)
    if planned.is_finished(name):
        return
    set_seed(args.seed)
    splits, prepare = load_images(data_args, args, name)
    choose_by_validation(args, splits)
    dense = build_model(model_args, splits["train"], args.do_train, args.trust_remote_code)
    model, callbacks = apply_method(dense, model_args, args.seed)
    checkpoint = planned.plan.checkpoint
    if checkpoint is not None:
        validate_same_model(checkpoint, model)
    used = {"train": (args.do_train, DATA_FINGERPRINT), "test": (args.do_eval, VALIDATION_FINGERPRINT)}
    planned.record_data({name: splits[split].fingerprint() for split, (is_used, name) in used.items() if is_used})
    datasets = make_datasets(splits, data_args, prepare, args.seed)
    trainer = make_trainer(model, args, datasets, data_args.lr_milestones or MILESTONES)
    for callback in callbacks:
        trainer.add_callback(callback)
    source = data_args.dataset_name or str(data_args.train_dir or data_args.idx_dir)
    planned.start(trainer, describe_data(splits, source))

    metrics, merged = {}, None
    if args.do_train:
        metrics["train"] = train_and_save(trainer, checkpoint)
    if args.do_eval:
        evaluated, merged = evaluate(trainer, datasets["test"])
        metrics |= evaluated
    if model_args.method == "pruning":
        make_permanent(model)
        if args.do_train:  # it was saved with its masks
            trainer.save_model(_internal_call=True)
    card = {
        "title": Path(str(args.output_dir)).resolve().name,
        "description": DESCRIPTIONS[model_args.method],
        "auto_class": "AutoModelForImageClassification",
        "dataset": data_args.dataset_name,
    }
    if args.do_train and args.should_save:
        prepare.save(args.output_dir)
        if merged is not None:
            save_merged(merged, args, prepare, metrics, source, card)
    planned.finish(trainer, metrics, source=source, **card)


if __name__ == "__main__":
    run_script(run)
