"""What a person wants to see of the data before spending hours of a GPU: on the terminal, and as one HTML file with plots."""

import html
import io
from collections import Counter
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from ftcore.config.build import build, record_type
from ftcore.console import Console, plain, printable, quiet
from ftcore.data import Data, Records
from ftcore.data.examples import Example, Pair, Prompt
from ftcore.data.records import SPLITS
from ftcore.data.tokens import TEXTS, Encoder
from ftcore.errors import DataError
from ftcore.files import write_text
from ftcore.models.foundation import Foundation, architecture_of
from ftcore.run_folder import Run
from ftcore.settings import Config
from ftcore.train.ledger import hardest_table

Tokens = list[Example | Pair | Prompt]  # a method's kind of tokenised rows
BINS = 20
SHOWN_TOKENS = 300
SHOWN_CHARACTERS = 200


def inspect(config: Config) -> dict[str, object]:
    """Read all rows as a run of this config would, and print what they are like. Nothing is trained, no weights are loaded.

    With `run=`, also its ledger's rows of the highest loss. Writes inspect-<name>.html into the working directory. Wrong and
    leaked rows are listed instead of refused.
    """
    quiet()
    data = replace(build(config["data"], Data), leakage="allow", on_bad_row="skip", max_bad_rows=10**9)
    records = data.load(record_type(config["method"]))
    with torch.device("meta"):  # a network without weights: only its tokenizer and limits are used
        node = {**config["model"], "random_weights": True}
        encoder = Encoder(build(node, Foundation, architecture_of(config), False).tokenizer, data)
    encoder.check_template(records.train)
    rows = _tokens(encoder, records)
    bins, parts = _bins([len(row) for row in rows]), [_overview(config, records, encoder, rows)]
    parts += [_histogram(bins)] + ([] if config["private"] else [_samples(encoder, rows)])
    if config["run"]:
        parts.append(hardest_table(Run(config["run"]), {} if config["private"] else _texts(records)))
    Console(highlight=False).print(page := Group(*parts))
    file = Path(f"inspect-{config['name'].replace('/', '-')}.html").resolve()
    write_text(file, _html(config["name"], page, bins))
    plain.print(f"The same with plots: {file}")
    return _answer(records, encoder, rows) | {"page": str(file)}


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


