"""Stop strings and tool calls in a text that comes in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from anybit.serving import tools
from anybit.serving.answer import Stops

TEXTS = st.text("ab", max_size=30)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(TEXTS, max_size=12))
def test_text_goes_through_up_to_the_first_stop_string_however_it_is_cut(stops, pieces):
    text = "".join(pieces)
    whole = Stops(stops)
    seen = ""
    for at, piece in enumerate(pieces):
        seen += whole.push(piece)
        so_far = "".join(pieces[: at + 1])
        assert not any(stop in seen for stop in stops)
        assert so_far.startswith(seen)
    ends = [so_far for n in range(len(text) + 1) if any((so_far := text[:n]).endswith(stop) for stop in stops)]
    if whole.found:
        assert ends
        assert seen == text[: min(text.find(stop) for stop in stops if stop in text)] or len(pieces) > 1
    else:
        assert not ends
        assert seen + whole.flush() == text


def test_nothing_is_held_back_without_need():
    stops = Stops(["abc", "xy"])
    assert [stops.push(c) for c in "1ab"] == ["1", "", ""]
    assert stops.push("d") == "abd"
    assert stops.push("zx") == "z"
    assert (stops.push("y!"), stops.found) == ("", True)
    assert stops.push("more") == ""


def test_tool_calls():
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    text, (found,) = tools.parse(f"One moment.\n{call}")
    assert text == "One moment."
    assert found["function"]["name"] == "weather"
    assert json.loads(found["function"]["arguments"]) == {"city": "Köln"}
    assert len(tools.parse(call * 2)[1]) == 2
    for odd in [
        "<tool_call>{}</tool_call>",
        "<tool_call>{broken</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        "no call",
    ]:
        assert tools.parse(odd) == (odd, [])
    assert not tools.known(None)
    assert tools.known("{% if tools %}")
