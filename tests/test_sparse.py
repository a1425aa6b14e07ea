"""The mask: who may learn, what a masked channel is, who is born and how it starts."""

import re
from pathlib import Path

import pytest
import torch
from conftest import command_line, finish, start, state
from test_family import small

import supersparse
from supersparse import Config, build, gate_scores, grow, rng, stage_density


def planted(n_feat=8, on=3, seed=0):
    """Return a DDPM with a last layer that is not 0 and its first channels on."""
    torch.manual_seed(seed)
    ddpm = build(Config(n_feat=n_feat), (1, 8, 8))
    torch.nn.init.normal_(ddpm.net.out.weight, std=0.1)
    ddpm.net.channel_mask[:on] = 1
    return ddpm


def batch(n=32):
    g = rng("cpu", 0, 77)
    x0 = torch.rand(n, 1, 8, 8, generator=g) * 2 - 1
    t = torch.randint(1, 1001, (n,), generator=g)
    return x0, t, torch.randn(n, 1, 8, 8, generator=g)


def bottleneck(net, of=lambda w: w.detach()):
    """Return all weights of the bottleneck's channels, in and out, channels first."""
    into = [net.to_vec.weight, net.to_vec.bias, net.vec_time.weight, net.vec_time.bias]
    return [*map(of, into), of(net.up0.weight).transpose(0, 1)]


