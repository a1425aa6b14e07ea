"""What does a network cost, and what does it learn from it?  On the digits, on a CPU.

    python benchmarks/archs.py

For every --arch of superarch.py, and for attention also with its attention taken out:
weights; multiply-adds for one image (those of convolutions, linear layers and
attention); milliseconds a training step of 64 images, of processor time on one thread;
and the held-out loss of the averaged weights, twice: at equal steps, and at equal time,
where a network makes as many steps as fit into the time that base takes for all of its
own. Same images, order, t and noise for all, at the same step of the same seed. The
recipe is base's own, tuned for base: a network that loses may want another one. Writes
benchmarks/results/archs.txt.
"""

import csv
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # times are those of a CPU

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import superarch

ARMS = {arch: {"arch": arch} for arch in superarch.ARCHS}
ARMS["without attention"] = {"arch": "attention", "attend": "none"}


def make(options):
    return superarch.build(superarch.Config(**options), (1, 8, 8))


def multiply_adds(ddpm):
    with FlopCounterMode(display=False) as counter:
        ddpm.net(torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=torch.int64))
    return counter.get_total_flops() // 2


def time_steps(rounds=8, n=6):
    """Return {arm: seconds a step}, the median of rounds in which all take turns."""
    made, times = {}, {arm: [] for arm in ARMS}
    for arm, options in ARMS.items():
        ddpm = make(options).train()
        made[arm] = ddpm, torch.optim.AdamW(ddpm.parameters(), fused=True)
    x0 = torch.randn(64, 1, 8, 8)
    for _ in range(rounds):
        for arm, (ddpm, opt) in made.items():
            start = time.process_time()
            for _ in range(n):
                loss = ddpm(x0)
                opt.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(ddpm.parameters(), 1.0)
                opt.step()
            times[arm].append((time.process_time() - start) / n)
    return {arm: sorted(values)[rounds // 2] for arm, values in times.items()}


def train(options, steps, seed):
    """Return the held-out loss of a run."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"sample_every": 10**6, "save_every": 10**6, "quiet": True, **options}
        out = f"{folder}/run"
        superarch.train(superarch.Config(steps=steps, seed=seed, out=out, **options))
        with open(f"{out}/metrics.csv") as f:
            return float([*csv.DictReader(f)][-1]["held_loss"])


def main(steps: int = 825, seeds: int = 2):
    torch.set_num_threads(1)
    superarch.DDPM.sample = lambda self, shape, xt: xt  # no pictures
    superarch.plot_history = lambda history, path: None
    times = time_steps()
    seconds = steps * times["base"]
    lines = [
        f"python benchmarks/archs.py --steps {steps} --seeds {seeds}",
        f"equal time is {seconds:.0f} s; held-out loss: mean of {seeds} seeds, and the",
        "distance of the highest from the lowest",
        "",
        f"{'arch':18}{'weights':>8}{'multiply-adds':>15}{'ms a step':>11}"
        f"{'equal steps: loss':>20}{'equal time: steps':>19}{'loss':>18}",
    ]
    print("\n".join(lines))
    for arm, options in ARMS.items():
        ddpm, fits = make(options), round(seconds / times[arm])
        told = {}
        for n in {steps, fits}:  # base: one and the same
            losses = torch.tensor([train(options, n, seed) for seed in range(seeds)])
            told[n] = f"{losses.mean():.4f} ({losses.max() - losses.min():.4f})"
        weights = sum(weight.numel() for weight in ddpm.parameters())
        lines.append(
            f"{arm:18}{weights:>8,}{multiply_adds(ddpm):>15,}{1000 * times[arm]:>11.1f}"
            f"{told[steps]:>20}{fits:>19}{told[fits]:>18}"
        )
        print(lines[-1], flush=True)
    results = Path(__file__).parent / "results" / "archs.txt"
    results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
