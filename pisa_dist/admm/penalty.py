"""Penalty schedules: how sigma_i (and with the learning rate rho_i) change from step to step."""

# A learning rate of zero (the start of a warm-up, the end of a cosine) asks for an infinite penalty. This floor
# freezes the weights to rounding and keeps sigma and rho finite in float32, and their ratio, the momentum, intact.
SMALLEST_LR = 1e-30
# Beyond this penalty nothing moves in any float type, and growing further would only overflow.
LARGEST_PENALTY = 1e33


def grown_penalty(penalty: float, *, step: int, growth: float = 1.0, interval: int = 1) -> float:
    """sigma_i after geometric growth.

    PISA, Algorithm 1 (penalty step): sigma_i <- sigma_i / gamma_i, here every `interval` steps. The first step
    uses `penalty` as given, each later one grows it first:
        sigma(t) = penalty * growth ** floor((t - 1) / interval)

    Args:
        penalty: sigma_i of the first step, > 0.
        step: t, counted from 1.
        growth: 1 / gamma_i >= 1; 1 keeps the penalty constant. The paper's range is 1 to 4/3.
        interval: steps from one growth to the next, >= 1.
    """
    exponent = (step - 1) // interval
    try:
        grown = penalty * growth**exponent
    except OverflowError:
        return LARGEST_PENALTY
    return min(grown, LARGEST_PENALTY)


def penalty_at(step: int, *, penalty: float, growth: float, interval: int, lr: float) -> float:
    """sigma_i of a step, or of a round: grown, and divided by the learning rate.

    Args:
        step: t, counted from 1.
        penalty, growth, interval: as in `grown_penalty`.
        lr: as in `divided_by_lr`.
    """
    return divided_by_lr(grown_penalty(penalty, step=step, growth=growth, interval=interval), lr)


def divided_by_lr(coefficient: float, lr: float) -> float:
    """sigma_i or rho_i under a learning rate: the coefficient divided by `lr`.

    1/sigma is the long-run step size, so dividing both sigma and rho by lr multiplies the step by
    lr and leaves the momentum rho Q / (sigma + rho Q) alone: what a learning-rate scheduler means.
    """
    return min(coefficient / max(lr, SMALLEST_LR), LARGEST_PENALTY)
