"""When does a network begin to copy its training images?

    python benchmarks/copying.py        everything; about 20 minutes on one core

Trains the base on 25, 50, 100, 400 and all 1,438 of the training digits, at a constant
learning rate, and looks at it after 50 steps, 71, 100 ...: at 200 digits drawn from the
averaged weights, always from the same noise, and at the loss for four noise levels.

 - copies: share of the drawn that are three times nearer to one training digit than to
   all others (Bonnaire et al. 2025, arXiv:2505.17638); tau mem: the step at which
   a twentieth of the drawn are
 - nearer: share nearer to a training digit than 95 % of the held-out digits
 - tau gap: the step at which the loss at t = 250 is a fifth lower on training digits
   than on held-out ones
 - tau gen: the step at which the held-out loss is within a tenth of its lowest
 - far: Frechet distance to all training digits in 16 principal components, over that of
   as many held-out ones
 - alike: correlation of what two networks draw from the same noise, less the mean digit

Seeds differ in their training digits, too, unless n is 1,438. "Again" has the digits of
the arm above, but other seeds. results/copying.txt is the table, results/copying.npz
has the curves and some of the digits for lesson 15.
"""

import copy
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from gauge import flat, net_loss, principal
from measures import frechet
from quality import nearest

from superminddpm import Config, build, load_images, rng

LOOKS = [round(50 * 2 ** (k / 2)) for k in range(14)]
LEVELS = (50, 250, 450, 650)


@dataclass(frozen=True)
class Arm:
    """How networks are trained: for each (p, seed) on the p-th n digits."""

    n: int
    steps: int
    seeds: tuple = ((0, 0), (1, 1), (2, 2))
    n_feat: int = 16
    batch: int = 32


ARMS = {
    "n = 25": Arm(25, 1131),
    "n = 25, again": Arm(25, 1131, ((0, 3), (1, 4), (2, 5))),
    "n = 50": Arm(50, 2263),
    "n = 100": Arm(100, 4525),
    "n = 400": Arm(400, 4525),
    "n = 1438": Arm(1438, 2263),
    "n = 25, batch 8": Arm(25, 1131, batch=8),
    "n = 25, batch 128": Arm(25, 566, batch=128),
    "n = 100, batch 128": Arm(100, 1600, batch=128),
    "n = 25, width 8": Arm(25, 1600, n_feat=8),
    "n = 25, width 32": Arm(25, 566, n_feat=32),
}


def copies(samples, train):
    """Return which rows of samples are copies of a row of train, (N,) bools."""
    first, second = torch.cdist(samples, train).topk(2, largest=False).values.T
    return first < second / 3


def part(images, n, p):
    """Return the p-th n of images, or the first n if there are not 3 n."""
    return images[p * n : (p + 1) * n] if 3 * n <= len(images) else images[:n]


def train(images, looks, seed=0, n_feat=16, batch=32, lr=1e-2):
    """Train on uint8 images at a constant rate; yield (step, average) at looks."""
    torch.manual_seed(seed)
    cfg, g = Config(n_feat=n_feat), rng("cpu", seed, 14)
    ddpm = build(cfg, images.shape[1:])
    ema = copy.deepcopy(ddpm).eval()
    weights, averages = ([w.detach() for w in m.parameters()] for m in (ddpm, ema))
    opt = torch.optim.Adam(ddpm.parameters(), betas=(0.9, 0.99), fused=True)
    for step in range(max(looks)):
        x0 = images[torch.randint(len(images), (batch,), generator=g)] / 127.5 - 1
        t = torch.randint(1, cfg.T + 1, (batch,), generator=g)
        loss = ddpm(x0, t, torch.randn(x0.shape, generator=g))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ddpm.parameters(), cfg.grad_clip)
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / (cfg.warmup + 1))
        opt.step()
        torch._foreach_lerp_(averages, weights, max(1 - cfg.ema_decay, 9 / (10 + step)))
        if step + 1 in looks:
            yield step + 1, ema


def draw(ddpm, n=200):
    """Return n digits (n, 1, 8, 8) in [-1, 1], always from the same noise."""
    return ddpm.sample((n, 1, 8, 8), 20, generator=rng("cpu", 0, 15))


def crossing(steps, values, level):
    """Return the step at which values first pass level upwards; nan if they do not."""
    above = np.asarray(values) >= level
    if not above.any():
        return np.nan
    k = int(above.argmax())
    if k == 0:
        return float(steps[0])
    share = (level - values[k - 1]) / (values[k] - values[k - 1])
    return float(np.exp(np.log(steps[k - 1 : k + 1]) @ (1 - share, share)))


def alike(a, b, mean):
    """Return the mean correlation of rows of a and b, less the row mean."""
    return torch.cosine_similarity(a - mean, b - mean, dim=-1).mean(-1)


