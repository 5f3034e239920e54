"""Accuracy and the paired interval, against brute force and scipy."""

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from utils import data, evaluation


def outcomes(both: int, gained: int, lost: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool vectors (candidate, baseline) with the given cell counts."""
    cells = [(True, True)] * both + [(True, False)] * gained
    cells += [(False, True)] * lost + [(False, False)] * neither
    candidate, baseline = zip(*cells, strict=True)
    return torch.tensor(candidate), torch.tensor(baseline)


def tango_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Tango's (1998) score interval, by root finding: an independent method."""
    z = stats.norm.ppf(0.975)

    def score(delta: float) -> float:
        a, b = 2 * n, -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        p_lost = (np.sqrt(b * b - 4 * a * c) - b) / (2 * a)
        spread = np.sqrt(n * (2 * p_lost + delta * (1 - delta)))
        return (gained - lost - n * delta) / spread

    estimate = (gained - lost) / n
    low = optimize.brentq(lambda d: score(d) - z, -0.999, estimate - 1e-9)
    high = optimize.brentq(lambda d: score(d) + z, estimate + 1e-9, 0.999)
    return 100 * low, 100 * high


@pytest.mark.parametrize(
    "cells", [(700, 30, 45, 225), (5200, 100, 130, 4570), (150, 12, 4, 34), (9000, 3, 9, 988)]
)
def test_interval_agrees_with_scipy_and_with_tango(cells: tuple[int, int, int, int]):
    candidate, baseline = outcomes(*cells)
    points, low, high = evaluation.paired_difference(candidate, baseline)
    n, width = sum(cells), high - low
    differences = 100 * (candidate.double() - baseline.double()).numpy()
    wald = stats.norm.interval(0.95, differences.mean(), stats.sem(differences))
    assert points == pytest.approx(differences.mean())
    assert (low, high) == pytest.approx(wald, abs=0.12 * width)
    assert (low, high) == pytest.approx(tango_interval(cells[1], cells[2], n), abs=0.10 * width)


def test_interval_agrees_with_a_brute_force_bootstrap():
    candidate, baseline = outcomes(610, 40, 60, 290)
    differences = (candidate.double() - baseline.double()).numpy()
    draws = np.random.default_rng(0).choice(differences, (4000, len(differences))).mean(axis=1)
    _, *interval = evaluation.paired_difference(candidate, baseline)
    assert interval == pytest.approx(100 * np.percentile(draws, [2.5, 97.5]), abs=0.2)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    truth, n, hits = 100 * (0.03 - 0.05), 400, 0
    for _ in range(600):
        both, gained, lost, neither = generator.multinomial(n, [0.6, 0.03, 0.05, 0.32])
        _, low, high = evaluation.paired_difference(*outcomes(both, gained, lost, neither))
        hits += low <= truth <= high
    assert 0.93 <= hits / 600 <= 0.98


def test_no_changed_prediction_still_leaves_doubt():
    points, low, high = evaluation.paired_difference(*outcomes(60, 0, 0, 40))
    assert points == 0
    assert low == pytest.approx(-high)
    assert 1 < high < 4  # with 0 of 100 changed, a change rate of 3 % is still plausible


def test_swapping_the_models_mirrors_the_interval():
    candidate, baseline = outcomes(50, 9, 4, 37)
    points, low, high = evaluation.paired_difference(candidate, baseline)
    backward = evaluation.paired_difference(baseline, candidate)
    assert backward == pytest.approx((-points, -high, -low))


def test_top_k_by_hand():
    logits = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]])
    labels = torch.tensor([2, 2])
    assert evaluation.top_k_correct(logits, labels, 1).tolist() == [False, False]
    assert evaluation.top_k_correct(logits, labels, 2).tolist() == [True, False]
    assert evaluation.top_k_correct(logits, labels, 5).tolist() == [True, True]


def test_cosine_ignores_a_shift_common_to_all_classes():
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    assert evaluation.centred_cosine(logits + 7, logits) == pytest.approx(1.0)
    assert evaluation.centred_cosine(-logits, logits) == pytest.approx(-1.0)
    assert evaluation.centred_cosine(torch.zeros(2, 3), torch.zeros(2, 3)) == 1.0
    assert evaluation.centred_cosine(torch.zeros(2, 3), torch.eye(2, 3)) == 0.0


def test_cosine_of_one_or_two_logits_is_that_of_all_images():
    one, other = torch.tensor([[1.0], [2.0], [-3.0]]), torch.tensor([[9.0], [0.1], [-1.0]])
    expected = torch.cosine_similarity(one.T, other.T).item()
    assert evaluation.centred_cosine(other, one) == pytest.approx(expected)
    two, its_other = torch.cat([one, -one], 1), torch.cat([other + 5, 5 - other], 1)
    assert evaluation.centred_cosine(its_other, two) == pytest.approx(expected)
    assert evaluation.centred_cosine(two + 1e-4, two) == pytest.approx(1.0)


def test_row_scores_the_chosen_logits_and_the_full_head():
    """Classes 3 and 1 of a 4-way head; in the second image class 0 wins the full head."""
    logits = torch.tensor([[0.0, 1.0, 0.0, 2.0], [9.0, 5.0, 0.0, 1.0], [0.0, 4.0, 0.0, 3.0]])
    row = evaluation.accuracy_row(logits, logits.clone(), torch.tensor([0, 1, 0]), [3, 1])
    assert row["top1_percent"] == pytest.approx(200 / 3)
    assert row["top1_full_head_percent"] == pytest.approx(100 / 3)
    assert row["top5_percent"] == 100
    assert row["agreement_percent"] == 100
    assert row["top1_difference_points"] == 0
    assert row["num_images"] == 3
    assert set(row) == set(evaluation.ACCURACY_COLUMNS)


def test_baseline_has_accuracy_but_no_difference_to_itself():
    logits = torch.eye(3)
    row = evaluation.accuracy_row(logits, logits, torch.tensor([0, 1, 1]), [0, 1, 2])
    assert row["top1_percent"] == pytest.approx(200 / 3)
    assert row["top1_difference_points"] is None
    assert row["top1_difference_high_points"] is None


def test_row_without_scorable_classes_keeps_fidelity_and_leaves_accuracy_empty():
    baseline = torch.eye(4)
    row = evaluation.accuracy_row(baseline.flip(1), baseline, torch.tensor([0, 1, 2, 3]), None)
    assert row["top1_percent"] is None
    assert row["top1_difference_low_points"] is None
    assert row["agreement_percent"] == 0
    assert row["logit_cosine"] == pytest.approx(-1 / 3)


def test_predict_fills_the_last_batch_and_drops_the_filling():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4)
    raw = data.Preprocessing(4, (0.0,) * 3, (1.0,) * 3)
    sizes: list[int] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return 255 * x[:, :, 0, 0]

    logits = evaluation.predict(call, images, raw, batch_size=4)
    assert sizes == [4, 4, 4]
    assert logits[:, 0].round().tolist() == list(range(10))
