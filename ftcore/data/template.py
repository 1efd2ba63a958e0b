"""Chat templates are programs that come with a stranger's weights: rendered in a sandbox, under limits of time and memory.

The sandbox of transformers keeps them from reaching the machine. The limits keep them from holding it up.
"""

import resource
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from ftcore.errors import DataError, is_private

SECONDS = 2
MEMORY = 512 * 2**20  # bytes that rendering may add
LONGEST = 1_000_000  # characters around a few short messages


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as the tokenizer's template writes it.

    Raises `DataError` when the template refuses it, fails, or takes too long or too much memory.
    """
    roles = ", ".join(message["role"] for message in messages)
    try:
        _refuse_powers(tokenizer.chat_template)
        with ExitStack() as limits:
            _limit_time(limits)
            _limit_memory(limits)
            text = str(
                tokenizer.apply_chat_template(
                    messages,
                    tools=tools,  # type: ignore[arg-type]
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
            )
    except TemplateError as error:
        said = type(error).__name__ if is_private() else error  # it may quote a message
        raise DataError(f"The chat template refuses a conversation of {roles}: {said}.") from None
    except (TimeoutError, MemoryError, OverflowError, RecursionError) as error:
        raise DataError(
            f"The chat template takes too long or too much memory for a conversation of {roles} (limits: {SECONDS} s, "
            f"{MEMORY // 2**20} MB): {type(error).__name__}. Give another one with model.chat_template=<file.jinja>."
        ) from None
    except Exception as error:  # a program may raise anything
        raise DataError(f"The chat template fails on a conversation of {roles}: {type(error).__name__}.") from None
    if len(text) > LONGEST and len(text) > LONGEST + 4 * len(repr((messages, tools))):
        raise DataError(f"The chat template writes {len(text):,} characters around {roles}: it cannot be meant so.")
    return text


def _refuse_powers(template: str | dict[str, str] | None) -> None:
    """One power of numbers can take hours in a single operation, which no limit interrupts. No template needs one."""
    for source in template.values() if isinstance(template, dict) else [template or ""]:
        if any((kind, value) == ("operator", "**") for _, kind, value in Environment().lex(source)):
            raise TemplateError("it raises numbers to powers")


def _limit_time(limits: ExitStack) -> None:
    """`TimeoutError` after `SECONDS`. Only the main thread can be interrupted like this."""

    def interrupt(*_: object) -> None:
        raise TimeoutError

    if threading.current_thread() is threading.main_thread():
        limits.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, interrupt))
        limits.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)


def _limit_memory(limits: ExitStack) -> None:
    """`MemoryError` beyond `MEMORY` more than now, where the system says how much it is now."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limits.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        limit = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
