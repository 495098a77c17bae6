"""I rely on: the score is the competition's, and a study is always in the same fold.

The three cases worked out by hand (ln 2 = 0.6931, -ln 0.9 = 0.1054, -ln 0.8 = 0.2231):

| case | per study |
|---|---|
| 0.5 everywhere | ln 2, whatever the labels |
| all negative, every answer 0.1 | (7 x 1 + 7) x 0.1054 / 14 = 0.1054 |
| C1 and overall positive, those 0.8, the others 0.1 | (16 x 0.2231 + 6 x 0.1054) / 22 = 0.1910 |
"""

import math

import numpy as np
import pandas as pd
import pytest

import cspine

from cspine import (PRIOR, STUDY, TARGETS, VERTEBRAE, assign_folds, auc, competition_scores,
                    dice_scores, element_losses, equal_point, interval, reliability, score_table,
                    study_scores)

NEGATIVE = [0, 0, 0, 0, 0, 0, 0, 0]
C1_BROKEN = [1, 0, 0, 0, 0, 0, 0, 1]


def test_one_half_everywhere_is_the_logarithm_of_two():
    labels = [NEGATIVE, C1_BROKEN, [1] * 8]
    assert competition_scores(np.full((3, 8), 0.5), labels) == pytest.approx([math.log(2)] * 2)


def test_one_study_worked_out_by_hand():
    assert competition_scores([[0.1] * 8], [NEGATIVE])[0] == pytest.approx(0.1053605)
    answers = [[0.8] + [0.1] * 6 + [0.8]]
    assert competition_scores(answers, [C1_BROKEN])[0] == pytest.approx(0.1910206, abs=1e-6)


def test_two_studies_worked_out_by_hand_in_both_normalisations():
    answers = [[0.1] * 8, [0.8] + [0.1] * 6 + [0.8]]
    study, column = competition_scores(answers, [NEGATIVE, C1_BROKEN])
    right, likely = -math.log(0.9), -math.log(0.8)
    assert study == pytest.approx((right + (16 * likely + 6 * right) / 22) / 2)
    mixed = (1 * right + 2 * likely) / 3  # C1 and overall: one of each, the positive weighs double
    assert column == pytest.approx((1 * mixed + 6 * right + 7 * mixed) / 14)
    assert study != pytest.approx(column)


def test_a_positive_weighs_double_and_the_patient_seven_vertebrae():
    wrong = [0.9] + [0.1] * 7
    base = competition_scores([[0.1] * 8], [NEGATIVE])[0]
    extra = competition_scores([wrong], [NEGATIVE])[0] - base
    assert extra == pytest.approx((math.log(10) - -math.log(0.9)) / 14)
    overall = competition_scores([[0.1] * 7 + [0.9]], [NEGATIVE])[0] - base
    assert overall == pytest.approx(7 * extra)


def test_the_score_is_that_of_a_slow_loop():
    rng = np.random.default_rng(0)
    answers, labels = rng.random((20, 8)), rng.integers(0, 2, (20, 8))
    total = 0
    for row, truth in zip(answers, labels):
        loss = weights = 0
        for k, (p, y) in enumerate(zip(row, truth)):
            weight = (7 if k == 7 else 1) * (2 if y else 1)
            loss -= weight * math.log(p if y else 1 - p)
            weights += weight
        total += loss / weights
    assert competition_scores(answers, labels)[0] == pytest.approx(total / 20)


def test_the_best_constants_beat_one_half_on_the_prevalences_of_the_facts():
    rates = [0.0723, 0.1412, 0.0362, 0.0535, 0.0802, 0.1372, 0.1947, 0.4760]
    labels = (np.arange(2000)[:, None] + 0.5) / 2000 < rates
    assert competition_scores(np.tile(PRIOR, (2000, 1)), labels)[1] < 0.58
    best = 2 * np.array(rates) / (1 + np.array(rates))  # where a positive weighs double
    assert ((0.73 < PRIOR / best) & (PRIOR / best < 0.83)).all()  # less, as a study is a mean


