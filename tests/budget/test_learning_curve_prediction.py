import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.budget.learning_curve_prediction import (
    ExponentialPattern,
    LearningCurve,
    NotConvergedWarning,
    PowerPattern,
)
from headway.testing import check_planner

X = np.arange(500, 10_001, 500, dtype=float)
CLEAN = 96 - 400 * X**-0.5


def noisy(noise=0.02, seed=0):
    return CLEAN + noise * np.random.default_rng(seed).standard_normal(len(X))


@pytest.fixture(scope="module")
def settled():
    return LearningCurve(tau=5).fit(X, noisy())


@pytest.mark.parametrize("pattern", ["power", "exponential"])
def test_contract_of_planners(pattern):
    check_planner(
        LearningCurve,
        fit=(X[:10], noisy()[:10]),
        predict=(np.array([12_000.0, 1e6]),),
        arguments={"pattern": pattern, "lam": 1, "min_level": 7},
    )


class TestTrends:
    def test_an_exact_power_law_is_recovered_at_every_level(self):
        curve = LearningCurve().fit(X, CLEAN)
        assert [record.level for record in curve.levels_] == list(range(3, 21))
        for record in curve.levels_:
            assert (record.a, record.b, record.asymptote) == pytest.approx((400, 0.5, 96), rel=1e-4)
        assert curve.predict(1e6) == pytest.approx(96 - 400 * 1e6**-0.5, abs=1e-3)

    @settings(max_examples=8, deadline=None)
    @given(ys=st.lists(st.floats(20, 95), min_size=3, max_size=6))
    def test_they_increase_are_concave_and_bounded_by_the_asymptote(self, ys):
        grid = np.linspace(100, 20_000, 200)
        for pattern in (PowerPattern, ExponentialPattern):
            trend = pattern.fit(X[: len(ys)], ys)
            values = trend(grid)
            rounding = 1e-9 * max(1.0, abs(values).max())
            assert (np.diff(values) >= -rounding).all()
            assert (np.diff(values, 2) <= rounding).all()
            assert (values <= trend.asymptote + rounding).all()

    def test_three_clean_points_are_interpolated(self):
        trend = PowerPattern.fit(X[:3], CLEAN[:3])
        np.testing.assert_allclose(trend(X[:3]), CLEAN[:3], atol=1e-8)

    def test_an_exact_exponential_is_recovered(self):
        y = 90 - 40 * np.exp(-X / 2000)
        curve = LearningCurve(pattern="exponential").fit(X[:10], y[:10])
        assert curve.predict(8000.0) == pytest.approx(90 - 40 * math.exp(-4), abs=1e-4)
        assert curve.required_size(curve.predict(8000.0)) == pytest.approx(8000, rel=1e-6)

    def test_a_constant_score_is_its_own_asymptote_and_converges(self):
        curve = LearningCurve(tau=0.1).fit(X, np.full(20, 80.0))
        assert curve.asymptote_ == curve.predict(1e6) == 80
        assert curve.layer_ == 0
        assert curve.converged_
        assert curve.required_size(79.0) == 0
        assert curve.required_size(80.0) == math.inf

    def test_falling_scores_give_a_flat_trend(self):
        trend = PowerPattern.fit(X[:5], [90, 89, 88, 87, 86])
        assert trend.a == 0
        assert trend.asymptote == pytest.approx(88)

    def test_an_anchor_is_one_observation_at_infinity(self):
        far = PowerPattern.fit(np.append(X[:6], 1e300), np.append(noisy()[:6], 97.0))
        anchored = PowerPattern.fit(X[:6], noisy()[:6], anchor=97.0)
        assert anchored.asymptote == pytest.approx(far.asymptote, abs=1e-6)


class TestScaling:
    @pytest.mark.parametrize("factor", [1e-3, 7.0, 1e6])
    def test_the_unit_of_the_size_does_not_matter(self, factor):
        one, other = LearningCurve().fit(X, noisy()), LearningCurve().fit(factor * X, noisy())
        assert other.predict(factor * 1e5) == pytest.approx(one.predict(1e5), abs=1e-6)
        assert other.prediction_level_ == one.prediction_level_
        assert other.layer_ == pytest.approx(one.layer_, abs=1e-5)

    @pytest.mark.parametrize("factor", [0.01, 3.0])
    def test_the_unit_of_the_score_scales_predictions(self, factor):
        one = LearningCurve(tau=5).fit(X, noisy())
        other = LearningCurve(upper=100 * factor, tau=5 * factor).fit(X, factor * noisy())
        assert other.predict(1e5) == pytest.approx(factor * one.predict(1e5), rel=1e-7)
        assert (other.prediction_level_, other.converged_) == (one.prediction_level_, one.converged_)


