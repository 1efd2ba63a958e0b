"""Run a command line and turn what went wrong into an exit status."""

import os
import sys
from pathlib import Path
from pkgutil import resolve_name

from ftcore import __version__
from ftcore.cli.verbs import ON_CONFIG, ON_WORDS
from ftcore.cli.words import split_words
from ftcore.errors import FtcoreError, is_private, storage_errors, traced
from ftcore.machine import torchrun as outside
from ftcore.runs.start import train


def run_command(words: list[str], job: bool = False) -> int:
    """Run one command line, or one `job` of a sweep, and return its exit status."""
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
                _dispatch(words, job)
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


def _dispatch(words: list[str], job: bool) -> None:
    if words and words[0] in ON_WORDS:
        overrides, config_dirs, _ = split_words(words[1:])
        resolve_name(ON_WORDS[words[0]])(overrides, config_dirs)
        return
    overrides, config_dirs, flags = split_words(words)
    job = job or "WANDB_SWEEP_ID" in os.environ  # W&B's agent asks for one job at a time
    if "--multirun" in flags or (any(word.startswith("sweeps=") for word in overrides) and not job):
        from ftcore.sweeps.sweep import sweep

        sweep(overrides, config_dirs)
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


def run_job(words: list[str], log: Path) -> int:
    """Run a job in this process, what it prints in a file; its exit status."""
    from ftcore.cli.command import run_command

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    return run_command(words, job=True)
