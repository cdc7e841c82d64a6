"""What the training scripts share: a run is planned, checked against its folder, recorded and reported."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from fnl_hf.products.discovery import find_products
from fnl_hf.publishing.cards import CARD_FILE, model_facts, run_facts, training_facts, write_run_card
from fnl_hf.publishing.hub import push_finished
from fnl_hf.reports.history import norms_table
from fnl_hf.reports.overview import (
    OverviewCallback,
    describe_end,
    describe_precision,
    describe_recipe,
    describe_start,
)
from fnl_hf.reports.plots import REPORT_FILE, plot_report
from fnl_hf.runs.checkpoints import checksum
from fnl_hf.runs.ownership import output_of, record_written
from fnl_hf.runs.plan import (
    START_WEIGHTS,
    TEACHER_WEIGHTS,
    describe_run,
    plan_run,
    start_run,
    validate_data,
    validate_weights,
    weights_checksum,
)
from fnl_hf.runs.processes import decide_on_first_process
from fnl_hf.runs.provenance import read_starts, record_start
from fnl_hf.training.unused_flags import warn_of_unused_decay

logger = logging.get_logger(__name__)


class ScriptRun:
    """One run of a training script, from its command line to the results in its output folder. Planning changes no
    file.

    Args:
        args: ``FnlTrainingArguments``.
        argv: the command line without the script's name.
        *script_arguments: the script's own dataclasses.
        also: names in the output folder of what the script writes itself.

    Raises:
        UserInputError: see :func:`fnl_hf.runs.plan.plan_run`.
    """

    def __init__(self, args, argv: Sequence[str], *script_arguments, also: Sequence[str] = ()):
        self.args, self.argv = args, argv
        self.began = time.monotonic()
        self.description = describe_run(args, *script_arguments)
        self.plan = plan_run(args, self.description, also)
        self.output = output_of(args, *also)
        self._card_before: str | None = None
        self._is_card_kept = False  # the user's own

    def is_finished(self, model_name_or_path: str | None, teacher_name_or_path: str | None = None) -> bool:
        """Whether nothing is left to do; an upload that failed is repeated.

        Raises:
            UserInputError: the run was started from other weights than those in ``model_name_or_path``, or has another
                teacher.
        """
        self.began = time.monotonic()  # with several seeds, all runs are planned first
        self.description[START_WEIGHTS] = weights_checksum(model_name_or_path)
        self.description[TEACHER_WEIGHTS] = weights_checksum(teacher_name_or_path)
        validate_weights(self.plan, self.description)
        if not self.plan.finished:
            return False
        logger.warning(f"The run in {self.args.output_dir} is finished: nothing to do")
        push_finished(self.args)
        return True

    def record_data(self, fingerprints: Mapping[str, str]) -> None:
        """Record the fingerprints of the data, by the names that :func:`fnl_hf.runs.plan.validate_data` uses.

        Raises:
            UserInputError: the run that is continued, or finished, has others.
        """
        self.description |= fingerprints
        validate_data(self.plan, self.description)

    def start(self, trainer, facts: Mapping[str, str], notice: str | None = None) -> None:
        """Make and lock the output folder, record this start, and print what it is.

        Args:
            facts, notice: see :func:`fnl_hf.reports.overview.describe_start`.

        Raises:
            UserInputError: another process has begun a run there since this one was planned.
        """

        def start() -> None:
            start_run(self.args, self.plan, self.description)
            self._card_before = self._card()
            if self.args.do_train:
                record_start(self.args, self.plan.checkpoint, self.argv, self.description)

        warn_of_unused_decay(self.argv, self.args, trainer.model)
        decide_on_first_process(start)
        if self.args.do_train:
            trainer.add_callback(OverviewCallback(trainer, facts, notice))
        elif trainer.is_world_process_zero():
            print(describe_start(trainer, facts, notice), flush=True)

    def finish(
        self,
        trainer,
        metrics: dict[str, dict[str, Any]],
        source: str = "",
        facts: dict[str, Any] | None = None,
        language: str | None = None,
        **card,
    ) -> None:
        """Write report, card and metrics by split (``all_results.json`` marks a finished run), and upload. The model
        itself is already saved.

        Args:
            source: the data's name for the card.
            facts: rows of the card that only the script knows.
            language: of the data, if it is known; ``--hub_language`` overrides it.
            **card: what else :func:`write_run_card` takes; without any no card is written.
        """
        if self.args.do_train and trainer.is_world_process_zero():
            self._report(trainer, metrics, source, facts or {}, language, card)
        for split, values in metrics.items():
            trainer.log_metrics(split, values)
            trainer.save_metrics(split, values)
        if trainer.is_world_process_zero():
            print(describe_end(self.args, time.monotonic() - self.began, metrics), flush=True)
        try:
            if self.args.push_to_hub and self.args.do_train:
                trainer.push_saved()
            elif self.args.push_to_hub:  # nothing is saved yet
                trainer.push_to_hub()
        finally:  # even if the upload fails
            if trainer.is_world_process_zero():
                kept = (CARD_FILE,) if self._is_card_kept else ()
                record_written(Path(self.args.output_dir), [n for n in self.output.patterns if n not in kept])
                self._warn_of_older_exports()

    def _warn_of_older_exports(self) -> None:
        """A run keeps what it did not write: after an export and another run, two models are in one folder."""
        files = sorted(Path(self.args.output_dir).glob("**/*.onnx")) if self.args.do_train else []
        if files:
            logger.warning(f"{', '.join(map(str, files))}: exported from an earlier model than the one of this run")

    def _report(
        self, trainer, metrics: Mapping[str, dict[str, Any]], source: str, facts: dict[str, Any],
        language: str | None, card: dict[str, Any],
    ) -> None:  # fmt: skip
        """The picture and, if it is asked for, the card."""
        args, folder, held_out = self.args, Path(self.args.output_dir), metrics.get("eval", {})
        history = trainer.state.log_history
        title = f"{folder.resolve().name}: {describe_recipe(args, bool(find_products(trainer.model)))}"
        plot_report(history, folder / REPORT_FILE, held_out.get("unigram_entropy"), title)
        if not card:
            return
        self._is_card_kept = self._card() != self._card_before
        if self._is_card_kept:
            logger.warning(f"{folder / CARD_FILE} has changed since the run started: it is kept, and no card written")
            return
        facts = model_facts(trainer.model, args, source) | facts | training_facts(args, trainer.state.global_step)
        facts["precision"] = describe_precision(trainer)
        write_run_card(
            folder,
            model=trainer.model,
            facts=facts | run_facts(read_starts(folder), metrics["train"]),
            metrics=held_out,
            repository=trainer.hub_model_id,
            license=args.hub_license,
            language=args.hub_language or language,
            plot=REPORT_FILE,
            section=norms_table(history),
            **card,
        )

    def _card(self) -> str | None:
        """The checksum of what has the model card's name in the output folder."""
        file = Path(self.args.output_dir, CARD_FILE)
        return checksum(file) if file.is_file() else None
