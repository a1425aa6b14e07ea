"""Samplers: one trained network, and four ways from noise to an image.

This is superminddpm.py plus lines marked `# + sample` and one Idea section. It draws
from a checkpoint of any script here. The script that wrote it reads it, so objective,
schedule, mask, labels and architecture mean what they meant in training: a sampler
needs no more of a model than `predict(xt, t)` and `alphabar`. The heart is `solve`.

    python supersample.py --sample runs/superminddpm-digits/last.pt --n-samples 100
    python supersample.py --sample FILE --sampler dpmpp --sampling-steps 10
    python supersample.py --sample FILE --labels 0 1 2 --guidance 0 1 3
    torchrun --nproc_per_node=2 supersample.py --sample FILE        the same images
    python supersample.py                 off: the base's run, and then images of it

 - ddpm: Algorithm 2; with fewer steps than T the chain skips times. ddim with eta 0 is
   Euler's method for the ODE that leads each noise to its image (arXiv:2010.02502).
 - heun: Karras et al. 2022, arXiv:2206.00364, Algorithm 1 in sigma = noise / signal.
 - dpmpp: DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095, Algorithm 2.

Unlike in the papers x0_hat is clipped at each call. Image i depends on the seed and i
alone, not on --batch or the number of processes.
"""

# ---- 1. Config ---------------------------------------------------------------------
import copy
import dataclasses  # + sample
import io
import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal  # + sample

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image  # + sample
from sklearn.datasets import load_digits
from torch import nn
from torchvision import utils  # + sample
from torchvision.transforms import functional as pil  # + sample
from torchvision.utils import save_image
from tqdm.auto import tqdm

SCRIPT = Path(__file__).stem
warnings.filterwarnings("ignore", message=".*not writable")  # mapped images are not


@dataclass(frozen=True)
class Config:
    """The options of a run; these values suit the digits."""

    data: str = "digits"  # digits (nothing to download), or a folder made by prepare.py
    n_feat: int = 16  # width of the network in channels, a multiple of 8
    T: int = 1000  # number of noise levels
    epochs: int = 180  # passes over the training images
    steps: int = 0  # optimizer steps; if not 0, they count instead of the epochs
    batch: int = 128  # images per step, over all processes together
    lr: float = 1e-2  # peak learning rate of Adam; it falls linearly to 0
    warmup: int = 50  # steps over which the learning rate rises from 0
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    ema_decay: float = 0.995  # decay per step of the averaged weights (0: no average)
    flip: bool = False  # mirror the images of every other step: for faces, not digits
    seed: int = 0  # of weights, order, noise and samples
    every: int = 30  # epochs between rows of metrics, sample grids and checkpoints
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda, mps ...
    bf16: bool = False  # bfloat16 autocast, for hardware that is fast at it
    compile: bool = False  # torch.compile the network: a slow start, then faster
    out: str = ""  # folder to write (empty: runs/SCRIPT-DATA)
    resume: bool = False  # go on with the run in that folder, or begin it
    wandb: bool = False  # log to Weights & Biases as well
    quiet: bool = False  # no progress bar and no messages
    sample: str = ""  # + sample
    """checkpoint of any script to draw from (empty: train, then draw)"""  # + sample
    n_samples: int = 64  # + sample
    """number of images: 000000.png, 000001.png ..., and a grid of them"""  # + sample
    sampler: Literal["ddpm", "ddim", "heun", "dpmpp"] = "ddim"  # + sample
    """the solver; dpmpp is DPM-Solver++(2M)"""  # + sample
    sampling_steps: int = 50  # + sample
    """calls of the network, T at most"""  # + sample
    eta: float = 0.0  # + sample
    """fresh noise of ddim, from 0 (none) to 1 (as in ddpm)"""  # + sample
    labels: tuple[int, ...] = ()  # + sample
    """labels to ask superguide.py's network for (empty: all in turn)"""  # + sample
    guidance: tuple[float, ...] = (1.0,)  # + sample
    """strengths for each label: 0 without it, 1 with it, above 1 more so"""  # + sample
    ema: bool = True  # + sample
    """averaged weights of the checkpoint rather than raw ones"""  # + sample

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = 1 if name in ("n_feat", "epochs", "batch", "every") else 0
            if isinstance(value, (int, float)) and not least <= value < 2**63:
                raise ValueError(f"--{name.replace('_', '-')} cannot be {value}")
        if self.n_feat % 8 or self.T < 25 or self.ema_decay >= 1:
            raise ValueError("--n-feat is 8, 16 ..., --T 25 or more, --ema-decay < 1")
        if self.eta > 1 or min(self.sampling_steps, self.n_samples) < 1:  # + sample
            raise ValueError("--eta is 0 to 1, the numbers above 0")  # + sample


