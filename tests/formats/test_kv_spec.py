"""What a cache description says: words and dictionaries round-trip, nonsense is refused, counts follow the formulas."""

from __future__ import annotations

import pytest

from anybit.errors import FormatError
from anybit.formats.kv import KVSpec, check_head

WORDS = ["k16v16-token", "k8v4-token-rotated", "k4v4-channel-sink64", "k2v4-channel-sink128-window64-rotated"]


@pytest.mark.parametrize("word", WORDS)
def test_words_and_dictionaries_round_trip(word):
    spec = KVSpec.parse(word)
    assert spec.word == word
    assert KVSpec.read(spec.as_dict()) == spec
    assert KVSpec.parse("4-channel") == KVSpec(4, 4, "channel")
    assert KVSpec.parse("8") == KVSpec()


@pytest.mark.parametrize(
    "word", ["", "5", "k4", "4-chanel", "4-sink32", "4-window", "16-channel", "4-sink-64", "k4v4v4"]
)
def test_nonsense_is_refused(word):
    with pytest.raises(FormatError, match=r"kv:|not a cache"):
        KVSpec.parse(word)


def test_heads_that_do_not_rotate():
    check_head(KVSpec(rotated=True), 64)
    with pytest.raises(FormatError, match="power of 2"):
        check_head(KVSpec(rotated=True), 96)
    with pytest.raises(FormatError, match="unknown option 'group'"):
        KVSpec.read({"group": 32})


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (64, 0), (0, 64), (128, 128)])
def test_what_is_read_as_codes(sink, window):
    """A page counts once `window` tokens and itself lie before the position: at a multiple of 64, not one token later."""
    spec = KVSpec(4, 4, "channel", sink=sink, window=window)
    for position in range(3 * (sink + window) + 5 * 64 + 5):
        pages = [p for p in range(position // 64 + 1) if 64 * p >= sink and 64 * (p + 1) + window <= position]
        assert spec.sealed(position) == (64 * (pages[-1] + 1) if pages else 0)
        residual = position + 1 - spec.sealed(position)
        if pages:
            assert window < residual <= window + 64
    assert KVSpec(4, 4).sealed(5) == 6


def test_bits_of_an_element():
    assert KVSpec(4, 4).bits_per_element(64) == (4.5, 4.5)
    assert KVSpec(4, 4).bits_per_element(128) == (4.25, 4.25)
    assert KVSpec(2, 4, "channel").bits_per_element(128) == (2.5, 4.25)
    assert KVSpec(16, 8).bits_per_element(64) == (16, 8.5)
    account = KVSpec(4, 4, "channel", sink=64).account(64)
    assert account["scheme"] == "k4v4-channel-sink64"
    assert "dynamic" in account["ranges"]
