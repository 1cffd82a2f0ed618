"""The README's picture, drawn from the committed measurements: perplexity lost against bits per weight.

python scripts/make_chart.py [--check]
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "benchmarks" / "results" / "quality-smollm2.json"
PICTURE = ROOT / "docs" / "images" / "quality.svg"
COLOURS = {"rtn": "#8a8f98", "awq": "#c98a1b", "gptq": "#2f6fde"}
NAMES = {"rtn": "round to nearest", "awq": "AWQ", "gptq": "GPTQ"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 380, 70, 46, 130, 52
TICKS = (0.1, 1, 10, 100)  # per cent


def x_of(bits: float, low: float, high: float) -> float:
    """Bits per weight to pixels."""
    return LEFT + (bits - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def y_of(percent: float) -> float:
    """Per cent lost to pixels, logarithmic between 0.1 and 300."""
    low, high = math.log10(0.1), math.log10(300)
    share = (math.log10(max(percent, 0.1)) - low) / (high - low)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def draw(rows: list[dict[str, Any]]) -> str:
    """The whole SVG."""
    low, high = min(r["bits_per_weight"] for r in rows) - 0.3, max(r["bits_per_weight"] for r in rows) + 0.3
    parts = [_frame(low, high)]
    for method, colour in COLOURS.items():
        points = sorted((r["bits_per_weight"], r) for r in rows if r["recipe"].startswith(method))
        line = " ".join(f"{x_of(bits, low, high):.1f},{y_of(lost(row)):.1f}" for bits, row in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [_point(row, colour, low, high) for _, row in points]
        bits, row = points[0]
        x, y = x_of(bits, low, high) + 12, y_of(lost(row)) + 4
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(NAMES[method])}</text>')
    return "\n".join([*parts, "</svg>", ""])


def lost(row: dict[str, Any]) -> float:
    """Perplexity over the float model's, in per cent."""
    return 100 * (float(row["perplexity_ratio"]) - 1)


def _point(row: dict[str, Any], colour: str, low: float, high: float) -> str:
    x = x_of(row["bits_per_weight"], low, high)
    ends = [y_of(100 * (row[key] - 1)) for key in ("perplexity_ratio_low", "perplexity_ratio_high")]
    bar = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}" stroke-width="1.5"/>'
    return bar + f'<circle cx="{x:.1f}" cy="{y_of(lost(row)):.1f}" r="4.5" fill="{colour}"/>'


def _frame(low: float, high: float) -> str:
    style = "text{font:13px system-ui,sans-serif}.ink{fill:#57606a}.grid{stroke:#8a8f9855}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Perplexity lost against bits per weight, for three methods">',
        f"<style>{style}</style>",
        f'<text class="ink" x="{LEFT}" y="24">SmolLM2-135M: perplexity lost to the float model (log scale), '
        "95 % intervals</text>",
    ]
    for tick in TICKS:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="ink" x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{tick:g} %</text>')
    for bits in range(math.ceil(low), math.floor(high) + 1):
        x = x_of(bits, low, high)
        parts.append(f'<text class="ink" x="{x:.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{bits}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="ink" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">'
        "bits per weight, everything stored counted</text>"
    )
    return "\n".join(parts)


def main() -> None:
    """Draw, or with --check fail when the picture is not what the data says."""
    picture = draw([r for r in json.loads(DATA.read_text())["rows"] if r["recipe"].split("-")[0] in COLOURS and _plain(r)])
    if "--check" not in sys.argv:
        PICTURE.write_text(picture)
    elif not PICTURE.is_file() or PICTURE.read_text() != picture:
        sys.exit(f"{PICTURE.relative_to(ROOT)} is stale; run python scripts/make_chart.py")


def _plain(row: dict[str, Any]) -> bool:
    """Rows that differ in weight bits only."""
    return all(".bits=" in override for override in row["overrides"])


if __name__ == "__main__":
    main()
