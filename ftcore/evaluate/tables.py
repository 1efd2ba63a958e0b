"""Scores and answers of two models side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Column, Table
from rich.text import Text

from ftcore.data.sources import Row
from ftcore.evaluate.intervals import Better, Interval, interval
from ftcore.run_folder import RowScores, Scores


class Style(NamedTuple):
    """A score's name in the table, its format, and which way it gets better (None: neither).

    A change is shown as a difference, or `relative` to the first model, where its interval is that of a ratio.
    """

    label: str
    form: str
    better: Better | None
    relative: bool = False


SCORES = {
    "loss": Style("loss", "{:.3f}", "lower"),
    "perplexity": Style("perplexity", "{:.2f}", "lower", relative=True),
    "accuracy": Style("answer accuracy", "{:.1%}", "higher"),
    "cloze": Style("cloze accuracy (1 of 4)", "{:.1%}", "higher"),
    "rewards/accuracies": Style("pair accuracy", "{:.1%}", "higher"),
    "rewards/margins": Style("margin of rewards", "{:.3f}", "higher"),
    "rewards/chosen": Style("reward of chosen", "{:.3f}", "higher"),
    "rewards/rejected": Style("reward of rejected", "{:.3f}", "lower"),
    "logps/chosen": Style("log-probability of chosen", "{:.2f}", "higher"),
    "logps/rejected": Style("log-probability of rejected", "{:.2f}", "lower"),
    "reward": Style("reward of sampled answers", "{:.3f}", "higher"),
    "reward_std": Style("its standard deviation", "{:.3f}", None),
    "probe_perplexity": Style("perplexity on general text", "{:.2f}", "lower", relative=True),
}
# Characters of a text that a table shows.
SHOWN = 240
# Whether an answer is right -> the word and style for it.
VERDICTS = {True: ("right", "green"), False: ("wrong", "red"), None: ("-", "")}


def side_by_side(base: Sequence[Row], tuned: Sequence[Row]) -> list[Row]:
    """Both models' answers to the same rows; of private rows only whether they are right."""
    rows = []
    for a, b in zip(base, tuned, strict=True):
        shown: Row = {key: a[key] for key in ("id", "prompt", "expected") if key in a}
        texts = {"base": a["answer"], "tuned": b["answer"]} if "answer" in a else {}
        rows.append({**shown, **texts, "base_right": a["right"], "tuned_right": b["right"]})
    return rows


def intervals(base: RowScores, tuned: RowScores) -> dict[str, Interval]:
    """The difference of each score that the table shows and that both have on the same rows."""
    both = {key: style.better for key, style in SCORES.items() if style.better and key in base and key in tuned}
    found = {key: interval([base[key]], [tuned[key]], better) for key, better in both.items()}
    return {key: one for key, one in found.items() if one}


def comparison(
    base: Scores, tuned: Scores, differences: Mapping[str, Interval], names: tuple[str, str] = ("base", "tuned")
) -> Table:
    """Table of both models' scores, the change with its 95 % interval, and whether the tuned model is better."""
    models = (Column(name, justify="right", overflow="fold") for name in names)
    change = Column("change (95 % interval)", justify="right", no_wrap=True)
    table = Table("", *models, change, "verdict", title=f"{tuned['rows']} held-out rows", title_justify="left")
    for key, style in SCORES.items():
        a, b, found = base.get(key), tuned.get(key), differences.get(key)
        if a is not None and b is not None:
            shown = (style.form.format(score) for score in (a, b))
            table.add_row(style.label, *shown, change_text(key, a, b, found), verdict(found))
    if any(one["rows_needed"] for one in differences.values()):
        table.caption = "(~n): about so many rows would decide a difference of this size"
    return table


def change_text(key: str, first: float, second: float, found: Interval | None) -> str:
    """The change of a score, and its interval to about two digits of its width."""
    style = SCORES[key]
    is_share = style.form.endswith("%}")
    unit, sign, usual = (0.01, "%", 1) if is_share else (first / 100, "%", 1) if style.relative else (1.0, "", 3)
    if not found:
        return f"{(second - first) / unit:+.{usual}f}{sign}"
    low, high = found["low"] / unit, found["high"] / unit
    places = min(max(math.ceil(1 - math.log10(max(high - low, 1e-4))), 0), 4)
    return f"{(second - first) / unit:+.{max(places, usual)}f}{sign} ({low:+.{places}f} to {high:+.{places}f})"


def verdict(found: Interval | None) -> str:
    """What an interval means, and about how many rows would decide."""
    if not found:
        return ""
    needed = found["rows_needed"]
    return f"{found['verdict']} (~{needed:,})" if needed else found["verdict"]


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows, evenly spaced from the first on."""
    return list(rows[:: max(len(rows) // max(count, 1), 1)][:count])


def samples_table(samples: Sequence[Row], count: int, names: tuple[str, str] = ("base", "tuned")) -> Table:
    """`count` answers side by side, spread over all rows, right ones in green. Private rows show their ids and no text."""
    shown = ("prompt", "expected") if "prompt" in samples[0] else ("id",)
    columns = (Column(name, overflow="fold", ratio=1) for name in (*shown, *names))
    table = Table(*columns, show_lines="prompt" in shown)
    for row in spread(samples, count):
        cells = [Text(_short(row[key], end=key == "prompt")) for key in shown]
        for model in ("base", "tuned"):
            word, style = VERDICTS[row[f"{model}_right"]]
            cells.append(Text(_short(row.get(model, word)), style=style))
        table.add_row(*cells)
    return table


def _short(text: str, end: bool = False) -> str:
    """The beginning of a long text, or its end; samples.jsonl has all of it."""
    if len(text) <= SHOWN:
        return text
    return f"... {text[-SHOWN:]}" if end else f"{text[:SHOWN]} ..."
