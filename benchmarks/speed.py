"""What does the training loop cost over a bare step?  python benchmarks/speed.py [--data ...]

Bare: forward, backward, clipping and optimizer step of the same network on fixed tensors. Loop:
superminddpm.train as it is, from the rate that it writes into metrics.csv. Both take
turns in one process, several times; the medians are compared. All options of
superminddpm.py are understood; --steps is the length of a turn.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import superminddpm as base  # noqa: E402  (found only by the line above)


def bare_rate(cfg, steps):
    """Return the images a second of forward, backward and step on fixed tensors."""
    device, _, _ = base.join_processes()
    images = base.load_images(cfg)[0]
    ddpm = base.build(cfg, images.shape[1:]).to(device)
    opt = torch.optim.AdamW(ddpm.parameters(), cfg.lr, betas=(0.9, 0.99), fused=True)
    x0 = images[: cfg.batch].to(device) / 127.5 - 1
    t = torch.randint(1, cfg.T + 1, (cfg.batch,), device=device)
    eps = torch.randn_like(x0)
    for step in range(steps + 5):
        if step == 5:  # the first ones allocate memory and choose kernels
            start = time.perf_counter()
        loss = ddpm(x0, t, eps)
        opt.zero_grad()
        loss.backward()
        opt.step()
    loss.item()  # waits for the GPU
    return steps * cfg.batch / (time.perf_counter() - start)


def loop_rate(cfg):
    """Return the images a second that superminddpm.train reports of itself."""
    with tempfile.TemporaryDirectory() as folder:
        base.train(replace(cfg, out=f"{folder}/run", quiet=True, sample_every=10**6))
        rows = (Path(folder) / "run" / "metrics.csv").read_text().splitlines()
    return float(
        dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))["images_per_s"]
    )


def main():
    cfg = base.parse(sys.argv[1:])
    steps = cfg.steps or 200
    cfg = replace(cfg, steps=steps)
    pairs = [(bare_rate(cfg, steps), loop_rate(cfg)) for _ in range(5)]
    bare, loop = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    costs = sorted(100 * (b / r - 1) for b, r in pairs)
    print(
        f"{cfg.data} {cfg.image_size}x{cfg.image_size}, n-feat {cfg.n_feat}, batch {cfg.batch}"
    )
    print(f"bare {bare:.0f} images/s, loop {loop:.0f} images/s")
    print(
        f"the loop costs {statistics.median(costs):.1f} % (from {costs[0]:.1f} to {costs[-1]:.1f})"
    )


if __name__ == "__main__":
    main()
