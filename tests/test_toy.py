"""The toy: closed forms against Monte Carlo and quadrature, nets against torch."""

import importlib.util
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from diffusers import DDPMScheduler
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from superminddpm import DDPM

sys.path.insert(0, str(ROOT / "notebooks"))
import toy as lab

SHORT = 168  # steps of a short run; its stages end at 10, 32, 63, 105, 168
TOY = lab.Toy()


def close(a, b, **tolerance):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, **tolerance)


def sample(toy, t, n, seed=0):
    """Return x0, xt, eps (1, n, d) and t (1, n)."""
    g, t = torch.Generator().manual_seed(seed), torch.full((1, n), t)
    x0 = toy.draw(1, n, generator=g)
    eps = torch.randn(1, n, toy.d, generator=g)
    return x0, toy.q_sample(x0, t, eps), eps, t


# ---- closed forms --------------------------------------------------------------------
def mmse_by_quadrature(s):
    """1 - E tanh(s + sqrt(s) Z), where 1 - tanh v is written 2 / (1 + exp(2 v))."""

    def density(z):
        return norm.pdf(z) * 2 * expit(-2 * (s + s**0.5 * z))

    mid = -(s**0.5)  # at high SNR all the mass is where y is near 0
    parts = [(mid - 14, mid), (mid, mid + 14)]
    return sum(quad(density, *part, epsabs=0, limit=400)[0] for part in parts)


@pytest.mark.parametrize("s", [1e-3, 0.1, 0.32, 1.0, 1.51, 4.38, 30.0, 120.0])
def test_mmse_of_a_bit_equals_quadrature(s):
    close(lab.mmse_z(s), mmse_by_quadrature(s), rtol=1e-9, atol=0)
    close(lab.eps_mmse(s), s * mmse_by_quadrature(s), rtol=1e-9, atol=0)


@pytest.mark.parametrize("s", [0.3, 1.0, 4.38, 25.0])
def test_information_is_the_integral_of_the_mmse(s):
    want = quad(lambda s: lab.mmse_z(s).item(), 0, s, epsabs=1e-9, limit=200)[0] / 2
    close(lab.information(s), want, rtol=1e-6, atol=0)


def test_closed_forms_at_the_ends():
    ends = torch.tensor([0.0, 900.0])
    close(lab.mmse_z(ends), [1.0, 0.0])
    close(lab.information(ends), [0.0, math.log(2)])
    close(lab.bit_error(ends), [0.5, 0.0])
    close(lab.eps_mmse(ends, "gauss"), [0.0, 900 / 901])
    close(lab.linear_excess(ends), [0.0, 900 / 901])


def test_bit_error_and_information_equal_monte_carlo():
    g = torch.Generator().manual_seed(0)
    for s in (0.5, 1.0, 4.0):
        noise = torch.randn(1_000_000, generator=g).double()
        y = s + s**0.5 * noise  # log p(y | +1) / p(y | -1) is 2 y, if z = +1 was sent
        close(lab.bit_error(s), (y < 0).double().mean(), rtol=0.015, atol=0)
        entropy = torch.log1p((-2 * y).exp()).mean()
        close(lab.information(s), math.log(2) - entropy, rtol=0.015, atol=0)


def test_numbers_of_the_course():
    s = torch.linspace(0.01, 10, 10_000, dtype=torch.float64)
    bump = lab.eps_mmse(s)
    peak = bump.argmax()
    assert round(bump[peak].item(), 4) == 0.4795 and round(s[peak].item(), 2) == 1.51
    half = s[bump > bump[peak] / 2]
    assert [round(half[i].item(), 2) for i in (0, -1)] == [0.32, 4.39]
    assert round(lab.eps_mmse(1.0).item(), 4) == 0.4496
    assert round(lab.information(1.0).item() / math.log(2), 2) == 0.49
    assert round(lab.bit_error(1.0).item(), 3) == 0.159


def digits(x, n):
    return [float(f"{value:.{n}g}") for value in x.tolist()]


