"""What does the training loop cost over a bare step?

    python benchmarks/speed.py                      the digits
    python benchmarks/speed.py --n-feat 32 --image-size 32 --steps 10

Bare: forward, backward and optimizer step of the same network on fixed tensors. Loop:
superminddpm.train, by the images a second that it reports. The two take turns nine
times in one process, and the medians are compared. Without a GPU, one thread is used
and its CPU time counts, so that other programs disturb less. All options of
superminddpm.py are understood; --steps is the length of a turn (default 100).
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import superminddpm as base


def bare_rate(cfg):
    """Return the images a second of forward, backward and step on fixed tensors."""
    device, _, _ = base.join_processes()
    images = base.load_images(cfg)[0][: cfg.batch].to(device)
    ddpm = base.build(cfg, images.shape[1:]).to(device)
    opt = torch.optim.AdamW(ddpm.parameters(), cfg.lr, betas=(0.9, 0.99), fused=True)
    x0 = images / 127.5 - 1
    t = torch.randint(1, cfg.T + 1, (cfg.batch,), device=device)
    eps = torch.randn_like(x0)
    start = base.time.perf_counter()
    for _ in range(cfg.steps):
        loss = ddpm(x0, t, eps)
        opt.zero_grad()
        loss.backward()
        opt.step()
    loss.item()  # waits for the GPU
    return cfg.steps * cfg.batch / (base.time.perf_counter() - start)


def loop_rate(cfg):
    """Return the images a second that superminddpm.train reports of itself."""
    with tempfile.TemporaryDirectory() as folder:
        base.train(replace(cfg, out=f"{folder}/run"))
        names, *_, last = Path(folder, "run", "metrics.csv").read_text().splitlines()
    return float(last.split(",")[names.split(",").index("images_per_s")])


def main():
    cfg = base.parse(sys.argv[1:])
    cfg = replace(cfg, steps=cfg.steps or 100, quiet=True, sample_every=10**6)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        base.time = SimpleNamespace(perf_counter=time.process_time)
    bare_rate(cfg)  # the first turn allocates memory and chooses kernels
    pairs = [(bare_rate(cfg), loop_rate(cfg)) for _ in range(9)]
    bare, loop = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    costs = sorted(100 * (bare / loop - 1) for bare, loop in pairs)
    size = f"{cfg.image_size}x{cfg.image_size}"
    print(f"{cfg.data} {size}, n-feat {cfg.n_feat}, batch {cfg.batch}")
    print(f"bare {bare:.0f} images/s, loop {loop:.0f} images/s")
    print(f"cost {statistics.median(costs):.1f} % ({costs[0]:.1f} to {costs[-1]:.1f})")


if __name__ == "__main__":
    main()
