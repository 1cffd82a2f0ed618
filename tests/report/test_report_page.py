"""The page escapes everything, loads nothing, and says what the numbers say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from anybit.report.charts import bits_map, error_chart, size_parts
from anybit.report.grid import grid, kinds_and_blocks, place
from anybit.report.markup import Html, element, join
from anybit.report.page import render, write_report
from anybit.report.words import change_percent, duration, float_bits, quality_words, size, size_words

EVIL = '</script><script>alert("1")</script><img src=http://evil.example/x onerror=alert(1)>\'&amp;'
PLOTLY = get_plotlyjs()


def row(name: str, bits: int = 4, error: float = 0.05) -> dict[str, Any]:
    stored = bits * 6 * 5 + 36
    return {
        "name": name,
        "planned": "affine4g32",
        "actual": "affine4g32",
        "shape": [6, 40],
        "bits": bits,
        "bits_per_weight": 8 * stored / 240,
        "stored_bytes": stored,
        "calibration_tokens": 4096,
        "error": error,
        "kernel": "native-lookup",
        "notes": [],
    }


def everything(text: str = "plain") -> dict[str, Any]:
    """Data with all sections, `text` in every place where text can be."""
    odd = row(f"model.layers.2.{text}") | {"actual": text, "kernel": text, "notes": [text]}
    ledger = {"tensors": [row("model.layers.0.up"), row("model.layers.1.up", 3), odd]}
    quality = {"perplexity": 18.0, "stderr": 0.5, "tokens": 8176, "baseline_perplexity": 16.0, "top1_agreement": 0.875}
    return {
        "title": text,
        "ledger": ledger | {"bits_per_weight": 5.0, "size_bytes": 5000, "float_bytes": 32000},
        "quality": quality | {"kl_mean": 0.08, "kl_noise_floor": 0.001},
        "sample": {
            "prompt": text,
            "float": text,
            "quantized": text,
            "float_tokens_per_second": 1.0,
            "quantized_tokens_per_second": 2.0,
        },
        "run": {
            "command": text,
            "date": text,
            "seconds": 12.0,
            "peak_rss_bytes": 10**9,
            "processor": text,
            "torch": None,
        },
    }


class Reader(HTMLParser):
    """What a browser would make of the page: tags with attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def plain() -> Reader:
    return Reader(render(everything()))


@pytest.fixture(scope="module")
def evil() -> Reader:
    return Reader(render(everything(EVIL)))


def test_untrusted_text_adds_no_tags(plain, evil):
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert len(evil.scripts) == len(plain.scripts)
    assert evil.count("img") == 0


def test_untrusted_text_is_shown_as_it_is(evil):
    shown = "".join(evil.text)
    assert shown.count(EVIL) >= 8  # title, heading, prompt, two answers, form, kernel, command, ...


def test_untrusted_text_stays_data_inside_scripts(evil):
    ours = "".join(script for script in evil.scripts if script != PLOTLY)
    assert "evil.example" in ours  # it is in the chart's labels
    assert "<img" not in ours
    assert "<script" not in ours


def test_nothing_is_loaded_from_anywhere(plain):
    loading = {"src", "href", "srcset", "action", "data", "poster", "background"}
    assert not [(tag, attrs) for tag, attrs in plain.tags if loading & attrs.keys()]
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in plain.tags}
    ours = [script for script in plain.scripts if script != PLOTLY]
    assert len(ours) == len(plain.scripts) - 1
    assert not re.search(r"https?:|//cdn|@import|url\(", "".join(ours))
    policy = next(
        a["content"] for t, a in plain.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_it_can_be_read_without_seeing_it(plain):
    headings = [tag for tag, _ in plain.tags if tag in ("h1", "h2")]
    assert headings == ["h1"] + ["h2"] * 6
    ids = {attrs["id"] for _, attrs in plain.tags if "id" in attrs}
    assert all(attrs["aria-labelledby"] in ids for _, attrs in plain.tags if "aria-labelledby" in attrs)
    assert all(attrs.get("aria-label") for tag, attrs in plain.tags if tag == "figure")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in plain.tags if tag == "th")
    assert ("html", {"lang": "en"}) in plain.tags