def test_schedules_of_the_course():
    t = torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    straight, linear, cosine = (f(t) for f in lab.SCHEDULES.values())
    assert digits(straight, 3) == [0.2, 0.4, 0.6, 0.8]
    assert digits(linear, 2) == [0.0015, 0.026, 0.2, 0.66]
    assert digits(linear, 3)[1:] == [0.0259, 0.195, 0.659]
    assert digits(cosine, 3) == [0.094, 0.341, 0.647, 0.899]
    even = 1 / (1 + torch.tensor([1.0, 3.0, 10.0]).double() ** 2)  # where SNR_j is 1
    places = [lab.time_at(f, even) for f in lab.SCHEDULES.values()]
    rounded = [[round(x, 3) for x in place.tolist()] for place in places]
    assert rounded == [[0.5, 0.9, 0.99], [0.259, 0.476, 0.675], [0.496, 0.794, 0.936]]
    for f, place in zip(lab.SCHEDULES.values(), places, strict=True):
        a = torch.tensor([1.0, 3.0, 10.0])
        close([lab.snr(f(place[i]), a[i]) for i in range(3)], torch.ones(3))


def test_schedules_equal_other_code():
    t = torch.arange(1001) / 1000
    theirs = DDPMScheduler(1000, beta_schedule="linear").alphas_cumprod
    close(lab.linear_beta(t)[1:], theirs, rtol=2e-4, atol=1e-7)
    between = lab.linear_beta(torch.tensor(0.4995, dtype=torch.float64))
    ends = lab.linear_beta(torch.tensor([0.499, 0.5], dtype=torch.float64))
    close(between, ends.prod().sqrt())
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    close(lab.cosine(t)[1:999], theirs[:998], rtol=2e-3, atol=1e-6)
    close(lab.cosine(t.double())[:990], DDPM(None).alphabar[:990], rtol=1e-5, atol=0)


# ---- the data and the exact denoisers ------------------------------------------------
def test_basis_and_data():
    toy = lab.Toy(a1=2.0, a2=0.5, k1=3, k2=1, d=9)
    close(toy.M.T @ toy.M, torch.eye(9), atol=1e-6, rtol=0)
    assert toy.M1.shape == (9, 3) and toy.M2.shape == (9, 1)
    close(toy.a, [2.0] * 3 + [0.5] + [0.0] * 5)
    x0 = toy.draw(4000, generator=torch.Generator().manual_seed(0))
    z1, z2 = x0 @ toy.M1 / 2.0, x0 @ toy.M2 / 0.5
    close(z1.abs(), torch.ones(4000, 3), atol=1e-5, rtol=0)
    close(z2.abs(), torch.ones(4000, 1), atol=1e-5, rtol=0)
    z = torch.cat([z1, z2], 1)
    close(z.T @ z / 4000, torch.eye(4), atol=0.06, rtol=0)
    assert z.mean(0).abs().max() < 0.06
    close(x0 @ toy.M[:, 4:], torch.zeros(4000, 5), atol=1e-5, rtol=0)
    gauss = lab.Toy(kind="gauss").draw(50_000, generator=lab.rng(0)) @ TOY.M
    close(gauss.std(0)[:4], [3.0, 3.0, 1.0, 1.0], rtol=0.02, atol=0)
    close((gauss[:, :4] ** 4).mean(0), 3 * TOY.a[:4] ** 4, rtol=0.1, atol=0)


KINDS = [*(("bits", schedule) for schedule in lab.SCHEDULES), ("gauss", "cosine")]


@pytest.mark.parametrize("kind, schedule", KINDS)
def test_bayes_reaches_the_floor_and_nothing_moves_it_below(kind, schedule):
    toy = lab.Toy(kind=kind, alphabar=lab.SCHEDULES[schedule])
    for t in (0.1, 0.45, 0.7, 0.93):
        _, xt, eps, ts = sample(toy, t, 80_000)
        off = (toy.bayes(xt, ts) - eps) @ toy.M
        found, floor = toy.by_feature(off.square()).mean((0, 1)), toy.mmse(ts[0, :1])
        for j in range(2):
            if floor[0, j] > 0.05:
                close(found[j], floor[0, j], rtol=0.015, atol=0.005)
        assert found[2] < 1e-9 and floor[0, 2] == 0
        # an estimate is E[eps | xt] if its error is unrelated to every function of xt
        y = xt[0] @ toy.M
        for f in (y, y.sin(), y.abs().sqrt() * y.sign()):
            both = (off[0] * f)[:, :4]
            noise = 1e-5 + 5 * both.std(0) / len(both) ** 0.5
            assert (both.mean(0).abs() < noise).all()