class Judge:
    """What is asked of a network at a look; images and held: uint8 digits."""

    def __init__(self, images, held):
        self.held, self.x, self.y = held, flat(images), flat(held)
        self.mean, _, vectors = principal(self.x)
        self.main = vectors[:, -16:].float()
        self.floor = self.distance(self.y[:200])

    def distance(self, x):
        return frechet(*((z @ self.main).numpy() for z in (x, self.x)))

    def __call__(self, ddpm, own):
        """Return the drawn (200, 64) and their numbers; own: what it was trained on."""
        drawn, rows = draw(ddpm).flatten(1), flat(own)
        near = nearest(self.y, rows).quantile(0.05)
        both = own[:200], self.held[:200]
        loss = [net_loss(ddpm, z, t, 1) for z in both for t in LEVELS]
        shares = [copies(drawn, rows), nearest(drawn, rows) < near]
        shares = [z.float().mean().item() for z in shares]
        return drawn, [*shares, self.distance(drawn) / self.floor, *loss]


def run(arm, images, judge):
    """Return the looks (K,), numbers (S, K, 11) and drawn digits (S, K, 200, 64)."""
    looks, numbers, pictures = [k for k in LOOKS if k <= arm.steps], [], []
    for p, seed in arm.seeds:
        own = part(images, arm.n, p)
        course = train(own, looks, seed, arm.n_feat, arm.batch)
        seen = [judge(ddpm, own) for _, ddpm in course]
        pictures.append(torch.stack([drawn for drawn, _ in seen]))
        numbers.append([row for _, row in seen])
    return np.array(looks), np.array(numbers), torch.stack(pictures)


def times(looks, numbers):
    """Return tau mem, tau gap and tau gen of each seed, (S, 3)."""
    found = []
    for own in numbers:
        held = own[:, -4:].mean(-1)
        gap = 1 - own[:, 4] / own[:, 8]
        series = (own[:, 0], 0.05), (gap, 0.2), (-held, -1.1 * held.min())
        found.append([crossing(looks, *one) for one in series])
    return np.array(found)


def report(kept):
    """Return the table of what main() keeps."""
    lines = [
        f"Made by benchmarks/copying.py in {kept['minutes']:.0f} minutes of one core.",
        "Steps of each seed (nan: not reached); copies, nearer and far: at the end.",
        "",
        f"{'':20}{'tau mem':22}{'tau gap':22}{'tau gen':22}copies nearer   far",
    ]
    for name in ARMS:
        numbers = kept[f"{name}: numbers"]
        tau = times(kept[f"{name}: looks"], numbers)
        cells = ["".join(f"{x:6.0f}" for x in own) for own in tau.T]
        end = "".join(f"{x:7.3f}" for x in numbers[:, -1, :3].mean(0))
        lines.append(f"{name:18}" + "".join(f"{cell:22}" for cell in cells) + end)
    lines += ["", f"{'alike, at the end':36}same noise  other noise"]
    for name in (key for key in kept if key.endswith("alike")):
        same, other = kept[name][:, :, -1].mean(1)
        lines.append(f"{name.split(':')[0]:36}{same:10.3f}{other:13.3f}")
    return "\n".join(lines) + "\n"


def main():
    torch.set_num_threads(1)
    images, held = load_images(Config())
    judge, kept, drawn = Judge(images, held), {}, {}
    start = time.process_time()
    for name, arm in ARMS.items():
        looks, numbers, drawn[name] = run(arm, images, judge)
        few = ((drawn[name][:, :, :12] + 1) * 127.5).round().byte().numpy()
        kept |= {f"{name}: looks": looks, f"{name}: pictures": few}
        kept |= {f"{name}: numbers": numbers.astype(np.float32)}
        print(name, *(f"{x:.2f}" for x in numbers[:, -1, 0]), flush=True)
    again = drawn["n = 25"], drawn["n = 25, again"]
    pairs = {"n = 25, same digits, other seed": [*zip(*again, strict=True)]}
    for name in ("n = 25", "n = 50", "n = 100", "n = 400", "n = 1438"):
        pairs[name] = [*itertools.combinations(drawn[name], 2)]
    for name, both in pairs.items():
        found = [
            torch.stack([alike(a, b.roll(shift, 1), judge.mean) for a, b in both])
            for shift in (0, 1)  # the same noise, and other noise
        ]
        kept[f"{name}: alike"] = torch.stack(found).float().numpy()  # (2, pairs, K)
    kept["minutes"] = (time.process_time() - start) / 60
    out = Path(__file__).parent / "results"
    np.savez_compressed(out / "copying.npz", **kept)
    (out / "copying.txt").write_text(report(kept))
    print(report(kept))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
