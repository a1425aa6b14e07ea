"""The coarse/fine toy: a diffusion problem whose every answer is known.

    x = a1 M1 z1 + a2 M2 z2  in R^d,  a1 > a2,  [M1 M2 M_perp] orthonormal

z1 and z2 are vectors of bits +-1 (or Gaussian); M1 carries the coarse feature, M2 the
fine one. Noise comes in as always: x_t = sqrt(abar) x + sqrt(1 - abar) eps. In the
coordinates y = M^T x_t the problem falls apart into d scalar channels,

    y = sqrt(abar) a z + sqrt(1 - abar) e,  with a = a1, a2, or 0 in the complement,

so the best denoiser and its error are closed forms of SNR = abar a^2 / (1 - abar).
Time t is continuous: t = 0 is clean, t = 1 is noise, and nets are trained on [0.01, 1].

Importing the file only defines. A feature axis of size 3 means M1, M2, complement.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F

TMIN = 0.01  # the lowest noise that is trained: at t = 0 x_t tells nothing about eps


def rng(*key):
    """Return a generator seeded by integers >= 0."""
    seed = np.random.SeedSequence(key).generate_state(1).item()
    return torch.Generator().manual_seed(seed)


# ---- 1. Schedules: abar as a function of t in [0, 1], any shape ----------------------
def straight(t):
    """Return abar = 1 - t."""
    return 1 - t


def linear_beta(t):
    """Return abar of DDPM's betas, 1e-4 to 0.02 in T = 1000 steps, at step 1000 t."""
    log_abar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p()
    log_abar = F.pad(log_abar.cumsum(0), (1, 0))
    step = 1000 * t.double()
    below = step.floor().clamp(0, 999).long()
    log_abar = log_abar[below].lerp(log_abar[below + 1], step - below)
    return log_abar.exp().to(t.dtype)


def cosine(t, s=0.008):
    """Return abar of Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17."""
    start = math.cos(s / (1 + s) * math.pi / 2)
    return (((t + s) / (1 + s) * math.pi / 2).cos() / start).square()


SCHEDULES = {"abar = 1 - t": straight, "linear beta": linear_beta, "cosine": cosine}


def snr(abar, a=1.0):
    """Return the signal-to-noise ratio of a coordinate with amplitude a."""
    return abar * a**2 / (1 - abar)


def time_at(alphabar, abar):
    """Return t in [0, 1] where the falling function alphabar is abar, by bisection."""
    low, high = torch.zeros_like(abar), torch.ones_like(abar)
    for _ in range(60):
        t = (low + high) / 2
        noisier = alphabar(t) < abar
        low, high = torch.where(noisier, low, t), torch.where(noisier, t, high)
    return (low + high) / 2


# ---- 2. Closed forms of one coordinate; s is the SNR, any shape, finite -------------
def mmse_z(s):
    """Return E(z - E[z|y])^2 of a bit, 1 - E tanh(s + sqrt(s) Z), Z ~ N(0, 1).

    The textbook form above cancels at high SNR. Completing the square turns it into
    exp(-s/2) E sech(sqrt(s) Z), whose terms are all positive. Here u is Z, stretched
    so that the integrand is neither narrow nor close to a pole for any s: there the
    trapezoid rule is right to 12 digits.
    """
    s = torch.as_tensor(s, dtype=torch.float64)[..., None]
    h, u = 0.2, torch.arange(-200, 201, dtype=torch.float64) * 0.2
    terms = (-(u**2) / (2 * (1 + s))).exp() / ((s / (1 + s)).sqrt() * u).cosh()
    total = terms.sum(-1, keepdim=True) * h / (2 * math.pi * (1 + s)).sqrt()
    return ((-s / 2).exp() * total)[..., 0]


def eps_mmse(s, kind="bits"):
    """Return the least possible E(eps_hat - eps)^2.  kind: bits or gauss."""
    s = torch.as_tensor(s, dtype=torch.float64)
    return s / (1 + s) if kind == "gauss" else s * mmse_z(s)


def linear_excess(s):
    """Return by how much the best linear denoiser of bits is above eps_mmse."""
    return eps_mmse(s, "gauss") - eps_mmse(s)


def bit_error(s):
    """Return how often the sign of y is not the bit; no other guess errs less."""
    return torch.special.ndtr(-torch.as_tensor(s, dtype=torch.float64).sqrt())


