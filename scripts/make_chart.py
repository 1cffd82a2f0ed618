"""The README's picture and the first table of docs/results.md, from the committed measurements: quality lost against bits.

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
RESULTS = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "images" / "quality.svg"
COLOURS = {"rtn": "#8a8f98", "awq": "#c98a1b", "gptq": "#2f6fde"}
NAMES = {"rtn": "round to nearest", "awq": "AWQ", "gptq": "GPTQ"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 380, 70, 46, 130, 52
LABEL_BELOW = {"rtn": -8, "awq": 5, "gptq": -6}  # pixels, clear of the lines
TICKS = (0.1, 1, 10, 100)  # per cent


def x_of(bits: float, low: float, high: float) -> float:
    """Bits per weight to pixels."""
    return LEFT + (bits - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def y_of(percent: float) -> float:
    """Per cent lost to pixels, logarithmic between 0.02 (less is drawn there) and 300."""
    low, high = math.log10(0.02), math.log10(300)
    share = (math.log10(max(percent, 0.02)) - low) / (high - low)
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
        x, y = x_of(bits, low, high) + 10, y_of(lost(row)) + LABEL_BELOW[method]
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(NAMES[method])}</text>')
    return "\n".join([*parts, "</svg>", ""])


def lost(row: dict[str, Any]) -> float:
    """Perplexity over the float model's, in per cent."""
    return 100 * (float(row["perplexity_ratio"]) - 1)


def _point(row: dict[str, Any], colour: str, low: float, high: float) -> str:
    x = x_of(row["bits_per_weight"], low, high)
    ends = [y_of(100 * (row[key] - 1)) for key in ("perplexity_ratio_low", "perplexity_ratio_high")]
    bar = (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}" stroke-width="1.5"/>'
    )
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


def table(data: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The same measurements as a Markdown table, best first within each width, and where they come from."""
    lines = ["| recipe | bits per weight | size | perplexity | KL | same token |", "|---|---|---|---|---|---|"]
    first = rows[0]
    float_bytes = 269  # MB, bf16
    lines.append(f"| float model | 16 | {float_bytes} MB | {first['baseline_perplexity']:.2f} | "
                 f"{first['kl_noise_floor']:.4f} (bf16 noise) | |")  # fmt: skip
    for row in sorted(rows, key=lambda r: (-round(r["bits_per_weight"], 1), r["perplexity_ratio"])):
        name = " ".join([f"`{row['recipe']}`", *(f"`--set {o}`" for o in row["overrides"])])
        digits = 1 if lost(row) >= 1 else 2
        half = 50 * (row["perplexity_ratio_high"] - row["perplexity_ratio_low"])
        cells = [name, f"{row['bits_per_weight']:.2f}", f"{row['size_bytes'] / 1e6:.0f} MB"]
        cells += [f"{lost(row):+.{digits}f} % ± {half:.{digits}f}", f"{row['kl_mean']:.3f}"]
        cells.append(f"{100 * row['top1_agreement']:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    where = data["machine"]
    lines.append("")
    lines.append(
        f"SmolLM2-135M-Instruct, {first['tokens']:,} held-out tokens, paired 95 % intervals; embedding and head at 8 bits; "
        f"`{data['command']}`, {where['processor']}, {where['cores']} cores."
    )
    return "\n".join(lines)


def with_table(page: str, made: str) -> str:
    """The page with the part between the two markers replaced."""
    opening, closing = "<!-- quality table: scripts/make_chart.py -->\n", "\n<!-- /quality table -->"
    before, _, rest = page.partition(opening)
    return before + opening + made + closing + rest.partition(closing.lstrip())[2]


def main() -> None:
    """Make both, or with --check fail when either is not what the data says."""
    data = json.loads(DATA.read_text())
    rows = [r for r in data["rows"] if r["recipe"].split("-")[0] in COLOURS and _plain(r)]
    wanted = {PICTURE: draw(rows), RESULTS: with_table(RESULTS.read_text(), table(data, rows))}
    for path, text in wanted.items():
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            sys.exit(f"{path.relative_to(ROOT)} is stale; run python scripts/make_chart.py")


def _plain(row: dict[str, Any]) -> bool:
    """Rows that differ in weight bits only."""
    return all(override.startswith("weights.bits=") for override in row["overrides"])


if __name__ == "__main__":
    main()
