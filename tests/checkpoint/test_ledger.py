"""The ledger refuses what was not planned and what is no number."""

from __future__ import annotations

import hashlib

import pytest
import torch

from anybit.checkpoint.ledger import Ledger, check_numbers, form_word, row, tensor_sha256
from anybit.errors import FormatError, PromiseError
from anybit.formats.terms import save_terms, stored_bits
from random_terms import code_term, mixed_terms

SHAPE = (5, 40)
FACTS = {"calibration_tokens": 7, "error": 0.25, "kernel": "reference", "notes": []}


@pytest.fixture
def saved():
    torch.manual_seed(0)
    return save_terms([code_term("affine", *SHAPE)], SHAPE)


def test_a_row_says_what_is_stored(saved):
    form, tensors = saved
    found = row("a.b", "affine3g16", form, tensors, **FACTS)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert found.stored_bytes == size == 3 * 5 * 5 + 5 * 3 * (2 + 1)
    assert found.bits_per_weight == 8 * size / 200 == stored_bits(form) / 200
    assert (found.shape, found.bits, found.group_size) == (SHAPE, 3, 16)
    assert (found.planned, found.actual, found.calibration_tokens, found.error) == ("affine3g16", "affine3g16", 7, 0.25)
    assert found.sha256 == {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in tensors.items()}


@pytest.mark.parametrize("planned", ["affine4g16", "affine3g32", "affine3g16s", "codebook3", "affine3g16+columns1"])
def test_another_form_than_planned_breaks_the_promise(saved, planned):
    with pytest.raises(PromiseError, match=r"a\.b: planned .* but got affine3g16") as error:
        row("a.b", planned, *saved, **FACTS)
    assert f"planned {planned} " in str(error.value)


@pytest.mark.parametrize(
    ("key", "bad", "match"),
    [("scale", float("nan"), "NaN"), ("scale", float("inf"), "infinity"), ("scale", 0.0, "zero scale"),
     ("scale", -0.0, "zero scale")],
)  # fmt: skip
def test_damaged_numbers_break_the_promise(saved, key, bad, match):
    form, tensors = saved
    tensors[key][4, 2] = bad
    with pytest.raises(PromiseError, match=rf"a\.b\.{key} holds .*{match}"):
        row("a.b", "affine3g16", form, tensors, **FACTS)


def test_which_tensors_may_hold_zeros():
    check_numbers("x", {"zero": torch.zeros(2, dtype=torch.uint8), "columns_weight": torch.zeros(2)})
    for name in ("scale", "scale_1"):
        with pytest.raises(PromiseError, match=f"{name} holds a zero"):
            check_numbers("x", {name: torch.tensor([1.0, 0.0])})
    with pytest.raises(PromiseError, match="value holds NaN"):
        check_numbers("x", {"value": torch.tensor([1.0, -torch.inf]).bfloat16()})


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_breaks_the_promise(saved, error):
    with pytest.raises(PromiseError, match=r"a\.b: the error is not a number"):
        row("a.b", "affine3g16", *saved, **{**FACTS, "error": error})


def test_words_for_forms():
    torch.manual_seed(0)
    assert form_word(save_terms([code_term("affine-symmetric", *SHAPE)], SHAPE)[0]) == "affine3g16s"
    assert form_word(save_terms([code_term("codebook", *SHAPE)], SHAPE)[0]) == "codebook3"
    form, tensors = save_terms(mixed_terms(*SHAPE), SHAPE)
    assert form_word(form) == "affine3g16+affine4g16+columns3+low_rank2"
    assert row("x", form_word(form), form, tensors, **FACTS).stored_bytes == stored_bits(form) // 8


def test_hashes_see_values_dtypes_and_any_memory_layout():
    x = torch.arange(6, dtype=torch.float16).view(2, 3)
    assert tensor_sha256(x.t().contiguous().t()) == tensor_sha256(x) == hashlib.sha256(x.numpy().tobytes()).hexdigest()
    assert tensor_sha256(x.t()) != tensor_sha256(x)
    assert tensor_sha256(x.bfloat16()) != tensor_sha256(x)
    assert tensor_sha256(torch.empty(0, 3)) == hashlib.sha256(b"").hexdigest()


def ledger(rows):
    facts = {"model": "m", "recipe": "r", "bits_per_weight": 4.5, "size_bytes": 9, "float_bytes": 90, "identity": {}}
    return Ledger(tensors=rows, float_tensors={"norm.weight": "00"}, **facts)


def test_ledger_files(saved, tmp_path):
    whole = ledger([row("a.b", "affine3g16", *saved, **FACTS)])
    whole.write(tmp_path)
    assert Ledger.read(tmp_path) == whole
    path = tmp_path / "ledger.json"
    text = path.read_text()
    path.write_text(text.replace('"calibration_tokens": 7', '"calibration_tokens": "many"'))
    with pytest.raises(FormatError, match=r"damaged at 'tensors\.0\.calibration_tokens'"):
        Ledger.read(tmp_path)
    path.write_text(text.replace('"recipe"', '"recipes"'))
    with pytest.raises(FormatError, match="damaged at 'recipe'"):
        Ledger.read(tmp_path)
    path.write_text(text[:100])
    with pytest.raises(FormatError, match="damaged"):
        Ledger.read(tmp_path)
    path.unlink()
    with pytest.raises(FormatError, match=r"no ledger\.json"):
        Ledger.read(tmp_path)
