"""The right answers of lesson 08. (The folded solutions in it explain them.)"""

import math

import torch

from superobjective import Config, weight_of_eps


def gives_x0(f):
    """Return whether f(v, xt, ab) is the image."""
    x0, eps = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    ab = torch.tensor(0.3).double()
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    return torch.allclose(f(ab.sqrt() * eps - (1 - ab).sqrt() * x0, xt, ab), x0)


def weight_of_v(snr):
    """Return the weight that the script's Min-SNR gives the squared error of v."""
    snr = torch.tensor(snr)
    return (weight_of_eps(Config(objective="v"), snr) * snr / (snr + 1)).item()


ANSWERS = {
    "08.1": {"want": gives_x0, "hint": "turn the circle back"},
    "08.2": {
        "want": weight_of_v(15.0),
        "hint": "min(S, gamma) is for x0; an error of v is S + 1 times that of x0",
    },
    "08.3": {"want": 1, "hint": "the loss of v is (S + 1) / S times that of eps"},
    "08.4": {
        "want": lambda ratio: 1.15 < ratio < 1.7,
        "hint": "x0_error(...)[1][0] of the new arm over found['eps'][0, 0]",
    },
    "08.5": {
        "want": 1 / math.cos(1.45),
        "hint": "with eps_hat = 0, y = x / cos(phi) never changes",
    },
}
