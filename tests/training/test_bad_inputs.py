"""What run_pretrain.py refuses, in one table: corpora, config files, models, checkpoints, flags.

Each gets one clear line that names the thing, the bound and the value; no output folder is made, and what is there is
as it was, to the byte.
"""

import gzip
import lzma
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save
from transformers import GPT2Config

import run_pretrain
from fnl_hf import UserInputError
from tests.conftest import launch
from tests.training.bad_inputs import (
    SPECIALS,
    STREAM,
    TEXT,
    Place,
    bert,
    config,
    contents,
    corpus,
    edit,
    flags,
    flip_a_bit,
    from_checkpoint,
    itself,
    moved,
    not_finite,
    other_text_under_the_same_name,
    overwriting,
    prepared,
    pretrained,
    replaced_by,
    resumed,
    somebody_elses,
    tokenizer,
    unrecorded,
    without,
    word_level,
    words,
    write,
)

# name -> what makes the bad input, and what the message says of it
CORPORA = {
    "missing": (flags(train_file="/no/such.txt"), "^/no/such.txt: no such file$"),
    "a folder": (corpus("c.txt", Path.mkdir), "c.txt: not a file$"),
    "a link to itself": (corpus("c.txt", itself), "c.txt: no such file$"),
    "empty": (corpus("c.txt", ""), "c.txt: the file is empty$"),
    "wrong suffix": (corpus("c.doc", TEXT), "c.doc: unknown file type, must be one of .txt, .json, .jsonl"),
    "only blank lines": (corpus("c.txt", "\n \n\t\n"), "c.txt: no text$"),
    "not UTF-8": (corpus("c.txt", "Müller\n".encode("latin1") * 99), "c.txt: no text, all .* broken: not UTF-8$"),
    "UTF-16": (corpus("c.csv", f"text\n{TEXT}".encode("utf-16")), "c.csv: the text is UTF-16, it must be UTF-8$"),
    "torn gzip": (corpus("c.txt.gz", gzip.compress(TEXT.encode())[:-20]), "c.txt.gz: cannot be read as text: .*ended"),
    "torn xz": (corpus("c.txt.xz", lzma.compress(TEXT.encode())[:-20]), "c.txt.xz: cannot be read as text: .*ended"),
    "no such column": (corpus("c.jsonl", '{"body": "a"}\n' * 9), r"c.jsonl: no column 'text', only \['body'\]"),
    "every record broken": (corpus("c.jsonl", "{\n" * 9), "c.jsonl: no text, all records are broken: not JSON$"),
    "one broken record": (corpus("c.jsonl", '{"text": "a"}\n{\n', strict="true"), "1 of 2 lines .* --strict refuses"),
    "torn JSON array": (corpus("c.json", '[{"text": "a"}, {"te'), "c.json: cannot be read as array: Unterminated"),
    "unreadable Parquet": (corpus("c.parquet", b"PAR1 torn"), "c.parquet: cannot be read as parquet: .*magic"),
    "a column of numbers": (corpus("c.parquet", pa.table({"text": [1, 2]})), "column 'text' holds int64, not text$"),
    "two columns of one name": (
        corpus("c.parquet", pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"])),
        "c.parquet: 2 columns are named 'text'$",
    ),
    "the same file twice": (
        lambda place: [*place.command(), "--train_file", *[str(place.corpus)] * 2], "corpus.txt: the file is given twi"
    ),
    "too few documents": (corpus("c.txt", "a single one"), "1 documents, too few to hold out 5.0%: give a --valid"),
    "shorter than a sequence": (corpus("c.txt", "a b\nc"), r"^training data: .* \(1 documents\) is shorter than one"),
    "held-out shorter than one": (flags(max_seq_length=512), "^held-out data: .* shorter .* --max_seq_length 512$"),
    "fewer than a global batch": (
        flags(max_train_samples=23, gradient_accumulation_steps=3), "are 23 samples, fewer than .* batch of 24 "
    ),
    "a stream of another column": (corpus("c.jsonl", '{"body": "a"}\n' * 99, **STREAM), "c.jsonl: no column 'text'"),
    "a stream of broken records": (
        corpus("c.jsonl", "{\n" * 99, **STREAM), "has 0 documents and 99 broken records, and 9 documents are to be held"
    ),
    "a stream of nothing": (flags(**STREAM, train_file=None), "^--streaming needs one of --dataset_name and --train_f"),
    "two sources": (flags(dataset_name="x"), r"give --dataset_name \(x\) or --train_file \(.*\), not both"),
    "not on the Hub": (flags(train_file=None, dataset_name="no/such"), "^--dataset_name no/such: "),
}  # fmt: skip

CONFIGS = {
    "missing": (lambda place: ["/no/such.yaml"], "^/no/such.yaml: cannot be read: .*No such file"),
    "wrong suffix": (config("seed: 1", "c.toml"), r"c.toml: before the flags stand config files alone \(.yaml, .yml, "),
    "not YAML": (config("seed: ["), "c.yaml: cannot be read: line 1: expected the node content"),
    "torn JSON": (config('{"seed": 1', "c.json"), "c.json: cannot be read: line 1: expected ',' or '}'"),
    "not UTF-8": (config("run_name: Müller".encode("latin1")), "c.yaml: cannot be read: 'utf-8' codec"),
    "deeper than it can be read": (config("a: " + "[" * 999), "c.yaml: cannot be read: maximum recursion"),
    "code": (config("seed: !!python/object/apply:os.getpid []"), "c.yaml: .* could not determine a constructor"),
    "not a mapping": (config("- 3"), "c.yaml: must hold a mapping of flags to values, holds list$"),
    "empty": (config(""), "c.yaml: must hold a mapping of flags to values, holds NoneType$"),
    "unknown key": (config("no_such_flag: 3"), "^unknown argument: --no_such_flag 3$"),
    "a key twice": (config("seed: 1\nseed: 2"), "c.yaml: cannot be read: line 2: seed is given twice$"),
    "a key in two spellings": (config("max_steps: 1\nmax-steps: 2"), "c.yaml: a flag is given twice, with '-' and"),
    "a key that is no name": (config("3: 4"), "c.yaml: 3 is not the name of a flag$"),
    "value of the wrong kind": (config("seed: true"), "--seed: invalid int value: 'true'$"),
    "mapping for a number": (config("learning_rate: {a: 3}"), r"^--learning_rate takes no dict \({'a': 3}\)$"),
    "list for a number": (config("dataloader_num_workers: [1, 2]"), "^--dataloader_num_workers takes one value, 2 is"),
    "a list without end": (config("lr_scheduler_kwargs: &a {x: *a}"), "^--lr_scheduler_kwargs: Circular reference"),
    "a value that is a flag": (
        config("train_file: [a.txt, --overwrite_output_dir]"), r"^--train_file \(--overwrite_output_dir\) must not be"
    ),
    "a null byte": (config('cache_dir: "a\\0"'), r"^--cache_dir \('a\\x00'\) must not hold a null byte$"),
    "second file": (words("c.yaml"), "^--use_cpu takes one value, c.yaml is one too many$"),
    "second file missing": (
        lambda place: [config("seed: 1")(place)[0], "/no/such.yaml"], "^/no/such.yaml: cannot be read: .*No such file"
    ),
    "phases": (
        config("phases: [{max_steps: 1}, {max_steps: 2}]"),
        "c.yaml: 'phases' is no flag any more: .*/c.yaml SECOND.yaml --model_name_or_path FIRST --optimizer_state_from",
    ),
}  # fmt: skip

MODELS = {
    "E no multiple of heads": (
        flags(attention_embedding_size=15), r"attention_embedding_size \(15\) must be a positive multiple of .*\(2\)$"
    ),
    "spectral with E above d": (
        flags(attention_embedding_size=64, attention_init="spectral"), r"\(64\) <= hidden_size \(32\)"
    ),
    "no configuration": (flags(config_name="/no/such"), "^no usable configuration in /no/such: "),
    "torn configuration": (
        prepared(write("config.json", "{"), config_name="<here>"), "^no usable configuration in .*JSON"
    ),
    "another architecture": (
        prepared(GPT2Config().save_pretrained, config_name="<here>"),
        "is a 'gpt2' checkpoint: it must be of model type 'bert' or 'fnl_bert'$",
    ),
    "unknown architecture": (bert("no_such"), "^no usable configuration in .* has model type `no_such`"),
    "a word for a number": (bert(hidden_size="big"), "Field 'hidden_size' expected int, got str .value: 'big'.$"),
    "no layers": (bert(num_hidden_layers=0), r"num_hidden_layers \(0\) must be at least 1"),
    "dropout that is no number": (
        flags(config_overrides="hidden_dropout_prob=nan"), r"hidden_dropout_prob \(nan\) must be at least 0.0 and"
    ),
    "unknown activation": (bert(hidden_act="nope"), r"hidden_act \(nope\) is no activation"),
    "vocabulary too small": (bert(vocab_size=7), r"tokenizer has \d+ tokens, more than the model's vocab_size \(7\)$"),
    "positions too few": (
        bert(max_position_embeddings=9), r"^--max_seq_length \(16\) exceeds the model's max_position_embeddings \(9\)$"
    ),
    "sentences without types": (
        flags(objective="mlm_nsp", config_overrides="type_vocab_size=1"), r"needs a type_vocab_size \(1\) of at least 2"
    ),
    "too large for the machine": (flags(config_overrides="hidden_size=1000000000000"), "can.t allocate memory"),
    "unknown override": (flags(config_overrides="no_such=3"), "^--config_overrides no_such=3: key no_such isn't"),
    "override without value": (flags(config_overrides="hidden_size"), "^--config_overrides hidden_size must be like"),
    "override of nothing": (
        flags(config_overrides="attention_embedding_size=4"), "^--config_overrides attention_embedding_size=4: "
    ),
    "two sources": (flags(preset="base", config_name="x"), "^give one of --preset, .* not --preset and --config_name$"),
    "another E": (pretrained(attention_embedding_size=8), r"\(8\) differs from that of .* \(32\)$"),
    "other shapes": (
        pretrained(config_overrides="intermediate_size=11"),
        r"intermediate.dense.bias is \(37,\) there and \(11,\) here$",
    ),
    "torn weights": (pretrained(write("model.safetensors", "torn")), "^no model of the wanted kind .* deserializing"),
    "weights of something else": (
        pretrained(write("model.safetensors", save({"x": torch.ones(3)}, {"format": "pt"}))),
        "holds none of the model's weights",
    ),
    "weights that are no numbers": (pretrained(not_finite), "model: bert.* is not finite$"),
    "no tokenizer": (flags(tokenizer_name="/no/such"), "^no tokenizer in /no/such: "),
    "torn tokenizer": (tokenizer(write("tokenizer.json", "{")), "^no tokenizer in "),
    "tokenizer that is a list": (tokenizer(write("tokenizer_config.json", "[]")), "^no tokenizer in "),
    "tokenizer without words": (
        tokenizer(without("tokenizer.json")), "has no vocabulary, only 5 special tokens$"
    ),
    "tokenizer without [MASK]": (
        tokenizer(word_level(**SPECIALS | {"mask_token": None})), r"the tokenizer of .* has no \['mask_token'\]$"
    ),
    "whole words without WordPiece": (
        tokenizer(
            word_level(**SPECIALS), whole_word_mask="true"
        ),
        "^--whole_word_mask needs a WordPiece tokenizer: that of .* has no piece '##...'$",
    ),
}  # fmt: skip

CHECKPOINTS = {
    "none": (flags(resume_from_checkpoint="/no/such"), "^--resume_from_checkpoint /no/such: no complete checkpoint"),
    "a run's folder": (
        resumed(resume_from_checkpoint="<here>/out"), "no complete checkpoint there: trainer_state.json is missing$"
    ),
    "bit flipped": (
        from_checkpoint(flip_a_bit), "optimizer.pt is not what was written: its checksum"
    ),
    "bit flipped, no other one": (
        resumed(flip_a_bit), "out has no complete checkpoint: checkpoint-2: optimizer.pt is not .* --overwrite_output_d"
    ),
    "checksums emptied": (
        from_checkpoint(write("checkpoint-2/checksums.json", "{}")),
        "checksums.json does not list trainer_state.json$",
    ),
    "torn weights": (
        from_checkpoint(write("checkpoint-2/model.safetensors", "torn")),
        "no complete checkpoint there: model.safetensors cannot be read",
    ),
    "torn optimizer": (
        from_checkpoint(write("checkpoint-2/optimizer.pt", "torn")), "optimizer.pt is torn$"
    ),
    "torn random state": (
        from_checkpoint(write("checkpoint-2/rng_state.pth", "")), "rng_state.pth is torn$"
    ),
    "empty state": (
        from_checkpoint(write("checkpoint-2/trainer_state.json", "{}")),
        "trainer_state.json cannot be read$",
    ),
    "configuration, a list": (resumed(write("checkpoint-2/config.json", "[]")), "^no tokenizer in .*checkpoint-2: "),
    "other architecture": (
        resumed(unrecorded, attention_embedding_size=8),
        "is of another model: attention_embedding_size is None there and 8 here$",
    ),
    "other objective": (
        resumed(unrecorded, objective="mlm_nsp"), "architectures is .*MaskedLM.* and .*PreTr"
    ),
    "other dropout": (
        resumed(edit("checkpoint-2/config.json", hidden_dropout_prob=0.3)),
        "checkpoint-2 is of another model: hidden_dropout_prob is 0.3 there and 0.1 here$",
    ),
    "other schedule": (
        resumed(lr_scheduler_kwargs='{"num_cycles": 2}'), "lr_scheduler_kwargs is None there and {'num_cycles': 2} here"
    ),
    "other noise": (resumed(neftune_noise_alpha=5), "neftune_noise_alpha is None there and 5.0 here"),
    "data from the start": (resumed(ignore_data_skip="true"), "ignore_data_skip is False there and True here"),
    "other seed": (resumed(seed=8), "out holds another run: seed is 7 there and 8 here. Choose another"),
    "other optimizer": (resumed(optimizer="sgd"), "holds another run: optimizer is adamw there and sgd here"),
    "other batch": (
        resumed(per_device_train_batch_size=4), "another run: per_device_train_batch_size is 8 there and 4 here"
    ),
    "other batch, arguments torn": (
        resumed(write("run_arguments.json", "{"), per_device_train_batch_size=4), "batch_size is 8 there and 4 here"
    ),
    "other batch, moved": (moved(per_device_train_batch_size=4), "checkpoint-2 holds another run: per_device_tr"),
    "other world size": (
        resumed(edit("run_arguments.json", world_size=3)), r"on 3 process\(es\) .* --gradient_accumulation_steps 3$"
    ),
    "other file": (corpus("c.txt", TEXT, resume_from_checkpoint="<run>/checkpoint-2"), "another run: train_file is "),
    "other text": (
        resumed(other_text_under_the_same_name, train_file="<here>/corpus.txt"), "on other data: their fingerprint is "
    ),
    "stream: other text": (
        resumed(other_text_under_the_same_name, stream=True, train_file="<here>/corpus.txt"), "on other data: their fi"
    ),
    "stream: no state of a process": (
        resumed(without("checkpoint-2/stream_state_0.json"), stream=True),
        "checkpoint-2 has no stream_state_0.json: where its stream stood is lost$",
    ),
    "stream: state of one of two": (
        resumed(edit("checkpoint-2/stream_state_0.json", consumed=4), stream=True),
        "shard 0 of 1 stands at micro-batch 2, not 4; the state of every process is needed$",
    ),
    "stream: torn state": (
        resumed(write("checkpoint-2/stream_state_0.json", "{"), stream=True), "_state_0.json is not the state of a str"
    ),
    "stream: other buffer": (resumed(stream=True, shuffle_buffer_size=28), "buffer_size is 21 there and 28 here"),
    "folder in use": (resumed(resume_from_checkpoint=None), "out is not empty: choose another, continue its training"),
    "folder in use, no run": (resumed(replaced_by(somebody_elses)), "out is not empty and holds no run to resume"),
    "folder in use, of another run": (
        resumed(replaced_by(somebody_elses), resume_from_checkpoint="<run>/checkpoint-2"),
        "out is not empty and not the folder of checkpoint .*checkpoint-2$",
    ),
    "folder is a file": (prepared(write("out", "mine")), "--output_dir .*: .*/out is not a folder$"),
    "folder is a link to itself": (prepared(write("out", itself)), "--output_dir .*/out: Too many levels of symbolic"),
    "folder below a file": (flags(output_dir="<corpus>/x"), "--output_dir .*/x: .*corpus.txt is not a folder$"),
    "folder with too long a name": (flags(output_dir="<here>/" + "x" * 300), "--output_dir .*: File name too long$"),
    "optimizer state of nothing": (flags(optimizer_state_from="/no/such"), "_from /no/such: no complete checkpoint"),
    "optimizer state torn": (
        resumed(write("checkpoint-2/optimizer.pt", "torn"), resume_from_checkpoint=None, output_dir="<here>/new",
                optimizer_state_from="<here>/out"),
        "^--optimizer_state_from .*/out: no complete checkpoint there$",
    ),
    "optimizer state of no model": (
        resumed(edit("checkpoint-2/config.json", hidden_dropout_prob="much"), resume_from_checkpoint=None,
                output_dir="<here>/new", optimizer_state_from="<here>/out"),
        "checkpoint-2: config.json cannot be read: .*'hidden_dropout_prob' with value 'much'",
    ),
    "optimizer state of another one": (
        flags(optimizer_state_from="<run>", optimizer="lamb"), "its optimizer is adamw, this one is lamb$"
    ),
    "optimizer state of other shapes": (
        flags(optimizer_state_from="<run>", attention_embedding_size=8), "attention_embedding_size is None there and 8"
    ),
    "optimizer state to be deleted": (
        overwriting(optimizer_state_from="<here>/out"),
        "^--optimizer_state_from .*/out is the --output_dir that is to be overwritten$",
    ),
    # What is overwritten is overwritten only when nothing more can be refused.
    "overwriting, no data": (
        overwriting(max_train_samples=2), "fewer than one global b"
    ),
    "overwriting, no optimizer": (
        overwriting(optimizer="sgd", optim_args="momentum=-1"),
        "--optim_args momentum=-1: Invalid momentum",
    ),
    "overwriting, no schedule": (
        overwriting(lr_scheduler_type="cosine_with_min_lr"),
        "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs None: One of min_lr",
    ),
    "overwriting, no tracker": (
        overwriting(report_to="no_such_tracker"), "no_such_tracker"
    ),
}  # fmt: skip

FLAGS = {
    "unknown": (flags(no_such_flag=3), "^unknown argument: --no_such_flag 3$"),
    "abbreviated": (words("--learning", "3"), "^unknown argument: --learning 3$"),
    "without value": (words("--seed"), "argument --seed: expected one argument$"),
    "two values": (words("--seed", "1", "2"), "^--seed takes one value, 2 is one too many$"),
    "a word": (flags(learning_rate="fast"), "argument --learning_rate/--learning-rate: invalid float value: 'fast'$"),
    "no truth": (flags(streaming="maybe"), "argument --streaming: Truthy value expected: got maybe"),
    "empty name": (flags(tokenizer_name=""), "^--tokenizer_name is empty: leave it out$"),
    "unknown preset": (flags(preset="huge"), "argument --preset: invalid choice: 'huge'"),
    "negative rate": (flags(learning_rate=-1), r"^--learning_rate \(-1.0\) must be at least 0.0 and below inf$"),
    "decay that is no number": (flags(weight_decay="nan"), r"^--weight_decay \(nan\) must be at least"),
    "beta above 1": (flags(adam_beta1=2), r"^--adam_beta1 \(2.0\) must be at least 0.0 and below 1.0$"),
    "warm-up without end": (flags(warmup_steps="inf"), r"^--warmup_steps \(inf\) must be at least 0.0 and below inf$"),
    "seed too large": (flags(seed=2**32), r"^--seed \(4294967296\) must be at least 0 and below 4294967296$"),
    "no steps": (flags(max_steps=0), r"^--max_steps \(0\) must be at least 1"),
    "no epochs": (flags(max_steps=None, num_train_epochs=0), r"^--num_train_epochs \(0.0\) must be above 0"),
    "no saving": (flags(save_steps=0), r"^--save_steps \(0.0\) must be above 0"),
    "logging backwards": (flags(logging_steps=-3), r"^--logging_steps \(-3.0\) must be above 0"),
    "no batch": (flags(per_device_train_batch_size=0), r"^--per_device_train_batch_size \(0\) must be at least 1"),
    "norms never": (flags(product_norms_steps=0), r"^--product_norms_steps \(0\) must be at least 1"),
    "skipping backwards": (flags(max_skipped_steps=-1), r"^--max_skipped_steps \(-1\) must be at least 0"),
    "workers below 0": (flags(dataloader_num_workers=-1), r"^--dataloader_num_workers \(-1\) must be at least 0"),
    "persistent workers, none": (flags(dataloader_persistent_workers="true"), "needs --dataloader_num_workers .0."),
    "no vocabulary": (flags(vocab_size=3), r"^--vocab_size \(3\) must be at least 10"),
    "vocabulary without end": (flags(vocab_size=10**18), r"^--vocab_size \(1000000000000000000\) must be .* below"),
    "sequences of nothing": (flags(max_seq_length=0), r"^--max_seq_length \(0\) must be at least 3"),
    "sequences of one pair": (flags(max_seq_length=4, objective="mlm_nsp"), r"--max_seq_length \(4\) must be at lea"),
    "sequences too long": (
        flags(max_seq_length=513), r"^--max_seq_length \(513\) exceeds the model's max_position_embeddings \(512\)$"
    ),
    "masks without tokens": (flags(mlm_probability=0), r"^--mlm_probability \(0.0\) must be above 0 and below 1$"),
    "masks that are no number": (flags(mlm_probability="nan"), r"^--mlm_probability \(nan\) must be above 0"),
    "nothing held out": (flags(validation_split_percentage=0), r"^--validation_split_percentage \(0.0\) must be ab"),
    "global batch of odd size": (
        flags(global_train_batch_size=20), r"^--global_train_batch_size \(20\) must be a multiple of 8: 1 process"
    ),
    "global batch and accumulation": (
        flags(global_train_batch_size=24, gradient_accumulation_steps=2), "makes 3 accumulation steps, not the 2"
    ),
    "resume and overwrite": (
        overwriting(resume_from_checkpoint="auto"), r"^--resume_from_checkpoint \(auto\) and --overwrite_output_dir ex"
    ),
    "overwrite with a bad flag": (
        overwriting(frobenius_decay=-1), r"--frobenius_decay \(-1.0\)"
    ),
    "validation without training": (
        flags(train_file=None, validation_file="<corpus>"), r"^--validation_file \(.*\) needs --train_file$"
    ),
    "subset of no data set": (flags(dataset_config_name="x"), r"^--dataset_config_name \(x\) needs --dataset_name$"),
    "stream without steps": (flags(**STREAM, max_steps=None), "^--streaming needs --max_steps"),
    "stream without tokenizer": (flags(**STREAM | {"tokenizer_name": None}), "^--streaming needs --tokenizer_name"),
    "stream and samples": (flags(**STREAM, max_train_samples=5), r"^--max_train_samples \(5\) is not for --streaming"),
    "stream of pairs": (flags(**STREAM, objective="mlm_nsp"), "mlm_nsp makes pairs of segments: not with --streaming"),
    "shards without stream": (flags(streaming_shards=2), r"^--streaming_shards \(2\) needs --streaming true$"),
    "shards that cannot be shared": (
        flags(**STREAM, streaming_shards=3, dataloader_num_workers=2), r"_shards \(3\) must be a multiple of 2: 1 proc"
    ),
    "shards without end": (flags(**STREAM, streaming_shards=10**15), "shard 0 of 1000000000000000 .* has 1 documents"),
    "buffer without end": (flags(**STREAM | {"shuffle_buffer_size": 10**15}), "0000.* does not fit into memory: "),
    "no buffer": (flags(**STREAM | {"shuffle_buffer_size": 0}), r"^--shuffle_buffer_size \(0\) must be at least 1"),
    "all documents held out": (
        flags(**STREAM | {"streaming_validation_documents": 216}), "has 216 documents and 0 broken .* 216 documents are"
    ),
    "documents of pairs": (
        flags(objective="mlm_nsp", attend_within_documents="true"), "pairs of segments: not with --attend_within_doc"
    ),
    "kernel that is not there": (
        flags(attn_implementation="flash_attention_2", bf16="true"), "FlashAttention2 .* cannot be used"
    ),
    "kernel for other numbers": (flags(attn_implementation="flash_attention_2"), "_2 takes 16-bit numbers: set --bf16"),
    "Trainer's optimizer": (flags(optim="adafactor"), r"^--optim \(adafactor\) is not supported: set --optimizer"),
    "checkpoints of the model alone": (
        flags(save_only_model="true"), r"^--save_only_model \(True\) is not supported: a run cannot go on from such"
    ),
    "label smoothing": (flags(label_smoothing_factor=0.1), r"^--label_smoothing_factor \(0.1\) is not supported"),
    "optimizer argument unknown": (
        flags(optim_args="momentum=0.9"), "--optim_args momentum=0.9: 'momentum' is not an argument of adamw"
    ),
    "optimizer argument hidden": (
        flags(optimizer="sgd", optim_args="args=3"), "'args' is not an argument of sgd: name=value of"
    ),
    "optimizer argument alone": (flags(optim_args="amsgrad"), "'amsgrad' is not an argument of adamw: name=value of"),
    "optimizer argument no switch": (flags(optim_args="amsgrad=3"), r"amsgrad \(3\) must be like its default, False$"),
    "optimizer argument no decay": (
        flags(optimizer="lamb", optim_args="decay=often"), r"--optim_args decay=often: decay \(often\) must be"
    ),
    "optimizer arguments at odds": (
        flags(optimizer="sgd", optim_args="nesterov=true,momentum=0"), "Nesterov momentum requires"
    ),
    "schedule arguments torn": (flags(lr_scheduler_kwargs="{"), r"^--lr_scheduler_kwargs \({\) is not JSON"),
    "schedule arguments unknown": (flags(lr_scheduler_kwargs='{"a": 1}'), "_kwargs {'a': 1}: .* unexpected keyword"),
    "sampling": (flags(train_sampling_strategy="group_by_length"), r"\(group_by_length\) must be one of .*random"),
    "best of nothing": (flags(load_best_model_at_end="true"), "^--load_best_model_at_end requires the save and eval"),
    "batch size to be found": (
        flags(auto_find_batch_size="true"), r"^--auto_find_batch_size \(True\) is not supported: it would change the gl"
    ),
    "several writers": (
        flags(save_on_each_node="true"), r"^--save_on_each_node \(True\) is not supported: .* that all machines share$"
    ),
    "prediction": (flags(do_predict="true"), "^--do_predict: pretraining has nothing to predict"),
    "cache that is a file": (flags(cache_dir="<corpus>"), "^--cache_dir .*corpus.txt: cannot be written: "),
    "no Hub": (flags(push_to_hub="true"), "Cannot reach https://huggingface.co"),
}  # fmt: skip

TABLE = {
    f"{kind}: {name}": row
    for kind, rows in (
        ("corpus", CORPORA), ("config", CONFIGS), ("model", MODELS), ("checkpoint", CHECKPOINTS), ("flag", FLAGS)
    )
    for name, row in rows.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    place = Place(folder, corpus, folder / "run", folder / "stream")
    run_pretrain.run(place.command(output_dir=place.run))
    run_pretrain.run(place.command(output_dir=place.stream, **STREAM))
    return place


@pytest.fixture
def place(elsewhere, tmp_path):
    return Place(tmp_path, elsewhere.corpus, elsewhere.run, elsewhere.stream)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(place, name):
    change, message = TABLE[name]
    command = change(place)
    before = contents(place.here)
    with pytest.raises(UserInputError) as refusal:
        run_pretrain.run(command)
    said = str(refusal.value)
    assert re.search(message, said) and len(said.splitlines()) == 1, said
    assert contents(place.here) == before


@pytest.mark.parametrize("name", ["corpus: torn gzip", "config: a key twice", "checkpoint: other batch"])
def test_the_launched_script_prints_the_line_and_no_traceback(place, name):
    change, message = TABLE[name]
    command = change(place)
    before = contents(place.here)
    result = launch("run_pretrain.py", *command, check=False)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("run_pretrain.py: error: ")]
    assert len(said) == 1 and re.search(message, said[0].removeprefix("run_pretrain.py: error: "))
    assert 'run_pretrain.py", line' not in result.stderr, "the launcher's own traceback is all there is"
    assert contents(place.here) == before
