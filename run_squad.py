#!/usr/bin/env python
"""Fine-tune a BERT-like model, factorized or stock, on extractive question answering (SQuAD v1.1 or v2.0).

accelerate launch run_squad.py --model_name_or_path output/pretrain                    # the embedded sample
accelerate launch run_squad.py --model_name_or_path M --train_file train.json --validation_file dev.json
accelerate launch run_squad.py --model_name_or_path M --dataset_name rajpurkar/squad_v2 --version_2_with_negative true
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import DataCollatorWithPadding, set_seed
from transformers.utils import logging

from fnl_hf import UserInputError
from fnl_hf.data.rows import first_rows
from fnl_hf.data.tokenizer import load_tokenizer
from fnl_hf.errors import validate_bounds
from fnl_hf.runs.command_line import parse_arguments, run_script
from fnl_hf.runs.locks import folders_in_use
from fnl_hf.runs.plan import DATA_FINGERPRINT, TEST_FINGERPRINT, VALIDATION_FINGERPRINT
from fnl_hf.runs.same_model import validate_same_model
from fnl_hf.runs.seeds import commands_of_seeds, summarize_seeds
from fnl_hf.squad.answers import AnswerOptions
from fnl_hf.squad.features import (
    FeatureMaker,
    load_sample,
    load_squad_hub,
    questions_fingerprint,
    read_squad_file,
    validate_ids,
)
from fnl_hf.squad.trainer import SquadTrainer, validate_scoring, write_answers
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.models import build_question_answering_model, load_answer_teacher
from fnl_hf.training.scripts import ScriptRun
from fnl_hf.training.trainer import build_trainer, train_and_save
from fnl_hf.training.unused_flags import warn_of_unused_flags

logger = logging.get_logger("fnl_hf.run_squad")


@dataclass
class ModelArguments:
    """What to fine-tune."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model to fine-tune: folder or Hub name."})
    config_name: str | None = field(
        default=None, metadata={"help": "Start from random weights of this configuration instead, as a control."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer: folder or Hub name. Default: that of the checkpoint."}
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Teacher: a fine-tuned model whose logits the student learns in addition to the labels. Folder "
            "or Hub name."
        },
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": "fnl_bert: load the weights of a BERT into an FNL-BERT with E = hidden size.",
            "choices": ["fnl_bert"],
        },
    )


