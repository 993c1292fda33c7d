import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.budget.infinite_compute import PowerLawAsymptote, data_multiplier, ensemble_recipe, joint_asymptote
from headway.testing.planners import check_planner

X = [0.15, 0.3, 0.6, 1.4, 3.0]
NOISY = [3.9, 3.72, 3.6, 3.55, 3.46]


def law_values(x, a, b, c):
    return [a / value**b + c for value in x]


@pytest.mark.parametrize("options", [{}, {"exponent": 0.5}])
def test_the_contract_of_a_planner_holds(options):
    check_planner(PowerLawAsymptote, fit=(X, NOISY), predict=([0.2, 5.0],), arguments=options)
    check_planner(PowerLawAsymptote, fit=(np.array(X), np.array(NOISY)), predict=(math.inf,), arguments=options)


@settings(deadline=None, max_examples=25)
@given(a=st.floats(0.05, 2), b=st.floats(0.2, 1.5), c=st.floats(0.5, 4))
def test_clean_data_give_their_parameters_back_to_a_thousandth(a, b, c):
    law = PowerLawAsymptote().fit(X, law_values(X, a, b, c))
    assert pytest.approx((a, b, c), abs=1e-3) == (law.A_, law.B_, law.C_)
    assert law.identified_


def test_units_of_x_do_not_matter_to_exponent_and_asymptote():
    billions, ones = PowerLawAsymptote().fit(X, NOISY), PowerLawAsymptote().fit([1e9 * x for x in X], NOISY)
    assert pytest.approx(billions.B_, rel=1e-4) == ones.B_
    assert pytest.approx(billions.C_, rel=1e-5) == ones.C_
    assert ones.predict(2e9) == pytest.approx(billions.predict(2.0), rel=1e-6)


@given(x=st.floats(0.01, 1000))
def test_equivalent_x_inverts_predict(x):
    law = PowerLawAsymptote(exponent=0.7).fit([1.0, 2.0], law_values([1.0, 2.0], 2.0, 0.7, 3.0))
    assert law.equivalent_x(law.predict(x)) == pytest.approx(x, rel=1e-6)


def test_no_x_reaches_the_asymptote_and_infinity_predicts_it():
    law = PowerLawAsymptote().fit(X, law_values(X, 0.3, 0.8, 3.0))
    assert law.equivalent_x(law.C_) == law.equivalent_x(1.0) == math.inf
    assert law.predict(math.inf) == law.C_


def test_an_equivalent_beyond_the_floats_is_infinite():
    with pytest.warns(UserWarning, match="not identified"):
        law = PowerLawAsymptote(exponent=1e-3).fit([1.0, 2.0], [1.0, 0.9])
    assert law.equivalent_x(1e-3) == math.inf


def test_a_given_exponent_needs_two_points_only():
    law = PowerLawAsymptote(exponent=1.0).fit([1, 2], [4.0, 3.5])
    assert pytest.approx((1.0, 1.0, 3.0)) == (law.A_, law.B_, law.C_)


def test_parameters_are_never_negative_and_a_bound_warns():
    straight = [5 - x for x in X]
    with pytest.warns(UserWarning, match="asymptote not identified"):
        law = PowerLawAsymptote().fit(X, straight)
    assert law.C_ == 0
    assert not law.identified_
    with pytest.warns(UserWarning, match="asymptote not identified"):
        law = PowerLawAsymptote().fit(X, [1.0, 1.1, 1.2, 1.3, 1.4])
    assert law.A_ >= 0
    with pytest.warns(UserWarning, match="asymptote not identified"):
        PowerLawAsymptote().fit(X, [4 - 0.1 * math.log(x) for x in X])


def test_weight_zero_leaves_a_point_out():
    spoiled = [*NOISY[:4], 99.0]
    law = PowerLawAsymptote().fit(X, spoiled, [1, 1, 1, 1, 0])
    assert law.to_dict() == PowerLawAsymptote().fit(X[:4], NOISY[:4]).to_dict()


def test_interval_is_a_point_on_clean_data_and_unbounded_without_a_spare_point():
    clean = PowerLawAsymptote().fit(X, law_values(X, 0.3, 0.8, 3.0))
    low, high = clean.interval(math.inf)
    assert high - low < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert PowerLawAsymptote().fit(X[:3], NOISY[:3]).interval(1.0) == (0, math.inf)
        assert PowerLawAsymptote().fit([1, 1, 2, 3], [4.0, 4.1, 3.7, 3.6]).interval(1.0) == (0, math.inf)


def test_interval_is_the_jackknife_of_the_predictions():
    law = PowerLawAsymptote(exponent=0.5).fit(X, NOISY)
    rest = [PowerLawAsymptote(exponent=0.5).fit(np.delete(X, i), np.delete(NOISY, i)).C_ for i in range(5)]
    error = math.sqrt(4 / 5 * sum((value - np.mean(rest)) ** 2 for value in rest))
    student = 3.182446305284263  # 0.975 quantile with 5 - 2 degrees of freedom
    assert law.interval(math.inf) == pytest.approx((law.C_ - student * error, law.C_ + student * error))


