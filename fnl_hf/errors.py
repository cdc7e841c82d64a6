"""Errors that a user can mend, the check of a bound, and the end that a scheduler asks for."""

EX_TEMPFAIL = 75  # of sysexits.h: a temporary failure, the caller is invited to try again
EX_INTERRUPTED = 130  # of shells: ended by Ctrl-C


class UserInputError(ValueError):
    """A file, flag, configuration or checkpoint cannot be used.

    The message names the thing, the bound and the value. The scripts print it without a traceback and exit with
    status 2. It is always one line, even if it quotes a longer error of a library.
    """

    def __init__(self, message: str):
        # What a DataLoader's worker raises comes with its traceback, which ends in the message.
        message = message.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(line.strip() for line in message.splitlines() if line.strip()))


def validate_bounds(
    name: str, value: float | None, smallest: float, bound: float = float("inf"), above: bool = False
) -> None:
    """Raise UserInputError unless ``smallest <= value < bound``, with ``above`` not ``smallest`` itself; None is a flag
    that was not given."""
    if value is not None and (not smallest <= value < bound or (above and value == smallest)):
        least = "above" if above else "at least"
        raise UserInputError(f"--{name} ({value}) must be {least} {smallest} and below {bound}")


def needs_code(error: Exception) -> bool:
    """Whether Transformers refuses a checkpoint because of the code that comes with it."""
    return "trust_remote_code=True" in str(error)


def reason_of(error: Exception) -> str:
    """What a library's error says, with the flag in the place of an argument of Transformers'."""
    if needs_code(error):
        return (
            "it needs the code that comes with it, which only the training scripts and `fnl-hf ask` run, with "
            "--trust_remote_code: read it first"
        )
    return str(error)


class TrainingDiverged(RuntimeError):
    """Too many steps of a run had a loss or gradient that is not finite; the scripts exit with status 3.

    The message names the step, the count, its bound and the newest complete checkpoint.
    """


class Preempted(SystemExit):
    """A run was stopped by SIGTERM or Ctrl-C and can go on; the process ends with status ``EX_TEMPFAIL`` or
    ``EX_INTERRUPTED``.

    As ``SystemExit``, so that no handler of errors takes it for one.
    """

    def __init__(self, message: str, status: int = EX_TEMPFAIL):
        super().__init__(status)
        self.message = message