@dataclass
class DataArguments:
    """What to train and evaluate on. Without any file and --dataset_name: the embedded sample."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, for example rajpurkar/squad."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training questions: JSON in the layout of SQuAD v1.1 or v2.0."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Held-out questions, in the same layout."})
    test_file: str | None = field(
        default=None, metadata={"help": "Questions for --do_predict, in the same layout; answers are optional."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Cache folder for data sets and features."})
    max_seq_length: int = field(
        default=384, metadata={"help": "Maximum length of a window: tokens of question, context and special tokens."}
    )
    doc_stride: int = field(
        default=128,
        metadata={
            "help": "Stride of the windows over a long context: tokens from the start of one window to the start of "
            "the next, as in BERT's code."
        },
    )
    pad_to_max_length: bool = field(
        default=True,
        metadata={
            "help": "Pad every window to --max_seq_length. false pads to the longest window of the batch, which is "
            "faster; but as in BERT, start and end probabilities include the padding, so the loss then depends on "
            "how the windows are batched."
        },
    )
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Allow questions without an answer (SQuAD v2.0)."}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={
            "help": "Predict no answer if its score minus that of the best span exceeds this threshold (SQuAD v2.0)."
        },
    )
    n_best_size: int = field(default=20, metadata={"help": "Candidate spans to keep per question."})
    max_answer_length: int = field(default=30, metadata={"help": "Maximum number of tokens in an answer."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that compute the features."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on only the first so many questions, for a quick test."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on only the first so many questions."}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Predict only the first so many questions."}
    )

    def __post_init__(self):
        validate_bounds("preprocessing_num_workers", self.preprocessing_num_workers, 1)


@dataclass
class SquadTrainingArguments(FnlTrainingArguments):
    """FnlTrainingArguments; the best model is the one with the best F1."""

    metric_for_best_model: str | None = field(default="f1", metadata={"help": "Metric that selects the best model."})
    seeds: list[int] | None = field(
        default=None,
        metadata={
            "help": "Train one run per seed, in <output_dir>/seed-<n>, and write the mean and standard deviation of "
            "their scores to <output_dir>/seeds.json."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        validate_scoring(self)


FINGERPRINTS = {"train": DATA_FINGERPRINT, "validation": VALIDATION_FINGERPRINT, "test": TEST_FINGERPRINT}
ARGUMENTS = (ModelArguments, DataArguments, SquadTrainingArguments)


def is_sample(data_args):
    """Whether no data are named, so that the embedded sample is used."""
    return not (data_args.dataset_name or data_args.train_file or data_args.validation_file or data_args.test_file)


def load_examples(data_args, split):
    """The questions of one split: from its file, the Hub, or the sample if no source is named."""
    file = getattr(data_args, f"{split}_file")
    if file is not None:
        examples = read_squad_file(file)
    elif data_args.dataset_name is not None:
        examples = load_squad_hub(data_args.dataset_name, data_args.dataset_config_name, split, data_args.cache_dir)
    elif split != "test" and is_sample(data_args):
        examples = load_sample(split)
    else:
        raise UserInputError(f"no questions for {'prediction' if split == 'test' else split}: give --{split}_file")
    if split != "train":
        validate_ids(examples, split)
    flag = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}[split]
    examples = first_rows(examples, flag, getattr(data_args, flag))
    unanswerable = sum(not answers["text"] for answers in examples["answers"])
    if unanswerable and split != "test" and not data_args.version_2_with_negative:
        raise UserInputError(
            f"{unanswerable} of {len(examples)} {split} questions have no answer: set --version_2_with_negative true"
        )
    return examples


def load_splits(data_args, args):
    """{split: questions} of the requested splits, and their fingerprints for the run's description."""
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    with args.main_process_first(desc="reading questions"):
        questions = {split: load_examples(data_args, split) for split, do in wanted.items() if do}
    return questions, {FINGERPRINTS[split]: questions_fingerprint(examples) for split, examples in questions.items()}


def validate_finished(planned, data_args, args):
    """Compare the questions of a finished run with those at its start; their files may have been deleted."""
    try:
        _, fingerprints = load_splits(data_args, args)
    except UserInputError as error:
        logger.warning(
            f"The questions of the finished run in {args.output_dir} could not be read to check that they are "
            f"unchanged: {error}"
        )
        return
    planned.record_data(fingerprints)


def make_features(data_args, args, tokenizer, questions):
    """{split: features} for the questions of :func:`load_splits`."""
    lengths = (data_args.max_seq_length, data_args.doc_stride)
    maker = FeatureMaker(tokenizer, *lengths, data_args.cache_dir, data_args.preprocessing_num_workers)
    features = {}
    with args.main_process_first(desc="making features"):
        for split, examples in questions.items():
            features[split] = (maker.train_dataset if split == "train" else maker.eval_dataset)(examples)
            maker.warn_of_unknown_tokens(features[split], f"{split} questions")
    return features


def make_trainer(model, teacher, tokenizer, data_args, args, questions, features):
    """A SquadTrainer for what :func:`load_splits` and :func:`make_features` give."""
    padding = {"padding": "max_length", "max_length": data_args.max_seq_length} if data_args.pad_to_max_length else {}
    return build_trainer(
        SquadTrainer,
        model=model,
        teacher=teacher,
        args=args,
        train_dataset=features.get("train"),
        eval_dataset=features.get("validation"),
        eval_examples=questions.get("validation"),
        answer_options=AnswerOptions(
            data_args.n_best_size,
            data_args.max_answer_length,
            data_args.version_2_with_negative,
            data_args.null_score_diff_threshold,
        ),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, **padding),
    )