def information(s):
    """Return the nats that y tells of a bit, the integral of mmse_z / 2 from 0 to s.

    What is missing to ln 2 is the entropy left, E log(1 + exp(-2 (s + sqrt(s) Z))).
    """
    s = torch.as_tensor(s, dtype=torch.float64)[..., None]
    h, z = 0.02, torch.arange(-500, 501, dtype=torch.float64) * 0.02
    left = F.softplus(-2 * (s + s.sqrt() * z)) * (-(z**2) / 2).exp()
    return math.log(2) - left.sum(-1) * h / math.sqrt(2 * math.pi)


# ---- 3. The data ---------------------------------------------------------------------
@dataclass(frozen=True)
class Toy:
    """The distribution of x, the noise schedule, and the exact answers.

    Below, x0, xt and eps are (..., d) and t is (...), in (0, 1].
    """

    a1: float = 3.0  # amplitude of the coarse feature
    a2: float = 1.0  # and of the fine one
    k1: int = 2  # coordinates of z1
    k2: int = 2  # and of z2
    d: int = 12
    kind: str = "bits"  # or gauss
    alphabar: Callable = straight
    seed: int = 0  # of the basis

    @cached_property
    def M(self):
        """The basis [M1 M2 M_perp], (d, d): a random rotation."""
        normal = torch.randn(self.d, self.d, generator=rng(self.seed, 0)).double()
        return torch.linalg.qr(normal)[0].float()

    @property
    def M1(self):
        """The directions of the coarse feature, (d, k1)."""
        return self.M[:, : self.k1]

    @property
    def M2(self):
        """The directions of the fine feature, (d, k2)."""
        return self.M[:, self.k1 : self.k1 + self.k2]

    @cached_property
    def a(self):
        """The amplitude of each coordinate of y, (d,): a1, a2, and 0 elsewhere."""
        parts = ((self.k1, self.a1), (self.k2, self.a2), (self.d, 0.0))
        return torch.cat([torch.full((k,), a) for k, a in parts])[: self.d]

    def by_feature(self, y):
        """Return the sums of y (..., d) over each feature's coordinates, (..., 3)."""
        parts = y.split((self.k1, self.k2, self.d - self.k1 - self.k2), -1)
        return torch.stack([part.sum(-1) for part in parts], -1)

    def draw(self, *shape, generator=None):
        """Return x0, (*shape, d)."""
        z = torch.randn(*shape, self.k1 + self.k2, generator=generator)
        if self.kind == "bits":
            z = torch.where(z < 0, -1.0, 1.0)
        k = z.shape[-1]
        return (self.a[:k] * z) @ self.M[:, :k].T

    def q_sample(self, x0, t, eps):
        """Return x_t ~ q(x_t | x_0), Eq. 4 of DDPM."""
        ab = self.alphabar(t)[..., None]
        return ab.sqrt() * x0 + (1 - ab).sqrt() * eps

    def bayes(self, xt, t):
        """Return eps* = E[eps | x_t], which no denoiser can beat."""
        if self.kind == "gauss":
            return self.linear(xt, t)
        ab, y = self.alphabar(t)[..., None], xt @ self.M
        z = torch.tanh(ab.sqrt() * self.a * y / (1 - ab))  # E[z | y]
        return (y - ab.sqrt() * self.a * z) / (1 - ab).sqrt() @ self.M.T

    def linear(self, xt, t):
        """Return the best eps_hat that is linear in x_t: eps* of Gaussian z."""
        ab, y = self.alphabar(t)[..., None], xt @ self.M
        return (1 - ab).sqrt() * y / (ab * self.a**2 + 1 - ab) @ self.M.T

    def over_features(self, f, t):
        """Return the sums of f(SNR) over each feature's coordinates, (..., 3)."""
        a = torch.tensor([self.a1, self.a2, 0.0], dtype=torch.float64)
        k = torch.tensor([self.k1, self.k2, self.d - self.k1 - self.k2])
        return k * f(snr(self.alphabar(t.double())[..., None], a))

    def mmse(self, t):
        """Return E||M_j^T (eps* - eps)||^2, (..., 3): the floor under the loss."""
        return self.over_features(lambda s: eps_mmse(s, self.kind), t)

    def linear_excess(self, t):
        """Return the excess risk of the best linear denoiser of bits, (..., 3)."""
        return self.over_features(linear_excess, t)


