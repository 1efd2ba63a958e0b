"""The words of a command line: a verb, overrides, flags."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from ftcore.cli.verbs import VERBS
from ftcore.config.build import schemas
from ftcore.config.check import closest
from ftcore.config.roles import branches
from ftcore.errors import ConfigError
from ftcore.files import expanded
from ftcore.settings import FILES
from ftcore.sweeps.job import is_one_job


@dataclass
class Line:
    """A command line: verb, Hydra overrides (with `verb=`), folders of --config-dir, flags, and whether it is a sweep."""

    verb: str = "train"
    overrides: list[str] = field(default_factory=list)
    config_dirs: list[Path] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    is_sweep: bool = False


def read_line(words: list[str]) -> Line:
    """Parse a command line. Raises `ConfigError` for unknown flags, unknown words, misspelt arguments and keys given twice."""
    line, given, rest = Line(), list[str](), iter(words)
    for word in rest:
        _check_characters(word)
        verb = word.removeprefix("verb=")
        if verb in VERBS and not (verb == word and given):
            line.verb = verb
            given.append(f"verb={verb}")
        elif word.startswith("-"):
            _read_flag(line, word, rest)
        elif verb in VERBS:
            raise ConfigError(f"{verb!r} is a verb: it comes first, python -m ftcore {verb} ..., and there is one.")
        elif "=" not in verb:
            raise ConfigError(
                f"{verb!r} is neither a verb nor key=value{closest(verb, VERBS)} Verbs: {', '.join(VERBS)}."
            )
        else:
            given.append(word)
    from_file = any(word.startswith("sweeps=") for word in given) and not VERBS[line.verb].before_config
    line.is_sweep = "--multirun" in line.flags or (from_file and not is_one_job())
    line.overrides = [_override(word, line.verb, line.is_sweep) for word in given]
    _refuse_repeated(line.overrides, given)
    return line


def _check_characters(word: str) -> None:
    """Raise `ConfigError` for bytes that Python could not read: libraries fail at them, some when a run is at its end."""
    try:
        word.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise ConfigError(
            f"{word!r} holds bytes that are no text in {encoding}. Name files in UTF-8; in a locale without it, set PYTHONUTF8=1."
        ) from None


def _refuse_repeated(overrides: list[str], given: list[str]) -> None:
    """Raise `ConfigError` for a key that several words give."""
    first: dict[str, str] = {}
    for override, word in zip(overrides, given, strict=True):
        if (earlier := first.setdefault(override.partition("=")[0].lstrip("+"), word)) is not word:
            raise ConfigError(f"{earlier} and {word} are two values of one key: give one of them.")


def _read_flag(line: Line, word: str, rest: Iterator[str]) -> None:
    if word == "--config-dir" or word.startswith("--config-dir="):
        name = word.partition("=")[2] or next(rest, "")
        folder = expanded(name).resolve()
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


def _override(word: str, verb: str, several: bool) -> str:
    """A word as an override: an argument of the verb gets its node's name, text is taken as it is (`several`: in a sweep)."""
    from ftcore.config.given import as_given, quoted  # loads Hydra

    keys = schemas()["top"]["properties"]
    arguments = keys.get(verb, {}).get("properties", {})
    key, _, text = word.partition("=")
    name = key.removeprefix(f"{verb}.")
    if name not in arguments:
        meant = get_close_matches(key, [*keys, *FILES, *arguments], n=1)
        if meant and meant[0] in arguments:
            raise ConfigError(f"{verb} has no argument {key!r}; did you mean {meant[0]!r}?")
        return as_given(word, several)
    types = {branch.get("type") for branch in branches(arguments[name]) if "enum" not in branch}
    is_list = "array" in types and text.startswith("[")
    is_text = "string" in types and text != "null" and not is_list
    if several:
        return as_given(f"{verb}.{name}={text}", several)
    return f"{verb}.{name}={quoted(text) if is_text else text}"
