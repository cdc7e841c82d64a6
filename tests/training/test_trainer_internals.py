"""What our classes override of Trainer is what they were written against, and docs/trainer.md says why."""

import importlib
import inspect
import pkgutil
import re

import pytest
import transformers
from transformers import Trainer

import fnl_hf
import train  # of examples/image_classification
from tests.conftest import ROOT

# Signatures without annotations, as of transformers 5.17 to 5.24; where there are several, the first is the oldest.
WRITTEN_AGAINST = {
    "_finalize_training": ["(self, trial, num_train_samples, start_time)"],
    "_get_grad_norm": ["(self, model, grad_norm=None)"],
    "_get_output_dir": ["(self, trial)"],
    "_get_train_sampler": ["(self, train_dataset=None)"],
    "_load_best_model": ["(self)"],
    "_load_from_checkpoint": ["(self, resume_from_checkpoint, model=None)"],
    "_load_optimizer_and_scheduler": ["(self, checkpoint)"],
    "_prepare_for_training": ["(self, max_steps, train_dataloader, resume_from_checkpoint)"],
    "_push_from_checkpoint": ["(self, checkpoint_folder)"],
    "_run_epoch": [
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
    ],
    "_save_checkpoint": ["(self, model, trial)"],
    "_save_optimizer_and_scheduler": ["(self, output_dir)"],
    "compute_loss": ["(self, model, inputs, return_outputs=False, num_items_in_batch=None)"],
    "create_model_card": [
        "(self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, tasks=None, "
        "dataset_tags=None, dataset=None, dataset_args=None)"
    ],
    "create_optimizer": ["(self, model=None)"],
    "create_scheduler": ["(self, num_training_steps, optimizer=None)"],
    "evaluate": ["(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')"],
    "evaluation_loop": [
        "(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix='eval')"
    ],
    "floating_point_ops": ["(self, inputs)"],
    "get_batch_samples": ["(self, epoch_iterator, num_batches, device)"],
    "get_eval_dataloader": ["(self, eval_dataset=None)"],
    "get_test_dataloader": ["(self, test_dataset)"],
    "get_train_dataloader": ["(self)"],
    "init_hf_repo": ["(self, token=None)", "(self, token=None, private=None)"],
    "log": ["(self, logs, start_time=None)"],
    "prediction_step": ["(self, model, inputs, prediction_loss_only, ignore_keys=None)"],
    "push_to_hub": [
        "(self, commit_message='End of training', blocking=True, token=None, revision=None, **kwargs)",
        "(self, commit_message='End of training', blocking=True, token=None, revision=None, private=None, **kwargs)",
    ],
    "save_model": ["(self, output_dir=None, _internal_call=False)"],
    "train": ["(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)"],
}


def own_subclasses(base: type) -> set[type]:
    found = {each for child in base.__subclasses__() for each in {child, *own_subclasses(child)}}
    return {each for each in found if each.__module__.split(".")[0] in ("fnl_hf", train.__name__)}


def overridden() -> dict[str, set[str]]:
    """Methods of Trainer's -> the classes of ours that override them; not constructors, called by keyword."""
    for module in pkgutil.walk_packages(fnl_hf.__path__, "fnl_hf."):
        importlib.import_module(module.name)
    found: dict[str, set[str]] = {}
    for each in own_subclasses(Trainer):
        for name in vars(each).keys() & set(dir(Trainer)):
            if not name.startswith("__") and callable(getattr(Trainer, name)):
                found.setdefault(name, set()).add(each.__name__)
    return found


def signature(name: str) -> str:
    found = inspect.signature(getattr(Trainer, name))
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(inspect.Signature(plain))


def test_the_record_is_of_what_is_overridden():
    assert overridden().keys() == WRITTEN_AGAINST.keys()


@pytest.mark.parametrize("name", WRITTEN_AGAINST)
def test_trainer_s_method_is_the_one_that_ours_was_written_against(name):
    assert hasattr(Trainer, name), f"Trainer.{name} is gone from transformers {transformers.__version__}"
    assert signature(name) in WRITTEN_AGAINST[name], (
        f"Trainer.{name} is {signature(name)} in transformers {transformers.__version__} and was "
        f"{WRITTEN_AGAINST[name][-1]}: read what it does now, then mend {sorted(overridden()[name])} and this record"
    )


def test_the_documentation_says_why_for_each_of_them():
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \| [^|]+ \|$", page, flags=re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", classes)) for name, classes in rows} == overridden()
