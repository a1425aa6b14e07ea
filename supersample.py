"""Samplers: four ways from noise to an image, for a checkpoint of any script here.

A sampler needs no more of a model than `predict`, `p_sample` and alphabar. So there is
no network here: the script that wrote a checkpoint also reads it, and objective,
schedule, mask, labels and architecture mean what they meant in training. The heart is
`solve`.

    python supersample.py       64 images of superminddpm.py's run (trained if missing)
    python supersample.py --sample runs/superarch-digits/last.pt --n-samples 100
    python supersample.py --sampler dpmpp --sampling-steps 10 --out runs/fast
    python supersample.py --sample runs/superguide-digits/last.pt --guidance 0 1 3
    torchrun --standalone --nproc_per_node=2 supersample.py --out runs/two     the same

ddpm is Algorithm 2; with fewer steps than T it skips levels. ddim is Euler's method for
the ODE that leads each noise to its image (Song et al. 2020, arXiv:2010.02502). Of
second order are heun, two evaluations a step (Karras et al. 2022, arXiv:2206.00364,
Algorithm 1), and dpmpp, one (DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095).

Unlike the papers: x0_hat is clipped at each step; heun steps in the angle whose tangent
is sigma. (In sigma itself, which the cosine schedule starts at 20,000, it goes astray.)
An image depends on the seed, the number of its noise, its label and guidance; not on
--batch or the number of processes.
"""

# ---- 1. Config ---------------------------------------------------------------------
import io
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image
from torchvision.utils import save_image
from tqdm.auto import tqdm

SCRIPT = Path(__file__).stem


@dataclass(frozen=True)
class Config:
    """What to draw, and how."""

    sample: str = "runs/superminddpm-digits/last.pt"  # checkpoint of any script
    out: str = ""  # folder to write (empty: samples, beside the checkpoint)
    n_samples: int = 64  # number of images: 000000.png, 000001.png ..., and a grid
    batch: int = 64  # images drawn at a time, over all processes together
    sampler: Literal["ddpm", "ddim", "heun", "dpmpp"] = "ddim"  # the solver
    sampling_steps: int = 50  # network evaluations, at most T (guidance takes twice)
    eta: float = 0.0  # fresh noise of ddim, from 0 (none) to 1 (as in ddpm)
    labels: tuple[int, ...] = ()  # what superguide.py's network draws (empty: all)
    guidance: tuple[float, ...] = (1.0,)  # 0 ignores the label, above 1 exaggerates it
    ema: bool = True  # averaged weights rather than raw ones
    seed: int = 0  # of the noise
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a GPU, if any
    bf16: bool = False  # bfloat16 autocast, for hardware that is fast at it
    quiet: bool = False  # no progress bar and no messages

    def __post_init__(self):
        least = min(self.n_samples, self.batch, self.sampling_steps, len(self.guidance))
        if least < 1 or not 0 <= self.eta <= 1 or not 0 <= self.seed < 2**63:
            raise ValueError(
                "--eta is 0 to 1, --seed 0 or more, other numbers 1 or more"
            )
        if not np.isfinite(self.guidance).all():
            raise ValueError("--guidance takes numbers")
        if self.eta and self.sampler != "ddim":
            raise ValueError("--eta is for --sampler ddim; that of ddpm is 1")


# ---- 2. Samplers -------------------------------------------------------------------
@torch.no_grad()
def solve(ddpm, xt, sampler="ddim", steps=50, eta=0.0, noise=None):
    """Return images in [-1, 1] from the noise xt, by `steps` calls of `predict`.

    noise(k): fresh noise for step k = 1, 2 ..., for ddpm, and for ddim with eta > 0.
    """
    n = steps // 2 + 1 if sampler == "heun" else steps
    eta, older = 1.0 if sampler == "ddpm" else eta, None
    times = torch.linspace(ddpm.T, 0, n + 1).round().long().to(xt.device)
    bars = ddpm.alphabar[times]  # looked up at once, since each look waits for a GPU
    pairs = zip(times[:-1], times[1:], bars[:-1], bars[1:], strict=True)
    for k, (t, s, ab, ab_s) in enumerate(pairs, 1):
        cos, sin, cos_s, sin_s = (x.sqrt() for x in (ab, 1 - ab, ab_s, 1 - ab_s))
        t, s = t.expand(len(xt)), s.expand(len(xt))
        if sampler == "heun" and k <= steps - n:  # the mean of the slopes at both ends
            x0_hat, eps_hat = ddpm.predict(xt, t)  # xt = cos x0_hat + sin eps_hat
            slope = cos * eps_hat - sin * x0_hat  # dx / dangle
            angle = torch.atan2(sin_s, cos_s) - torch.atan2(sin, cos)
            x0_hat, eps_hat = ddpm.predict(xt + angle * slope, s)
            xt = xt + angle * (slope + cos_s * eps_hat - sin_s * x0_hat) / 2
        elif sampler == "dpmpp":  # x0_hat in mid-step, by a line through the last two
            x0_hat, lam = ddpm.predict(xt, t)[0], torch.log(cos / sin)
            middle = x0_hat
            if older and k < n:  # at the end lam is infinite
                slope = (x0_hat - older[0]) / (lam - older[1])
                middle = x0_hat + slope * (torch.log(cos_s / sin_s) - lam) / 2
            older = x0_hat, lam
            xt = sin_s / sin * xt + (cos_s - sin_s / sin * cos) * middle
        else:  # heun as well, when one call is left: the last step leads to x0_hat
            xt = ddpm.p_sample(xt, t, s, eta, noise(k) if eta else 0.0)
    return xt.clamp(-1, 1)


