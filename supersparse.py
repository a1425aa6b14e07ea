"""Sparsity by stages: few bottleneck channels learn at first, others are born later.

This is supercurriculum.py plus lines marked `# + sparse` and one Idea section. The
curriculum decides what is learned when, the mask decides who learns it: at first a
fifth of the 2 n-feat bottleneck channels is on, and each stage switches on some more
(`grow`), so that what is learned late finds channels that have not learned anything.

    python supersparse.py                            8x8 digits in about a minute
    torchrun --standalone --nproc_per_node=2 supersparse.py --out runs/two
    python supersparse.py --regrow random --out runs/random      control: random births
    python supersparse.py --order none --out runs/none           control: t in no order
    python supersparse.py --sparsity 0 0 0 0 0 --out runs/off    off: supercurriculum.py

Mind:
 1. The mask stands right before the next weights, after the time embedding. So a
    masked channel does not reach the loss, the gradient of its weights, in and out, is
    exactly 0, and under Adam (no weight decay) they stay as they were initialized.
 2. A newborn channel's moments are 0, but Adam's bias correction is that of an old run:
    its steps are up to 2.1 times a fresh Adam's (steady gradient), 1.3 times after 100.
 3. The skips d1, d2 and d3 lead past the bottleneck: the mask governs a small part.
 4. The channels to be born have the largest |dLoss/dgate|, summed over 20 batches. That
    is a slope at 0 without its sign: it does not say what a channel could learn.

From minDiffusion's curriculum and sparsity fork; growth by gradient is from RigL (Evci
et al. 2020, arXiv:1911.11134). On the digits it adds nothing: see RESULTS.md.
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
    sparsity: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2, 0.0)  # + sparse
    """share of the bottleneck channels that is off in each stage"""  # + sparse
    regrow: Literal["gradient", "random"] = "gradient"  # + sparse
    """which channels are born: the largest |dLoss/dgate|, or random ones"""  # + sparse

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
        off = self.sparsity  # + sparse
        pairs = zip((1, *off), (*off, 0), strict=True)  # + sparse
        falls = all(before >= after for before, after in pairs)  # + sparse
        if len(off) != len(e) or not falls or off[0] == 1:  # + sparse
            raise ValueError("--sparsity: one a stage, < 1, never rising")  # + sparse


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
        self.register_buffer("channel_mask", torch.zeros(2 * n))  # + sparse
        birth = torch.full((2 * n,), -1)  # -1: not born yet  # + sparse
        self.register_buffer("channel_birth_stage", birth)  # + sparse
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
        vec = vec * self.channel_mask[:, None, None]  # + sparse
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


# ---- Idea: sparse ------------------------------------------------------------------
def gate_scores(ddpm, cfg, images, p, step, mine, batches=20):
    """Return |dLoss/dgate| of each channel, (C,), summed over batches drawn for it."""
    device, gate, score = ddpm.beta.device, ddpm.net.channel_mask, 0
    gate.requires_grad_()
    for k in range(batches):
        g = rng(device, cfg.seed, step, k, 8)
        index = torch.randint(len(images), (cfg.batch,), generator=g, device=device)
        t = torch.randint(1, cfg.T + 1, (cfg.batch,), generator=g, device=device)
        t = draw_t(cfg, t, p, step, k)
        eps = torch.randn(cfg.batch, *ddpm.shape, generator=g, device=device)
        x0 = images[index[mine].to(images.device)].to(device) / 127.5 - 1
        loss = ddpm.forward(x0, t[mine], eps[mine])  # eager
        (slope,) = torch.autograd.grad(loss * len(x0) / cfg.batch, gate)
        if dist.is_initialized():
            dist.all_reduce(slope)  # DDP does this for weights only
        score = score + slope.abs()
    gate.requires_grad_(False)
    return score


def grow(ddpm, ema, cfg, images, p, stage, step, mine):
    """Switch on, in ddpm and ema, the channels that are due as a stage begins."""
    mask, birth = ddpm.net.channel_mask, ddpm.net.channel_birth_stage
    due = round((1 - cfg.sparsity[stage]) * len(mask)) - int(mask.sum())
    if due <= 0:
        return
    if stage == 0 or cfg.regrow == "random":
        score = torch.rand(len(mask), generator=rng("cpu", cfg.seed, stage, 9))
    else:
        score = gate_scores(ddpm, cfg, images, p, step, mine)
    born = score.to(mask.device).masked_fill(mask > 0, -1).topk(due).indices
    mask[born], birth[born] = 1, stage
    for own, average in zip(ddpm.net.buffers(), ema.net.buffers(), strict=True):
        average.copy_(own)


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
        if step in starts:  # + sparse
            mine = slice(rank, None, world)  # + sparse
            grow(ddpm, ema, cfg, images, density[stage], stage, step, mine)  # + sparse
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
        loss.backward()
        nn.utils.clip_grad_norm_(ddpm.parameters(), cfg.grad_clip or torch.inf)
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1)) * (1 - step / total)
        opt.param_groups[0]["lr"] = lr
        opt.step()
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
            row["active_channels"] = int(ddpm.net.channel_mask.sum())  # + sparse
            history.append(row)
            save_grid(ema, ddpm, held, cfg, out / f"samples_epoch_{epoch + 1:03}.png")
            bar.set_postfix(loss=row["loss"], held_loss=row["held_loss"])
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
