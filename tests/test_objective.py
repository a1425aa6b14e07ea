"""Objectives, schedules and weights: against diffusers and written-out losses."""

import csv

import pytest
import torch
from conftest import finish, start
from diffusers import DDPMScheduler
from test_diffusion import Fixed, wave
from test_family import small, train, work
from test_train import state

import superobjective
from superobjective import Config, aim, betas, build, convert, rng

OBJECTIVES = ["eps", "x0", "v"]


def aimed(net=None, **options):
    """Return a DDPM around net, aimed by the options."""
    cfg = Config(n_feat=8, **options)
    ddpm = build(cfg, (1, 8, 8))
    if net is not None:
        ddpm = superobjective.DDPM(net, cfg.T)
        aim(ddpm, cfg)
    return ddpm


@pytest.mark.parametrize("T", [50, 200, 1000])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("cosine", "squaredcos_cap_v2"), ("sigmoid", "sigmoid")]
)
def test_schedules_equal_diffusers(ours, theirs, T):
    scale = 1 if ours == "cosine" else 1000 / T
    ends = {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
    peer = DDPMScheduler(num_train_timesteps=T, beta_schedule=theirs, **ends)
    ddpm = aimed(schedule=ours, T=T)
    torch.testing.assert_close(ddpm.beta[1:], peer.betas, atol=2e-7, rtol=1e-4)
    ab = peer.alphas_cumprod
    torch.testing.assert_close(ddpm.alphabar[1:], ab, atol=2e-6, rtol=1e-3)
    assert ddpm.alphabar[0] == ddpm.alpha[0] == 1 and ddpm.beta[0] == 0
    torch.testing.assert_close(ddpm.alpha, 1 - ddpm.beta)


@pytest.mark.parametrize("T", [25, 300, 1000])
def test_dns_is_its_formula_and_linear_the_base(T):
    found = betas("dns", T)
    for t in range(1, T + 1):
        want = (((t + 5) / (T + 6)) ** 2 * (0.02 - 1e-4) + 1e-4) * 1000 / T
        assert found[t - 1].item() == pytest.approx(want, rel=1e-12)
    base, own = superobjective.DDPM(None, T), aimed(schedule="linear", T=T)
    for name in ("beta", "alpha", "alphabar"):
        assert torch.equal(getattr(base, name), getattr(own, name))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "dns"])
def test_every_schedule_scales_with_T(schedule):
    """The same t / T is nearly the same abar, whatever T; and the end is noise."""
    fine, coarse = (aimed(schedule=schedule, T=T).alphabar for T in (1000, 250))
    torch.testing.assert_close(fine[::4][:-1], coarse[:-1], atol=0.03, rtol=0)
    assert (fine.diff() < 0).all() and (coarse.diff() < 0).all()
    for ab in (fine, coarse):
        assert 0 < ab[-1] < (2e-3 if schedule == "dns" else 1e-4)


def drawn(seed=0, n=64, dtype=torch.float32):
    g = rng("cpu", seed)
    x0 = torch.rand(n, 1, 8, 8, generator=g, dtype=dtype) * 2 - 1
    return x0, torch.randn(n, 1, 8, 8, generator=g, dtype=dtype)


@pytest.mark.parametrize("ab", [0.999, 0.9, 0.5, 0.1, 0.004])
def test_eps_x0_and_v_turn_into_one_another(ab):
    x0, eps = drawn()
    ab = torch.tensor(ab)
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    truth = {"eps": eps, "x0": x0, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0}
    for have in OBJECTIVES:
        for want in OBJECTIVES:
            found = convert(truth[have], have, want, xt, ab)
            torch.testing.assert_close(found, truth[want], atol=1e-5, rtol=1e-5)
    x0_hat = convert(eps, "eps", "x0", xt, ab)
    v_hat = convert(x0_hat, "x0", "v", xt, ab)
    back = convert(v_hat, "v", "eps", xt, ab)
    torch.testing.assert_close(back, eps, atol=1e-5, rtol=1e-5)


def knows(image, objective, **options):
    """Return a DDPM whose network always means this image, and tells it as asked."""

    def tell(xt, t):
        return convert(image, "x0", objective, xt, ddpm.alphabar[t[0]])

    ddpm = aimed(Fixed(tell), objective=objective, **options)
    return ddpm


