"""The curriculum: stages, densities, draws, pace."""

import csv
from itertools import pairwise

import pytest
import torch
from scipy.stats import chi2
from test_family import small, train

import supercurriculum
from supercurriculum import DDPM, Config, Curriculum, rng

ALPHABAR = DDPM(torch.nn.Identity()).alphabar
STEPS = 800


def curriculum(total=STEPS, **options):
    return Curriculum(Config(**options), total, ALPHABAR)


def middle(course, stage):
    return (course.starts[stage] + [*course.starts, course.total][stage + 1]) // 2


def test_the_five_stages_have_the_promised_bounds_and_shares():
    course = curriculum()
    assert course.starts == [0, 50, 150, 300, 500]  # 5, 10, 15, 20, 30 of 80
    for stage, count in enumerate([201, 401, 601, 801, 1000]):
        for step in (course.starts[stage], [*course.starts, STEPS][stage + 1] - 1):
            assert course.stage(step) == stage
            p = course.density(step)
            assert (p > 0).sum() == count and p[-1] > 0
            assert p[p > 0].allclose(torch.tensor(1 / count, dtype=p.dtype))
            assert (p > 0).nonzero()[0] == 1000 - count


def test_bounds_are_rounded_not_cut():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    ddpm = DDPM(torch.nn.Identity(), T=100)
    cfg = Config(T=100, stages="0.29,0.57,0", epochs_per_stage="1,1,1")
    course = Curriculum(cfg, 30, ddpm.alphabar)
    lows = [int(course.density(step).nonzero()[0]) + 1 for step in (0, 10, 20)]
    assert lows == [29, 57, 1]


def test_edges_in_log_snr_are_equal_steps_of_log_snr():
    course = curriculum(stage_axis="logsnr")
    ab = ALPHABAR[1:].double()
    logsnr = (ab / (1 - ab)).log()
    span = logsnr[0] - logsnr[-1]
    for stage, share in enumerate([0.8, 0.6, 0.4, 0.2, 0.0]):
        low = course.density(middle(course, stage)).nonzero()[0]
        want = logsnr[0] - share * span
        nearest = (logsnr - want).abs().min()
        assert abs(logsnr[low] - want) <= nearest + 1e-9


def test_reverse_is_the_mirror_image():
    forward, reverse = curriculum(), curriculum(order="reverse")
    for stage in range(5):
        step = middle(forward, stage)
        assert torch.equal(reverse.density(step), forward.density(step).flip(0))
    log = curriculum(order="reverse", stage_axis="logsnr")
    high = log.density(0).nonzero()[-1]
    snr = ALPHABAR[1:] / (1 - ALPHABAR[1:])
    share = (snr[0] / snr[high]).log() / (snr[0] / snr[-1]).log()
    assert share.item() == pytest.approx(0.2, abs=0.01)  # the cleanest fifth


def test_soft_moves_smoothly_from_high_noise_to_uniform():
    course = curriculum(soft=True)
    t = torch.arange(1, 1001).double()
    means = [(course.density(step) * t).sum() / 1000 for step in range(STEPS)]
    assert means[0] == pytest.approx(0.9, abs=0.005)  # that of the hard stage
    assert means[course.starts[2]] == pytest.approx(0.7, abs=0.005)
    falls = [a - b for a, b in pairwise(means)]
    assert max(falls) < 0.01 and min(falls) > -1e-9
    p = course.density(STEPS - 1)
    assert torch.equal(p, p[:1].expand(1000))
    assert (course.density(0).diff() > 0).all()  # no hard edge anywhere


EVERY = [
    {"order": order, "stage_axis": axis, "soft": soft}
    for order in ("forward", "reverse", "none")
    for axis in ("t", "logsnr")
    for soft in (False, True)
]


@pytest.mark.parametrize("options", EVERY)
def test_every_density_sums_to_one(options):
    course = curriculum(total=80, **options)
    for step in range(80):
        p = course.density(step)
        assert p.shape == (1000,) and (p >= 0).all()
        assert p.sum().item() == pytest.approx(1, abs=1e-9)


def drawn(course, steps, batch=64):
    """Return, for each step, t as the loop draws it."""
    every = []
    for step in steps:
        g = rng("cpu", 0, step, 2)
        t = torch.randint(1, 1001, (batch,), generator=g)
        every.append(course.draw(t, step))
    return every


