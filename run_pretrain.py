#!/usr/bin/env python
"""Pretrain an FNL-BERT: masked language modeling, with or without next sentence prediction. Or distill: a compressed
model of any architecture learns from its original.

accelerate launch run_pretrain.py                        # the embedded corpus, configs/quickstart.yaml
accelerate launch run_pretrain.py a.yaml b.yaml --seed 1 # a later file overrides an earlier one, flags override both
accelerate launch run_pretrain.py --train_file corpus.jsonl.xz --preset base --attention_embedding_size 384
accelerate launch run_pretrain.py --objective distill --model_name_or_path small --teacher_name_or_path original
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import set_seed

from fnl_hf import UserInputError
from fnl_hf.bert.modeling_fnl_bert import FnlBertPreTrainedModel
from fnl_hf.data.corpus import DocumentStream, read_documents
from fnl_hf.data.masking import ATTENTION_KERNELS, MaskingTransform, UnmaskedTransform, collate_batch, mask_rows
from fnl_hf.data.readers import check_file
from fnl_hf.data.rows import RowOptions, make_rows
from fnl_hf.data.source import Source
from fnl_hf.data.streaming import StreamOrder, read_state, validate_shards
from fnl_hf.data.tokenizer import load_tokenizer, train_tokenizer, validate_same_vocabulary, validate_tokenizer
from fnl_hf.publishing.cards import describe_source
from fnl_hf.publishing.checkpoints import auto_class_of, copy_companions, find_companions
from fnl_hf.runs.command_line import parse_arguments, run_script
from fnl_hf.runs.locks import folders_in_use
from fnl_hf.runs.plan import DATA_FINGERPRINT
from fnl_hf.runs.same_model import validate_same_model
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.distillation import (
    OF_SEQUENCES,
    OF_TOKENS,
    DistillationTrainer,
    distillation_metrics,
    match_models,
)
from fnl_hf.training.metrics import pretraining_metrics, pretraining_statistics
from fnl_hf.training.models import build_pretraining_config, build_pretraining_model, load_text_model
from fnl_hf.training.optimizer_state import OptimizerStateCallback, optimizer_checkpoint
from fnl_hf.training.pretraining_arguments import DataArguments, ModelArguments, validate_distillation, validate_kernel
from fnl_hf.training.pretraining_trainer import PretrainingTrainer
from fnl_hf.training.sampling import order_seed
from fnl_hf.training.scripts import ScriptRun
from fnl_hf.training.trainer import build_trainer, train_and_save
from fnl_hf.training.unused_flags import warn_of_unused_flags
from fnl_hf.training.warm_start import WarmStartCallback, as_done, plan_warm_start, take_structure

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
AUTO_CLASSES = {"mlm": "AutoModelForMaskedLM", "mlm_nsp": "AutoModelForPreTraining"}
OBJECTIVES = {"mlm": "masked language modeling", "mlm_nsp": "masked language modeling and next sentence prediction"}
SPECIAL_TOKENS = ("cls_token", "sep_token")  # of which rows consist
MASKED = {"compute_metrics": pretraining_metrics, "preprocess_logits_for_metrics": pretraining_statistics}
OWN_RECIPE = {"dataset_name", "train_file", "config_name", "model_name_or_path"}


def get_tokenizer(model_args, checkpoint, documents, objective, trust_remote_code):
    """The named tokenizer, that of the checkpoint, or one trained on the documents; the same one when a run is
    resumed."""
    name = checkpoint or model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        tokenizer = load_tokenizer(name, trust_remote_code)
    elif isinstance(documents.train, DocumentStream):
        raise UserInputError("--streaming needs --tokenizer_name: a tokenizer cannot be trained on a stream")
    else:
        sizes = {"vocab_size": model_args.vocab_size, "alphabet_coverage": model_args.alphabet_coverage}
        tokenizer = train_tokenizer(documents.train, model_max_length=512, **sizes)
    validate_tokenizer(tokenizer, SPECIAL_TOKENS if objective == "distill" else (*SPECIAL_TOKENS, "mask_token"))
    return tokenizer


def with_quickstart(argv):
    """Put the quickstart's recipe before the flags, unless they name a config file, data, or a model."""
    flags = {word.split("=")[0].replace("-", "_").lstrip("_") for word in argv if word.startswith("-")}
    if argv and not argv[0].startswith("-") or flags & OWN_RECIPE:
        return argv
    return [str(QUICKSTART), *argv]