class TestLevels:
    def test_adding_one_by_one_equals_fitting_at_every_level(self):
        y = noisy()
        curve = LearningCurve(tau=5)
        assert curve.add(X[0], y[0]) is None
        assert curve.add(X[1], y[1]) is None
        for level in range(3, 13):
            record = curve.add(X[level - 1], y[level - 1])
            if level in (3, 8, 9, 10, 12):
                batch = LearningCurve(tau=5).fit(X[:level], y[:level])
                assert record == batch.levels_[-1]
                assert curve.levels_ == batch.levels_
                assert curve.asymptote_ == batch.asymptote_

    def test_the_working_level_is_the_first_that_stays_at_rest(self):
        y = noisy(0.3)
        curve = LearningCurve(nu=4.0, lam=3, anchor=False).fit(X, y)
        alpha = dict(zip(range(3, 21), curve.backbone_, strict=True))

        def at_rest(level):
            return abs(alpha[level + 1] - alpha[level]) <= 4.0 * (X[level] - X[level - 1]) / X[level - 1]

        expected = next(level for level in range(3, 17) if all(at_rest(i) for i in range(level, level + 4)))
        assert curve.working_level_ == expected > 3

    def test_the_working_level_is_known_lam_plus_one_observations_later(self):
        assert LearningCurve(lam=5).fit(X[:8], CLEAN[:8]).working_level_ is None
        assert LearningCurve(lam=5).fit(X[:9], CLEAN[:9]).working_level_ == 3

    def test_an_impossible_asymptote_defers_the_prediction_level(self):
        y = 30 + 0.001 * X  # a straight line has no asymptote below 100 in sight
        curve = LearningCurve(nu=1e9).fit(X, y)
        assert curve.working_level_ == 3
        assert curve.prediction_level_ is None
        with pytest.warns(NotConvergedWarning, match="not reached after 20 observations"):
            curve.predict(1e5)

    def test_predictions_beyond_the_prediction_level_do_not_warn(self, settled):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            settled.predict(1e5)

    def test_anchored_levels_are_fitted_to_the_asymptote_before(self, settled):
        p = settled.prediction_level_
        free = LearningCurve(anchor=False).fit(X, noisy())
        assert settled.backbone_[: p - 2] == free.backbone_[: p - 2]
        for level in range(p + 1, 21):
            before = settled.backbone_[level - 4]
            expected = PowerPattern.fit(X[:level], noisy()[:level], anchor=before).asymptote
            assert settled.backbone_[level - 3] == expected

    def test_a_bad_observation_moves_an_anchored_asymptote_less(self):
        bad = noisy()
        bad[11] -= 8
        moved = {
            anchor: abs(
                LearningCurve(anchor=anchor).fit(X[:12], bad[:12]).asymptote_
                - LearningCurve(anchor=anchor).fit(X[:12], noisy()[:12]).asymptote_
            )
            for anchor in (True, False)
        }
        assert moved[True] < moved[False] / 2


class TestLayer:
    def test_it_bounds_the_distance_to_the_asymptote_beyond_the_crossing(self):
        for record in LearningCurve().fit(X, noisy(0.3)).levels_:
            trend = PowerPattern(record.a, record.b, record.asymptote)
            grid = np.geomspace(record.crossing, 1e9, 200)
            assert (np.abs(trend(grid) - record.asymptote) <= record.layer * (1 + 1e-9)).all()

    def test_the_crossing_is_the_last_point_where_two_trends_meet(self):
        curve = LearningCurve(anchor=False).fit(X, noisy(0.3))
        first, second = curve.levels_[-2:]
        trends = [PowerPattern(record.a, record.b, record.asymptote) for record in (first, second)]
        assert second.crossing > X[0]
        assert trends[0](second.crossing) == pytest.approx(trends[1](second.crossing), abs=1e-9)
        beyond = np.geomspace(second.crossing * 1.001, 1e9, 500)
        assert len(set(np.sign(trends[1](beyond) - trends[0](beyond)))) == 1

    def test_equal_trends_cross_nowhere_and_give_the_last_size(self):
        for record in LearningCurve().fit(X, CLEAN).levels_:
            assert record.crossing == record.x
            assert record.layer == pytest.approx(400 * record.x**-0.5, abs=1e-4)

    def test_convergence_is_the_first_layer_within_tau(self):
        curve = LearningCurve(tau=5).fit(X, CLEAN)
        flags = {record.level: record.converged for record in curve.levels_}
        # 400 x^-0.5 <= 5 from x = 6400 on.
        assert [level for level, flag in flags.items() if flag] == list(range(13, 21))
        assert curve.converged_
        assert not LearningCurve(tau=3).fit(X, CLEAN).converged_
        assert not LearningCurve().fit(X, CLEAN).converged_

    def test_a_backbone_that_rises_is_reported(self):
        assert LearningCurve().fit(X, CLEAN).monotone_
        curve = LearningCurve().fit(X, noisy())
        settled = curve.backbone_[curve.working_level_ - 3 :]
        assert curve.monotone_ == (np.diff(settled) <= 1e-7).all()
        assert not LearningCurve().fit(X[:5], CLEAN[:5]).monotone_


