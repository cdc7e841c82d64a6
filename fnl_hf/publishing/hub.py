"""Models on the Hub: what of a folder is uploaded, when, and what is said where that fails."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from fnl_hf.errors import UserInputError
from fnl_hf.publishing.cards import CARD_FILE, name_repository
from fnl_hf.runs.checkpoints import CHECKSUMS_FILE
from fnl_hf.runs.ownership import STARTED_FILE, staying_recorded

logger = logging.get_logger(__name__)

# Patterns of what belongs to a run and not to its model; "*" stands for "/", too.
NOT_UPLOADED = (
    *("_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*", "*.pt", "*.pth"),
    *(TRAINING_ARGS_NAME, CHECKSUMS_FILE, STARTED_FILE),
)
# status of a refusal -> what it means and asks for
REFUSALS = {
    401: "no token, or one that the Hub does not know: log in with `hf auth login` or set HF_TOKEN, with a token "
    "that has write permission",
    403: "the token has no write permission there: use one that has (https://huggingface.co/settings/tokens), or "
    "another repository name",
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
        if not any(os.path.isfile(folder / file) for file in names):
            raise UserInputError(f"{folder} contains no saved model: it has no {' or '.join(names)}")
    with hub_errors(name, f"{folder} is unchanged: the same command uploads what is missing"):
        repository = create_repository(name, private, token)
        with staying_recorded(folder / CARD_FILE):
            name_repository(folder / CARD_FILE, repository)
        upload_model(folder, repository, token, revision)
    return f"{HfApi().endpoint}/{repository}"


def upload_model(
    folder: str | Path, repository: str, token: str | None, revision: str | None, message: str = "Upload model"
) -> None:
    """Commit what belongs to a saved model, as it lies in its folder, to a repository that exists."""
    HfApi(library_name="fnl_hf").upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message=message,
        token=token,
        revision=revision,
        ignore_patterns=list(NOT_UPLOADED),
    )


def create_repository(name: str, private: bool | None, token: str | None) -> str:
    """The full name of a repository, which is made if it does not exist.

    Raises:
        UserInputError: it exists and is public, but ``private`` is asked for.
    """
    api = HfApi(library_name="fnl_hf")
    repository = api.create_repo(name, private=private, token=token, exist_ok=True).repo_id
    if private and not api.model_info(repository, token=token).private:
        raise UserInputError(
            f"{repository} exists and is public: make it private in its settings, or choose another name"
        )
    return repository


def push_finished(args) -> None:
    """Upload the model of a finished run if ``--push_to_hub`` asks for it: its own push may have failed."""
    if args.push_to_hub and args.process_index == 0:
        push_folder(args.output_dir, repository_name(args), args.hub_private_repo, args.hub_token, args.hub_revision)


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
        raise UserInputError(f"{name} on the Hub: {explain(error)}. {advice}") from error


def explain(error: BaseException) -> str:
    """Why a request to the Hub failed: what its status asks for, or the error with the one that it comes from."""
    root = error
    while root.__cause__ is not None and not isinstance(root, HTTPError):
        root = root.__cause__
    status = getattr(getattr(root, "response", None), "status_code", None)
    if status in REFUSALS:
        return REFUSALS[status]
    found = f"{type(root).__name__}: {root}".rstrip(".")
    if "404" in found and "/xet-write-token/" in found:  # hf_xet raises no HTTPError
        return "it does not take large files over Xet: set HF_HUB_DISABLE_XET=1 to upload them through Git LFS"
    return found if root is error else f"{error} ({found})"


def repository_name(args) -> str:
    """The repository that ``TrainingArguments`` name, by default the output folder's name."""
    return args.hub_model_id or Path(args.output_dir).absolute().name