def test_interval_covers_the_true_asymptote_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    x = np.arange(1, 9)
    hits = 0
    for _ in range(60):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = np.array(law_values(x, 0.5, 1.0, 3.0)) + 0.01 * generator.standard_normal(8)
            low, high = PowerLawAsymptote(exponent=1.0).fit(x, y).interval(math.inf, level=0.9)
        hits += low <= 3.0 <= high
    # 54 expected; four standard errors of a binomial below it.
    assert hits >= 54 - 4 * math.sqrt(60 * 0.9 * 0.1)


def test_a_wider_level_gives_a_wider_interval():
    law = PowerLawAsymptote().fit(X, NOISY)
    narrow, wide = law.interval(2.0, level=0.5), law.interval(2.0, level=0.99)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


def test_saved_fit_gives_the_same_interval():
    law = PowerLawAsymptote().fit(X, NOISY)
    again = PowerLawAsymptote.from_dict(json.loads(json.dumps(law.to_dict())))
    assert again.interval(math.inf) == law.interval(math.inf)
    assert again.identified_ == law.identified_


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [2.0, 1.0], "x must hold at least 3 different values to fit 3 parameters, got 2"),
        ([1, 1, 2], [2.0, 2.0, 1.0], "x must hold at least 3 different values"),
        ([0, 1, 2], [3.0, 2.0, 1.0], "x must be > 0, got 0 at position 0"),
        ([1, 2, 3], [3.0, math.nan, 1.0], "y must be finite, got nan"),
        ([1, 2, 3], [3.0, 2.0], "one length"),
    ],
    ids=["two points", "two different points", "zero", "nan", "lengths"],
)
def test_data_that_cannot_be_fitted_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        PowerLawAsymptote().fit(x, y)


def test_bad_weights_and_bad_positions_are_refused():
    with pytest.raises(ValueError, match="weights must be 5 finite numbers >= 0"):
        PowerLawAsymptote().fit(X, NOISY, [1, 1, 1, 1])
    with pytest.raises(ValueError, match="weights must be 5 finite numbers >= 0"):
        PowerLawAsymptote().fit(X, NOISY, [1, 1, 1, 1, -1])
    with pytest.raises(ValueError, match="x must be > 0"):
        PowerLawAsymptote().fit(X, NOISY).predict([1.0, 0.0])


def test_joint_asymptote_takes_members_first_and_sizes_second():
    table = {N: {K: 3 + 0.2 / N**0.8 + 0.1 / N / K**1.1 for K in range(1, 6)} for N in (0.15, 0.3, 0.6, 1.4)}
    law = joint_asymptote(table)
    assert pytest.approx(3, abs=1e-3) == law.C_
    assert law.predict(0.3) == pytest.approx(3 + 0.2 / 0.3**0.8, abs=1e-3)


def test_joint_asymptote_names_the_size_whose_members_do_not_identify_it():
    table = {N: {K: 3 + 0.2 / N + 0.1 / K for K in range(1, 5)} for N in (1, 2, 3, 4)}
    table[3] = dict.fromkeys(range(1, 5), 3 + 0.2 / 3)
    with pytest.warns(UserWarning, match=r"not identified at size \[3\]"):
        joint_asymptote(table)


def test_joint_asymptote_needs_three_sizes_and_three_ensembles():
    with pytest.raises(ValueError, match="at least 3 different values"):
        joint_asymptote({N: {1: 3.0, 2: 2.9, 3: 2.87} for N in (1, 2)})
    with pytest.raises(ValueError, match="at least 3 different values"):
        joint_asymptote({N: {1: 3.0, 2: 2.9} for N in (1, 2, 3)})


def test_multiplier_of_the_baseline_itself_is_one_and_below_its_asymptote_infinite():
    law = PowerLawAsymptote().fit(X, law_values(X, 0.3, 0.8, 3.0))
    check_planner(data_multiplier, predict=(law, 0.2, 3.5))
    for tokens in (0.1, 1.0, 7.0):
        assert data_multiplier(law, tokens, law.predict(tokens)) == pytest.approx(1)
    assert data_multiplier(law, 0.2, law.predict(0.2 * 5.17)) == pytest.approx(5.17)
    assert data_multiplier(law, 0.2, law.C_) == math.inf
    with pytest.raises(ValueError, match="tokens must be > 0, got 0"):
        data_multiplier(law, 0, 3.5)


@pytest.mark.parametrize(
    ("single", "member"),
    [((16, 1.6), (32, 0.8)), ((8, 0.1), (16, 0.1)), ((100, 0.15), (128, 0.1)), ((200, 0.05), (200, 0.05))],
)
def test_members_train_twice_as_long_with_half_the_decay_within_bounds(single, member):
    assert ensemble_recipe(*single) == member
