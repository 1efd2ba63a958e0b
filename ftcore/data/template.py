"""Chat templates are programs that come with somebody's weights: rendered in a sandbox, under limits of time and size.

transformers' sandbox keeps them from the machine; the limits keep them from holding it up.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError

from ftcore.errors import DataError

SECONDS = 2
MEMORY = 512 * 2**20  # bytes that rendering may add
LONGEST = 1_000_000  # characters around a few short messages


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The conversation as the tokenizer's template writes it.

    Raises `DataError` when the template refuses it, fails, or takes too long or too much.
    """
    roles = ", ".join(message["role"] for message in messages)
    try:
        _refuse_powers(tokenizer.chat_template)
        with _time_limit(), _memory_limit():
            text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise DataError(f"The chat template refuses a conversation of {roles}: {error}.") from None
    except (TimeoutError, MemoryError, OverflowError, RecursionError) as error:
        limits = f"{SECONDS} s, {MEMORY // 2**20} MB"
        raise DataError(
            f"The chat template takes too long or too much for a conversation of {roles} (limits: {limits}): "
            f"{type(error).__name__}. Give another one with model.chat_template=<file.jinja>."
        ) from None
    except Exception as error:  # a program may raise anything
        raise DataError(f"The chat template fails on a conversation of {roles}: {type(error).__name__}.") from None
    if len(text) > LONGEST:
        raise DataError(f"The chat template writes {len(text):,} characters around {roles}: it cannot be meant so.")
    return text


def _refuse_powers(template: Any) -> None:
    """One power of numbers can take hours in a single operation, which no limit interrupts; no template needs one."""
    for source in template.values() if isinstance(template, dict) else [template]:
        if any((kind, value) == ("operator", "**") for _, kind, value in Environment().lex(source)):
            raise TemplateError("it raises numbers to powers")


@contextmanager
def _time_limit() -> Iterator[None]:
    """`TimeoutError` after `SECONDS`; only the main thread can be interrupted so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_long(*_: Any) -> None:
    raise TimeoutError


@contextmanager
def _memory_limit() -> Iterator[None]:
    """`MemoryError` beyond `MEMORY` more than now; only where the system says how much it is now."""
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
