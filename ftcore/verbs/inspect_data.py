"""What a person wants to see of the data before spending hours of a GPU: on the terminal, and as one HTML file with plots."""

import html
import io
from collections import Counter
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ftcore.config.build import build, record_type
from ftcore.console import quiet
from ftcore.data import Data, Records
from ftcore.data.records import SPLITS
from ftcore.data.sources import Row
from ftcore.data.tokens import TEXTS, Encoder, Example, Pair, Prompt
from ftcore.errors import ConfigError
from ftcore.models.foundation import Foundation, architecture_of
from ftcore.run_folder import Run
from ftcore.settings import Config
from ftcore.train.ledger import hardest_table

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
    encoder = Encoder(_tokenizer(config), data)
    examples = _examples(encoder, records)
    page = Group(
        _overview(config, records, encoder, examples),
        *_pairs(records),
        _histogram(examples),
        *([] if config["private"] else [_samples(encoder, examples)]),
        *_hardest(config, records),
    )
    Console(highlight=False).print(page)
    file = Path(f"inspect-{config['name'].replace('/', '-')}.html")
    file.write_text(_html(config["name"], page, _sizes(examples)), encoding="utf-8")
    print(f"The same with plots: {file.resolve()}")
    return _answer(records, encoder, examples) | {"page": str(file.resolve())}


