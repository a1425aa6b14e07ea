"""What does group L1 cost?  On the CPU, beside a training step of the same network.

    python benchmarks/reg_cost.py

Times, in turn and many times over, a bare step (forward, backward, AdamW) on 32x32 at
n-feat 32 and batch 64, the penalty with its backward pass, and the proximal step.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import superreg


def main():
    cfg = superreg.Config(n_feat=32, image_size=32)
    ddpm = superreg.build(cfg, (1, 32, 32))
    opt = torch.optim.AdamW(ddpm.parameters(), betas=(0.9, 0.99), fused=True)
    x0 = torch.randn(64, 1, 32, 32)

    def step():
        opt.zero_grad()
        ddpm(x0).backward()
        opt.step()

    parts = {
        "bare step": step,
        "penalty": lambda: superreg.group_l1(ddpm.net).backward(),
        "proximal step": lambda: superreg.proximal_step(ddpm.net, opt, 5e-5, 10),
    }
    seconds = {name: [] for name in parts}
    for _ in range(20):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
    bare = statistics.median(seconds["bare step"])
    for name, all_ in seconds.items():
        median = statistics.median(all_)
        print(f"{name:14} {1000 * median:8.2f} ms  {100 * median / bare:6.2f} %")


if __name__ == "__main__":
    main()