# ---- 4. Networks ---------------------------------------------------------------------
def embed(t):
    """Return 16 waves of t, (..., 16)."""
    angle = t[..., None] * math.pi * torch.arange(1, 9)
    return torch.cat([angle.sin(), angle.cos()], -1)


def fresh(seed, H, d, *key):
    """Return rows W1 | U | b | W2 of H new channels, drawn as nn.Linear draws them."""
    n_in = d + 16
    uniform = 2 * torch.rand(H, n_in + 1 + d, generator=rng(seed, 1, *key)) - 1
    uniform[:, : n_in + 1] /= math.sqrt(n_in)
    uniform[:, n_in + 1 :] /= math.sqrt(H)
    return uniform


class Nets:
    """S denoisers side by side, xt + W2 [mask * relu(W1 xt + U emb(t) + b)] + b2.

    All that belongs to one hidden channel is one row, W1 | U | b | W2, so that birth,
    death and decay of a channel act on rows. The mask stands right before W2, and
    nothing is added behind it: a masked channel reaches nothing, and the gradient of
    its row is exactly 0.  rows: (S, H, d + 16 + 1 + d); b2: (S, 1, d); mask: (S, H) of
    0/1; birth: (S, H) int64, the stage in which a channel became active, -1: not yet.
    """

    def __init__(self, seeds, H=128, d=12):
        self.rows = torch.stack([fresh(seed, H, d) for seed in seeds])
        self.b2 = torch.zeros(len(self.rows), 1, d)
        self.mask = torch.ones(self.rows.shape[:2])
        self.birth = torch.zeros(self.rows.shape[:2], dtype=torch.int64)
        self.n_in = d + 17

    @property
    def W2(self):
        """What a channel adds to eps_hat for each unit of its output, (S, H, d)."""
        return self.rows[..., self.n_in :]

    def hidden(self, xt, t):
        """Return the outputs of the channels before the mask, (S, B, H)."""
        u = torch.cat([xt, embed(t), torch.ones_like(t)[..., None]], -1)
        return torch.relu(u @ self.rows[..., : self.n_in].mT)

    def __call__(self, xt, t):
        """Return eps_hat, (S, B, d).  xt: (S or 1, B, d); t: (S or 1, B)."""
        return xt + (self.mask[:, None] * self.hidden(xt, t)) @ self.W2 + self.b2