def _answer(records: Records, encoder: Encoder, examples: list[Any]) -> dict[str, object]:
    """The numbers of the page."""
    sizes = sorted(_sizes(examples))
    return {
        "type": records.type,
        "rows": {part: len(getattr(records, part)) for part in SPLITS},
        "tokens": {"median": sizes[len(sizes) // 2], "longest": sizes[-1], "all": sum(sizes)},
        "trained_share": _trained(examples),
        "too_long": dict(encoder.counts),
        "control_tokens": len(encoder.spelling_control_tokens(records.train)),
        "notes": list(records.notes),
    }


def _tokenizer(config: Config) -> Any:
    node = {**config["model"], "random_weights": True}
    with torch.device("meta"):  # a network without weights: only its tokenizer and limits are used
        return build(node, Foundation, architecture_of(config), False).tokenizer


def _examples(encoder: Encoder, records: Records) -> list[Any]:
    """Training rows as tokens; rows over the length are counted as data.too_long says, or cut where it says error."""
    if encoder.too_long == "error":
        encoder.too_long = "truncate"
    kinds: dict[str, Any] = {"text": encoder.texts, "preference": encoder.pairs, "prompt": encoder.prompts}
    examples = list(kinds.get(records.type, encoder.prompt_completions)(records.train))
    if not examples:
        raise ConfigError(
            "No training row has a token to train on: each was dropped for its length, or is cut before it."
        )
    return examples


def _overview(config: Config, records: Records, encoder: Encoder, examples: list[Any]) -> Table:
    sizes, forged = sorted(_sizes(examples)), encoder.spelling_control_tokens(records.train)
    table = Table(show_header=False, box=None, title=config["name"], title_justify="left", title_style="bold")
    table.add_row("record type", f"{records.type}, for method={config['choices']['method']}")
    table.add_row("rows", ", ".join(f"{len(getattr(records, part)):,} {part}" for part in SPLITS))
    sources = [] if config["private"] else [row["source"] for row in records.train if "source" in row]
    for source, count in Counter(sources).most_common(10):
        table.add_row("", Text(f"{count:,} train from source {source}"))
    for note in records.notes:
        table.add_row("notice", Text(note, style="yellow"))
    middle, most = sizes[len(sizes) // 2], sizes[int(0.95 * (len(sizes) - 1))]
    table.add_row("tokens a row", f"median {middle}, 95 % up to {most}, longest {sizes[-1]}; {sum(sizes):,} in all")
    table.add_row("trained", f"{_trained(examples):.1%} of the tokens")
    for reason, count in encoder.counts.items():
        table.add_row("too long", f"{count:,} {reason} (data.max_length={encoder.max_length})")
    table.add_row(
        "control tokens", f"{len(forged):,} rows hold text of a control token; it stays text{_places(forged)}"
    )
    if records.type == "unpaired":
        table.add_row("labels", f"{sum(row['label'] for row in records.train) / len(records.train):.1%} good")
    return table


def _pairs(records: Records) -> list[Table]:
    """Whether the better answer could be told by its length alone."""
    if records.type != "preference":
        return []
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in records.train]
    table = Table(show_header=False, box=None)
    longer = sum(gap > 0 for gap in gaps) / len(gaps)
    table.add_row(
        "length bias",
        f"the chosen answer is longer in {longer:.1%} of the pairs, by {np.mean(gaps):+.0f} characters on average",
    )
    return [table]


def _places(rows: list[Row]) -> str:
    return f" ({', '.join(row['where'] for row in rows[:5])}{' ...' if len(rows) > 5 else ''})" if rows else ""


def _sizes(examples: list[Any]) -> list[int]:
    return [len(example) for example in examples]


def _sides(example: Any) -> list[Any]:
    return [example.chosen, example.rejected] if isinstance(example, Pair) else [example]


def _trained(examples: list[Any]) -> float:
    sides = [side for example in examples for side in _sides(example)]
    return sum(side.trained for side in sides if isinstance(side, Example)) / sum(map(len, sides))


def _bins(sizes: list[int]) -> list[tuple[str, int]]:
    """Number of rows in each range of lengths.

    >>> _bins([3, 3, 5])
    [('3-3', 2), ('4-4', 0), ('5-5', 1)]
    """
    first = min(sizes)
    width = ceil((max(sizes) - first + 1) / BINS)
    starts = [first + k * width for k in range((max(sizes) - first) // width + 1)]
    counts = Counter((size - first) // width for size in sizes)
    return [(f"{start}-{start + width - 1}", counts[k]) for k, start in enumerate(starts)]


def _histogram(examples: list[Any]) -> Table:
    bins = _bins(_sizes(examples))
    table, most = (
        Table(box=None, show_header=False, title="tokens a row", title_justify="left"),
        max(n for _, n in bins),
    )
    for label, count in bins:
        table.add_row(label, Text("█" * round(40 * count / most), style="blue"), f"{count:,}")
    return table


def _samples(encoder: Encoder, examples: list[Any]) -> Table:
    """Three rows as the model reads them, spread over all; what carries loss is green."""
    table = Table(title="rows as the model reads them; green is trained", title_justify="left", show_lines=True)
    table.add_column("id")
    table.add_column("tokens", overflow="fold")
    for k in sorted({0, len(examples) // 2, len(examples) - 1}):
        for side in _sides(examples[k]):
            table.add_row(Text(side.id), _coloured(encoder, side))
    return table


def _hardest(config: Config, records: Records) -> list[Any]:
    """With `run=`, the rows that its ledger says were hardest."""
    if not config["run"]:
        return []
    rows = [] if config["private"] else records.train
    texts = {row["id"]: " / ".join(row[column] for column in TEXTS if column in row)[:SHOWN_CHARACTERS] for row in rows}
    return [hardest_table(Run(config["run"]), texts)]


def _coloured(encoder: Encoder, example: Any) -> Text:
    mask = [False] * len(example) if isinstance(example, Prompt) else example.completion_mask
    text, start = Text(), 0
    ids = example.input_ids[:SHOWN_TOKENS]
    for k in range(1, len(ids) + 1):  # runs of tokens together: one token alone may be half a character
        if k == len(ids) or mask[k] != mask[start]:
            text.append(str(encoder.tokenizer.decode(ids[start:k])), style="green" if mask[start] else "")
            start = k
    return text.append(" ...") if len(example) > SHOWN_TOKENS else text


def _html(name: str, page: Group, sizes: list[int]) -> str:
    console = Console(record=True, width=120, file=io.StringIO(), highlight=False)
    console.print(page)
    body = console.export_html(inline_styles=True, code_format="<pre style='font-family:monospace'>{code}</pre>")
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(name)}</title><h1>{html.escape(name)}</h1>"
        f"{_svg(_bins(sizes))}{body}"
    )


def _svg(bins: list[tuple[str, int]]) -> str:
    """Bars of a histogram."""
    width, height, most = 720, 200, max(count for _, count in bins)
    step = width / len(bins)
    bars = []
    for k, (label, count) in enumerate(bins):
        tall = height * count / most
        place = f'x="{k * step:.1f}" y="{height - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}"'
        bars.append(f'<rect {place} fill="#2563eb"><title>{label} tokens: {count:,} rows</title></rect>')
    ends = f'<text x="0" y="{height + 16}">{bins[0][0]}</text>'
    ends += f'<text x="{width}" y="{height + 16}" text-anchor="end">{bins[-1][0]}</text>'
    frame = f'<svg viewBox="0 0 {width} {height + 20}" width="{width}" font-size="12">'
    return f"<h2>Tokens a row</h2>{frame}{''.join(bars)}{ends}</svg>"
