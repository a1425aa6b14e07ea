"""Group L1 by stages: every filter pays for its norm, at first much, at last nothing.

This is supercurriculum.py plus lines marked `# + reg` and one Idea section: the soft
sister of supersparse.py. The loss is MSE + lambda(stage) Omega(W), where Omega is the
sum of the L2 norms of all filters, the output channels of all convolutions. (In Yuan
and Lin's group lasso, 2006, times the root of their size.) Lambda falls from 5e-5 to 0.

    python superreg.py                                8x8 digits in about a minute
    torchrun --standalone --nproc_per_node=2 superreg.py --out runs/two
    python superreg.py --reg prox --out runs/prox     exact zeros
    python superreg.py --lambda-max 0 --out runs/off  off: supercurriculum.py

Mind:
 1. `--reg penalty` adds Omega to the loss. Adam follows a subgradient and oscillates
    about 0: no filter ever becomes exactly 0, so this is sparsity in name only.
 2. `--reg prox` takes Adam's step for the MSE alone, then the proximal operator of
    eta lambda Omega: w (1 - eta lambda / |w|)_+, which gives zeros. Adam has a step
    size for each weight; here a filter of n weights has one, eta = lr / sqrt(mean v_hat
    + lambda^2 / n), where lambda^2 / n is the mean square of the penalty's gradient.
    Without that term, filters without a gradient so far would be emptied at step 1.
    (Equal step sizes in a group: Yun, Lozano and Yang, NeurIPS 2021.)
 3. The first convolution of each block feeds a GroupNorm, which undoes a common shrink:
    there (30 % of the filters) Omega says little about function.
 4. Zeros are counted in the raw weights, and they all come back when lambda is 0.

From minDiffusion's curriculum and sparsity fork. It harms on digits: see RESULTS.md.
"""

# ---- 1. Config ---------------------------------------------------------------------
import copy
import io
import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from torch import nn
from torchvision.utils import save_image
from tqdm.auto import tqdm

SCRIPT = Path(__file__).stem
warnings.filterwarnings("ignore", message=".*not writable")  # maps are read-only


@dataclass(frozen=True)
class Config:
    """The options of a run; these values suit the digits."""

    data: str = "digits"  # digits (nothing to download), or a folder made by prepare.py
    n_feat: int = 16  # width of the network in channels, a multiple of 8
    T: int = 1000  # number of noise levels, 50 or more
    epochs: int = 180  # passes over the training images
    steps: int = 0  # optimizer steps; if not 0, they count instead of the epochs
    batch: int = 128  # images per step, over all processes together
    lr: float = 1e-2  # learning rate of Adam at first; it falls linearly to 0
    warmup: int = 50  # first steps, over which the learning rate grows from near 0
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    ema_decay: float = 0.995  # decay per step of the averaged weights (0: no average)
    flip: bool = False  # mirror the images of every other step: for faces, not digits
    seed: int = 0  # of all that is random; a GPU draws other numbers than a CPU
    every: int = 30  # epochs between rows of metrics, sample grids and checkpoints
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a GPU, if any
    bf16: bool = False  # bfloat16 autocast, for hardware that is fast at it
    compile: bool = False  # torch.compile the loss: a slow start, then faster
    out: str = ""  # folder to write (empty: runs/SCRIPT-DATA)
    resume: bool = False  # go on with the run in that folder, or begin it
    wandb: bool = False  # log to Weights & Biases as well
    quiet: bool = False  # no progress bar and no messages
    stages: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2, 0.0)  # + curriculum
    """lower edge of each stage; the upper edge is 1"""  # + curriculum
    epochs_per_stage: tuple[float, ...] = (5, 10, 15, 20, 30)  # + curriculum
    """lengths of the stages in proportion; together they fill a run"""  # + curriculum
    stage_axis: Literal["t", "logsnr"] = "t"  # + curriculum
    """what the edges divide: t / T, or log-SNR from 10 down to -10"""  # + curriculum
    order: Literal["forward", "reverse", "none"] = "forward"  # + curriculum
    """high noise first, low noise first, or the same t unordered"""  # + curriculum
    reg: Literal["penalty", "prox", "none"] = "penalty"  # + reg
    """group L1 as a term of the loss, or as a proximal step"""  # + reg
    lambda_max: float = 5e-5  # + reg
    """strength lambda of group L1 in the first stage"""  # + reg

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = 50 if name == "T" else name in "n_feat epochs batch every".split()
            odd = name == "n_feat" and value % 8 or name == "ema_decay" and value >= 1
            if odd or isinstance(value, (int, float)) and not least <= value < 2**63:
                raise ValueError(f"--{name.replace('_', '-')} cannot be {value}")
        e, n = self.stages, self.epochs_per_stage  # + curriculum
        fits = all(0 <= x <= 1 for x in e) and all(x > 0 for x in n)  # + curriculum
        if not 0 < sum(n) < 1e9 or len(e) != len(n) or not fits:  # + curriculum
            raise ValueError("--stages: 0 to 1, each with length > 0")  # + curriculum


