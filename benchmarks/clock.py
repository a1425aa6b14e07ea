"""When is a feature learned? Steps until it is, against its variance.

    python benchmarks/clock.py        everything; 5 minutes of one idle core

Three questions, on the toy of notebooks/toy.py and on the principal components of the
digits: does the time to learn a feature go as 1 / variance, and for which network and
optimizer; what if all features vanish at the same noise level; what if two features are
correlated? notebooks/predictions.md says what was expected before the first run.

results/clock.txt is the table; results/clock.json has the steps of every seed, which
lesson 16 plots.
"""

import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
import toy as lab

import superminddpm


# ---- Data ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Toy(lab.Toy):
    """The toy with its own amount of noise for each feature, and bits that may agree.

    x_t = sqrt(abar) x0 + sqrt(1 - abar) e, where e has the standard deviation noise[j]
    along M_j, and 1 elsewhere. Each bit of z2 has the correlation rho with one of z1.
    """

    noise: tuple[float, float] = (1.0, 1.0)
    rho: float = 0.0

    @cached_property
    def n(self):
        """The standard deviation of the noise in each coordinate of y, (d,)."""
        parts = zip((self.k1, self.k2, self.d), (*self.noise, 1.0), strict=True)
        return torch.cat([torch.full((k,), n) for k, n in parts])[: self.d]

    def draw(self, *shape, generator=None):
        """Return x0, (*shape, d)."""
        u = torch.rand(*shape, self.k1 + self.k2, generator=generator)
        z1 = torch.where(u[..., : self.k1] < 0.5, -1.0, 1.0)
        z2 = torch.where(u[..., self.k1 :] < (1 + self.rho) / 2, z1, -z1)
        z = torch.cat([z1, z2], -1)
        return (self.a[: z.shape[-1]] * z) @ self.M[:, : z.shape[-1]].T

    def q_sample(self, x0, t, eps):
        """Return x_t of x0 and white noise eps, all (..., d)."""
        return super().q_sample(x0, t, (eps @ self.M * self.n) @ self.M.T)

    def best(self, xt, t):
        """Return x0* = E[x0 | x_t]: Bayes' rule, a softmax over the 16 vectors x0."""
        k = self.k1 + self.k2
        ab, y = self.alphabar(t)[..., None, None], (xt @ self.M[:, :k])[..., None, :]
        z = torch.tensor([*itertools.product((-1.0, 1.0), repeat=k)])  # (16, k)
        agree = z[:, : self.k1] * z[:, self.k1 :]
        log_p = ((1 + self.rho * agree) / 4).log().sum(-1)
        miss = (y - ab.sqrt() * self.a[:k] * z) / self.n[:k]
        log_p = log_p - miss.square().sum(-1) / (2 * (1 - ab[..., 0]))
        return log_p.softmax(-1) @ (self.a[:k] * z) @ self.M[:, :k].T

    def linear_best(self, xt, t):
        """Return the best x0_hat that is linear in x_t: a matrix."""
        C, pair = torch.diag(self.a**2), torch.arange(self.k1)
        both = self.rho * self.a1 * self.a2
        C[pair, pair + self.k1] = C[pair + self.k1, pair] = both
        ab = self.alphabar(t)[..., None, None]
        seen = ab * C + (1 - ab) * torch.diag(self.n**2)
        B = torch.linalg.solve(seen, ab.sqrt() * C).mT  # y to x0_hat, along the axes
        return (B @ (xt @ self.M)[..., None])[..., 0] @ self.M.T


@dataclass(frozen=True)
class Digits(Toy):
    """The digits without their mean; M are principal axes, a^2 their variances."""

    d: int = 64
    alphabar: object = staticmethod(lab.cosine)

    @cached_property
    def x(self):
        x = superminddpm.load_images(superminddpm.Config())[0].flatten(1) / 127.5 - 1
        return x - x.mean(0)

    @cached_property
    def M(self):
        return torch.linalg.svd(self.x.double(), full_matrices=False).Vh.T.float()

    @cached_property
    def a(self):
        return (self.x @ self.M).square().mean(0).sqrt()

    @cached_property
    def n(self):
        return torch.ones(self.d)

    def draw(self, *shape, generator=None):
        return self.x[torch.randint(len(self.x), shape, generator=generator)]


