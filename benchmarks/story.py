"""Draw the story of a run of supersparse.py: stages, noise, channels, pictures.

    python supersparse.py
    python benchmarks/story.py runs/supersparse-digits

Writes benchmarks/results/story.png. Above, over the steps of the run: the noise levels
that a stage trains on, and the channels that are active. Below, for the end of each
stage: a real image at the least noise of that stage, and what the net of that moment,
its averaged weights, makes of pure noise by then. It is led by DDIM from t = T down to
the lower edge of the stage and no further, since below it has not been trained; what is
shown is x0_hat there.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from matplotlib.figure import Figure
from torchvision.utils import make_grid

import supersparse

BLUE, ORANGE = "#0072B2", "#D55E00"


@torch.no_grad()
def picture(ddpm, low, xt):
    """Return x0_hat at t = low, where DDIM has led xt from t = T."""
    times = torch.linspace(ddpm.T, low, 26).round().long()
    for t, s in zip(times[:-1], times[1:], strict=True):
        xt = ddpm.ddim_step(xt, t.expand(len(xt)), s.expand(len(xt)))
    return ddpm.predict(xt, times[-1:].expand(len(xt)))[0]


def show(axes, images, title):
    """Show images (N, 1, S, S) in [-1, 1] as a square of tiles."""
    grid = make_grid((images + 1) / 2, nrow=round(len(images) ** 0.5), pad_value=1)
    axes.imshow(grid[0].clamp(0, 1), cmap="gray", interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def main():
    run = Path(sys.argv[1])
    with open(run / "metrics.csv") as f:
        rows = list(csv.DictReader(f))
    last = supersparse.read_checkpoint(run / "last.pt")
    cfg, total, starts = last["config"], last["step"], last["starts"]
    ddpm = supersparse.load(run / "last.pt")
    course = supersparse.Curriculum(cfg, total, ddpm.alphabar)
    ends = [*starts[1:], total]
    lows = [int(course.density(step).nonzero()[0]) + 1 for step in starts]
    states = {}
    for path in sorted(run.glob("checkpoint_epoch_*.pt")):
        states[supersparse.read_checkpoint(path)["step"]] = path

    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.add_gridspec(3, len(starts), height_ratios=(1.5, 1, 1))
    axes = figure.add_subplot(grid[0, :])
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        tint = BLUE if k % 2 else "#56B4E9"
        axes.fill_between([start, end], lows[k], cfg.T, color=tint, alpha=0.5, lw=0)
        ab = ddpm.alphabar[lows[k]].item()
        text = f"stage {k}\nSNR to\n{ab / (1 - ab):.2g}"
        middle = (start + end) / 2
        axes.text(middle, cfg.T * 1.02, text, ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(0, total), ylim=(0, cfg.T), xlabel="step")
    axes.set_ylabel("noise levels t in training", color=BLUE)
    right = axes.twinx()
    active = {int(row["stage"]): int(row["active_channels"]) for row in rows}
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        right.hlines(active[k], start, end, color=ORANGE, lw=3)
        right.annotate(
            f"{active[k]}",
            (end, active[k]),
            (-3, 3),
            color=ORANGE,
            textcoords="offset points",
            ha="right",
        )
    right.set_ylim(0, len(ddpm.net.channel_mask) * 1.1)
    right.set_ylabel("active bottleneck channels", color=ORANGE)

    held = supersparse.load_images(cfg)[2][:9] / 127.5 - 1
    noise = torch.randn(9, *ddpm.shape, generator=supersparse.rng("cpu", 0, 1))
    for k, end in enumerate(ends):
        t = torch.full((9,), lows[k])
        above, below = figure.add_subplot(grid[1, k]), figure.add_subplot(grid[2, k])
        show(above, ddpm.q_sample(held, t, noise).clamp(-1, 1), f"real, t = {lows[k]}")
        drawn = picture(supersparse.load(states[end]), lows[k], noise)
        show(below, drawn, f"drawn down to t = {lows[k]}")
    figure.savefig(Path(__file__).parent / "results" / "story.png", dpi=110)


if __name__ == "__main__":
    main()