# ---- 2. Data -----------------------------------------------------------------------
def rng(device, *key):
    """Return a generator seeded by integers >= 0; of several the last says for what."""
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
        scale, shift = self.film(temb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """UNet with sizes S, S/2, S/4 and a vector, which the skips d1, d2, d3 bypass."""

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
    """Noise schedule, loss and sampler. x0, xt, eps, z: (B, C, S, S); t, s: (B,)."""

    def __init__(self, net, T=1000):
        super().__init__()  # beta, alphabar: (T+1,), indexed by t; alphabar[0] = 1
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

        Without the clip, eta 1 with s = t - 1 is Algorithm 2, sigma^2 = beta-tilde.
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


# ---- Idea: curriculum --------------------------------------------------------------
def stage_density(cfg, alphabar):
    """Return the probability of each t = 1..T in each stage, (stages, T)."""
    edges, place = torch.tensor(cfg.stages)[:, None], torch.arange(1, cfg.T + 1) / cfg.T
    if cfg.stage_axis == "logsnr":  # beyond 10 and -10 there is no noise, or only noise
        place = 0.5 - alphabar[1:].cpu().logit().clamp(-10, 10) / 20
    place = 1 - place if cfg.order == "reverse" else place
    inside = place >= edges.clamp(max=place.max()) - 1e-6  # at least one t in a stage
    p = inside / inside.sum(1, keepdim=True)
    if cfg.order == "none":  # in every stage the average over the run
        p[:] = torch.Tensor(cfg.epochs_per_stage) @ p / sum(cfg.epochs_per_stage)
    return p


def draw_t(cfg, t, p, *key):
    """Return t (batch,) drawn from p (T,); the base's t where p is uniform."""
    if (p == p[0]).all():
        return t
    g = rng("cpu", cfg.seed, *key, 6)
    return 1 + p.multinomial(len(t), True, generator=g).to(t.device, non_blocking=True)


# ---- Idea: reg ---------------------------------------------------------------------
def lambda_of(cfg, stage):
    """Return lambda of a stage 0, 1 ...: half a cosine from --lambda-max to 0."""
    way = stage / max(1, len(cfg.stages) - 1)
    lam = cfg.lambda_max * (1 + np.cos(np.pi * way)) / 2
    return 0.0 if cfg.reg == "none" else float(lam)


def convolutions(net):
    """Return the weights (filters, ...) of all convolutions, by name."""
    layers = net.named_modules()  # mind: of a ConvTranspose2d the filters are axis 1
    return {name: x.weight for name, x in layers if isinstance(x, nn.Conv2d)}


def filter_norms(net):
    """Return the L2 norms of all filters as one vector; the gradient at 0 is 0."""
    weights = convolutions(net).values()
    return torch.cat([torch.linalg.vector_norm(w.flatten(1), dim=1) for w in weights])


def shrink(w, tau):
    """Return the block soft-threshold of filters w (filters, n) by tau (filters,)."""
    norm = torch.linalg.vector_norm(w, dim=1).clamp(min=1e-30)
    return w * (1 - tau / norm).clamp(min=0)[:, None]


@torch.no_grad()
def proximal_step(net, opt, lam, step):
    """Apply the proximal operator of lam Omega that belongs to Adam's last step."""
    group = opt.param_groups[0]
    bias_correction = 1 - group["betas"][1] ** (step + 1)
    for weight in convolutions(net).values():
        w, v = weight.flatten(1), opt.state[weight]["exp_avg_sq"].flatten(1)
        v = v.mean(1) / bias_correction + lam**2 / w.shape[1]
        eta = group["lr"] / (v.sqrt() + group["eps"])
        weight.copy_(shrink(w, eta * lam).view_as(weight))


# ---- 5. Training -------------------------------------------------------------------
def join_processes(cfg):
    """Return device, rank and number of processes; join torchrun's group, if any."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    rank, world, local, here = (int(os.environ.get(*name)) for name in names)
    gpu = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    kind = gpu if cfg.device == "auto" else cfg.device
    count = {gpu: torch.accelerator.device_count(), "cpu": world}.get(kind, 0)
    if rank >= world or here > count:
        raise ValueError(f"rank {rank} of {world}: {count} {kind} here (--device cpu?)")
    own = torch.device(kind, local) if kind != "cpu" else None
    if world > 1 and not dist.is_initialized():
        store = next(dist.rendezvous("env://"))[0]
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # its store outlives a restart
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        group = {"device_id": own} if own else {"backend": "gloo"}
        dist.init_process_group(store=store, rank=rank, world_size=world, **group)
    return own or torch.device("cpu"), rank, world


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
    z = torch.randn(32, *ddpm.shape, generator=rng("cpu", cfg.seed, 3)).to(held)
    rows = ema.sample(z.shape, xt=z), ddpm.sample(z[:16].shape, xt=z[:16]), held[:16]
    images = F.interpolate(torch.cat(rows), scale_factor=max(1, 64 // held.shape[-1]))
    save_image((images + 1) / 2, path, nrow=16, pad_value=1)


def save_run(out, epoch, state):
    """Write metrics.csv and a checkpoint; a kill in the middle leaves last.pt whole."""
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
    if images.ndim != 4:
        raise ValueError(f"{cfg.data} holds clips, not images")
    if cfg.batch % world or cfg.batch > len(images):
        raise ValueError(f"--batch: at most {len(images)}, divisible by {world} ranks")
    per_epoch = len(images) // cfg.batch
    total = cfg.steps or cfg.epochs * per_epoch
    images = images.to(device) if images.nbytes < 2**32 else images
    held = held.to(device) / 127.5 - 1
    torch.manual_seed(cfg.seed)
    ddpm = build(cfg, images.shape[1:]).to(device)
    ema = copy.deepcopy(ddpm).eval()
    weights, averages = ([w.detach() for w in m.parameters()] for m in (ddpm, ema))
    opt = torch.optim.Adam(ddpm.parameters(), betas=(0.9, 0.99), fused=True)
    out, state = find_run(cfg)
    start, history, seen = state["step"], state["history"], []
    if start and history[-1]["epoch"] != (start - 1) // per_epoch + 1:
        raise ValueError(f"the run in {out} has another number of images")
    for part, name in ((ddpm, "net"), (ema, "ema"), (opt, "opt")) if start else ():
        part.load_state_dict(state[name])
    if cfg.compile:
        ddpm.compile(mode="reduce-overhead")
    wrap = nn.parallel.DistributedDataParallel
    model = wrap(ddpm, gradient_as_bucket_view=True) if world > 1 else ddpm
    if cfg.wandb and rank == 0:
        from wandb import init  # optional

        log = init(project=SCRIPT, config=asdict(cfg)).log
    out.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum((0, *cfg.epochs_per_stage))  # + curriculum
    starts = [round(total * end / ends[-1]) for end in ends[:-1]]  # + curriculum
    starts = state.get("starts", starts)  # + curriculum
    density = stage_density(cfg, ddpm.alphabar)  # + curriculum
    quiet = cfg.quiet or rank > 0
    if start >= total and not quiet:
        print(f"nothing to do: {out} is at step {start} of {total}", file=sys.stderr)
    bar = tqdm(range(start, total), str(out), total, initial=start, disable=quiet)
    for step in bar:
        epoch, i = divmod(step, per_epoch)
        stage = sum(first <= step for first in starts) - 1  # + curriculum
        bar.desc = f"{out}, stage {stage}: "  # + curriculum
        if i == 0 or step == start:
            g = rng("cpu", cfg.seed, epoch, 1)
            order = torch.randperm(len(images), generator=g).to(images.device)
        index = order[i * cfg.batch : (i + 1) * cfg.batch][rank::world]
        x0 = images[index].to(device) / 127.5 - 1
        x0 = x0.flip(-1) if cfg.flip and step % 2 else x0
        g = rng(device, cfg.seed, step, 2)  # all processes draw for the whole batch
        t = torch.randint(1, cfg.T + 1, (cfg.batch,), generator=g, device=device)
        t = draw_t(cfg, t, density[stage], step)  # + curriculum
        eps = torch.randn(cfg.batch, *ddpm.shape, generator=g, device=device)
        opt.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            loss = model(x0, t[rank::world], eps[rank::world])
        seen.append(loss.detach().clone())
        lam = lambda_of(cfg, stage)  # + reg
        if lam and cfg.reg == "penalty":  # + reg
            loss = loss + lam * filter_norms(ddpm.net).sum()  # + reg
        loss.backward()
        nn.utils.clip_grad_norm_(ddpm.parameters(), cfg.grad_clip or torch.inf)
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1)) * (1 - step / total)
        opt.param_groups[0]["lr"] = lr
        opt.step()
        if lam and cfg.reg == "prox":  # + reg
            proximal_step(ddpm.net, opt, lam, step)  # + reg
        torch._foreach_lerp_(averages, weights, max(1 - cfg.ema_decay, 9 / (10 + step)))

        show = step + 1 == total or i + 1 == per_epoch and (epoch + 1) % cfg.every == 0
        show = show or step + 1 in starts  # + curriculum
        if show:
            mean, seen = torch.stack(seen).mean() / world, []
            if world > 1:
                dist.all_reduce(mean)
            if not mean.isfinite():
                raise ValueError(f"the loss is {mean} in epoch {epoch + 1}")
        if rank == 0 and show:
            row = {"step": step + 1, "epoch": epoch + 1, "lr": lr, "loss": mean.item()}
            row |= held_out_loss(ema, held)
            row["stage"] = stage  # + curriculum
            norms = filter_norms(ddpm.net).detach()  # + reg
            row |= {"lambda": lam, "reg": lam * norms.sum().item()}  # + reg
            row["total"] = row["loss"] + row["reg"]  # + reg
            row["zero_filters"] = int((norms == 0).sum())  # + reg
            row["small_filters"] = int((norms < 0.01).sum())  # + reg
            history.append(row)
            save_grid(ema, ddpm, held, cfg, out / f"samples_epoch_{epoch + 1:03}.png")
            bar.set_postfix(loss=row["loss"], held_loss=row["held_loss"])
            bar.set_postfix({x: row[x] for x in ("total", "loss", "reg")})  # + reg
            if cfg.wandb:
                log(row)
            state = {"script": SCRIPT, "config": asdict(cfg), "shape": ddpm.shape}
            state |= {"net": ddpm.state_dict(), "ema": ema.state_dict()}
            state |= {"opt": opt.state_dict(), "step": step + 1, "history": history}
            state["starts"] = starts  # a longer run keeps them  # + curriculum
            save_run(out, epoch + 1, state)
    return ema


# ---- 6. Main -----------------------------------------------------------------------
def main():
    try:
        cfg = tyro.cli(Config, description=__doc__)
        if cfg.data != "digits":
            recipe = Path(cfg.data, "recipe.json").expanduser()
            if not recipe.exists():
                raise ValueError(f"no {recipe}: run e.g. `python prepare.py celeba`")
            recipe = {**json.loads(recipe.read_text()), "data": cfg.data}
            cfg = tyro.cli(Config, default=Config(**recipe))
        train(cfg)
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
