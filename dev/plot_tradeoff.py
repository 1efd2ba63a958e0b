"""Draw accuracy against forgetting of finished runs as an SVG: `python dev/plot_tradeoff.py <run> <run> ... > dev/tradeoff.svg`.

Each run is a point labelled with its retention.weight; the base model, which every run measures, is the dashed line.
"""

import json
import math
import sys
from pathlib import Path

import yaml

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 70, 55, 20, 30
INK, GRID, LINE = "#1f2937", "#e5e7eb", "#2563eb"


def points(folders):
    """(retention weight, rise of perplexity on general text, accuracy) of each run, by weight; and the base's accuracy."""
    found, base = [], 0.0
    for folder in map(Path, folders):
        summary = json.loads((folder / "summary.json").read_text())
        weight = yaml.safe_load((folder / "config.yaml").read_text())["retention"]["weight"]
        base = summary["base"]["accuracy"]
        found.append((weight, 100 * summary["probe_perplexity_rise"], 100 * summary["tuned"]["accuracy"]))
    return sorted(found), 100 * base


def svg(found, base):
    """The plot: x is the rise of perplexity in percent (linear around 0, logarithmic beyond 1), y the accuracy in percent."""
    scale = math.asinh
    low, high = scale(min(-1, *(x for _, x, _ in found))), scale(max(x for _, x, _ in found) * 2)
    x_of = lambda x: LEFT + (scale(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    y_of = lambda y: HEIGHT - BOTTOM - y / 100 * (HEIGHT - BOTTOM - TOP)  # noqa: E731
    ticks = [x for x in (-100, -10, -1, 0, 1, 3, 10, 30, 100, 300, 1000) if low <= scale(x) <= high]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">'
    ]
    parts += [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for y in range(0, 101, 20):
        parts += [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}" stroke="{GRID}"/>']
        parts += [f'<text x="{LEFT - 8}" y="{y_of(y) + 4:.1f}" text-anchor="end" fill="{INK}">{y} %</text>']
    for x in ticks:
        parts += [f'<line x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{GRID}"/>']
        parts += [
            f'<text x="{x_of(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="{INK}">{x:+g} %</text>'
        ]
    dashed = f'stroke="{INK}" stroke-dasharray="4 4"'
    parts += [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(base):.1f}" y2="{y_of(base):.1f}" {dashed}/>']
    parts += [f'<text x="{WIDTH - RIGHT}" y="{y_of(base) - 6:.1f}" text-anchor="end" fill="{INK}">base model</text>']
    line = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for _, x, y in found)
    parts += [f'<polyline points="{line}" fill="none" stroke="{LINE}" stroke-opacity="0.4" stroke-width="2"/>']
    for k, (weight, x, y) in enumerate(found):
        parts += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="5" fill="{LINE}"/>']
        beside = 22 if k % 2 else -12  # labels of neighbours below and above
        label = f'x="{x_of(x):.1f}" y="{y_of(y) + beside:.1f}" text-anchor="middle" fill="{INK}"'
        parts += [f"<text {label}>weight {weight:g}</text>"]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts += [
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle" fill="{INK}">rise of perplexity on general text</text>'
    ]
    parts += [
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle" fill="{INK}">answer accuracy</text>'
    ]
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    print(svg(*points(sys.argv[1:])))
