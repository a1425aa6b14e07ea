"""Which way to keep clean channels for the fine feature does it, and at what price?

    python benchmarks/who.py                      64 channels; 4 minutes of one core
    python benchmarks/who.py --cases 128 3000 --out runs/who    another width

A hard mask, with births by gradient or at random; weak channels that are redrawn; a
small start, from which dormant channels are said to wake in order (Kunin et al. 2025,
arXiv:2506.06489): all against nothing, on the toy of notebooks/toy.py, t uniform. As
that theory is one of gradient flow, SGD trains the starts as well. Learning rates and
seeds are chosen as in benchmarks/toy.py. notebooks/predictions.md says what was
expected before the first run.

results/who.jsonl has a line for each finished (arm, width, steps, rate), and a run that
was interrupted goes on from it. results/who.txt is the table.
"""

import json
import math
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from scipy.stats import t as student

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "notebooks"), str(HERE)]
import toy as lab
from clock import half_time

bench = SimpleNamespace(**runpy.run_path(str(HERE / "toy.py")))


# ---- Arms ----------------------------------------------------------------------------
class SGD:
    """Gradient descent, with the methods of lab.Adam."""

    def __init__(self, rows):
        pass

    def step(self, rows, grad, lr):
        """Change rows in place; return the step for a unit of gradient."""
        rows -= lr * grad
        return lr

    def reset(self, which):
        """Forget nothing: there is no past."""


ARMS = {
    "nothing": lab.Arm(),
    "mask-gradient": lab.Arm(regrow="gradient"),
    "mask-random": lab.Arm(regrow="random"),
    "redraw": lab.Arm(redraw=True),
    "small-0.1": lab.Arm(init=0.1),
    "small-0.01": lab.Arm(init=0.01),
    "sgd": lab.Arm(optimizer=SGD),
    "sgd-small-0.1": lab.Arm(init=0.1, optimizer=SGD),
    "sgd-small-0.01": lab.Arm(init=0.01, optimizer=SGD),
}
RATES = {lab.Adam: [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2], SGD: [0.1, 0.2, 0.4, 0.8, 1.6]}
PAIRS = [(arm, "nothing") for arm in [*ARMS][1:6]]
PAIRS += [(arm, "mask-gradient") for arm in [*ARMS][2:6]]
PAIRS += [(arm, "sgd") for arm in [*ARMS][7:]]
COLUMNS = {"excess": 3, "R2": 3, "mixed": 2, "T2": 0}  # and their digits
AGES = (0, 5, 20, 50, 100, 300)  # steps after a birth


@dataclass(frozen=True)
class Options:
    """What to run."""

    seeds: int = 16  # paired seeds of the table
    tuning_seeds: int = 8  # other seeds, which choose the learning rate
    cases: tuple[tuple[int, int], ...] = ((64, 3000),)
    """hidden channels and steps of 128 samples, in pairs"""
    out: Path = HERE / "results"


# ---- Measures ------------------------------------------------------------------------
def gradient(nets, xt, t, eps):
    """Return dLoss/drows (S, H, n), the loss being the mean squared error of eps."""
    nets.rows.requires_grad_()
    loss = (nets(xt, t) - eps).square().mean((1, 2)).sum()
    (grad,) = torch.autograd.grad(loss, nets.rows)
    nets.rows.requires_grad_(False)
    return grad


def newborn_to_old(nets, stage, batch):
    """Return newborn channels over those born before, means of four sizes, (S, 4).

    What a channel adds to eps_hat (root mean square); the norms of the gradient at its
    incoming weights (W1, U, b), at its outgoing ones (W2), and at all of its row.
    """
    grad = gradient(nets, *batch)
    output = nets.hidden(*batch[:2]).square().mean(1).sqrt() * nets.W2.norm(dim=-1)
    parts = [grad[..., : nets.n_in], grad[..., nets.n_in :], grad]
    sizes = torch.stack([output, *(part.norm(dim=-1) for part in parts)], -1)
    new, old = nets.birth == stage, (nets.birth >= 0) & (nets.birth < stage)
    mean = [(sizes * who[..., None]).sum(1) / who.sum(1)[:, None] for who in (new, old)]
    return mean[0] / mean[1]


