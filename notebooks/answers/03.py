"""The right answers of lesson 03. (The folded solutions in it explain them.)"""

import torch

from superminddpm import DDPM

alphabar = DDPM(None, 1000).alphabar


def is_inverse(answer):
    g = torch.Generator().manual_seed(7)
    x0 = 2 * torch.rand(3, 1, 8, 8, generator=g) - 1
    eps, t = torch.randn(x0.shape, generator=g), torch.tensor([10, 200, 600])
    ab = alphabar[t].view(-1, 1, 1, 1)
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    return torch.allclose(answer(xt, eps, t), x0, atol=1e-4)


def share_kept(a, steps):
    """Return the std of DDIM samples over a, for exact guesses of N(0, a^2) data."""
    ab = alphabar.double()[torch.linspace(1000, 0, steps + 1).round().long()]
    before, after = ab[:-1], ab[1:]
    signal = (after * before).sqrt() * a**2 + ((1 - after) * (1 - before)).sqrt()
    return (signal / (before * a**2 + 1 - before)).prod().item() / a


ANSWERS = {
    "03.1": {"want": is_inverse, "hint": "solve Eq. 4 for x_0; Eq. 15 does the same"},
    "03.2": {
        "want": int((alphabar >= 1 / (1 + 0.3**2)).sum()) - 1,
        "hint": "1 / (1 + SNR) is one half where the SNR is 1; search ddpm.alphabar",
        "tol": 0,
    },
    "03.3": {
        "want": next(n for n in range(1, 200) if share_kept(0.3, n) >= 0.95),
        "hint": "try shrink with n = 1, 2, ... steps and a = 0.3, a float64 tensor",
        "tol": 0,
    },
    "03.4": {
        "want": 1.0,
        "hint": "sample 256 images in 10 steps with each of the two networks",
        "tol": 0.08,
    },
}
