import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.constraints import OneOf, Range, check_arguments

ranges = st.builds(
    Range,
    low=st.sampled_from([-math.inf, -1, 0, 1]),
    high=st.sampled_from([2, 10, math.inf]),
    low_open=st.booleans(),
    high_open=st.booleans(),
    integer=st.booleans(),
    length=st.none() | st.integers(1, 3),
)


@given(ranges)
def test_nothing_outside_is_accepted(constraint):
    assert constraint.outside()
    assert not any(constraint.accepts(value) for value in constraint.outside())


@given(ranges, st.floats() | st.integers(-20, 20) | st.booleans() | st.text(max_size=3) | st.none())
def test_accepts_never_raises_and_never_takes_what_is_no_number(constraint, value):
    accepted = constraint.accepts(value)
    if accepted:
        assert isinstance(value, int | float)
        assert not isinstance(value, bool)
        assert math.isfinite(value)


def test_the_message_names_argument_range_and_value():
    with pytest.raises(ValueError, match=r"^mode must be one of 'norm', 'diag', got 'x'$"):
        check_arguments({"mode": OneOf("norm", "diag")}, mode="x")
    with pytest.raises(ValueError, match=r"^betas must be 2 numbers in \[0, 1\), got \(0.9, 1.0\)$"):
        check_arguments({"betas": Range(0, 1, high_open=True, length=2)}, betas=(0.9, 1.0))
    check_arguments({}, anything=object())