# ---- 2. Data -----------------------------------------------------------------------
def rng(device, *key):
    """Return a generator seeded by integers >= 0, the same on every process."""
    seed = np.random.SeedSequence(key).generate_state(1).item()
    return torch.Generator(device).manual_seed(seed)


def load_images(cfg):
    """Return the images to train on and those held out, uint8 (N, C, S, S)."""
    if cfg.data == "digits":
        images = torch.tensor(load_digits().images * 255 / 16).round().byte()[:, None]
        order = torch.randperm(len(images), generator=rng("cpu", 0))
        return images[order[len(images) // 5 :]], images[order[: len(images) // 5]]
    files = [Path(cfg.data, part).expanduser() for part in ("train.npy", "held.npy")]
    return [torch.from_numpy(np.load(file, mmap_mode="r")) for file in files]


# ---- 3. UNet -----------------------------------------------------------------------
class Block(nn.Module):
    """Residual block: GroupNorm, SiLU, conv, twice; the time scales and shifts."""

    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, c_in), nn.GroupNorm(8, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.film = nn.Linear(c_time, 2 * c_out)

    def forward(self, x, temb):
        gamma, beta = self.film(temb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + gamma) + beta
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """Three downs, a bottleneck vector, three ups; the skips d1, d2, d3 pass it by."""

    def __init__(self, channels, n_feat):
        super().__init__()
        n, c_time = n_feat, 4 * n_feat
        self.time1, self.time2 = nn.Linear(2 * n, c_time), nn.Linear(c_time, c_time)
        self.init = nn.Conv2d(channels, n, 3, padding=1)
        self.down1 = Block(n, n, c_time)
        self.down2 = Block(n, 2 * n, c_time)
        self.down3 = Block(2 * n, 4 * n, c_time)
        self.to_vec = nn.Conv2d(4 * n, 2 * n, 1)
        self.vec_time = nn.Linear(c_time, 2 * n)
        self.up0 = nn.Conv2d(2 * n, 2 * n, 1)
        self.up1 = Block(2 * n + 4 * n, 2 * n, c_time)
        self.up2 = Block(2 * n + 2 * n, n, c_time)
        self.up3 = Block(n + n, n, c_time)
        self.norm, self.out = nn.GroupNorm(8, n), nn.Conv2d(n, channels, 3, padding=1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, xt, t):
        half = self.init.out_channels
        angle = t[:, None] * 10000 ** (-torch.arange(half, device=t.device) / half)
        temb = self.time1(torch.cat([angle.sin(), angle.cos()], dim=1))
        temb = F.silu(self.time2(F.silu(temb)))
        d1 = self.down1(self.init(xt), temb)  # (B, n, S, S)
        d2 = self.down2(F.avg_pool2d(d1, 2), temb)  # (B, 2n, S/2, S/2)
        d3 = self.down3(F.avg_pool2d(d2, 2), temb)  # (B, 4n, S/4, S/4)
        vec = self.to_vec(d3.mean((2, 3), keepdim=True))
        vec = F.silu(vec + self.vec_time(temb)[:, :, None, None])  # the bottleneck
        h = self.up0(vec).expand(-1, -1, *d3.shape[2:])
        h = self.up1(torch.cat([h, d3], dim=1), temb)
        h = self.up2(torch.cat([F.interpolate(h, scale_factor=2), d2], dim=1), temb)
        h = self.up3(torch.cat([F.interpolate(h, scale_factor=2), d1], dim=1), temb)
        return self.out(F.silu(self.norm(h)))


# ---- 4. Diffusion ------------------------------------------------------------------
class DDPM(nn.Module):
    """The noise schedule, loss and sampler. x0, xt, eps, z: (B, C, S, S); t, s: (B,).

    Buffers beta, alphabar (T+1,): index t is the paper's t, index 0 is clean data.
    """

    def __init__(self, net, T=1000):
        super().__init__()
        self.net, self.T = net, T
        place = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008
        abar = (place * torch.pi / 2).cos() ** 2  # Eq. 17 of Nichol and Dhariwal
        beta = F.pad((1 - abar[1:] / abar[:-1]).clamp(max=0.999), (1, 0))
        self.register_buffer("beta", beta.float())
        self.register_buffer("alphabar", (1 - beta).cumprod(0).float())

    def q_sample(self, x0, t, eps):
        """Return x_t ~ q(x_t | x_0), Eq. 4."""
        ab = self.alphabar[t, None, None, None]
        return ab.sqrt() * x0 + (1 - ab).sqrt() * eps

    def eps_hat(self, xt, t):
        """Return the predicted noise in xt."""
        out = self.net(xt, t)
        eps_hat = xt + out
        return eps_hat

    def forward(self, x0, t, eps):
        """Return the loss of Algorithm 1, Eq. 14, a scalar."""
        residual = self.eps_hat(self.q_sample(x0, t, eps), t) - eps
        error = residual.square().flatten(1).mean(1)  # (B,)
        return error.mean()

    def predict(self, xt, t):
        """Return x0_hat, Eq. 15, clipped to [-1, 1], and the eps_hat that agrees."""
        ab = self.alphabar[t, None, None, None]
        eps_hat = self.eps_hat(xt, t)
        x0_hat = ((xt - (1 - ab).sqrt() * eps_hat) / ab.sqrt()).clamp(-1, 1)
        return x0_hat, (xt - ab.sqrt() * x0_hat) / (1 - ab).sqrt()

    def p_sample(self, xt, t, s, eta, z):
        """Return x_s from x_t, s < t, Eq. 12 of DDIM (Song et al., arXiv:2010.02502).

        eta 1, s = t - 1 is Algorithm 2, its sigma^2 = beta-tilde:
        x_{t-1} = (x_t - beta_t / sqrt(1 - abar_t) eps_hat) / sqrt(alpha_t) + sigma z
        """
        ab, ab_s = (self.alphabar[k, None, None, None] for k in (t, s))
        x0_hat, eps_hat = self.predict(xt, t)
        sigma = eta * ((1 - ab_s) / (1 - ab) * (1 - ab / ab_s)).sqrt()
        rest = (1 - ab_s - sigma**2).clamp(min=0).sqrt()
        return ab_s.sqrt() * x0_hat + rest * eps_hat + sigma * z

    @torch.no_grad()
    def sample(self, shape, steps=50, eta=0.0, generator=None, xt=None):
        """Return images in [-1, 1] from the noise xt (None: drawn); steps is 1 to T."""
        times = torch.linspace(self.T, 0, steps + 1).round().long().to(self.beta.device)
        if xt is None:
            xt = torch.randn(shape, generator=generator, device=times.device)
        for t, s in zip(times[:-1], times[1:], strict=True):
            z = torch.randn(xt.shape, generator=generator, device=times.device)
            xt = self.p_sample(xt, t.expand(len(xt)), s.expand(len(xt)), eta, z)
        return xt.clamp(-1, 1)


# ---- Idea: sample ------------------------------------------------------------------
def open_model(path, ema):
    """Return the script (a module) that wrote a checkpoint, and its model."""
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
        if not Path(__file__).with_name(f"{name}.py").is_file():
            raise ValueError(f"{name}.py is not beside this script")
        script = sys.modules[__name__] if name == SCRIPT else import_module(name)
    except Exception as error:  # torch.load raises nearly anything on a foreign file
        raise ValueError(f"cannot use the checkpoint {path}: {error}") from None
    return script, script.load(path, ema)


def solve(ddpm, xt, sampler, steps, eta=0.0, noise=None):
    """Return images (B, C, S, S) from the noise xt, with so many calls of the network.

    noise(k): the fresh noise of step k, which ddpm wants, and ddim if eta > 0.
    """
    eta, older = 1.0 if sampler == "ddpm" else eta, None
    n, first = steps, ddpm.T
    if sampler == "heun":  # its first steps call twice; it cannot start at sigma 20,000
        n, first = steps // 2 + 1, int((ddpm.alphabar > 4e-5).sum()) - 1  # sigma < 160
    times = torch.linspace(first, 0, n + 1).round().long().to(xt.device)
    for k, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        ab, ab_s, last = ddpm.alphabar[t], ddpm.alphabar[s], k + 1 == n
        t, s = t.expand(len(xt)), s.expand(len(xt))
        if sampler in ("ddpm", "ddim"):
            xt = ddpm.p_sample(xt, t, s, eta, noise(k) if eta else 0.0)
            continue
        x0_hat, eps_hat = ddpm.predict(xt, t)
        middle = x0_hat
        if sampler == "dpmpp":  # a line over log-SNR through the last two x0_hat
            lam, lam_s = ab.logit() / 2, ab_s.logit() / 2
            if older and not last:
                slope = (x0_hat - older[0]) / (lam - older[1])
                middle = x0_hat + slope * (lam_s - lam) / 2
            older = x0_hat, lam
        ratio = ((1 - ab_s) / (1 - ab)).sqrt()  # with middle = x0_hat this is ddim
        xs = ratio * xt + (ab_s.sqrt() - ratio * ab.sqrt()) * middle
        if sampler == "heun" and k < steps - n:  # the mean of the slopes at both ends
            width = ((1 - ab_s) / ab_s).sqrt() - ((1 - ab) / ab).sqrt()
            xs = xs + ab_s.sqrt() * width * (ddpm.predict(xs, s)[1] - eps_hat) / 2
        xt = xs
    return xt.clamp(-1, 1)


def asked(cfg, script, model, i):
    """Return label (None: no labels), strength and number of the noise of image i.

    Strengths change fastest, so that those of one label and noise stand in a row.
    """
    if getattr(model.net, "classes", None) is None:
        if cfg.labels:
            raise ValueError(f"{cfg.sample} knows no labels")
        return None, 1.0, i
    labels = cfg.labels or range(script.CLASSES)
    if not set(labels) <= set(range(script.CLASSES)):
        raise ValueError(f"--labels are 0 to {script.CLASSES - 1}")
    z, k = divmod(i, len(cfg.guidance))
    return labels[z % len(labels)], cfg.guidance[k], z


def refuse_idle_options(cfg):
    """Raise ValueError for options that a checkpoint leaves without effect."""
    names = "data n_feat T epochs steps lr warmup grad_clip ema_decay flip every wandb"
    idle = [x for x in names.split() if getattr(cfg, x) != getattr(Config(), x)]
    if idle:
        raise ValueError(f"beside --sample there is no use for {', '.join(idle)}")


def write_grid(out, rows, strengths):
    """Write grid.png, of clips also grid.webp, and labels.csv if there are labels."""
    files = [out / f"{i:06}.png" for i in range(min(len(rows), 400))]
    images = torch.stack([pil.pil_to_tensor(Image.open(file)) for file in files]) / 255
    images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-2]))
    nrow = strengths if strengths > 1 else round(len(files) ** 0.5)
    save_image(images, out / "grid.png", nrow=nrow, pad_value=1)
    frames = images.split(images.shape[2], 3)
    frames = [utils.make_grid(x, nrow, pad_value=1) for x in frames]
    if len(frames) > 1:
        first, *others = map(pil.to_pil_image, frames)
        first.save(out / "grid.webp", append_images=others, save_all=True, loop=0)
    if rows[0][0] is not None:
        lines = [f"{i:06}.png,{y},{w:g}\n" for i, (y, w, _) in enumerate(rows)]
        (out / "labels.csv").write_text("file,label,strength\n" + "".join(lines))