# ---- Networks: they predict x0 from x_t and t, one for each seed, and begin with 0 ---
def phi(t):
    """Return 1 and 16 waves of t, (..., 17)."""
    return torch.cat([torch.ones_like(t)[..., None], lab.embed(t)], -1)


def build(kind, data, seeds, H=128):
    """Return the weights of a kind of network, and net(xt, t) -> x0_hat (S, B, d)."""
    S, d, gens = len(seeds), data.d, [lab.rng(seed, 1) for seed in seeds]

    def normal(n, m, size):
        return size * torch.stack([torch.randn(n, m, generator=g) for g in gens])

    if kind == "linear":  # in x_t; one matrix for each wave of t
        w = [torch.zeros(S, 17 * d, d)]

        def net(x, t):
            return (phi(t)[..., None] * x[..., None, :]).flatten(-2) @ w[0]

    elif kind == "deep linear":  # two small layers; t scales what is between them
        gate = torch.zeros(S, 17, H)
        gate[:, 0] = 1
        w = [normal(d, H, 0.02), normal(H, d, 0.02), gate]

        def net(x, t):
            return x @ w[0] * (phi(t) @ w[2]) @ w[1]

    elif kind == "MLP":
        w = [normal(d + 17, H, (d + 17) ** -0.5), torch.zeros(S, H, d)]

        def net(x, t):
            return torch.relu(torch.cat([x, phi(t)], -1) @ w[0]) @ w[1]

    else:  # the course's, of which the last layer begins with 0
        nets = []
        for seed in seeds:
            torch.manual_seed(seed)
            nets.append(superminddpm.UNet(1, 8))
        w = [weight for one in nets for weight in one.parameters()]

        def net(x, t):
            x, t = x.expand(S, -1, -1).unflatten(-1, (1, 8, 8)), t.expand(S, -1)
            parts = zip(nets, x, 1000 * t, strict=True)
            return torch.stack([one(x, t).flatten(1) for one, x, t in parts])

    return [weight.requires_grad_() for weight in w], net


# ---- Training and measures -----------------------------------------------------------
def batches(data, seeds, steps, size=128):
    """Yield u in [0, 1) (S, B), x0 and white noise (S, B, d) for each step."""
    gens = [lab.rng(seed, 2) for seed in seeds]
    for _ in range(0, steps, 100):  # drawn 100 steps at a time, as that is faster
        shape, parts = (min(steps, 100), size), []
        for g in gens:
            u, x0 = torch.rand(shape, generator=g), data.draw(*shape, generator=g)
            parts.append((u, x0, torch.randn(x0.shape, generator=g)))
        stacked = [torch.stack(part, 1) for part in zip(*parts, strict=True)]
        yield from zip(*stacked, strict=True)


def train(kind, data, seeds, steps, optimizer, lr, look, density="uniform", n_looks=60):
    """Return the steps of the looks, and what look(net) saw there, (looks, S, ...)."""
    weights, net = build(kind, data, seeds)
    opt = getattr(torch.optim, optimizer)(weights, lr)
    looks, seen = np.unique(np.geomspace(1, steps, n_looks).round().astype(int)), []
    ends = lab.stage_ends(steps)
    for step, (u, x0, eps) in enumerate(batches(data, seeds, steps)):
        t = lab.draw_t(density, u, sum(step >= end for end in ends), steps)
        loss = (net(data.q_sample(x0, t, eps), t) - x0).square().sum(-1)
        opt.zero_grad()
        loss.mean(1).sum().backward()  # a sum over seeds: each has its own gradient
        opt.step()
        if step + 1 in looks:
            with torch.no_grad():
                seen.append(look(net))
        if step + 1 == steps:
            return looks, torch.stack(seen)


