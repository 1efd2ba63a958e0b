"""The command line: `python -m ftcore [verb] [group=option ...] [key=value ...]`.

Compose and check first; torch is imported only once nothing is wrong with the config.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from ftcore import __version__, outside
from ftcore.errors import ConfigError, FtcoreError, is_private, storage_errors, traced

SPLITS = ("train", "validation", "test")
# Where the verbs are: those that get a checked config, and those that get the words of the command line and --config-dir.
ON_CONFIG = {
    "eval": "ftcore.verbs:evaluate", "compare": "ftcore.verbs:compare", "chat": "ftcore.verbs:chat",
    "export": "ftcore.verbs:export", "inspect": "ftcore.verbs:inspect_data", "pack": "ftcore.pack:pack",
}  # fmt: skip
ON_WORDS = {
    "check": "ftcore.share:check", "replay": "ftcore.share:replay", "explain": "ftcore.explain:explain",
    "storage": "ftcore.storage:storage", "wandb_sweep": "ftcore.wandb_sweep:wandb_sweep",
}  # fmt: skip
VERBS = ("train", *ON_CONFIG, *ON_WORDS)


def main() -> None:
    """Entry point: run the command line, exit with the status of DESIGN's table."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(words: list[str], job: bool = False) -> int:
    """Run one command line, or one `job` of a sweep, and return its exit status."""
    try:
        if {"-h", "--help", "help"} & set(words):
            from ftcore.help import print_help

            print_help()
        elif "--version" in words:
            print(f"ftcore {__version__}")
        elif words[:1] in (["-sc"], ["--shell-completion"]):
            from ftcore.completion import complete

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
        from ftcore.config import without_secrets

        print(f"{type(error).__name__}: {without_secrets(str(error))}", file=sys.stderr)
    return error.exit_code


def _interrupted() -> int:
    print("Interrupted.", file=sys.stderr)
    return 130


def _dispatch(words: list[str], job: bool) -> None:
    if words and words[0] in ON_WORDS:
        overrides, config_dirs, _ = _split(words[1:])
        resolve_name(ON_WORDS[words[0]])(overrides, config_dirs)
        return
    overrides, config_dirs, flags = _split(words)
    job = job or "WANDB_SWEEP_ID" in os.environ  # W&B's agent asks for one job at a time
    if "--multirun" in flags or (any(word.startswith("sweeps=") for word in overrides) and not job):
        from ftcore.sweep import sweep

        sweep(overrides, config_dirs)
        return
    from ftcore.config import load_config

    config = load_config(overrides, config_dirs)
    if "--cfg" in flags:
        import yaml

        print(yaml.safe_dump(config, sort_keys=False), end="")
    elif config["verb"] == "train":
        train(config)
    else:
        resolve_name(ON_CONFIG[config["verb"]])(config)


def _split(words: list[str]) -> tuple[list[str], tuple[Path, ...], set[str]]:
    """Overrides (a leading verb becomes `verb=...`), folders of --config-dir, and flags."""
    overrides, config_dirs, flags = [], [], set()
    rest = iter(words)
    for k, word in enumerate(rest):
        if k == 0 and word in VERBS:
            overrides.append(f"verb={word}")
        elif word == "--config-dir" or word.startswith("--config-dir="):
            config_dirs.append(Path(word.partition("=")[2] or next(rest, "")).expanduser().resolve())
        elif word in ("--cfg", "-c"):
            next(rest, None)
            flags.add("--cfg")
        elif word in ("-m", "--multirun"):
            flags.add("--multirun")
        elif word.startswith("-"):
            raise ConfigError(f"Unknown flag {word}. Known: --help, --version, -m, --cfg job, --config-dir <folder>.")
        elif "=" not in word:
            from difflib import get_close_matches

            match = get_close_matches(word, VERBS, n=1)
            raise ConfigError(
                f"{word!r} is neither a verb nor key=value{f'; did you mean {match[0]!r}?' if match else '.'} "
                f"Verbs: {', '.join(VERBS)}."
            )
        else:
            overrides.append(_quoted(word) if word.startswith("prompt=") else word)
    return overrides, tuple(config_dirs), flags


def _quoted(word: str) -> str:
    """A question as one quoted value, whatever commas and apostrophes it holds."""
    key, _, text = word.partition("=")
    return f"{key}={json.dumps(text, ensure_ascii=False)}"


def train(config: dict[str, Any], first: Callable[[dict[str, Any], Any], None] = lambda *_: None) -> Path | None:
    """Check the machine, then run; of processes that were started from outside the first decides for all.

    `first` gets the config and the rows before anything trains. Returns the run's folder, None when there is none.
    """
    from ftcore.launcher import check, follow

    check(config["hardware"])
    if outside.rank():
        follow()
        return None
    if not (folder := _run(config, first)) and outside.started():
        outside.tell(None)
    return folder


def _run(config: dict[str, Any], first: Callable[[dict[str, Any], Any], None]) -> Path | None:
    """Check rows and weights, choose the run folder, start the processes. Returns None when there is nothing to run."""
    from ftcore.config import build, record_type
    from ftcore.hardware import micro_batch
    from ftcore.launcher import launch
    from ftcore.run_folder import held, run_folder
    from ftcore.stages import run_stages
    from ftcore.weights import check_weights

    options = build(config["hardware"])
    micro_batch(
        global_batch_size=config["global_batch_size"],
        micro_batch_size=config["micro_batch_size"],
        processes=options["devices"] * options["num_nodes"],
    )
    records = build(config["data"]).load(record_type(config["method"]))
    check_weights(config["model"])
    first(config, records)
    _make_absolute(config)
    if not run_stages(config):
        return None
    folder: Path | None = Path(os.devnull)
    if config["dry_run"]:
        launch(config, Path(os.devnull), records)
    elif not (folder := run_folder(config)):
        return None
    elif config["hardware"]["slurm"]:
        from ftcore.slurm import submit

        submit(config, folder)
    else:
        with held(folder):
            launch(config, folder, records)
    return folder


def _make_absolute(config: dict[str, Any]) -> None:
    """Local paths as they are from anywhere: the run is used from other folders later."""
    for node, key in (
        (config["data"], "path"),
        (config["data"], "cloze"),
        (config["model"], "path"),
        (config["model"], "chat_template"),
        (config["evaluate"], "probe"),
        (config["retention"], "text"),
        *((config["method"], key) for key in ("policy", "reward_model")),
        *((source, "path") for source in config["data"].get("sources", {}).values()),
        *((config["data"]["splits"], k) for k in SPLITS),
        *((files, k) for files in config["data"]["records"].values() for k in SPLITS),
    ):
        if node.get(key) and Path(node[key]).expanduser().exists():
            node[key] = str(Path(node[key]).expanduser().resolve())


if __name__ == "__main__":
    main()
