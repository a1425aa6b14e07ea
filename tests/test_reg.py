"""Group L1: which groups, the penalty, the proximal step, what is counted."""

import math
from pathlib import Path

import pytest
import torch
from conftest import command_line, finish, start, state
from scipy.optimize import minimize
from test_family import small, work
from torch import nn

import superreg
from superreg import Config, build, filter_norms, lambda_of, proximal_step, rng, shrink

ONE_STAGE = {"stages": (0.0,), "epochs_per_stage": (1,)}


def run(out, **changes):
    """Train a short run without pictures; return its last checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superreg, "save_grid", lambda *_: None)
        superreg.train(small("superreg", out, **changes))
    return state(out)


def raw_norms(out):
    return filter_norms(superreg.load(f"{out}/last.pt", ema=False).net).detach()


# ---- lambda and Omega ----------------------------------------------------------------


def test_lambda_is_half_a_cosine_over_the_stages():
    want = [5e-5, 4.267766952966369e-5, 2.5e-5, 7.322330470336314e-6, 0]
    found = [lambda_of(Config(), stage) for stage in range(5)]
    assert found == pytest.approx(want, abs=1e-18)
    assert lambda_of(Config(lambda_max=3.0), 2) == pytest.approx(1.5)
    assert lambda_of(Config(reg="none"), 0) == 0
    assert lambda_of(Config(**ONE_STAGE), 0) == 5e-5


def test_the_norms_are_those_of_a_loop_over_output_channels():
    net, loop = build(Config(n_feat=8), (3, 8, 8)).net, []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            for c in range(layer.out_channels):
                squares = layer.weight[c].detach().double().square()
                loop.append(math.sqrt(squares.sum()))
    assert len(loop) == 299
    torch.testing.assert_close(filter_norms(net), torch.tensor(loop))


def test_the_penalty_pulls_with_length_1_and_at_a_zero_filter_with_0():
    net = build(Config(n_feat=8), (1, 8, 8)).net
    weight = net.down1.conv1.weight
    weight.detach()[1] = 0
    filter_norms(net).sum().backward()
    grad = weight.grad.flatten(1)
    assert (grad[1] == 0).all()
    unit = nn.functional.normalize(weight.detach().flatten(1))
    torch.testing.assert_close(grad, unit)
    assert net.time1.weight.grad is None and net.norm.weight.grad is None


# ---- the proximal step ---------------------------------------------------------------


def test_shrink_is_the_minimiser():
    """Against scipy, from several starts, on random filters and thresholds."""
    g = rng("cpu", 2)
    w = torch.randn(6, 4, generator=g, dtype=torch.float64)
    tau = torch.tensor([0.1, 0.5, 1.0, 1.5, 3.0, 9.0], dtype=torch.float64)
    found = shrink(w, tau)
    for row, threshold, got in zip(w, tau, found, strict=True):

        def cost(x, row=row, threshold=threshold):
            x = torch.as_tensor(x)
            return (threshold * x.norm() + (x - row).square().sum() / 2).item()

        starts = (row, row / 2, row * 1e-3)
        best = min(minimize(cost, s.numpy(), method="Powell").fun for s in starts)
        assert cost(got) <= best + 1e-9
        norm = row.norm().item()
        assert got.norm().item() == pytest.approx(max(0, norm - threshold.item()))
    assert (found[-1] == 0).all() and (found[0] != 0).all()
    zero = shrink(torch.zeros(2, 3), torch.tensor([0.0, 1.0]))
    assert torch.equal(zero, torch.zeros(2, 3))


def test_the_step_size_is_that_of_adam():
    """A filter whose gradients were all g each time moved by lr = eta |g| each time."""
    torch.manual_seed(0)
    net, lam, lr = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(4, 4)), 0.02, 1e-2
    opt = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    size = torch.tensor([0.01, 0.1, 1.0, 10.0, 0.0])
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        net[0].weight.grad *= size.view(5, 1, 1, 1)
        opt.step()
    before = [p.detach().clone() for p in net.parameters()]
    proximal_step(net, opt, lam, step=2)
    eta = lr / (size**2 + lam**2 / 27).sqrt()  # 27 weights a filter
    old, new = (w.detach().flatten(1) for w in (before[0], net[0].weight))
    keep = (1 - eta * lam / old.norm(dim=1)).clamp(min=0)
    torch.testing.assert_close(new, old * keep[:, None], rtol=1e-4, atol=1e-6)
    others = zip(before[1:], [*net.parameters()][1:], strict=True)
    assert all(torch.equal(a, b) for a, b in others)  # neither biases nor nn.Linear


def test_no_filter_is_emptied_at_step_1(tiny):
    """The last layer begins at 0, so at step 1 no other layer has a gradient."""
    for lam in (5e-5, 1e-3):
        run(f"run{lam}", steps=1, reg="prox", lambda_max=lam, **ONE_STAGE)
        norms = raw_norms(f"run{lam}")
        assert (norms > 0).all() and len(norms) == 297


def test_only_the_proximal_step_gives_zeros_and_they_come_back(tiny):
    """The same lambda, the same steps; the subgradient gets to no zero at all."""
    options = {"lambda_max": 3e-2, "lr": 1e-2, "steps": 24, "every": 1000}
    last = {reg: run(reg, reg=reg, **options) for reg in ("none", "penalty", "prox")}
    for reg, run_of in last.items():
        zeros = [row["zero_filters"] for row in run_of["history"]]
        assert zeros[-1] == 0  # when lambda is 0
        assert (zeros[0] > 20 and zeros[1] > 20) if reg == "prox" else not any(zeros)
    omega = {reg: raw_norms(reg).sum().item() for reg in last}
    assert omega["penalty"] < 0.95 * omega["none"]
    assert omega["prox"] < 0.95 * omega["none"]


# ---- what the loop does with them ----------------------------------------------------


def test_the_penalty_is_in_the_gradient_and_not_in_the_loss(tiny):
    """After one step Adam's first moment is a tenth of the whole gradient."""
    options = {"steps": 1, "grad_clip": 0.0, "lambda_max": 0.1, **ONE_STAGE}
    plain, pulled = (run(reg, reg=reg, **options) for reg in ("none", "penalty"))
    torch.manual_seed(0)
    net = build(small("superreg", "x"), (1, 8, 8)).net
    (0.1 * filter_norms(net).sum()).backward()
    for i, weight in enumerate(net.parameters()):
        a, b = (last["opt"]["state"][i]["exp_avg"] for last in (plain, pulled))
        want = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(10 * (b - a), want, atol=1e-5, rtol=1e-3)
    rows = [last["history"][-1] for last in (plain, pulled)]
    assert rows[0]["loss"] == rows[1]["loss"] == rows[0]["total"]
    assert rows[1]["total"] > rows[1]["loss"] and rows[0]["reg"] == 0


