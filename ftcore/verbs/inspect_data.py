"""What a person wants to see of the data before spending hours of a GPU."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from ftcore.config.build import build, record_type
from ftcore.console import Console, quiet
from ftcore.data import Data, Records
from ftcore.data.examples import Example, Pair, Prompt
from ftcore.data.records import SPLITS
from ftcore.data.shown import Shown, as_read, sides
from ftcore.data.tokens import TEXTS, Encoder
from ftcore.errors import DataError
from ftcore.models.foundation import Foundation, architecture_of
from ftcore.run_folder import Run
from ftcore.settings import Config
from ftcore.train.ledger import SHOWN, hardest, hardest_table

Tokens = list[Example | Pair | Prompt]  # a method's kind of tokenised rows
BINS = 20
SHOWN_CHARACTERS = 200


def inspect(config: Config) -> dict[str, object]:
    """Read all rows as a run of this config would, and print what they are like. Nothing is trained, no weights are loaded.

    With `run=`, also its ledger's rows of the highest loss. Wrong and leaked rows are listed instead of refused.
    """
    quiet()
    data = replace(build(config["data"], Data), leakage="allow", on_bad_row="skip", max_bad_rows=10**9)
    records = data.load(record_type(config["method"]))
    with torch.device("meta"):  # a network without weights: only its tokenizer and limits are used
        node = {**config["model"], "random_weights": True}
        encoder = Encoder(build(node, Foundation, architecture_of(config), False).tokenizer, data)
    encoder.check_template(records.train)
    rows = _tokens(encoder, records)
    page = _page(config, records, encoder, rows)
    shown = [_table(config["name"], page["overview"]), _histogram(page["bins"])]
    shown += [] if config["private"] else [_samples(page["samples"])]
    shown += [hardest_table(page["hardest"])] if page["hardest"] else []
    Console(highlight=False).print(Group(*shown))
    return _answer(records, encoder, rows) | page


def _page(config: Config, records: Records, encoder: Encoder, rows: Tokens) -> dict[str, Any]:
    """What is shown; of private rows no text."""
    texts = {} if config["private"] else _texts(records)
    hard = hardest(Run(config["run"]), SHOWN) if config["run"] and Run(config["run"]).ledger.is_file() else []
    return {
        "name": config["name"],
        "bins": _bins([len(row) for row in rows]),
        "overview": _overview(config, records, encoder, rows),
        "samples": as_read(encoder.tokenizer, _spread(rows)),
        "hardest": [{**row, "text": texts.get(str(row["id"]), "")} for row in hard],
    }


def _answer(records: Records, encoder: Encoder, rows: Tokens) -> dict[str, object]:
    """The numbers of the page."""
    sizes = sorted(map(len, rows))
    return {
        "type": records.type,
        "rows": {part: len(getattr(records, part)) for part in SPLITS},
        "tokens": {"median": sizes[len(sizes) // 2], "longest": sizes[-1], "all": sum(sizes)},
        "trained_share": _trained_share(rows),
        "too_long": dict(encoder.counts),
        "control_tokens": len(encoder.spelling_control_tokens(records.train)),
        "notes": [*records.notes, *encoder.notes()],
    }


def _tokens(encoder: Encoder, records: Records) -> Tokens:
    """Training rows as tokens; rows over the length are counted as data.too_long says, or cut where it says error."""
    if encoder.too_long == "error":
        encoder.too_long = "truncate"
    kinds: dict[str, Any] = {"text": encoder.texts, "preference": encoder.pairs, "prompt": encoder.prompts}
    rows: Tokens = list(kinds.get(records.type, encoder.prompt_completions)(records.train))
    if not rows:
        encoder.check_lost(len(records.train))
        raise DataError(
            f"No training row has a token to train on: each is dropped for its length or cut before it ({encoder.limit}). "
            f"{encoder.more_room}."
        )
    return rows


def _table(name: str, lines: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, title=name, title_justify="left", title_style="bold")
    for title, text in lines:
        table.add_row(title, Text(text, style="yellow" if title == "notice" else ""))
    return table


def _overview(config: Config, records: Records, encoder: Encoder, rows: Tokens) -> list[tuple[str, str]]:
    """What the rows are like, line by line."""
    sizes, counts = sorted(map(len, rows)), ", ".join(f"{len(getattr(records, part)):,} {part}" for part in SPLITS)
    lines = [("record type", f"{records.type}, for method={config['choices']['method']}"), ("rows", counts)]
    sources = [] if config["private"] else [row["source"] for row in records.train if "source" in row]
    lines += [("", f"{count:,} train from source {source}") for source, count in Counter(sources).most_common(10)]
    lines += [("notice", note) for note in [*records.notes, *encoder.notes()]]
    middle, most = sizes[len(sizes) // 2], sizes[int(0.95 * (len(sizes) - 1))]
    lines.append(("tokens a row", f"median {middle}, 95 % up to {most}, longest {sizes[-1]}; {sum(sizes):,} in all"))
    lines.append(("trained", f"{_trained_share(rows):.1%} of the tokens"))
    refused = "; a run refuses such rows: data.too_long=error" if encoder.data.too_long == "error" else ""
    lines += [("too long", f"{n:,} {reason} ({encoder.limit}{refused})") for reason, n in encoder.counts.items()]
    if config["run"] and not Run(config["run"]).ledger.is_file():
        lines.append(("ledger", "the run kept none: with ledger=true its hardest rows are shown"))
    return [*lines, *_of_type(records, encoder)]


def _of_type(records: Records, encoder: Encoder) -> Iterator[tuple[str, str]]:
    """Lines on control tokens, and on what only labels or pairs have."""
    forged, train = encoder.spelling_control_tokens(records.train), records.train
    places = ", ".join(row["where"] for row in forged[:5]) + " ..." * (len(forged) > 5)
    spelt = f"{len(forged):,} rows hold text of a control token; it stays text" + f" ({places})" * bool(forged)
    yield "control tokens", spelt
    if records.type == "unpaired":
        yield "labels", f"{sum(row['label'] for row in train) / len(train):.1%} good"
    if records.type == "preference":  # could the better answer be told by its length alone?
        gaps = [len(row["chosen"]) - len(row["rejected"]) for row in train]
        longer, mean = sum(gap > 0 for gap in gaps) / len(gaps), sum(gaps) / len(gaps)
        told = f"the chosen answer is longer in {longer:.1%} of the pairs, by {mean:+.0f} characters on average"
        yield "length bias", told


def _trained_share(rows: Tokens) -> float:
    all_sides = [side for row in rows for _, side in sides(row)]
    return sum(side.trained for side in all_sides if isinstance(side, Example)) / sum(map(len, all_sides))


def _bins(sizes: list[int]) -> list[tuple[str, int]]:
    """Number of rows in each range of lengths.

    >>> _bins([3, 3, 5])
    [('3-3', 2), ('4-4', 0), ('5-5', 1)]
    """
    first = min(sizes)
    width = ceil((max(sizes) - first + 1) / BINS)
    counts = Counter((size - first) // width for size in sizes)
    return [(f"{first + k * width}-{first + (k + 1) * width - 1}", counts[k]) for k in range(max(counts) + 1)]


def _histogram(bins: list[tuple[str, int]]) -> Table:
    table = Table(box=None, show_header=False, title="tokens a row", title_justify="left")
    most = max(count for _, count in bins)
    for label, count in bins:
        table.add_row(label, Text("█" * round(40 * count / most), style="blue"), f"{count:,}")
    return table


def _samples(rows: list[Shown]) -> Table:
    """Rows as the model reads them; what carries loss is green."""
    title = "rows as the model reads them; green is trained"
    columns = (Column(name, overflow="fold") for name in ("id", "tokens"))
    table = Table(*columns, title=title, title_justify="left", show_lines=True)
    for row in rows:
        text = Text.assemble(*((part.text, "green" if part.trained else "") for part in row["parts"]))
        table.add_row(Text(f"{row['id']}\n{row['side']}".strip()), text)
    return table


def _spread(rows: Tokens) -> Tokens:
    """The first, the middle and the last row."""
    return [rows[k] for k in sorted({0, len(rows) // 2, len(rows) - 1})]


def _texts(records: Records) -> dict[str, str]:
    """Id -> beginning of the text of each training row."""
    columns = {row["id"]: [row[column] for column in TEXTS if column in row] for row in records.train}
    return {id: " / ".join(texts)[:SHOWN_CHARACTERS] for id, texts in columns.items()}
