"""Lesson 18's benchmark: small starts, SGD, and gradients against plain torch."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from scipy.optimize import minimize
from scipy.stats import ttest_rel

sys.path.insert(0, str(ROOT / "notebooks"))
sys.path.append(str(ROOT / "benchmarks"))
import toy as lab


@pytest.fixture(scope="module")
def who():
    spec = importlib.util.spec_from_file_location("who", ROOT / "benchmarks/who.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "who", module)  # where dataclasses are looked up
        spec.loader.exec_module(module)
        yield module


SHORT = 168  # steps of a run; its births come after 30, 52, 83 and 125
TOY = lab.Toy()


def close(a, b, **tolerance):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, **tolerance)


def batch_of(n, seed=0):
    """Return xt (1, n, d), t (1, n) and eps (1, n, d), t from 0.01 to 1."""
    return lab.probe(TOY, torch.linspace(0.01, 1, n), n, seed, 9)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
def test_a_small_start_is_the_usual_one_scaled(scale):
    arm = lab.Arm(init=scale)
    nets = lab.train(arm, TOY, (0, 3), H=8, steps=SHORT, lr=0.0)
    usual = torch.stack([lab.fresh(seed, 8, 12) for seed in (0, 3)])
    close(nets.rows, usual * scale, rtol=1e-6, atol=0)
    assert (nets.b2 == 0).all()


def test_sgd_is_that_of_torch(who):
    arm = who.ARMS["sgd-small-0.1"]
    nets = lab.train(arm, TOY, (0, 3), H=8, steps=SHORT, lr=0.5)
    rows = 0.1 * lab.fresh(3, 8, 12)
    one = {
        "w": rows[:, :29].clone(),
        "W2": rows[:, 29:].T.clone(),
        "b": torch.zeros(12),
    }
    for weight in one.values():
        weight.requires_grad_()
    opt = torch.optim.SGD(one.values(), lr=0.5)
    for step, (_, t, xt, eps) in enumerate(lab.batches("uniform", TOY, (3,), SHORT)):
        opt.param_groups[0]["lr"] = 0.5 * min(1, 4 * (1 - step / SHORT))
        u = torch.cat([xt[0], lab.embed(t)[0], torch.ones(128, 1)], -1)
        eps_hat = xt[0] + F.linear(F.relu(F.linear(u, one["w"])), one["W2"], one["b"])
        opt.zero_grad()
        F.mse_loss(eps_hat, eps[0]).backward()
        opt.step()
    close(nets.rows[1, :, :29], one["w"].detach(), rtol=1e-3, atol=1e-5)
    close(nets.rows[1, :, 29:], one["W2"].detach().T, rtol=1e-3, atol=1e-5)
    close(nets.b2[1, 0], one["b"].detach(), rtol=1e-3, atol=1e-5)


def by_hand(nets, s, h, xt, t, eps):
    """Return the gradient at row h of seed s, (41,), by the chain rule."""
    u = torch.cat([xt[0], lab.embed(t)[0], torch.ones(t.shape[1], 1)], -1)
    r = (nets(xt, t) - eps)[s] * 2 / eps[0].numel() * nets.mask[s, h]
    out = u @ nets.rows[s, h, :29]
    inner = ((out > 0) * (r @ nets.rows[s, h, 29:])) @ u
    return torch.cat([inner, out.clamp(min=0) @ r])


def test_gradients_and_their_ratios_equal_the_chain_rule(who):
    nets, batch = lab.Nets((0, 1), 6), batch_of(500)
    nets.birth = torch.tensor([[0, 1, 2, 2, -1, 0], [2, 0, 1, -1, -1, 2]])
    nets.mask = (nets.birth >= 0).float()
    grad = who.gradient(nets, *batch)
    assert not nets.rows.requires_grad
    want = [[by_hand(nets, s, h, *batch) for h in range(6)] for s in range(2)]
    want = torch.stack([torch.stack(rows) for rows in want])
    close(grad, want, rtol=1e-4, atol=1e-6)
    assert (grad[nets.mask == 0] == 0).all()

    ratio = who.newborn_to_old(nets, 2, batch)
    for s, (new, old) in enumerate((([2, 3], [0, 1, 5]), ([0, 5], [1, 2]))):
        sizes = []
        for h in range(6):  # what it adds, as the difference when it is taken away
            on, nets.mask[s, h] = nets.mask[s, h].clone(), 1
            full = nets(*batch[:2])[s]
            nets.mask[s, h] = 0
            adds = (full - nets(*batch[:2])[s]).square().sum(-1).mean().sqrt()
            nets.mask[s, h] = on
            parts = want[s, h, :29], want[s, h, 29:], want[s, h]
            sizes.append([adds, *(part.norm() for part in parts)])
        sizes = torch.tensor(sizes)
        close(ratio[s], sizes[new].mean(0) / sizes[old].mean(0), rtol=1e-3, atol=0)


def test_newborn_channels_are_looked_at_from_their_birth_on(who):
    watch, seen = who.Watch(TOY, SHORT, n_looks=5), {}
    start = lab.Nets((0, 1), 10)

    def both(step, nets):
        watch(step, nets)
        for stage in range(1, 5):
            if stage in nets.birth and stage not in seen:
                seen[stage] = step
                new = nets.birth == stage
                assert torch.equal(nets.rows[new], start.rows[new])  # not yet trained

    nets = lab.train("uniform-mask-gradient", TOY, (0, 1), 10, SHORT, 1e-2, both)
    births = {step - age: stage for step, (stage, age) in watch.ages.items()}
    assert births == {step: stage for stage, step in seen.items()}
    assert set(watch.ratios) == {(s, a) for s in range(1, 5) for a in (0, 5, 20)}
    assert len(watch.norms) == len(watch.looks) == 5
    close(watch.norms[-1], nets.rows.norm(dim=-1))
    want = lab.excess(nets, TOY, n=128).mean(1)[:, :2]
    close(watch.risk[-1], want)
    plain = who.Watch(TOY, SHORT, n_looks=5)
    lab.train("uniform", TOY, (0, 1), 10, SHORT, 1e-2, plain)
    assert not plain.ratios


def test_known_shares_of_the_ends(who):
    for denoiser, share in ((lambda xt, t: xt, 0.0), (TOY.bayes, 1.0)):
        risk = lab.excess(denoiser, TOY, n=128).mean(1)[:, :2]
        close(who.known(risk, TOY), [[share, share]])


def test_who_wakes_when_and_for_what(who):
    linear = TOY.linear_excess(torch.tensor([0.7, 0.3])).diagonal()
    serve = torch.tensor([[[4, 0], [3, 1], [0, 2], [1, 1], [0.001, 0], [1, 0]]])
    wake = torch.tensor([[10.0, 5.0, 300.0, 200.0, 1.0, 12.0]])  # number 5 serves none
    values = who.by_wake(wake, serve * linear.float(), TOY)
    close(values["early"], [1 / 9])  # 5, 10 and 12
    close(values["late"], [3 / 4])
    close(values["wake_M1"], [10.0])
    close(values["wake_M2"], [300.0])
    close(values["wake"][1], 12.0)


@pytest.mark.parametrize("feature", [0, 1])
def test_the_utility_is_the_maximum_that_a_general_optimizer_finds(who, feature):
    n = 3000
    t = lab.TMIN + (1 - lab.TMIN) * (torch.arange(n) + 0.5) / n
    xt, t, eps = lab.probe(TOY, t, n, 0, 8)
    u = torch.cat([xt, lab.embed(t), torch.ones(1, n, 1)], -1)[0].double()
    r = ((xt - eps)[0] @ (TOY.M1, TOY.M2)[feature]).double()

    def loss(row):
        """Return -utility of a row w | W2, along M_j, and its gradient."""
        row = torch.tensor(row, requires_grad=True)
        w, W2 = row[:29], row[29:]
        growth = (torch.relu(u @ w) * (r @ W2)).mean() * 2 / 12
        growth = 2 * growth / row.square().sum()
        growth.backward()
        return growth.item(), row.grad.numpy()

    rng = np.random.default_rng(0)
    found = [minimize(loss, rng.normal(size=31), jac=True).fun for _ in range(12)]
    close(who.utility(TOY, feature, n), -min(found), rtol=0.03, atol=0)


def test_no_dormant_channel_grows_faster_than_its_utility(who):
    """Rows as small as these grow without touching each other."""
    norms, lr = [], 0.4

    def watch(step, nets):
        norms.append(nets.rows.norm(dim=-1))

    arm = lab.Arm(init=1e-6, optimizer=who.SGD)
    lab.train(arm, TOY, range(4), 32, SHORT, lr, watch)
    growth = (norms[60] / norms[40]).log() / 20 / lr
    fastest, bound = growth.max().item(), who.utility(TOY, 0)
    assert 0.9 * bound < fastest < 1.05 * bound


def test_verdicts_are_the_intervals_of_a_paired_t_test(who):
    rng = np.random.default_rng(1)
    b = rng.normal(size=16)
    for gap, word in ((-3.0, "less"), (0.0, "tied"), (3.0, "more")):
        a = b + gap + rng.normal(size=16)
        mean, *interval, said = who.verdict(a, b, n=11)
        close(interval, ttest_rel(a, b).confidence_interval(1 - 0.05 / 11))
        assert said == word and mean == pytest.approx(np.mean(a - b))


@pytest.mark.slow
def test_the_benchmark_resumes_and_writes_its_table(who, tmp_path, monkeypatch):
    monkeypatch.setattr(who, "RATES", {lab.Adam: [0.01, 0.02], who.SGD: [0.4]})
    opt = who.Options(2, 2, ((8, SHORT),), tmp_path)
    who.main(opt)
    path, text = tmp_path / "who.jsonl", (tmp_path / "who.txt").read_text()
    lines = path.read_text().splitlines()
    assert len(lines) == 6 * 3 + 3 * 2
    rows = [json.loads(line) for line in lines]
    final = {row["arm"]: row for row in rows if row["part"] == "final"}
    tuned = {row["lr"]: np.mean(row["excess"]) for row in rows[:2]}
    assert final["nothing"]["lr"] == min(tuned, key=tuned.get)
    lr = final["mask-gradient"]["lr"]
    nets = lab.train("uniform-mask-gradient", TOY, range(2), 8, SHORT, lr)
    risk = lab.excess(nets, TOY)
    close(final["mask-gradient"]["excess"], risk.sum(-1).mean(1), atol=1e-4, rtol=0)
    for arm, row in final.items():
        assert f"  {arm:15}" in text and f"{np.mean(row['excess']):.3f}" in text
    path.write_text("\n".join([*lines[:-1], lines[-1][:70]]))  # killed while it wrote
    who.main(opt)
    again = path.read_text().splitlines()
    assert again[:-1] == lines[:-1] and len(again) == len(lines)
    one, other = (json.loads(x[-1]) | {"seconds": 0} for x in (lines, again))
    assert one == other