def describe_data(data_args, questions, features):
    """Facts about the data for the start of the run, and a notice if no data were named."""
    facts = {}
    for split, examples in questions.items():
        file = getattr(data_args, f"{split}_file")
        name = Path(file).name if file else data_args.dataset_name or "embedded sample"
        facts[f"{split} data"] = (
            f"{name}: {len(examples):,} questions, {len(features[split]):,} windows of at most "
            f"{data_args.max_seq_length} tokens"
        )
    flags = "To use your own, give --train_file and --validation_file, or --dataset_name"
    notice = f"NO DATA NAMED: this is the EMBEDDED SAMPLE, too small for meaningful scores. {flags}"
    return facts, notice if is_sample(data_args) else None


def plan_one(arguments, argv):
    """The arguments of one run, and the run that they describe."""
    model_args, data_args, args = arguments
    if model_args.tokenizer_name is None and model_args.model_name_or_path is None:
        raise UserInputError("give --model_name_or_path, or --config_name and --tokenizer_name")
    return model_args, data_args, args, ScriptRun(args, argv, model_args, data_args)


def run_one(model_args, data_args, args, planned):
    """Train, evaluate and predict, as the flags request."""
    if planned.plan.finished:
        validate_finished(planned, data_args, args)
    if planned.is_finished(model_args.model_name_or_path, model_args.teacher_name_or_path):
        return
    set_seed(args.seed)
    checkpoint = planned.plan.checkpoint
    trusted = args.trust_remote_code
    tokenizer = load_tokenizer(checkpoint or model_args.tokenizer_name or model_args.model_name_or_path, trusted)
    model = build_question_answering_model(model_args, tokenizer, data_args.max_seq_length, args.do_train, trusted)
    if checkpoint is not None:
        validate_same_model(checkpoint, model)
    teacher = None
    if model_args.teacher_name_or_path is not None and args.do_train:
        teacher = load_answer_teacher(model_args.teacher_name_or_path, tokenizer, data_args.max_seq_length, trusted)
    questions, fingerprints = load_splits(data_args, args)
    planned.record_data(fingerprints)
    features = make_features(data_args, args, tokenizer, questions)
    trainer = make_trainer(model, teacher, tokenizer, data_args, args, questions, features)
    planned.start(trainer, *describe_data(data_args, questions, features))

    metrics = {}
    if args.do_train:
        metrics["train"] = train_and_save(trainer, checkpoint)
    if args.do_eval:
        metrics["eval"] = trainer.evaluate()
    if args.do_predict:
        answers, metrics["predict"] = trainer.answer(features["test"], questions["test"], "predict")
        if trainer.is_world_process_zero():
            write_answers(args.output_dir, "predict", answers)
    planned.finish(
        trainer,
        metrics,
        source=data_args.dataset_name or data_args.train_file or "the embedded sample of fnl_hf",
        facts={"sequence length": data_args.max_seq_length, "document stride": data_args.doc_stride},
        title=f"{Path(args.output_dir).resolve().name} (question answering)",
        description="Fine-tuned for extractive question answering.",
        auto_class="AutoModelForQuestionAnswering",
        dataset=data_args.dataset_name,
        base_model=model_args.model_name_or_path,
        teacher=model_args.teacher_name_or_path,
    )


@folders_in_use()
def run(argv):
    arguments = parse_arguments(ARGUMENTS, argv)
    args = arguments[-1]
    warn_of_unused_flags(argv, *arguments)
    if args.seeds is None:
        run_one(*plan_one(arguments, argv))
        return
    # Check every seed's folder before the first seed is trained.
    commands = commands_of_seeds(argv, args)
    for one in [plan_one(parse_arguments(ARGUMENTS, command), command) for command in commands]:
        run_one(*one)
    if args.should_save:
        print(summarize_seeds(args.output_dir, args.seeds))


if __name__ == "__main__":
    run_script(run)
