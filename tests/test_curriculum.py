"""The curriculum: what each stage trains, its controls, and stages that stay put."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import command_line, state
from scipy.stats import chi2
from test_family import small

import supercurriculum
import superminddpm
from supercurriculum import DDPM, Config, draw_t, stage_density

ALPHABAR = DDPM(None).alphabar


def density(**options):
    cfg = Config(**options)
    return stage_density(cfg, DDPM(None, cfg.T).alphabar)


def run(out, module=supercurriculum, **changes):
    """Train a short run without pictures; return its last checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_grid", lambda *_: None)
        module.train(small(module.SCRIPT, out, **changes))
    return state(out)


# ---- what a stage trains -------------------------------------------------------------


def test_each_stage_is_uniform_from_its_edge_to_T():
    p = density()
    for row, count in zip(p, [201, 401, 601, 801, 1000], strict=True):
        assert (row[-count:] == row[-1]).all() and (row[:-count] == 0).all()
        assert row.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("T", [50, 100, 1000])
def test_edges_are_met_exactly(T):
    """0.29 * 100 is 28.999999999999996 in floating point."""
    edges = {"stages": tuple(k / T for k in range(T)), "epochs_per_stage": (1,) * T}
    forward, reverse = (density(T=T, order=o, **edges) for o in ("forward", "reverse"))
    for k in range(T):
        assert forward[k].nonzero().flatten().tolist() == [*range(max(k, 1) - 1, T)]
        assert reverse[k].nonzero().flatten().tolist() == [*range(T - k)]


def test_edges_in_log_snr_are_equal_steps_of_log_snr():
    """Of the cosine schedule; log-SNR is bounded by 10 and -10."""
    place = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008
    abar = (place * torch.pi / 2).cos() ** 2
    logsnr = (abar / abar[0])[1:].logit()
    for order, sign in (("forward", 1), ("reverse", -1)):
        p = density(stage_axis="logsnr", order=order)
        for row, highest in zip(p, (-6, -2, 2, 6, 100), strict=True):
            assert torch.equal(row > 0, sign * logsnr <= highest)


@pytest.mark.parametrize("axis", ["t", "logsnr"])
@pytest.mark.parametrize("order", ["forward", "reverse", "none"])
def test_no_stage_is_empty(order, axis):
    edges = {"stages": (1.0, 0.9, 0.5), "epochs_per_stage": (1, 1, 1)}
    p = density(T=50, order=order, stage_axis=axis, **edges)
    assert p.sum(1).tolist() == pytest.approx([1, 1, 1]) and (p >= 0).all()


@pytest.mark.parametrize("axis", ["t", "logsnr"])
def test_without_an_order_each_step_has_the_average_of_the_run(axis):
    shares = torch.tensor([5, 10, 15, 20, 30], dtype=torch.float64) / 80
    want = shares @ density(stage_axis=axis).double()
    for row in density(stage_axis=axis, order="none"):
        torch.testing.assert_close(row.double(), want, rtol=1e-5, atol=0)


# ---- what is drawn -------------------------------------------------------------------


def drawn(cfg, p, steps, batch=64):
    """Return t of many steps, (steps, batch), as the loop draws them."""
    base = torch.full((batch,), -1)
    return torch.stack([draw_t(cfg, base, p, step) for step in range(steps)])


