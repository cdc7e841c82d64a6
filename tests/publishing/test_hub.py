"""Pushing to a Hub on loopback and loading from it: scripts, the command, the model; what is refused, and what is cut.

Runs and downloads are processes of their own, which know the server by HF_ENDPOINT; pushes alone are made in this one.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants
from packaging.version import Version
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering
from transformers.integrations import is_tensorboard_available

import run_pretrain
from fnl_hf import FnlBertConfig, FnlBertForQuestionAnswering, UserInputError
from fnl_hf.commands import cli
from fnl_hf.publishing.cards import training_facts, write_run_card
from fnl_hf.publishing.hub import push_folder
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.pushing import PushingTrainer
from tests.conftest import DIMENSIONS, ROOT, WITHOUT_FNL_HF, pretraining, weights
from tests.publishing.hub_server import Hub
from tests.squad.test_squad_script import squad

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's own
# Between two attempts the client waits for seconds.
IMPATIENT = """
import runpy, sys, time, types
import huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(**(vars(time) | {"sleep": lambda seconds: None}))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PUSH_MODEL = """
import sys, torch
import fnl_hf
model = fnl_hf.FnlBertForMaskedLM.from_pretrained(sys.argv[1])
model.push_to_hub("from-python", private=True)
"""
LOADING = (
    WITHOUT_FNL_HF
    + """
import torch
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering, AutoTokenizer
try:
    AutoTokenizer.from_pretrained("ada/encoder", token=False)
    raise SystemExit("a private repository is open to all")
except OSError:
    pass
inputs = AutoTokenizer.from_pretrained("ada/encoder")("the quick [MASK] fox", return_tensors="pt")
found = [AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)(**inputs).logits
         for name in ("ada/encoder", "ada/from-python")]
inputs = AutoTokenizer.from_pretrained("ada/answers", token=False)("what jumps", "the fox jumps", return_tensors="pt")
model = AutoModelForQuestionAnswering.from_pretrained("ada/answers", token=False, trust_remote_code=True)
torch.save([*found, model(**inputs).start_logits], sys.argv[1])
"""
)

CONVERTING = """
from fnl_hf.commands import cli
cli.main(["convert", "ada/bert", "small", "--attention_embedding_size", "21"])
cli.main(["push", "small", "small"])
"""

WITH_XET = """
import os, sys
from pathlib import Path
del os.environ["HF_HUB_DISABLE_XET"]
from fnl_hf.commands import cli
def push():
    try:
        cli.main(["push", sys.argv[1], "over-xet"])
    except SystemExit:
        pass
    return {path.name: path.stat().st_mtime_ns for path in Path(sys.argv[2]).rglob("xorbs/default.*")}
sent = push()
if sent:
    assert push() == sent, "what is there is not sent again"
"""


def run_python(hub, home, *arguments, token=None, check=True):
    """A new interpreter that finds fnl_hf, and no Hub but this one."""
    env = os.environ | hub.environment(home, token) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=300)
    assert result.returncode == 0 or not check, result.stderr[-4000:]
    assert hub.token not in result.stdout + result.stderr
    return result


def tokens_in(hub, *folders):
    """The files, here and in all commits there, that hold the token."""
    paths = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    local = [str(path) for path in paths if hub.token.encode() in path.read_bytes()]
    commits = ((name, commit) for name, there in hub.repositories.items() for commit in there.commits)
    return local + [
        f"{name}:{path}" for name, commit in commits for path, file in commit.files.items()
        if hub.token.encode() in file.content or hub.token in commit.message
    ]  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, corpus, tmp_path_factory):
    """A private pretrained model, a public one that was fine-tuned from it by its name there, and one from Python."""
    folder = tmp_path_factory.mktemp("published")
    flags = {
        "push_to_hub": "true", "hub_model_id": "encoder", "hub_private_repo": "true", "hub_token": hub.token,
        "hub_strategy": "checkpoint", "hub_always_push": "true", "attention_embedding_size": 16, "report_to": None,
    }  # fmt: skip
    words = pretraining(corpus, folder / "encoder", **flags)
    run_python(hub, folder, IMPATIENT, ROOT / "run_pretrain.py", *words)
    flags = {
        "push_to_hub": "true", "hub_model_id": "ada/answers", "hub_license": "mit", "hub_always_push": "true",
        "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "max_train_samples": 5, "max_eval_samples": 3,
        "max_seq_length": 256, "doc_stride": 32, "hub_language": "la",
    }  # fmt: skip
    words = squad("ada/encoder", folder / "answers", **flags)
    run_python(hub, folder, IMPATIENT, ROOT / "run_squad.py", *words, token=hub.token)
    run_python(hub, folder, PUSH_MODEL, folder / "encoder", token=hub.token)
    return folder


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """Pushes of this process, too, go to the server, as its user."""
    hub.serve_this_process(monkeypatch, tmp_path)
    yield monkeypatch
    hub.cut("", 0)


