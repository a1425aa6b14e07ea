"""What does a network cost, and what does it learn for that?  On the digits, on a CPU.

    python benchmarks/archs.py

For every --arch of superarch.py, and for attention also with its attention taken out:
weights; multiply-adds for one image (those of convolutions, linear layers and
attention); milliseconds per training step of 128 images, of processor time on one
thread; and the held-out loss of the averaged weights, twice: at equal steps, and at
equal time, where a network makes as many steps as fit into the time that base takes for
all of its own. Images, order, t and noise are the same for all at the same step of the
same seed. The recipe is base's own, tuned for base: a network that loses may want
another one. Writes benchmarks/results/archs.txt.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # times are those of a CPU

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import superarch
from superarch import ARCHS, Config, build

widths, blocks, _ = ARCHS["attention"]
ARCHS["without attention"] = widths, blocks, ()
ARMS = ["base", "naive", *ARCHS]


def make(arm):
    return build(Config(arch=arm), (1, 8, 8))


def multiply_adds(ddpm):
    # in a fused kernel the counter does not see attention's products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ddpm.net(torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=torch.int64))
    return counter.get_total_flops() // 2


def time_steps(rounds=8, n=6):
    """Return {arm: seconds a step}, the median of rounds in which all take turns."""
    made, times = {}, {arm: [] for arm in ARMS}
    for arm in ARMS:
        ddpm = make(arm)
        made[arm] = ddpm, torch.optim.Adam(ddpm.parameters(), fused=True)
    x0, eps = torch.randn(2, Config.batch, 1, 8, 8)
    t = torch.randint(1, Config.T + 1, (Config.batch,))
    for _ in range(rounds):
        for arm, (ddpm, opt) in made.items():
            start = time.process_time()
            for _ in range(n):
                loss = ddpm(x0, t, eps)
                opt.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(ddpm.parameters(), 1.0)
                opt.step()
            times[arm].append((time.process_time() - start) / n)
    return {arm: sorted(values)[rounds // 2] for arm, values in times.items()}


def train(arm, steps, seed):
    """Return the held-out loss of a run."""
    with tempfile.TemporaryDirectory() as out:
        options = {"arch": arm, "steps": steps, "seed": seed, "every": 10**6}
        superarch.train(Config(out=out, quiet=True, **options))
        history = superarch.read_checkpoint(f"{out}/last.pt")["history"]
    return history[-1]["held_loss"]


def main(steps: int = 1980, seeds: int = 2):
    if min(steps, seeds) < 1:
        raise ValueError("--steps and --seeds are 1 or more")
    torch.set_num_threads(1)
    superarch.save_grid = lambda *_: None  # no pictures
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
    for arm in ARMS:
        ddpm, fits = make(arm), round(seconds / times[arm])
        cells = {}
        for n in {steps, fits}:  # base: one and the same
            losses = torch.tensor([train(arm, n, seed) for seed in range(seeds)])
            cells[n] = f"{losses.mean():.4f} ({losses.max() - losses.min():.4f})"
        weights = sum(weight.numel() for weight in ddpm.parameters())
        lines.append(
            f"{arm:18}{weights:>8,}{multiply_adds(ddpm):>15,}{1000 * times[arm]:>11.1f}"
            f"{cells[steps]:>20}{fits:>19}{cells[fits]:>18}"
        )
        print(lines[-1], flush=True)
    results = Path(__file__).parent / "results" / "archs.txt"
    results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"archs.py: {error}")
