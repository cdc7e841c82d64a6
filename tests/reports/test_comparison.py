"""Runs from their folders: which state counts, what they are named, and what is drawn of them."""

import json

import pytest
from transformers import TrainerState

from fnl_hf import UserInputError
from fnl_hf.reports import plot_runs
from fnl_hf.reports.comparison import name_runs, read_run
from fnl_hf.reports.history import norms_table
from fnl_hf.reports.plots import COLORS, MOST_RUNS, plt

LAYERS = [f"norms/qk/bert.encoder.layer.{layer}.attention.qk" for layer in range(2)]


def norms(step, *values):
    """An entry with the Frobenius norms of two layers' products; nuclear norms are twice, bounds three times them."""
    entry = {"step": step}
    for stem, value in zip(LAYERS, values):
        entry |= {f"{stem}/frobenius": value, f"{stem}/nuclear": 2 * value, f"{stem}/bound": 3 * value}
    return entry


def write_state(folder, step, history):
    folder.mkdir(parents=True, exist_ok=True)
    state = TrainerState(global_step=step, max_steps=step, num_train_epochs=1, train_batch_size=3, log_history=history)
    state.save_to_json(str(folder / "trainer_state.json"))


def write_run(folder, step, history, results=None, **arguments):
    write_state(folder, step, history)
    (folder / "run_arguments.json").write_text(json.dumps(arguments))
    if results is not None:
        (folder / "all_results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def figures(monkeypatch):
    found = []
    monkeypatch.setattr(plt, "close", found.append)
    yield found
    monkeypatch.undo()
    plt.close("all")


def curves(figure):
    """Title of each panel -> its curves, as (color, points)."""
    return {
        axes.get_title(): [
            (line.get_color(), list(zip(line.get_xdata(), line.get_ydata())))
            for line in axes.lines
            if not str(line.get_label()).startswith("unigram") and line.get_alpha() != 0
        ]
        for axes in figure.axes
    }


# ---- names ----


@pytest.mark.parametrize(
    "runs, names",
    [
        ([{"seed": 1, "optimizer": "adamw"}, {"seed": 1, "optimizer": "lamb"}], ["optimizer adamw", "optimizer lamb"]),
        ([{"seed": 1}, {"seed": 1}], ["a", "b"]),
        ([{"seed": 1}, {}], ["a", "b"]),  # one has no record
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], ["seed 1 (a)", "seed 2", "seed 1 (c)"]),
        ([{"length": "5 steps", "lr": 2e-3, "new": 7}, {"length": "3 steps", "lr": 1e-5}],
         ["5 steps, lr 0.002", "3 steps, lr 1e-05"]),
        ([{"bf16": True, "preset": None}, {"bf16": False, "preset": "tiny"}],
         ["bf16 true, preset unset", "bf16 false, preset tiny"]),
        ([{"train_file": ["/x/a.txt", "/x/b.txt"]}, {"train_file": ["/y/c.txt"]}],
         ["train_file a.txt b.txt", "train_file c.txt"]),
        ([{"dataset_name": "/x/d"}, {"dataset_name": "/y/d"}], ["dataset_name /x/d", "dataset_name /y/d"]),
        ([{"data_fingerprint": "1"}, {"data_fingerprint": "2"}], ["a", "b"]),
        ([dict.fromkeys("tuvwxyz", 1), dict.fromkeys("tuvwxyz", 2)],
         ["a: t 1, u 1, v 1, w 1, x 1, ...", "b: t 2, u 2, v 2, w 2, x 2, ..."]),
    ],
)  # fmt: skip
def test_a_run_is_named_by_what_differs(runs, names):
    assert name_runs(runs, ["a", "b", "c"][: len(runs)]) == names


def test_folders_of_one_name_are_named_by_their_paths(tmp_path):
    for name in ("x/out", "y/out"):
        write_run(tmp_path / name, 5, [{"step": 5, "loss": 3.0}])
    found = plot_runs([tmp_path / "x/out", tmp_path / "y/out"], tmp_path / "a.png")
    assert found == [str(tmp_path / "x/out"), str(tmp_path / "y/out")]


# ---- what a folder holds ----


