"""The numbers of the heterogeneity benchmark's report."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from grids import CELL, OTHER, QUICK, THIRD, record

from pisa_dist.benchmark.methods import METHODS
from pisa_dist.benchmark.protocols import TUNING_SEED
from pisa_dist.benchmark.report import write_report
from pisa_dist.benchmark.summary import (
    best_rival,
    collect,
    equal_budget,
    estimate,
    is_at_least_as_good,
    regrets,
    standings,
    tunings,
)

pytestmark = pytest.mark.timeout(300)


# The numbers.


def test_an_estimate_is_students_interval() -> None:
    mean, half_width = estimate([1.0, 2.0, 3.0])
    assert (mean, half_width) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))
    assert estimate([5.0]) == (5.0, None)
    assert math.isnan(estimate([]).mean)


@pytest.mark.parametrize(
    ("own", "rival", "expected"),
    [
        # Differences -.01, -.02, -.03: -.02 ± .0248.
        ({0: 0.50, 1: 0.60, 2: 0.70}, {0: 0.51, 1: 0.62, 2: 0.73}, True),
        # -.02, -.03, -.04: -.03 ± .0248; unpaired the intervals would overlap by far.
        ({0: 0.50, 1: 0.60, 2: 0.70}, {0: 0.52, 1: 0.63, 2: 0.74}, False),
        ({0: 0.5}, {0: 0.5}, True),
        ({0: 0.5}, {0: 0.51}, False),
        ({0: 0.9}, {1: 0.1}, False),
        ({0: 0.5, 1: 0.9, 9: 0.1}, {0: 0.4, 1: 0.8}, True),  # what they have in common
    ],
)
def test_at_least_as_good_is_paired_by_seed(
    own: Mapping[int, float], rival: Mapping[int, float], expected: bool
) -> None:
    assert is_at_least_as_good(own, rival) is expected


@pytest.fixture
def records() -> list[dict[str, Any]]:
    accuracies = {
        CELL: {"pisa": (0.80, 0.82), "pisa_tuned": (0.90, 0.90), "fedavg": (0.50, 0.54), "mifa": (0.60, None)},
        OTHER: {"pisa": (0.80, 0.80), "pisa_tuned": (0.70, 0.70), "fedavg": (0.85, 0.85), "mifa": (0.20, 0.20)},
    }
    return [
        record(cell, method, seed, last)
        for cell, methods in accuracies.items()
        for method, values in methods.items()
        for seed, last in enumerate(values)
    ]


def test_the_summary_is_what_one_computes_by_hand(records: list[dict[str, Any]]) -> None:
    scores = collect(records, QUICK)
    # A failed run counts as 0, so that failing on a hard seed does not pay.
    assert regrets(scores[CELL]) == pytest.approx({"pisa": 0.09, "pisa_tuned": 0.0, "fedavg": 0.38, "mifa": 0.60})
    assert best_rival(scores[CELL], "pisa") == "fedavg"  # not pisa_tuned, which is of its own family
    assert best_rival(scores[CELL], "fedavg") == "pisa_tuned"
    found = {standing.method: standing for standing in standings(scores)}
    assert list(found) == ["pisa", "pisa_tuned", "fedavg", "mifa"]  # by largest regret
    pisa = found["pisa"]
    assert (pisa.worst_regret, pisa.worst_cell) == (pytest.approx(0.09), CELL)
    assert pisa.mean_regret == pytest.approx(0.07)
    assert (pisa.num_good, pisa.num_cells, pisa.num_best) == (1, 2, 0)
    assert (found["pisa_tuned"].num_best, found["fedavg"].num_best) == (1, 1)
    assert (found["mifa"].num_failed, found["mifa"].bytes_sent) == (1, 1000)


def test_at_equal_bytes_and_passes_every_method_has_spent_what_the_most_frugal_one_has() -> None:
    lines = [
        record(CELL, "pisa", 0, 0.8, accuracies=[[2, 0.6, 3.0, 900], [4, 0.8, 4.0, 1000]], passes=4.0),
        record(
            CELL, "fedavg", 0, 0.7, accuracies=[[2, 0.5], [4, 0.7]], bytes_sent=500
        ),  # an older line, 2 passes a round
        record(CELL, "mifa", 0, None),
    ]
    methods = collect(lines, QUICK)[CELL]
    assert (equal_budget(methods, "bytes_sent"), equal_budget(methods, "passes")) == (500, 4.0)
    assert methods["pisa"].at("bytes_sent", 950).mean == pytest.approx(0.7)
    assert methods["fedavg"].at("bytes_sent", 500).mean == pytest.approx(0.7)
    assert methods["fedavg"].at("passes", 6.0).mean == pytest.approx(0.6)
    assert methods["mifa"].at("passes", 4.0).half_width is None


def test_the_tables_show_means_intervals_and_failures(records: list[dict[str, Any]], tmp_path: Path) -> None:
    write_report(tmp_path, records, {"protocol": "quick"})
    text = (tmp_path / "table.md").read_text()
    # 81 ± 12.706 * 1.41421 / sqrt(2); the one run of mifa that did not fail has no interval.
    assert "| PISA, untuned | 81.0 ± 12.7 |\n" in text
    assert "| MIFA | 60.0 (1 failed) |\n" in text
    assert "| **PISA, tuned** |" not in text
    assert "| PISA, tuned | **90.0 ± 0.0** |" in text
    assert "| digits label_1 participation 1, mifa, score seed 1 | FloatingPointError: a NaN |" in text
    assert "2 cells, scored seeds 0, 1." in text


def test_a_choice_at_the_end_of_its_range_is_counted() -> None:
    settings = METHODS["mifa"].settings_for(QUICK, "digits")
    lines = [
        record(cell, "mifa", TUNING_SEED, accuracy, phase="tune", setting=list(setting))
        for cell, start, accuracies in ((CELL, 2, (0.1, 0.3, 0.2)), (OTHER, 0, (0.4, 0.3, 0.3, None, 0.3)))
        for setting, accuracy in zip(settings[start:], accuracies, strict=False)
    ]
    unfinished = [record(THIRD, "mifa", TUNING_SEED, 0.5, phase="tune", setting=list(settings[2]))]
    (tuning,) = tunings(lines + unfinished, QUICK)
    assert tuning.chosen == {settings[0]: 1, settings[3]: 1}
    assert (tuning.num_cells, tuning.num_at_end) == (2, 1)
