"""Scores and answers of two models side by side."""

from collections.abc import Sequence

from rich.table import Column, Table
from rich.text import Text

from ftcore.data.sources import Row
from ftcore.run_folder import Scores

# Score -> its name in the table and its format. A change of a share is shown as a difference, of other scores as a ratio.
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


def comparison(base: Scores, tuned: Scores, names: tuple[str, str] = ("base", "tuned")) -> Table:
    """Table of both models' scores and the change."""
    numbers = (Column(name, justify="right") for name in (*names, "change"))
    table = Table("", *numbers, title=f"{tuned['rows']} held-out rows", title_justify="left")
    for key, (label, form) in SCORES.items():
        a, b = base.get(key), tuned.get(key)
        if a is not None and b is not None:
            table.add_row(label, form.format(a), form.format(b), _change(a, b, form))
    return table


def _change(first: float, second: float, form: str) -> str:
    if form.endswith("%}"):
        return f"{second - first:+.1%}"
    return f"{second / first - 1:+.1%}" if first > 0 and second > 0 else f"{second - first:+.3f}"


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