def test_linear_denoiser_has_the_excess_of_its_formula():
    for t in (0.3, 0.6, 0.9):
        _, xt, _, ts = sample(TOY, t, 200_000)
        off = (TOY.linear(xt, ts) - TOY.bayes(xt, ts)) @ TOY.M
        found, want = (
            TOY.by_feature(off.square()).mean((0, 1)),
            TOY.linear_excess(ts[0, 0]),
        )
        close(found, want, rtol=0.015, atol=1e-6)


# ---- networks and training -----------------------------------------------------------
class Plain(torch.nn.Module):
    """One denoiser, as a textbook writes it, with the weights of one of Nets."""

    def __init__(self, nets, s, d=12):
        super().__init__()
        H = nets.mask.shape[1]
        self.W1, self.U = torch.nn.Linear(d, H, bias=False), torch.nn.Linear(16, H)
        self.W2 = torch.nn.Linear(H, d)
        W1, U, b, W2 = nets.rows[s].split((d, 16, 1, d), 1)
        parts = (self.W1.weight, self.U.weight, self.U.bias, self.W2.weight)
        values = (W1, U, b[:, 0], W2.T)
        with torch.no_grad():
            self.W2.bias.copy_(nets.b2[s, 0])
            for part, value in zip(parts, values, strict=True):
                part.copy_(value)

    def forward(self, xt, t, mask=1.0):
        wave = t[:, None] * math.pi * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
        emb = torch.cat([wave.sin(), wave.cos()], 1)
        return xt + self.W2(mask * torch.relu(self.W1(xt) + self.U(emb)))

    def rows(self):
        parts = (self.W1.weight, self.U.weight, self.U.bias[:, None], self.W2.weight.T)
        return torch.cat(parts, 1)


def test_nets_equal_one_module_per_seed():
    nets, g = lab.Nets((3, 0, 8), H=7), torch.Generator().manual_seed(0)
    nets.b2 = torch.randn(3, 1, 12, generator=g)
    nets.mask[1, 2:5] = 0
    xt, t = torch.randn(3, 50, 12, generator=g), torch.rand(3, 50, generator=g)
    for s in range(3):
        want = Plain(nets, s)(xt[s], t[s], nets.mask[s])
        close(nets(xt, t)[s], want, atol=1e-5, rtol=0)
        close(
            nets(xt[:1], t[:1])[s],
            Plain(nets, s)(xt[0], t[0], nets.mask[s]),
            atol=1e-5,
            rtol=0,
        )
    nets.rows[1, 2:5] = 9.0  # what is masked says nothing
    close(nets(xt, t)[1], Plain(nets, 1)(xt[1], t[1], nets.mask[1]), atol=1e-5, rtol=0)


def test_nets_start_as_linear_layers_do_and_alike_for_a_seed():
    rows = lab.fresh(0, 4000, 12)
    assert rows.shape == (4000, 41)
    close(rows[:, :29].abs().max(), 28**-0.5, rtol=1e-3, atol=0)
    close(rows[:, 29:].abs().max(), 4000**-0.5, rtol=1e-3, atol=0)
    assert torch.equal(lab.Nets((1, 3)).rows[1], lab.Nets((3,)).rows[0])
    assert not torch.equal(lab.fresh(0, 5, 12), lab.fresh(1, 5, 12))
    assert not torch.equal(lab.fresh(0, 5, 12), lab.fresh(0, 5, 12, 1))


