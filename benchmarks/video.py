"""Do clips move, do they keep their digit, and what do noise and penalty change?

    python benchmarks/video.py         a quarter of an hour on one core

Trains supervideo.py with its default recipe, one arm after the other: with temporal
layers on mixed and on shared noise; without them on shared noise, also with a penalty
100 times as strong; and the first arm again with 80 epochs instead of 7. From the
averaged weights of each it draws 64 clips from one seed and measures

 - pixels a frame: mean displacement between neighbours, by cross-correlation;
 - match: that correlation, 1 for one thing that moves; beside it that of strangers,
   where each frame is one of another real clip;
 - still: in how many cases a frame stays where the one before was;
 - steady: in how many cases a frame moves as the one before did, to the pixel;
 - the held-out loss (the noise of the arm), and the jitter of x0_hat at abar = 0.5 on
   64 real held-out clips: how much its error differs from frame to frame.

Writes benchmarks/results/video.txt, and video.npz with the clips of each arm.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import supervideo

RESULTS = Path(__file__).parent / "results"
ARMS = {
    f"{way}, {noise}": {"temporal": way == "temporal", "noise": noise}
    for way, noise in (
        ("temporal", "mixed"),
        ("temporal", "shared"),
        ("frame by frame", "shared"),
    )
}
strong = ARMS["frame by frame, shared"] | {"reg_weight": 10.0}
ARMS["frame by frame, shared, penalty 10"] = strong
ARMS["temporal, mixed, 80 epochs"] = ARMS["temporal, mixed"] | {"epochs": 80}


def run(options):
    """Return the trained DDPM and the last row of its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"sample_every": 10**6, "save_every": 10**6, "quiet": True}
        cfg = supervideo.Config(out=f"{folder}/run", **own, **options)
        ddpm = supervideo.train(cfg)
        with open(f"{folder}/run/metrics.csv") as f:
            return ddpm, [*csv.DictReader(f)][-1]


@torch.no_grad()
def jitter(ddpm, x0):
    """Return the jitter of x0_hat at abar = 0.5, with the noise of the model."""
    t = int((ddpm.alphabar - 0.5).abs().argmin())
    eps = torch.randn(x0.shape, generator=supervideo.rng("cpu", 1))
    error = ddpm.residual(x0, torch.full((len(x0),), t), eps)
    ab = ddpm.alphabar[t]
    return (supervideo.flicker(error, 1) * (1 - ab) / ab).item()


def motion(clips):
    """Return pixels a frame, match, still and steady of clips, as said above."""
    shift, match = supervideo.displacement(clips, 1)
    steady = (shift[:, 1:] == shift[:, :-1]).all(-1).float().mean()
    far = shift.float().norm(dim=-1)
    values = (far.mean(), match.mean(), (far == 0).float().mean(), steady)
    return "{:10.2f}{:8.2f}{:8.2f}{:8.2f}".format(*(x.item() for x in values))


def main(steps: int = 0):
    head = f"{'':36}{'loss':>8}{'jitter':>8}{'px/frame':>10}"
    head += f"{'match':>8}{'still':>8}{'steady':>8}"
    lines, kept = ["python benchmarks/video.py", "", head], {}
    held = supervideo.load_images(supervideo.Config())[2][:64] / 127.5 - 1
    kept["real"] = held
    lines.append(f"{'real':36}{'':16}{motion(held)}")
    frames = [held[:, f : f + 1].roll(f, 0) for f in range(held.shape[1])]
    lines.append(f"{'strangers':36}{'':16}{motion(torch.cat(frames, dim=1))}")
    print("\n".join(lines), flush=True)
    for name, options in ARMS.items():
        ddpm, row = run({"steps": steps, **options})
        noise = torch.randn(64, *ddpm.shape, generator=supervideo.rng("cpu", 2))
        drawn = ddpm.sample(noise.shape, xt=noise)
        kept[name] = ((drawn + 1) * 127.5).round() / 127.5 - 1  # as they are stored
        scores = f"{float(row['held_loss']):8.4f}{jitter(ddpm, held):8.4f}"
        lines.append(f"{name:36}{scores}{motion(kept[name])}")
        print(lines[-1], flush=True)
        (RESULTS / "video.txt").write_text("\n".join(lines) + "\n")
        pixels = {k: ((x + 1) * 127.5).round().byte() for k, x in kept.items()}
        own = {k: x.numpy() for k, x in pixels.items()}
        np.savez_compressed(RESULTS / "video.npz", **own)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
