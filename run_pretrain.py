#!/usr/bin/env python
"""Pretrain an FNL-BERT: masked language modelling, with or without next sentence prediction.

accelerate launch run_pretrain.py                        # the embedded corpus, configs/quickstart.yaml
accelerate launch run_pretrain.py config.yaml --seed 1   # flags override the file
accelerate launch run_pretrain.py --train_file corpus.jsonl.xz --preset base --attention_embedding_size 384
"""

from pathlib import Path

from transformers import set_seed

from fnl_hf import UserInputError
from fnl_hf.data.corpus import load_corpus
from fnl_hf.data.masking import collate_batch
from fnl_hf.data.pretraining import prepare_data, prepare_stream
from fnl_hf.data.readers import check_file
from fnl_hf.data.tokenizer import load_tokenizer, train_tokenizer, validate_mlm_tokenizer
from fnl_hf.runs.command_line import parse_arguments, run_script
from fnl_hf.runs.phases import OptimizerStateCallback, optimizer_checkpoint, phases_of, validate_phases
from fnl_hf.runs.plan import DATA_FINGERPRINT, validate_resume
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.metrics import pretraining_metrics, pretraining_statistics
from fnl_hf.training.models import build_pretraining_config, build_pretraining_model
from fnl_hf.training.pretraining_arguments import DataArguments, ModelArguments, validate_kernel
from fnl_hf.training.pretraining_trainer import PretrainingTrainer
from fnl_hf.training.scripts import ScriptRun
from fnl_hf.training.trainer import build_trainer, train_and_save

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
AUTO_CLASSES = {"mlm": "AutoModelForMaskedLM", "mlm_nsp": "AutoModelForPreTraining"}
OWN_RECIPE = {"dataset_name", "train_file", "config_name", "model_name_or_path"}


def get_tokenizer(model_args, plan, corpus=None):
    """The named tokenizer, the checkpoint's, or one trained on the corpus; the same again when a run is resumed."""
    source = plan.checkpoint or model_args.tokenizer_name or model_args.model_name_or_path
    if source is not None:
        tokenizer = load_tokenizer(source)
    elif corpus is None:
        raise UserInputError("--streaming needs --tokenizer_name: a tokenizer cannot be trained on a stream")
    else:
        tokenizer = train_tokenizer(corpus["train"], model_args.vocab_size, model_max_length=512)
    validate_mlm_tokenizer(tokenizer)
    return tokenizer


def with_quickstart(argv):
    """The quickstart's recipe before the flags, unless they name a config file, data, or a model of their own."""
    flags = {word.split("=")[0].replace("-", "_").lstrip("_") for word in argv if word.startswith("-")}
    if argv and not argv[0].startswith("-") or flags & OWN_RECIPE:
        return argv
    return [str(QUICKSTART), *argv]


def prepare(model_args, data_args, args, plan, longest):
    """Tokenizer, configuration and data; the main process fills the caches."""
    with args.main_process_first(desc="reading the corpus"):
        if data_args.streaming:
            tokenizer = get_tokenizer(model_args, plan)
            config = build_pretraining_config(model_args, tokenizer, longest)
            return tokenizer, config, prepare_stream(model_args, data_args, args, tokenizer, plan.checkpoint)
        corpus = load_corpus(
            data_args.dataset_name,
            data_args.dataset_config_name,
            data_args.train_file,
            data_args.validation_file,
            data_args.validation_split_percentage,
            data_args.text_column_name,
            data_args.cache_dir,
            data_args.strict,
            data_args.preprocessing_num_workers,
        )
        tokenizer = get_tokenizer(model_args, plan, corpus)
        config = build_pretraining_config(model_args, tokenizer, longest)
        return tokenizer, config, prepare_data(model_args, data_args, args, corpus, tokenizer)


def plan_phase(argv):
    """The arguments of one phase, and the run that they describe."""
    model_args, data_args, args = parse_arguments((ModelArguments, DataArguments, FnlTrainingArguments), argv)
    if args.do_predict:
        raise UserInputError("--do_predict: pretraining has nothing to predict; use --do_eval")
    validate_kernel(model_args, args)
    planned = ScriptRun(args, argv, model_args, data_args)
    if not planned.plan.finished:
        for file in [*(data_args.train_file or ()), *(data_args.validation_file or ())]:
            check_file(file)
    return model_args, data_args, args, planned


def make_trainer(model, tokenizer, args, data, plan):
    """The Trainer of one phase, with what it starts from checked."""
    if plan.checkpoint is not None:
        validate_resume(plan.checkpoint, model)
    state_from = optimizer_checkpoint(args, model) if plan.checkpoint is None else None
    trainer = build_trainer(
        PretrainingTrainer,
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=collate_batch,
        processing_class=tokenizer,
        compute_metrics=pretraining_metrics,
        preprocess_logits_for_metrics=pretraining_statistics,
    )
    if state_from is not None:
        trainer.add_callback(OptimizerStateCallback(trainer, state_from))
    return trainer


def train_phase(model_args, data_args, args, planned, longest, later):
    """One phase; ``longest`` is the longest sequence of all phases, which the model must hold from the first. ``later``
    are the runs of the phases that follow."""
    if planned.is_finished(model_args.model_name_or_path):
        return
    set_seed(args.seed)
    tokenizer, config, data = prepare(model_args, data_args, args, planned.plan, longest)
    planned.record_data({DATA_FINGERPRINT: data.fingerprint})
    model = build_pretraining_model(model_args, config, data_args.objective)
    trainer = make_trainer(model, tokenizer, args, data, planned.plan)
    planned.start(later)

    metrics = {}
    if args.do_train:
        metrics["train"] = train_and_save(trainer, planned.plan.checkpoint)
    if args.do_eval:
        metrics["eval"] = trainer.evaluate() | {"unigram_entropy": data.unigram_entropy}
    files = [Path(file).name for file in data_args.train_file or ()]  # not where they lie on this machine
    planned.finish(
        trainer,
        metrics,
        source=data_args.dataset_name or ", ".join(files) or "embedded corpus",
        title=Path(args.output_dir).resolve().name,
        description="A BERT with factorized attention, pretrained with masked language modelling.",
        auto_class=AUTO_CLASSES[data_args.objective],
        dataset=data_args.dataset_name,
    )


def run(argv):
    # Every phase's command line is checked before the first one takes its time.
    phases = [plan_phase(command) for command in phases_of(with_quickstart(list(argv)))]
    validate_phases([(args, planned.plan) for _, _, args, planned in phases])
    longest = max(data_args.max_seq_length for _, data_args, *_ in phases)
    runs = [planned for *_, planned in phases]
    for number, phase in enumerate(phases, start=1):
        train_phase(*phase, longest, later=runs[number:])


if __name__ == "__main__":
    run_script(run)
