"""Run a command line and turn what went wrong into an exit status."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from ftcore import __version__
from ftcore.cli.verbs import VERBS
from ftcore.errors import ConfigError, FtcoreError, is_private, storage_errors, traced
from ftcore.machine import torchrun
from ftcore.settings import Config

if TYPE_CHECKING:
    from ftcore.cli.words import Line


def run_command(words: list[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        if {"-h", "--help", "help"} & set(words):
            from ftcore.cli.help import print_help

            print_help()
        elif "--version" in words:
            print(f"ftcore {__version__}")
        elif words[:1] in (["-sc"], ["--shell-completion"]):
            from ftcore.cli.completion import complete

            complete(words[1:])
        else:
            with storage_errors():
                _dispatch(words)
        return 0
    except FtcoreError as error:
        return _failed(error)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as leaving:
        return _left(leaving)
    except Exception as error:
        if not is_private():
            raise
        print(traced(error), end="", file=sys.stderr)
        return 1


def _left(leaving: SystemExit) -> int:
    if isinstance(leaving.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C during a fit into exit code 1
        return _interrupted()
    if type(leaving).__name__ == "SIGTERMException":  # Lightning's, raised at the end of a step
        print("Terminated.", file=sys.stderr)
        return 143
    raise leaving


def _failed(error: FtcoreError) -> int:
    if os.environ.get("FTCORE_DEBUG") == "1":
        print(traced(error), end="", file=sys.stderr)
    if not torchrun.rank():  # of several, the first speaks for all
        from ftcore.config.secrets import without_secrets

        print(f"{type(error).__name__}: {without_secrets(str(error))}", file=sys.stderr)
    return error.exit_code


def _interrupted() -> int:
    print("Interrupted.", file=sys.stderr)
    return 130


def _dispatch(words: list[str]) -> None:
    from ftcore.cli.words import read_line
    from ftcore.config.compose import load_config, own_arguments
    from ftcore.sweeps.job import is_one_job

    line = read_line(words)
    verb, config_dirs = VERBS[line.verb], tuple(line.config_dirs)
    if "--multirun" in line.flags or (_names_sweep(line) and not verb.before_config and not is_one_job()):
        _sweep(line)
    elif verb.before_config:
        arguments, rest = own_arguments(line.verb, line.overrides[1:])
        _answer(lambda: resolve_name(verb.target)(arguments, rest, config_dirs), arguments)
    else:
        config = load_config(line.overrides, config_dirs)
        _run(config) if "--cfg" not in line.flags else _print(config)


def _print(config: Config) -> None:
    import yaml

    print(yaml.safe_dump(dict(config), sort_keys=False), end="")


def _names_sweep(line: "Line") -> bool:
    return any(word.startswith("sweeps=") for word in line.overrides)


def _sweep(line: "Line") -> None:
    from ftcore.sweeps.sweep import sweep

    verb = VERBS[line.verb]
    if verb.row is None:
        swept = ", ".join(name for name, known in VERBS.items() if known.row is not None)
        raise ConfigError(f"{line.verb} takes one combination at a time. What -m can sweep: {swept}.")
    sweep(line.overrides, tuple(line.config_dirs), run_command, verb.row)


def _run(config: Config) -> None:
    """Do what the config's verb says."""
    from ftcore.config.check import closest
    from ftcore.config.trust import hand_down

    if config["verb"] not in VERBS:
        raise ConfigError(
            f"verb={config['verb']} is no verb{closest(config['verb'], VERBS)} Verbs: {', '.join(VERBS)}."
        )
    hand_down(config)
    arguments = config.get(config["verb"])
    _answer(lambda: resolve_name(VERBS[config["verb"]].target)(config), arguments)


def _answer(verb: Callable[[], object], arguments: object) -> None:
    """Let a verb speak to a person or, with `json=true`, print its answer as JSON and the rest on standard error."""
    from ftcore.sweeps.job import keep_answer

    if not isinstance(arguments, Mapping) or not arguments.get("json"):
        keep_answer(verb())
        return
    with redirect_stdout(sys.stderr):
        answer = verb()
    keep_answer(answer)
    print(json.dumps(answer, ensure_ascii=False, default=str))
