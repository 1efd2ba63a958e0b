"""The measures of a run over its steps, from metrics.jsonl, also while it grows."""

from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson


class Series:
    """metrics.jsonl as columns; what is appended is read alone."""

    def __init__(self, file: Path) -> None:
        self.file, self.read = file, 0
        self.columns = defaultdict[str, tuple[list[float], list[float]]](lambda: ([], []))

    def update(self) -> None:
        """Read the whole lines that are new."""
        if not self.file.is_file():
            return
        if self.file.stat().st_size < self.read:  # a resumed run has cut it
            self.read, self.columns = 0, defaultdict(lambda: ([], []))
        with self.file.open("rb") as stream:
            stream.seek(self.read)
            content = stream.read()
        content = content[: content.rfind(b"\n") + 1]
        self.read += len(content)
        for line in content.splitlines():
            row = _json(line)
            step = row.pop("step", None)
            for key, value in row.items() if isinstance(step, int | float) else ():
                if isinstance(value, int | float):
                    steps, values = self.columns[key]
                    steps.append(step)
                    values.append(value)

    def last(self, key: str) -> float | None:
        """The last value of a measure."""
        values = self.columns[key][1] if key in self.columns else []
        return values[-1] if values else None

    def seconds_a_step(self) -> float | None:
        """Mean of the last twenty steps, from their tokens and tokens per second."""
        tokens, speeds = self.columns["train/tokens"][1][-21:], self.columns["train/tokens_per_second"][1][-20:]
        taken = [
            (b - a) / speed
            for a, b, speed in zip(tokens, tokens[1:], speeds[-(len(tokens) - 1) :], strict=False)
            if speed
        ]
        return sum(taken) / len(taken) if taken else None


def _json(line: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


@lru_cache(maxsize=32)
def series(file: Path) -> Series:
    """The measures of a run, read as far as they were."""
    return Series(file)
