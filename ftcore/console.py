"""The console that a person reads, and what libraries may print on it."""

import logging
import warnings

from rich.console import Console


def quiet() -> None:
    """Silence what the libraries print about themselves; their errors stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Behind the filters that are there: who asks for deprecations, as the tests do, sees them.
    warnings.filterwarnings("ignore", module="lightning|torch|peft|transformers", append=True)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


console = Console()
# For messages with paths and commands, which are copied from it: no line breaks of its own, nothing read as markup.
plain = Console(soft_wrap=True, highlight=False, markup=False)


def wide_console() -> Console:
    """A console for tables of many columns: 160 characters wide where the output is no terminal."""
    return Console() if console.is_terminal else Console(width=160)
