"""Config files and flags that run_pretrain.py refuses."""

import pytest

from tests.bad_inputs import assert_launch_refused, assert_refused, config, flags, overwriting, words
from tests.conftest import STREAM

# name -> what makes the bad input, and what the message says of it
CONFIGS = {
    "missing": (lambda workspace: ["/no/such.yaml"], "^/no/such.yaml: cannot be read: .*No such file"),
    "wrong suffix": (
        config("seed: 1", "c.toml"), r"c.toml: only config files may come before the flags \(.yaml, .yml, "
    ),
    "not YAML": (config("seed: ["), "c.yaml: cannot be read: line 1: expected the node content"),
    "torn JSON": (config('{"seed": 1', "c.json"), "c.json: cannot be read: line 1: expected ',' or '}'"),
    "not UTF-8": (config("run_name: Müller".encode("latin1")), "c.yaml: cannot be read: 'utf-8' codec"),
    "deeper than it can be read": (config("a: " + "[" * 999), "c.yaml: cannot be read: maximum recursion"),
    "code": (config("seed: !!python/object/apply:os.getpid []"), "c.yaml: .* could not determine a constructor"),
    "not a mapping": (config("- 3"), "c.yaml: must contain a mapping of flags to values, not a list$"),
    "empty": (config(""), "c.yaml: must contain a mapping of flags to values, not a NoneType$"),
    "unknown key": (config("no_such_flag: 3"), "^unknown argument: --no_such_flag 3$"),
    "a key twice": (config("seed: 1\nseed: 2"), "c.yaml: cannot be read: line 2: seed is given twice$"),
    "a key in two spellings": (config("max_steps: 1\nmax-steps: 2"), "c.yaml: a flag is given twice, with '-' and"),
    "a key that is no name": (config("3: 4"), "c.yaml: 3 is not a flag's name$"),
    "value of the wrong kind": (config("seed: true"), "--seed: invalid int value: 'true'$"),
    "mapping for a number": (config("learning_rate: {a: 3}"), r"^--learning_rate does not accept a dict \({'a': 3}\)$"),
    "list for a number": (
        config("dataloader_num_workers: [1, 2]"), "^--dataloader_num_workers takes one value: remove 2"
    ),
    "a list without end": (config("lr_scheduler_kwargs: &a {x: *a}"), "^--lr_scheduler_kwargs: Circular reference"),
    "a value that is a flag": (
        config("train_file: [a.txt, --overwrite_output_dir]"), r"^--train_file \(--overwrite_output_dir\) must not st"
    ),
    "a null byte": (config('cache_dir: "a\\0"'), r"^--cache_dir \('a\\x00'\) must not contain a null byte$"),
    "second file": (words("c.yaml"), "^--use_cpu takes one value: remove c.yaml$"),
    "second file missing": (
        lambda workspace: [config("seed: 1")(workspace)[0], "/no/such.yaml"],
        "^/no/such.yaml: cannot be read: .*No such file",
    ),
    "phases": (
        config("phases: [{max_steps: 1}, {max_steps: 2}]"),
        "c.yaml: 'phases' is no longer a flag: .*/c.yaml SECOND.yaml --model_name_or_path FIRST --optimizer_state_from",
    ),
}  # fmt: skip