def plan_stream(data_args, args, checkpoint):
    """The shards of a stream and the order in which they are read, from the position of the checkpoint's run."""
    if not data_args.streaming:
        return None, None
    if args.max_steps <= 0:
        raise UserInputError("--streaming needs --max_steps: the length of a stream is not known")
    state = None if checkpoint is None else read_state(checkpoint)
    default = state.shards if state else args.world_size * max(1, args.dataloader_num_workers)
    shards = data_args.streaming_shards or default
    validate_shards(shards, args.world_size, args.dataloader_num_workers)
    batch, buffer = args.train_batch_size, data_args.shuffle_buffer_size
    return shards, StreamOrder(batch, buffer, order_seed(args), args.process_index, args.world_size, state)


def choose_model(model_args, data_args, tokenizer, trust_remote_code):
    """A function that builds the model, the teacher, and the arguments with the rows that it needs; bad input is
    refused here."""
    if data_args.objective != "distill":
        config = build_pretraining_config(model_args, tokenizer, data_args.max_seq_length)
        return partial(build_pretraining_model, model_args, config, data_args.objective), None, data_args
    teacher_name = model_args.teacher_name_or_path
    validate_same_vocabulary(tokenizer, load_tokenizer(teacher_name, trust_remote_code))
    student, teacher = [
        load_text_model(name, tokenizer, data_args.max_seq_length, model_args.attn_implementation, trust_remote_code)
        for name in (model_args.model_name_or_path, teacher_name)
    ]
    if data_args.attend_within_documents:
        for name, model in ((model_args.model_name_or_path, student), (teacher_name, teacher)):
            if not isinstance(model, FnlBertPreTrainedModel):
                raise UserInputError(
                    f"--attend_within_documents needs an FNL-BERT, but {name} is a {type(model).__name__}: `fnl-hf "
                    "convert` can convert a BERT"
                )
    logits = match_models(student, teacher)
    if data_args.line_by_line is None and OF_SEQUENCES in logits.values() and OF_TOKENS not in logits.values():
        data_args = replace(data_args, line_by_line=True)  # refuses what excludes it
    return lambda: student, teacher, data_args


def choose_transform(model_args, data_args, args, tokenizer):
    """From rows to the inputs of a model."""
    documents = ATTENTION_KERNELS[model_args.attn_implementation] if data_args.attend_within_documents else None
    if data_args.objective == "distill":
        return UnmaskedTransform(tokenizer, documents)
    return MaskingTransform(
        tokenizer,
        data_args.mlm_probability,
        args.seed,
        whole_word_mask=data_args.whole_word_mask,
        sparse=model_args.sparse_prediction,
        documents=documents,
    )


def prepare(model_args, data_args, args, checkpoint):
    """Turn documents into batches. Returns them with the tokenizer, the function that builds the model, and the
    teacher; the main process fills the caches."""
    shards, order = plan_stream(data_args, args, checkpoint)
    trusted = args.trust_remote_code
    cache = {"cache_dir": data_args.cache_dir, "num_proc": data_args.preprocessing_num_workers}
    with args.main_process_first(desc="reading the corpus"):
        source = Source(
            data_args.dataset_name,
            data_args.dataset_config_name,
            data_args.train_file,
            data_args.validation_file,
            data_args.text_column_name,
            shards,
        )
        documents = read_documents(
            source,
            held_out_percentage=data_args.validation_split_percentage,
            held_out_documents=data_args.streaming_validation_documents,
            strict=data_args.strict,
            **cache,
        )
        tokenizer = get_tokenizer(model_args, checkpoint, documents, data_args.objective, trusted)
        build_model, teacher, data_args = choose_model(model_args, data_args, tokenizer, trusted)
        options = RowOptions(
            data_args.max_seq_length,
            data_args.objective,
            bool(data_args.line_by_line),
            data_args.max_train_samples,
            data_args.max_eval_samples,
        )
        rows = make_rows(documents, tokenizer, options, order, **cache)
        batches = mask_rows(rows, choose_transform(model_args, data_args, args, tokenizer))
        return documents, tokenizer, build_model, teacher, rows, batches


def describe_data(documents, rows, data_args):
    """The name of the data, facts about them for the start of the run, and a notice if no data were named."""
    files = [Path(file).name for file in data_args.train_file or ()]  # not their path on this machine
    name = data_args.dataset_name or ", ".join(files) or "embedded corpus"
    length = data_args.max_seq_length

    def count(documents, rows):
        if isinstance(documents, DocumentStream):
            return f"a stream, cut into sequences of {length} tokens"
        sizes = f"{length} tokens ({len(rows) * length:,} in all)"
        if "length" in rows.column_names:  # padded
            sizes = f"at most {length} tokens"
        return f"{len(documents):,} documents, {len(rows):,} sequences of {sizes}"

    facts = {
        "training data": f"{name}: {count(documents.train, rows.train)}",
        "held-out data": count(documents.held_out, rows.held_out),
    }
    if data_args.dataset_name or files:
        return name, facts, None
    return (
        name,
        facts,
        "NO DATA NAMED: this is the EMBEDDED CORPUS. To use your own, give --train_file or --dataset_name",
    )


