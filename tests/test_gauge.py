"""benchmarks/gauge.py: what could be known, against brute force and known answers."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line
from test_diffusion import Fixed

sys.path.insert(0, str(ROOT / "benchmarks"))
import gauge
import measures

import superminddpm as base
import supervideo
from superminddpm import Config

LEVELS = [round((k + 0.5) * 100) for k in range(10)]


def images(n, seed=0):
    return torch.randint(0, 256, (n, 1, 2, 2), generator=base.rng("cpu", seed)).byte()


def test_the_exact_denoiser_is_bayes_rule_over_the_training_images():
    x, ab = gauge.flat(images(50)).double(), torch.tensor(0.3).double()
    xt = torch.randn(7, 4, generator=base.rng("cpu", 1)).double()
    for row, found in zip(xt, gauge.exact_x0(xt, x, ab), strict=True):
        likely = [
            torch.exp(-((row - ab.sqrt() * y) ** 2).sum() / 2 / (1 - ab)) for y in x
        ]
        want = sum(w * y for w, y in zip(likely, x, strict=True)) / sum(likely)
        torch.testing.assert_close(found, want)


def test_many_images_are_weighed_in_parts(monkeypatch):
    x, ab = gauge.flat(images(20_000)), torch.tensor(0.6)
    xt = torch.randn(5, 4, generator=base.rng("cpu", 1))
    fit = -((xt[:, None] - ab.sqrt() * x) ** 2).sum(2) / 2 / (1 - ab)
    torch.testing.assert_close(gauge.exact_x0(xt, x, ab), fit.softmax(1) @ x)


def test_the_linear_loss_is_that_of_the_least_squares_fit():
    """On the training images themselves nothing linear in x_t is better."""
    x, ab = gauge.flat(images(500)).double(), torch.tensor(0.4).double()
    x = (
        x
        @ torch.tensor(
            [[1, 0, 0, 0], [1, 0.2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
        ).double()
    )
    closed = gauge.linear_loss(gauge.principal(x), x, ab)
    big = x.repeat(400, 1)
    eps = torch.randn(big.shape, generator=base.rng("cpu", 2)).double()
    xt = ab.sqrt() * big + (1 - ab).sqrt() * eps
    xt = torch.cat([xt, torch.ones(len(xt), 1)], 1)
    rest = xt @ torch.linalg.lstsq(xt, eps).solution - eps
    assert closed == pytest.approx(rest.square().mean().item(), rel=0.01)


class Denoiser(torch.nn.Module):
    """A network whose DDPM answers with the exact or the linear denoiser of x."""

    def __init__(self, x, alphabar, exact):
        super().__init__()
        self.x, self.alphabar, self.exact = x, alphabar, exact
        self.parts = gauge.principal(x)

    def forward(self, xt, t):
        rows, ab = xt.flatten(1), self.alphabar[t[0]]
        if self.exact:
            x0 = gauge.exact_x0(rows, self.x, ab)
        else:
            mean, values, vectors = self.parts
            keep = ab * values / (ab * values + 1 - ab)
            y = (rows / ab.sqrt() - mean) @ vectors
            x0 = (mean + (keep * y) @ vectors.T).float()
        eps_hat = (rows - ab.sqrt() * x0) / (1 - ab).sqrt()
        return (eps_hat - rows).view(xt.shape)


def test_networks_that_answer_so_score_what_the_table_says():
    train, held = base.load_images(Config())
    ddpm = base.DDPM(None)
    table = gauge.references(train, held, ddpm.alphabar, LEVELS, draws=2)
    x = gauge.flat(train)
    for name, exact, rel in (("exact, held out", True, 1e-3), ("linear", False, 0.03)):
        ddpm.net = Denoiser(x, ddpm.alphabar, exact)
        for level, want in list(zip(LEVELS, table[name], strict=True))[1::3]:
            assert gauge.net_loss(ddpm, held, level, 2) == pytest.approx(want, rel=rel)
    ddpm.net = Fixed(lambda xt, t: xt)
    for level, want in zip(LEVELS, table["eps_hat = x_t"], strict=True):
        assert gauge.net_loss(ddpm, held, level, 2) == pytest.approx(want, rel=0.02)
    order = np.array([*table.values()])[
        [3, 1, 0]
    ]  # on training images, linear, trivial
    assert (np.diff(order, axis=0) > 0).all()


@pytest.mark.slow
def test_a_network_that_saw_25_digits_copies_them(monkeypatch):
    """On these it is far below what it, or a linear one, reaches on others."""
    train, held = base.load_images(Config())
    monkeypatch.setattr(base, "load_images", lambda cfg: (train[:25], held))
    cfg = Config(out="run", batch=25, steps=3000, every=10**6, quiet=True)
    base.train(cfg)
    _, table = gauge.gauge(["run"], draws=4)
    others, own = table["run"], table["run, training images"]
    assert own[3] < 0.4 * others[3] and own[3] < 0.6 * table["linear"][3]
    assert table["exact, training images"][3] < own[3]


def test_nats_are_those_of_a_gaussian():
    """For x_0 ~ N(0, v) the integral over log-SNR is known: I of mutual information."""
    ddpm, v = base.DDPM(None), 0.5

    def net(xt, t):
        ab = ddpm.alphabar[t[0]]
        return xt * (1 - ab).sqrt() / (ab * v + 1 - ab)

    ddpm.net = Fixed(net)
    x0 = torch.randn(4000, 1, 2, 2, generator=base.rng("cpu", 3)) * v**0.5
    pictures = (x0 + 1) * 127.5  # not rounded and not cut: only a scale here
    logsnr = ddpm.alphabar.double().logit()[[1000, 2]].exp()
    low, high = (1 + logsnr * v).log().tolist()  # error of eps = snr v / (1 + snr v)
    assert gauge.nats(ddpm, pictures) == pytest.approx((high - low) / 2, rel=0.01)


def test_the_floor_of_the_frechet_distance_is_that_of_gaussians():
    g = np.random.default_rng(0)
    scale = np.array([3, 1, 1, 0.5, 0.1])
    for n, m in ((300, 3000), (1000, 1000)):
        pairs = [[g.standard_normal((k, 5)) * scale for k in (n, m)] for _ in range(80)]
        far = np.mean([measures.frechet(a, b) for a, b in pairs])
        assert measures.frechet_floor(pairs[0][1], n) == pytest.approx(far, rel=0.08)


def test_the_table_of_a_run_and_its_picture(tiny, capsys):
    assert command_line(base, f"--data {tiny} --steps 2 --quiet --out run") == 0
    gauge.main(("run",), draws=1, figure="gauge.png")
    assert Path("gauge.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    rows = printed.splitlines()
    names = ["eps_hat = x_t", "linear", "exact, held out", "exact, training images"]
    names += ["run", "run, training images"]
    assert [row[:40].strip() for row in rows[1:]] == names
    assert all(len(row[40:].split()) == 10 for row in rows)
    Path("gauge.txt").write_text(f"how it was made\n\n{printed}")
    (levels, table), stored = gauge.gauge(["run"], draws=1), gauge.read("gauge.txt")
    assert stored[0].tolist() == levels and list(stored[1]) == names
    for name, row in table.items():
        np.testing.assert_allclose(stored[1][name] / 1000, row, rtol=0.005)
    with pytest.raises(ValueError, match="nowhere"):
        gauge.main(("nowhere",))


def test_one_table_is_for_one_data_set_and_for_white_noise(tiny):
    short = f"--data {tiny} --steps 1 --quiet --out"
    assert command_line(base, f"{short} run") == 0
    assert command_line(base, "--n-feat 8 --steps 1 --quiet --out digits") == 0
    with pytest.raises(ValueError, match="digits differs in its images, held-out im"):
        gauge.gauge(["run", "digits"], draws=1)
    for noise in ("shared", "progressive", "independent"):
        clips = f"{short} {noise} --seq-len 2 --noise {noise}"
        assert command_line(supervideo, clips) == 0
    for noise in ("shared", "progressive"):
        with pytest.raises(ValueError, match=f"{noise}: its frames share noise"):
            gauge.gauge([noise], draws=1)
    assert "independent" in gauge.gauge(["independent"], draws=1)[1]