def test_answers_of_zero_and_one_stay_finite():
    loss = element_losses([0.0, 1.0, 1.0, 0.0], [1, 0, 1, 0])
    assert np.isfinite(loss).all() and loss[:2].min() > 30 and loss[2:].max() < 1e-12


def pairs_won(answers, labels):
    """The AUC as it is defined: share of (positive, negative) pairs in order, ties half."""
    won = [(p > n) + (p == n) / 2 for p, y in zip(answers, labels) if y
           for n, z in zip(answers, labels) if not z]
    return sum(won) / len(won)


def test_the_area_under_the_curve_counts_ties_half():
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == pytest.approx(0.75)
    assert auc([0.5] * 6, [0, 1, 0, 1, 1, 0]) == 0.5
    assert auc([0.2, 0.5, 0.5, 0.9], [0, 0, 1, 1]) == pytest.approx(0.875)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        answers, labels = rng.integers(0, 6, 40) / 5, rng.integers(0, 2, 40)
        assert auc(answers, labels) == pytest.approx(pairs_won(answers, labels)), seed
    assert math.isnan(auc([0.3, 0.4], [1, 1])) and math.isnan(auc([0.3], [0]))
    assert math.isnan(auc([], []))


def test_dice_is_two_overlaps_by_both_sizes_and_unknown_for_what_is_not_there():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0], labels[1], labels[3] = 1, 2, 9  # C1, C2 and a thoracic vertebra, 16 cells each
    probability = np.zeros((7, 4, 4, 4))
    probability[0, 0] = 0.9
    probability[1, 1, :2] = probability[1, 2, :1] = 0.6  # 8 right, 4 wrong
    probability[5, 3] = 0.9
    dice = dice_scores(probability, labels)
    assert dice[:2] == pytest.approx([1, 2 * 8 / (12 + 16)]) and np.isnan(dice[2:]).all()
    assert dice_scores(np.zeros((7, 4, 4, 4)), labels)[0] == 0


def labelled(count=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 7)) < 0.15).astype(int)
    table = pd.DataFrame(np.c_[labels, labels.max(1)], columns=TARGETS)
    table[STUDY] = [f"1.2.826.0.1.3680043.{k}" for k in range(count)]
    return table


def test_every_study_has_one_fold_and_folds_are_even():
    table = labelled(61)
    folds = assign_folds(table, 5, set(table[STUDY][::4]))
    assert set(folds) == set(table[STUDY])
    sizes = np.bincount(list(folds.values()), minlength=5)
    assert sizes.max() - sizes.min() <= 1


def test_folds_are_stratified_by_mask_patient_and_fractures():
    table = labelled(200)
    masked = set(table[STUDY][::5])
    folds = assign_folds(table, 5, masked)
    table["fold"] = table[STUDY].map(folds)
    table["masked"] = table[STUDY].isin(masked)
    table["many"] = table[list(VERTEBRAE)].sum(axis=1) > 1
    for name in ("masked", "patient_overall", "many"):
        share = table.groupby("fold")[name].sum()
        assert share.max() - share.min() <= 4, name  # one a stratum


def test_the_fold_of_a_study_does_not_depend_on_the_order_of_the_rows():
    table = labelled()
    folds = assign_folds(table, 5, {table[STUDY][3]})
    for seed in range(3):
        assert assign_folds(table.sample(frac=1, random_state=seed), 5, {table[STUDY][3]}) == folds


def test_folds_are_these_on_every_machine():
    folds = assign_folds(labelled(12), 4, set())
    assert [folds[uid] for uid in labelled(12)[STUDY]] == PINNED


PINNED = [1, 2, 3, 0, 1, 0, 0, 3, 3, 2, 1, 2]