def windows(data, n_levels=12):
    """Return levels of t (L,), and for each component that nearest to SNR 1, (d,)."""
    own = lab.time_at(data.alphabar, (data.n**2 / (data.a**2 + data.n**2)).double())
    own = own.float().clamp(lab.TMIN, 1)
    levels = torch.unique(own)
    if len(levels) > n_levels:
        levels = torch.from_numpy(np.geomspace(own.min(), own.max(), n_levels)).float()
    return levels, (own[:, None] / levels).log().abs().argmin(-1)


def weight_look(data, n=512):
    """Return look(net) -> (S, d, 2), each component looked at where its SNR is 1.

    First the weight, the slope of x0_hat over x_t along the component, over that of the
    best linear denoiser. Then how much of the variance of x0 is explained, over the
    best linear denoiser's. Both are 0 in the beginning and 1 in the end.
    """
    levels, own = windows(data)
    g, t = lab.rng(0, 3), levels.repeat_interleave(n)[None]
    x0 = data.draw(1, t.shape[1], generator=g)
    xt = data.q_sample(x0, t, torch.randn(x0.shape, generator=g))
    at, ab = (own, torch.arange(data.d)), data.alphabar(levels)[own]
    know = ab * data.a**2 / (ab * data.a**2 + (1 - ab) * data.n**2)

    def split(x):  # (S, L, d) means over the n vectors of a level
        return x.unflatten(1, (len(levels), n)).mean(2)[:, *at]

    def look(net):
        y, truth, guess = xt @ data.M, x0 @ data.M, net(xt, t) @ data.M
        weight = split(guess * y) / split(y * y) * ab.sqrt() / know
        power = split(truth.square())
        explained = (power - split((guess - truth).square())) / power / know
        return torch.stack([weight, explained], -1)

    return look


def risk_look(toy, n=256):
    """Return look(net) -> (S, 2, 3), shares of M1 and M2 captured, over all t.

    1 - R / R_0, where R = E||M_j^T (x0_hat - x0*)||^2 and R_0 is that of x0_hat = 0:
    1 is Bayes. Then 1 - R / R_linear: 0 is the best linear denoiser. Then the first one
    again, for those vectors alone whose bits of z1 and z2 all disagree.
    """
    g, t = lab.rng(0, 4), lab.GRID.repeat_interleave(n)[None]
    x0 = toy.draw(1, t.shape[1], generator=g)
    odd = Toy(toy.a1, toy.a2, noise=toy.noise, rho=-1 + 1e-6)
    sets = [(x0, toy.linear_best), (odd.draw(1, t.shape[1], generator=g), None)]
    probes = []
    for x, linear in sets:
        xt = toy.q_sample(x, t, torch.randn(x.shape, generator=g))
        best = toy.best(xt, t)
        parts = [best] + ([best - linear(xt, t)] if linear else [])
        R = [toy.by_feature((p @ toy.M).square()).mean(1)[:, :2] for p in parts]
        probes.append((xt, best, R))

    def look(net):
        shares = []
        for xt, best, R in probes:
            off = toy.by_feature(((net(xt, t) - best) @ toy.M).square()).mean(1)
            shares += [1 - off[:, :2] / R_0 for R_0 in R]
        return torch.stack(shares, -1)

    return look


def half_time(looks, curve, level=0.5):
    """Return the step at which curve (looks, ...) first passes level; nan: never."""
    curve, log = torch.as_tensor(curve), torch.as_tensor(np.log(looks))
    above = (curve > level).double()
    i = above.argmax(0).clamp(min=1)
    low, high = (curve.gather(0, k[None])[0] for k in (i - 1, i))
    step = (log[i - 1] + (log[i] - log[i - 1]) * (level - low) / (high - low)).exp()
    step = torch.where(above[0] > 0, 1.0, step)
    return torch.where(above.any(0), step, torch.nan)