# ---- what is uploaded ----


def test_a_run_pushes_its_checkpoints_and_its_end(hub, published):
    messages, files = hub.messages("ada/encoder"), hub.files("ada/encoder")
    assert hub.repositories["ada/encoder"].private
    assert messages[1:3] == ["Training in progress, step 5", "Training in progress, step 5, checkpoint"]
    assert messages[-1] == "End of training"
    assert {"README.md", "tokenizer.json", "modeling_fnl_bert.py", "training_report.png"} <= files.keys()
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= files.keys()
    assert not [path for path in files if path.startswith(("_", "checkpoint-"))]
    for path in ("model.safetensors", "README.md"):
        assert files[path] == (published / "encoder" / path).read_bytes()
    assert "Training in progress, step 1" in hub.messages("ada/answers")
    assert not hub.repositories["ada/answers"].private
    assert not [path for path in hub.files("ada/answers") if path.startswith("last-checkpoint")]


def test_the_token_is_in_no_file_and_no_commit(hub, published):
    tracked = any(path.name.startswith("events.out") for path in published.rglob("*"))
    assert tracked == is_tensorboard_available(), "trackers have files, too"
    assert tokens_in(hub, published) == []


def test_models_load_in_a_fresh_process_without_fnl_hf(hub, published):
    run_python(hub, published, LOADING, published / "logits.pt", token=hub.reading_token)
    encoder, from_python, answers = torch.load(published / "logits.pt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(published / "encoder")
    model = transformers.AutoModelForMaskedLM.from_pretrained(published / "encoder")
    expected = model(**tokenizer("the quick [MASK] fox", return_tensors="pt")).logits
    assert torch.equal(encoder, expected) and torch.equal(from_python, expected)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(published / "answers")
    assert torch.equal(answers, model(**tokenizer("what jumps", "the fox jumps", return_tensors="pt")).start_logits)


def test_the_hub_reads_the_metrics_of_the_cards(hub, published):
    card = ModelCard.load(published / "encoder" / "README.md")
    assert card.data.pipeline_tag == "fill-mask" and card.data.license is None
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy", "perplexity"]
    assert card.data.eval_results[0].dataset_name == "corpus.txt"
    assert 'from_pretrained("ada/encoder", trust_remote_code=True)' in card.text
    card = ModelCard.load(published / "answers" / "README.md")
    assert card.data.language == "la"
    assert card.data.license == "mit" and {result.metric_type for result in card.data.eval_results} == {
        "f1",
        "exact_match",
    }


# ---- fnl-hf push ----


def test_the_command_uploads_the_model_alone(hub, here, published, tmp_path, capsys):
    cli.main(["push", str(published / "answers"), "by-command", "--private"])
    assert capsys.readouterr().out.strip() == f"{hub.url}/ada/by-command"
    files = hub.files("ada/by-command")
    assert hub.repositories["ada/by-command"].private
    assert {
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "training_report.png",
        "provenance.json",
    } <= files.keys()
    others = ("checkpoint-", "optimizer", "scheduler", "rng_state", "training_args", "run_arguments", "_", "checksums")
    assert not [path for path in files if path.startswith(others)]
    with pytest.raises(UserInputError, match="ada/answers exists and is public: make it private"):
        push_folder(published / "answers", "answers", private=True)
    for missing in ("config.json", "model.safetensors"):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / missing).unlink(missing_ok=True)
        with pytest.raises(SystemExit, match="2"):
            cli.main(["push", str(tmp_path), "nothing"])
        assert f"error: {tmp_path} contains no saved model: it has no {missing}" in capsys.readouterr().err
    assert "ada/nothing" not in hub.repositories