class TestUse:
    @pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
    def test_required_size_inverts_predict_below_the_asymptote(self, settled, share):
        score = settled.predict(500.0) + share * (settled.asymptote_ - settled.predict(500.0))
        assert settled.predict(settled.required_size(score)) == pytest.approx(score, abs=1e-6)

    def test_required_size_is_infinite_at_and_above_the_asymptote(self, settled):
        assert settled.required_size(settled.asymptote_) == math.inf
        assert settled.required_size(99.9) == math.inf

    def test_the_better_of_two_curves(self, settled):
        other = LearningCurve().fit(X, 90 - 100 * X**-0.5)
        assert settled.predict(600.0) < other.predict(600.0)
        better, margin, comparable = settled.compare(other, at=1e6)
        assert better
        assert comparable
        assert margin == pytest.approx(5.7, abs=0.2)
        assert not settled.compare(other, at=600.0).better

    def test_curves_before_their_prediction_level_are_not_comparable(self, settled):
        early = LearningCurve().fit(X[:4], CLEAN[:4])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not settled.compare(early, at=1e5).comparable

    def test_the_interval_covers_the_truth_at_its_level(self):
        covered = 0
        for seed in range(40):
            # Not anchored: an anchor counts as an observation, which it is not.
            curve = LearningCurve(min_level=12, anchor=False).fit(X[:12], noisy(0.1, seed)[:12])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotConvergedWarning)
                low, high = curve.interval(20_000.0, level=0.9)
            covered += low <= 96 - 400 * 20_000**-0.5 <= high
        assert 31 <= covered <= 40

    def test_the_interval_widens_with_level_and_distance(self, settled):
        widths = [np.subtract(*settled.interval(1e6, level=level)[::-1]) for level in (0.5, 0.9, 0.99)]
        assert widths == sorted(widths)
        low, high = settled.interval(np.array([1e4, 1e5, 1e6]))
        assert (np.diff(high - low) > 0).all()

    def test_three_points_have_no_interval(self):
        curve = LearningCurve().fit(X[:3], CLEAN[:3])
        with pytest.warns(NotConvergedWarning), pytest.raises(ValueError, match="needs at least 4 observations, got 3"):
            curve.interval(1e5)
        assert curve.panels()

    def test_plain_values_continue_where_they_were(self, settled):
        begun = LearningCurve(tau=5).fit(X[:11], noisy()[:11])
        again = LearningCurve.from_dict(json.loads(json.dumps(begun.to_dict())))
        for x, y in zip(X[11:], noisy()[11:], strict=True):
            again.add(float(x), float(y))
        assert again.levels_ == settled.levels_


class TestRefusals:
    @pytest.mark.parametrize(
        ("xs", "ys", "message"),
        [
            ([1, 2], [1, 2], "xs must hold at least 3 values, got 2"),
            ([1, 2, 2], [1, 2, 3], "x must increase strictly, got 2 after 2"),
            ([0, 1, 2], [1, 2, 3], "xs must be > 0, got 0"),
            ([1, 2, 3], [1, 2, math.inf], "ys must be finite"),
            ([1, 2, 3], [1, 2, 101], "y must be <= 100, got 101"),
        ],
    )
    def test_bad_data_to_fit(self, xs, ys, message):
        with pytest.raises(ValueError, match=message):
            LearningCurve().fit(xs, ys)

    def test_a_refused_fit_leaves_the_curve_as_it_was(self):
        curve = LearningCurve().fit(X[:4], CLEAN[:4])
        before = curve.levels_
        with pytest.raises(ValueError, match="increase"):
            curve.fit([1, 2, 2], [1, 2, 3])
        with pytest.raises(ValueError, match="increase"):
            curve.add(100.0, 50.0)
        with pytest.raises(ValueError, match="y must be"):
            curve.add(1e5, math.nan)
        assert curve.levels_ == before

    def test_too_few_observations_for_a_trend(self):
        curve = LearningCurve()
        curve.add(1.0, 50.0)
        with pytest.raises(RuntimeError, match=r"call fit\(\) first"):
            curve.predict(10.0)

    def test_a_size_of_zero_is_not_predicted(self, settled):
        with pytest.raises(ValueError, match="x must be > 0, got 0"):
            settled.predict(0.0)