def _overview(config: Config, records: Records, encoder: Encoder, rows: Tokens) -> Table:
    sizes, forged = sorted(map(len, rows)), encoder.spelling_control_tokens(records.train)
    table = Table(show_header=False, box=None, title=config["name"], title_justify="left", title_style="bold")
    table.add_row("record type", f"{records.type}, for method={config['choices']['method']}")
    table.add_row("rows", ", ".join(f"{len(getattr(records, part)):,} {part}" for part in SPLITS))
    sources = [] if config["private"] else [row["source"] for row in records.train if "source" in row]
    for source, count in Counter(sources).most_common(10):
        table.add_row("", Text(f"{count:,} train from source {source}"))
    for note in [*records.notes, *encoder.notes()]:
        table.add_row("notice", Text(note, style="yellow"))
    middle, most = sizes[len(sizes) // 2], sizes[int(0.95 * (len(sizes) - 1))]
    table.add_row("tokens a row", f"median {middle}, 95 % up to {most}, longest {sizes[-1]}; {sum(sizes):,} in all")
    table.add_row("trained", f"{_trained_share(rows):.1%} of the tokens")
    for reason, count in encoder.counts.items():
        refused = "; a run refuses such rows: data.too_long=error" if encoder.data.too_long == "error" else ""
        table.add_row("too long", f"{count:,} {reason} ({encoder.limit}{refused})")
    places = ", ".join(row["where"] for row in forged[:5]) + " ..." * (len(forged) > 5)
    spelt = f"{len(forged):,} rows hold text of a control token; it stays text" + f" ({places})" * bool(forged)
    table.add_row("control tokens", Text(spelt))
    if records.type == "unpaired":
        table.add_row("labels", f"{sum(row['label'] for row in records.train) / len(records.train):.1%} good")
    if records.type == "preference":  # could the better answer be told by its length alone?
        gaps = [len(row["chosen"]) - len(row["rejected"]) for row in records.train]
        longer, mean = sum(gap > 0 for gap in gaps) / len(gaps), sum(gaps) / len(gaps)
        told = f"the chosen answer is longer in {longer:.1%} of the pairs, by {mean:+.0f} characters on average"
        table.add_row("length bias", told)
    return table


def _sides(row: Example | Pair | Prompt) -> list[Example | Prompt]:
    return [row.chosen, row.rejected] if isinstance(row, Pair) else [row]


def _trained_share(rows: Tokens) -> float:
    sides = [side for row in rows for side in _sides(row)]
    return sum(side.trained for side in sides if isinstance(side, Example)) / sum(map(len, sides))


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


def _samples(encoder: Encoder, rows: Tokens) -> Table:
    """Three rows as the model reads them, spread over all; what carries loss is green."""
    title = "rows as the model reads them; green is trained"
    columns = (Column(name, overflow="fold") for name in ("id", "tokens"))
    table = Table(*columns, title=title, title_justify="left", show_lines=True)
    for k in sorted({0, len(rows) // 2, len(rows) - 1}):
        names = ("\nchosen", "\nrejected") if isinstance(rows[k], Pair) else ("",)
        for name, side in zip(names, _sides(rows[k]), strict=True):
            table.add_row(Text(side.id + name), _coloured(encoder, side))
    return table


def _texts(records: Records) -> dict[str, str]:
    """Id -> beginning of the text of each training row."""
    columns = {row["id"]: [row[column] for column in TEXTS if column in row] for row in records.train}
    return {id: " / ".join(texts)[:SHOWN_CHARACTERS] for id, texts in columns.items()}


def _coloured(encoder: Encoder, side: Example | Prompt) -> Text:
    """The beginning of a row, and the tokens around the first with loss where that comes later."""
    mask, text = side.completion_mask if isinstance(side, Example) else [False] * len(side), Text()
    first, half = mask.index(True) if any(mask) else 0, SHOWN_TOKENS // 2
    parts = [(0, SHOWN_TOKENS)] if first < half else [(0, half // 2), (first - half // 2, first + half)]
    for begin, end in parts:
        text.append("" if begin == 0 else " ... ")
        start = begin
        for k in range(begin + 1, min(end, len(side)) + 1):  # runs together: one token alone may be half a character
            if k == min(end, len(side)) or mask[k] != mask[start]:
                text.append(
                    str(encoder.tokenizer.decode(side.input_ids[start:k])), style="green" if mask[start] else ""
                )
                start = k
    return text.append(" ...") if len(side) > end else text


def _html(name: str, page: Group, bins: list[tuple[str, int]]) -> str:
    console = Console(record=True, width=120, file=io.StringIO(), highlight=False)
    console.print(page)
    body = console.export_html(inline_styles=True, code_format="<pre style='font-family:monospace'>{code}</pre>")
    title = html.escape(printable(name))
    return f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1>{_svg(bins)}{body}"


def _svg(bins: list[tuple[str, int]]) -> str:
    """Bars of a histogram."""
    width, height, most = 720, 200, max(count for _, count in bins)
    step = width / len(bins)
    bars = ""
    for k, (label, count) in enumerate(bins):
        tall = height * count / most
        place = f'x="{k * step:.1f}" y="{height - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}"'
        bars += f'<rect {place} fill="#2563eb"><title>{label} tokens: {count:,} rows</title></rect>'
    bars += f'<text x="0" y="{height + 16}">{bins[0][0]}</text>'
    bars += f'<text x="{width}" y="{height + 16}" text-anchor="end">{bins[-1][0]}</text>'
    frame = f'<svg viewBox="0 0 {width} {height + 20}" width="{width}" font-size="12">'
    return f"<h2>Tokens a row</h2>{frame}{bars}</svg>"
