"""Do clips move, do they keep their digit, and what do noise and penalty change?

    python benchmarks/video.py                       a quarter of an hour on one core
    python benchmarks/video.py --steps 20 --out x    to try it out

Trains supervideo.py with its default recipe, one arm after the other: with temporal
layers on progressive and on shared noise; without them on shared noise, also with a
penalty 100 times as strong; and the first arm again for 80 epochs. From the averaged
weights of each arm 64 clips are drawn from one seed and measured:

 - pixels a frame: mean displacement between neighbours, by cross-correlation;
 - match: that correlation, 1 for one thing that moves; beside it that of strangers,
   where each frame is one of another real clip;
 - still: in how many cases a frame stays where the one before was;
 - steady: in how many cases a frame moves as the one before did, to the pixel;
 - the held-out loss (with the noise of the arm), and the jitter of x0_hat at abar = 0.5
   on 64 real held-out clips: how much its error differs from frame to frame.

Writes video.txt, and video.npz with the clips of each arm, into --out.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import supervideo

RESULTS = Path(__file__).parent / "results"
PROGRESSIVE = {"temporal": True, "noise": "progressive"}
ALONE = {"temporal": False, "noise": "shared"}
ARMS = {
    "temporal, progressive": PROGRESSIVE,
    "temporal, shared": PROGRESSIVE | {"noise": "shared"},
    "frame by frame, shared": ALONE,
    "frame by frame, shared, penalty 10": ALONE | {"reg_weight": 10.0},
    "temporal, progressive, 80 epochs": PROGRESSIVE | {"epochs": 80},
}


def flicker(error, channels):
    """Return how much error (B, F C, S, S) differs from frame to frame, mean square.

    Of eps_hat - eps it is the penalty, of x0_hat - x0 the jitter that one sees.
    """
    return error.unflatten(1, (-1, channels)).diff(dim=1).square().mean()


def displacement(clips, channels):
    """Return how things move from frame to frame, and how alike the frames are.

    shift (B, F - 1, 2): whole pixels down and right, where the cross-correlation of two
    neighbours is highest (it wraps round). match (B, F - 1): that correlation, 1 for
    one thing that moves. clips (B, F C, S, S) in [-1, 1]; -1 is the ground.
    """
    ink = (clips.unflatten(1, (-1, channels)).mean(2) + 1) / 2  # (B, F, S, S)
    wave, side = torch.fft.rfft2(ink), ink.shape[-1]
    both = torch.fft.irfft2(wave[:, 1:] * wave[:, :-1].conj(), s=ink.shape[-2:])
    best, place = both.flatten(2).max(-1)
    shift = torch.stack([place // side, place % side], dim=-1)
    size = ink.square().sum((2, 3)).sqrt()
    match = best / (size[:, 1:] * size[:, :-1]).clamp(min=1e-6)
    return (shift + side // 2) % side - side // 2, match


@torch.no_grad()
def jitter(ddpm, x0):
    """Return the jitter of x0_hat at abar = 0.5, with the noise of the model."""
    t = int((ddpm.alphabar - 0.5).abs().argmin())
    eps = torch.randn(x0.shape, generator=supervideo.rng("cpu", 1))
    eps = supervideo.correlate(eps, ddpm.channels, ddpm.correlation)
    t = torch.full((len(x0),), t)
    error, ab = ddpm.eps_hat(ddpm.q_sample(x0, t, eps), t) - eps, ddpm.alphabar[t[0]]
    return (flicker(error, ddpm.channels) * (1 - ab) / ab).item()


def motion(clips):
    """Return pixels a frame, match, still and steady of clips, as said above."""
    shift, match = displacement(clips, 1)
    steady = (shift[:, 1:] == shift[:, :-1]).all(-1).float().mean()
    far = shift.float().norm(dim=-1)
    values = (far.mean(), match.mean(), (far == 0).float().mean(), steady)
    return "{:10.2f}{:8.2f}{:8.2f}{:8.2f}".format(*(x.item() for x in values))


def main(steps: int = 0, out: Path = RESULTS):
    head = f"{'':36}{'loss':>8}{'jitter':>8}{'px/frame':>10}"
    head += f"{'match':>8}{'still':>8}{'steady':>8}"
    lines, kept = ["python benchmarks/video.py", "", head], {}
    held = supervideo.load_images(supervideo.Config(steps=steps))[1] / 127.5 - 1
    kept["real"] = real = held[:64]
    lines.append(f"{'real':36}{'':16}{motion(real)}")
    frames = [real[:, f : f + 1].roll(f, 0) for f in range(real.shape[1])]
    lines.append(f"{'strangers':36}{'':16}{motion(torch.cat(frames, dim=1))}")
    print("\n".join(lines), flush=True)
    for name, options in ARMS.items():
        own = {"steps": steps, "every": 10**6, "device": "cpu", "quiet": True}
        with tempfile.TemporaryDirectory() as folder:
            cfg = supervideo.Config(out=f"{folder}/run", **own, **options)
            ddpm = supervideo.train(cfg)
        loss = supervideo.held_out_loss(ddpm, held)["held_loss"]
        noise = torch.randn(64, *ddpm.shape, generator=supervideo.rng("cpu", 2))
        drawn = ddpm.sample(noise.shape, xt=noise)
        kept[name] = ((drawn + 1) * 127.5).round() / 127.5 - 1  # as they are stored
        scores = f"{loss:8.4f}{jitter(ddpm, real):8.4f}"
        lines.append(f"{name:36}{scores}{motion(kept[name])}")
        print(lines[-1], flush=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / "video.txt").write_text("\n".join(lines) + "\n")
        pixels = {k: ((x + 1) * 127.5).round().byte() for k, x in kept.items()}
        own = {k: x.numpy() for k, x in pixels.items()}
        np.savez_compressed(out / "video.npz", **own)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"video.py: {error}")