FLAGS = {
    "unknown": (flags(no_such_flag=3), "^unknown argument: --no_such_flag 3$"),
    "abbreviated": (words("--learning", "3"), r"^unknown argument: --learning 3 \(did you mean --learning_rate\?\)$"),
    "misspelled": (words("--max_step=3"), r"^unknown argument: --max_step=3 \(did you mean --max_steps\?\)$"),
    "misspelled, and far from any": (
        words("--lr", "1", "--max_step", "3"), r"^unknown argument: --lr 1 --max_step 3 \(did you mean --max_steps\?\)$"
    ),
    "without value": (words("--seed"), "argument --seed: expected one argument$"),
    "two values": (words("--seed", "1", "2"), "^--seed takes one value: remove 2$"),
    "a word": (flags(learning_rate="fast"), "argument --learning_rate/--learning-rate: invalid float value: 'fast'$"),
    "no truth": (flags(streaming="maybe"), "argument --streaming: Truthy value expected: got maybe"),
    "empty name": (flags(tokenizer_name=""), "^--tokenizer_name is empty: leave it out$"),
    "unknown preset": (flags(preset="huge"), "argument --preset: invalid choice: 'huge'"),
    "negative rate": (flags(learning_rate=-1), r"^--learning_rate \(-1.0\) must be at least 0.0 and below inf$"),
    "decay that is no number": (flags(weight_decay="nan"), r"^--weight_decay \(nan\) must be at least"),
    "beta above 1": (flags(adam_beta1=2), r"^--adam_beta1 \(2.0\) must be at least 0.0 and below 1.0$"),
    "warm-up without end": (flags(warmup_steps="inf"), r"^--warmup_steps \(inf\) must be at least 0.0 and below inf$"),
    "seed too large": (flags(seed=2**32), r"^--seed \(4294967296\) must be at least 0 and below 4294967296$"),
    "nothing to do": (flags(do_train="false", do_eval="false"), "^--do_train false --do_eval false: there is nothing"),
    "no steps": (flags(max_steps=0), r"^--max_steps \(0\) must be at least 1"),
    "no epochs": (flags(max_steps=None, num_train_epochs=0), r"^--num_train_epochs \(0.0\) must be above 0"),
    "no saving": (flags(save_steps=0), r"^--save_steps \(0.0\) must be above 0"),
    "logging backwards": (flags(logging_steps=-3), r"^--logging_steps \(-3.0\) must be above 0"),
    "no batch": (flags(per_device_train_batch_size=0), r"^--per_device_train_batch_size \(0\) must be at least 1"),
    "norms never": (flags(product_norms_steps=0), r"^--product_norms_steps \(0\) must be at least 1"),
    "skipping backwards": (flags(max_skipped_steps=-1), r"^--max_skipped_steps \(-1\) must be at least 0"),
    "workers below 0": (flags(dataloader_num_workers=-1), r"^--dataloader_num_workers \(-1\) must be at least 0"),
    "persistent workers, none": (flags(dataloader_persistent_workers="true"), "--dataloader_num_workers to be"),
    "a context, no workers": (flags(dataloader_multiprocessing_context="spawn"), "--dataloader_num_workers to be"),
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
        flags(global_train_batch_size=24, gradient_accumulation_steps=2), "requires 3 accumulation .*_steps is 2: leave"
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
    "stream and samples": (
        flags(**STREAM, max_train_samples=5), r"^--max_train_samples \(5\) cannot be used with --streaming"
    ),
    "stream of pairs": (
        flags(**STREAM, objective="mlm_nsp"), "mlm_nsp trains on pairs of segments: leave out --streaming"
    ),
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
        flags(objective="mlm_nsp", attend_within_documents="true"), "pairs of segments: leave out --attend_within_doc"
    ),
    "lines of pairs": (flags(objective="mlm_nsp", line_by_line="true"), "pairs of segments: leave out --line_by_line$"),
    "lines of a stream": (flags(**STREAM, line_by_line="true"), "leave out --streaming, or set --line_by_line false$"),
    "documents of lines": (
        flags(line_by_line="true", attend_within_documents="true"), "leave out --attend_within_documents, or set"
    ),
    "kernel that is not there": (
        flags(attn_implementation="flash_attention_2", bf16="true"), "FlashAttention2 .* cannot be used"
    ),
    "kernel for other numbers": (
        flags(attn_implementation="flash_attention_2"), "_2 needs 16-bit precision: set --bf16"
    ),
    "Trainer's optimizer": (flags(optim="adafactor"), r"^--optim \(adafactor\) is not supported: set --optimizer"),
    "checkpoints of the model alone": (
        flags(save_only_model="true"), r"^--save_only_model \(True\) is not supported: leave it out: a run cannot"
    ),
    "label smoothing": (flags(label_smoothing_factor=0.1), r"^--label_smoothing_factor \(0.1\) is not supported"),
    "optimizer argument unknown": (
        flags(optim_args="momentum=0.9"), "--optim_args momentum=0.9: 'momentum' is not an argument of adamw"
    ),
    "optimizer argument hidden": (
        flags(optimizer="sgd", optim_args="args=3"), "'args' is not an argument of sgd. Write name=value"
    ),
    "optimizer argument alone": (
        flags(optim_args="amsgrad"), "'amsgrad' is not an argument of adamw. Write name=value"
    ),
    "optimizer argument no switch": (
        flags(optim_args="amsgrad=3"), r"amsgrad \(3\) must have the form of its default, False$"
    ),
    "optimizer argument no decay": (
        flags(optimizer="lamb", optim_args="decay=often"), r"--optim_args decay=often: decay \(often\) must be"
    ),
    "optimizer arguments at odds": (
        flags(optimizer="sgd", optim_args="nesterov=true,momentum=0"), "Nesterov momentum requires"
    ),
    "schedule arguments torn": (flags(lr_scheduler_kwargs="{"), r"^--lr_scheduler_kwargs \({\) is not valid JSON"),
    "schedule arguments unknown": (flags(lr_scheduler_kwargs='{"a": 1}'), "_kwargs {'a': 1}: .* unexpected keyword"),
    "sampling": (flags(train_sampling_strategy="group_by_length"), r"\(group_by_length\) must be one of .*random"),
    "best of nothing": (flags(load_best_model_at_end="true"), "^--load_best_model_at_end requires the save and eval"),
    "accumulation in another place": (
        flags(accelerator_config='{"gradient_accumulation_kwargs":{"num_steps":3}}'), "num_steps is not supported: set"
    ),
    "batches that are split": (
        flags(accelerator_config='{"split_batches":true}'), r"split_batches \(True\) is not supported: --per_device_tr"
    ),
    "mode of the compiler": (
        flags(torch_compile_mode="fast"), r"^--torch_compile_mode \(fast\) must be one of \['default', "
    ),
    "sequences longer than a mask reaches": (
        flags(max_seq_length=65_537), r"^--max_seq_length \(65537\) must be at least 3 and below 65537$"
    ),
    "batch size to be found": (
        flags(auto_find_batch_size="true"), r"^--auto_find_batch_size \(True\) is not supported: it would change the gl"
    ),
    "several writers": (
        flags(save_on_each_node="true"), r"^--save_on_each_node \(True\) is not supported: .* that all machines share$"
    ),
    "warm start that never comes": (
        flags(factorize_at_step=4), r"^--factorize_at_step \(4\) must be below the number of steps of the run \(4\)$"
    ),
    "warm start without steps": (
        flags(factorize_at_step=1, max_steps=None, num_train_epochs=0.01),
        r"^--factorize_at_step \(1\) must be below the number of steps of the run \(1\)$",
    ),
    "warm start before the beginning": (
        flags(factorize_at_step=-1), r"^--factorize_at_step \(-1.0\) must be at least 0 and"
    ),
    "warm start between two steps": (
        flags(factorize_at_step=1.5), r"^--factorize_at_step \(1.5\) must be a whole number of steps, or a sh"
    ),
    "warm start without end": (flags(factorize_at_step="nan"), r"^--factorize_at_step \(nan\) must be at least 0 and"),
    "warm start to nothing": (
        flags(factorize_at_step=2, factorize_target_ratio=0), r"^--factorize_target_ratio \(0.0\) must be above 0 and b"
    ),
    "warm start to everything": (
        flags(factorize_at_step=2, factorize_target_ratio=1), r"^--factorize_target_ratio \(1.0\) must be above 0 and b"
    ),
    "prediction": (flags(do_predict="true"), "^--do_predict: pretraining makes no predictions"),
    "cache that is a file": (flags(cache_dir="<corpus>"), "^--cache_dir .*corpus.txt: not writable: "),
    "no Hub": (flags(push_to_hub="true"), "Cannot reach https://huggingface.co"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_file_is_refused_in_one_line_and_changes_nothing(workspace, name):
    assert_refused(workspace, *CONFIGS[name])


def test_the_launched_script_prints_the_line_and_no_traceback(workspace):
    assert_launch_refused(workspace, *CONFIGS["a key twice"])


@pytest.mark.parametrize("name", FLAGS)
def test_a_bad_flag_is_refused_in_one_line_and_changes_nothing(workspace, name):
    assert_refused(workspace, *FLAGS[name])