def test_missing_parts_are_missing_sections():
    page = Reader(render({"title": "t", "ledger": everything()["ledger"]}))
    assert [attrs["id"] for tag, attrs in page.tags if tag == "h2"] == [
        f"{name}-title" for name in ("bits", "error", "size", "ledger")
    ]
    bare = render({"title": "t"})
    assert Reader(bare).count("h2") == 0
    assert len(bare) < 20_000  # no charts, no plotly


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "report.html"
    write_report({"title": "one"}, path)
    with pytest.raises(KeyError):
        write_report({"ledger": {}}, path)
    assert "one" in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_elements_escape_text_and_attributes():
    made = element("p", "<&", Html("<b>x</b>"), None, 3, class_='"', aria_label="<", hidden=None)
    assert made == '<p class="&quot;" aria-label="&lt;">&lt;&amp;<b>x</b>3</p>'
    assert join("<", Html("<")) == "&lt;<"


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("model.layers.2.mlp.experts.17.down_proj", (2, "mlp.experts.*.down_proj")),
        ("h.0.fc2", (0, "fc2")),
        ("0.fc", (0, "fc")),
        ("lm_head", (None, "lm_head")),
        ("model.embed_tokens", (None, "model.embed_tokens")),
    ],
)
def test_places(name, where):
    assert place(name) == where


def test_grid_has_holes_and_averages_experts():
    rows = [row("m.0.e.0.up", 2), row("m.0.e.1.up", 4), row("m.10.q", 8), row("m.2.q", 3), row("head", 8)]
    assert kinds_and_blocks(rows) == (["e.*.up", "q"], [0, 2, 10])
    assert grid(rows, "bits") == [[3.0, None, None], [None, 3.0, 8.0]]


def test_size_parts_add_up():
    ledger = everything()["ledger"]
    parts = size_parts(ledger)
    assert sum(parts.values()) == 5000
    assert parts["codes"] == (4 + 3 + 4) * 6 * 5  # 40 columns are 5 bytes of a plane
    assert parts["scales, zeros, tables"] == 3 * 36


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (94_143_744, "94.1 MB"),
        (999_600, "1.00 MB"),
        (538_060_032, "538 MB"),
    ],
)
def test_size_in_words(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.96, "1 min 00 s"), (125, "2 min 05 s"), (7620, "2 h 07 min")],
)
def test_duration_in_words(seconds, text):
    assert duration(seconds) == text


def test_ratio_against_a_32_bit_original_names_the_16_bit_one_too():
    ledger = {"size_bytes": 1000, "bits_per_weight": 4.0, "float_bytes": 8000}  # 2000 weights
    assert float_bits(ledger) == 32
    assert size_words(ledger) == (
        "1.00 kB instead of 8.00 kB in 32-bit float: 8.0 times smaller (4.0 times against 16-bit float)."
    )
    half = ledger | {"float_bytes": 4000}
    assert size_words(half) == "1.00 kB instead of 4.00 kB in 16-bit float: 4.0 times smaller."
    odd = ledger | {"float_bytes": 6000}  # mixed dtypes: no width to name
    assert size_words(odd) == "1.00 kB instead of 6.00 kB: 6.0 times smaller."
    assert size_words({}) is None


def test_change_uses_the_paired_interval_when_there_is_one():
    quality = {"perplexity": 22.0, "baseline_perplexity": 20.0, "stderr": 1.0}
    assert change_percent(quality) == pytest.approx((10.0, 0.2, 19.8))
    paired = quality | {"perplexity_ratio_low": 1.08, "perplexity_ratio_high": 1.12}
    assert change_percent(paired) == pytest.approx((10.0, 8.0, 12.0))


def test_the_verdict_mentions_only_what_was_measured():
    alone = {"perplexity": 20.0, "stderr": 0.5, "tokens": 1000}
    assert quality_words(alone) == ["Perplexity 20.00 ± 0.50 on 1,000 tokens; no float model to compare with."]
    both = alone | {"baseline_perplexity": 16.0}
    assert len(quality_words(both)) == 1
    full = both | {"kl_mean": 0.08, "kl_noise_floor": 0.001, "top1_agreement": 0.875}
    assert "80 times the noise floor of 0.001" in quality_words(full)[1]
    assert "87.5 %" in quality_words(full)[2]
    assert "no more than the noise floor" in quality_words(full | {"kl_mean": 0.0005})[1]


def test_chart_data_reaches_the_page():
    scripts = Reader(render(everything())).scripts
    heat = next(script for script in scripts if "heatmap" in script and script != PLOTLY)
    z = json.loads(re.search(r'"z":(\[\[.*?\]\])', heat)[1])
    assert z == [[4.0, 3.0, None], [None, None, 4.0]]


def test_chart_labels_cannot_use_plotly_markup():
    rows = [row("layers.0.<a href='x'>up</a>")]
    label = "&lt;a href=&#x27;x&#x27;&gt;up&lt;/a&gt;"
    assert list(bits_map(rows).data[0].y) == [label]
    assert error_chart(rows).data[0].name == label
