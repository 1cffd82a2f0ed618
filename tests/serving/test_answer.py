"""Stop strings and tool calls in a text that comes in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from anybit.serving import chat, completions, tools
from anybit.serving.answer import Answer, Part, Stops
from anybit.serving.batch.request import Piece, TokenLogprobs
from anybit.serving.schemas import CompletionRequest

TEXTS = st.text("ab", max_size=30)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(TEXTS, max_size=12))
def test_text_goes_through_up_to_the_first_stop_string_however_it_is_cut(stops, pieces):
    text = "".join(pieces)
    whole = Stops(stops)
    seen = ""
    for at, piece in enumerate(pieces):
        seen += whole.push(piece)
        so_far = "".join(pieces[: at + 1])
        if found := [so_far.find(stop) for stop in stops if stop in so_far]:
            assert (seen, whole.found) == (so_far[: min(found)], True)
            assert (whole.push("ab"), whole.flush()) == ("", "")
            return
        assert so_far.startswith(seen)
        assert not whole.found
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


class Words:
    """A tokenizer of which token 0 and 1 are the halves of an é, and the others letters."""

    def decode(self, ids, skip_special_tokens=False, **_):
        del skip_special_tokens
        return b"".join({0: b"\xc3", 1: b"\xa9"}.get(token, bytes([95 + token])) for token in ids).decode(
            errors="replace"
        )


def answer(*stops):
    return Answer(Words(), frozenset([25]), Stops(stops))


def piece(*ids, finish=None):
    return Piece(
        ids, (4,) * len(ids), tuple(TokenLogprobs(-float(token), ((token, -1.0),)) for token in ids), finish=finish
    )


def test_an_answer_shows_whole_characters_and_stops_between_tokens():
    whole = answer("bé")
    parts = [whole.push(piece(2)), whole.push(piece(3, 0)), whole.push(piece(1, 2, 4))]
    assert [part.text for part in parts] == ["a", "", ""]
    assert [part.finish for part in parts] == [None, None, "stop"]
    assert parts[2].token_ids == (1,), "what comes after the stop string is not counted"
    assert (whole.tokens, whole.bits) == (4, {4: 4})
    cut = answer("bc")
    parts = [cut.push(piece(2, 3)), cut.push(piece(0, finish="length"))]
    assert [part.text for part in parts] == ["a", "b"], "half a character is dropped, half a stop string is not"


def test_half_a_character_has_no_bytes():
    whole = answer()
    entries = chat._logprobs(whole, whole.push(piece(2, 0, 1, finish="stop")))
    assert [entry["bytes"] for entry in entries] == [[97], None, None]
    assert [entry["logprob"] for entry in entries] == [-2.0, 0.0, -1.0]


def test_of_tokens_that_read_alike_the_likeliest_counts():
    part = Part("", (0,), (4,), (TokenLogprobs(-0.5, ((0, -0.5), (1, -2.0), (2, -3.0))),))
    shown = completions._Shown(None, [[2]], CompletionRequest(prompt="a", logprobs=3))
    found = shown.chunk(0, answer(), part, True)["logprobs"]
    assert found["top_logprobs"] == [{"\ufffd": -0.5, "a": -3.0}]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_call_is_told_as_one(streamed):
    whole, shown = answer(), chat._Shown(True)
    text = 'x<tool_call>{"name": "weather"}</tool_call>'
    parts = [Part(text[:20]), Part(text[20:], finish="stop")]
    if streamed:
        first, last = (shown.chunk(0, whole, part, part is parts[0]) for part in parts)
        assert first["delta"] == {"role": "assistant", "content": ""}
        message, found = last["delta"], last
        assert message["tool_calls"][0].pop("index") == 0
    else:
        found = shown.choice(0, whole, parts)
        message = found["message"]
    assert message["content"] == "x"
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "weather", "arguments": "{}"}]
    assert found["finish_reason"] == "tool_calls"
