"""The mask: who may learn, what a masked channel is, who is born and how it starts."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import finish, start
from test_family import small, train
from test_train import state

import supersparse
from supersparse import Config, Curriculum, UNet, bottleneck, build, guard, rng


def planted(seed=0, n_feat=8, **options):
    """Return a DDPM with random weights everywhere; 3 of its 16 channels are on."""
    torch.manual_seed(seed)
    cfg = Config(n_feat=n_feat, **options)
    ddpm = build(cfg, (1, 8, 8))
    torch.nn.init.normal_(ddpm.net.out.weight, std=0.1)
    return ddpm, cfg


def batch(n=32, seed=0):
    g = rng("cpu", seed, 77)
    x0 = torch.rand(n, 1, 8, 8, generator=g) * 2 - 1
    t = torch.randint(1, 1001, (n,), generator=g)
    return x0, t, torch.randn(n, 1, 8, 8, generator=g)


def select(w, axis, channels):
    return w.index_select(axis, channels.nonzero().flatten())


# ---- how many ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_feat", "counts"),
    [(32, [13, 26, 38, 51, 64]), (16, [6, 13, 19, 26, 32]), (8, [3, 6, 10, 13, 16])],
)
def test_the_counts_of_every_stage(n_feat, counts):
    ddpm, cfg = planted(n_feat=n_feat, regrow="random")
    ema, _ = planted(seed=1, n_feat=n_feat)
    course = Curriculum(cfg, 80, ddpm.alphabar)
    opt = torch.optim.AdamW(ddpm.parameters())
    born, earlier = ddpm.net.channel_birth_stage, torch.zeros(2 * n_feat)
    for stage, step in enumerate(course.starts):
        supersparse.give_birth(ddpm, ema, opt, cfg, course, None, step, slice(None))
        mask = ddpm.net.channel_mask.clone()
        assert mask.sum() == counts[stage] and set(mask.tolist()) <= {0.0, 1.0}
        assert (mask >= earlier).all()  # what is on stays on
        assert ((born >= 0) == (mask > 0)).all() and born.max() == stage
        new = (mask > earlier) if stage else mask > 0
        assert (born[new] == stage).all()
        assert (ddpm.net.channel_birth_step[new] == step).all()
        assert torch.equal(ema.net.channel_mask, mask) or stage == 0
        earlier = mask
    again = ddpm.net.channel_birth_step.clone()
    supersparse.give_birth(ddpm, ema, opt, cfg, course, None, 79, slice(None))
    assert torch.equal(again, ddpm.net.channel_birth_step)  # nobody is due


def test_the_first_channels_are_drawn_by_the_seed():
    masks = [planted(seed=5, **{})[0].net.channel_mask for _ in range(2)]
    assert torch.equal(*masks)
    others = [build(Config(n_feat=8, seed=seed), (1, 8, 8)) for seed in range(5)]
    assert len({tuple(ddpm.net.channel_mask.tolist()) for ddpm in others}) > 2


# ---- what a masked channel is --------------------------------------------------------


def test_nothing_of_a_masked_channel_reaches_the_output():
    ddpm, _ = planted()
    off = ddpm.net.channel_mask == 0
    x0, t, eps = batch()
    before = ddpm.net(x0, t)
    with torch.no_grad():
        for w, axis in bottleneck(ddpm.net):
            w.index_add_(axis, off.nonzero().flatten(), 9 * select(w, axis, off) + 1)
    assert torch.equal(ddpm.net(x0, t), before)
    with torch.no_grad():
        ddpm.net.to_vec.weight[~off] += 1
    assert not torch.equal(ddpm.net(x0, t), before)


def gradients(ddpm):
    ddpm.zero_grad()
    ddpm(*batch()).backward()
    off = ddpm.net.channel_mask == 0
    grads = [(w.grad, axis) for w, axis in bottleneck(ddpm.net)]
    return [(select(g, axis, off), select(g, axis, ~off)) for g, axis in grads]


def test_the_weights_of_a_masked_channel_get_exactly_no_gradient():
    for masked, active in gradients(planted()[0]):
        assert (masked == 0).all() and (active != 0).any()


def test_a_mask_before_the_time_embedding_leaks():
    """The claim about the original: what it masks still passes on the time."""
    ddpm, _ = planted(mask_at="seed")
    into, bias, time_in, time_bias, out = (masked for masked, _ in gradients(ddpm))
    assert (into == 0).all() and (bias == 0).all()  # only the image is kept out
    assert (time_in != 0).any() and (time_bias != 0).any() and (out != 0).any()
    off, (x0, t, _) = ddpm.net.channel_mask == 0, batch()
    before = ddpm.net(x0, t)
    with torch.no_grad():
        ddpm.net.up0.weight[:, off] *= 2
    assert not torch.equal(ddpm.net(x0, t), before)


ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99)}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda w: torch.optim.Adam(w, **ADAMW),
        lambda w: torch.optim.Adam(w, **ADAMW, weight_decay=0.1),
        lambda w: torch.optim.AdamW(w, **ADAMW, weight_decay=0.1),
    ],
)
def test_masked_weights_stay_as_they_were_whatever_the_optimizer_wants(optimizer):
    """Its momentum is warm: before the mask came, every channel had learnt."""
    ddpm, _ = planted(sparsity="0")
    opt = optimizer(ddpm.parameters())
    for _ in range(5):
        ddpm(*batch()).backward()
        opt.step()
        opt.zero_grad()
    ddpm.net.channel_mask[3:] = 0
    off = ddpm.net.channel_mask == 0
    first = [select(w, axis, off).clone() for w, axis in bottleneck(ddpm.net)]
    free = [w.clone() for w, _ in bottleneck(ddpm.net)]
    for step in range(5, 15):
        opt.zero_grad()
        ddpm(*batch(seed=step)).backward()
        kept = [w.detach().clone() for w, _ in bottleneck(ddpm.net)]
        opt.step()
        moved = [select(w, axis, off).clone() for w, axis in bottleneck(ddpm.net)]
        assert not all(map(torch.equal, moved, first))  # the optimizer did want to
        guard(ddpm.net, kept, opt, step)
    last = [select(w, axis, off) for w, axis in bottleneck(ddpm.net)]
    assert all(map(torch.equal, first, last))
    assert not any(
        torch.equal(a, w) for a, (w, _) in zip(free, bottleneck(ddpm.net), strict=True)
    )


def test_a_run_leaves_masked_weights_bit_for_bit_as_initialised():
    train("supersparse", "run", steps=10, lr=1e-2, sparsity="0.8,0.4,0.4")
    run = state("run")
    torch.manual_seed(0)
    first = build(
        Config(
            n_feat=8,
            seed=0,
            sparsity="0.8,0.4,0.4",
            stages="0.8,0.4,0",
            epochs_per_stage="4,4,4",
        ),
        (1, 8, 8),
    )
    ddpm, ema = (
        supersparse.load("run/last.pt", ema=False),
        supersparse.load("run/last.pt"),
    )
    off = ddpm.net.channel_mask == 0
    assert off.sum() == 6
    for trained in (ddpm, ema):
        pairs = zip(bottleneck(first.net), bottleneck(trained.net), strict=True)
        for (a, axis), (b, _) in pairs:
            assert torch.equal(select(a, axis, off), select(b, axis, off))
            assert not torch.equal(select(a, axis, ~off), select(b, axis, ~off))
    assert run["step"] == 10


# ---- birth ---------------------------------------------------------------------------


def test_a_newborn_channel_takes_the_steps_of_a_fresh_adamw():
    """Against AdamW on the newborn's weights alone, given the same gradients.

    The run is 3000 steps old by then, as far as the optimizer can tell.
    """
    ddpm, cfg = planted()
    net, params = ddpm.net, [w for w, _ in bottleneck(ddpm.net)]
    opt = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    g, birth, twins, fresh = rng("cpu", 1), 40, None, None
    born = torch.zeros(16, dtype=torch.bool)
    for step in range(birth + 30):
        if step == birth:
            born[(net.channel_mask == 0).nonzero()[:4, 0]] = True
            net.channel_mask[born], net.channel_birth_stage[born] = 1, 1
            net.channel_birth_step[born] = step + 3000
            for w in params:
                opt.state[w]["step"] += 3000
            twins = [
                select(w, axis, born).detach().clone() for w, axis in bottleneck(net)
            ]
            fresh = torch.optim.AdamW(
                twins, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1
            )
        for w, axis in bottleneck(net):
            w.grad = torch.randn(w.shape, generator=g) * 0.1
            off = (net.channel_mask == 0).nonzero().flatten()
            w.grad.index_fill_(axis, off, 0)
        kept = [w.detach().clone() for w in params]
        opt.step()
        if step >= birth:
            unguarded = select(params[0], 0, born).clone()
        guard(net, kept, opt, step + 3000 * (step >= birth))
        if step >= birth:
            for twin, (w, axis) in zip(twins, bottleneck(net), strict=True):
                twin.grad = select(w.grad, axis, born)
            before = twins[0].clone()
            fresh.step()
            for twin, (w, axis) in zip(twins, bottleneck(net), strict=True):
                torch.testing.assert_close(
                    select(w, axis, born), twin, atol=1e-5, rtol=0
                )
            if step == birth:  # the trap: without the guard, a step 3 times too long
                pull = (unguarded - before).abs().max() / 1e-2
                assert 2.9 < pull / ((twins[0] - before).abs().max() / 1e-2) < 3.3


def test_birth_empties_the_moments_of_the_newborn_alone():
    ddpm, cfg = planted()
    ema, _ = planted()
    opt = torch.optim.AdamW(ddpm.parameters())
    ddpm.net.channel_mask.fill_(1)
    ddpm(*batch()).backward()
    opt.step()  # warm moments everywhere
    ddpm.net.channel_mask[:] = 0
    ddpm.net.channel_mask[:3] = 1
    course = Curriculum(cfg, 80, ddpm.alphabar)
    images = torch.randint(0, 256, (64, 1, 8, 8)).byte()
    supersparse.give_birth(ddpm, ema, opt, cfg, course, images, 10, slice(None))
    born = ddpm.net.channel_birth_stage == 1
    assert born.sum() == 3 and not born[:3].any()
    for w, axis in bottleneck(ddpm.net):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (select(opt.state[w][moment], axis, born) == 0).all()
            assert (select(opt.state[w][moment], axis, ~born) != 0).any()


def scores(ddpm, cfg, images, **changes):
    course = Curriculum(cfg, 80, ddpm.alphabar)
    return supersparse.gate_scores(
        ddpm, cfg, course, images, 20, slice(None), **changes
    )


def test_the_score_is_the_slope_of_the_loss_at_the_gate():
    """Against finite differences of the same 20 losses, in double precision."""
    ddpm, cfg = planted(batch=16)
    ddpm.double()
    images = torch.randint(0, 256, (64, 1, 8, 8), generator=rng("cpu", 3)).byte()
    forward, args = ddpm.forward, []
    ddpm.forward = lambda *a: args.append(a) or forward(*a)
    ddpm.eps_hat = lambda xt, t: ddpm.net(xt.double(), t.double())
    got = scores(ddpm, cfg, images)
    assert len(args) == 20 and len({tuple(a[1].tolist()) for a in args}) == 20
    assert all(a[1].min() >= 400 for a in args)  # t of the stage that begins
    mask, h = ddpm.net.channel_mask, 1e-5
    want = torch.zeros(16)
    with torch.no_grad():
        for c in range(16):
            for a in args:
                sides = []
                for move in (h, -2 * h, h):
                    mask[c] += move
                    sides.append(forward(*a))
                want[c] += (sides[0] - sides[1]).abs() / (2 * h)
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-4, atol=1e-7)
    assert not mask.requires_grad


def trained(c):
    """Return a trained DDPM with half its channels masked, c being one of these.

    Channel c is planted: it gives a constant that the bias of up0 was made to lack.
    The other masked channels have next to no weights out.
    """
    torch.manual_seed(0)
    cfg = Config(n_feat=8, batch=64, stages="0", epochs_per_stage="1", sparsity="0")
    ddpm = build(cfg, (1, 8, 8))
    images = supersparse.load_images(cfg)[0]
    opt = torch.optim.AdamW(ddpm.parameters(), lr=5e-3)
    for step in range(100):
        g = rng("cpu", step)
        x0 = images[torch.randint(len(images), (64,), generator=g)] / 127.5 - 1
        t = torch.randint(300, 700, (64,), generator=g)
        loss = ddpm(x0, t, torch.randn(x0.shape, generator=g))
        opt.zero_grad()
        loss.backward()
        opt.step()
    net, off = ddpm.net, torch.arange(c % 2, 16, 2)
    with torch.no_grad():
        net.channel_mask[off] = 0
        net.up0.weight[:, off] *= 1e-3
        for w in (net.to_vec.weight, net.vec_time.weight, net.vec_time.bias):
            w[c] = 0
        net.to_vec.bias[c] = 1
        net.up0.weight[:, c] = torch.randn(16, 1, 1, generator=rng("cpu", 4)) / 2
        net.up0.bias -= net.up0.weight[:, c, 0, 0] * torch.tensor(1.0).sigmoid()
    return ddpm, cfg, images


def losses_with_each(ddpm, images):
    """Return, for each channel, the loss with that one switched on as well."""
    held = images[:512] / 127.5 - 1
    g = rng("cpu", 5)
    t = torch.randint(300, 700, (512,), generator=g)
    eps, found = torch.randn(held.shape, generator=g), []
    for c in range(16):
        mask = ddpm.net.channel_mask.clone()
        ddpm.net.channel_mask[c] = 1
        with torch.no_grad():
            found.append(ddpm(held, t, eps).item())
        ddpm.net.channel_mask.copy_(mask)
    return torch.tensor(found)


@pytest.mark.parametrize("c", [2, 11])
def test_a_useful_channel_is_found_by_score_and_by_brute_force(c):
    ddpm, cfg, images = trained(c)
    brute = losses_with_each(ddpm, images)
    score = scores(ddpm, cfg, images)
    off = ddpm.net.channel_mask == 0
    assert brute[off].argmin() == off.nonzero().flatten().tolist().index(c)
    assert score[off].max() == score[c]


def test_where_the_score_misleads():
    """It is a size without a sign: a channel that harms is chosen as gladly."""
    ddpm, cfg, images = trained(2)
    with torch.no_grad():
        ddpm.net.up0.weight[:, 2] *= -1
    brute, score = losses_with_each(ddpm, images), scores(ddpm, cfg, images)
    off = ddpm.net.channel_mask == 0
    assert brute[off].max() == brute[2]  # the worst of all
    assert score[off].max() == score[2]  # and the first to be born


def spy_births(cfg, spoil=False):
    """Train as a worker; write down all scores, and masks before DDP's next forward."""
    import os

    rank, births, seen = os.environ["RANK"], supersparse.give_birth, []
    find, found = supersparse.gate_scores, []

    def spy(ddpm, *args):
        births(ddpm, *args)
        seen.append(ddpm.net.channel_mask.clone())

    def score(*args):
        found.append(find(*args))
        wrong = torch.rand(16, generator=rng("cpu", int(rank)))
        return found[-1] * wrong if spoil else found[-1]

    supersparse.give_birth, supersparse.gate_scores = spy, score
    try:
        supersparse.train(cfg)
    finally:
        torch.save(seen, f"{cfg.out}-masks{rank}.pt")
        torch.save(found, f"{cfg.out}-scores{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_masks_are_equal_on_two_ranks_before_the_next_forward():
    cfg = small("supersparse", "run", steps=9)
    assert finish(start(spy_births, cfg, world=2)) == [0, 0]
    first, second = (torch.load(f"run-masks{rank}.pt") for rank in (0, 1))
    assert len(first) == 3 and all(map(torch.equal, first, second))
    assert [int(mask.sum()) for mask in first] == [3, 10, 16]


def test_masks_that_differ_stop_the_run():
    cfg = small("supersparse", "run", steps=9)
    assert 0 not in finish(start(spy_births, cfg, True, world=2))


def test_one_process_and_two_choose_alike():
    for world, out in ((1, "one"), (2, "two")):
        cfg = small("supersparse", out, steps=9)
        assert finish(start(spy_births, cfg, world=world)) == [0] * world
    one, two = state("one")["net"], state("two")["net"]
    name = "net.channel_birth_stage"
    assert torch.equal(one[name], two[name]) and one[name].max() == 2
    want = torch.load("one-scores0.pt")
    assert len(want) == 2
    for rank in (0, 1):
        for a, b in zip(want, torch.load(f"two-scores{rank}.pt"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * a.max().item())


def test_gradient_and_random_choose_differently():
    for regrow in ("gradient", "random"):
        train("supersparse", regrow, regrow=regrow, save_every=99)
    births = [
        state(run)["net"]["net.channel_birth_stage"] for run in ("gradient", "random")
    ]
    assert (births[0] == 1).sum() == (births[1] == 1).sum() == 7
    assert torch.equal(births[0] == 0, births[1] == 0)
    assert not torch.equal(births[0] == 1, births[1] == 1)


def test_the_mask_works_without_a_curriculum(monkeypatch):
    ts, forward = [], supersparse.DDPM.forward

    def spy(self, x0, t=None, eps=None):
        ts.append(t)
        return forward(self, x0, t, eps)

    monkeypatch.setattr(supersparse.DDPM, "forward", spy)
    train("supersparse", "run", order="none", steps=9)
    assert ts[0].min() < 800  # low noise from the first step on
    assert (state("run")["net"]["net.channel_birth_stage"] >= 0).all()


def test_a_run_writes_its_mask_and_its_counts():
    train("supersparse", "run")
    with open("run/metrics.csv") as f:
        rows = list(csv.DictReader(f))
    assert [row["active_channels"] for row in rows] == ["3", "10", "16"]
    assert Path("run/mask.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ("0.8,0.4", "--sparsity wants 1 or 5 numbers, one a stage"),
        ("0.2,0.4,0.4,0.4,0", "never rises"),
        ("1,0.6,0.4,0.2,0", "--sparsity is 0 to below 1"),
        ("a", "--sparsity wants numbers"),
    ],
)
def test_sparsities_that_make_no_sense_are_refused(sparsity, message):
    with pytest.raises(ValueError, match=message):
        Config(sparsity=sparsity)


def test_a_plain_unet_has_all_its_channels():
    assert UNet(1, 8).channel_mask.all()