def test_a_card_of_no_repository_names_the_one_it_is_pushed_to(hub, here, published, tmp_path):
    """A user's own stays as it is, whatever is in it."""
    copy = shutil.copytree(published / "answers", tmp_path / "copy")
    card = copy / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("ada/answers", "path/to/this/model"), encoding="utf-8")
    push_folder(copy, "named")
    text = hub.files("ada/named")["README.md"].decode()
    assert text.count('from_pretrained("ada/named"') == 3 and "path/to" not in text
    card.write_text('from_pretrained("path/to/this/model")')
    push_folder(copy, "named")
    assert hub.files("ada/named")["README.md"] == b'from_pretrained("path/to/this/model")'


def test_a_converted_model_is_pushed_with_its_card_which_says_how_it_loads(hub, here, tokenizer, dimensions, tmp_path):
    dimensions["vocab_size"] = len(tokenizer)
    for part in (BertForMaskedLM(BertConfig(**dimensions)), tokenizer):
        part.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# BERT")
    push_folder(tmp_path / "bert", "bert")
    run_python(hub, tmp_path, CONVERTING, token=hub.token)
    card = ModelCard(hub.files("ada/small")["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "ada/bert")
    assert "| converted from | ada/bert, BertForMaskedLM |" in card.text and "spectra.png" in hub.files("ada/small")
    code, _ = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    checked = f"{WITHOUT_FNL_HF}\n{code}\nassert model.config.attention_embedding_size == 21 and tokenizer('the fox')"
    run_python(hub, tmp_path, checked)


def test_a_card_says_how_the_model_was_trained_and_from_what(dimensions, tmp_path):
    """Steps, batch, length, masks, schedule, seed and language; base model, license and language of its base's card."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: de\nbase_model: google/bert\n---\n# BERT")
    args = FnlTrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=3, gradient_accumulation_steps=5, seed=11,
        warmup_steps=0.25, lr_scheduler_type="cosine", report_to="none", num_train_epochs=2,
    )  # fmt: skip
    facts = training_facts(args, 1400)
    assert facts == {
        "steps": "1,400 (2 epochs)", "batch": "15 a step: 1 process x 3 x 5 accumulated",
        "schedule": "cosine, 350 steps of warm-up", "seed": 11,
    }  # fmt: skip
    model = FnlBertForQuestionAnswering(FnlBertConfig(**dimensions))
    common = (tmp_path, "t", "d", "AutoModelForQuestionAnswering", model, facts | {"data": "own"}, {})
    for given, found in (({}, ("mit", "de")), ({"language": "fr", "license": "apache-2.0"}, ("apache-2.0", "fr"))):
        write_run_card(*common, base_model=str(base), **given)
        card = ModelCard.load(tmp_path / "README.md")
        assert (card.data.license, card.data.language, card.data.base_model) == (*found, "google/bert")
        assert "| base model | base |" in card.text and "| schedule | cosine, 350 steps of warm-up |" in card.text
    both = ["google/bert", "google-bert/none"]
    for given, found in (({"base_model": both[1]}, both[1]), ({"base_model": str(base), "teacher": both[1]}, both)):
        write_run_card(*common, **given)
        assert ModelCard.load(tmp_path / "README.md").data.base_model == found
    assert "| teacher | google-bert/none |" in (tmp_path / "README.md").read_text()


# ---- failures ----


@pytest.mark.parametrize(
    "name, token, message",
    [
        ("mine", "", r"mine on the Hub: no token, or one that the Hub does not know: log in with `hf auth login`"),
        ("mine", "hf_expired", r"mine on the Hub: no token, or one that the Hub does not know"),
        ("analysts/theirs", Hub.token, r"analysts/theirs on the Hub: the token has no write permission there"),
        ("a/b/c", Hub.token, r"a/b/c on the Hub: HFValidationError"),
    ],
)
def test_refusals_come_before_training_and_before_a_file_is_written(hub, here, corpus, tmp_path, name, token, message):
    here.setenv("HF_TOKEN", token)
    with pytest.raises(UserInputError, match=f"{message}.*train without --push_to_hub"):
        run_pretrain.run(pretraining(corpus, tmp_path / "out", push_to_hub="true", hub_model_id=name))
    assert not (tmp_path / "out").exists()


def test_no_connection_is_a_refusal_too(hub, here, published):
    here.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserInputError, match="mine on the Hub: ConnectError: .*Connection refused.*is unchanged"):
        push_folder(published / "answers", "mine")


def test_what_the_hub_says_of_a_card_is_passed_on(hub, here, published, tmp_path):
    copy = shutil.copytree(published / "answers", tmp_path / "copy")
    (copy / "README.md").write_text("---\nlicense: mine\n---\n")
    with pytest.raises(
        UserInputError, match='Invalid metadata in README.md. - "license" must not be mine .*is unchanged'
    ):
        push_folder(copy, "unlicensed")


def test_a_checkpoint_that_cannot_be_pushed_stops_no_run(hub, here, corpus, tmp_path, caplog):
    hub.cut("POST .*/commit/", times=1)
    flags = {"push_to_hub": "true", "hub_model_id": "ada/lucky", "hub_always_push": "true", "max_steps": 2}
    run_pretrain.run(pretraining(corpus, tmp_path / "out", save_steps=1, **flags))
    assert "A checkpoint could not be pushed: RemoteProtocolError" in caplog.text
    assert hub.messages("ada/lucky")[1:] == ["Training in progress, step 2", "End of training"]


def test_the_end_is_pushed_as_it_was_saved(hub, here, corpus, tmp_path):
    """An evaluation in half precision comes between."""
    saved, save = [], PushingTrainer._save
    here.setattr(
        PushingTrainer, "_save", lambda self, folder=None, *a, **k: saved.append(folder) or save(self, folder, *a, **k)
    )
    flags = {"push_to_hub": "true", "hub_model_id": "ada/precise", "bf16_full_eval": "true", "max_steps": 1}
    out = tmp_path / "out"
    run_pretrain.run(pretraining(corpus, out, save_strategy="no", **flags))
    assert saved == [str(out)] and {weight.dtype for weight in weights(out).values()} == {torch.float32}
    assert hub.files("ada/precise")["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert "training_args.bin" not in hub.files("ada/precise") and hub.messages("ada/precise")[1:] == [
        "End of training"
    ]


@pytest.mark.parametrize("pushing, kept", [(False, {"checkpoint-3"}), (True, {"checkpoint-2", "checkpoint-3"})])
def test_what_is_being_pushed_is_not_deleted(hub, here, corpus, tmp_path, pushing, kept):
    """With --save_total_limit 1: the upload of checkpoint-1 ends, that of checkpoint-2 lasts."""
    here.setattr(PushingTrainer, "is_pushing", lambda trainer: pushing and trainer.state.global_step == 3)
    flags = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    run_pretrain.run(pretraining(corpus, tmp_path / "out", **flags))
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == kept


def test_a_push_that_is_cut_off_leaves_the_model_and_goes_on(hub, here, corpus, tmp_path, capsys):
    folder = tmp_path / "out"
    flags = {"push_to_hub": "true", "hub_model_id": "cut", "hub_strategy": "end", "max_steps": 2, "seed": 11}
    words = [*pretraining(corpus, folder, **flags), "--resume_from_checkpoint", "auto"]
    hub.cut("PUT /objects/")
    failed = run_python(hub, tmp_path, IMPATIENT, ROOT / "run_pretrain.py", *words, token=hub.token, check=False)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    (error,) = [line for line in failed.stderr.splitlines() if line.startswith("run_pretrain.py: error: ada/cut on")]
    assert error.endswith(f"The model is saved: `fnl-hf push {folder} ada/cut` uploads what is missing")
    assert "Error while uploading" in error and "isconnected" in error
    assert (folder / "all_results.json").is_file() and hub.messages("ada/cut") == ["initial commit"]
    transformers.AutoModelForMaskedLM.from_pretrained(folder)

    weights = (folder / "model.safetensors").read_bytes()
    oid = hashlib.sha256(weights).hexdigest()
    assert oid not in hub.objects
    hub.cut("POST .*/commit/")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["push", str(folder), "cut"])
    assert "the same command uploads what is missing" in capsys.readouterr().err
    assert hub.received[oid] == 1 and hub.messages("ada/cut") == ["initial commit"]

    hub.cut("", 0)
    run_pretrain.run(words)  # the run is finished, its push was not
    assert hub.files("ada/cut")["model.safetensors"] == weights
    assert hub.received[oid] == 1, "nothing is sent twice"
    assert tokens_in(hub, folder) == []


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="hf_xet is not installed")
def test_large_files_go_over_xet_to_a_hub_that_has_it(hub, here, published, tmp_path):
    name, cas = "ada/over-xet", tmp_path / "cas"
    copy = shutil.copytree(published / "answers", tmp_path / "copy")
    save_file({"unsent": torch.arange(9_000)}, copy / "model.safetensors")  # no other test has stored it
    weights = (copy / "model.safetensors").read_bytes()
    if Version(version("huggingface_hub")) < Version("1.6"):
        pytest.skip("an older huggingface_hub falls back to Git LFS by itself")
    refused = run_python(hub, tmp_path, WITH_XET, copy, cas, token=hub.token)
    remedy = "set HF_HUB_DISABLE_XET=1 to upload them through Git LFS. "
    assert remedy + f"{copy} is unchanged" in refused.stderr and hub.messages(name) == ["initial commit"]
    here.setattr(hub, "xet", cas)
    cas.mkdir()
    pushed = run_python(hub, tmp_path, WITH_XET, copy, cas, token=hub.token)
    assert pushed.stdout.split() == [f"{hub.url}/{name}"] * 2 and hub.messages(name)[1:] == ["Upload model"]
    assert hub.files(name)["model.safetensors"] == weights
    assert hub.received[hashlib.sha256(weights).hexdigest()] == 0, "nothing went through LFS"


# ---- the card ----


def test_the_card_says_what_it_is_given(tmp_path):
    given = {
        "title": "mini", "description": "Small.", "auto_class": "AutoModelForQuestionAnswering",
        "model": FnlBertForQuestionAnswering(FnlBertConfig(**DIMENSIONS)),
        "facts": {"data": "SQuAD"}, "metrics": {"eval_f1": 64.03125, "eval_exact_match": 48.5, "eval_samples": 7},
    }  # fmt: skip
    write_run_card(tmp_path, **given, dataset="rajpurkar/squad", repository="ada/mini", license="apache-2.0")
    card = ModelCard.load(tmp_path / "README.md")
    found = [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_name) for r in card.data.eval_results]
    assert found == [(name, v, "rajpurkar/squad", "SQuAD") for name, v in (("f1", 64.0312), ("exact_match", 48.5))]
    assert card.data.model_name == "mini" and card.data.datasets == ["rajpurkar/squad"]
    assert card.data.license == "apache-2.0" and "| eval_samples | 7 |" in card.text
    assert card.text.count('"ada/mini"') == 2 and "import fnl_hf\n" in card.text
    assert r"Lester and Fusi, Nicol{\`o}}," in card.text and "eprint = {2105.01029}" in card.text
    stock = BertForQuestionAnswering(BertConfig(**DIMENSIONS))
    write_run_card(tmp_path, **given | {"model": stock, "metrics": {}})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "license" not in card.content and "Khodak" not in card.text
    assert 'from_pretrained("path/to/this/model")' in card.text and "trust_remote_code" not in card.text
