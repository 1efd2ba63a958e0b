"""The words of a command line: a verb, overrides, flags."""

import json
from pathlib import Path

from ftcore.cli.verbs import VERBS
from ftcore.errors import ConfigError


def split_words(words: list[str]) -> tuple[list[str], tuple[Path, ...], set[str]]:
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
