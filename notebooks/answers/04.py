"""The right answers of lesson 04. (The folded solutions in it explain them.)"""

import math

import torch

from supercurriculum import DDPM, Config, stage_density

ddpm, small = DDPM(None), DDPM(None, T=200)
beta = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)]).double()
linear = (1 - beta).cumprod(0)  # the betas of the DDPM paper
for abar, t in ((ddpm.alphabar, 774), (linear, 457)):  # an edge means the same in both
    p = stage_density(Config(stage_axis="logsnr"), abar)[1]
    assert int(p.nonzero()[0]) + 1 == t
    assert abs(abar[t] / (1 - abar[t]) / math.exp(-2) - 1) < 0.02

ANSWERS = {
    "04.1": {
        "want": int((stage_density(Config(T=200), small.alphabar)[2] > 0).sum()),
        "hint": "the smallest and the largest t are both included",
        "tol": 0,
    },
    "04.2": {
        "want": math.exp(-2),
        "hint": "log is the natural logarithm",
        "tol": 0.03,
    },
    "04.3": {
        "want": float((ddpm.alphabar > 0.5).sum()) / 1000,
        "hint": "which alphabar has an SNR of 1? Find it in the tensor alphabar",
        "tol": 0.02,
    },
    "04.4": {
        "want": 0.12,
        "hint": "the mean over seeds and noise levels, after 3000 steps",
        "tol": 0.06,
    },
}