def run(out, **changes):
    """Train a short run without pictures; return its last checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supersparse, "save_grid", lambda *_: None)
        supersparse.train(small("supersparse", out, **changes))
    return state(out)


# ---- how many ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_feat", "counts"),
    [(32, [13, 26, 38, 51, 64]), (16, [6, 13, 19, 26, 32]), (8, [3, 6, 10, 13, 16])],
)
def test_the_births_of_every_stage(n_feat, counts):
    cfg = Config(n_feat=n_feat, regrow="random")
    ddpm, ema = (build(cfg, (1, 8, 8)) for _ in range(2))
    mask, birth = ddpm.net.channel_mask, ddpm.net.channel_birth_stage
    earlier = mask.clone()
    for stage, count in enumerate(counts):
        for _ in range(2):  # the second time nobody is due
            grow(ddpm, ema, cfg, None, None, stage, 0, None)
        assert mask.sum() == count and {*mask.tolist()} <= {0, 1}
        assert (mask >= earlier).all()  # what is on stays on
        assert torch.equal(birth == stage, mask > earlier)
        assert torch.equal(birth < 0, mask == 0)
        assert torch.equal(ema.net.channel_mask, mask)
        assert torch.equal(ema.net.channel_birth_stage, birth)
        earlier = mask.clone()


def test_the_first_channels_are_random_by_the_seed():
    masks = []
    for seed in (0, 0, 1, 2, 3):
        ddpm, cfg = planted(on=0), Config(n_feat=8, seed=seed)
        grow(ddpm, ddpm, cfg, None, None, 0, 0, None)
        masks.append(tuple(ddpm.net.channel_mask.tolist()))
    assert masks[0] == masks[1] and len({*masks}) == 4


# ---- what a masked channel is --------------------------------------------------------


def test_nothing_of_a_masked_channel_reaches_the_output():
    ddpm = planted()
    x0, t, _ = batch()
    before = ddpm.net(x0, t)
    for w in bottleneck(ddpm.net):
        w[3:] += 9
    assert torch.equal(ddpm.net(x0, t), before)
    ddpm.net.vec_time.bias.detach()[0] += 9
    assert not torch.equal(ddpm.net(x0, t), before)


def test_the_weights_of_a_masked_channel_get_exactly_no_gradient():
    ddpm = planted()
    ddpm(*batch()).backward()
    for grad in bottleneck(ddpm.net, of=lambda w: w.grad):
        assert (grad[3:] == 0).all()
        assert all((channel != 0).any() for channel in grad[:3])


def test_after_training_masked_weights_are_those_of_the_start(tiny):
    """Bit for bit, in and out, also the averaged ones; active and newborn ones move."""
    last = run("run", sparsity=(0.8, 0.8, 0.4))
    cfg = small("supersparse", "run")
    torch.manual_seed(cfg.seed)
    first = build(cfg, (1, 8, 8))
    birth = last["net"]["net.channel_birth_stage"]
    assert birth.unique(return_counts=True)[1].tolist() == [6, 3, 7]  # -1, 0, 2
    for key in ("net", "ema"):
        ddpm = build(cfg, (1, 8, 8))
        ddpm.load_state_dict(last[key])
        pairs = zip(bottleneck(first.net), bottleneck(ddpm.net), strict=True)
        for old, new in pairs:
            moved = (old != new).view(16, -1).any(1)
            assert torch.equal(moved, birth >= 0)


def test_a_newborn_channel_takes_the_steps_that_the_docstring_says(tiny):
    """Adam with a gradient that begins late, against one that begins with it."""
    assert run("run", steps=1)["opt"]["param_groups"][0]["betas"] == (0.9, 0.99)
    w = torch.zeros(2, requires_grad=True)
    opt = torch.optim.Adam([w], lr=1.0, betas=(0.9, 0.99), fused=True)
    lengths = []
    for step in range(2101):
        before = w[1].item()
        w.grad = torch.tensor([1.0, float(step >= 2000)])
        opt.step()
        lengths.append(before - w[1].item())
    assert not any(lengths[:2000])  # exactly 0
    ages = torch.arange(1, 102)
    want = (1 - 0.9**ages) / (1 - 0.99**ages).sqrt()  # a fresh one takes steps of 1
    assert lengths[2000:] == pytest.approx(want.tolist(), rel=1e-3)
    said = re.search(r"up to (\S+) times .*, (\S+) times after", supersparse.__doc__)
    assert said.groups() == (f"{max(lengths):.1f}", f"{lengths[2099]:.1f}")


# ---- who is born ---------------------------------------------------------------------


def score_of(ddpm, cfg, batches=20):
    images = supersparse.load_images(Config())[0]
    p = stage_density(cfg, ddpm.alphabar.float())[1]
    return gate_scores(ddpm, cfg, images, p, 7, slice(None), batches)


def test_the_score_is_the_slope_of_the_loss_along_each_gate():
    """Against finite differences, in float64, over the same draws."""
    ddpm, losses = planted().double(), []
    ddpm.net.time1.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    forward = ddpm.forward
    ddpm.forward = lambda *args: losses.append(args) or forward(*args)
    cfg = Config(n_feat=8, batch=16)
    score = score_of(ddpm, cfg, 3)
    draws, mask, h = [*losses], ddpm.net.channel_mask, 1e-4
    assert len(draws) == 3 and not mask.requires_grad
    for parts in zip(*draws, strict=True):  # x0, t, eps: three different ones
        assert len({part.sum().item() for part in parts}) == 3
    assert min(t.min() for _, t, _ in draws) >= 600  # of the new stage
    for c in range(16):
        sides = []
        for _ in range(2):
            mask[c] += h
            sides.append(torch.stack([ddpm(*draw) for draw in draws]).detach())
            mask[c] -= h
            h = -h
        slopes = (sides[0] - sides[1]) / (2 * h)
        assert score[c].item() == pytest.approx(slopes.abs().sum().item(), rel=1e-4)
    assert (score > 0).all()


def test_the_score_knows_no_sign():
    """A channel that would harm is chosen as gladly as one that would help."""
    cfg, (a, b) = Config(n_feat=8, batch=16), (planted(), planted())
    b.net.up0.weight.detach()[:, 5] *= -1
    torch.testing.assert_close(score_of(a, cfg)[5], score_of(b, cfg)[5])


def test_the_highest_scores_of_masked_channels_are_born(monkeypatch):
    given = torch.tensor([9.0, 9, 9, *range(13)])  # the first three are on
    monkeypatch.setattr(supersparse, "gate_scores", lambda *_: given)
    ddpm, cfg = planted(), Config(n_feat=8)
    grow(ddpm, ddpm, cfg, None, None, 1, 0, None)
    born = ddpm.net.channel_birth_stage == 1
    assert born.nonzero().flatten().tolist() == [13, 14, 15]  # 6 are due


def test_births_are_decided_by_20_batches():
    ddpm, cfg, losses = planted(), Config(n_feat=8, batch=16), []
    forward, p = ddpm.forward, stage_density(cfg, ddpm.alphabar)
    ddpm.forward = lambda *args: losses.append(args) or forward(*args)
    images = supersparse.load_images(cfg)[0]
    grow(ddpm, ddpm, cfg, images, p[1], 1, 7, slice(None))
    assert len(losses) == 20


def test_gradient_and_random_regrowth_differ_in_births_only(tiny):
    births = [
        run(regrow, regrow=regrow)["net"]["net.channel_birth_stage"]
        for regrow in ("gradient", "random")
    ]
    for birth in births:
        assert birth.bincount().tolist() == [3, 7, 6]
    assert torch.equal(births[0] == 0, births[1] == 0)
    assert not torch.equal(births[0] == 1, births[1] == 1)


def test_net_and_average_have_one_mask_which_the_table_counts(tiny):
    last = run("run", sparsity=(0.8, 0.4, 0.2))
    for name in ("net.channel_mask", "net.channel_birth_stage"):
        assert torch.equal(last["net"][name], last["ema"][name])
    rows = {row["step"]: row["active_channels"] for row in last["history"]}
    assert (rows[4], rows[8], rows[12]) == (3, 10, 13)  # as each stage ends
    assert supersparse.load("run/last.pt").net.channel_mask.sum() == 13


def score_in_a_process(seed):
    """Write down the scores of one of two processes, and the mask it ends with."""
    cfg = Config(n_feat=8, batch=16, device="cpu")
    _, rank, world = supersparse.join_processes(cfg)
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    ddpm, images = planted(seed=seed), supersparse.load_images(cfg)[0]
    p = stage_density(cfg, ddpm.alphabar)[1]
    score = gate_scores(ddpm, cfg, images, p, 7, mine)
    grow(ddpm, ddpm, cfg, images, p, 1, 7, mine)
    torch.save((score, ddpm.net.channel_mask), f"{world}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_score_as_one():
    """Each has half of the batch; before DDP could mend a mask that differs."""
    assert finish(start(score_in_a_process, 3, world=2)) == [0, 0]
    score_in_a_process(3)
    want = torch.load("1-0.pt")
    for rank in (0, 1):
        found = torch.load(f"2-{rank}.pt")
        torch.testing.assert_close(found[0], want[0], rtol=1e-4, atol=1e-6)
        assert torch.equal(found[1], want[1])


@pytest.mark.parametrize(
    "line",
    [
        "--sparsity 0.8 0.4",
        "--sparsity 1 0.6 0.4 0.2 0",
        "--sparsity 0.8 0.6 0.4 0.2 -0.1",
        "--sparsity 0.8 0.6 0.7 0.2 0",
        "--sparsity 0.8 nan 0.4 0.2 0",
        "--stages 0.5 0 --epochs-per-stage 1 1",
    ],
)
def test_sparsities_that_make_no_sense_are_refused(line, capsys):
    assert command_line(supersparse, f"{line} --steps 1 --quiet") == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--sparsity: one a stage, < 1, never rising" in shown
    assert "Traceback" not in shown and not Path("runs").exists()