def reference(name, seed, H, lr):
    """Return rows (H, 41) after SHORT steps with torch.optim.Adam, written plainly."""
    arm = lab.ARMS[name] if isinstance(name, str) else name
    plain = Plain(lab.Nets([seed], H), 0)
    opt = torch.optim.Adam(plain.parameters(), lr)
    cosine = [1, 0.8535534, 0.5, 0.1464466, 0]
    for step, batch in enumerate(lab.batches(arm.density, TOY, [seed], SHORT)):
        stage, t, xt, eps = batch
        error = (plain(xt[0], t[0]) - eps[0]).square().mean(1)
        if arm.min_snr:
            ratio = (1 - t[0]) / t[0]
            error = error * torch.minimum(ratio, torch.tensor(5.0)) / ratio
        lam = arm.lam * cosine[stage]
        loss = error.mean()
        if not arm.prox:
            loss = loss + lam * plain.rows().square().sum(1).sqrt().sum()
        opt.param_groups[0]["lr"] = now = lr * min(1, (SHORT - step) / (SHORT / 4))
        opt.zero_grad()
        loss.backward()
        opt.step()
        if arm.prox:
            v = [opt.state[p]["exp_avg_sq"] for p in opt.param_groups[0]["params"]]
            v = torch.cat([v[0], v[1], v[2][:, None], v[3].T], 1)  # W1, U, b, W2
            pace = now / (v / (1 - 0.999 ** (step + 1))).sqrt().mean(1)
            size = plain.rows().norm(dim=1)
            keep = (size - pace * lam).clamp(min=0) / size
            with torch.no_grad():
                plain.W1.weight *= keep[:, None]
                plain.U.weight *= keep[:, None]
                plain.U.bias *= keep
                plain.W2.weight *= keep
    return plain.rows().detach(), plain.W2.bias.detach()


ADDED = [lab.Arm("reversed", lam=3e-3), lab.Arm("reversed", lam=3e-3, prox=True)]


@pytest.mark.parametrize("arm", ["curriculum", "min-snr-5", *ADDED])
def test_training_equals_a_plain_loop_with_torch_adam(arm):
    nets = lab.train(arm, seeds=(4, 2), H=6, steps=SHORT, lr=3e-3)
    rows, b2 = reference(arm, 2, 6, 3e-3)
    # rounding may put a sample on the other side of a ReLU's kink, hence the mean
    assert (nets.rows[1] - rows).abs().mean() < 1e-4
    assert (nets.b2[1, 0] - b2).abs().mean() < 1e-4
    assert (nets.mask == 1).all() and (nets.birth == 0).all()


def test_prox_gives_exact_zeros_and_the_penalty_does_not():
    count = []
    for prox in (True, False):
        arm = lab.Arm(lam=1e-2, prox=prox)
        nets = lab.train(arm, seeds=[0], H=16, steps=SHORT, lr=3e-2)
        count.append((nets.rows == 0).all(-1).sum().item())
    assert count[0] > 0 and count[1] == 0
    assert nets.rows.isfinite().all()


def test_same_seed_same_result_whoever_runs_beside():
    arm = "curriculum-mask-random"
    one, two = (lab.train(arm, seeds=(3, 5), H=8, steps=SHORT) for _ in range(2))
    assert torch.equal(one.rows, two.rows) and torch.equal(one.mask, two.mask)
    assert not torch.allclose(one.rows[0], one.rows[1])
    alone = lab.train(arm, seeds=[5], H=8, steps=SHORT)
    close(alone.rows[0], one.rows[1], atol=1e-3, rtol=0)
    assert torch.equal(alone.birth[0], one.birth[1])


def test_paired_seeds_share_draws_whatever_the_arm():
    toy, kinds = TOY, ("uniform", "curriculum", "shuffled")
    runs = [list(lab.batches(kind, toy, (7, 1), SHORT, batch=9)) for kind in kinds]
    runs.append(list(lab.batches("uniform", toy, (1, 2), SHORT, batch=9)))
    bits = []
    for k in (0, 1, 50, 120, 167):  # also beyond the first block of draws
        us, x0s, epss = [], [], []
        for run, seat in zip(runs, (1, 1, 1, 0), strict=True):
            stage, t, xt, eps = run[k]
            t, xt, eps = t[seat], xt[seat], eps[seat]
            assert stage == sum(k >= end for end in (10, 32, 63, 105))
            x0s.append((xt - t[:, None].sqrt() * eps) @ toy.M[:, :4])
            us.append((t - 0.01) / 0.99)
            epss.append(eps)
        assert all(torch.equal(epss[0], eps) for eps in epss[1:])
        assert all(torch.equal(x0s[0].sign(), x0.sign()) for x0 in x0s[1:])
        bits.append(x0s[0].sign())
        low = (0.8, 0.6, 0.4, 0.2, 0.01)[stage]
        close(us[1], ((us[0] * (1 - low) + low) - 0.01) / 0.99, atol=1e-5, rtol=0)
        assert torch.equal(us[0].argsort(), us[2].argsort())
        close(us[0], us[3])
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(bits))
    eps = [run[0][3][0] for run in (runs[0], runs[3])]  # seed 7 and seed 1
    assert not torch.allclose(*eps)
    assert not torch.allclose(runs[0][0][3], runs[0][1][3])
    assert not torch.allclose(runs[0][0][3], runs[0][100][3])