# ---- 3. Model ----------------------------------------------------------------------
def open_model(path, ema=True):
    """Return the script (a module) that wrote a checkpoint, and its model."""
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
        if not Path(__file__).with_name(f"{name}.py").exists():
            raise ValueError(f"{name}.py is not beside {SCRIPT}.py")
        script = import_module(name)
        return script, script.load(path, ema)
    except Exception as error:  # torch.load raises nearly anything on a foreign file
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot draw from {path}: {line}") from None


def find_model(cfg):
    """Return script and model of --sample; the default one is trained if missing."""
    path = Path(cfg.sample).expanduser()
    if cfg.sample == Config.sample and not path.exists():
        base = import_module("superminddpm")
        base.train(base.Config(device=cfg.device, quiet=cfg.quiet))
        sync()  # process 0 has saved the run
    return open_model(path, cfg.ema)


def sync():
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


# ---- 4. Drawing --------------------------------------------------------------------
def draw_batch(script, model, cfg, plan):
    """Return one image for each (label, guidance, number of its noise) in plan."""
    labels, guidance, numbers = zip(*plan, strict=True)
    device, channels = model.beta.device, getattr(model, "channels", model.shape[0])

    def noise(k):
        draws = (script.rng("cpu", cfg.seed, i, k, 4) for i in numbers)
        z = torch.stack([torch.randn(model.shape, generator=g) for g in draws])
        if hasattr(script, "correlate"):  # frames of a clip share some of their noise
            z = script.correlate(z, channels, model.correlation)
        return z.to(device)

    if hasattr(model.net, "classes"):
        script.condition(model, labels, guidance)
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
        x0 = solve(model, noise(0), cfg.sampler, cfg.sampling_steps, cfg.eta, noise)
    x0 = ((x0 + 1) * 127.5).round().byte().cpu().unflatten(1, (-1, channels))
    x0 = x0.permute(0, 3, 1, 4, 2).flatten(2, 3)  # (B, S, F S, C): frame beside frame
    return [Image.fromarray(image.squeeze()) for image in x0.numpy()]


def save_sheet(out, n, columns):
    """Write grid.png, and of clips the animation grid.webp, from the first n images."""
    x = np.stack([np.asarray(Image.open(out / f"{i:06}.png")) for i in range(n)])
    x = torch.from_numpy(x).view(*x.shape[:3], -1).permute(0, 3, 1, 2) / 255
    x = F.interpolate(x, scale_factor=max(1, 64 // x.shape[2]))
    side, width = x.shape[2:]  # a clip is as many squares as it has frames
    columns = columns if columns > 1 else max(1, round((n * side / width) ** 0.5))
    save_image(x, out / "grid.png", nrow=columns, pad_value=1)
    if width > side:
        pages = [io.BytesIO() for _ in range(width // side)]
        for frame, page in zip(x.split(side, dim=3), pages, strict=True):
            save_image(frame, page, "png", nrow=columns, pad_value=1)
        first, *others = map(Image.open, pages)
        film = {"append_images": others, "duration": 150, "loop": 0}
        first.save(out / "grid.webp", save_all=True, **film)


def draw(cfg):
    """Write --n-samples images of a checkpoint and their grid; return the folder."""
    out = Path(cfg.out or Path(cfg.sample).with_name("samples")).expanduser()
    if any(out.glob("*")):
        raise ValueError(f"{out} is not empty: choose another --out")
    script, model = find_model(cfg)
    device, rank, world = script.join_processes(cfg)
    classes = script.CLASSES if hasattr(model.net, "classes") else 0
    if not {*cfg.labels} <= {*range(classes)} or cfg.guidance != (1.0,) and not classes:
        known = f"labels 0 to {classes - 1}" if classes else "no labels"
        raise ValueError(f"--labels, --guidance: {cfg.sample} has {known}")
    if cfg.sampling_steps > model.T:
        raise ValueError(f"--sampling-steps is at most {model.T}")
    n, guidance, labels = cfg.n_samples, cfg.guidance, cfg.labels or range(classes)
    labels = labels or [None]
    turns = [divmod(i, len(guidance)) for i in range(n)]  # guidance changes first
    plan = [(labels[z % len(labels)], guidance[k], z) for z, k in turns]  # z: the noise
    sync()  # all have looked at the folder
    out.mkdir(parents=True, exist_ok=True)
    model, mine, share = model.to(device), range(rank, n, world), -(-cfg.batch // world)
    for k in tqdm(range(0, len(mine), share), str(out), disable=cfg.quiet or rank > 0):
        ids = mine[k : k + share]
        images = draw_batch(script, model, cfg, [plan[i] for i in ids])
        for i, image in zip(ids, images, strict=True):
            image.save(out / f"{i:06}.png")
    sync()
    if rank == 0:
        columns = len(guidance) if len(guidance) > 1 else len(labels)
        save_sheet(out, min(n, 400), columns)
    if rank == 0 and classes:
        rows = [f"{i:06}.png,{y},{w:g}\n" for i, (y, w, _) in enumerate(plan)]
        (out / "labels.csv").write_text("file,label,guidance\n" + "".join(rows))
    return out


# ---- 5. Main -----------------------------------------------------------------------
def main():
    try:
        draw(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if type(error) is RuntimeError:  # a mistake in the code, not a full GPU
            raise
        if isinstance(error, RuntimeError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{SCRIPT}.py:", *str(error).split()[:60], file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
