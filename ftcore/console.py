"""What a person reads and pastes: no text is markup or steers the terminal, and no stream ends a run."""

import codecs
import io
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# Controls of C0 and C1 except tab and newline, marks that turn the direction of text, halves of a character.
STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What bars, tables and `printable` draw with -> the same where a stream cannot hold it.
SIMPLER = {"█": "#", "•": "*", "…": "~", "\ufffd": "?"}


def quiet() -> None:
    """Silence what the libraries print about themselves; their errors stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Behind the filters that are there: who asks for deprecations, as the tests do, sees them.
    warnings.filterwarnings("ignore", module="lightning|torch|peft|transformers", append=True)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def printable(text: str) -> str:
    """The text without what would move the cursor, colour the terminal or turn the reading direction.

    >>> printable("a\\x1b[31mb")
    'a\ufffd[31mb'
    """
    return STEERING.sub("\ufffd", text)


def typed(*words: object) -> str:
    """Words as one types them into a shell.

    >>> typed("chat", "run=my runs/1")
    "chat 'run=my runs/1'"
    """
    return shlex.join(map(str, words))


class _Console(rich.console.Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed and, called again, what is in it. All text comes by here."""
        if isinstance(renderable, str):
            renderable = printable(renderable)
        elif isinstance(renderable, Text):
            renderable = renderable.copy()
            renderable.plain = printable(renderable.plain)
        return super().render(renderable, options)


# Prints text as it is: our own styles are in `Text` and `style=`.
Console = partial(_Console, markup=False, emoji=False)
console = Console()
# For messages with paths and commands, which are copied from it: no line breaks of its own.
plain = Console(soft_wrap=True, highlight=False)
stderr = Console(soft_wrap=True, highlight=False, stderr=True)


def wide_console() -> rich.console.Console:
    """A console for tables of many columns: 160 characters wide where the output is no terminal."""
    return Console() if console.is_terminal else Console(width=160)


class Stream(io.TextIOWrapper):
    """Standard output or error that drops what it cannot write: its reader has left, as `head` does, or a disk is full."""

    lost: OSError | None = None  # the first failure

    def write(self, text: str) -> int:
        """Write, or drop."""
        with self._dropping():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        with self._dropping():
            super().flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())  # what is buffered goes there too


def steady_streams() -> None:
    """Let no character, and no stream that fails, end this process. To be called first, in every process that prints."""
    codecs.register_error("simpler", _simpler)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # else it is that of a notebook or a test
            stream.flush()
            file = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115 (open until the process ends)
            at_once, through = stream.line_buffering, stream.write_through
            setattr(sys, name, Stream(file, stream.encoding, "simpler", None, at_once, through))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _simpler(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that a stream cannot hold: a simpler one, or its number."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(SIMPLER.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end
