"""What does the training loop cost over the bare steps?  On the CPU.

    python benchmarks/speed.py                                          the default run
    python benchmarks/speed.py --n-feat 32 --image-size 32 --steps 25
    python benchmarks/speed.py superreg --reg prox                      another script

Runs the train of a script as it is, with a stopwatch round what any training step has:
forward pass, clearing of gradients, backward pass, optimizer step. All else that the
loop does is its cost: picking images, drawing t and noise, clipping gradients,
averaging weights, logging. Both times come from the same steps, so that other programs
disturb both alike. Options are those of the script; 300 steps by default, five times
over.
"""

import importlib
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU works behind the back of a stopwatch

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
base = importlib.import_module(sys.argv.pop(1) if named else "superminddpm")

inside = 0.0  # seconds spent in the calls below the stopwatch


def timed(function):
    """Return function with a stopwatch round it that adds to inside."""

    def call(*args, **options):
        global inside
        start = time.perf_counter()
        result = function(*args, **options)
        inside += time.perf_counter() - start
        return result

    return call


def turn(cfg):
    """Train once; return the seconds a step inside the timed calls, and in all."""
    global inside
    inside = 0.0
    with tempfile.TemporaryDirectory() as folder:
        base.train(replace(cfg, out=f"{folder}/run"))
        names, *_, last = Path(folder, "run", "metrics.csv").read_text().splitlines()
    rate = float(last.split(",")[names.split(",").index("images_per_s")])
    return inside / cfg.steps, cfg.batch / rate


def main():
    cfg = base.parse(sys.argv[1:])
    cfg = replace(cfg, steps=cfg.steps or 300, quiet=True, sample_every=10**6)
    base.held_out_loss = lambda *_: {1: 1.0}  # this and the grid come after the loop
    base.DDPM.sample = lambda self, shape, xt: xt
    base.DDPM.forward = timed(base.DDPM.forward)
    torch.Tensor.backward = timed(torch.Tensor.backward)
    torch.optim.AdamW.zero_grad = timed(torch.optim.AdamW.zero_grad)
    torch.optim.AdamW.step = timed(torch.optim.AdamW.step)
    turns = [turn(cfg) for _ in range(5)]
    costs = [100 * (all_ / bare - 1) for bare, all_ in turns]
    bare, all_ = (
        1000 * statistics.median(seconds) for seconds in zip(*turns, strict=True)
    )
    size = f"{cfg.image_size}x{cfg.image_size}"
    print(f"{base.SCRIPT}: {cfg.data} {size}, n-feat {cfg.n_feat}, batch {cfg.batch}")
    print(f"{bare:.1f} ms a bare step, {all_:.1f} ms with all that the loop does")
    print(
        f"cost {statistics.median(costs):.1f} % ({min(costs):.1f} to {max(costs):.1f})"
    )


if __name__ == "__main__":
    main()
