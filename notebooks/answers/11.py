"""The right answers of lesson 11. (The folded solutions in it explain them.)"""

import torch
from torch import nn

x, shift = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 1, 1)
norm = nn.GroupNorm(8, 8)

ANSWERS = {
    "11.1": {
        "want": next(n for n in range(1, 99) if 2 * n + 2 >= 31),
        "hint": "the opposite corner is 31 pixels away; how far do n blocks see?",
    },
    "11.2": {
        "want": (128**2 / 64**2, 128**2 * 4**2 / (64**2 * 8**2)),
        "hint": "a b k^2 weights, used once for each pixel; answer with a pair",
    },
    "11.3": {
        "want": not torch.allclose(norm(x + shift), norm(x), atol=1e-4),
        "hint": "each channel is a group, and its mean is subtracted",
    },
    "11.4": {
        "want": lambda ratio: 0.5 < ratio < 2,
        "hint": "which levels should the bit tell apart from t = 950?",
    },
}
