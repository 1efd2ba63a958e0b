"""Scores and answers of two models side by side."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ftcore.data.sources import Row
from ftcore.evaluate.score import Scores

# Score -> what it is called in the table and how it is written; `change` of a share is a difference, of others a ratio.
SCORES = {
    "loss": ("loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "accuracy": ("answer accuracy", "{:.1%}"),
    "cloze": ("cloze accuracy (1 of 4)", "{:.1%}"),
    "rewards/accuracies": ("pair accuracy", "{:.1%}"),
    "rewards/margins": ("margin of rewards", "{:.3f}"),
    "rewards/chosen": ("reward of chosen", "{:.3f}"),
    "rewards/rejected": ("reward of rejected", "{:.3f}"),
    "logps/chosen": ("log-probability of chosen", "{:.2f}"),
    "logps/rejected": ("log-probability of rejected", "{:.2f}"),
    "reward": ("reward of sampled answers", "{:.3f}"),
    "reward_std": ("its standard deviation", "{:.3f}"),
    "probe_perplexity": ("perplexity on general text", "{:.2f}"),
}
# Characters of a sample that a table shows.
SHOWN = 240
STYLES = {True: "green", False: "red", None: ""}


def side_by_side(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """Both models' answers to the same rows; where rows are private only whether they are right."""
    return [
        {"id": a["id"], **_texts(a, b), "base_right": a["right"], "tuned_right": b["right"]}
        for a, b in zip(first, second, strict=True)
    ]


def _texts(a: Row, b: Row) -> Row:
    if "answer" not in a:
        return {}
    return {"prompt": a["prompt"], "expected": a["expected"], "base": a["answer"], "tuned": b["answer"]}


def comparison(base: Scores, tuned: Scores, names: tuple[str, str] = ("base", "tuned")) -> Table:
    """Table of both models' scores and the change."""
    table = Table(title=f"{tuned['rows']} held-out rows", title_justify="left")
    for column in ("", *names, "change"):
        table.add_column(column, justify="left" if not column else "right")
    for key, (label, form) in SCORES.items():
        a, b = base.get(key), tuned.get(key)
        if a is None or b is None:
            continue
        table.add_row(label, form.format(a), form.format(b), _change(a, b, form))
    return table


def _change(first: float, second: float, form: str) -> str:
    if form.endswith("%}"):
        return f"{second - first:+.1%}"
    return f"{second / first - 1:+.1%}" if first > 0 and second > 0 else f"{second - first:+.3f}"


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows at even distances, the first among them."""
    return list(rows[:: max(len(rows) // max(count, 1), 1)][:count])


def samples_table(samples: Sequence[Row], count: int, names: tuple[str, str] = ("base", "tuned")) -> Table:
    """`count` answers side by side, spread over all rows, right ones in green."""
    if "prompt" not in samples[0]:
        return _rights_table(spread(samples, count), names)
    table = Table(show_lines=True)
    for column in ("prompt", "expected", *names):
        table.add_column(column, overflow="fold", ratio=1)
    for row in spread(samples, count):
        answers = (Text(_short(row[key]), style=STYLES[row[f"{key}_right"]]) for key in ("base", "tuned"))
        table.add_row(Text(_short(row["prompt"], end=True)), Text(_short(row["expected"])), *answers)
    return table


def _rights_table(samples: Sequence[Row], names: tuple[str, str]) -> Table:
    """Which rows were answered rightly, without their text."""
    table, words = Table("id", *names), {True: "right", False: "wrong", None: "-"}
    for row in samples:
        table.add_row(
            Text(row["id"]), *(Text(words[row[key]], style=STYLES[row[key]]) for key in ("base_right", "tuned_right"))
        )
    return table


def _short(text: str, end: bool = False) -> str:
    """The first characters of a long text, or the last ones; samples.jsonl has all of it."""
    if len(text) <= SHOWN:
        return text
    return f"... {text[-SHOWN:]}" if end else f"{text[:SHOWN]} ..."