def draw(cfg):
    """Write --n-samples images of the checkpoint --sample, as PNG files and a grid."""
    device, rank, world = join_processes(cfg)
    sync = dist.barrier if world > 1 else lambda: None
    sync()  # after training, process 0 may still be writing the checkpoint
    path = Path(cfg.sample).expanduser()
    script, model = open_model(path, cfg.ema)
    out = Path(cfg.out).expanduser() if cfg.out else path.parent / "samples"
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out")
    if cfg.sampling_steps > model.T:
        raise ValueError(f"--sampling-steps is at most {model.T}")
    rows = [asked(cfg, script, model, i) for i in range(cfg.n_samples)]
    sync()  # all have looked at the folder; now it may be made
    out.mkdir(parents=True, exist_ok=True)
    model, mine = model.to(device), range(rank, cfg.n_samples, world)
    quiet, channels = cfg.quiet or rank > 0, getattr(model, "channels", None)
    for start in tqdm(range(0, len(mine), cfg.batch), str(out), disable=quiet):
        ids = mine[start : start + cfg.batch]
        y, w, zs = zip(*(rows[i] for i in ids), strict=True)

        def noise(k, zs=zs):
            draws = (rng("cpu", cfg.seed, z, k + 1, 4) for z in zs)
            z = torch.stack([torch.randn(model.shape, generator=g) for g in draws])
            if channels:  # frames of a clip share some of their noise
                z = script.correlate(z, channels, model.correlation)
            return z.to(device)

        if y[0] is not None:
            script.condition(model, torch.tensor(y), torch.tensor(w))
        with torch.no_grad():
            x0 = noise(-1)
            x0 = solve(model, x0, cfg.sampler, cfg.sampling_steps, cfg.eta, noise)
        if channels:  # frame beside frame
            x0 = x0.unflatten(1, (-1, channels)).permute(0, 2, 3, 1, 4).flatten(3)
        for i, image in zip(ids, ((x0 + 1) * 127.5).round().byte().cpu(), strict=True):
            pil.to_pil_image(image).save(out / f"{i:06}.png")
    sync()
    if rank == 0:
        write_grid(out, rows, len(cfg.guidance))


