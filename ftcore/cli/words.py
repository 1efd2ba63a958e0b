"""The words of a command line: a verb, overrides, flags."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from ftcore.cli.verbs import VERBS
from ftcore.config.build import schemas
from ftcore.config.check import closest
from ftcore.config.roles import branches
from ftcore.errors import ConfigError
from ftcore.settings import FILES


@dataclass
class Line:
    """A command line: verb, Hydra overrides (with `verb=`), folders of --config-dir, and flags."""

    verb: str = "train"
    overrides: list[str] = field(default_factory=list)
    config_dirs: list[Path] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)


def read_line(words: list[str]) -> Line:
    """Parse a command line. Raises `ConfigError` for unknown flags, unknown words and misspelt arguments of the verb."""
    line, rest = Line(), iter(words)
    for word in rest:
        verb = word.removeprefix("verb=")
        if verb in VERBS and not (verb == word and line.overrides):
            line.verb = verb
            line.overrides.append(f"verb={verb}")
        elif word.startswith("-"):
            _read_flag(line, word, rest)
        elif "=" not in verb:
            raise ConfigError(
                f"{verb!r} is neither a verb nor key=value{closest(verb, VERBS)} Verbs: {', '.join(VERBS)}."
            )
        else:
            line.overrides.append(_override(word, line.verb))
    return line


def _read_flag(line: Line, word: str, rest: Iterator[str]) -> None:
    if word == "--config-dir" or word.startswith("--config-dir="):
        name = word.partition("=")[2] or next(rest, "")
        folder = Path(name).expanduser().resolve()
        if not name or not folder.is_dir():
            raise ConfigError(f"--config-dir={name} is not a folder (seen from {Path.cwd()}).")
        line.config_dirs.append(folder)
    elif word in ("--cfg", "-c"):
        next(rest, None)
        line.flags.add("--cfg")
    elif word in ("-m", "--multirun"):
        line.flags.add("--multirun")
    else:
        raise ConfigError(f"Unknown flag {word}. Known: --help, --version, -m, --cfg job, --config-dir <folder>.")


def _override(word: str, verb: str) -> str:
    """A word as an override. An argument of the verb gets the name of its node, and text is quoted, as it may hold commas."""
    keys = schemas()["top"]["properties"]
    arguments = keys.get(verb, {}).get("properties", {})
    key, _, text = word.partition("=")
    name = key.removeprefix(f"{verb}.")
    if name not in arguments:
        meant = get_close_matches(key, [*keys, *FILES, *arguments], n=1)
        if meant and meant[0] in arguments:
            raise ConfigError(f"{verb} has no argument {key!r}; did you mean {meant[0]!r}?")
        return word
    types = {branch.get("type") for branch in branches(arguments[name]) if "enum" not in branch}
    is_list = "array" in types and text.startswith("[")
    is_text = "string" in types and text != "null" and not is_list
    return f"{verb}.{name}={json.dumps(text, ensure_ascii=False) if is_text else text}"