def test_loss_penalty_and_total_are_logged_apart(tiny):
    rows = run("run", lambda_max=1e-3, every=1000)["history"]
    lams = [row["lambda"] for row in rows]
    assert lams == pytest.approx([1e-3, 5e-4, 0], abs=1e-12)
    for row in rows:
        assert row["total"] == pytest.approx(row["loss"] + row["reg"])
    assert [row["reg"] > 0 for row in rows] == [True, True, False]


@pytest.mark.parametrize("reg", ["penalty", "prox"])
def test_filters_are_counted_in_the_raw_weights(tiny, reg):
    options = {"lambda_max": 3e-2, "lr": 1e-2, "steps": 25, "every": 1000}
    row = run("run", reg=reg, **options, **ONE_STAGE)["history"][-1]
    norms = raw_norms("run")
    assert row["zero_filters"] == (norms == 0).sum()
    assert row["small_filters"] == (norms < 0.01).sum() >= row["zero_filters"]
    assert row["reg"] == pytest.approx(3e-2 * norms.sum().item(), rel=1e-5)
    averaged = filter_norms(superreg.load("run/last.pt").net)
    assert (averaged == 0).sum() == 0 and (row["zero_filters"] > 0) == (reg == "prox")


def test_the_proximal_step_follows_that_of_adam(tiny):
    """After one step: the plain run, shrunk filter by filter as the docstring says."""
    options = {"steps": 1, "lambda_max": 0.05, **ONE_STAGE}
    plain, pulled = (run(reg, reg=reg, **options) for reg in ("none", "prox"))
    lr = plain["opt"]["param_groups"][0]["lr"]
    names = [name for name, _ in superreg.load("none/last.pt").named_parameters()]
    for i, name in enumerate(names):
        want, v = plain["net"][name], plain["opt"]["state"][i]["exp_avg_sq"] / 0.01
        if want.dim() == 4:
            eta = lr / (v.mean((1, 2, 3)) + 0.05**2 / want[0].numel()).sqrt()
            keep = 1 - 0.05 * eta / want.square().sum((1, 2, 3)).sqrt()
            want = want * keep.clamp(min=0).view(-1, 1, 1, 1)
        torch.testing.assert_close(pulled["net"][name], want, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("reg", ["penalty", "prox"])
def test_two_processes_pull_as_one(tiny, reg):
    """The penalty counts once, and not once for each process."""
    options = {"steps": 6, "lambda_max": 1e-2, "lr": 2e-3, "reg": reg, "every": 1000}
    cfg = small("superreg", "two", **options)
    assert finish(start(work, "superreg", cfg, world=2)) == [0, 0]
    one, two = run("one", **options)["net"], state("two")["net"]
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lambda-max -1", "--lambda-max cannot be -1"),
        ("--reg l1", "invalid choice 'l1'"),
    ],
)
def test_options_that_make_no_sense_are_refused(line, message, capsys):
    assert command_line(superreg, f"{line} --steps 1 --quiet") == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown and "Traceback" not in shown
    assert not Path("runs").exists()
