"""Errors a user can cause: one paragraph that says what, where and how to fix it, and an exit code of its kind.

Only `ftcore.cli` turns them into an exit status. Messages never hold the content of a row: rows may be private.
"""

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class FtcoreError(ValueError):
    """Base class of every error a user can cause."""

    exit_code = 1


class ConfigError(FtcoreError):
    """A wrong, missing or conflicting setting."""

    exit_code = 2


class DataError(FtcoreError):
    """Rows that cannot be read or trained on."""

    exit_code = 3


class ModelError(FtcoreError):
    """Weights, tokenizer or adapter that cannot be used."""

    exit_code = 4


class HardwareError(FtcoreError):
    """A machine that lacks what the hardware option asks for, or a process of several that failed."""

    exit_code = 5


class OutOfMemory(HardwareError):  # noqa: N818 (the name of the thing)
    """A GPU too small for a micro-batch; with micro_batch_size=auto a smaller one is tried."""


class DoesNotFit(HardwareError):  # noqa: N818 (the name of the thing)
    """A plan that fits on nothing it is held against; `answer` is what the plan says all the same."""

    def __init__(self, message: str, answer: dict[str, object]) -> None:
        super().__init__(message)
        self.answer = answer


class NumericalError(FtcoreError):
    """A loss or gradient that is not a finite number."""

    exit_code = 6


class StorageError(FtcoreError):
    """A folder that cannot be written or read."""

    exit_code = 7


class RewardError(FtcoreError):
    """Rewards or generation that failed too often."""

    exit_code = 8


class Stopped(FtcoreError):  # noqa: N818 (a signal is no error)
    """A run that a signal ended; `exit_code` is 128 and the signal's number."""

    exit_code = 128

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# Characters of a message that are printed, and of one that the code of a user raised.
LONGEST, SHOWN = 4000, 200
# Where code lies that is not a user's own.
OTHERS = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")


def paragraph(error: FtcoreError, process: str = "") -> str:
    """An error as it is printed, with the `process` that met it: kind and message, a very long one without its middle."""
    message = str(error)
    if (left_out := len(message) - LONGEST) > 0:
        start, end = message[: LONGEST // 2], message[-LONGEST // 2 :]  # the end says how to fix it
        message = f"{start} ... ({left_out:,} characters left out) ... {end}"
    return f"{type(error).__name__}{process}: {message}"


# Set by the config for the processes of a run, those that others start included.
PRIVATE = "FTCORE_PRIVATE"


def is_private() -> bool:
    """Whether no text of a row may be shown or kept."""
    return os.environ.get(PRIVATE) == "1"


def traced(error: BaseException) -> str:
    """The traceback of an unexpected error. Where rows are private it has lines of code only: a message may quote a row."""
    if not is_private():
        return "".join(traceback.format_exception(error))
    withheld = f"{type(error).__name__} (message withheld: private=true)\n"
    return "".join([*traceback.format_tb(error.__traceback__), withheld])


def described(error: BaseException) -> str:
    """What the code of a user raised: kind, file and line, and unless rows are private the message."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame for frame in frames if not frame.filename.startswith(OTHERS) and "site-packages" not in frame.filename
    ]
    where = f" at {Path(theirs[-1].filename).name}:{theirs[-1].lineno}" if theirs else ""
    message = ""
    with suppress(Exception):  # what a user's exception says of itself is their code too
        message = "" if is_private() else " ".join(str(error).split())[:SHOWN]
    return f"{type(error).__name__}{where}{f': {message}' if message else ''}"


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what the operating system refuses into a `StorageError`."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StorageError(f"{error.strerror or error}{where}. Check free space, permissions and the path.") from None


@contextmanager
def model_errors(place: Path, kind: str = "") -> Iterator[None]:
    """Turn whatever a library raises while it reads a file or folder of a model into a `ModelError`.

    `kind` says what it is read as. There is no list of classes: each library has its own, and a Rust panic is no `Exception`.
    """
    try:
        yield
    except FtcoreError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{place} cannot be read{kind}: {printable(f'{type(error).__name__}: {error}')}") from error


def printable(text: str, most: int = 300) -> str:
    """Text out of somebody's file, or of a message about it, on one line and of at most `most` characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:most]