def written_out(ddpm, objective, out, x0, t, eps, power=2):
    """Return the error (B,) of what the network told, in its own unit, float64."""
    ab = ddpm.alphabar.double()[t].view(-1, 1, 1, 1)
    v = ab.sqrt() * eps - (1 - ab).sqrt() * x0
    aim = {"eps": eps, "x0": x0, "v": v}[objective].double()
    return (out.double() - aim).abs().pow(power).flatten(1).mean(1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unweighted_the_loss_is_the_error_of_what_is_told(objective, loss, schedule):
    """Also at t = 1 and t = T, where factors are large."""
    options = {"objective": objective, "loss": loss, "schedule": schedule}
    ddpm = aimed(Fixed(wave), weighting="none", **options)
    x0, eps = drawn()
    for step in (1, 2, 30, 500, 990, 1000):
        t = torch.full((len(x0),), step)
        out = wave(ddpm.q_sample(x0, t, eps), t)
        power = 2 if loss == "l2" else 1
        want = written_out(ddpm, objective, out, x0, t, eps, power).mean()
        assert ddpm(x0, t, eps).item() == pytest.approx(want.item(), rel=2e-3)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_the_three_min_snr_losses_are_one_number(gamma):
    """One prediction, told in three ways; as x0 losses all weigh min(SNR, gamma)."""
    x0, eps = drawn()
    wrong = drawn(1)[0]
    for step in (1, 60, 200, 400, 700, 990):
        t = torch.full((len(x0),), step)
        losses = {}
        for objective in OBJECTIVES:
            options = {"objective": objective, "min_snr_gamma": gamma}
            ddpm = knows(wrong, weighting="min-snr", schedule="cosine", **options)
            losses[objective] = ddpm(x0, t, eps).item()
        ab = ddpm.alphabar[step].item()
        want = min(ab / (1 - ab), gamma) * (wrong - x0).square().mean().item()
        for objective in OBJECTIVES:
            assert losses[objective] == pytest.approx(want, rel=3e-3), objective


def test_the_weights_are_those_of_the_papers():
    """In the unit of each objective, at SNR 1/4, 1 and 16, worked out by hand."""
    snr = torch.tensor([0.25, 1.0, 16.0], dtype=torch.float64)
    table = {
        ("eps", "min-snr"): [1, 1, 5 / 16],
        ("x0", "min-snr"): [0.25, 1, 5],
        ("v", "min-snr"): [0.2, 0.5, 5 / 17],
        ("eps", "p2"): [0.8, 0.5, 1 / 17],
        ("x0", "p2"): [0.2, 0.5, 16 / 17],
        ("v", "p2"): [0.16, 0.25, 16 / 17**2],
        ("eps", "debias"): [2, 1, 0.25],
        ("x0", "debias"): [0.5, 1, 4],
        ("v", "debias"): [0.4, 0.5, 4 / 17],
    }
    table |= {(objective, "none"): [1, 1, 1] for objective in OBJECTIVES}
    for (objective, weighting), want in table.items():
        found = superobjective.weights_of(objective, weighting, 5, snr)
        assert found.tolist() == pytest.approx(want), (objective, weighting)
    off = superobjective.weights_of("v", "min-snr", 0, snr)
    assert off.tolist() == [1, 1, 1]


@pytest.mark.parametrize("weighting", ["min-snr", "p2", "debias"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_weighted_error_of_each_image(objective, weighting):
    ddpm = aimed(Fixed(wave), objective=objective, weighting=weighting)
    x0, eps = drawn()
    t = torch.randint(1, 1001, (len(x0),), generator=rng("cpu", 3))
    ab = ddpm.alphabar.double()[t]
    weight = superobjective.weights_of(objective, weighting, 5, ab / (1 - ab))
    error = written_out(ddpm, objective, wave(ddpm.q_sample(x0, t, eps), t), x0, t, eps)
    want = (weight * error).mean().item()
    assert ddpm(x0, t, eps).item() == pytest.approx(want, rel=2e-3)
    residual = ddpm.residual(x0, t, eps)
    assert ddpm.mse.item() == pytest.approx(residual.square().mean().item())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_network_brings_back_the_image(objective, schedule):
    """Whatever it tells, sampling ends at the one image that it knows."""
    image = drawn()[0][:1]
    ddpm = knows(image, objective, schedule=schedule)
    x0 = ddpm.sample((4, 1, 8, 8), steps=20, generator=rng("cpu", 4))
    torch.testing.assert_close(x0, image.expand_as(x0), atol=2e-3, rtol=0)


@pytest.mark.parametrize("objective", ["x0", "v"])
def test_at_t_T_the_guess_of_x0_is_the_networks_up_to_rounding(objective):
    """eps_hat goes through float32: below a grey level, even at abar = 2e-9."""
    image, eps = drawn()
    ddpm = knows(image, objective, schedule="cosine")
    for step in (1, 500, 999, 1000):
        t = torch.full((len(image),), step)
        x0_hat, _ = ddpm.predict(eps, t)
        torch.testing.assert_close(x0_hat, image, atol=1 / 127.5, rtol=0)


def rows(run):
    with open(f"{run}/metrics.csv") as f:
        return list(csv.DictReader(f))


def test_the_unweighted_error_is_logged_beside_the_loss():
    """The same weights at step 1 and no learning: the mse does not hear the weighting.

    The base's loss is the mse of eps, so the two columns agree without weights.
    """
    same = {"lr": 1e-12, "objective": "eps", "steps": 5}
    train("superobjective", "none", weighting="none", **same)
    train("superobjective", "p2", weighting="p2", **same)
    none, p2 = rows("none")[0], rows("p2")[0]
    assert float(none["mse"]) == pytest.approx(float(none["loss"]), rel=1e-6)
    assert float(p2["mse"]) == pytest.approx(float(none["mse"]), rel=1e-6)
    assert float(p2["loss"]) < 0.9 * float(p2["mse"])
    for name in none:
        if name.startswith("held"):
            assert float(p2[name]) == pytest.approx(float(none[name]), rel=1e-6)


def test_stalled_counts_epochs_without_a_lower_loss():
    stalled = superobjective.stalled
    losses = [3.0, 2.0, 2.5, 2.0, 1.9, 1.9, 2.0]
    found = [stalled(losses[:n], 2) for n in range(8)]
    assert found == [False, False, False, False, True, False, False, True]
    assert not stalled([1.0] * 9, 0) and not stalled([1.0, 1.0], 2)


def test_early_stop_ends_a_run_that_does_not_learn_and_stays_ended(capsys):
    """Resumed, it is over at once; without the option it goes on."""
    options = {"lr": 1e-12, "early_stop": 1, "steps": 40}
    train("superobjective", "run", **options)
    stop = state("run")["step"]
    assert stop % 5 == 0 and 10 <= stop < 40
    losses = state("run")["epoch_losses"]
    assert len(losses) == stop // 5 and losses[-1] >= min(losses[:-1])
    assert all(b < a for a, b in zip(losses[:-2], losses[1:-1], strict=True))
    assert [row["step"] for row in rows("run")] == [str(stop)]
    capsys.readouterr()
    train("superobjective", "run", resume="auto", quiet=False, **options)
    said = capsys.readouterr().out
    assert f"--early-stop ends the run at step {stop} of 40" in said
    assert state("run")["step"] == stop
    train("superobjective", "run", resume="auto", **{**options, "early_stop": 0})
    assert state("run")["step"] == 40


def test_two_processes_stop_early_together():
    cfg = small("superobjective", "two", lr=1e-12, early_stop=1, steps=40)
    assert finish(start(work, "superobjective", cfg, world=2)) == [0, 0]
    train("superobjective", "one", lr=1e-12, early_stop=1, steps=40)
    assert state("one")["step"] == state("two")["step"] < 40
    one, two = state("one")["epoch_losses"], state("two")["epoch_losses"]
    assert one == pytest.approx(two, rel=1e-5)


def test_an_epoch_counts_once_however_often_the_run_is_resumed():
    """A run that ends within an epoch keeps the losses of its part."""
    train("superobjective", "whole", steps=10, lr=1e-4, lr_decay=False)
    train("superobjective", "parts", steps=7, lr=1e-4, lr_decay=False)
    assert len(state("parts")["epoch_losses"]) == 1 and len(state("parts")["part"]) == 2
    train("superobjective", "parts", steps=10, lr=1e-4, lr_decay=False, resume="auto")
    assert state("whole")["epoch_losses"] == state("parts")["epoch_losses"]


@pytest.mark.parametrize(
    "wrong",
    [{"min_snr_gamma": -1.0}, {"early_stop": -1}, {"min_snr_gamma": float("inf")}],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match="cannot be"):
        Config(**wrong)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns(objective):
    """Guessing eps = 0 has an error of 1."""
    options = {"objective": objective, "lr": 8e-3, "steps": 120, "n_train": 0}
    train("superobjective", "run", save_every=1000, **options)
    assert float(rows("run")[-1]["held_loss"]) < 0.6
