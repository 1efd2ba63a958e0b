"""Run a command line and turn what went wrong into an exit status."""

import os
import sys
from pkgutil import resolve_name

from ftcore import __version__
from ftcore.cli.verbs import ON_CONFIG, ON_WORDS
from ftcore.cli.words import split_words
from ftcore.errors import FtcoreError, is_private, storage_errors, traced
from ftcore.machine import torchrun as outside
from ftcore.runs.start import train
from ftcore.sweeps.job import is_one_job


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
    if not outside.rank():  # of several, the first speaks for all
        from ftcore.config.secrets import without_secrets

        print(f"{type(error).__name__}: {without_secrets(str(error))}", file=sys.stderr)
    return error.exit_code


def _interrupted() -> int:
    print("Interrupted.", file=sys.stderr)
    return 130


def _dispatch(words: list[str]) -> None:
    if words and words[0] in ON_WORDS:
        overrides, config_dirs, _ = split_words(words[1:])
        resolve_name(ON_WORDS[words[0]])(overrides, config_dirs)
        return
    overrides, config_dirs, flags = split_words(words)
    if "--multirun" in flags or (any(word.startswith("sweeps=") for word in overrides) and not is_one_job()):
        from ftcore.sweeps.sweep import sweep

        sweep(overrides, config_dirs, run_command)
        return
    from ftcore.config.compose import load_config

    config = load_config(overrides, config_dirs)
    if "--cfg" in flags:
        import yaml

        print(yaml.safe_dump(config, sort_keys=False), end="")
    elif config["verb"] == "train":
        train(config)
    else:
        resolve_name(ON_CONFIG[config["verb"]])(config)
