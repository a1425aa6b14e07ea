"""Group L1: which groups, the penalty, the proximal step, what is counted."""

import csv
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize
from test_family import train
from test_train import state
from torch import nn

import superreg
from superreg import Config, build, filter_norms, group_l1, lambda_at, rng


def test_lambda_over_the_stages():
    want = {
        "cosine": [5e-5, 4.267766952966369e-5, 2.5e-5, 7.322330470336314e-6, 0],
        "linear": [5e-5, 3.75e-5, 2.5e-5, 1.25e-5, 0],
        "constant": [5e-5] * 5,
    }
    for schedule, values in want.items():
        cfg = Config(lambda_schedule=schedule)
        found = [lambda_at(cfg, stage) for stage in range(5)]
        assert found == pytest.approx(values, abs=1e-9 * 5e-5)
    assert lambda_at(Config(reg="none"), 0) == 0
    assert lambda_at(Config(stages="0", epochs_per_stage="1"), 0) == 5e-5


class Net(nn.Module):
    """A convolution of each kind, and weights that are no filters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3)
        self.up = nn.ConvTranspose2d(5, 2, 4, stride=2)
        self.linear = nn.Linear(7, 7)
        self.norm = nn.GroupNorm(1, 5)


def test_the_norms_are_those_of_a_loop_over_output_channels():
    net = Net()
    loop = [net.conv.weight[k].square().sum().sqrt() for k in range(5)]
    loop += [net.up.weight[:, k].square().sum().sqrt() for k in range(2)]
    torch.testing.assert_close(filter_norms(net), torch.stack(loop))
    torch.testing.assert_close(group_l1(net), sum(loop))


def test_the_unet_has_a_norm_for_every_filter():
    net = build(Config(n_feat=8), (1, 8, 8)).net
    convs = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(filter_norms(net)) == sum(layer.out_channels for layer in convs)
    assert len(filter_norms(net)) == sum(len(w) for w in superreg.filters(net).values())


def test_the_penalty_has_gradient_0_and_not_nan_at_a_zero_filter():
    net = Net()
    with torch.no_grad():
        net.conv.weight[1] = 0
        net.up.weight[:, 0] = 0
    group_l1(net).backward()
    assert (net.conv.weight.grad[1] == 0).all()
    assert (net.up.weight.grad[:, 0] == 0).all()
    unit = net.conv.weight / net.conv.weight.square().sum((1, 2, 3), True).sqrt()
    torch.testing.assert_close(net.conv.weight.grad[2], unit[2].detach())


def test_shrink_is_the_minimiser():
    """Against scipy, from several starts, on random filters and thresholds."""
    g = rng("cpu", 2)
    w = torch.randn(6, 4, generator=g, dtype=torch.float64)
    tau = torch.tensor([0.1, 0.5, 1.0, 1.5, 3.0, 9.0], dtype=torch.float64)
    found = superreg.shrink(w, tau)
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
    zero = superreg.shrink(torch.zeros(2, 3), torch.tensor([0.0, 1.0]))
    assert torch.equal(zero, torch.zeros(2, 3))


def test_the_step_size_is_that_of_adam():
    """The prox minimises lam |w| + |w - w'|^2 / (2 eta), with Adam's own eta.

    Where all gradients of a filter are equal, eta is what moved its weights: the step
    was eta times the gradient. The penalty's own gradient, of norm lam, comes on top.
    """
    net, lam = Net(), 0.02
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    before = net.conv.weight.detach().clone()
    size = torch.tensor([0.01, 0.1, 1.0, 10.0, 0.3]).view(5, 1, 1, 1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net.conv.weight.grad = torch.ones_like(net.conv.weight) * size
    opt.step()
    middle = net.conv.weight.detach().clone()
    eta = ((before - middle) / net.conv.weight.grad).flatten(1)[:, 0]
    eta = 1e-2 / ((1e-2 / eta) ** 2 + lam**2 / 27).sqrt()  # 27 weights a filter
    superreg.proximal_step(net, opt, lam, 0)
    norm = middle.flatten(1).norm(dim=1)
    keep = (1 - eta * lam / norm).clamp(min=0).view(5, 1, 1, 1)
    torch.testing.assert_close(
        net.conv.weight.detach(), middle * keep, rtol=1e-4, atol=1e-6
    )
    assert 0.9 < (eta * lam / norm)[2] / (0.02 * 1e-2 / norm[2]) < 1.1  # |g| = 1: lr


def test_the_filters_of_a_transposed_convolution_are_on_its_axis_1():
    """It gets the proximal step of the convolution with the same filters."""
    up = nn.ConvTranspose2d(5, 2, 4)
    conv = nn.Conv2d(5, 2, 4)
    grad = torch.randn(5, 2, 4, 4, generator=rng("cpu", 5))
    with torch.no_grad():
        conv.weight.copy_(up.weight.transpose(0, 1))
    up.weight.grad, conv.weight.grad = grad, grad.transpose(0, 1).clone()
    for layer in (up, conv):
        opt = torch.optim.AdamW([layer.weight], lr=1e-2)
        opt.step()
        before = layer.weight.detach().clone()
        superreg.proximal_step(layer, opt, 2.0, 0)
        assert not torch.equal(before, layer.weight)
    assert torch.equal(up.weight.transpose(0, 1), conv.weight)


def test_a_filter_without_gradient_is_not_emptied_at_once():
    """The last layer begins at 0, so at step 1 no other layer has a gradient."""
    train("superreg", "run", steps=1, reg="prox", lambda_max=1e-3, warmup=0)
    first = filter_norms(superreg.build(Config(n_feat=8), (1, 8, 8)).net)
    last = filter_norms(superreg.load("run/last.pt", ema=False).net)
    assert (last > 0).all() and len(first) == len(last)


def counts(run):
    with open(f"{run}/metrics.csv") as f:
        return list(csv.DictReader(f))


def test_only_the_proximal_step_gives_zeros():
    """The same lambda, the same steps; the subgradient gets to no zero at all."""
    options = {"lambda_max": 3e-2, "lambda_schedule": "constant", "lr": 1e-2}
    options |= {"steps": 60, "stages": "0", "epochs_per_stage": "1", "save_every": 99}
    for reg in ("penalty", "prox", "none"):
        train("superreg", reg, reg=reg, **options)
    penalty, prox, none = (counts(reg)[-1] for reg in ("penalty", "prox", "none"))
    assert int(penalty["zero_filters"]) == 0 and int(prox["zero_filters"]) > 20
    assert int(none["zero_filters"]) == 0 and float(none["penalty"]) == 0
    omega = {
        reg: filter_norms(superreg.load(f"{reg}/last.pt", ema=False).net).sum()
        for reg in ("penalty", "prox", "none")
    }
    assert omega["penalty"] < 0.9 * omega["none"]
    assert omega["prox"] < 0.9 * omega["none"]
    weights = state("prox")["net"]
    loop = sum(
        int((w.flatten(1).square().sum(1) == 0).sum())
        for name, w in weights.items()
        if w.dim() == 4
    )
    assert loop == int(prox["zero_filters"])


def test_loss_penalty_and_total_are_logged_apart():
    train("superreg", "run", lambda_max=1e-3, threshold=0.4)
    norms = filter_norms(superreg.load("run/last.pt", ema=False).net)
    rows = counts("run")
    lams = [float(row["lambda"]) for row in rows]
    assert lams == pytest.approx([1e-3, 5e-4, 0])
    for row in rows:
        total = float(row["loss"]) + float(row["penalty"])
        assert float(row["total"]) == pytest.approx(total)
    assert float(rows[0]["penalty"]) > 0 and float(rows[-1]["penalty"]) == 0
    assert int(rows[-1]["small_filters"]) == int((norms < 0.4).sum()) > 0
    names = {path.name for path in Path("run").glob("norms_stage_*.png")}
    assert names == {f"norms_stage_{stage}.png" for stage in range(3)}


def test_the_penalty_is_in_the_gradient():
    """After one step Adam's first moment is a tenth of the whole gradient."""
    options = {"steps": 1, "grad_clip": 0.0, "stages": "0", "epochs_per_stage": "1"}
    for reg in ("none", "penalty"):
        train("superreg", reg, reg=reg, lambda_max=0.1, **options)
    torch.manual_seed(0)
    net = build(Config(n_feat=8), (1, 8, 8)).net
    (0.1 * group_l1(net)).backward()
    names = [name for name, _ in net.named_parameters()]
    both = [state(reg)["opt"]["state"] for reg in ("penalty", "none")]
    for i, name in enumerate(names):
        more = 10 * (both[0][i]["exp_avg"] - both[1][i]["exp_avg"])
        want = net.get_parameter(name).grad
        want = torch.zeros_like(more) if want is None else want
        torch.testing.assert_close(more, want, atol=1e-5, rtol=1e-3)
