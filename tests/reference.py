"""PISA, SISA and NSISA written a second time, straight from the paper, to check the package against.

NumPy, float64, one process, all workers in a list, and the absolute form: every worker stores its own w_i, and
the consensus is a weighted average. Nothing here is imported from `pisa_dist`.
"""

import numpy as np


def newton_schulz(matrix, *, steps=5):
    """Push the singular values of `matrix` towards 1 with Muon's quintic iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


def orthogonalized(tensor):
    """Newton-Schulz of a matrix or, flattened to [out, rest], of a convolution; scaled for tall matrices."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    rows, columns = matrix.shape
    return (np.sqrt(max(1.0, rows / columns)) * newton_schulz(matrix)).reshape(tensor.shape)


class Reference:
    """m workers that agree on one list of tensors.

    Args:
        weights: list of arrays, w at the start; every worker begins there with dual 0.
        scheme: "identity", "adagrad", "rmsprop", "adam" or "nsisa".
        worker_weights, penalties, preconditioner_scales: one number for each worker.
        preconditioner_bound: eta of the second moment, so of the SISA step alone under "nsisa".
        sisa_tensors: under "nsisa", the positions of the matrices that take the adam step all the same.
    """

    def __init__(
        self,
        weights,
        scheme,
        *,
        worker_weights,
        penalties,
        preconditioner_scales,
        consensus_l2=0.0,
        penalty_growth=1.0,
        penalty_growth_interval=1,
        second_moment_decay=0.999,
        preconditioner_bound=np.inf,
        eps=1e-8,
        momentum=0.95,
        sisa_tensors=(),
    ):
        self.weights = [np.array(w, dtype=np.float64) for w in weights]
        self.scheme = scheme
        self.worker_weights = np.asarray(worker_weights, dtype=np.float64) / np.sum(worker_weights)
        self.penalties = np.asarray(penalties, dtype=np.float64)
        self.preconditioner_scales = np.asarray(preconditioner_scales, dtype=np.float64)
        self.consensus_l2 = consensus_l2
        self.penalty_growth, self.penalty_growth_interval = penalty_growth, penalty_growth_interval
        self.decay, self.bound, self.eps = second_moment_decay, preconditioner_bound, eps
        self.momentum, self.sisa_tensors = momentum, sisa_tensors
        self.num_steps = 0
        zeros = [[np.zeros_like(w) for w in self.weights] for _ in self.worker_weights]
        self.duals = zeros
        self.second_moments = [[z.copy() for z in worker] for worker in zeros]
        self.momenta = [[z.copy() for z in worker] for worker in zeros]
        self.local_weights = [[w.copy() for w in self.weights] for _ in self.worker_weights]

    def _direction_and_preconditioner(self, i, k, gradient):
        """pi_i + g_i (NSISA: pi_i + o_i) and the diagonal of Q_i, for tensor k of worker i."""
        if self.scheme == "nsisa" and gradient.ndim >= 2 and k not in self.sisa_tensors:
            self.momenta[i][k] = self.momentum * self.momenta[i][k] + gradient
            d = self.duals[i][k] + orthogonalized(gradient + self.momentum * self.momenta[i][k])
            return d, np.abs(d) + self.eps
        d = self.duals[i][k] + gradient
        if self.scheme == "identity":
            return d, np.ones_like(d)
        n, m = np.minimum(d**2, self.bound**2), self.second_moments[i][k]
        m = m + n if self.scheme == "adagrad" else self.decay * m + (1 - self.decay) * n
        self.second_moments[i][k] = m
        if self.scheme in ("adam", "nsisa"):
            m = m / (1 - self.decay**self.num_steps)
        return d, np.sqrt(m) + self.eps

    def step(self, gradients, *, lr=1.0):
        """One iteration, from gradients[i][k], the gradient of worker i at `self.weights` for tensor k."""
        growth = self.penalty_growth ** (self.num_steps // self.penalty_growth_interval)
        sigmas = self.penalties * growth / lr
        rhos = self.preconditioner_scales / lr
        self.num_steps += 1
        for k, w in enumerate(self.weights):
            total = np.zeros_like(w)
            for i, (alpha, sigma, rho) in enumerate(zip(self.worker_weights, sigmas, rhos, strict=True)):
                d, q = self._direction_and_preconditioner(i, k, np.asarray(gradients[i][k]))
                self.local_weights[i][k] = w - d / (sigma + rho * q)
                self.duals[i][k] = self.duals[i][k] + sigma * (self.local_weights[i][k] - w)
                total = total + alpha * (sigma * self.local_weights[i][k] + self.duals[i][k])
            self.weights[k] = total / (self.worker_weights @ sigmas + self.consensus_l2)
        return self.weights
