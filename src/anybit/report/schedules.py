"""Schedules of a nested checkpoint in pictures: bits at every step, and quality against bits.

`data["schedules"]` is the JSON of benchmarks/schedules.py: `rows` with `name, group, bits, rouge, rouge_low, rouge_high, kl,
bits_per_step`, `prompts` and `length`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from anybit.report.charts import COLOURS, INK, styled
from anybit.report.markup import Html
from anybit.report.sections import figure_section

Row = dict[str, Any]
SHOWN_STEPS = 7
"""Lines in the picture of bits per step; more cannot be told apart."""


def schedule_sections(data: dict[str, Any]) -> list[Html]:
    """The pictures; none without `schedules`."""
    found = data.get("schedules")
    if not found or not found["rows"]:
        return []
    about = f"{found['prompts']} prompts, up to {found['length']} new tokens each, beside the float model's own text."
    return [
        figure_section(
            "pareto",
            "Quality against bits",
            f"Each point is a schedule: {about} Bars are 95 % intervals; no schedule has both fewer bits and more agreement than "
            "those on the line.",
            quality_chart(found["rows"]),
            numbers="",
        ),
        figure_section(
            "steps",
            "Bits at every step",
            "Mean precision of each decode step of the schedules on the line.",
            steps_chart(found["rows"]),
            numbers="",
        ),
    ]


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in both bits and ROUGE-L, fewest bits first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["bits"], -row["rouge"])):
        if not best or row["rouge"] > best[-1]["rouge"]:
            best.append(row)
    return best


def real(rows: Sequence[Row]) -> list[Row]:
    """Without the oracle, which knows the answer."""
    return [row for row in rows if row["group"] != "oracle"]


def quality_chart(rows: Sequence[Row]) -> go.Figure:
    """ROUGE-L over mean bits, a colour for each kind of schedule, with the Pareto front."""
    figure = go.Figure()
    edge = front(real(rows))
    figure.add_scatter(
        x=[row["bits"] for row in edge],
        y=[row["rouge"] for row in edge],
        name="Pareto front",
        mode="lines",
        line={"color": INK, "width": 1.5, "dash": "dot"},
        hoverinfo="skip",
    )
    for at, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
        of_group = [row for row in rows if row["group"] == group]
        figure.add_scatter(
            x=[row["bits"] for row in of_group],
            y=[row["rouge"] for row in of_group],
            error_y={
                "array": [row["rouge_high"] - row["rouge"] for row in of_group],
                "arrayminus": [row["rouge"] - row["rouge_low"] for row in of_group],
                "thickness": 0.7,
                "width": 2,
            },
            text=[html.escape(row["name"]) for row in of_group],
            name=html.escape(group),
            mode="markers",
            marker={"size": 8, "color": COLOURS[at % len(COLOURS)], "symbol": at // len(COLOURS)},
            hovertemplate="%{text}<br>%{x:.2f} bits, ROUGE-L %{y:.3f}<extra></extra>",
        )
    figure.update_xaxes(title="mean bits of a decode step")
    figure.update_yaxes(title="ROUGE-L with the float model")
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return styled(figure, height=460)


def steps_chart(rows: Sequence[Row]) -> go.Figure:
    """Mean bits of each decode step, of the schedules on the front."""
    edge = front(real(rows))
    chosen = edge[:: max(1, -(-len(edge) // SHOWN_STEPS))]
    figure = go.Figure()
    for at, row in enumerate(chosen):
        figure.add_scatter(
            y=row["bits_per_step"],
            name=html.escape(row["name"]),
            mode="lines",
            line={
                "width": 2,
                "color": COLOURS[at % len(COLOURS)],
                "shape": "hv",
                "dash": ("solid", "dot")[at // len(COLOURS) % 2],
            },
            hovertemplate="step %{x}: %{y:.2f} bits",
        )
    figure.update_xaxes(title="decode step")
    figure.update_yaxes(title="bits")
    figure.update_layout(hovermode="x unified", legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return styled(figure, height=380)