def parse_command(argv):
    """The arguments of a command line, and the run that they describe."""
    model_args, data_args, args = parse_arguments((ModelArguments, DataArguments, FnlTrainingArguments), argv)
    if args.do_predict:
        raise UserInputError("--do_predict: pretraining makes no predictions; use --do_eval")
    validate_kernel(model_args, args)
    if data_args.objective == "distill" and model_args.factorize_at_step is not None:
        raise UserInputError(
            f"--factorize_at_step ({model_args.factorize_at_step:g}) cannot be used with --objective distill: "
            "factorize the student first (fnl-hf factorize)"
        )
    validate_distillation(model_args, data_args.objective)
    planned = ScriptRun(args, argv, model_args, data_args)
    if not planned.plan.finished:
        for file in [*(data_args.train_file or ()), *(data_args.validation_file or ())]:
            check_file(file)
    return model_args, data_args, args, planned


def make_trainer(model, teacher, tokenizer, args, batches, plan, warm_start):
    """The Trainer, with what it starts from checked."""
    if plan.checkpoint is not None:
        if warm_start is not None:
            take_structure(model, plan.checkpoint)
        validate_same_model(plan.checkpoint, model)
    state_from = optimizer_checkpoint(args, model) if plan.checkpoint is None else None
    trainer_class, kind = PretrainingTrainer, MASKED
    if teacher is not None:
        trainer_class, kind = DistillationTrainer, {"teacher": teacher, "compute_metrics": distillation_metrics}
    trainer = build_trainer(
        trainer_class,
        model=model,
        args=args,
        train_dataset=batches.train,
        eval_dataset=batches.held_out,
        data_collator=collate_batch,
        processing_class=tokenizer,
        **kind,
    )
    if state_from is not None:
        trainer.add_callback(OptimizerStateCallback(trainer, state_from))
    if warm_start is not None:
        trainer.add_callback(WarmStartCallback(trainer, warm_start))
    return trainer


def describe_model(model, model_args, data_args, rows, warm_start):
    """The card's description of the objective, and of how layers became products."""
    is_padded = "length" in rows.held_out.column_names
    facts = {"sequence length": f"at most {data_args.max_seq_length}" if is_padded else data_args.max_seq_length}
    if data_args.objective == "distill":
        teacher, _ = describe_source(model_args.teacher_name_or_path)
        return {
            "facts": {"objective": "hidden states, and logits where both models have them"} | facts,
            "description": f"Distilled from {teacher} on text without labels.",
            "auto_class": auto_class_of(model),
            "teacher": model_args.teacher_name_or_path,
        }
    if warm_start is not None:
        facts["warm start"] = str(warm_start)
    words = "whole words" if data_args.whole_word_mask else "tokens"
    return {
        "facts": facts | {"masked": f"{data_args.mlm_probability:.1%} of the {words}"},
        "description": f"A BERT with factorized attention, pretrained with {OBJECTIVES[data_args.objective]}.",
        "auto_class": AUTO_CLASSES[data_args.objective],
    }


@folders_in_use()
def run(argv):
    model_args, data_args, args, planned = parse_command(with_quickstart(list(argv)))
    warn_of_unused_flags(argv, model_args, data_args, args)
    if planned.is_finished(model_args.model_name_or_path, model_args.teacher_name_or_path):
        return
    set_seed(args.seed)
    checkpoint = planned.plan.checkpoint
    documents, tokenizer, build_model, teacher, rows, batches = prepare(model_args, data_args, args, checkpoint)
    planned.record_data({DATA_FINGERPRINT: rows.fingerprint})
    model = build_model()
    companions = {} if teacher is None else find_companions(model_args.model_name_or_path)
    warm_start = plan_warm_start(model_args, args, model, batches.train)
    trainer = make_trainer(model, teacher, tokenizer, args, batches, planned.plan, warm_start)
    source, facts, notice = describe_data(documents, rows, data_args)
    planned.start(trainer, facts, notice)

    metrics = {}
    if args.do_train:
        metrics["train"] = train_and_save(trainer, checkpoint)
        if args.should_save:
            copy_companions(companions, Path(args.output_dir))
    if args.do_eval:
        metrics["eval"] = trainer.evaluate()
        if teacher is None:
            metrics["eval"]["unigram_entropy"] = rows.unigram_entropy
    planned.finish(
        trainer,
        metrics,
        source=source,
        language=None if notice is None else "en",
        title=Path(args.output_dir).resolve().name,
        dataset=data_args.dataset_name,
        base_model=model_args.model_name_or_path,
        **describe_model(model, model_args, data_args, rows, as_done(warm_start, trainer.state.log_history)),
    )


if __name__ == "__main__":
    run_script(run)