def slope(variance, times):
    """Return the slopes of log times (S, k) over log variance (k,), least squares."""
    x, found = variance.log(), []
    for y in times.log():
        ok = y.isfinite()
        x_, y_ = x[ok] - x[ok].mean(), y[ok] - y[ok].mean()
        found.append((x_ @ y_.to(x_) / (x_ @ x_)).item() if ok.sum() > 1 else math.nan)
    return np.array(found)


def theory(data, lr, looks):
    """Return the weights of "linear" at looks under full-batch descent, (looks, d).

    Each component has its own 17 numbers w, and w <- w - 2 lr (A w - b) with
    A = E phi phi^T (abar a^2 + (1 - abar) n^2) and b = E phi sqrt(abar) a^2 over t.
    """
    t = lab.TMIN + (1 - lab.TMIN) * (torch.arange(4000) + 0.5).double() / 4000
    ab, wave = data.alphabar(t), phi(t)
    levels, own = windows(data)
    curves = []
    for k, (a, n) in enumerate(zip(data.a.double(), data.n.double(), strict=True)):
        A = (wave * (ab * a**2 + (1 - ab) * n**2)[:, None]).T @ wave / len(t)
        b = a**2 * (wave * ab.sqrt()[:, None]).mean(0)
        rate, Q = torch.linalg.eigh(A)
        gone = (1 - 2 * lr * rate) ** torch.as_tensor(looks)[:, None]
        w = ((1 - gone) / rate * (b @ Q)) @ Q.T
        level = levels[own[k]].double()
        at = data.alphabar(level)
        best = at.sqrt() * a**2 / (at * a**2 + (1 - at) * n**2)
        curves.append(w @ phi(level) / best)
    return torch.stack(curves, -1)


# ---- The runs ------------------------------------------------------------------------
RATES = {"SGD": 0.005, "Adam": 0.001}  # on the toy and, dense networks, on the digits
SETS = {
    "white noise": Toy(),
    "equal SNR": Toy(noise=(3.0, 1.0)),
    "M1 dies first": Toy(noise=(3.0, 1 / 3)),
    **{f"rho = {rho}": Toy(rho=rho) for rho in (0.0, 0.3, 0.6, 0.9)},
    "no M1": Toy(a1=0.0),
}


def pm(values, digits=2):
    """Return mean and standard error over seeds as text."""
    values = np.asarray(values)
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.{digits}f} +- {error:.{digits}f}"


def rounded(values):
    """Return an array as nested lists that json can write, four digits each."""
    flat = [float(f"{x:.4g}") for x in np.ravel(values)]
    return np.reshape(flat, np.shape(values)).tolist()


def law():
    """Yield (name, numbers, line of the table) of each data set, network, optimizer."""
    dense = ["linear", "deep linear", "MLP"]
    for data, k, kinds in ((Toy(), 4, dense), (Digits(), 32, [*dense, "UNet"])):
        for kind, optimizer in itertools.product(kinds, RATES):
            seeds, steps, lr = range(5), 4000, RATES[optimizer]
            if kind == "UNet":
                seeds, steps, lr = range(3), 500, 0.001
            looks, seen = train(
                kind, data, seeds, steps, optimizer, lr, weight_look(data)
            )
            times = half_time(looks, seen)[:, :k].double()  # (S, k, 2)
            slopes = [slope(data.a[:k].double() ** 2, x) for x in times.unbind(-1)]
            name = f"{'digits' if k > 4 else 'toy'}, {kind}, {optimizer}"
            missed = times[..., 0].isnan().sum()
            line = f"{name:28}{lr:<8}{pm(slopes[0]):18}{pm(slopes[1]):18}{missed:6}"
            yield name, {"times": times[..., 0], "slope": slopes[0]}, line


