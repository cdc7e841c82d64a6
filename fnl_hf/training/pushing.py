"""Uploads of a training run: the scripts' model card is kept, and a failure is one line that says what to do."""

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, logging

from fnl_hf.publishing.cards import CARD_FILE
from fnl_hf.publishing.hub import NOT_UPLOADED, create_repository, explain, hub_errors, repository_name, upload_model
from fnl_hf.runs.processes import decide_on_first_process
from fnl_hf.training.fsdp import ShardedTrainer

logger = logging.get_logger(__name__)


class PushingTrainer(ShardedTrainer):
    """Trainer whose uploads keep the scripts' model card, and whose failures are one line that says what to do.

    A failure during training is a warning: the last upload sends what is missing.
    """

    hub_model_id: Any
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Like Trainer's, but a refusal ends all processes with the same error."""
        private = self.args.hub_private_repo if private is None else private

        def create() -> str:
            with hub_errors(
                repository_name(self.args), "Nothing is lost: correct this, or train without --push_to_hub"
            ):
                return create_repository(repository_name(self.args), private, token or self.args.hub_token)

        self.hub_model_id = decide_on_first_process(create)
        self.push_in_progress = None

    def push_to_hub(self, *args, **kwargs):
        """Like Trainer's, which saves the model first.

        Raises:
            UserInputError: the Hub refuses, or the connection fails; the model is in the output folder.
        """
        with self._saying_what_is_missing():
            return super().push_to_hub(*args, **kwargs)

    def push_saved(self) -> None:
        """Upload the model as it was saved in the output folder, unaffected by evaluations in between.

        Raises:
            UserInputError: as in :meth:`push_to_hub`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return
        self._finish_current_push()
        args = self.args
        with self._saying_what_is_missing():
            upload_model(args.output_dir, self.hub_model_id, args.hub_token, args.hub_revision, "End of training")

    def _saying_what_is_missing(self) -> AbstractContextManager[None]:
        name = self.hub_model_id or repository_name(self.args)
        command = f"`fnl-hf push {self.args.output_dir} {name}`"
        return hub_errors(name, f"The model is saved: {command} uploads what is missing")

    def is_pushing(self) -> bool:
        """Whether an upload is in progress."""
        running = getattr(self, "push_in_progress", None)  # set by init_hf_repo
        return running is not None and not running.is_done()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the checkpoint is not complete yet when Trainer calls this. :class:`PushCallback` uploads it
        later."""

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the scripts' model card, which says more than Trainer's."""
        if not Path(self.args.output_dir, CARD_FILE).is_file():
            super().create_model_card(*args, **kwargs)


class PushCallback(TrainerCallback):
    """Uploads each saved checkpoint, according to ``hub_strategy``, from the checkpoint's own folder.

    Trainer copies a checkpoint into the output folder and uploads that folder while the next checkpoint is copied
    there. It leaves out the model's code, includes the run's own files, and does not report an upload that fails.
    """

    def __init__(self, trainer: PushingTrainer):
        self.trainer = trainer
        self.api = HfApi(library_name="fnl_hf")  # uploads in sequence

    def on_save(self, args, state, control, **kwargs):
        trainer, strategy = self.trainer, args.hub_strategy
        if not trainer.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = trainer.push_in_progress.jobs if trainer.is_pushing() else []
        if running and not args.hub_always_push:
            return
        trainer.callback_handler.on_push_begin(args, state, control)
        checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        message = f"Training in progress, step {state.global_step}"
        jobs = [self._upload(args, checkpoint, message, None, NOT_UPLOADED)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            jobs.append(self._upload(args, checkpoint, f"{message}, checkpoint", name, ()))
        trainer.push_in_progress = PushInProgress([*running, *jobs])

    def _upload(self, args, folder: Path, message: str, path: str | None, left_out: Sequence[str]) -> Future:
        job = self.api.upload_folder(
            repo_id=self.trainer.hub_model_id,
            folder_path=folder,
            path_in_repo=path,
            commit_message=message,
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=list(left_out),
            run_as_future=True,
        )
        job.add_done_callback(_warn_if_failed)
        return job


def _warn_if_failed(job: Future) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(
            f"A checkpoint could not be pushed: {explain(error)}. The run continues and pushes again at its end"
        )
