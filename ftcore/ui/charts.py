"""Charts as SVG, drawn here so that a page needs no script and no other host. Colours and sizes of text are in style.css."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from ftcore.console import printable

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24
BUCKETS = 200  # of a thinned line: each keeps its lowest and its highest point
Line = tuple[Sequence[float] | NDArray[np.float64], Sequence[float] | NDArray[np.float64]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` or one more (Heckbert 1990, "Nice numbers for graph labels").

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(nice for nice in (1, 2, 5, 10) if nice * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(line: Line) -> Line:
    """The line with at most two points in each of `BUCKETS` stretches, the lowest and the highest, in their order."""
    xs, ys = (np.asarray(axis, dtype=float) for axis in line)
    if len(xs) <= 2 * BUCKETS:
        return xs, ys
    ends = np.linspace(0, len(xs), BUCKETS + 1).astype(int)
    kept = {a + find(ys[a:b]) for a, b in pairwise(ends) for find in (np.argmin, np.argmax)} | {len(xs) - 1}
    order = np.array(sorted(kept))
    return xs[order], ys[order]


def lines(title: str, named: Mapping[str, Line]) -> Markup:
    """Lines over steps, each with its last value in the legend."""
    shown = {name: finite for name, line in named.items() if len((finite := _finite(line))[0])}
    if not shown:
        return Markup("")
    xs, ys = (np.concatenate([line[axis] for line in shown.values()]) for axis in (0, 1))
    scale = Scale(xs.min(), xs.max(), *_padded(ys.min(), ys.max()))
    body = scale.axes()
    for k, line in enumerate(shown.values()):
        points = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in zip(*thinned(line), strict=True))
        dot = f'<circle class="c{k}" cx="{points.split(",")[0]}" cy="{points.split(",")[1]}" r="3"/>'
        body += Markup(f'<polyline class="c{k}" points="{points}"/>' if " " in points else dot)
    legend = [(name, number(line[1][-1])) for name, line in shown.items()]
    return _figure(title, body, legend)


def bars(title: str, counts: Sequence[tuple[str, int]]) -> Markup:
    """A bar for each label, the labels of the first and the last below."""
    scale = Scale(0, len(counts), 0, max(count for _, count in counts) or 1)
    body = scale.axes(x=False)
    for k, (label, count) in enumerate(counts):
        left, top = scale.x(k), scale.y(count)
        size = f'width="{scale.x(k + 1) - left - 1:.1f}" height="{scale.y(0) - top:.1f}"'
        body += Markup('<rect class="c0" x="{:.1f}" y="{:.1f}" {}><title>{}: {:,}</title></rect>').format(
            left, top, Markup(size), printable(label), count
        )
    body += _text(LEFT, HEIGHT - 6, counts[0][0], "start") + _text(WIDTH - RIGHT, HEIGHT - 6, counts[-1][0], "end")
    return _figure(title, body, [])


def dots(title: str, points: Sequence[tuple[str, float, str]]) -> Markup:
    """A dot for each (word or number, value, name); words stand at even distances, small positive numbers on a log axis."""
    numbers = [_number(word) for word, _, _ in points]
    known = [x for x in numbers if x is not None]
    names = [] if len(known) == len(points) else sorted({word for word, _, _ in points})
    log = bool(known) and not names and min(known) > 0 and max(known) >= 20 * min(known)
    places = (
        [float(names.index(word)) for word, _, _ in points] if names else [math.log10(x) if log else x for x in known]
    )
    ends = (-0.5, len(names) - 0.5) if names else _padded(min(places), max(places))
    scale = Scale(*ends, *_padded(min(y for _, y, _ in points), max(y for _, y, _ in points)))
    marks = [(float(k), name) for k, name in enumerate(names)]
    if log:
        marks = [(place, number(10**place)) for place in sorted(set(places))]
    body = scale.axes(marks=marks or None)
    for place, (word, value, name) in zip(places, points, strict=True):
        circle = '<circle class="c0" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}: {}, {}</title></circle>'
        body += Markup(circle).format(scale.x(place), scale.y(value), *map(printable, (name, word, number(value))))
    return _figure(title, body, [])


def whisker(low: float, high: float, value: float, middle: float, span: tuple[float, float]) -> Markup:
    """An interval and its value on a line from `span[0]` to `span[1]`, with a mark at `middle` (no difference)."""
    begin, end = span
    x = [4 + 112 * min(max((at - begin) / ((end - begin) or 1), 0), 1) for at in (low, high, value, middle)]
    label = f"{number(value)}, 95 % interval {number(low)} to {number(high)}"
    return Markup(
        '<svg class="whisker" viewBox="0 0 120 16" role="img" aria-label="{}"><line class="zero" x1="{:.1f}" x2="{:.1f}" y1="0" '
        'y2="16"/><line x1="{:.1f}" x2="{:.1f}" y1="8" y2="8"/><circle cx="{:.1f}" cy="8" r="3.5"/></svg>'
    ).format(label, x[3], x[3], x[0], x[1], x[2])


def number(value: float) -> str:
    """A number in about four digits.

    >>> number(1234567.0), number(0.00012), number(0.5), number(3.0)
    ('1,234,567', '0.00012', '0.5', '3')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Scale:
    """From numbers to places in the picture."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.right, self.low, self.high = left, right, low, high

    def x(self, value: float) -> float:
        """Place of a number on the horizontal axis."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / ((self.right - self.left) or 1)

    def y(self, value: float) -> float:
        """Place of a number on the vertical axis."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low) / ((self.high - self.low) or 1)

    def axes(self, x: bool = True, marks: Sequence[tuple[float, str]] | None = None) -> Markup:
        """Lines and numbers of both axes; `marks`: other words on the horizontal one."""
        return Markup("").join(
            self._axes([(at, number(at)) for at in ticks(self.left, self.right)] if marks is None else marks, x)
        )

    def _axes(self, marks: Sequence[tuple[float, str]], with_x: bool) -> Iterator[Markup]:
        for at in ticks(self.low, self.high, 4):
            line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(at):.1f}" y2="{self.y(at):.1f}"/>'
            yield Markup(line) + _text(LEFT - 6, self.y(at) + 4, number(at), "end")
        for at, word in marks if with_x else ():
            yield _text(self.x(at), HEIGHT - 6, word[:14], "middle")


def _padded(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis, with some room."""
    room = (high - low) * 0.05 or abs(low) * 0.05 or 1.0
    return low - room, high + room


def _finite(line: Line) -> Line:
    xs, ys = (np.asarray(axis, dtype=float) for axis in line)
    return xs[np.isfinite(ys)], ys[np.isfinite(ys)]


def _number(word: str) -> float | None:
    try:
        return value if math.isfinite(value := float(word)) else None
    except ValueError:
        return None


def _text(x: float, y: float, words: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, printable(words))


def _figure(title: str, body: Markup, legend: Sequence[tuple[str, str]]) -> Markup:
    said = ", ".join(f"{name} {value}".strip() for name, value in legend)
    picture = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, printable(f"{title}: {said}" if said else title), body
    )
    keys = Markup("").join(
        Markup('<span class="key c{}">{} <b>{}</b></span>').format(k, escape(printable(name)), value)
        for k, (name, value) in enumerate(legend)
    )
    return Markup("<figure><figcaption>{} {}</figcaption>{}</figure>").format(printable(title), keys, picture)