def alike(kept):
    """Yield the same for slopes over the components that all runs on digits learned."""
    times = {name: row["times"] for name, row in kept.items() if "digits" in name}
    all_of_them = torch.tensor(sum(times.values(), [])).isfinite().all(0)
    variance = Digits().a[:32].double()[all_of_them] ** 2
    for name, own in times.items():
        slopes = slope(variance, torch.tensor(own).double()[:, all_of_them])
        yield f"{name}, {len(variance)}", {"slope": slopes}, f"{name:36}{pm(slopes)}"


def order(names, ways, steps):
    """Yield the same for M1 against M2, by an MLP on data sets of SETS."""
    for name, optimizer, way in itertools.product(names, RATES, ways):
        toy, lr = SETS[name], RATES[optimizer]
        looks, seen = train(
            "MLP", toy, range(5), steps, optimizer, lr, risk_look(toy), way
        )
        times = half_time(looks, seen).double()  # (S, 2, 3)
        (m1, _, _), (m2, beyond, odd) = times.permute(1, 2, 0)
        name = f"{name}, {optimizer}, {way}"
        line = f"{name:36}{pm(m1, 1):16}{pm(m2, 1):16}{pm(m2 / m1):16}"
        line += f"{pm(beyond, 1):16}{pm(odd, 1)}"
        yield name, {"times": times}, line


HEAD = """\
When is a feature learned?  Made by benchmarks/clock.py in {:.0f} minutes of one core.
Mean and standard error over 5 seeds (UNet: 3).

slope: of ln(step at which a component is learned) over ln(variance), least squares; for
  the toy's M1 and M2 (variances 9 and 1), or the first 32 principal components of the
  digits (2.75 to 0.07). weight: learned is when the slope of x0_hat over x_t is half
  that of the best linear denoiser, at SNR 1 (the digits: at the nearest of 12 levels,
  0.56 to 1.53); explained: when the explained variance of x0 is. -1 is the inverse-
  variance law. missed: components not learned in 4000 steps (UNet 500), in all seeds.
  They are the finest, so the second table has only those that all runs learned.
  The closed form of "linear" under SGD has {:.2f} on the toy, {:.2f} on the digits.
M1, M2: steps of an MLP until half of what Bayes knows of M1 or M2 is captured, over all
  t. beyond: half of what it knows beyond the best linear denoiser. odd: as M2, for only
  the vectors whose bits of z1 and z2 disagree. nan: not in all seeds, in 2000 steps
  (the last table: 4000); or there is no M1.
"""


def main():
    torch.set_num_threads(1)
    start, kept, exact, lines = time.process_time(), {}, [], []
    for data, k in ((Toy(), 4), (Digits(), 32)):
        looks = np.geomspace(1, 4000, 400).round()
        times = half_time(looks, theory(data, RATES["SGD"], looks))[None, :k]
        exact.append(slope(data.a[:k].double() ** 2, times)[0])
    first = f"{'':28}{'lr':8}{'slope: weight':18}{'explained':18}missed"
    fair = f"{'slope: weight, digits':36}learned by all"
    second = f"{'':36}{'M1':16}{'M2':16}{'M2 / M1':16}{'M2, beyond':16}M2, odd"
    for head, runs in (
        (first, law()),
        (fair, alike(kept)),
        (second, order([*SETS][:3], ["uniform", "curriculum", "reversed"], 2000)),
        (second, order([*SETS][3:], ["uniform"], 4000)),
    ):
        lines += ["", head]
        for name, numbers, line in runs:
            print(line, flush=True)
            lines.append(line.rstrip())
            kept[name] = {k: rounded(v) for k, v in numbers.items()}
    minutes = (time.process_time() - start) / 60
    out = Path(__file__).parent / "results"
    text = HEAD.format(minutes, *exact) + "\n".join(lines) + "\n"
    (out / "clock.txt").write_text(text)
    (out / "clock.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
