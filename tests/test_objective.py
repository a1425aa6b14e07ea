"""Objectives, schedules and weights: against diffusers and hand-written losses."""

import csv
from dataclasses import replace

import pytest
import torch
from conftest import command_line, finish, start

import superobjective
from superobjective import Config, aim, betas, build, eps_from, held_out_loss, rng

OBJECTIVES = ["eps", "x0", "v"]
SMALL = Config(n_feat=8, batch=64, steps=4, every=1, device="cpu", quiet=True)


class Fixed(torch.nn.Module):
    """A network that answers with a given function of (xt, t)."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, xt, t):
        return self.answer(xt, t)


def wave(xt, t):
    """Return some smooth, bounded answer that depends on xt and on t."""
    return torch.sin(3 * xt + t.view(-1, 1, 1, 1) / 100)


def aimed(answer=None, **options):
    """Return a DDPM for the options, around a network with this answer."""
    cfg = Config(n_feat=8, **options)
    ddpm = superobjective.DDPM(Fixed(answer), cfg.T)
    aim(ddpm, cfg)
    return ddpm


def drawn(seed=0, n=64):
    g = rng("cpu", seed)
    x0 = torch.rand(n, 1, 8, 8, generator=g) * 2 - 1
    return x0, torch.randn(n, 1, 8, 8, generator=g)


def predicted(objective, x0, eps, ab):
    """Return what an objective wants to be predicted, by definition."""
    v = ab.sqrt() * eps - (1 - ab).sqrt() * x0
    return {"eps": eps, "x0": x0, "v": v}[objective]


def knows(image, objective, **options):
    """Return a DDPM whose network always means this image, whatever it predicts."""

    def answer(xt, t):
        ab = ddpm.alphabar[t, None, None, None]
        eps = (xt - ab.sqrt() * image) / (1 - ab).sqrt()
        out = predicted(objective, image, eps, ab)
        return out - xt if objective == "eps" else out  # the base adds xt to it

    ddpm = aimed(answer, objective=objective, **options)
    return ddpm


def own_error(ddpm, objective, x0, t, eps, power=2):
    """Return the error (B,) of what the network predicts, in its own unit, float64."""
    xt, ab = ddpm.q_sample(x0, t, eps), ddpm.alphabar[t, None, None, None].double()
    out = ddpm.net(xt, t) + (xt if objective == "eps" else 0)
    gap = out.double() - predicted(objective, x0.double(), eps.double(), ab)
    return gap.abs().pow(power).flatten(1).mean(1)


@pytest.mark.parametrize("T", [50, 200, 1000])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("cosine", "squaredcos_cap_v2"), ("linear", "linear"), ("sigmoid", "sigmoid")],
)
def test_schedules_equal_diffusers(ours, theirs, T):
    from diffusers import DDPMScheduler  # here: the processes below need not wait

    scale = 1 if ours == "cosine" else 1000 / T
    ends = {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
    peer = DDPMScheduler(num_train_timesteps=T, beta_schedule=theirs, **ends)
    ddpm = aimed(schedule=ours, T=T)
    torch.testing.assert_close(ddpm.beta[1:], peer.betas, atol=2e-7, rtol=1e-4)
    ab = peer.alphas_cumprod
    torch.testing.assert_close(ddpm.alphabar[1:], ab, atol=2e-6, rtol=1e-3)
    assert ddpm.alphabar[0] == 1 and ddpm.beta[0] == 0


@pytest.mark.parametrize("T", [25, 300, 1000])
def test_dns_is_its_formula(T):
    found = betas("dns", T)
    for t in range(1, T + 1):
        want = (((t + 5) / (T + 6)) ** 2 * (0.02 - 1e-4) + 1e-4) * 1000 / T
        assert found[t - 1].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid", "dns"])
def test_every_schedule_scales_with_T(schedule):
    """The same t / T is nearly the same abar, whatever T; and the end is noise."""
    fine, coarse = (aimed(schedule=schedule, T=T).alphabar for T in (1000, 250))
    torch.testing.assert_close(fine[::4][:-1], coarse[:-1], atol=0.03, rtol=0)
    for ab in (fine, coarse):
        assert (ab.diff() < 0).all()
        assert 0 < ab[-1] < (2e-3 if schedule == "dns" else 1e-4)


@pytest.mark.parametrize("ab", [0.999, 0.5, 0.004])
def test_eps_follows_from_x0_and_from_v(ab):
    (x0, eps), ab = drawn(), torch.tensor(ab)
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    for objective in ("x0", "v"):
        found = eps_from(predicted(objective, x0, eps, ab), objective, xt, ab)
        torch.testing.assert_close(found, eps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unweighted_the_loss_is_the_error_of_what_is_predicted(
    objective, loss, schedule
):
    """Also at t = 1 and t = T, where factors are large; gamma 0 is no weights, too."""
    x0, eps = drawn()
    for weights in ({"weighting": "none"}, {"min_snr_gamma": 0.0}):
        options = {"objective": objective, "loss": loss, "schedule": schedule}
        ddpm = aimed(wave, **options, **weights)
        for step in (1, 30, 500, 1000):
            t = torch.full((len(x0),), step)
            want = own_error(ddpm, objective, x0, t, eps, 2 if loss == "l2" else 1)
            found = ddpm(x0, t, eps).item()
            assert found == pytest.approx(want.mean().item(), rel=2e-3)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_the_three_min_snr_losses_are_one_number(gamma):
    """One prediction in three forms; as an error of x0 it weighs min(SNR, gamma)."""
    (x0, eps), wrong = drawn(), drawn(1)[0]
    for step in (1, 60, 200, 400, 700, 990):
        t = torch.full((len(x0),), step)
        for objective in OBJECTIVES:
            ddpm = knows(wrong, objective, min_snr_gamma=gamma)
            ab = ddpm.alphabar[step].item()
            want = min(ab / (1 - ab), gamma) * (wrong - x0).square().mean().item()
            assert ddpm(x0, t, eps).item() == pytest.approx(want, rel=3e-3), objective


PAPERS = {  # weights in the unit of each objective at SNR 1/4, 1 and 16, by hand
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


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize(("objective", "weighting"), PAPERS)
def test_the_loss_weighs_each_image_as_in_the_papers(objective, weighting, loss):
    ddpm = aimed(wave, objective=objective, weighting=weighting, loss=loss)
    (x0, eps), snr = drawn(), ddpm.alphabar.logit().exp()
    for level, want in zip((0.25, 1, 16), PAPERS[objective, weighting], strict=True):
        t = int((snr - level).abs().argmin())
        near = snr[t].item() / level  # 1, but for the width of a step
        t = torch.full((len(x0),), t)
        error = own_error(ddpm, objective, x0, t, eps, 2 if loss == "l2" else 1)
        found = ddpm(x0, t, eps).item() / error.mean().item()
        assert near == pytest.approx(1, abs=0.02)
        assert found == pytest.approx(want, rel=0.03)
    # and in a batch each image has the weight of its own t
    t = torch.randint(1, 1001, (len(x0),), generator=rng("cpu", 3))
    parts = [ddpm(*(x[i, None] for x in (x0, t, eps))) for i in range(len(t))]
    torch.testing.assert_close(ddpm(x0, t, eps), torch.stack(parts).mean())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mse_and_held_out_loss_have_no_weights(objective):
    ddpm = aimed(wave, objective=objective, weighting="p2", loss="l1")
    (x0, eps), t = drawn(), torch.arange(10, 650, 10)
    gap = ddpm.eps_hat(ddpm.q_sample(x0, t, eps), t) - eps
    want, loss = gap.square().mean().item(), ddpm(x0, t, eps).item()
    assert ddpm.mse.item() == pytest.approx(want) and loss != pytest.approx(want)
    assert ddpm.eval()(x0, t, eps).item() == pytest.approx(want)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_network_brings_back_the_image(objective, schedule):
    """Whatever it predicts, sampling ends at the one image that it knows."""
    image = drawn()[0][:1]
    ddpm = knows(image, objective, schedule=schedule)
    x0 = ddpm.sample((4, 1, 8, 8), steps=20, generator=rng("cpu", 4))
    torch.testing.assert_close(x0, image.expand_as(x0), atol=2e-3, rtol=0)


@pytest.mark.parametrize("objective", ["x0", "v"])
def test_at_t_T_x0_hat_is_the_networks_up_to_rounding(objective):
    """It goes through eps_hat in float32: below a grey level, even at abar = 2e-9."""
    image, eps = drawn()
    ddpm = knows(image, objective)
    for step in (1, 500, 999, 1000):
        x0_hat, _ = ddpm.predict(eps, torch.full((len(image),), step))
        torch.testing.assert_close(x0_hat, image, atol=1 / 127.5, rtol=0)


def rows(run):
    with open(f"{run}/metrics.csv") as f:
        return [{k: float(x) for k, x in row.items()} for row in csv.DictReader(f)]


def test_the_unweighted_error_is_logged_beside_the_loss():
    """Nothing is learned here: with other weights, only the loss is another one.

    In two rows, so that each has the steps since the one before.
    """
    still = replace(SMALL, lr=1e-12, objective="eps", steps=24)
    superobjective.train(replace(still, out="none", weighting="none"))
    superobjective.train(replace(still, out="p2", weighting="p2"))
    assert len(rows("none")) == 2
    for none, p2 in zip(rows("none"), rows("p2"), strict=True):
        assert none["mse"] == none["loss"] and p2.pop("loss") < 0.9 * p2["mse"]
        assert p2 == pytest.approx({k: none[k] for k in p2}, rel=1e-6)


def work(out):
    superobjective.train(replace(SMALL, out=out, steps=25))


@pytest.mark.slow
def test_two_processes_log_the_error_of_the_whole_batch():
    assert finish(start(work, "two", world=2)) == [0, 0]
    work("one")
    (a, b), two = rows("one"), rows("two")
    assert [row["mse"] for row in two] == pytest.approx([a["mse"], b["mse"]], rel=1e-4)
    assert a["mse"] != pytest.approx(a["loss"]) and b["mse"] < a["mse"]


def test_a_checkpoint_knows_its_objective_and_its_schedule():
    cfg = replace(SMALL, out="run", schedule="dns", lr=1e-3)
    ddpm = superobjective.train(cfg)
    again, fresh = superobjective.load("run/last.pt"), build(cfg, (1, 8, 8))
    x0, eps = drawn()
    assert held_out_loss(again, x0) == held_out_loss(ddpm, x0)
    assert held_out_loss(again, x0) != held_out_loss(fresh.eval(), x0)
    t = torch.arange(1, 65)
    assert again.train()(x0, t, eps) == ddpm.train()(x0, t, eps)


@pytest.mark.parametrize("change", ["schedule linear", "weighting p2", "objective x0"])
def test_another_schedule_or_loss_is_refused_on_resume(change, capsys):
    line = "--n-feat 8 --batch 64 --steps 1 --device cpu --quiet --out run"
    assert command_line(superobjective, line) == 0
    assert command_line(superobjective, f"{line} --resume --{change}") == 2
    said = capsys.readouterr().err
    assert (
        said == f"superobjective.py: the run in run has another {change.split()[0]}\n"
    )
    assert command_line(superobjective, f"{line} --resume") == 0


@pytest.mark.parametrize("gamma", [-1.0, float("inf"), float("nan")])
def test_impossible_values_are_refused(gamma):
    with pytest.raises(ValueError, match="--min-snr-gamma cannot be"):
        Config(min_snr_gamma=gamma)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns(objective):
    cfg = replace(SMALL, objective=objective, steps=60, every=9, lr=8e-3, warmup=9)
    held = superobjective.load_images(cfg)[1] / 127.5 - 1
    untrained = held_out_loss(build(cfg, (1, 8, 8)).eval(), held)["held_loss"]
    superobjective.train(replace(cfg, out="run"))
    assert rows("run")[-1]["held_loss"] < 0.65 * untrained