class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) that counts the steps of each row.

    With one count for all, a channel that is born late would have the small moments of
    a start without the correction for them, and take steps several times too long.
    """

    def __init__(self, rows, betas=(0.9, 0.999)):
        self.m, self.v, self.betas = rows * 0, rows * 0, betas
        self.age = torch.zeros(*rows.shape[:2], 1)

    def step(self, rows, grad, lr):
        """Change rows (S, H, n) in place; return lr / mean sqrt(v) of each, (S, H, 1).

        That is the step for a unit of gradient, which a proximal step needs to know.
        """
        b1, b2 = self.betas
        self.age += 1
        self.m.lerp_(grad, 1 - b1)
        self.v.lerp_(grad * grad, 1 - b2)
        size = (self.v / (1 - b2**self.age)).sqrt() + 1e-8
        rows -= lr / (1 - b1**self.age) * self.m / size
        return lr / size.mean(-1, keepdim=True)

    def reset(self, which):
        """Forget the past of the channels in which, (S, H) bool."""
        for state in (self.m, self.v, self.age):
            state[which] = 0


# ---- 5. Arms: the ways to train that are compared ------------------------------------
EDGES = (0.8, 0.6, 0.4, 0.2, TMIN)  # the curriculum's stage s trains t in [EDGES[s], 1]
SHARES = (5, 10, 15, 20, 30)  # of the steps
SPARSITY = (0.8, 0.6, 0.4, 0.2, 0.0)  # share of the channels that is masked
WINDOW = 20  # steps into a stage after which its channels are born
INTERVALS = {  # of t, stage by stage
    "uniform": [(TMIN, 1.0)] * 5,
    "curriculum": [(edge, 1.0) for edge in EDGES],
    "reversed": [(TMIN, 1.0 + TMIN - edge) for edge in EDGES],  # low noise first
    "disjoint": list(zip(EDGES, (1.0, *EDGES[:-1]), strict=True)),
}


@dataclass(frozen=True)
class Arm:
    """One way to train. The plain Arm() is uniform in t."""

    density: str = "uniform"  # of t: a key of INTERVALS, shuffled or log-SNR
    regrow: str = ""  # gradient or random: mask by SPARSITY, choose the births so
    redraw: bool = False  # where births would be, redraw the weakest fifth of channels
    lam: float = 0.0  # group L1 over rows in stage 0; falls as a cosine to 0 in stage 4
    prox: bool = False  # shrink rows by a proximal step, not by the gradient
    min_snr: float = 0.0  # weigh the error by min(SNR, min_snr) / SNR; 0: do not
    init: float = 1.0  # scale of the first rows
    optimizer: type = Adam  # or another one with its methods


ARMS = {
    "uniform": Arm(),
    "curriculum": Arm("curriculum"),
    "reversed": Arm("reversed"),
    "shuffled": Arm("shuffled"),
    "curriculum-mask-gradient": Arm("curriculum", regrow="gradient"),
    "curriculum-mask-random": Arm("curriculum", regrow="random"),
    "uniform-mask-gradient": Arm(regrow="gradient"),
    "uniform-redraw": Arm(redraw=True),
    "curriculum-penalty-weak": Arm("curriculum", lam=3e-5),
    "curriculum-penalty-strong": Arm("curriculum", lam=1e-4),
    "curriculum-prox-weak": Arm("curriculum", lam=3e-5, prox=True),
    "curriculum-prox-strong": Arm("curriculum", lam=1e-4, prox=True),
    "min-snr-5": Arm(min_snr=5.0),
    "log-snr": Arm("log-SNR"),
}


def stage_ends(steps):
    """Return the step after the last one of each stage: shares 5:10:15:20:30."""
    return [round(steps * sum(SHARES[: s + 1]) / sum(SHARES)) for s in range(5)]


def n_active(H):
    """Return how many of H channels are active in each stage."""
    return [round((1 - sparsity) * H) for sparsity in SPARSITY]


@cache
def even_log_snr(alphabar, n):
    """Return t and abar, (n,) float64, even in log-SNR from t = 0.01 to 0.999.

    At t = 1 log-SNR has no bound, and below SNR = 1e-3 x_t is as good as noise.
    """
    ends = alphabar(torch.tensor([TMIN, 0.999], dtype=torch.float64)).logit()
    abar = torch.linspace(*ends.tolist(), n, dtype=torch.float64).sigmoid()
    return time_at(alphabar, abar), abar


def draw_t(density, u, stage, steps, alphabar=straight):
    """Return t = the quantile at u of the density that is trained in stage.

    u: any shape, in [0, 1). Arms share it, so that they differ by the density alone.
    shuffled: the curriculum's own density of t over its whole run, in every step.
    log-SNR: even in log-SNR, t from 0.01 to 0.999.
    """
    if density in INTERVALS:
        low, high = INTERVALS[density][stage]
        return low + (high - low) * u
    if density == "shuffled":
        # a stage spreads its steps evenly over [edge, 1], so the distribution function
        # is a broken line with its corners at the edges
        t, lengths = np.array([*EDGES[::-1], 1.0]), np.diff([0, *stage_ends(steps)])
        stages = zip(lengths / steps, EDGES, strict=True)
        cdf = sum(share * (t - edge).clip(0) / (1 - edge) for share, edge in stages)
    elif density == "log-SNR":
        t = even_log_snr(alphabar, 2000)[0].numpy()
        cdf = np.linspace(0, 1, 2000)
    else:
        raise ValueError(f"there is no density {density!r}")
    return torch.from_numpy(np.interp(u.numpy(), cdf, t)).float()


# ---- 6. Training ---------------------------------------------------------------------
def batches(density, toy, seeds, steps, batch=128):
    """Yield stage, t (S, B), xt and eps (S, B, d) for each step.

    Noise, x0 and the quantile of t come from (seed, step) alone: runs of the same seed
    share them, whatever the arm, the width or the other seeds that run beside it.
    """
    n, ends = 100, stage_ends(steps)  # drawn 100 steps at a time, as that is faster
    for step in range(steps):
        if step % n == 0:
            parts = []
            for seed in seeds:
                g = rng(seed, 2, step // n)
                u = torch.rand(n, batch, generator=g)
                eps = torch.randn(n, batch, toy.d, generator=g)
                parts.append((u, eps, toy.draw(n, batch, generator=g)))
            u, eps, x0 = (torch.stack(part, 1) for part in zip(*parts, strict=True))
        stage, i = sum(step >= end for end in ends), step % n
        t = draw_t(density, u[i], stage, steps, toy.alphabar)
        yield stage, t, toy.q_sample(x0[i], t, eps[i]), eps[i]


def learning_rate(lr, step, steps):
    """Return lr, constant at first, falling linearly to 0 in the last quarter."""
    return lr * min(1, 4 * (1 - step / steps))


def pick(score, n):
    """Return where the n largest scores of each seed are, (S, H) bool."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter_(1, score.topk(n, 1).indices, True)


