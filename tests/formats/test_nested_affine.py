"""The nested grid against its formula, number by number."""

import pytest
import torch

from anybit.errors import FormatError
from anybit.formats.nested_affine import NestedAffine, middle
from anybit.formats.terms import CodeTerm, load_terms, precisions, save_terms

torch.manual_seed(0)


def nested(rows: int = 3, columns: int = 10, group: int = 4) -> NestedAffine:
    g = -(-columns // group)
    zeros = {t: torch.randint(0, 256, (rows, g), dtype=torch.uint8) for t in (2, 3, 4, 8)}
    ratios = {t: torch.randint(1, 256, (rows, g), dtype=torch.uint8) for t in (2, 3, 4)}
    return NestedAffine(8, group, (2, 3, 4, 6, 8), (torch.rand(rows, g) + 0.01).half(), zeros, ratios)


@pytest.mark.parametrize(("bits", "table"), [(2, 2), (3, 3), (4, 4), (6, 8), (8, 8)])
def test_decode_is_the_formula(bits: int, table: int) -> None:
    form, codes = nested(), torch.randint(0, 256, (3, 10), dtype=torch.uint8)
    values = form.decode(codes, bits)
    for n in range(3):
        for k in range(10):
            g, code = k // 4, int(codes[n, k])
            scale = float(form.scale[n, g])
            if table != 8:
                scale = float(torch.tensor(scale * int(form.ratios[table][n, g]) / 128).half())
            same = [c for c in range(256) if c >> (8 - bits) == code >> (8 - bits)]
            expected = scale * (sum(same) / len(same) - int(form.zeros[table][n, g]))
            assert float(values[n, k]) == pytest.approx(expected, rel=1e-6)


def test_middle_of_all_codes_is_the_mean_of_its_cell() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    for dropped in range(8):
        cells = codes.float().view(-1, 2**dropped).mean(1)
        assert torch.equal(middle(codes, dropped)[0], cells.repeat_interleave(2**dropped))


def test_a_width_that_is_not_offered_is_refused() -> None:
    with pytest.raises(FormatError, match="holds \\[2, 3, 4, 6, 8\\]"):
        nested().decode(torch.zeros(3, 10, dtype=torch.uint8), 5)


def test_saved_and_loaded_it_reads_the_same_at_every_width() -> None:
    term = CodeTerm.from_codes(torch.randint(0, 256, (3, 10), dtype=torch.uint8), nested())
    form, tensors = save_terms([term], (3, 10))
    assert precisions(form) == (2, 3, 4, 6, 8)
    (again,) = load_terms(form, tensors)
    for bits in (2, 3, 4, 6, 8):
        assert torch.equal(again.dense(bits), term.dense(bits))
