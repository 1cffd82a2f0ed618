"""Schedules: what is written, what is refused, what is counted."""

import pytest

from anybit.engine.schedule import BitsAccount, FixedSchedule, check_available, parse_schedule
from anybit.errors import InputError


def test_parse() -> None:
    assert parse_schedule("4").switches == ((0, 4),)
    schedule = parse_schedule("4@0, 3@32,2@96")
    state = schedule.start(None, 100)  # type: ignore[arg-type]
    assert [schedule.bits(state, t) for t in (0, 31, 32, 95, 96, 1000)] == [4, 4, 3, 3, 2, 2]
    assert schedule.precisions == (4, 3, 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "write bits"), ("4,3", "write bits"), ("4@1", "ascend from 0"), ("4@0,3@0", "ascend"), ("3@0,4@5", "only fall"),
     ("17", "1 to 16"), ("4@-1", "write bits"), ("4@0,", "write bits"), ("x", "write bits")],
)  # fmt: skip
def test_refused(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse_schedule(text)


def test_a_precision_that_is_not_there() -> None:
    check_available(parse_schedule("4@0,2@9"), (2, 3, 4))
    with pytest.raises(InputError, match="wants 2 bits; this checkpoint holds"):
        check_available(parse_schedule("4@0,2@9"), (3, 4))
    with pytest.raises(InputError, match="not nested"):
        check_available(FixedSchedule(((0, 4), (5, 3))), (4,))


def test_averages_of_the_paper_and_honest_ones() -> None:
    account = BitsAccount((4, *[3] * 11))  # L = 12, h = 0: one high pass is always made, and not in the paper's log
    assert account.average_paper == 3
    assert account.average == 37 / 12
    assert account.histogram == {4: 1, 3: 11}
    assert BitsAccount(()).average == 0
