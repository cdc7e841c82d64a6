"""Models on the Hub: what of a folder is uploaded, when, and what is said where that fails."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, PushInProgress, logging

from fnl_hf.errors import UserInputError
from fnl_hf.model_card import CARD_FILE, name_repository
from fnl_hf.training.checkpoints import CHECKSUMS_FILE
from fnl_hf.training.fsdp import ShardedTrainer
from fnl_hf.training.processes import decided_by_first
from fnl_hf.training.runs import STARTED_FILE

logger = logging.get_logger(__name__)

# Patterns of what belongs to a run and not to its model; "*" stands for "/", too.
NOT_UPLOADED = (
    *("_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*", "*.pt", "*.pth"),
    *(TRAINING_ARGS_NAME, CHECKSUMS_FILE, STARTED_FILE),
)
# status of a refusal -> what it means and asks for
REFUSALS = {
    401: "no token, or none that it knows: log in with `hf auth login`, or set HF_TOKEN, with one that may write",
    403: "the token may not write there: use one that may (https://huggingface.co/settings/tokens), or another name",
}


def push_folder(
    folder: str | Path,
    name: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a saved model with its tokenizer, code, card and report, and return the repository's address.

    Checkpoints, optimizer states and a run's own records stay where they are. A card that did not know its repository
    names it now. What the Hub has is not sent again: a push that was cut off goes on.

    Args:
        name: of the repository, with or without its owner.
        private: of a repository that is made; None leaves it to the owner's settings.
        token: default: that of ``hf auth login``, or HF_TOKEN.
        revision: a branch that exists; default: main.

    Raises:
        UserInputError: no saved model there, no permission, no connection, or a public repository where a private one
            is asked for. The model is as it was.
    """
    folder = Path(folder)
    for names in ((CONFIG_NAME,), (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        if not any((folder / file).is_file() for file in names):
            raise UserInputError(f"{folder} holds no saved model: it has no {' or '.join(names)}")
    with hub_errors(name, f"{folder} is as it was: the same command sends what is missing"):
        repository = create_repository(name, private, token)
        name_repository(folder / CARD_FILE, repository)
        api = HfApi(library_name="fnl_hf")
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload model",
            token=token,
            revision=revision,
            ignore_patterns=list(NOT_UPLOADED),
        )
    return f"{api.endpoint}/{repository}"


def create_repository(name: str, private: bool | None, token: str | None) -> str:
    """The full name of a repository, which is made if it does not exist.

    Raises:
        UserInputError: it exists and is public, but ``private`` is asked for.
    """
    api = HfApi(library_name="fnl_hf")
    repository = api.create_repo(name, private=private, token=token, exist_ok=True).repo_id
    if private and not api.model_info(repository, token=token).private:
        raise UserInputError(f"{repository} exists and is public: make it private in its settings, or name another")
    return repository


def push_finished(args) -> None:
    """Upload the model of a finished run if ``--push_to_hub`` asks for it: its own push may have failed."""
    if args.push_to_hub and args.process_index == 0:
        push_folder(args.output_dir, _name_of(args), args.hub_private_repo, args.hub_token, args.hub_revision)


@contextmanager
def hub_errors(name: str, advice: str) -> Iterator[None]:
    """Say in one line why ``name`` could not be reached or written, and what to do.

    Raises:
        UserInputError: instead of what the Hub, the way to it or its client raises.
    """
    try:
        yield
    except UserInputError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserInputError(f"{name} on the Hub: {reason(error)}. {advice}") from error


def reason(error: BaseException) -> str:
    """Why a request to the Hub failed: what its status asks for, or the error with the one that it comes from."""
    root = error
    while root.__cause__ is not None and not isinstance(root, HTTPError):
        root = root.__cause__
    status = getattr(getattr(root, "response", None), "status_code", None)
    if status in REFUSALS:
        return REFUSALS[status]
    found = f"{type(root).__name__}: {root}".rstrip(".")
    if "404" in found and "/xet-write-token/" in found:  # hf_xet raises no HTTPError
        return "it takes no large files over Xet: set HF_HUB_DISABLE_XET=1 to send them through Git LFS"
    return found if root is error else f"{error} ({found})"


def _name_of(args) -> str:
    return args.hub_model_id or Path(args.output_dir).absolute().name


class PushingTrainer(ShardedTrainer):
    """Trainer whose uploads keep the scripts' model card, and fail in one line that says what to do.

    Where one fails while training goes on, that is a warning: the last one sends what is missing.
    """

    hub_model_id: Any
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As Trainer's, but a refusal ends all processes alike."""
        private = self.args.hub_private_repo if private is None else private

        def create() -> str:
            with hub_errors(_name_of(self.args), "Nothing is lost: mend it, or train without --push_to_hub"):
                return create_repository(_name_of(self.args), private, token or self.args.hub_token)

        self.hub_model_id = decided_by_first(create)
        self.push_in_progress = None

    def push_to_hub(self, *args, **kwargs):
        """As Trainer's.

        Raises:
            UserInputError: the Hub refuses, or the connection fails; the model is in the output folder.
        """
        name = self.hub_model_id or _name_of(self.args)
        command = f"`fnl-hf push {self.args.output_dir} {name}`"
        with hub_errors(name, f"The model is saved: {command} sends what is missing"):
            return super().push_to_hub(*args, **kwargs)

    @cached_property
    def _api(self) -> HfApi:
        return HfApi(library_name="fnl_hf")  # the same one makes one upload after the other

    def is_pushing(self) -> bool:
        """Whether an upload is under way."""
        running = getattr(self, "push_in_progress", None)  # set by init_hf_repo
        return running is not None and not running.is_done()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, but of the checkpoint itself: the output folder may be written to while it is uploaded."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.is_pushing() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(checkpoint_folder, message, None, NOT_UPLOADED)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", name, ()))
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if self.is_pushing() else ()), *jobs])

    def _upload(self, folder: str, message: str, path: str | None, left_out: Sequence[str]) -> Future:
        job = self._api.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            path_in_repo=path,
            commit_message=message,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            ignore_patterns=list(left_out),
            run_as_future=True,
        )
        job.add_done_callback(_warn_if_failed)
        return job

    def create_model_card(self, *args, **kwargs) -> None:
        """The scripts write a card that says more than Trainer's; pushing to the Hub keeps it."""
        if not Path(self.args.output_dir, CARD_FILE).is_file():
            super().create_model_card(*args, **kwargs)


def _warn_if_failed(job: Future) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(f"A checkpoint could not be pushed: {reason(error)}. The run goes on; its end pushes again")
