"""The pictures of schedules say what the numbers say."""

from __future__ import annotations

from typing import Any

from anybit.report.page import render
from anybit.report.schedules import front, quality_chart, schedule_sections, steps_chart


def row(name: str, bits: float, rouge: float, group: str = "fixed") -> dict[str, Any]:
    return {"name": name, "group": group, "bits": bits, "rouge": rouge, "rouge_low": rouge - 0.05,
            "rouge_high": rouge + 0.02, "kl": None, "bits_per_step": [4.0, bits]}  # fmt: skip


ROWS = [row("low", 2, 0.3), row("beaten", 3, 0.25), row("middle", 3, 0.5), row("dear", 3.5, 0.45), row("high", 4, 0.6),
        row("knows", 2.5, 0.9, "oracle"), row("<b>", 2.2, 0.2, "learned")]  # fmt: skip


def test_front() -> None:
    assert [one["name"] for one in front(ROWS)] == ["low", "knows"]
    assert [one["name"] for one in front([one for one in ROWS if one["group"] != "oracle"])] == [
        "low",
        "middle",
        "high",
    ]


def test_quality_chart() -> None:
    line, *groups = quality_chart(ROWS).data
    assert list(line.x) == [2, 3, 4]  # the oracle is shown, but is no schedule one can use
    assert {trace.name for trace in groups} == {"fixed", "oracle", "learned"}
    fixed = groups[0]
    assert list(zip(fixed.x, fixed.y, strict=True)) == [(2, 0.3), (3, 0.25), (3, 0.5), (3.5, 0.45), (4, 0.6)]
    assert [round(high, 3) for high in fixed.error_y.array] == [0.02] * 5
    assert [round(low, 3) for low in fixed.error_y.arrayminus] == [0.05] * 5


def test_steps_chart() -> None:
    assert [trace.name for trace in steps_chart(ROWS).data] == ["low", "middle", "high"]
    many = [row(f"s{at}", 2 + at / 10, at / 50) for at in range(20)]
    assert len(steps_chart(many).data) <= 7


def test_page() -> None:
    page = render({"title": "t", "schedules": {"rows": ROWS, "prompts": 7, "length": 9}})
    assert page.count("<figure") == 2
    assert "7 prompts, up to 9 new tokens" in page
    assert "<b>" not in page
    assert schedule_sections({}) == []
