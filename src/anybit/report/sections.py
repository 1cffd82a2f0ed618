"""The sections of the page, top to bottom: each takes the whole data; None when its part of the data is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from anybit.report.markup import Html, element, join
from anybit.report.words import change_percent, duration, quality_words, size, size_words

Data = dict[str, Any]


def verdict(data: Data) -> Html:
    """What came out, in sentences."""
    sentences = [size_words(data["ledger"])] if "ledger" in data else []
    sentences += quality_words(data["quality"]) if "quality" in data else []
    return element("ul", *(element("li", sentence) for sentence in sentences if sentence), class_="verdict")


def cards(data: Data) -> Html:
    """The few numbers to remember, large."""
    ledger, quality, sample_ = data.get("ledger", {}), data.get("quality", {}), data.get("sample", {})
    facts: list[tuple[str, str, str]] = []
    if "size_bytes" in ledger:
        facts.append(("Size", size(ledger["size_bytes"]), f"float: {size(ledger['float_bytes'])}"))
    if "bits_per_weight" in ledger:
        facts.append(("Bits per weight", f"{ledger['bits_per_weight']:.2f}", "scales included"))
    if quality.get("baseline_perplexity") is not None:
        change, low, high = change_percent(quality)
        facts.append(("Perplexity", f"{change:+.1f} %", f"95 %: {low:+.1f} to {high:+.1f} %"))
    if quality.get("top1_agreement") is not None:
        facts.append(("Same next token", f"{quality['top1_agreement'] * 100:.1f} %", "as the float model"))
    if sample_.get("quantized_tokens_per_second"):
        beside = f"float: {sample_['float_tokens_per_second']:.1f}"
        facts.append(("Tokens per second", f"{sample_['quantized_tokens_per_second']:.1f}", beside))
    boxes = (
        element("div", element("dt", name), element("dd", value), element("dd", note)) for name, value, note in facts
    )
    return element("dl", *boxes, class_="cards")


def charts(data: Data) -> list[Html]:
    """The pictures of the ledger, each with a heading, a sentence on how to read it and a label for screen readers."""
    if not data.get("ledger", {}).get("tensors"):
        return []
    from anybit.report import charts as draw
    from anybit.report.grid import kinds_and_blocks

    ledger = data["ledger"]
    rows = ledger["tensors"]
    pictures = []
    if kinds_and_blocks(rows)[1]:
        pictures += [
            figure_section(
                "bits", "Where the bits are", "Code bits of every linear layer, block by block.", draw.bits_map(rows)
            ),
            figure_section(
                "error",
                "Where the error is",
                "How far the output of each layer moved on the calibration text, relative to its size: 0 is no change.",
                draw.error_chart(rows),
            ),
        ]
    if "float_bytes" in ledger and "size_bytes" in ledger:
        pictures.append(
            figure_section("size", "What the bytes hold", "The files on disk, to scale.", draw.size_chart(ledger))
        )
    return pictures


def figure_section(
    name: str, title: str, how_to_read: str, figure: Any, numbers: str = "The numbers are in the ledger table."
) -> Html:
    """A picture with a heading, a sentence on how to read it, and both again for screen readers with where the `numbers` are."""
    from anybit.report.charts import draw

    picture = element(
        "figure",
        draw(figure, f"chart-{name}"),
        role="img",
        aria_label=f"{title}. {how_to_read} {numbers}".strip(),
    )
    return _section(name, title, element("p", how_to_read), picture)


def sample(data: Data) -> Html | None:
    """The same prompt answered by both models."""
    if "sample" not in data:
        return None
    said = data["sample"]
    sides = (
        element(
            "article",
            element("h3", name),
            element("p", said[key]),
            element("p", f"{said[f'{key}_tokens_per_second']:.1f} tokens per second"),
            class_="text",
        )
        for name, key in (("Float", "float"), ("Quantized", "quantized"))
    )
    prompt = element("blockquote", said["prompt"], class_="prompt")
    return _section("sample", "The same prompt, twice", prompt, element("div", *sides, class_="pair"))


COLUMNS: tuple[tuple[str, bool, Callable[[Data], object]], ...] = (
    ("form", False, lambda row: row.get("form", row.get("actual"))),
    ("bits", True, lambda row: row["bits"]),
    ("bits per weight", True, lambda row: f"{row['bits_per_weight']:.3f}"),
    ("error", True, lambda row: None if row.get("error") is None else f"{row['error']:.4f}"),
    ("tokens", True, lambda row: None if row.get("calibration_tokens") is None else f"{row['calibration_tokens']:,}"),
    ("stored", True, lambda row: None if row.get("stored_bytes") is None else size(row["stored_bytes"])),
    ("kernel", False, lambda row: row.get("kernel")),
    ("notes", False, lambda row: "; ".join(row.get("notes", []))),
)
"""Heading, whether it is a number, and the cell of a row; the name comes first and is the row's heading."""


def ledger_table(data: Data) -> Html | None:
    """Every row of the ledger."""
    rows = data.get("ledger", {}).get("tensors")
    if not rows:
        return None
    headings = [element("th", "tensor", scope="col")]
    headings += [element("th", name, scope="col", class_="number" if number else None) for name, number, _ in COLUMNS]
    table = element(
        "table",
        element("thead", element("tr", *headings)),
        element("tbody", *(element("tr", element("th", row["name"], scope="row"), *_cells(row)) for row in rows)),
        aria_labelledby="ledger-title",
    )
    region = element("div", table, class_="scroll", tabindex=0, role="region", aria_labelledby="ledger-title")
    return _section(
        "ledger",
        "The ledger",
        element(
            "p", f"All {len(rows)} quantized tensors: what was done to each, and how many calibration tokens it saw."
        ),
        region,
    )


def _cells(row: Data) -> Iterable[Html]:
    for _, number, value in COLUMNS:
        cell = value(row)
        yield element("td", "–" if cell is None else cell, class_="number" if number else None)


def run_facts(data: Data) -> Html | None:
    """How the numbers were made: command, machine, time."""
    if "run" not in data:
        return None
    shown = {"seconds": ("time", duration), "peak_rss_bytes": ("peak memory", size), "memory_bytes": ("memory", size)}
    pairs = []
    for key, value in data["run"].items():
        if value is not None:
            name, form = shown.get(key, (key, str))
            pairs += [element("dt", name), element("dd", element("code", value) if key == "command" else form(value))]
    return _section("run", "How this was made", element("dl", *pairs, class_="facts"))


def _section(name: str, title: str, *children: Html) -> Html:
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, join(*children), aria_labelledby=f"{name}-title")
