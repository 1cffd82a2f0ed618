"""Calibration segments and evaluation windows, with a tokenizer whose ids are characters."""

import hashlib
import struct

import pytest
import torch

from anybit.calibration.tokens import calibration_tokens, data_identity, evaluation_windows
from anybit.errors import CalibrationError, InputError


class CharacterTokenizer:
    """One id per character, so that an id tells where in the text it came from."""

    def __call__(self, text, *, add_special_tokens, verbose):
        assert (add_special_tokens, verbose) == (False, False)
        return {"input_ids": [ord(character) for character in text]}


def numbered(*lengths, start=1000):
    """Documents of the given lengths in which no character occurs twice."""
    documents = []
    for length in lengths:
        documents.append("".join(chr(start + at) for at in range(length)))
        start += length
    return documents


TOKENIZER = CharacterTokenizer()


def segments(documents, **options):
    return calibration_tokens(TOKENIZER, documents, **options)


def test_same_seed_same_segments_other_seed_others():
    documents = numbered(*[100] * 30)
    first = segments(documents, samples=8, seq_len=16, seed=1)
    assert first.shape == (8, 16)
    assert first.dtype == torch.int64
    assert torch.equal(first, segments(documents, samples=8, seq_len=16, seed=1))
    assert not torch.equal(first, segments(documents, samples=8, seq_len=16, seed=2))


def test_one_contiguous_segment_per_document_at_random_starts():
    documents = numbered(*[100] * 30)
    taken = segments(documents, samples=20, seq_len=16, seed=0)
    assert bool((taken.diff(dim=1) == 1).all())
    owners, starts = (taken[:, 0] - 1000) // 100, (taken[:, 0] - 1000) % 100
    assert len(set(owners.tolist())) == 20
    assert len(set((starts % 16).tolist())) > 3  # not only multiples of seq_len from the document's beginning
    assert bool((starts + 16 <= 100).all())


@pytest.mark.parametrize("lengths", [(100, 7, 50), (64, 64), (9, 8, 7, 6, 5, 90), (3,) * 40])
@pytest.mark.parametrize("seed", range(3))
def test_no_token_is_used_twice(lengths, seed):
    documents = numbered(*lengths)
    samples = (sum(lengths) // 10) - 2
    taken = segments(documents, samples=samples, seq_len=10, seed=seed)
    assert taken.shape == (samples, 10)
    text_tokens = taken[taken >= 1000]  # separators are below
    assert len(text_tokens.unique()) == len(text_tokens)


def test_short_documents_are_joined_by_a_blank_line():
    taken = segments(numbered(3, 3, 3), samples=1, seq_len=12, seed=0)[0].tolist()
    assert taken[3:5] == [ord("\n")] * 2
    assert taken[8:10] == [ord("\n")] * 2
    assert sum(token >= 1000 for token in taken) == 8


def test_every_document_is_used_before_any_is_used_twice():
    taken = segments(numbered(1000, 20, 20, 20), samples=4, seq_len=16, seed=3)
    owners = {0 if start < 2000 else 1 + (start - 2000) // 20 for start in taken[:, 0].tolist()}
    assert owners == {0, 1, 2, 3}


def test_too_short_text_says_how_many_tokens():
    with pytest.raises(CalibrationError, match="has 12 tokens but 2 samples of 7 need 14"):
        segments(numbered(5, 5), samples=2, seq_len=7, seed=0)
    assert segments(numbered(5, 5), samples=2, seq_len=6, seed=0).shape == (2, 6)
    with pytest.raises(CalibrationError, match="at least 1"):
        segments(numbered(50), samples=0, seq_len=7, seed=0)


def test_windows_are_consecutive_and_drop_the_remainder():
    documents = ["abc", "defgh"]
    windows = evaluation_windows(TOKENIZER, documents, ctx=4)
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["abc\n", "\ndef"]


def test_max_tokens_only_removes_windows():
    documents = numbered(30, 30, 30)
    everything = evaluation_windows(TOKENIZER, documents, ctx=8)
    assert everything.shape == (11, 8)
    for limit, count in ((8, 1), (15, 1), (16, 2), (40, 5), (1000, 11)):
        assert torch.equal(evaluation_windows(TOKENIZER, documents, 8, limit), everything[:count])


@pytest.mark.parametrize(
    ("ctx", "limit", "message"),
    [(1, None, "at least 2"), (8, 7, "--max-tokens 7 is less"), (64, None, "has 32 tokens, less than one window")],
)
def test_bad_window_requests(ctx, limit, message):
    with pytest.raises(InputError, match=message):
        evaluation_windows(TOKENIZER, numbered(30, 0), ctx, limit)


def test_identity_is_the_hash_of_the_tokens():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 70000]])
    expected = hashlib.sha256(struct.pack("<6q", 1, 2, 3, 4, 5, 70000)).hexdigest()
    assert data_identity(tokens, "wiki") == {"source": "wiki", "shape": [2, 3], "sha256": expected}
    assert data_identity(tokens.t().contiguous().t(), "wiki")["sha256"] == expected  # layout in memory does not matter