def fits(ts, p, bins=50):
    """Return the p-value of a chi-square test of draws ts against probabilities p."""
    want = p.double().view(bins, -1).sum(1) * ts.numel()
    counts = torch.bincount((ts.flatten() - 1) * bins // 1000, minlength=bins)
    assert (counts[want == 0] == 0).all()
    want, counts = want[want > 0], counts[want > 0]
    return chi2.sf(((counts - want) ** 2 / want).sum().item(), len(want) - 1)


@pytest.mark.parametrize("axis", ["t", "logsnr"])
def test_draws_follow_the_stages_and_shuffled_ones_their_average(axis):
    cfg, shares = Config(stage_axis=axis), [5, 10, 15, 20]
    p, none = density(stage_axis=axis), density(stage_axis=axis, order="none")[0]
    parts = [drawn(cfg, row, 20 * k) for row, k in zip(p[:4], shares, strict=True)]
    for ts, row in zip(parts, p, strict=False):
        assert ts.min() >= 1 and ts.max() == 1000 and fits(ts, row) > 1e-3
    g = torch.Generator().manual_seed(0)
    uniform = torch.randint(1, 1001, (600, 64), generator=g)
    assert fits(torch.cat([*parts, uniform]), none) > 1e-3
    assert fits(drawn(cfg, none, 1600), none) > 1e-3


def test_draws_repeat_by_seed_and_differ_by_step():
    p = density()[0]
    ts = drawn(Config(), p, 40)
    assert torch.equal(ts, drawn(Config(), p, 40)) and ts.dtype == torch.int64
    assert len(ts.unique(dim=0)) == 40
    other = drawn(Config(seed=1), p, 40)
    assert not (ts == other).all(1).any()


def test_where_all_t_are_equally_likely_the_t_of_the_base_stays():
    t = torch.arange(64)
    assert draw_t(Config(), t, density()[-1], 0) is t
    once = {"stages": (0.0,), "epochs_per_stage": (7,)}
    for order in ("forward", "reverse", "none"):
        assert draw_t(Config(), t, density(order=order, **once)[0], 0) is t


# ---- runs ----------------------------------------------------------------------------


def test_only_t_differs_from_the_base_and_lies_in_its_stage(tiny, monkeypatch):
    seen = {}
    for module in (superminddpm, supercurriculum):
        seen[module], forward = [], module.DDPM.forward

        def spy(self, x0, t, eps, forward=forward, own=seen[module]):
            if self.training:
                own.append((x0, t, eps))
            return forward(self, x0, t, eps)

        monkeypatch.setattr(module.DDPM, "forward", spy)
        run(module.SCRIPT, module)
    pairs = list(zip(*seen.values(), strict=True))
    assert len(pairs) == 12  # stages begin at steps 0, 4, 8
    for step, (a, b) in enumerate(pairs):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
        low = (800, 400, 1)[step // 4]
        assert b[1].min() >= low and torch.equal(a[1], b[1]) is (low == 1)


def test_stages_begin_by_their_shares_rounded_not_cut(tiny):
    five = {"stages": (0.8, 0.6, 0.4, 0.2, 0.0)}
    for unit in (1, 0.1):
        shares = tuple(unit * share for share in (5, 10, 15, 20, 30))
        last = run(f"run{unit}", steps=10, epochs_per_stage=shares, **five)
        assert last["starts"] == [0, 1, 2, 4, 6]  # 0, 0.625, 1.875, 3.75, 6.25
    assert run("short", steps=2, **five, epochs_per_stage=shares)["step"] == 2


def test_a_stage_ends_with_a_row_of_metrics(tiny):
    run("run", every=1000)
    with open("run/metrics.csv") as f:
        rows = [(int(row["step"]), int(row["stage"])) for row in csv.DictReader(f)]
    assert rows == [(4, 0), (8, 1), (12, 2)]


def test_a_run_that_is_extended_keeps_its_stages(tiny):
    """Else it would go back into an earlier stage."""
    assert run("run")["starts"] == [0, 4, 8]
    last = run("run", steps=18, resume=True)
    assert last["starts"] == [0, 4, 8]
    assert {row["stage"] for row in last["history"] if row["step"] > 8} == {2}
    assert run("fresh", steps=18, every=1000)["starts"] == [0, 6, 12]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--stages 0.5 0", "--stages: 0 to 1, each with length > 0"),
        ("--stages 800 600 400 200 0", "--stages: 0 to 1, each with length > 0"),
        ("--stages=-0.1 0.6 0.4 0.2 0", "--stages: 0 to 1, each with length > 0"),
        ("--epochs-per-stage 5 10 15 20 0", "--stages: 0 to 1, each with length > 0"),
        ("--stages 0.8 nan 0.4 0.2 0", "--stages: 0 to 1, each with length > 0"),
        (
            "--epochs-per-stage 5 nan 15 20 1",
            "--stages: 0 to 1, each with length > 0",
        ),
        ("--stages --epochs-per-stage", "--stages: 0 to 1, each with length > 0"),
        ("--epochs-per-stage 5 10 15 20 inf", "--stages: 0 to 1, each with length > 0"),
        ("--epochs-per-stage 0 0 0 0 0", "--stages: 0 to 1, each with length > 0"),
        ("--order backwards", "invalid choice 'backwards'"),
        ("--stage-axis snr", "invalid choice 'snr'"),
    ],
)
def test_options_that_make_no_sense_are_refused(line, message, capsys):
    assert command_line(supercurriculum, f"{line} --steps 1 --quiet") == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown and "Traceback" not in shown
    assert not Path("runs").exists()
