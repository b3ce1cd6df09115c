"""The reward model's report on hand-made scores: accuracy, intervals, calibration, length rules."""

import json
import math

import pytest

from fastrl.errors import DataError
from fastrl.trainers.reward_report import build_report, has_pair
from fastrl.types import Comparison


def comparison(ranks, lengths, source="a", characters=()):
    return Comparison(prompt_ids=(1,), completions=tuple((2,) * n for n in lengths),
                      ranks=tuple(ranks), source=source, num_characters=tuple(characters))


def test_accuracy_margins_and_groups_by_hand():
    held = [
        comparison([0, 1, 2], [3, 2, 1], "a"),  # pairs: margins 1 (right), 1.5 (right), .5 (right)
        comparison([1, 0], [1, 2], "b"),  # margin -0.05 (wrong)
        comparison([0, 0, 1], [5, 5, 5], "b"),  # tie dropped; margins 0 (half), 3 (right)
        comparison([0, 0], [1, 2], "c"),  # no pair
    ]
    scores = [[1.0, 0.0, -0.5], [0.05, 0.0], [1.0, 4.0, 1.0], [9.0, 9.0]]
    report = build_report(held, scores, train=[comparison([0, 1], [1, 2], "a")])
    assert report.overall.num_pairs == 6 and report.overall.num_prompts == 3
    assert report.overall.accuracy == pytest.approx(4.5 / 6)
    assert report.num_without_pair == 1
    assert {k: (v.num_pairs, v.accuracy) for k, v in report.by_source.items()} == {
        "a": (3, 1.0), "b": (3, 0.5)}
    assert {k: (v.num_pairs, v.accuracy) for k, v in report.by_completions.items()} == {
        "2": (1, 0.0), "3": (5, 0.9)}
    assert {k: (v.num_pairs, v.accuracy) for k, v in report.by_margin.items()} == {
        "0 to 0.1": (2, 0.25), "0.5 to 1": (1, 1.0), "1 to 2": (2, 1.0), "2 or more": (1, 1.0)}
    # -log sigmoid of 1, 1.5, .5, -.05, 0 and 3, averaged inside each prompt, then over prompts
    by_prompt = [(0.3132617 + 0.2014133 + 0.4740770) / 3, 0.7184597, (0.6931472 + 0.0485874) / 2]
    assert report.loss == pytest.approx(sum(by_prompt) / 3, abs=1e-6)
    assert report.score_mean == pytest.approx(24.55 / 10)
    assert report.score_std == pytest.approx(3.478250, abs=1e-6)


def test_length_rules_are_fitted_on_training_data_by_source():
    # Training: shorter wins in source "short" (twice), longer wins in "long" (once).
    train = [comparison([0, 1], [1, 5], "short"), comparison([0, 1], [2, 5], "short"),
             comparison([0, 1], [5, 1], "long")]
    held = [comparison([0, 1], [1, 9], "short"), comparison([0, 1], [9, 1], "long"),
            comparison([0, 1], [4, 4], "new")]
    report = build_report(held, [[0.0, 0.0]] * 3, train)
    assert (report.overall.length_rule, report.overall.length_accuracy) == ("shorter", 0.5)
    assert (report.overall.longer_accuracy, report.overall.shorter_accuracy) == (0.5, 0.5)
    assert report.by_source["short"].length_accuracy == 1.0
    assert report.by_source["long"].length_rule == "longer"
    assert report.by_source["long"].length_accuracy == 1.0
    assert report.by_source["new"].length_rule == "shorter"  # unseen source: the overall rule
    assert report.overall.accuracy == 0.5  # equal scores count one half


def test_length_is_that_of_the_text_where_it_is_known():
    held = [comparison([0, 1], [1, 9], characters=[50, 10])]
    assert build_report(held, [[0.0, 0.0]], ()).overall.longer_accuracy == 1.0


def test_calibration_by_hand():
    # sigmoid(1) = .731059, twice right and twice wrong; sigmoid(4) = .982014, always right.
    held = [comparison([0, 1], [1, 1])] * 6
    scores = [[1, 0], [1, 0], [0, 1], [0, 1], [4, 0], [4, 0]]
    report = build_report(held, scores, ())
    assert [(b.num_pairs, b.observed) for b in report.calibration] == [(4, 0.5), (2, 1.0)]
    assert [b.predicted for b in report.calibration] == pytest.approx([0.731059, 0.982014],
                                                                      abs=1e-6)
    assert report.calibration[0].low == pytest.approx(0.7)
    assert report.calibration_error == pytest.approx(
        (4 * 0.231059 + 2 * 0.017986) / 6, abs=1e-6)


def test_interval_is_wilson_for_independent_pairs_and_wider_for_clusters():
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    held = [comparison([0, 1], [1, 1])] * 100
    report = build_report(held, [right] * 70 + [wrong] * 30, ())
    # Wilson for 70 of 100, a hair wider for the estimated variance.
    assert report.overall.low == pytest.approx(0.6042, abs=2e-3)
    assert report.overall.high == pytest.approx(0.7811, abs=2e-3)
    # The same share from 20 prompts whose 10 pairs are all right or all wrong: 20 draws, not 200.
    groups = [comparison([0, 1, 2, 3, 4], [1] * 5)] * 20
    falling, rising = [4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0]
    clustered = build_report(groups, [falling] * 14 + [rising] * 6, ()).overall
    assert clustered.accuracy == pytest.approx(0.7) and clustered.num_pairs == 200
    assert clustered.low == pytest.approx(0.481, abs=0.01)
    assert clustered.high == pytest.approx(0.855, abs=0.01)


def test_interval_of_three_prompts_by_hand():
    """Two pairs a prompt, both right, both right, both wrong: worth n = 2 independent pairs.

        sum of squared residuals 24/9, over 6^2, times 3/2 = 1/9; n = (2/3 * 1/3) / (1/9) = 2
    """
    held = [comparison([0, 1, 1], [1] * 3)] * 3
    report = build_report(held, [[1.0, 0.0, 0.0]] * 2 + [[-1.0, 0.0, 0.0]], ()).overall
    assert (report.num_pairs, report.accuracy) == (6, pytest.approx(2 / 3))
    assert (report.low, report.high) == pytest.approx((0.159381, 0.954745), abs=1e-5)


def test_interval_of_a_perfect_score_is_not_a_point():
    perfect = build_report([comparison([0, 1], [1, 1])] * 10, [[1.0, 0.0]] * 10, ()).overall
    assert perfect.low == pytest.approx(0.7225, abs=1e-3)
    assert perfect.high == pytest.approx(1.0)


def test_report_is_json_and_large_margins_do_not_overflow():
    report = build_report([comparison([0, 1], [1, 1])], [[-2000.0, 2000.0]], ())
    assert math.isclose(report.loss, 4000.0)
    saved = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert saved["overall"]["accuracy"] == 0.0 and saved["by_margin"]["2 or more"]["num_pairs"] == 1


def test_nothing_to_compare_is_an_error():
    assert not has_pair(comparison([1, 1], [1, 1])) and not has_pair(comparison([0], [1]))
    with pytest.raises(DataError, match="got none in 1 comparisons"):
        build_report([comparison([1, 1], [1, 1])], [[0.0, 1.0]], ())
