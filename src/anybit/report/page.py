"""One offline HTML page from one JSON object: no network, no server, nothing to install.

`data` has up to six parts, and a part that is missing is a section that is missing:

    title    str
    ledger   the checkpoint's ledger.json
    quality  the JSON of `anybit eval`
    sample   {prompt, float, quantized: texts; float_tokens_per_second, quantized_tokens_per_second}
    schedules  the JSON of benchmarks/schedules.py
    run      {command, date, seconds, peak_rss_bytes, and what `machine()` says}: shown as name and value

Everything in it, model text above all, is untrusted and goes through `element`, which escapes. The page forbids itself
any request with a Content-Security-Policy.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from anybit.report.markup import Html, element, join
from anybit.report.sections import cards, charts, ledger_table, run_facts, sample, verdict

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def write_report(data: dict[str, Any], path: str | Path) -> Path:
    """Write the page for `data`, whole or not at all, making parent directories.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(data), encoding="utf-8")
    partial.replace(path)
    return path


def render(data: dict[str, Any]) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    pictures = charts(data)
    if "schedules" in data:
        from anybit.report.schedules import schedule_sections  # plotly is slow to import: only when there is a picture

        pictures += schedule_sections(data)
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        element("title", data["title"]),
        element("style", Html(_asset("page.css"))),
        element("script", Html(get_plotlyjs())) if pictures else None,
    )
    main = element(
        "main",
        element(
            "header", element("p", "anybit", class_="eyebrow"), element("h1", data["title"]), verdict(data), cards(data)
        ),
        *pictures,
        sample(data),
        ledger_table(data),
        run_facts(data),
        element("footer", "This page is complete in itself: it loads nothing from anywhere and can be kept or mailed."),
    )
    script = element("script", Html(_asset("page.js"))) if pictures else None
    page = join(
        Html("<!doctype html>\n"), Html('<html lang="en">'), head, element("body", main, script), Html("</html>\n")
    )
    return str(page)


def _asset(name: str) -> str:
    return files("anybit.report").joinpath(name).read_text(encoding="utf-8")