def train(arm, toy=None, seeds=range(5), H=128, steps=3000, lr=1e-2, watch=None):
    """Return Nets trained by an Arm (or a key of ARMS), one for each seed (ints >= 0).

    A stage gathers |dLoss/dmask| over its first 20 steps, and then come the births, so
    that no arm sees a batch more than others. watch(step, nets) is called after a step.
    """
    arm = ARMS[arm] if isinstance(arm, str) else arm
    toy, ends, active = toy or Toy(), stage_ends(steps), n_active(H)
    if min(np.diff(ends)) <= WINDOW:
        raise ValueError(f"{steps} steps are too few for five stages")
    nets = Nets(seeds, H, toy.d)
    nets.rows *= arm.init
    if arm.regrow:  # all rows are drawn alike: the first ones are as random as any
        nets.mask[:, active[0] :], nets.birth[:, active[0] :] = 0, -1
    adam, adam_b2 = arm.optimizer(nets.rows), arm.optimizer(nets.b2)
    score = torch.zeros_like(nets.mask)
    for step, batch in enumerate(batches(arm.density, toy, seeds, steps)):
        stage, t, xt, eps = batch
        into = step - ends[stage - 1] if stage else steps  # how far into a new stage
        weights = [nets.rows, nets.b2]
        weights += [nets.mask] if arm.regrow and into < WINDOW else []
        for weight in weights:
            weight.requires_grad_()
        error = (nets(xt, t) - eps).square().mean(-1)  # (S, B)
        if arm.min_snr:
            error = error * (arm.min_snr / snr(toy.alphabar(t))).clamp(max=1)
        loss = error.mean(1).sum()  # a sum over seeds: each gets its own gradient
        lam = arm.lam * (1 + math.cos(math.pi * stage / 4)) / 2
        if lam and not arm.prox:
            loss = loss + lam * nets.rows.norm(dim=-1).sum()
        grads = torch.autograd.grad(loss, weights)
        for weight in weights:
            weight.requires_grad_(False)

        now = learning_rate(lr, step, steps)
        pace = adam.step(nets.rows, grads[0], now)
        adam_b2.step(nets.b2, grads[1], now)
        if lam and arm.prox:  # argmin |w - row|^2 / 2 pace + lam |w|: exact zeros
            norm = nets.rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            nets.rows *= (1 - pace * lam / norm).clamp(min=0)
            adam.reset((nets.rows == 0).all(-1))  # or momentum would move it off 0
        if len(grads) == 3:
            score += grads[2].abs()
        if arm.regrow and into == WINDOW - 1:
            if arm.regrow == "random":
                chance = [torch.rand(H, generator=rng(s, 3, stage)) for s in seeds]
                score = torch.stack(chance)
            score[nets.mask > 0] = -math.inf
            born = pick(score, active[stage] - active[stage - 1])
            nets.mask[born], nets.birth[born] = 1, stage
            adam.reset(born)
            score = torch.zeros_like(nets.mask)
        if arm.redraw and into == WINDOW - 1:
            strength = nets.hidden(xt, t).mean(1) * nets.W2.norm(dim=-1)
            weak = pick(-strength, round(0.2 * H))
            drawn = torch.stack([fresh(s, H, toy.d, stage) for s in seeds])
            nets.rows[weak] = drawn[weak]
            adam.reset(weak)
        if watch:
            watch(step + 1, nets)
    return nets


