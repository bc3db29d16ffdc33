"""The untuned PISA: what it sets, and that the scale of the loss does not matter to it."""

import numpy as np
import pytest
import torch
from problems import make_trainer
from test_baselines import Quadratics, run, some

from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.algorithms.pisa_auto import FIRST_PENALTY, LAST_PENALTY


def test_it_is_pisa_local_whose_penalty_grows_over_the_run():
    rounds = 12
    growth = (LAST_PENALTY / FIRST_PENALTY) ** (1 / (rounds - 1))
    by_hand = ALGORITHMS["pisa_local"](penalty=FIRST_PENALTY / 0.5, penalty_growth=growth)
    problem = Quadratics()
    found = run(ALGORITHMS["pisa_auto"](lr=0.5), problem, rounds, present=some)
    np.testing.assert_allclose(found, run(by_hand, problem, rounds, present=some), rtol=1e-9)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_scale_of_the_loss_does_not_matter(factor):
    """Penalty and duals are in units of the gradient, which is measured."""
    problem, scaled = Quadratics(), Quadratics()
    scaled.hessians = factor * scaled.hessians
    plain = run(ALGORITHMS["pisa_auto"](), problem, 30, present=some)
    assert np.abs(plain[-1] - problem.start).max() > 0.1
    np.testing.assert_allclose(run(ALGORITHMS["pisa_auto"](), scaled, 30, present=some), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("local_steps", [1, 10])
def test_it_trains_one_class_per_worker_with_its_default(local_steps):
    trainer = make_trainer(
        ALGORITHMS["pisa_auto"](), rounds=60, local_steps=local_steps, participation=0.67, dtype=torch.float32
    )
    accuracies = [metrics["test_accuracy"] for _, _, metrics in trainer.run() if metrics]
    assert accuracies[-1] > 0.68  # AdamW with everyone present ends at 0.78
