"""Fine-tuning on SQuAD: evaluation turns logits into answers and scores them."""

import json
from pathlib import Path
from typing import Any

import evaluate
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler

from fnl_hf.errors import UserInputError
from fnl_hf.squad import fnl_squad
from fnl_hf.squad.answers import AnswerOptions, Answers, answers_from_logits
from fnl_hf.squad.features import ANSWER_COLUMNS
from fnl_hf.training.distillation import Teacher, answer_divergence, token_mask
from fnl_hf.training.sampling import GROUPED, LengthSampler, order_seed, validate_sampling_strategy
from fnl_hf.training.trainer import FnlTrainer, labels_of

TEACHER_SHARE, TEMPERATURE = 0.5, 2.0


def validate_scoring(args) -> None:
    """Raise UserInputError for evaluation without predictions, from which answers are computed."""
    if args is not None and args.prediction_loss_only:
        raise UserInputError("--prediction_loss_only (True) keeps no predictions to compute answers from: leave it out")


def validate_size(args, features: Dataset | None) -> None:
    """Raise UserInputError if ``args`` drop all of the features to train on."""
    if args is None or features is None or not args.dataloader_drop_last:
        return
    batch = args.train_batch_size * args.world_size
    if len(features) < batch:
        raise UserInputError(
            f"--dataloader_drop_last (True): the training data are {len(features)} windows, fewer than one batch of "
            f"{batch}: leave it out, or use a smaller batch"
        )


class SquadTrainer(FnlTrainer):
    """FnlTrainer whose ``evaluate`` reports exact match and F1.

    Args:
        eval_examples: the questions that ``eval_dataset``'s features belong to.
        answer_options: how logits become answers.
        teacher: a question answering model whose logits are half of the loss: the mean over the questions of
            ½ CE(labels) + ½ :func:`fnl_hf.training.distillation.answer_divergence` at temperature 2 (as DistilBERT's).

    Raises:
        UserInputError: see :func:`validate_scoring` and :func:`validate_size`; an order that cannot be resumed.
    """

    def __init__(
        self,
        model=None,
        args=None,
        eval_examples: Dataset | None = None,
        *,
        answer_options: AnswerOptions,
        teacher: PreTrainedModel | None = None,
        **kwargs,
    ):
        validate_scoring(args)  # before Trainer's constructor makes the output folder
        validate_size(args, kwargs.get("train_dataset"))
        validate_sampling_strategy(args, GROUPED)
        super().__init__(model, args, **kwargs)
        self.eval_examples = eval_examples
        self.answer_options = answer_options
        self.teacher = None if teacher is None else Teacher(teacher, self.args.device)
        version = "v2.0" if answer_options.version_2_with_negative else "v1.1"
        # Each process computes the same scores from the same gathered logits.
        self.metric = evaluate.load(fnl_squad.__file__, version, experiment_id=f"rank{self.args.process_index}")

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return LengthSampler(sampler, order_seed(self.args)) if isinstance(sampler, LengthGroupedSampler) else sampler

    def _loss_and_outputs(self, model, inputs: dict[str, Any], items) -> Any:
        if self.teacher is None:
            return super()._loss_and_outputs(model, inputs, items)
        loss, outputs = super()._loss_and_outputs(model, {**inputs, "return_dict": True}, items)
        with self.accelerator.autocast():
            target = self.teacher(inputs)
        divergence = answer_divergence(outputs, target, token_mask(inputs), TEMPERATURE)  # (B,)
        counts = labels_of(inputs, "start_positions").ne(-100)
        total, processes = counts.sum(), 1
        if items is not None:
            total = items["start_positions"]
            processes = self.processes_to_average()
        learned = (divergence * counts).sum() * processes / total
        return (1.0 - TEACHER_SHARE) * loss + TEACHER_SHARE * learned, outputs

    def answer(self, features: Dataset, examples: Dataset, metric_key_prefix: str) -> tuple[Answers, dict[str, Any]]:
        """Answers to ``examples``, and the speed of the evaluation."""
        inputs = features.remove_columns(list(ANSWER_COLUMNS))
        output = super().predict(inputs, metric_key_prefix=metric_key_prefix)
        logits: Any = output.predictions  # start, end and, for some models, more
        answers = answers_from_logits(examples, features, logits[0], logits[1], self.answer_options)
        return answers, output.metrics or {}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores on the questions given at construction; writes their answers to the output folder."""
        answers, metrics = self.answer(self.eval_dataset, self.eval_examples, metric_key_prefix)
        scores = self.score(answers, self.eval_examples)
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        if self.is_world_process_zero():
            write_answers(self.args.output_dir, metric_key_prefix, answers)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, answers: Answers, examples: Dataset) -> dict[str, Any]:
        """Exact match, F1 and, for v2.0, the best thresholds."""
        references: list[dict[str, Any]] = [{"id": row["id"], "answers": row["answers"]} for row in examples]
        predictions: list[dict[str, Any]]
        if not self.answer_options.version_2_with_negative:
            predictions = [{"id": i, "prediction_text": text} for i, text in answers.text.items()]
            return self.metric.compute(predictions=predictions, references=references)
        predictions = [
            {"id": i, "prediction_text": text, "no_answer_probability": answers.null_odds[i]}
            for i, text in answers.best_span.items()
        ]
        threshold = self.answer_options.null_score_diff_threshold
        return self.metric.compute(predictions=predictions, references=references, no_answer_threshold=threshold)


def write_answers(folder: str | Path, prefix: str, answers: Answers) -> None:
    """``{prefix}_predictions.json``, ``{prefix}_nbest_predictions.json`` and, for v2.0, ``{prefix}_null_odds.json``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"predictions": answers.text, "nbest_predictions": answers.nbest}
    if answers.null_odds:
        files["null_odds"] = answers.null_odds
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / f"{prefix}_{name}.json").write_text(text + "\n", encoding="utf-8")
