"""Sealed pages in the native decoder: nothing depends on how the work is cut, and forgetting tokens leaves no trace."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from anybit.engine.native import NativeModel
from anybit.errors import FormatError, InputError
from anybit.formats.kv import KVSpec
from anybit.kernels import native
from tiny_checkpoints import quantize_tiny

pytestmark = pytest.mark.skipif(native.native() is None, reason="anybit._native is not built")

SPECS = ["4-channel", "k2v4-channel-sink64-rotated", "k8v4-window64", "8-sink64", "k16v4-token-rotated"]
FAMILIES = {"llama": {}, "gemma3": {"layer_types": ["sliding_attention", "full_attention"]}}
IDS = np.random.default_rng(0).integers(4, 200, 400).tolist()
LENGTH = 280


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {f: quantize_tiny(f, tmp_path_factory.mktemp(f), config=c) for f, c in FAMILIES.items()}
    return made.__getitem__


def opened(directory, word, **options):
    return NativeModel.open(directory, kv=KVSpec.parse(word), max_tokens=2000, verify=False, **options)


def feed(model, begin, end, slot=0, prompt=False):
    rows = [(token, slot) for token in IDS[begin:end]]
    return model.forward(rows, range(len(rows)), prompt=prompt)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("word", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_however_the_work_is_cut(family, word, prompt, checkpoint):
    model, before = opened(checkpoint(family), word), native.loaded().threads()
    whole = feed(model, 0, LENGTH, prompt=prompt)
    assert len(np.unique(whole)) > 1000
    ones = list(range(1, LENGTH))
    for slot, (threads, places) in enumerate([(2, ones), (1, [63, 64, 65, 127]), (2, [1, 60, 70, 130, 191, 257])], 1):
        native.set_threads(threads)
        parts = [feed(model, a, b, slot, prompt) for a, b in pairwise([0, *places, LENGTH])]
        assert np.array_equal(np.concatenate(parts), whole), (threads, places)
    native.set_threads(before)
    for got, want in zip(model.last_keys_values(3), model.last_keys_values(0), strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("word", SPECS)
def test_neighbours_in_a_call_do_not_matter(word, checkpoint):
    model = opened(checkpoint("llama"), word)
    whole = feed(model, 0, 200)
    model.reset()
    for slot in (1, 2):
        feed(model, 0, 50 * slot, slot)
    rows = [(IDS[t + 50 * slot], slot) for t in range(90) for slot in (1, 2)]  # interleaved, across pages of both
    got = model.forward(rows, range(len(rows)))
    for slot in (1, 2):
        assert np.array_equal(got[slot - 1 :: 2], whole[50 * slot : 50 * slot + 90])


@pytest.mark.parametrize("word", SPECS)
def test_guesses_across_a_page_are_taken_back(word, checkpoint):
    """Pages that wrong guesses filled are sealed again with what really comes."""
    plain, model = opened(checkpoint("llama"), word), opened(checkpoint("llama"), word)
    whole = feed(plain, 0, 270)
    length, random = 0, np.random.default_rng(1)
    while length < 270:
        right = int(min(random.integers(1, 9), 270 - length))
        wrong = [(int(token), 0) for token in random.integers(4, 200, random.integers(0, 20))]
        rows = [(token, 0) for token in IDS[length : length + right]] + wrong
        got = model.forward(rows, range(len(rows)))[:right]
        assert np.array_equal(got, whole[length : length + right]), length
        length += right
        model.truncate(0, length)
    for got, want in zip(model.last_keys_values(), plain.last_keys_values(), strict=True):
        assert np.array_equal(got, want)


def test_how_far_back_one_can_go(checkpoint):
    model = opened(checkpoint("llama"), "4-channel-sink64")
    whole = feed(model, 0, 300)
    for keep in (257, 256, 230, 192):  # page 3 is kept until page 5 begins; page 2 need not be opened for 192
        model.truncate(0, keep)
        assert np.array_equal(feed(model, keep, 300), whole[keep:])
    for keep in (191, 129, 65):
        with pytest.raises(InputError, match="not kept any more"):
            model.truncate(0, keep)
    assert model.length() == 300
    again = opened(checkpoint("llama"), "4-channel-sink64")
    assert np.array_equal(feed(model, 300, 310), feed(again, 0, 310)[300:])
    for keep in (128, 64, 40):  # whole pages stay sealed, the sinks were never
        again.truncate(0, keep)
        assert np.array_equal(feed(again, keep, 250), whole[keep:250])
    model.reset()
    assert np.array_equal(feed(model, 0, 100), whole[:100])


@pytest.mark.parametrize(("word", "bits"), [("4-channel", 4), ("8-channel", 8), ("4-rotated", 4)])
def test_what_is_kept_is_near_what_came(word, bits, checkpoint):
    """Against a 16-bit cache: at most half a step of a range, no larger than the spread of all keys or values."""
    exact, model = opened(checkpoint("llama"), "16"), opened(checkpoint("llama"), word)
    exact.forward([(token, 0) for token in IDS[:192]], [])
    model.forward([(token, 0) for token in IDS[:192]], [])
    for got, want in zip(model.last_keys_values(), exact.last_keys_values(), strict=True):
        assert np.abs(got - want).mean() < (want.max() - want.min()) / (2**bits - 1) / 2 + 0.03 * np.abs(want).mean()
        assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.97


def test_specs_that_do_not_fit_are_refused(checkpoint):
    with pytest.raises(FormatError, match="power of 2"):
        NativeModel.open(quantized_with_odd_heads(checkpoint("llama")), kv=KVSpec(rotated=True))
    with pytest.raises(FormatError, match="key_bits must be one of"):
        NativeModel.open(checkpoint("llama"), kv=5)


def quantized_with_odd_heads(directory):
    """The same files, whose config.json claims heads of 48 channels: refused before any tensor is read."""
    import json
    import shutil

    other = directory.parent / "odd"
    shutil.copytree(directory, other, dirs_exist_ok=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"head_dim": 48}))
    return other