class Watch:
    """What is seen of a run.  looks: (L,) steps; norms: (L, S, H) of the rows; risk:
    (L, S, 2) of M1 and M2, mean over t; ratios: {(stage, age): newborn_to_old}.
    """

    def __init__(self, toy, steps, n_looks=50):
        self.looks = np.unique(np.geomspace(1, steps, n_looks).round().astype(int))
        self.toy, self.norms, self.risk, self.ratios = toy, [], [], {}
        t = lab.TMIN + (1 - lab.TMIN) * (torch.arange(2048) + 0.5) / 2048
        xt, t, eps = lab.probe(toy, t, 2048, 0, 7)
        self.batch = xt, t, eps
        births = np.add(lab.stage_ends(steps)[:-1], lab.WINDOW)
        self.ages = {
            birth + age: (stage, age)
            for stage, birth in enumerate(births, 1)
            for age in AGES
            if birth + age < [*births, steps][stage]
        }

    def __call__(self, step, nets):
        if step in self.looks:
            self.norms.append(nets.rows.norm(dim=-1))
            self.risk.append(lab.excess(nets, self.toy, n=128).mean(1)[:, :2])
        if step in self.ages and (nets.mask.min() == 0 or nets.birth.max() > 0):
            stage, _ = self.ages[step]
            ratio = newborn_to_old(nets, stage, self.batch)
            self.ratios[self.ages[step]] = ratio


def known(risk, toy):
    """Return the shares of M1 and M2 that are known: 0 at eps_hat = x_t, 1 is Bayes."""
    return 1 - risk / lab.excess(lambda xt, t: xt, toy, n=128).mean(1)[:, :2]


def by_wake(wake, rises, toy):
    """Return who wakes when, and for what.  wake: (S, H) steps; rises: serves(...).

    early, late: M2's share in what the channels contribute, of the earlier and of the
    later half of those that serve a feature, (S,). wake_M1, wake_M2: the median step of
    those that serve that feature alone, (S,). wake: 10, 50 and 90 % of all, (3,).
    """
    serve = rises / toy.linear_excess(torch.tensor([0.7, 0.3])).diagonal().float()
    hurts, shares = serve > 0.01, []
    for s, some in enumerate(hurts.any(-1)):
        order = wake[s, some].argsort(stable=True)
        halves = serve[s, some].clamp(min=0)[order].tensor_split(2)
        sums = torch.stack([half.sum(0) for half in halves])
        shares.append(sums[:, 1] / sums.sum(1))
    values = dict(zip(("early", "late"), torch.stack(shares, 1), strict=True))
    for j in (0, 1):
        own = wake.where(hurts[..., j] & ~hurts[..., 1 - j], math.nan)
        values[f"wake_M{j + 1}"] = own.nanmedian(1).values
    q = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return values | {"wake": wake[hurts.any(-1)].double().quantile(q)}


def measure(arm, nets, watch):
    """Return all measures of trained Nets, lists over seeds if not said otherwise."""
    toy, looks, steps = watch.toy, watch.looks, int(watch.looks[-1])
    values = bench.measure(nets, lab.excess(nets, toy), toy)
    norms, risk = torch.stack(watch.norms), torch.stack(watch.risk)
    linear = toy.linear_excess(lab.GRID).mean(0).float()[:2]
    for name, curve in (("T", 1 - risk / linear), ("K", known(risk, toy))):
        for j, time_ in enumerate(half_time(looks, curve).unbind(-1), 1):
            values[f"{name}{j}"] = time_.nan_to_num(nan=steps)
    if arm.init < 1:
        wake = half_time(looks, norms / norms[-1])
        values |= by_wake(wake, lab.serves(nets, toy), toy)
    if watch.ratios:
        ratios = [watch.ratios.get((s, age)) for s in range(1, 5) for age in AGES]
        shape = (4, len(AGES), 4)  # stage, age, newborn_to_old: means over seeds
        none = torch.full((len(nets.rows), 4), math.nan)
        found = torch.stack([none if r is None else r for r in ratios])
        values["newborn"] = found.mean(1).reshape(shape)
    return values


