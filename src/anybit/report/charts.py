"""The three pictures of a ledger: where the bits are, where the error is, what the bytes are spent on.

Figures have transparent grounds and grey text that read on light and dark pages; `page.js` sets the page's text colour.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io

from anybit.report.grid import Row, grid, kinds_and_blocks
from anybit.report.markup import Html
from anybit.report.words import size

# Okabe and Ito's palette for every colour vision, without black and yellow, which vanish on one of our two grounds.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c")
# One step per code width, 1 to 8 bits; anything wider is "kept in float".
BIT_COLOURS = ("#d3efdf", "#a6ddd0", "#74c8c2", "#45adb9", "#2f8cb0", "#2b6aa3", "#304d94", "#383a86")
INK = "#808080"


def bits_map(rows: Sequence[Row]) -> go.Figure:
    """Heat map, kinds of linears by blocks, coloured by code bits."""
    kinds, blocks = kinds_and_blocks(rows)
    steps = [
        (edge / 8, colour) for at, colour in enumerate(BIT_COLOURS) for edge in (at, at + 1)
    ]  # two stops per colour make steps instead of a gradient
    bits, per_weight = grid(rows, "bits"), grid(rows, "bits_per_weight")
    figure = go.Figure(
        go.Heatmap(
            x=blocks,
            y=[html.escape(kind) for kind in kinds],
            z=bits,
            customdata=per_weight,
            zmin=0.5,
            zmax=8.5,
            colorscale=steps,
            xgap=2,
            ygap=2,
            colorbar={"title": "bits", "tickvals": list(range(1, 9)), "thickness": 12, "outlinewidth": 0},
            hovertemplate="block %{x}, %{y}<br>%{z:.0f} bits, %{customdata:.2f} with scales<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title="block", showgrid=False)
    return styled(figure, height=110 + 30 * len(kinds))


def error_chart(rows: Sequence[Row]) -> go.Figure:
    """Relative output error over blocks, one line per kind of linear."""
    kinds, blocks = kinds_and_blocks(rows)
    figure = go.Figure()
    for at, (kind, errors) in enumerate(zip(kinds, grid(rows, "error"), strict=True)):
        figure.add_scatter(
            x=blocks,
            y=errors,
            name=html.escape(kind),
            mode="lines+markers",
            line={"width": 1.8, "color": COLOURS[at % len(COLOURS)], "dash": ("solid", "dot")[at // len(COLOURS) % 2]},
            marker={"size": 6},
            hovertemplate="block %{x}: %{y:.4f}",
        )
    figure.update_yaxes(title="relative output error", rangemode="tozero")
    figure.update_xaxes(title="block")
    figure.update_layout(hovermode="x unified", legend={"orientation": "h", "y": -0.22, "yanchor": "top"})
    return styled(figure, height=420)


def size_parts(ledger: dict[str, Any]) -> dict[str, int]:
    """Bytes of a checkpoint by what they hold; they add up to `size_bytes`."""
    rows = ledger["tensors"]
    codes = sum(row["bits"] * row["shape"][0] * -(-row["shape"][1] // 8) for row in rows)
    stored = sum(row["stored_bytes"] for row in rows)
    return {
        "codes": codes,
        "scales, zeros, tables": stored - codes,
        "kept in float": ledger["size_bytes"] - stored,
    }


def size_chart(ledger: dict[str, Any]) -> go.Figure:
    """Two bars: the float model as one piece, the checkpoint by what its bytes hold."""
    parts = size_parts(ledger)
    figure = go.Figure()
    pieces = {"float model": (ledger["float_bytes"], "float", INK)}
    pieces |= {name: (count, "quantized", COLOURS[at]) for at, (name, count) in enumerate(parts.items())}
    for name, (count, bar, colour) in pieces.items():
        figure.add_bar(
            y=[bar],
            x=[count],
            name=f"{name}: {size(count)}",
            orientation="h",
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate=f"{name}<br>{size(count)}<extra></extra>",
        )
    figure.update_layout(
        barmode="stack", bargap=0.35, legend={"orientation": "h", "y": -0.1, "yanchor": "top", "traceorder": "normal"}
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(visible=False)
    return styled(figure, height=230)


def styled(figure: go.Figure, height: int) -> go.Figure:
    """The look shared by all figures."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "inherit", "size": 13, "color": INK},
        hoverlabel={"font": {"size": 13}},
    )
    axis = {"automargin": True, "zeroline": False, "gridcolor": "rgba(128,128,128,0.25)", "ticks": ""}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def draw(figure: go.Figure, name: str) -> Html:
    """The figure as a `<div>` and the script that fills it; needs plotly.js once on the page.

    plotly's own JSON encoder escapes `<`, `>` and `/`, so no text can end the script.
    """
    config = {"displaylogo": False, "displayModeBar": False, "responsive": True, "plotlyServerURL": ""}
    return Html(plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, div_id=name, config=config))