def even(n=2000):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_densities_of_t():
    assert lab.stage_ends(3000) == [188, 562, 1125, 1875, 3000]
    assert lab.stage_ends(SHORT) == [10, 32, 63, 105, 168]
    edges, upper = (0.8, 0.6, 0.4, 0.2, 0.01), (1.0, 0.8, 0.6, 0.4, 0.2)
    for stage, (low, high) in enumerate(zip(edges, upper, strict=True)):
        for kind, ends in {
            "uniform": (0.01, 1.0),
            "curriculum": (low, 1.0),
            "reversed": (0.01, 1.01 - low),
            "disjoint": (low, high),
        }.items():
            t = lab.draw_t(kind, even(), stage, 3000)
            close(t, ends[0] + (ends[1] - ends[0]) * even(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no density"):
        lab.draw_t("soft", even(), 0, 3000)


def test_shuffled_has_the_marginal_of_the_curriculum():
    ends, steps = lab.stage_ends(3000), 3000
    stages = [sum(step >= end for end in ends) for step in range(steps)]
    ordered = []
    for step, stage in enumerate(stages):
        u = (even(64) + step * 0.6180339887 / 64) % 1
        ordered.append(lab.draw_t("curriculum", u, stage, steps))
    ordered = torch.cat(ordered).sort().values
    shuffled = lab.draw_t("shuffled", even(len(ordered)), 0, steps)
    close(shuffled, ordered, atol=2e-3, rtol=0)
    assert torch.equal(shuffled, lab.draw_t("shuffled", even(len(ordered)), 4, steps))


@pytest.mark.parametrize("schedule", lab.SCHEDULES)
def test_log_snr_density_is_even_in_log_snr(schedule):
    f = lab.SCHEDULES[schedule]
    t = lab.draw_t("log-SNR", even(), 0, 3000, f).double()
    close(t[[0, -1]], [0.01, 0.999], rtol=0.01, atol=0)
    ends = f(torch.tensor([0.01, 0.999], dtype=torch.float64)).logit()
    want = ends[0] + (ends[1] - ends[0]) * even()
    close(f(t).logit(), want, atol=0.02, rtol=0)


# ---- births --------------------------------------------------------------------------
def watched(arm, H=16, lr=3e-3, seeds=(0, 1)):
    """Return the trained nets, and rows, b2, mask, birth before and after each step."""
    seen, start = [], lab.Nets(seeds, H)
    n = lab.n_active(H)[0] if lab.ARMS[arm].regrow else H
    start.mask[:, n:], start.birth[:, n:] = 0, -1

    def keep(nets):
        parts = (nets.rows, nets.b2, nets.mask, nets.birth)
        seen.append([part.clone() for part in parts])

    def watch(step, nets):
        assert step == len(seen)
        keep(nets)

    keep(start)
    nets = lab.train(arm, seeds=seeds, H=H, steps=SHORT, lr=lr, watch=watch)
    assert torch.equal(seen[-1][0], nets.rows)
    return nets, seen


MASKED = [name for name, arm in lab.ARMS.items() if arm.regrow]


def test_active_channels():
    assert lab.n_active(128) == [26, 51, 77, 102, 128]
    assert lab.n_active(64) == [13, 26, 38, 51, 64]
    assert lab.n_active(16) == [3, 6, 10, 13, 16]
    with pytest.raises(ValueError, match="too few"):
        lab.train("uniform", steps=100)


@pytest.mark.parametrize("arm", MASKED)
def test_masked_channels_stay_as_they_were_until_their_birth(arm):
    nets, seen = watched(arm)
    births = [10 + 20, 32 + 20, 63 + 20, 105 + 20]
    for step, (rows, _, mask, birth) in enumerate(seen):
        stage = sum(step >= birth for birth in births)
        assert (mask.sum(1) == lab.n_active(16)[stage]).all()
        born = (nets.birth >= 0) & (nets.birth <= stage)
        assert torch.equal(mask == 1, born)
        assert torch.equal(birth, nets.birth.where(born, -1))
        assert torch.equal(rows[mask == 0], seen[0][0][mask == 0])  # bit for bit
        if step > births[stage - 1] * (stage > 0):
            assert (rows != seen[0][0]).any(-1)[mask == 1].all()  # all others learn
    assert nets.birth.min() == 0 and nets.birth.max() == 4


def gradient(rows, b2, mask, batch):
    """Return dLoss/drows (S, H, 41) by a plain module for each seed."""
    nets, parts = lab.Nets(range(len(rows)), rows.shape[1]), []
    nets.rows, nets.b2 = rows, b2
    for s in range(len(rows)):
        plain = Plain(nets, s)
        loss = F.mse_loss(plain(batch[2][s], batch[1][s], mask[s]), batch[3][s])
        loss.backward()
        grads = [plain.W1.weight, plain.U.weight, plain.U.bias, plain.W2.weight]
        W1, U, b, W2 = (p.grad for p in grads)
        parts.append(torch.cat([W1, U, b[:, None], W2.T], 1))
    return torch.stack(parts)


def test_a_newborn_channel_is_updated_by_a_fresh_adam():
    arm = "curriculum-mask-gradient"
    nets, seen = watched(arm)
    data = list(lab.batches("curriculum", TOY, (0, 1), SHORT))
    for stage, birth in ((2, 52), (4, 125)):
        born = nets.birth == stage
        row = seen[0][0][born].clone().requires_grad_()
        opt = torch.optim.Adam([row])
        for step in range(birth, birth + 10):
            row.grad = gradient(*seen[step][:3], data[step])[born]
            opt.param_groups[0]["lr"] = 3e-3 * min(1, 4 * (1 - step / SHORT))
            opt.step()
            close(row.detach(), seen[step + 1][0][born], atol=2e-5, rtol=0)


def test_gradient_regrowth_takes_the_channels_of_the_highest_score():
    """The loss is quadratic in a mask entry, so a central difference is exact."""
    nets, seen = watched("uniform-mask-gradient")
    data = list(lab.batches("uniform", TOY, (0, 1), SHORT))
    probe = lab.Nets((0, 1), 16)
    for stage, start in ((1, 10), (3, 63)):
        score = torch.zeros(2, 16)
        for step in range(start, start + 20):
            probe.rows, probe.b2, mask, _ = seen[step]
            for h in range(16):
                loss = []
                for change in (0.5, -0.5):
                    probe.mask = mask.clone()
                    probe.mask[:, h] += change
                    off = probe(data[step][2], data[step][1]) - data[step][3]
                    loss.append(off.square().mean((1, 2)))
                score[:, h] += (loss[0] - loss[1]).abs()
        for s in range(2):
            born = score[s, nets.birth[s] == stage]
            later = score[s, nets.birth[s] > stage]
            assert len(born) in (3, 4) and born.min() > later.max() * 0.999


def test_random_regrowth_is_not_the_order_of_channels_nor_that_of_the_score():
    chance, by_score = (lab.train(arm, H=32, steps=SHORT) for arm in MASKED[1::-1])
    assert not torch.equal(chance.birth, by_score.birth)
    assert (chance.birth.diff(dim=1) < 0).any(1).all()
    assert len({tuple(birth) for birth in chance.birth.tolist()}) == 5


def test_redraw_replaces_the_weakest_fifth_by_new_channels():
    H, lr = 16, 1e-6  # at this rate the strengths hardly move within a step
    nets, seen = watched("uniform-redraw", H, lr)
    data = list(lab.batches("uniform", TOY, (0, 1), SHORT))
    for stage, birth in ((1, 30), (2, 52), (3, 83), (4, 125)):
        before, after = seen[birth - 1], seen[birth]
        jumped = (before[0] - after[0]).abs().amax(-1) > 1e-3
        new = torch.stack([lab.fresh(s, H, 12, stage) for s in (0, 1)])
        assert (jumped.sum(1) == 3).all()
        assert torch.equal(after[0][jumped], new[jumped])
        nets.rows = before[0]
        h = nets.hidden(data[birth - 1][2], data[birth - 1][1]).mean(1)
        strength = h * before[0][..., 29:].norm(dim=-1)
        for s in range(2):
            assert strength[s][jumped[s]].max() < strength[s][~jumped[s]].min()
        step = seen[birth + 1][0] - after[0]  # a fresh Adam first moves by lr, in size
        live = step[jumped][step[jumped] != 0]
        close(live.abs().median(), lr, rtol=0.05, atol=0)


# ---- measures ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return lab.train("uniform", seeds=(0, 1), H=24, steps=400)


def test_excess_is_the_error_above_the_floor(trained):
    grid = torch.tensor([0.25, 0.6, 0.9])
    risk = lab.excess(trained, TOY, grid, n=50_000)
    assert risk.shape == (2, 3, 3)
    for i, t in enumerate(grid.tolist()):
        _, xt, eps, ts = sample(TOY, t, 100_000, seed=9)
        with torch.no_grad():
            error = (trained(xt, ts) - eps) @ TOY.M
        mse = TOY.by_feature(error.square()).mean(1).double()
        want = mse - TOY.mmse(ts[0, 0])
        close(risk[:, i], want, rtol=0.03, atol=0.006)


def test_excess_and_captured_fraction_of_known_denoisers():
    assert lab.excess(TOY.bayes, TOY, n=64).abs().max() == 0
    risk = lab.excess(TOY.linear, TOY, n=20_000)
    close(risk[0], TOY.linear_excess(lab.GRID), atol=0.03, rtol=0.02)
    close(lab.captured(risk, TOY), [[0.0, 0.0]], atol=0.01, rtol=0)
    close(
        lab.captured(risk * torch.tensor([0.0, 0.25, 7]), TOY)[0],
        [1, 0.75],
        atol=3e-3,
        rtol=0,
    )
    assert torch.equal(lab.excess(TOY.linear, TOY), lab.excess(TOY.linear, TOY))
    close(lab.GRID[[0, 12, 24]], [0.0298, 0.505, 0.9802])


def test_every_level_of_a_measure_has_noise_of_its_own():
    one, same, other = (lab.probe(TOY, 0.5, 50, 0, 4, key) for key in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.allclose(one[2], other[2])
    x0 = (one[0] - 0.5**0.5 * one[2]) * 2**0.5 @ TOY.M[:, :4]
    close(x0.abs(), TOY.a[:4].expand(1, 50, 4), atol=1e-4, rtol=0)


def test_what_a_channel_serves_equals_switching_it_off(trained):
    rises = lab.serves(trained, TOY, n=1000)
    assert rises.shape == (2, 24, 2)
    for i, (M_j, level) in enumerate(((TOY.M1, 0.7), (TOY.M2, 0.3))):
        xt, t, _ = lab.probe(TOY, level, 1000, 0, 5, i)
        for h in (0, 5, 23):
            risk = []
            for keep in (0.0, 1.0):
                trained.mask[:, h] = keep
                off = (trained(xt, t) - TOY.bayes(xt, t)) @ M_j
                risk.append(off.square().sum(-1).mean(1))
            close(rises[:, h, i], risk[0] - risk[1], atol=1e-5, rtol=1e-3)
    trained.mask[0, 3] = 0
    assert (lab.serves(trained, TOY, n=100)[0, 3] == 0).all()
    trained.mask[0, 3] = 1


def test_spread_of_known_samples():
    toy = lab.Toy(a1=2.0, a2=0.5, k1=3, k2=1)
    x0 = toy.draw(1, 100_000, generator=lab.rng(0))
    close(lab.spread(x0, toy), [[0.0, 0.0]], atol=1e-6, rtol=0)
    close(lab.spread(1.1 * x0, toy), [[0.01, 0.01]], rtol=1e-3, atol=0)
    blob = lab.Toy(2.0, 0.5, 3, 1, kind="gauss").draw(1, 100_000, generator=lab.rng(0))
    assert round(2 - 2 * math.sqrt(2 / math.pi), 3) == 0.404
    close(lab.spread(blob, toy), [[0.404, 0.404]], rtol=0.02, atol=0)


@pytest.mark.parametrize("schedule", lab.SCHEDULES)
def test_generation_with_the_exact_denoiser_gives_the_data(schedule):
    bits = lab.Toy(alphabar=lab.SCHEDULES[schedule])
    x0 = lab.generate(bits.bayes, bits, n=2000)
    assert x0.shape == (1, 2000, 12) and lab.spread(x0, bits).max() < 1e-4
    z = (x0[0] @ bits.M[:, :4]).sign()
    assert z.mean(0).abs().max() < 0.1
    assert (x0[0] @ bits.M[:, 4:]).abs().max() < 0.05
    gauss = lab.Toy(kind="gauss", alphabar=lab.SCHEDULES[schedule])
    x0 = lab.generate(gauss.bayes, gauss, n=5000, steps=400)[0]
    std = (x0 @ gauss.M).std(0)
    close(std[:4], [3.0, 3.0, 1.0, 1.0], rtol=0.04, atol=0)


def test_generation_asks_forty_times_at_falling_times():
    asked = []

    def denoiser(xt, t):
        asked.append(t.unique().item())
        return TOY.linear(xt, t)

    lab.generate(denoiser, TOY, n=4)
    log_snr = (1 - torch.tensor(asked).double()).logit()
    close([asked[0], asked[-1]], [0.999, 0.01], rtol=1e-3, atol=0)
    close(log_snr.diff(), [(math.log(99) + math.log(999)) / 39] * 39, rtol=0.01, atol=0)


# ---- the benchmark -------------------------------------------------------------------
@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks/toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verdicts_follow_the_stated_rule(bench):
    base = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    noise = np.array([1.0, -1.0] * 4)  # standard error (8 / 7 / 8) ** 0.5 = 0.378
    for gap, verdict in (
        (-0.9, "better"),
        (-0.88, "tied"),
        (0.88, "tied"),
        (0.9, "worse"),
    ):
        mean, error, word = bench.compare(base + noise + gap, base)
        assert word == verdict and mean == pytest.approx(gap)
        assert error == pytest.approx(1 / 7**0.5)
    runs = {lr: {"excess": [e, e]} for lr, e in ((1, np.nan), (2, 0.5), (3, 0.7))}
    assert bench.best_rate(runs) == 2


@pytest.mark.slow
def test_benchmark_resumes_and_writes_its_table(bench, tmp_path):
    arms = ("curriculum-mask-random",)
    opt = bench.Options(2, 2, ((8, SHORT),), (1e-2, 2e-2), arms, tmp_path / "out")
    bench.main(opt)
    path, table = opt.out / "toy.jsonl", (opt.out / "toy.txt").read_text()
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * 3  # uniform is always there
    rows = [json.loads(line) for line in lines]
    final = [row for row in rows if row["part"] == "final"]
    tuned = {row["lr"]: np.mean(row["excess"]) for row in rows[:2]}
    assert final[0]["lr"] == min(tuned, key=tuned.get)
    nets = lab.train("uniform", seeds=range(2), H=8, steps=SHORT, lr=final[0]["lr"])
    risk = lab.excess(nets, TOY)
    close(final[0]["excess"], risk.sum(-1).mean(1), atol=1e-4, rtol=0)
    for j, name in enumerate(("R1", "R2", "rest")):
        close(final[0][name], risk.mean(1)[:, j], atol=1e-4, rtol=0)
    spread = lab.spread(lab.generate(nets, TOY), TOY)
    rises, linear = lab.serves(nets, TOY), 2 * lab.linear_excess([27 / 7, 7 / 3])
    hurts = [(rises[..., j] > 0.01 * linear[j]).sum(1) for j in range(2)]
    for j, name in enumerate(("1", "2")):
        close(final[0]["F" + name], lab.captured(risk, TOY)[:, j], atol=1e-4, rtol=0)
        close(final[0]["G" + name], spread[:, j], atol=1e-4, rtol=0)
        serving = np.add(final[0]["only_M" + name], final[0]["both"])
        assert serving.tolist() == hurts[j].tolist()
    assert final[0]["zero_rows"] == [0, 0] and np.shape(final[0]["risk"]) == (25, 3)
    assert np.shape(final[1]["rise_by_birth"]) == (5, 2)
    for row in final:
        assert f"{row['arm']:26}" in table and f"{np.mean(row['excess']):.3f}" in table

    path.write_text("\n".join([*lines[:3], lines[3][:70]]))  # killed while it wrote
    bench.main(opt)
    again = path.read_text().splitlines()
    assert again[:3] == lines[:3] and len(again) == 6
    for old, new in zip(lines, again, strict=True):
        old, new = json.loads(old), json.loads(new)
        assert old | {"seconds": 0} == new | {"seconds": 0}
