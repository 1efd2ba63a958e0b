"""The words of a command line: a verb, overrides, flags."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from ftcore.cli.verbs import VERBS
from ftcore.config.build import schemas
from ftcore.config.roles import branches
from ftcore.errors import ConfigError


@dataclass
class Line:
    """A command line: its verb, Hydra overrides, folders of --config-dir, and flags."""

    verb: str = "train"
    overrides: list[str] = field(default_factory=list)
    config_dirs: list[Path] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)


def read_line(words: list[str]) -> Line:
    """Take a command line apart. Raises `ConfigError` for a word that is neither verb, flag nor `key=value`."""
    line, rest, arguments = Line(), iter(words), dict[str, set[str]]()
    for word in rest:
        if word in VERBS and not line.overrides:
            line.verb, arguments = word, _arguments(word)
            line.overrides.append(f"verb={word}")
        elif word.startswith("-"):
            _read_flag(line, word, rest)
        elif "=" not in word:
            raise ConfigError(f"{word!r} is neither a verb nor key=value{_meant(word)} Verbs: {', '.join(VERBS)}.")
        else:
            line.overrides.append(_override(word, line.verb, arguments))
    return line


def _read_flag(line: Line, word: str, rest: Iterator[str]) -> None:
    if word == "--config-dir" or word.startswith("--config-dir="):
        line.config_dirs.append(Path(word.partition("=")[2] or next(rest, "")).expanduser().resolve())
    elif word in ("--cfg", "-c"):
        next(rest, None)
        line.flags.add("--cfg")
    elif word in ("-m", "--multirun"):
        line.flags.add("--multirun")
    else:
        raise ConfigError(f"Unknown flag {word}. Known: --help, --version, -m, --cfg job, --config-dir <folder>.")


def _meant(word: str) -> str:
    match = get_close_matches(word, VERBS, n=1)
    return f"; did you mean {match[0]!r}?" if match else "."


def _arguments(verb: str) -> dict[str, set[str]]:
    """The verb's own keys, and the types that each may have."""
    keys = schemas()["top"]["properties"].get(verb, {}).get("properties", {})
    return {
        key: {kind.get("type", "") for kind in branches(schema) if "enum" not in kind} for key, schema in keys.items()
    }


def _override(word: str, verb: str, arguments: dict[str, set[str]]) -> str:
    """A word as an override: an argument of the verb gets the name of its node, and text is quoted, commas and all."""
    key, _, text = word.partition("=")
    name = key.removeprefix(f"{verb}.")
    if name not in arguments:
        return word
    is_list = "array" in arguments[name] and text.startswith("[")
    as_it_is = "string" in arguments[name] and text != "null" and not is_list
    return f"{verb}.{name}={json.dumps(text, ensure_ascii=False) if as_it_is else text}"
