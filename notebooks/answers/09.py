"""The right answers of lesson 09. (The folded solutions in it explain them.)"""

import torch

from superguide import Config, build, condition


def leads_away(f):
    """Return whether f(eps_n, eps_y, w) leads from the label n to y, and beyond it."""
    n, y = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(1))
    return torch.allclose(f(n, y, 3.0), 3 * y - 2 * n, atol=1e-5)


def evaluations(steps, w):
    """Return how often the script evaluates its network for one image."""
    ddpm, seen = build(Config(), (1, 8, 8)), []
    ddpm.net.register_forward_hook(lambda net, args, out: seen.append(len(out)))
    condition(ddpm, [3], w)
    ddpm.sample((1, 1, 8, 8), steps=steps)
    return sum(seen)


ANSWERS = {
    "09.1": {"want": 3, "hint": "in our formula the factor of eps_c is w"},
    "09.2": {"want": leads_away, "hint": "guidance, with eps_n in the place of eps_u"},
    "09.3": {
        "want": lambda n: n == evaluations(50, 3.0),
        "hint": "each step needs eps_u and eps_c",
    },
    "09.4": {
        "want": lambda share: 0.2 < share < 0.65,
        "hint": "the second value that draw(...) returns, with w = 1",
    },
    "09.5": {
        "want": 33,
        "hint": "one more evaluation in each step of the window: count these steps",
        "tol": 0,
    },
}