def fits(ts, p, bins=20):
    """Return the p-value of a chi-square test of draws ts against probabilities p."""
    p = p.reshape(bins, -1).sum(1)
    counts = torch.bincount((torch.cat(ts) - 1) * bins // 1000, minlength=bins)
    want = p * counts.sum()
    assert (counts[want == 0] == 0).all()
    want, counts = want[want > 0], counts[want > 0]
    return chi2.sf(((counts - want) ** 2 / want).sum().item(), len(want) - 1)


@pytest.mark.parametrize("soft", [False, True])
def test_shuffled_has_the_same_marginal_as_forward(soft):
    """Against each other's draws, and against the stages counted by hand."""
    forward, shuffled = curriculum(soft=soft), curriculum(order="none", soft=soft)
    for step in (0, 400, 799):
        assert torch.equal(shuffled.density(step), shuffled.density(7))
    p = shuffled.density(0)
    for course in (forward, shuffled):
        assert fits(drawn(course, range(STEPS)), p) > 1e-3
    if not soft:
        shares = torch.tensor([5, 10, 15, 20, 30]) / 80
        by_hand = torch.zeros(1000)
        for share, low in zip(shares, [800, 600, 400, 200, 1], strict=True):
            by_hand[low - 1 :] += share / (1001 - low)
        torch.testing.assert_close(p.float(), by_hand)


@pytest.mark.parametrize("options", [{}, {"stage_axis": "logsnr"}, {"soft": True}])
def test_draws_follow_the_density_of_their_stage(options):
    course = curriculum(total=80 * 100, **options)
    for stage in range(5):
        first = course.starts[stage]
        steps = range(first, first + (1 if options.get("soft") else 100))
        ts = drawn(course, steps, 64 * 100 // len(steps))
        assert fits(ts, course.density(first)) > 1e-3, stage
    for t in drawn(course, range(0, 8000, 80)):
        assert t.dtype == torch.int64 and t.min() >= 1 and t.max() <= 1000


def test_draws_differ_by_step_and_repeat_by_seed():
    one, two = curriculum(), curriculum()
    a, b = drawn(one, range(40)), drawn(two, range(40))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len({tuple(t.tolist()) for t in a}) == 40
    other = drawn(curriculum(seed=1), range(40))
    assert not any(torch.equal(x, y) for x, y in zip(a, other, strict=True))


def test_images_and_noise_stay_those_of_the_base(monkeypatch):
    """Only t changes, and it lies in its stage."""
    import superminddpm

    seen = {}
    for module in (superminddpm, supercurriculum):
        seen[module.SCRIPT], forward = [], module.DDPM.forward

        def spy(self, x0, t=None, eps=None, forward=forward, own=seen[module.SCRIPT]):
            if self.training:
                own.append((x0, t, eps))
            return forward(self, x0, t, eps)

        monkeypatch.setattr(module.DDPM, "forward", spy)
        train(module.SCRIPT, module.SCRIPT)
    for step, (a, b) in enumerate(zip(*seen.values(), strict=True)):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
        low = (800, 400, 1)[step // 4]
        assert b[1].min() >= low and torch.equal(a[1], b[1]) is (low == 1)


# ---- pace ----------------------------------------------------------------------------


def test_a_stalled_stage_ends_early_and_the_others_keep_their_length():
    course = curriculum(patience=2, epochs_per_stage="1,1,1,1,1")
    starts = list(course.starts)  # 0, 160, 320, 480, 640
    for epoch, loss in enumerate([0.5, 0.4, 0.45, 0.3, 0.31, 0.3], 1):
        course.seen += [loss] * 10
        course.pace(epoch * 10)
        if epoch < 6:
            assert course.starts == starts and course.stage(epoch * 10) == 0
    assert course.starts == [0, 60, 220, 380, 540]  # 0.31, and 0.3 again, are no gain
    assert course.stage(59) == 0 and course.stage(60) == 1
    assert course.best == float("inf") and course.stalled == 0


def test_a_stage_that_still_gains_ends_with_its_share():
    course = curriculum(patience=2)
    starts = list(course.starts)
    for epoch in range(1, STEPS // 10 + 1):
        course.seen += [1 / epoch] * 10
        course.pace(epoch * 10)
    assert course.starts == starts
    for _ in range(9):  # the last stage has no next one
        course.seen += [1.0]
        course.pace(STEPS - 1)
    assert course.starts == starts


def test_a_new_stage_does_not_inherit_the_best_loss_of_the_last():
    """High noise has the smaller loss: stage 1 would stall at once."""
    course = curriculum(patience=1)
    for step in range(10, 150, 10):
        course.seen += [0.001 / step if step <= 50 else 0.1 / step]
        course.pace(step)
    assert course.starts == [0, 50, 150, 300, 500]


def test_patience_shortens_a_real_run():
    train("supercurriculum", "run", steps=60, lr=1e-12, patience=1, save_every=99)
    with open("run/metrics.csv") as f:
        rows = [(int(row["step"]), int(row["stage"])) for row in csv.DictReader(f)]
    ends = [step for step, stage in rows if stage < 2]
    assert len(ends) == 2 and ends[0] < 20 and ends[1] - ends[0] < 20
    assert rows[-1] == (60, 2)


# ---- options -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": "0.5,x"}, "--stages wants numbers like 0.5,0, not '0.5,x'"),
        ({"stages": "0.5,0"}, "--stages has 2 entries, --epochs-per-stage 5"),
        ({"stages": "1,0.6,0.4,0.2,0"}, "--stages is 0 to below 1"),
        ({"stages": "nan,0.6,0.4,0.2,0"}, "--stages is 0 to below 1"),
        ({"epochs_per_stage": "5,10,15,20,0"}, "--epochs-per-stage above 0"),
        ({"soft": True, "patience": 3}, "--soft has no stage that --patience could"),
        ({"patience": -1}, "--patience cannot be -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_a_run_of_fewer_steps_than_stages_still_works():
    train("supercurriculum", "run", steps=2)
    assert small("supercurriculum", "x").stages == "0.8,0.4,0"