def utility(toy, feature, n=20_000, starts=16):
    """Return how fast a dormant channel can grow: d ln |row| / d (lr x steps) at best.

    A channel W2 relu(w u), of which all weights are small, adds next to nothing, so the
    error is r = x_t - eps. Gradient flow makes it grow at twice its utility
    -2/d E[(r W2) relu(w u)], where |row| = 1, and turns it to where that is largest
    (Kunin et al.). feature: 0 or 1, M1 or M2, to which r is restricted.
    """
    t = lab.TMIN + (1 - lab.TMIN) * (torch.arange(n) + 0.5) / n
    xt, t, eps = lab.probe(toy, t, n, 0, 8)
    u = torch.cat([xt, lab.embed(t), torch.ones_like(t)[..., None]], -1)[0]
    r = (xt - eps)[0] @ (toy.M1, toy.M2)[feature]
    w = torch.randn(u.shape[1], starts, generator=lab.rng(0, 9))
    for _ in range(200):
        w = w / w.norm(dim=0)
        h = torch.relu(u @ w)
        slope = r.T @ h / n
        size = slope.norm(dim=0)  # the best W2 points to -slope
        w = w + 0.2 / size.max() / n * u.T @ ((h > 0) * (r @ (slope / size)))
    return 2 * size.max().item() / toy.d  # |w| = |W2| = 1 / sqrt 2


# ---- Runs ----------------------------------------------------------------------------
def run(opt, part, name, H, steps, lr, done, path):
    """Return the measures of an arm, from done or by training it."""
    first, n = (bench.TUNING, opt.tuning_seeds) if part == "tune" else (0, opt.seeds)
    key = (part, name, H, lr, steps, n)
    if key not in done:
        toy, start, arm = lab.Toy(), time.process_time(), ARMS[name]
        watch = Watch(toy, steps) if part == "final" else None
        nets = lab.train(arm, toy, range(first, first + n), H, steps, lr, watch)
        values = measure(arm, nets, watch) if watch else {}
        values |= {"excess": lab.excess(nets, toy).sum(-1).mean(1)}
        line = dict(zip(bench.KEY, key, strict=True)) | bench.listed(values)
        line["seconds"] = round(time.process_time() - start, 1)
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
        done[key] = line
        mean = np.mean(line["excess"])
        print(f"{part} {name} H={H} lr={lr:g}: excess {mean:.4f}", flush=True)
    return done[key]


def verdict(a, b, n=1):
    """Return mean, low and high of a - b over paired seeds, and less, more or tied.

    The interval is Student's t at 5 %, Bonferroni's for n comparisons; tied: it has 0.
    """
    off = np.subtract(a, b)
    error = off.std(ddof=1) / len(off) ** 0.5
    reach = student.ppf(1 - 0.025 / n, len(off) - 1) * error
    low, high = off.mean() - reach, off.mean() + reach
    return off.mean(), low, high, "less" if high < 0 else "more" if low > 0 else "tied"