def test_the_furthest_state_counts(tmp_path):
    """A run that is going on is known by its newest checkpoint, also after a shorter run has ended there."""
    run, (first, second, third) = tmp_path / "run", [[{"step": step, "loss": 9.0 - step}] for step in (2, 4, 7)]
    write_state(run / "checkpoint-2", 2, first)
    assert read_run(run).history == first and read_run(run / "checkpoint-2").history == first
    write_run(run, 4, second, {"eval_loss": 5.0, "unigram_entropy": 6.0, "eval_samples": 3})
    ended = read_run(run)
    assert ended.history == [*second, {"step": 4, "eval_loss": 5.0}] and ended.unigram_entropy == 6.0
    assert ended.last("eval_loss") == 5.0 and ended.last("eval_f1") is None
    write_state(run / "checkpoint-7", 7, third)
    (run / "checkpoint-9").mkdir()
    (run / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "log')
    longer = read_run(run)
    assert longer.history == third and longer.unigram_entropy is None


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda run: run.mkdir(), "run contains no run: neither it nor a checkpoint in it has a readable"),
        (lambda run: None, "run contains no run"),
        (lambda run: run.write_text("mine"), "run contains no run"),
        (lambda run: (write_run(run, 1, []), (run / "trainer_state.json").unlink()), "run there has written no c"),
        (lambda run: write_run(run, 1234, [norms(0, 1.0, 1.0)]), "run has logged no loss in its 1,234 steps"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path, prepare, message):
    good = write_run(tmp_path / "good", 5, [{"step": 5, "loss": 3.0}])
    prepare(tmp_path / "run")
    with pytest.raises(UserInputError, match=message):
        plot_runs([good, tmp_path / "run"], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_folder_twice_and_too_many_are_refused(tmp_path):
    good = write_run(tmp_path / "good", 5, [{"step": 5, "loss": 3.0}])
    with pytest.raises(UserInputError, match="good/../good is given twice"):
        plot_runs([good, good / ".." / "good"], tmp_path / "a.png")
    with pytest.raises(UserInputError, match=f"{MOST_RUNS + 1} runs are given: at most {MOST_RUNS} can"):
        plot_runs([tmp_path / str(index) for index in range(MOST_RUNS + 1)], tmp_path / "a.png")


# ---- pictures ----


@pytest.mark.parametrize("count, title", [(1, "loss"), (2, "held-out loss")])
def test_the_loss_of_a_distillation_has_no_unit(tmp_path, figures, count, title):
    """A relative squared error is part of it, in the picture of one run and of several."""
    history = [{"step": 5, "loss": 7.0}, {"step": 5, "eval_loss": 6.5, "eval_hidden_loss": 0.5}]
    runs = [write_run(tmp_path / str(index), 5, history, seed=index) for index in range(count)]
    plot_runs(runs, tmp_path / "c.png")
    titles = [axes.get_title() for axes in figures[0].axes]
    assert title in titles and not [each for each in titles if "nats" in each]


def test_each_panel_has_a_curve_for_each_run_that_logged_it(tmp_path, figures):
    """Of different lengths; the norms are means over two layers, and the third run has none."""
    long = [norms(0, 2.0, 4.0), {"step": 5, "loss": 7.0, "tokens_per_second": 3e4}, norms(5, 3.0, 7.0)]
    long += [{"step": 10, "loss": 6.0}, {"step": 10, "eval_loss": 6.5}]
    short = [norms(0, 1.0, 2.0), {"step": 5, "loss": 8.0}]
    other = [{"step": 3, "loss": float("nan")}, {"step": 6, "loss": 5.0, "images_per_second": 11.0}]
    runs = [
        write_run(tmp_path / "a", 10, long, {"unigram_entropy": 5.5}, decay_mode="frobenius"),
        write_run(tmp_path / "b", 5, short, {"unigram_entropy": 5.5, "eval_loss": 7.5}, decay_mode="weight"),
        write_run(tmp_path / "c", 6, other, decay_mode="none"),
    ]
    names = [f"decay_mode {mode}" for mode in ("frobenius", "weight", "none")]
    assert plot_runs(runs, tmp_path / "c.png") == names
    (figure,) = figures
    found = curves(figure)
    assert list(found) == [
        "training loss (nats)", "held-out loss (nats)", "throughput (tokens per second)",
        "throughput (images per second)", "$QK^T$: mean Frobenius norm", "$QK^T$: mean nuclear norm; dashed: its bound",
    ]  # fmt: skip
    first, second, third = COLORS[:3]
    loss = found["training loss (nats)"]
    assert loss[:2] == [(first, [(5, 7.0), (10, 6.0)]), (second, [(5, 8.0)])] and loss[2][1][1] == (6, 5.0)
    assert found["held-out loss (nats)"] == [(first, [(10, 6.5)]), (second, [(5, 7.5)]), (third, [])]
    frobenius = found["$QK^T$: mean Frobenius norm"]
    assert frobenius == [(first, [(0, 3.0), (5, 5.0)]), (second, [(0, 1.5)]), (third, [])]
    nuclear = found["$QK^T$: mean nuclear norm; dashed: its bound"]
    assert nuclear[:2] == [(first, [(0, 6.0), (5, 10.0)]), (first, [(0, 9.0), (5, 15.0)])]
    held_out = next(axes for axes in figure.axes if axes.get_title().startswith("held-out"))
    assert [line.get_ydata()[0] for line in held_out.lines if line.get_label().startswith("unigram")] == [5.5]
    legends = [legend for strip in figure.subfigs for legend in strip.legends]
    assert [text.get_text() for text in legends[0].get_texts()] == names
    assert [handle.get_color() for handle in legends[0].legend_handles] == [first, second, third]
    assert all(axes.get_xlim()[1] == pytest.approx(10.4) for axes in figure.axes), "the steps of the longest run"


def test_the_entropy_of_other_texts_is_no_common_line(tmp_path, figures):
    for name, entropy in (("a", 5.5), ("b", 5.75)):
        write_run(tmp_path / name, 5, [{"step": 5, "loss": 3.0, "eval_loss": 4.0}], {"unigram_entropy": entropy})
    plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "c.png")
    assert not [line for axes in figures[0].axes for line in axes.lines if str(line.get_label()).startswith("unigram")]