# ---- 5. Training -------------------------------------------------------------------
def join_processes(cfg):
    """Return device, rank and number of processes; join torchrun's group, if any."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, kind = int(os.environ.get("LOCAL_RANK", 0)), cfg.device
    gpu = torch.accelerator.current_accelerator(check_available=True)
    kind = kind if kind != "auto" else gpu.type if gpu else "cpu"
    if rank >= world or kind != "cpu" and local >= torch.accelerator.device_count():
        raise ValueError(f"process {rank} of {world} finds no {kind} of its own")
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, local)
    if world > 1 and not dist.is_initialized():
        store = next(dist.rendezvous("env://"))[0]
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store over a restart, with the addresses of the dead
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return device, rank, world


def build(cfg, shape):
    """Return a new DDPM, as cfg asks for it, for images of shape (C, S, S)."""
    ddpm = DDPM(UNet(shape[0], cfg.n_feat), cfg.T)
    ddpm.shape = tuple(shape)
    return ddpm


def read_checkpoint(path):
    """Return the dict in a checkpoint of this script, its config as a Config."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != SCRIPT:
            raise ValueError(f"it is of {state['script']}.py")
        return {**state, "config": Config(**state["config"])}
    except Exception as error:  # torch.load raises nearly anything on a foreign file
        raise ValueError(f"{path} is no checkpoint of {SCRIPT}.py: {error}") from None


