"""Run a command line and turn what went wrong into an exit status."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pkgutil import resolve_name

from ftcore import __version__
from ftcore.cli.verbs import VERBS, Verb
from ftcore.cli.words import Line, read_line
from ftcore.config.secrets import without_secrets
from ftcore.config.trust import hand_down
from ftcore.console import plain, stderr, steady_streams
from ftcore.errors import (
    ConfigError,
    DoesNotFit,
    FtcoreError,
    StorageError,
    is_private,
    paragraph,
    storage_errors,
    traced,
)
from ftcore.files import finite
from ftcore.machine import torchrun
from ftcore.sweeps.job import is_one_job, keep_answer


def run_command(words: list[str]) -> int:
    """Run one command line and return its exit status."""
    steady_streams()
    try:
        with storage_errors():
            _check_place()
            _dispatch(words)
        _check_output()
        return 0
    except FtcoreError as error:
        if os.environ.get("FTCORE_DEBUG") == "1":
            stderr.print(traced(error), end="")
        if not torchrun.rank():  # one process reports for all
            stderr.print(without_secrets(paragraph(error)))
        return error.exit_code
    except (KeyboardInterrupt, SystemExit) as leaving:
        return _status_of(leaving)
    except Exception as error:
        if not is_private():
            raise
        stderr.print(traced(error), end="")
        return 1


def _check_place() -> None:
    """Raise `StorageError` when the working directory is gone: every relative path would fail, without its name."""
    try:
        os.getcwd()
    except FileNotFoundError:
        place = os.environ.get("PWD", "it")
        raise StorageError(f"The working directory does not exist any more ({place}). Change to another.") from None


def _check_output() -> None:
    """Raise `StorageError` when standard output could not be written. That its reader has left, as `head` does, is no error."""
    if sys.stdout:  # it may be closed from the start
        sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost and not isinstance(lost, BrokenPipeError):
        raise StorageError(
            f"Standard output cannot be written: {lost.strerror}. The command has done its work; what it printed is lost. "
            "Send its output elsewhere."
        )


def _status_of(leaving: BaseException) -> int:
    """The exit status after a signal. Raises any other exit again."""
    # Lightning turns Ctrl-C during a fit into exit code 1, and SIGTERM into its SIGTERMException at the end of a step.
    interrupted = isinstance(leaving, KeyboardInterrupt) or isinstance(leaving.__context__, KeyboardInterrupt)
    if not interrupted and type(leaving).__name__ != "SIGTERMException":
        raise leaving
    stderr.print("Interrupted." if interrupted else "Terminated.")
    return 130 if interrupted else 143


def _dispatch(words: list[str]) -> None:
    if {"-h", "--help", "help"} & set(words):
        from ftcore.cli.help import print_help

        print_help()
    elif "--version" in words:
        plain.print(f"ftcore {__version__}")
    elif words[:1] in (["-sc"], ["--shell-completion"]):
        from ftcore.cli.completion import complete

        complete(words[1:])
    else:
        line = read_line(words)
        _sweep(line) if line.is_sweep else _run(line)


def _sweep(line: Line) -> None:
    from ftcore.sweeps.sweep import sweep

    row = VERBS[line.verb].row
    if row is None:
        swept = ", ".join(name for name, verb in VERBS.items() if verb.row is not None)
        raise ConfigError(f"{line.verb} takes one combination at a time. What -m can sweep: {swept}.")
    page = resolve_name("ftcore.ui.report:of_sweep")
    sweep(line.overrides, tuple(line.config_dirs), run_command, row, page)


def _run(line: Line) -> None:
    """Call the verb or, with `--cfg`, print the config."""
    from ftcore.config.compose import load_config, own_arguments

    verb, config_dirs = VERBS[line.verb], tuple(line.config_dirs)
    if verb.before_config:
        arguments, words = own_arguments(line.verb, [word for word in line.overrides if word != f"verb={line.verb}"])
        _call(verb, (arguments, words, config_dirs), arguments)
        return
    config = load_config(line.overrides, config_dirs)
    if "--cfg" in line.flags:
        import yaml

        plain.print(yaml.safe_dump(dict(config), sort_keys=False), end="")
        return
    hand_down(config)
    _call(verb, (config,), config.get(line.verb))
    if line.verb == "train" and config["dry_run"] and not torchrun.rank():
        from ftcore.plan.verb import show

        show(config)


def _call(verb: Verb, parameters: tuple[object, ...], arguments: object) -> None:
    """Call a verb. With `json=true` print its answer as JSON, and what it prints itself on standard error."""
    as_json = isinstance(arguments, Mapping) and arguments.get("json")
    failure: DoesNotFit | None = None
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        try:
            answer = resolve_name(verb.target)(*parameters)
            if verb.page and answer and (page := resolve_name(verb.page)(answer)):
                plain.print(f"The same to look at: {page}")
        except DoesNotFit as error:
            answer, failure = error.answer, error
    keep_answer(answer)
    if as_json:
        plain.print(json.dumps(finite(answer), default=str))  # in ASCII: no stream changes it
    if failure and not is_one_job():  # in the table of a sweep it is a row like the others
        raise failure