def test_one_run_gets_its_own_report(tmp_path, figures):
    recipe = {"optimizer": "lamb", "optim_args": None, "learning_rate": 0.25, "weight_decay": 0.5}
    history = [norms(0, 2.0, 4.0), {"step": 5, "loss": 7.0}]
    run = write_run(tmp_path / "run", 5, history, **recipe, frobenius_decay=None, decay_mode="frobenius")
    plot_runs([run], tmp_path / "one.svg")
    title = "run: lamb, peak learning rate 0.25, weight decay 0.5; decay of the products: frobenius, λ = 0.5"
    assert figures[0].get_suptitle() == title and "$QK^T$: effective step η/‖W‖²" in curves(figures[0])
    write_run(tmp_path / "stock", 5, [{"step": 5, "loss": 3.0}])
    (tmp_path / "stock" / "run_arguments.json").unlink()
    assert plot_runs([tmp_path / "stock"], tmp_path / "two.pdf") == ["stock"]
    assert (tmp_path / "one.svg").read_text().lstrip().startswith("<?xml")
    assert (tmp_path / "two.pdf").read_bytes().startswith(b"%PDF")


def test_dollar_signs_in_a_name_are_no_formula(tmp_path):
    """In the title of one run, which a training script draws at its end, and in the legend of two."""
    runs = [write_run(tmp_path / name, 5, [{"step": 5, "loss": 3.0}]) for name in ("lr$1e-3_{a$", "other")]
    assert plot_runs(runs[:1], tmp_path / "one.png") == ["lr$1e-3_{a$"]
    assert plot_runs(runs, tmp_path / "two.png") == ["lr$1e-3_{a$", "other"]


# ---- the table of norms ----


def test_the_table_has_means_by_kind_and_range_of_layers_of_the_last_log():
    """Five layers are three rows; of a name with no number, or two, the layer is not known."""
    stems = [f"norms/vo/encoder.layer.{layer}.attention.vo" for layer in range(5)]
    stems += ["norms/linear/head.dense", "norms/linear/stages.1.layers.3"]
    values = (1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 14.0)
    history = [
        {"step": step, "epoch": 1} | {f"{stem}/{norm}": factor * scale * value for stem, value in zip(stems, values)
                                      for norm, factor in (("frobenius", 1), ("nuclear", 10), ("bound", 100))}
        for step, scale in ((0, 3), (1500, 1))
    ]  # fmt: skip
    assert norms_table(history).splitlines() == [
        "Norms of the products at step 1,500; each row is a mean:",
        "",
        "| product | layers | count | Frobenius norm | nuclear norm | its bound |",
        "| --- | --- | --- | --- | --- | --- |",
        "| VOᵀ | 0 to 1 | 2 | 1.5 | 15 | 150 |",
        "| VOᵀ | 2 to 3 | 2 | 4 | 40 | 400 |",
        "| VOᵀ | 4 | 1 | 7 | 70 | 700 |",
        "| UVᵀ | all | 2 | 12.5 | 125 | 1.25e+03 |",
    ]
    assert norms_table([{"step": 3, "loss": 1.0}]) == ""
