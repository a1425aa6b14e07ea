"""The right answers of lesson 10. (The folded solutions in it explain them.)"""

import numpy as np
import torch


def is_beta_tilde(f):
    """Return whether f(ab, ab_s) is sigma^2 of DDIM with eta 1."""
    ab, ab_s = torch.tensor([0.1, 0.5]), torch.tensor([0.3, 0.99])
    sigma = ((1 - ab_s) / (1 - ab) * (1 - ab / ab_s)).sqrt()
    return torch.allclose(f(ab, ab_s), sigma**2)


def error_of(times, m=0.6, b=0.15):
    """Return the error of DDIM at these times on the lesson's pixel of two bumps."""
    abar = np.cumprod([1, *(1 - np.linspace(1e-4, 0.02, 1000))])
    x = torch.special.ndtri((torch.arange(500).double() + 0.5) / 500).numpy()
    line = np.linspace(-4, 4, 400_001)

    def below(x, ab):
        side = np.stack([x + ab**0.5 * m, x - ab**0.5 * m]) / V(ab) ** 0.5
        return torch.special.ndtr(torch.from_numpy(side)).mean(0).numpy()

    def V(ab):
        return ab * b**2 + 1 - ab

    exact = np.interp(below(x, abar[1000]), below(line, 1.0), line)
    for t, s in zip(times, times[1:], strict=False):
        ab, ab_s = abar[t], abar[s]
        pull = np.tanh(ab**0.5 * m * x / V(ab))
        x0 = (ab**0.5 * b**2 * x + (1 - ab) * m * pull) / V(ab)
        eps = (x - ab**0.5 * x0) / (1 - ab) ** 0.5
        x = ab_s**0.5 * x0 + (1 - ab_s) ** 0.5 * eps
    return np.sqrt(np.mean((x.clip(-1, 1) - exact.clip(-1, 1)) ** 2))


def are_good(times):
    """Return whether eleven falling times from 1000 to 0 have an error below 0.045."""
    falling = all(t > s for t, s in zip(times, times[1:], strict=False))
    ends = (times[0], times[-1]) == (1000, 0)
    return len(times) == 11 and ends and falling and error_of(times) < 0.045


ANSWERS = {
    "10.1": {
        "want": 0.8 * (1 - 0.75**0.5 * 0.8) / 0.5 + 0.6 * 0.8,
        "hint": "first x0_hat from x_t and eps_hat, then x_s from both",
    },
    "10.2": {"want": 16, "hint": "two evaluations a step; and the last?", "tol": 0},
    "10.3": {"want": is_beta_tilde, "hint": "beta-tilde, with the beta of a long step"},
    "10.4": {
        "want": are_good,
        "hint": "eleven times from 1000 to 0; one long step where paths are straight",
    },
}
