"""What does group L1 cost?  On the CPU, beside a training step of the same network.

    python benchmarks/reg_cost.py

Times, in turn and many times over, a bare step (forward, backward, Adam) on 32x32 at
n-feat 32 and batch 64, the penalty with its backward pass, and the proximal step.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import superreg


def main(turns=20):
    ddpm = superreg.build(superreg.Config(n_feat=32), (1, 32, 32))
    opt = torch.optim.Adam(ddpm.parameters(), betas=(0.9, 0.99), fused=True)
    x0, eps = torch.randn(2, 64, 1, 32, 32)
    t = torch.randint(1, ddpm.T + 1, (64,))

    def step():
        opt.zero_grad()
        ddpm(x0, t, eps).backward()
        opt.step()

    parts = {
        "bare step": step,
        "penalty": lambda: superreg.filter_norms(ddpm.net).sum().backward(),
        "proximal step": lambda: superreg.proximal_step(ddpm.net, opt, 5e-5, 10),
    }
    seconds = {name: [] for name in parts}
    for _ in range(turns):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(all_) for name, all_ in seconds.items()}
    for name, median in middle.items():
        share = median / middle["bare step"]
        print(f"{name:14} {1000 * median:8.2f} ms  {share:7.2%}")


if __name__ == "__main__":
    main()