def table(H, steps, tuned, final):
    """Return the lines of one case.  tuned: {arm: {lr: line}}; final: {arm: line}."""
    lines = [f"H = {H} channels, {steps} steps", ""]
    head = f"  {'':15}{'lr':>7}  {'excess':14}{'R1':14}{'R2':14}{'mixed':14}"
    lines.append(head + "only M1  only M2  both  stuck    T1    T2")
    for arm, line in final.items():
        edge = "*" if line["lr"] in (min(tuned[arm]), max(tuned[arm])) else " "
        text = f"  {arm:15}{line['lr']:7g}{edge} "
        text += "".join(
            f"{bench.pm(line[k]):14}" for k in ("excess", "R1", "R2", "mixed")
        )
        one, two, both = (np.mean(line[k]) for k in ("only_M1", "only_M2", "both"))
        stuck = sum(f < 0.5 for f in line["F2"])
        times = "".join(f"{np.median(line[k]):6.0f}" for k in ("T1", "T2"))
        lines.append(f"{text}{one:7.1f}{two:9.1f}{both:6.1f}{stuck:7d}{times}")
    gap = " " * 32
    lines += ["", f"  {gap}" + "".join(f"{column:30}" for column in COLUMNS).rstrip()]
    for a, b in PAIRS:
        text = f"  {a:15}{'- ' + b:17}"
        for name, d in COLUMNS.items():
            off, low, high, word = verdict(final[a][name], final[b][name], len(PAIRS))
            cell = f"{off:+.{d}f} [{low:+.{d}f}, {high:+.{d}f}]"
            text += f"{cell:25}{word:5}"
        lines.append(text.rstrip())
    lines += ["", f"  {'':15}{'wake: 10, 50, 90 %':24}{'early  late  seeds':24}"]
    lines[-1] += "M1 only  M2 only  ratio"
    for arm, line in final.items():
        if "wake" in line:
            text = "".join(f"{x:6.0f}" for x in line["wake"]) + " " * 6
            text += "".join(f"{np.mean(line[k]):5.2f} " for k in ("early", "late"))
            text += f"{np.sum(np.greater(line['late'], line['early'])):6d}" + " " * 6
            one, two = np.array(line["wake_M1"]), np.array(line["wake_M2"])
            text += f"{np.nanmean(one):8.0f} {np.nanmean(two):8.0f}"
            lines.append(f"  {arm:15}{text} {np.nanmedian(two / one):6.1f}")
    kinds = ("output", "gradient, incoming", "gradient, outgoing", "gradient, row")
    lines += ["", "  newborn / older channels, mean over stages, by age in steps"]
    lines.append(f"  {'':38}" + "".join(f"{age:6d}" for age in AGES))
    for arm in ("mask-gradient", "mask-random"):
        for k, kind in enumerate(kinds):
            ratio = np.nanmean(np.array(final[arm]["newborn"])[..., k], 0)
            text = "".join(f"{x:6.2f}" for x in ratio)
            lines.append(f"  {arm:15}{kind:23}{text}")
    lines += ["", "  mean excess over the tuning seeds, by learning rate"]
    for arm, runs in tuned.items():
        cells = [f"{lr:g}: {np.mean(run['excess']):.3f}" for lr, run in runs.items()]
        lines.append(f"  {arm:15}" + "  ".join(cells))
    return [*lines, ""]


HEAD = """\
Who learns the fine feature?  Made by benchmarks/who.py in {minutes:.0f} minutes of one
core. The coarse/fine toy, t uniform, {seeds} paired seeds.

Two numbers are mean and standard error over seeds; of excess, R1, R2, G1, G2, mixed,
only, both and stuck see toy.txt.
lr: the best of five by mean excess over {tuning} other seeds; a star: an end of
  the grid.
T1, T2: median step at which half of what Bayes knows of M1 or M2 beyond the best linear
  denoiser is captured (never: the last step).
less, more, tied: paired difference and Student's t interval at 5 %, Bonferroni's for
  the {n} comparisons of a column; tied: the interval has 0.
wake: the step at which the norm of a row passes half of its final value, for the
  channels that serve a feature. early, late: M2's share in what the earlier and the
  later half of them contribute; seeds: in how many the later half has the larger one.
  M1 only, M2 only: the median step of those that serve that feature alone, and the
  median over seeds of the ratio.
newborn / older: means over the channels. output: root mean square of what a channel
  adds to eps_hat. gradient: its norm at the weights W1 | U | b, at W2, at both.
A dormant channel grows at up to {U[0]:.3f} lr per step for M1 and {U[1]:.3f} lr for
  M2: {ratio:.1f} times as fast. (In the logarithm of the norm.)

"""


def main(opt: Options):
    torch.set_num_threads(1)
    opt.out.mkdir(parents=True, exist_ok=True)
    path = opt.out / "who.jsonl"
    done, used, tables = bench.read(path), [], []
    for H, steps in opt.cases:
        tuned, final = {}, {}
        for name, arm in ARMS.items():
            own = tuned[name] = {
                lr: run(opt, "tune", name, H, steps, lr, done, path)
                for lr in RATES[arm.optimizer]
            }
            lr = bench.best_rate(own)
            final[name] = run(opt, "final", name, H, steps, lr, done, path)
            used += [*own.values(), final[name]]
        tables += table(H, steps, tuned, final)
    U = [utility(lab.Toy(), j) for j in (0, 1)]
    numbers = {"seeds": opt.seeds, "tuning": opt.tuning_seeds, "n": len(PAIRS)}
    minutes = sum(line["seconds"] for line in used) / 60
    head = HEAD.format(minutes=minutes, U=U, ratio=U[0] / U[1], **numbers)
    (opt.out / "who.txt").write_text(head + "\n".join(tables).rstrip() + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        sys.exit(f"who.py: {error}")
