"""The crossover chart and tables of docs/crossover.md, made from the committed measurements of benchmarks/crossover.py.

python scripts/make_crossover.py [--check]
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = sorted((ROOT / "benchmarks" / "results").glob("crossover-*.json"))
PAGE = ROOT / "docs" / "crossover.md"
PICTURE = ROOT / "docs" / "images" / "crossover.svg"
COLOURS = {"linear_bits": "#c98a1b", "linear_lut": "#2f6fde"}
WIDTHS = ((1, 1), (2, 2), (4, 4), (1, 8), (2, 8), (4, 8))
TOKENS = (1, 8, 64)
DRAWN = ("amx", 1)  # instruction set and threads of the picture
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, PANEL, GAP = 900, 380, 56, 64, 56, 262, 22
LOW, HIGH = 0.2, 100
TICKS = (0.25, 0.5, 1, 2, 5, 10, 20, 50)

Row = dict[str, Any]


def y_of(ratio: float) -> float:
    """Time ratio to pixels, logarithmic."""
    share = math.log(min(max(ratio, LOW), HIGH) / LOW) / math.log(HIGH / LOW)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def draw(rows: list[Row]) -> str:
    """The whole SVG: a panel per number of tokens, one dot per shape, a bar at the median."""
    style = "text{font:13px system-ui,sans-serif;fill:#57606a}.grid{stroke:#8a8f9855}.even{stroke:#57606a}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Time of linear_bits and linear_lut over linear_w_a8, by width and number of tokens">',
        f"<style>{style}</style>",
        f'<text x="{LEFT}" y="22">'
        "Time over that of linear_w_a8 (log scale; below 1 is faster). Dots: shapes; bars: medians</text>",
    ]
    x = LEFT
    for name, colour in COLOURS.items():
        parts.append(f'<circle cx="{x + 5}" cy="38" r="5" fill="{colour}"/><text x="{x + 16}" y="43">{name}</text>')
        x += 110
    for tick in TICKS:
        y, kind = y_of(tick), "even" if tick == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - GAP}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, tokens in enumerate(TOKENS):
        parts += _panel(rows, tokens, LEFT + number * (PANEL + GAP))
    return "\n".join([*parts, "</svg>", ""])


def _panel(rows: list[Row], tokens: int, left: float) -> list[str]:
    step = PANEL / len(WIDTHS)
    title = "1 token" if tokens == 1 else f"{tokens} tokens"
    parts = [f'<text x="{left + PANEL / 2}" y="{HEIGHT - 12}" text-anchor="middle">{title}</text>']
    for at, (p, q) in enumerate(WIDTHS):
        centre = left + (at + 0.5) * step
        parts.append(f'<text x="{centre:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{p}x{q}</text>')
        for side, (name, colour) in enumerate(COLOURS.items()):
            x = centre + (side - 0.5) * 16
            ratios = [r["ratio"][name][1] for r in rows if _is(r, p, q, tokens)]
            dots = [f'<circle cx="{x:.1f}" cy="{y_of(v):.1f}" r="2.5" fill="{colour}" opacity="0.6"/>' for v in ratios]
            y = y_of(statistics.median(ratios))
            line = f'<line x1="{x - 7:.1f}" x2="{x + 7:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="3"/>'
            parts += [*dots, line]
    return parts


def _is(row: Row, p: int, q: int, tokens: int) -> bool:
    return (row["weight_bits"], row["activation_bits"], row["tokens"]) == (p, q, tokens)


def tables(data: Row) -> str:
    """A Markdown table for each instruction set and thread count: shapes and tokens down, widths across."""
    kinds = sorted({(r["isa"], r["threads"]) for r in data["rows"]}, key=lambda kind: (kind != DRAWN, kind))
    parts = []
    for isa, threads in kinds:
        rows = [r for r in data["rows"] if (r["isa"], r["threads"]) == (isa, threads)]
        parts.append(f"### `{isa}`, {threads} thread{'s' if threads > 1 else ''}: linear_bits / linear_lut\n")
        parts.append("| shape | tokens | " + " | ".join(f"{p} x {q}" for p, q in WIDTHS) + " |")
        parts.append("|---|---|" + "---|" * len(WIDTHS))
        for shape in sorted({tuple(r["shape"]) for r in rows}, key=lambda s: s[0] * s[1]):
            for tokens in TOKENS:
                found = {_width(r): r for r in rows if tuple(r["shape"]) == shape and r["tokens"] == tokens}
                cells = [_cell(found.get(width)) for width in WIDTHS]
                parts.append(f"| {shape[0]} x {shape[1]} | {tokens} | " + " | ".join(cells) + " |")
        parts.append("")
    where = data["machine"]
    parts.append(f"{where['processor']}, {where['cores']} cores; `python benchmarks/crossover.py`.")
    return "\n".join(parts)


def _width(row: Row) -> tuple[int, int]:
    return row["weight_bits"], row["activation_bits"]


def _cell(row: Row | None) -> str:
    """The two median ratios, those that win in bold."""
    if row is None:
        return ""
    values = [row["ratio"][name][1] for name in COLOURS]
    return " / ".join(f"**{v:.2f}**" if v < 0.95 else f"{v:.2f}" for v in values)


def with_tables(page: str, made: str) -> str:
    """The page with the part between the two markers replaced."""
    opening, closing = "<!-- tables: scripts/make_crossover.py -->\n", "\n<!-- /tables -->"
    before, _, rest = page.partition(opening)
    return before + opening + made + closing + rest.partition(closing.lstrip())[2]


def main() -> None:
    """Make both, or with --check fail when either is not what the data says."""
    data = json.loads(DATA[0].read_text())
    drawn = [row for row in data["rows"] if (row["isa"], row["threads"]) == DRAWN]
    wanted = {PICTURE: draw(drawn), PAGE: with_tables(PAGE.read_text(), tables(data))}
    for path, text in wanted.items():
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is stale; run python scripts/make_crossover.py")


if __name__ == "__main__":
    main()