def load(path, ema=True):
    """Return the DDPM of a checkpoint, ready to sample; ema: its averaged weights."""
    state = read_checkpoint(path)
    ddpm = build(state["config"], state["shape"])
    ddpm.load_state_dict(state["ema" if ema else "net"])
    return ddpm.eval()


def find_run(cfg):
    """Return the run folder, and the state to go on from; a new run is at step 0."""
    out = Path(cfg.out or f"runs/{SCRIPT}-{Path(cfg.data).name}").expanduser()
    if not (out / "last.pt").exists():
        return out, {"step": 0, "history": []}
    if not cfg.resume:
        raise ValueError(f"{out} holds a run: add --resume, or another --out")
    state = read_checkpoint(out / "last.pt")
    free = "epochs steps every device bf16 compile out resume wandb quiet".split()
    old, new = asdict(state["config"]), asdict(cfg)
    if changed := [x for x in old if old[x] != new[x] and x not in free]:
        raise ValueError(f"the run in {out} has another {', '.join(changed)}")
    return out, state


@torch.no_grad()
def held_out_loss(ddpm, held):
    """Return {column: loss} at ten fixed t with fixed noise, and their mean."""
    row = {}
    for level in [round((k + 0.5) * ddpm.T / 10) for k in range(10)]:
        t = torch.full((len(held),), level, device=held.device)
        eps = torch.randn(held.shape, generator=rng("cpu", level)).to(held.device)
        row[f"held_t{level}"] = ddpm(held, t, eps).item()
    return {"held_loss": sum(row.values()) / len(row), **row}