# ---- 7. Measures ---------------------------------------------------------------------
# A denoiser is any eps_hat(xt, t), such as Nets, toy.bayes or toy.linear. The measures
# hand it xt (1, n, d) with t (1, n), and take back (S, n, d).
GRID = TMIN + (1 - TMIN) * (torch.arange(25) + 0.5) / 25  # of t


def probe(toy, t, n, *key):
    """Return a fixed sample of x_t (1, n, d), t (1, n) and eps (1, n, d)."""
    g, t = rng(*key), torch.as_tensor(t).expand(1, n)
    eps = torch.randn(1, n, toy.d, generator=g)
    return toy.q_sample(toy.draw(1, n, generator=g), t, eps), t, eps


@torch.no_grad()
def excess(denoiser, toy, grid=GRID, n=1024, seed=0):
    """Return R_j(t) = E||M_j^T (eps_hat - eps*)||^2 over a fixed sample, (S, G, 3).

    It has no irreducible part: E||M_j^T (eps_hat - eps)||^2 = toy.mmse(t) + R_j(t).
    """
    risks = []
    for i, level in enumerate(grid):
        xt, t, _ = probe(toy, level, n, seed, 4, i)
        off = (denoiser(xt, t) - toy.bayes(xt, t)) @ toy.M
        risks.append(toy.by_feature(off.square()).mean(1))
    return torch.stack(risks, 1)


def captured(risk, toy, grid=GRID):
    """Return F_j = 1 - R_j / R_j^linear of M1 and M2, both summed over grid, (S, 2).

    risk: excess(...), (S, G, 3). 0 is the best linear denoiser of bits, 1 is Bayes.
    """
    linear = toy.linear_excess(grid).sum(0).float()
    return 1 - (risk.sum(1) / linear)[:, :2]


@torch.no_grad()
def serves(nets, toy, times=(0.7, 0.3), n=4096, seed=0):
    """Return how R_j rises when a channel's output is set to 0, (S, H, 2).

    M1 is looked at at t = times[0], M2 at times[1]. Without a channel of output h and
    c = M_j^T W2, the error e = M_j^T (eps_hat - eps*) becomes e - h c. So its square
    rises by h^2 |c|^2 - 2 h e c, and no channel has to be switched off to know it.
    """
    rises = []
    for i, M_j in enumerate((toy.M1, toy.M2)):
        xt, t, _ = probe(toy, times[i], n, seed, 5, i)
        h = nets.mask[:, None] * nets.hidden(xt, t)  # (S, n, H)
        e, c = (nets(xt, t) - toy.bayes(xt, t)) @ M_j, nets.W2 @ M_j
        cross = (h.mT @ e / n * c).sum(-1)
        rises.append(h.square().mean(1) * c.square().sum(-1) - 2 * cross)
    return torch.stack(rises, -1)


@torch.no_grad()
def generate(denoiser, toy, n=1024, steps=40, seed=0):
    """Return x0 (S, n, d), drawn by DDIM (arXiv:2010.02502) with steps calls, eta 0.

    The times are even in log-SNR, from t = 0.999 to 0.01; the last call gives x0_hat.
    """
    times, abar = (x.flip(0).float() for x in even_log_snr(toy.alphabar, steps))
    abar = F.pad(abar, (0, 1), value=1.0)  # the last step ends at clean data
    xt = torch.randn(1, n, toy.d, generator=rng(seed, 6))
    for i, t in enumerate(times):
        eps_hat = denoiser(xt, t.expand(xt.shape[:2]))
        x0_hat = (xt - (1 - abar[i]).sqrt() * eps_hat) / abar[i].sqrt()
        xt = abar[i + 1].sqrt() * x0_hat + (1 - abar[i + 1]).sqrt() * eps_hat
    return xt


def spread(x0, toy):
    """Return E(|y_j| - a_j)^2 / a_j^2 of samples x0 (S, n, d), for M1 and M2: (S, 2).

    0 is two points for each bit, 2 - 2 sqrt(2 / pi) = 0.404 a Gaussian blob.
    """
    off = toy.by_feature(((x0 @ toy.M).abs() - toy.a).square().mean(1))
    size = torch.tensor([toy.k1 * toy.a1**2, toy.k2 * toy.a2**2])
    return off[..., :2] / size