def test_the_reliability_table_counts_every_answer_in_its_bin():
    answers = np.full((4, 8), 0.1)
    answers[0], answers[1, 7] = 0.3, 0.9
    labels = np.zeros((4, 8))
    labels[0], labels[1, 7], labels[2, 0] = 1, 1, 1
    table = reliability(answers, labels)
    assert list(table.loc["C1 to C7 (0.2, 0.4]"]) == pytest.approx([7, 0.3, 1])
    assert list(table.loc["C1 to C7 (0.05, 0.1]"]) == pytest.approx([21, 0.1, 1 / 21])
    assert list(table.loc["patient_overall (0.8, 1.0]"]) == pytest.approx([1, 0.9, 1])
    assert table.answers.sum() == 32
    sure = reliability(np.zeros((1, 8)), np.zeros((1, 8)))
    assert sure.answers.tolist() == [7, 1] and "(0.0, 0.05]" in sure.index[0]


def test_sensitivity_and_specificity_are_read_where_they_are_equal():
    """Two of three broken from 0.6 on, two of three whole below it; by hand."""
    answers = np.array([0.1, 0.2, 0.7, 0.3, 0.6, 0.9])
    labels = np.array([0, 0, 0, 1, 1, 1.0])
    assert equal_point(answers, labels) == pytest.approx((0.6, 2 / 3, 2 / 3))
    apart = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    assert equal_point(apart, labels) == pytest.approx((0.7, 1, 1))
    unknown = np.append(labels, [np.nan] * 2)  # counts nothing, whatever is answered
    assert equal_point(np.append(answers, [0.99, 0.01]), unknown) == pytest.approx((0.6, 2 / 3, 2 / 3))
    assert np.isnan(equal_point(answers, np.zeros(6))).all()
    table = score_table(np.tile(answers[:, None], 8), np.tile(labels[:, None], 8))
    assert np.allclose(table[["threshold", "sensitivity", "specificity"]], (0.6, 2 / 3, 2 / 3))


def test_the_interval_of_constants_is_a_point_and_that_of_draws_two_standard_errors():
    assert interval(np.full(7, 0.25)) == pytest.approx([0.25, 0.25])
    scores = np.random.default_rng(3).normal(0.5, 0.2, 400)
    low, high = interval(np.append(scores, np.nan))  # a study of unknown labels
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.15)
    assert (low + high) / 2 == pytest.approx(scores.mean(), abs=0.003)
    assert np.array_equal(interval(scores), interval(scores))


def test_the_score_is_the_mean_of_the_studies_with_known_labels():
    answers = np.full((3, 8), 0.1)
    scores = study_scores(answers, [NEGATIVE, [math.nan] * 8, C1_BROKEN])
    assert np.isnan(scores[1]) and scores[0] == pytest.approx(-math.log(0.9))
    both = competition_scores(answers, [NEGATIVE, [math.nan] * 8, C1_BROKEN])
    assert both[0] == pytest.approx((scores[0] + scores[2]) / 2)


def test_a_study_without_labels_is_not_drawn_for_the_interval():
    assert cspine.interval(np.array([1.0, math.nan, 1.0])) == pytest.approx((1, 1))


def test_a_mask_is_named_right_if_most_of_it_lies_in_its_vertebra():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[:4], labels[4:] = 2, 3
    probability = np.zeros((7, 8, 8, 8), np.float32)
    probability[1, 1:5] = 0.9  # C2: three of four planes
    probability[2, 1:5] = 0.9  # C3: one of four
    assert [*cspine.named_right(probability, labels)] == [False, True] + 5 * [False]


def test_a_mask_of_three_cells_is_named_right_by_two():
    labels = np.zeros((2, 2, 2), np.uint8)
    labels[0, 0] = 4
    probability = np.zeros((7, 2, 2, 2), np.float32)
    probability[3, 0, 0] = probability[3, 1, 0, 0] = 1
    assert [*cspine.named_right(probability, labels)] == [False] * 3 + [True] + [False] * 3