def save_grid(ema, ddpm, held, cfg, path):
    """Write a PNG: two rows of averaged weights, one of raw ones, one of real ones."""
    xt = torch.randn(32, *ddpm.shape, generator=rng("cpu", cfg.seed, 3)).to(held)
    rows = [ema.sample(xt.shape, xt=xt), ddpm.sample(xt[:16].shape, xt=xt[:16])]
    images = torch.cat([*rows, held[:16]])
    images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-1]))
    save_image((images + 1) / 2, path, nrow=16, pad_value=1)


def save_run(out, epoch, state):
    """Write metrics.csv and the checkpoint; a kill or full disk spares the last one."""
    rows = [list(state["history"][0]), *(row.values() for row in state["history"])]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (out / "metrics.csv").write_text(table)
    torch.save(state, buffer := io.BytesIO())
    for name in (f"checkpoint_epoch_{epoch:03}.pt", "last.pt"):
        (out / "part").write_bytes(buffer.getbuffer())
        (out / "part").replace(out / name)


def train(cfg):
    """Train as cfg says, write the run folder, return the averaged DDPM."""
    device, rank, world = join_processes(cfg)
    images, held = load_images(cfg)
    if cfg.batch % world or cfg.batch > len(images):
        raise ValueError(f"--batch: at most {len(images)}, divisible by {world} ranks")
    images = images.to(device) if images.nbytes < 2**32 else images
    held = held.to(device) / 127.5 - 1
    torch.manual_seed(cfg.seed)
    ddpm = build(cfg, images.shape[1:]).to(device)
    ema = copy.deepcopy(ddpm).eval()
    weights, averages = ([w.detach() for w in m.parameters()] for m in (ddpm, ema))
    opt = torch.optim.Adam(ddpm.parameters(), betas=(0.9, 0.99), fused=True)
    out, state = find_run(cfg)
    start, history, seen = state["step"], state["history"], []
    if start:
        for part, name in ((ddpm, "net"), (ema, "ema"), (opt, "opt")):
            part.load_state_dict(state[name])
    if cfg.compile:
        ddpm.net.compile()
    model = nn.parallel.DistributedDataParallel(ddpm) if world > 1 else ddpm
    if cfg.wandb and rank == 0:
        log = import_module("wandb").init(project=SCRIPT, config=asdict(cfg)).log
    out.mkdir(parents=True, exist_ok=True)
    per_epoch = len(images) // cfg.batch
    total = cfg.steps or cfg.epochs * per_epoch
    mine = slice(rank * cfg.batch // world, (rank + 1) * cfg.batch // world)
    quiet = cfg.quiet or rank > 0
    bar = tqdm(range(start, total), str(out), total, initial=start, disable=quiet)
    for step in bar:
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            g = rng("cpu", cfg.seed, epoch, 1)
            order = torch.randperm(len(images), generator=g).to(images.device)
        index = order[i * cfg.batch : (i + 1) * cfg.batch][mine]
        x0 = images[index].to(device) / 127.5 - 1
        x0 = x0.flip(-1) if cfg.flip and step % 2 else x0
        g = rng(device, cfg.seed, step, 2)  # all processes draw for the whole batch
        t = torch.randint(1, cfg.T + 1, (cfg.batch,), generator=g, device=device)
        eps = torch.randn(cfg.batch, *ddpm.shape, generator=g, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            loss = model(x0, t[mine], eps[mine])
        seen.append(loss.detach())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(ddpm.parameters(), cfg.grad_clip or torch.inf)
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1)) * (1 - step / total)
        opt.param_groups[0]["lr"] = lr
        opt.step()
        decay = min(cfg.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, weights, 1 - decay)

        show = step + 1 == total or i + 1 == per_epoch and (epoch + 1) % cfg.every == 0
        if show:
            mean = torch.stack(seen).mean() / world
            if world > 1:
                dist.all_reduce(mean)
            seen.clear()
            if not mean.isfinite():
                raise ValueError(f"the loss is {mean} in epoch {epoch + 1}")
        if rank == 0 and show:
            row = {"step": step + 1, "epoch": epoch + 1, "lr": lr, "loss": mean.item()}
            row |= held_out_loss(ema, held)
            history.append(row)
            save_grid(ema, ddpm, held, cfg, out / f"samples_epoch_{epoch + 1:03}.png")
            bar.set_postfix(loss=row["loss"], held_loss=row["held_loss"])
            if cfg.wandb:
                log(row)
            state = {"script": SCRIPT, "config": asdict(cfg), "shape": ddpm.shape}
            state |= {"net": ddpm.state_dict(), "ema": ema.state_dict()}
            state |= {"opt": opt.state_dict(), "step": step + 1, "history": history}
            save_run(out, epoch + 1, state)
    return ema


# ---- 6. Main -----------------------------------------------------------------------
def main():
    try:
        cfg = tyro.cli(Config, description=__doc__)
        if cfg.data != "digits":
            recipe = Path(cfg.data, "recipe.json").expanduser()
            if not recipe.exists():
                raise ValueError(f"no {recipe}: `python prepare.py celeba` makes one")
            recipe = {**json.loads(recipe.read_text()), "data": cfg.data}
            cfg = tyro.cli(Config, default=Config(**recipe))
        if cfg.sample:  # + sample
            refuse_idle_options(cfg)  # + sample
            return draw(cfg)  # + sample
        train(cfg)
        own = find_run(dataclasses.replace(cfg, resume=True))[0] / "last.pt"  # + sample
        draw(dataclasses.replace(cfg, sample=str(own), out=""))  # + sample
    except (ValueError, OSError, ImportError) as error:
        if int(os.environ.get("RANK", 0)) % int(os.environ.get("WORLD_SIZE", 1)) == 0:
            print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
