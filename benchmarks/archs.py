"""What does a network cost, and what does it learn in the same time?  On digits.

    python benchmarks/archs.py --seconds 60

For each --arch of superarch.py: weights, multiply-adds for one image (those of
convolutions, linear layers and attention), milliseconds a training step of 64 images,
and the held-out loss of the averaged weights after a run that fits into so many
seconds of steps. The number of steps follows from the step time, measured before in a
short run; the learning rate falls to 0 over the run, as always. One seed and the
recipe of the base for all of them, which is tuned for the base. Writes
benchmarks/results/archs.txt.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # times are those of a CPU

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import superarch


def run(arch, steps):
    """Train for so many steps; return the seconds a step and the held-out loss."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"sample_every": 10**6, "save_every": 10**6, "quiet": True}
        cfg = superarch.Config(arch=arch, steps=steps, out=f"{folder}/run", **options)
        superarch.train(cfg)
        with open(f"{folder}/run/metrics.csv") as f:
            row = [*csv.DictReader(f)][-1]
    return cfg.batch / float(row["images_per_s"]), float(row["held_loss"])


def main(seconds: float = 60):
    superarch.DDPM.sample = lambda self, shape, xt: xt  # no pictures
    lines = [f"python benchmarks/archs.py --seconds {seconds:g}", ""]
    lines.append(
        f"{'arch':10}{'weights':>10}{'multiply-adds':>15}{'ms a step':>11}"
        f"{'steps':>8}{'held-out loss':>15}"
    )
    print("\n".join(lines))
    for arch in superarch.ARCHS:
        ddpm = superarch.build(superarch.Config(arch=arch), (1, 8, 8))
        with FlopCounterMode(display=False) as counter:
            ddpm.net(torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=torch.int64))
        weights = sum(weight.numel() for weight in ddpm.parameters())
        step, _ = run(arch, 44)
        steps = max(1, round(seconds / step))
        step, loss = run(arch, steps)
        lines.append(
            f"{arch:10}{weights:>10,}{counter.get_total_flops() // 2:>15,}"
            f"{1000 * step:>11.1f}{steps:>8}{loss:>15.4f}"
        )
        print(lines[-1], flush=True)
    results = Path(__file__).parent / "results" / "archs.txt"
    results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
