"""The right answers of lesson 06. (The folded solutions in it explain them.)"""

import torch

from superreg import shrink

FILTERS = torch.randn(61, 2, generator=torch.Generator().manual_seed(0))
FILTERS[-1] = 0


def is_soft_threshold(answer):
    want = shrink(FILTERS, torch.full((61,), 0.7))
    return torch.allclose(answer(FILTERS, 0.7), want, atol=1e-6)


ANSWERS = {
    "06.1": {"want": 0.3, "hint": "first work out tau from eta and lambda"},
    "06.2": {
        "want": is_soft_threshold,
        "hint": "norms over dim=1, kept as a column; what happens where a norm is 0?",
    },
    "06.3": {"want": 1000, "hint": "what is the step size eta in each of the two?"},
    "06.4": {
        "want": 481,
        "hint": "count the exact zeros in each step, then take the maximum",
        "tol": 0.1,
    },
}
