"""Labels, and classifier-free guidance: ask for a class, and ask for it louder.

This is superminddpm.py plus lines that are marked `# + guide`; to read the idea, run
`diff superminddpm.py superguide.py`. The network hears the label of an image. For a
tenth of the images it is dropped: so one network learns both eps_c, which hears the
label, and eps_u, which does not. Sampling goes beyond the difference of the two (Ho and
Salimans 2022, arXiv:2207.12598), in the convention

    eps = eps_u + w (eps_c - eps_u)

    python superguide.py                            8x8 digits in about a minute
    torchrun --nproc_per_node=2 superguide.py       the same on two processes
    python superguide.py --sample runs/superguide-digits/last.pt --guidance 3
    python superguide.py --no-class-cond            off: the base's weights

classes_epoch_XXX.png has a row a class and, for each strength w of --guidance, the same
noises. With --sample, image i has label i mod 10: 64 images have 64 labels. Strengths
take turns of ten images; labels.csv says which image has which. Data without labels
(celeba, folder) want --no-class-cond.

Different from the paper, or to mind:
 1. w = 0 is the unconditional and w = 1 the conditional model, each one network call;
    any other w takes both. The paper counts from there: its w is ours less 1.
 2. Above 1, guidance trades variety for fit to the label. The result is no sample of a
    distribution that the network was trained on.
 3. The label is a vector that is added to the network's time vector; a dropped label
    adds nothing. Hence eps_u is the base's network, and --p-uncond 1 trains the base's
    weights.
 4. --p-uncond 0 never trains eps_u: then only w = 1 is a model of the data. (But a
    classifier may be content with other w all the same: notebook 08.)
 5. held_loss is eps_u's, held_loss_with_label is eps_c's on the same noise: what the
    label is worth. (loss mixes the two.) eps_u learns from a tenth of the images only.
 6. --init takes a checkpoint of superminddpm.py: labels for a network that knew none.

Measured after the default run: held-out loss 0.086 without and 0.072 with the label
(base 0.081); 48 s. By benchmarks/guidance.py, 1000 digits each, at w = 0, 1, 2 and 3:
a classifier sees the digit that was asked for in 8, 94, 99.7 and 99.9 %; the standard
deviation within a class, over that of real digits, is 1.24, 0.95, 0.81 and 0.76; the
Frechet distance over its floor is 1.7, 0.5, 1.4 and 3.0.
"""

# ---- 1. Config ---------------------------------------------------------------------
import copy
import csv
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from dotenv import load_dotenv
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
from torchvision.utils import save_image
from tqdm.auto import tqdm

# What each data set asks for; an option on the command line wins.
RECIPE = "image_size n_feat epochs batch lr ema_decay sample_every save_every".split()
RECIPES = {
    "digits": (8, 16, 75, 64, 1.2e-2, 0.995, 15, 25),
    "mnist": (28, 32, 20, 128, 2e-3, 0.999, 1, 5),
    "fashion": (28, 32, 20, 128, 2e-3, 0.999, 1, 5),
    "cifar10": (32, 64, 200, 128, 1e-3, 0.9995, 5, 20),
    "celeba": (32, 32, 80, 256, 1e-3, 0.9995, 1, 10),
    "folder": (32, 32, 100, 64, 1e-3, 0.999, 5, 20),
}


@dataclass(frozen=True)
class Config:
    """The options of a run; the recipe of the data set fills in what is None."""

    data: Literal[tuple(RECIPES)] = "digits"  # what to learn; all but digits need files
    data_dir: str = ""  # where they lie (empty: data; for celeba $CELEBA_PATH or .env)
    download: bool = False  # let torchvision fetch mnist, fashion or cifar10
    skip_bad_images: bool = False  # celeba, folder: leave out files that do not decode
    image_size: int = None  # pixels a side after centre crop and resize; 4 divides it
    n_train: int = 0  # use the first N training images (0: all)
    n_feat: int = None  # width in channels; 8 divides it; the bottleneck has 2 n-feat
    T: int = 1000  # noise steps; the betas scale by 1000/T
    epochs: int = None  # passes over the training images
    steps: int = 0  # optimizer steps, instead of epochs (0: epochs decide)
    batch: int = None  # images a step, over all processes together
    lr: float = None  # highest learning rate of AdamW
    lr_decay: bool = True  # let it fall to 0 towards the end, linearly
    warmup: int = 50  # steps over which it rises from 0
    grad_clip: float = 1.0  # largest norm of the gradient (0: off)
    ema_decay: float = None  # of the averaged weights, per step (0: no average)
    seed: int = 0  # of weights, order, noise and samples
    bf16: bool = True  # bf16 autocast where the GPU is fast at it (Ampere and later)
    compile: bool = False  # torch.compile the network: a slow start, then faster
    out: str = ""  # folder to write (empty: runs/SCRIPT-DATA, or the next free number)
    resume: str = ""  # checkpoint to go on from; auto: the last one, if there is one
    save_every: int = None  # epochs between checkpoints
    sample_every: int = None  # epochs between rows of metrics and sample grids
    init: str = ""  # checkpoint whose averaged weights to start from (fine-tuning)
    delete_keys: str = ""  # with --init: weights to leave out, by prefix, as in a,b
    log: Literal["none", "tensorboard", "wandb"] = "none"  # extra logging
    quiet: bool = False  # no progress bar and no messages
    sample: str = ""  # do not train, draw images from this checkpoint
    n_samples: int = 64  # with --sample: how many PNG files; the grid shows up to 400
    sampler: Literal["ddim", "ddpm"] = "ddim"  # with --sample; ddpm makes all T steps
    sampling_steps: int = 50  # with --sample: network calls of ddim
    eta: float = 0.0  # with --sample: fresh noise of ddim, 0 (none) to 1 (like ddpm)
    ema: bool = True  # with --sample: averaged weights rather than raw ones
    class_cond: bool = True  # + guide
    """learn the labels of the data; with --sample: ask for them"""  # + guide
    p_uncond: float = 0.1  # + guide
    """share of the images whose label is dropped in training"""  # + guide
    guidance: str = "0,1,3"  # + guide
    """strengths w of the pictures: 0 no label, 1 label, above 1 more"""  # + guide

    def __post_init__(self):
        for name, value in zip(RECIPE, RECIPES[self.data], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        counts = ("n_samples", "sampling_steps", *RECIPE)
        for name, value in asdict(self).items():
            least = 1 if name in counts and isinstance(value, int) else 0
            if isinstance(value, (int, float)) and not least <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} cannot be {value}")
        if self.image_size < 8 or self.image_size % 4 or self.n_feat % 8:
            raise ValueError("--image-size is 8, 12, 16 ..., --n-feat is 8, 16, 24 ...")
        if self.T < 25 or self.ema_decay >= 1 or self.eta > 1:
            raise ValueError("--T is 25 or more, --ema-decay below 1, --eta at most 1")
        if self.p_uncond > 1:  # + guide
            raise ValueError("--p-uncond is a share, 0 to 1")  # + guide
        strengths(self)  # + guide


# ---- 2. Data -----------------------------------------------------------------------
def rng(device, *key):
    """Return a generator seeded by integers >= 0, the same on every process."""
    seed = np.random.SeedSequence(key).generate_state(1).item()
    return torch.Generator(device).manual_seed(seed)


def hold_out(n):
    """Return which of n images to train on, and the fixed fifth that is held out."""
    order = torch.randperm(n, generator=rng("cpu", 0)).tolist()
    return order[n // 5 :], order[: n // 5]


def find_files(cfg):
    """Return the image files of celeba or folder to train on, and those to hold out."""
    root, wanted = cfg.data_dir or "data", "5 images or more, in any sub-folders"
    if cfg.data == "celeba":
        load_dotenv(".env")
        root = cfg.data_dir or os.environ.get("CELEBA_PATH", "data")
        wanted = "img_align_celeba/*.jpg of mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    tree = ((top, name) for top, _, names in os.walk(root) for name in names)
    files = [os.path.join(*at) for at in tree if at[1].lower().endswith(IMG_EXTENSIONS)]
    files.sort()
    if cfg.data == "celeba":  # the official parts go by number; the third is for tests
        train = [f for f in files if os.path.basename(f)[:6] <= "162770"]
        held = [f for f in files if "162770" < os.path.basename(f)[:6] <= "182637"]
    else:
        train, held = ([files[i] for i in part] for part in hold_out(len(files)))
    if not (train and held):
        raise FileNotFoundError(f"too few images in {root}; --data-dir wants {wanted}")
    return train[: cfg.n_train or None], held[:1024]


def decode(file, cfg):
    """Return the middle square of an image file, on white, as (S, S, 3) bytes."""
    try:
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
        side = 140 if cfg.data == "celeba" else min(image.size)  # 140: just the face
        if min(side, *image.size) < cfg.image_size:
            raise ValueError(f"{image.size} is too small for --image-size")
        size = (cfg.image_size, cfg.image_size)
        return center_crop(image, side).resize(size, Image.Resampling.LANCZOS).tobytes()
    except Exception as error:  # PIL raises nearly anything on a broken file
        if cfg.skip_bad_images:
            return b""
        how = "--skip-bad-images leaves such files out"
        raise ValueError(f"cannot use {file}: {error}; {how}") from None


def decode_all(files, cfg):
    """Return files as uint8 (N, S, S, 3), mapped from a cache (made if missing)."""
    about = [cfg.data, cfg.image_size, cfg.skip_bad_images]
    stats = zip(files, map(os.stat, files), strict=True)
    about += [(f, stat.st_size, stat.st_mtime_ns) for f, stat in stats]
    key = hashlib.sha1(repr(about).encode()).hexdigest()
    cache = Path("runs", "cache", f"{cfg.data}-{key}.bin")
    whole = len(files) * cfg.image_size**2 * 3
    fits = cache.exists() and (cfg.skip_bad_images or cache.stat().st_size == whole)
    if not fits:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}")
        try:
            with ThreadPool() as pool, open(part, "wb") as f:
                # in blocks: what waits to be written must not fill the memory
                blocks = (files[k : k + 1024] for k in range(0, len(files), 1024))
                one = partial(decode, cfg=cfg)
                pixels = (image for block in blocks for image in pool.imap(one, block))
                for image in tqdm(pixels, "decoding", len(files), disable=cfg.quiet):
                    f.write(image)
            part.replace(cache)
        finally:
            part.unlink(missing_ok=True)
    size = cache.stat().st_size
    if not size:
        raise ValueError(f"none of {len(files)} images is readable")
    # shared: Linux refuses a private mapping that is larger than the memory
    pixels = torch.from_file(str(cache), shared=True, size=size, dtype=torch.uint8)
    pixels = pixels.view(-1, cfg.image_size, cfg.image_size, 3)
    if len(pixels) < len(files):
        print(f"left out {len(files) - len(pixels)} of {len(files)} unreadable images")
    return pixels


def as_images(pixels, classes, n, size):
    """Return the first n (0: all) of pixels (N, H, H[, C]) as (n, C, size, size)."""
    x = torch.as_tensor(pixels[: n or None])
    x = x.reshape(*x.shape[:3], -1).permute(0, 3, 1, 2)
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x, None if classes is None else torch.as_tensor(classes)[: len(x)]


def load_images(cfg):
    """Return images, labels, held, held_labels of the data set cfg.data.

    images, held: uint8 (N, C, S, S). held is never trained on: the set's own test or
    validation part, or else a fixed fifth. labels: int64 (N,), or None without any.
    Raises FileNotFoundError or ValueError that says what to do.
    """
    if cfg.data == "digits":
        digits = load_digits()
        pixels = (digits.images * 255 / 16).round().astype(np.uint8)
        train, held = ((pixels[i], digits.target[i]) for i in hold_out(len(pixels)))
    elif cfg.data in ("celeba", "folder"):
        train, held = (decode_all(files, cfg) for files in find_files(cfg))
        if all((x == x[..., :1]).all() for x in (held, *train.split(4096))):  # grey
            train, held = train[..., :1], held[..., :1]
        train, held = (train, None), (held, None)
    else:
        names = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}
        name, root = names[cfg.data], cfg.data_dir or "data"
        try:
            both = [
                getattr(datasets, name)(root, train=part, download=cfg.download)
                for part in (True, False)
            ]
        except Exception:  # missing, broken and unreachable files raise different ones
            how = "--data-dir says where it lies, --download gets it"
            raise FileNotFoundError(f"no usable {name} in {root}: {how}") from None
        train, held = ((part.data, part.targets) for part in both)
    images, labels = as_images(*train, cfg.n_train, cfg.image_size)
    return images, labels, *as_images(*held, 1024, cfg.image_size)


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
    """Tell the noise in x_t: three downs, a bottleneck vector, three ups with skips.

    net(xt, t): xt (B, channels, S, S), where 4 divides S; t (B,) int64 in 1..T; returns
    eps_hat, like xt. n_feat: the width, a multiple of 8. Mind the skips d1, d2 and d3:
    what they carry does not pass the bottleneck.
    """

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
        self.norm = nn.GroupNorm(8, n)
        self.out = nn.Conv2d(n, channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.classes = None  # add_classes makes it  # + guide

    def forward(self, xt, t):
        y = None  # + guide
        if t.dim() == 2:  # (B, 2): beside each t its label  # + guide
            t, y = t.unbind(1)  # + guide
        half = self.time1.in_features // 2
        freq = 10000 ** (-torch.arange(half, device=t.device) / half)
        angle = t[:, None] * freq
        temb = F.silu(self.time1(torch.cat([angle.sin(), angle.cos()], dim=1)))
        if y is not None:  # + guide
            temb = temb + self.classes(y)  # + guide
        temb = F.silu(self.time2(temb))
        d1 = self.down1(self.init(xt), temb)  # (B, n, S, S)
        d2 = self.down2(F.avg_pool2d(d1, 2), temb)  # (B, 2n, S/2, S/2)
        d3 = self.down3(F.avg_pool2d(d2, 2), temb)  # (B, 4n, S/4, S/4)
        vec = self.to_vec(d3.mean((2, 3), keepdim=True))
        vec = F.silu(vec + self.vec_time(temb)[:, :, None, None])  # the bottleneck
        h = self.up0(vec).expand(-1, -1, *d3.shape[2:])
        h = self.up1(torch.cat([h, d3], dim=1), temb)
        h = F.interpolate(h, scale_factor=2)
        h = self.up2(torch.cat([h, d2], dim=1), temb)
        h = F.interpolate(h, scale_factor=2)
        h = self.up3(torch.cat([h, d1], dim=1), temb)
        eps_hat = self.out(F.silu(self.norm(h)))
        return eps_hat


# ---- 4. Diffusion ------------------------------------------------------------------
def at(table, t, x):
    """Return table[t] as (B, 1, ...), to be multiplied with x, which is (B, ...)."""
    return table[t].view(-1, *[1] * (x.dim() - 1))


class DDPM(nn.Module):
    """The noise schedule, the loss and the samplers around net(xt, t) -> eps_hat.

    Buffers beta, alpha, alphabar (T+1,): index t is the paper's t, and 0 is clean data.
    Below, x0, xt and eps are (B, C, S, S), and t and s (B,) int64.
    """

    def __init__(self, net, T=1000, bf16=False):
        super().__init__()
        self.net, self.T, self.bf16 = net, T, bf16
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        beta = F.pad(beta, (1, 0))
        self.register_buffer("beta", beta.float())
        self.register_buffer("alpha", (1 - beta).float())
        self.register_buffer("alphabar", (1 - beta).cumprod(0).float())
        self.y, self.w = None, None  # what is asked for; see condition  # + guide

    def q_sample(self, x0, t, eps):
        """Return x_t ~ q(x_t | x_0), Eq. 4."""
        ab = at(self.alphabar, t, x0)
        return ab.sqrt() * x0 + (1 - ab).sqrt() * eps

    def eps_hat(self, xt, t):
        """Return the network's guess of the noise in xt, float32."""
        fast = self.bf16 and xt.is_cuda
        with torch.autocast(xt.device.type, torch.bfloat16, enabled=fast):
            if self.y is not None:  # + guide
                return guided(self, xt, t)  # + guide
            eps_hat = self.net(xt, t)
        return eps_hat.float()

    def residual(self, x0, t, eps):
        """Return eps_hat(x_t, t) - eps, which training makes small."""
        xt = self.q_sample(x0, t, eps)
        return self.eps_hat(xt, t) - eps

    def forward(self, x0, t=None, eps=None):
        """Return the loss, Eq. 14, a scalar. None: t is uniform in 1..T, eps normal."""
        if t is None:
            t = torch.randint(1, self.T + 1, x0.shape[:1], device=x0.device)
        if eps is None:
            eps = torch.randn_like(x0)
        residual = self.residual(x0, t, eps)
        error = residual.square().flatten(1).mean(1)  # (B,)
        loss = error.mean()
        return loss

    def predict(self, xt, t):
        """Return x0_hat, Eq. 15, clipped to [-1, 1], and the eps_hat that fits it."""
        ab = at(self.alphabar, t, xt)
        eps_hat = self.eps_hat(xt, t)
        x0_hat = (xt - (1 - ab).sqrt() * eps_hat) / ab.sqrt()
        x0_hat = x0_hat.clamp(-1, 1)
        eps_hat = (xt - ab.sqrt() * x0_hat) / (1 - ab).sqrt()
        return x0_hat, eps_hat

    def p_sample(self, xt, t, generator=None):
        """Return x_{t-1} ~ p(x_{t-1} | x_t), Algorithm 2 with sigma^2 = beta."""
        beta = at(self.beta, t, xt)
        ab = at(self.alphabar, t, xt)
        _, eps_hat = self.predict(xt, t)
        mean = (xt - beta / (1 - ab).sqrt() * eps_hat) / (1 - beta).sqrt()
        z = torch.randn(xt.shape, generator=generator, device=xt.device)
        z[t == 1] = 0
        return mean + beta.sqrt() * z

    def ddim_step(self, xt, t, s, eta=0.0, generator=None):
        """Return x_s from x_t, s < t, Eq. 12 and 16 of DDIM; eta is 0 to 1."""
        ab = at(self.alphabar, t, xt)
        ab_s = at(self.alphabar, s, xt)
        x0_hat, eps_hat = self.predict(xt, t)
        sigma = eta * ((1 - ab_s) / (1 - ab) * (1 - ab / ab_s)).sqrt()
        z = torch.randn(xt.shape, generator=generator, device=xt.device)
        towards = (1 - ab_s - sigma**2).clamp(min=0).sqrt()
        return ab_s.sqrt() * x0_hat + towards * eps_hat + sigma * z

    @torch.no_grad()
    def sample(self, shape, steps=50, sampler="ddim", eta=0.0, generator=None, xt=None):
        """Return images (B, C, S, S) in [-1, 1], made from the noise xt (None: drawn).

        steps: network calls of ddim, T at most; ddpm makes T.
        """
        device = self.beta.device
        if xt is None:
            xt = torch.randn(shape, generator=generator, device=device)
        steps = self.T if sampler == "ddpm" else min(steps, self.T)
        times = torch.linspace(self.T, 0, steps + 1).round().long().to(device)
        for t, s in zip(times[:-1], times[1:], strict=True):
            t, s = t.expand(len(xt)), s.expand(len(xt))
            if sampler == "ddpm":
                xt = self.p_sample(xt, t, generator)
            else:
                xt = self.ddim_step(xt, t, s, eta, generator)
        return xt.clamp(-1, 1)


# ---- Idea: guide -------------------------------------------------------------------
CLASSES = 10  # of every data set here that has labels
LABELLED = "digits mnist fashion cifar10".split()
NO_LABEL = CLASSES  # stands for a dropped label


def strengths(cfg):
    """Return --guidance as numbers. ValueError: it is none."""
    try:
        found = [float(word) for word in cfg.guidance.split(",")]
        if all(map(math.isfinite, found)):
            return found
    except ValueError:
        pass
    raise ValueError(f"--guidance wants numbers like 0,1,3, not {cfg.guidance!r}")


def check_labels(cfg):
    """Raise ValueError where there are no labels to learn."""
    if cfg.class_cond and cfg.data not in LABELLED:
        raise ValueError(f"--data {cfg.data} has no labels: add --no-class-cond")


def add_classes(net):
    """Give the network a vector for each label; that of NO_LABEL is 0 and stays 0."""
    c_time = net.time1.out_features
    net.classes = nn.Embedding(CLASSES + 1, c_time, padding_idx=NO_LABEL)


def condition(ddpm, y=None, w=1.0):
    """Let eps_hat answer for the labels y (B,) with strength w, a number or (B,).

    y may be one label for all; None: no label, as in the base.
    """
    device = ddpm.beta.device
    ddpm.y = None if y is None else torch.as_tensor(y, device=device)
    ddpm.w = w.to(device) if torch.is_tensor(w) else float(w)


def guided(ddpm, xt, t):
    """Return eps = eps_u + w (eps_c - eps_u): eps_c hears the label, eps_u does not.

    Where w is 0 or 1 for all, the network is called once; else once for both.
    """
    y = ddpm.y.expand(len(xt))
    if isinstance(ddpm.w, float) and ddpm.w == 0:
        return ddpm.net(xt, t).float()
    if isinstance(ddpm.w, float) and ddpm.w == 1:
        return ddpm.net(xt, torch.stack([t, y], 1)).float()
    both = torch.cat([torch.full_like(y, NO_LABEL), y])
    told = ddpm.net(xt.repeat(2, 1, 1, 1), torch.stack([t.repeat(2), both], 1))
    eps_u, eps_c = told.float().chunk(2)
    w = torch.as_tensor(ddpm.w, device=xt.device).view(-1, 1, 1, 1)
    return torch.lerp(eps_u, eps_c, w)  # exact at w = 0 and at w = 1


def drop_labels(y, cfg, step):
    """Return the labels y (batch,) of the whole batch, some of them NO_LABEL."""
    g = rng("cpu", cfg.seed, step, 10)
    drop = torch.rand(len(y), generator=g) < cfg.p_uncond
    return torch.where(drop.to(y.device, non_blocking=True), NO_LABEL, y)


def label_and_strength(i, ws):
    """Return label, place of w in ws and noise of image i: labels go round first.

    Images that differ in w alone start from the same noise.
    """
    turn, y = divmod(i, CLASSES)
    turn, k = divmod(turn, len(ws))
    return y, k, turn * CLASSES + y


def table(n, ws):
    """Return the order of images 0..n-1 in a grid, and its columns.

    A row a class and a column a strength; with one strength a column a class.
    """
    if len(ws) == 1:
        return list(range(n)), CLASSES
    rounds = math.ceil(n / (CLASSES * len(ws)))
    cell = {label_and_strength(i, ws): i for i in range(n)}
    at = [
        cell.get((y, k, r * CLASSES + y))
        for y in range(CLASSES)
        for k in range(len(ws))
        for r in range(rounds)
    ]
    return at, len(ws) * rounds


def as_csv(n, ws):
    """Return the text of a table of images 0..n-1: file, label and w of each."""
    asked = [label_and_strength(i, ws) for i in range(n)]
    lines = [f"{i:06}.png,{y},{ws[k]:g}" for i, (y, k, _) in enumerate(asked)]
    return "\n".join(["file,label,w", *lines, ""])


@torch.no_grad()
def loss_with_label(ddpm, held, labels):
    """Return the mean of held_out_loss, noise and all, but each image has its label."""
    device, total = ddpm.beta.device, 0
    for level in [round((k + 0.5) * ddpm.T / 10) for k in range(10)]:
        g = rng("cpu", level)
        for x0, y in zip(held.split(256), labels.split(256), strict=True):
            t = torch.full((len(x0),), level, device=device)
            eps = torch.randn(x0.shape, generator=g).to(device)
            condition(ddpm, y)
            residual = ddpm.residual(x0.to(device) / 127.5 - 1, t, eps)
            total += residual.square().sum()
    condition(ddpm)
    return float(total) / held.numel() / 10


@torch.no_grad()
def class_grid(ddpm, ws, seed, path, each=2):
    """Write a PNG with a row a class and, for each of ws, the same each noises."""
    n = CLASSES * len(ws) * each
    asked = [label_and_strength(i, ws) for i in range(n)]
    noise = [rng("cpu", seed, z, 4) for *_, z in asked]
    condition(ddpm, [y for y, *_ in asked], torch.tensor([ws[k] for _, k, _ in asked]))
    xt = torch.stack([torch.randn(ddpm.shape, generator=g) for g in noise])
    xt = xt.to(ddpm.beta.device)
    images = ddpm.sample(xt.shape, xt=xt)
    condition(ddpm)
    cells, columns = table(n, ws)
    save_grid(images[cells], path, columns)


# ---- 5. Training -------------------------------------------------------------------
SCRIPT = Path(__file__).stem
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torchrun counts here under --max-restarts
STATE = "script config shape step net ema opt losses history".split()  # to go on


def join_processes():
    """Return device, rank and number of processes; join torchrun's group, if any."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"more processes than the {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        wait = timedelta(hours=2)  # others wait while one decodes a large data set
        store = next(dist.rendezvous("env://"))[0]
        store.set_timeout(wait)
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps its store over a restart, with the addresses of the dead
            store = dist.PrefixStore(os.environ.get(RESTARTS, "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        group = {"rank": rank, "world_size": world, "store": store, "timeout": wait}
        dist.init_process_group(backend, **group)
    return device, rank, world


def barrier():
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def build(cfg, shape):
    """Return a new DDPM, as cfg asks for it, for images of shape (C, S, S)."""
    fast = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    net = UNet(shape[0], cfg.n_feat)
    if cfg.class_cond:  # + guide
        add_classes(net)  # + guide
    ddpm = DDPM(net, cfg.T, bf16=cfg.bf16 and fast)
    ddpm.shape = tuple(shape)
    return ddpm


def save_checkpoint(path, state):
    """Write state to path; a kill or a full disk (OSError) spares the older file."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from None


def read_checkpoint(path, script=SCRIPT):
    """Return the dict in a checkpoint, its config as a Config.

    Raises ValueError if it is broken, or was not written by script (empty: by any).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = {field.name for field in fields(Config)} & state["config"].keys()
        config = Config(**{name: state["config"][name] for name in known})
        state = {**{key: state[key] for key in STATE}, "config": config}
    except Exception as error:  # torch.load raises nearly anything on a foreign file
        why = type(error).__name__
        raise ValueError(f"{path} is no checkpoint, or cut short ({why})") from None
    if script and state["script"] != script:
        raise ValueError(f"{path} was written by {state['script']}.py, not {script}.py")
    return state


def restore(ddpm, weights, path):
    """Load weights, read from path, into ddpm. ValueError: they are another model's."""
    try:
        ddpm.load_state_dict(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} is from another model: {why}") from None


def load(path, ema=True):
    """Return the DDPM of a checkpoint, ready to sample; ema: its averaged weights."""
    state = read_checkpoint(path)
    ddpm = build(state["config"], state["shape"])
    restore(ddpm, state["ema" if ema else "net"], path)
    return ddpm.eval()


def start_from(ddpm, cfg):
    """Copy into ddpm what fits of --init, without --delete-keys; say so in a line."""
    drop = tuple(f"net.{key}" for key in cfg.delete_keys.split(",") if key)
    old, own = read_checkpoint(cfg.init, "")["ema"], dict(ddpm.named_parameters())
    fits = [key for key in own if key in old and old[key].shape == own[key].shape]
    taken = {key: old[key] for key in fits if not key.startswith(drop)}
    ddpm.load_state_dict(taken, strict=False)
    rest = [key.removeprefix("net.") for key in own if key not in taken]
    return f"--init: {len(taken)} of {len(own)} tensors taken; not: {', '.join(rest)}"


def next_free(base):
    """Return the first of base, base-2, base-3 ... that is free, and the one before."""
    free, before, n = base, base, 1
    while free.exists():
        n += 1
        free, before = Path(f"{base}-{n}"), free
    return free, before


def job():
    """Return a name for this start of torchrun (or python), which a restart keeps."""
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid() if alone else ''}"


def find_run(cfg):
    """Return the run folder that cfg means, and a checkpoint to go on from, or None.

    Raises ValueError rather than let a run be overwritten.
    """
    free, newest = next_free(Path("runs", f"{SCRIPT}-{cfg.data}"))
    path = Path(cfg.resume)
    in_place = path.name == "last.pt" and cfg.out in ("", str(path.parent))
    out = Path(cfg.out or (path.parent if in_place else newest))
    about = out / "config.json"
    ours = about.exists() and json.loads(about.read_text()).get("job") == job()
    if cfg.resume == "auto" or int(os.environ.get(RESTARTS, 0)) and ours:
        last = out / "last.pt"
        return out, last if last.exists() else None
    if cfg.resume and in_place:
        return out, path
    out = Path(cfg.out or free)
    if Path(out, "config.json").exists():
        raise ValueError(f"{out} holds a run: --resume auto goes on with it")
    return out, path if cfg.resume else None


def learning_rate(cfg, step, total):
    """Return the learning rate of a step: a linear rise, then a linear fall to 0."""
    rise = min(1, (step + 1) / (cfg.warmup + 1))
    fall = 1 - step / total if cfg.lr_decay else 1
    return cfg.lr * rise * fall


@torch.no_grad()
def held_out_loss(ddpm, held):
    """Return {t: loss} at ten fixed t with fixed noise, so that all runs compare."""
    device, losses = ddpm.beta.device, {}
    for level in [round((k + 0.5) * ddpm.T / 10) for k in range(10)]:
        g, total = rng("cpu", level), 0
        for x0 in held.split(256):
            t = torch.full((len(x0),), level, device=device)
            eps = torch.randn(x0.shape, generator=g).to(device)
            residual = ddpm.residual(x0.to(device) / 127.5 - 1, t, eps)
            total += residual.square().sum()
        losses[level] = float(total) / held.numel()
    return losses


def save_grid(images, path, nrow):
    """Write images in [-1, 1] as one PNG, nrow in a line, small ones enlarged."""
    images = F.interpolate(
        (images + 1) / 2, scale_factor=max(1, 64 // images.shape[-1])
    )
    save_image(images, path, nrow=nrow, pad_value=1)


def plot_history(history, path):
    """Draw the losses over the epochs, and the held-out ones over t, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("loss", "held_loss"):
        curve = [(row["epoch"], row[name]) for row in history]
        left.plot(*zip(*curve, strict=True), "o-", label=name)
    for row in history[:: max(1, len(history) // 4)]:
        held = [(int(k[6:]), v) for k, v in row.items() if k.startswith("held_t")]
        right.plot(*zip(*held, strict=True), "o-", label=f"epoch {row['epoch']}")
    left.set(xlabel="epoch", ylabel="mean squared error of eps_hat", yscale="log")
    right.set(xlabel="noise level t", ylabel="held-out loss", yscale="log")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


def open_log(cfg, out):
    """Return a function that sends a row of metrics to --log."""
    if cfg.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        write = SummaryWriter(out).add_scalar
        return lambda row: [write(name, row[name], row["step"]) for name in row]
    if cfg.log == "wandb":
        import wandb

        run = wandb.init(project=SCRIPT, dir=out, config=asdict(cfg))
        return lambda row: run.log(row, step=row["step"])
    return lambda row: None


def train(cfg):
    """Train as cfg says, write the run folder, return the DDPM with averaged weights.

    The loop is Algorithm 1. Under torchrun every process calls this; rank 0 writes.
    Raises ValueError, OSError or FloatingPointError, in words for the user.
    """
    device, rank, world = join_processes()
    say = tqdm.write if rank == 0 and not cfg.quiet else lambda line: None
    if cfg.batch % world:
        raise ValueError(f"--batch {cfg.batch} is not divisible by {world} processes")
    if cfg.log != "none" and not find_spec(cfg.log):
        raise ValueError(f"--log {cfg.log} wants: pip install {cfg.log}")
    check_labels(cfg)  # + guide
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first_here:
        barrier()  # the first process of each machine downloads and decodes for it
    images, labels, held, held_labels = load_images(cfg)
    if first_here:
        barrier()
    if cfg.batch > len(images):
        raise ValueError(f"--batch {cfg.batch} is above the {len(images)} images")
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 4:
        images = images.to(device)
    if cfg.class_cond:  # + guide
        classes = labels.to(images.device)  # + guide

    torch.manual_seed(cfg.seed)
    ddpm = build(cfg, images.shape[1:]).to(device)
    out, resume = find_run(cfg)
    if cfg.init and not resume:
        say(start_from(ddpm, cfg))
    ema = copy.deepcopy(ddpm).eval().requires_grad_(False)
    weights, averages = list(ddpm.parameters()), list(ema.parameters())
    opt = torch.optim.AdamW(weights, betas=(0.9, 0.99), fused=True)
    start, losses, history = 0, [], []
    if resume:
        state = read_checkpoint(resume)
        restore(ddpm, state["net"], resume)
        restore(ema, state["ema"], resume)
        opt.load_state_dict(state["opt"])
        start, losses, history = (state[key] for key in ("step", "losses", "history"))
    if cfg.compile:
        ddpm.net.compile()
    model = DistributedDataParallel(ddpm) if world > 1 else ddpm
    barrier()  # every process has found the run; now its folder may change
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(
            json.dumps({"job": job(), **asdict(cfg)}, indent=2)
        )
        log = open_log(cfg, out)

    per_epoch = len(images) // cfg.batch
    total = cfg.steps or cfg.epochs * per_epoch
    share = cfg.batch // world
    mine = slice(rank * share, rank * share + share)
    say(f"{out}: {len(images)} images, {sum(w.numel() for w in weights):,} weights")
    seen, due = start * cfg.batch, total * cfg.batch
    bar = tqdm(initial=seen, total=due, unit="img", disable=cfg.quiet or rank > 0)
    fresh, before, clock = [], start, time.perf_counter()
    for step in range(start, total):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            g = rng("cpu", cfg.seed, epoch, 1)
            order = torch.randperm(len(images), generator=g).to(images.device)
        index = order[i * cfg.batch : (i + 1) * cfg.batch][mine]
        x0 = images[index].to(device) / 127.5 - 1
        g = rng(device, cfg.seed, step, 2)  # all ranks draw alike for the whole batch
        t = torch.randint(1, cfg.T + 1, (cfg.batch,), generator=g, device=device)
        eps = torch.randn(cfg.batch, *ddpm.shape, generator=g, device=device)
        mirror = torch.rand(cfg.batch, 1, 1, 1, generator=g, device=device) < 0.5
        t, eps, mirror = t[mine], eps[mine], mirror[mine]
        if cfg.data in ("cifar10", "celeba"):
            x0 = torch.where(mirror, x0.flip(-1), x0)

        if cfg.class_cond:  # + guide
            y = classes[order[i * cfg.batch : (i + 1) * cfg.batch]]  # + guide
            condition(ddpm, drop_labels(y, cfg, step)[mine])  # + guide
        loss = model(x0, t, eps)
        condition(ddpm)  # + guide
        fresh.append(loss.detach())
        opt.zero_grad()
        loss.backward()
        if cfg.grad_clip:
            nn.utils.clip_grad_norm_(weights, cfg.grad_clip)
        lr = learning_rate(cfg, step, total)
        opt.param_groups[0]["lr"] = lr
        opt.step()
        decay = min(cfg.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)
        bar.update(cfg.batch)

        done = step + 1 == total
        ends = done or i + 1 == per_epoch
        if ends or len(fresh) == 50:  # not at each step, as it waits for the GPU
            window = torch.stack(fresh) / world
            if world > 1:
                dist.all_reduce(window)
            for at, value in enumerate(window.tolist(), step + 2 - len(fresh)):
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {at}")
            losses += window.tolist()
            fresh.clear()
            bar.set_postfix(loss=f"{window.mean():.4f}")
        show = done or ends and (epoch + 1) % cfg.sample_every == 0
        keep = done or ends and (epoch + 1) % cfg.save_every == 0
        if rank == 0 and show:
            rate = (step + 1 - before) * cfg.batch / (time.perf_counter() - clock)
            row = {"step": step + 1, "epoch": epoch + 1, "lr": lr, "images_per_s": rate}
            levels = held_out_loss(ema, held)
            row |= {"loss": sum(losses) / len(losses)}
            row |= {"held_loss": sum(levels.values()) / len(levels)}
            row |= {f"held_t{level}": value for level, value in levels.items()}
            if cfg.class_cond:  # + guide
                told = loss_with_label(ema, held, held_labels)  # + guide
                row |= {"held_loss_with_label": told}  # + guide
                path = out / f"classes_epoch_{epoch + 1:03}.png"  # + guide
                class_grid(ema, strengths(cfg), cfg.seed, path)  # + guide
            history.append(row)
            log(row)
            with open(out / "metrics.csv", "w", newline="") as f:
                table = csv.DictWriter(f, row)
                table.writeheader()
                table.writerows(history)
            plot_history(history, out / "loss_curves.png")
            g = rng("cpu", cfg.seed, 3)
            xt = torch.randn(32, *ddpm.shape, generator=g).to(device)
            rows = [ema.sample(xt.shape, xt=xt), ddpm.sample(xt[:16].shape, xt=xt[:16])]
            rows.append(held[:16].to(device) / 127.5 - 1)
            save_grid(torch.cat(rows), out / f"samples_epoch_{epoch + 1:03}.png", 16)
            losses, before, clock = [], step + 1, time.perf_counter()
        if rank == 0 and (show or keep):
            if not all(weight.isfinite().all() for weight in weights):
                raise FloatingPointError(f"a weight is not finite at step {step + 1}")
            config = asdict(replace(cfg, out="", resume="", quiet=False))
            state = {"script": SCRIPT, "config": config, "shape": ddpm.shape}
            state |= {"net": ddpm.state_dict(), "ema": ema.state_dict()}
            state |= {"opt": opt.state_dict(), "losses": losses, "history": history}
            state |= {"step": step + 1}
            if keep:
                save_checkpoint(out / f"checkpoint_epoch_{epoch + 1:03}.pt", state)
            save_checkpoint(out / "last.pt", state)
    bar.close()
    if history:
        say(f"held-out loss {history[-1]['held_loss']:.4f}; pictures in {out}")
    return ema


def draw(cfg):
    """Write --n-samples images of the checkpoint --sample, as PNG files and a grid."""
    device, rank, world = join_processes()
    ddpm = load(cfg.sample, cfg.ema).to(device)
    out = Path(cfg.out or next_free(Path(cfg.sample).parent / "samples")[0])
    ws = strengths(cfg)  # + guide
    if cfg.class_cond and ddpm.net.classes is None:  # + guide
        how = "add --no-class-cond"  # + guide
        raise ValueError(f"{cfg.sample} knows no labels: {how}")  # + guide
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    barrier()  # every process has looked at the folder; now it may be made
    out.mkdir(parents=True, exist_ok=True)
    mine = range(rank, cfg.n_samples, world)
    bar = tqdm(total=cfg.n_samples, unit="img", disable=cfg.quiet or rank > 0)
    clock = time.perf_counter()
    for k in range(0, len(mine), cfg.batch):
        ids = mine[k : k + cfg.batch]
        noise = [rng("cpu", cfg.seed, i, 4) for i in ids]
        if cfg.class_cond:  # + guide
            asked = [label_and_strength(i, ws) for i in ids]  # + guide
            mixed = torch.tensor([ws[k] for _, k, _ in asked])  # + guide
            y = [y for y, *_ in asked]  # + guide
            condition(ddpm, y, ws[0] if len(ws) == 1 else mixed)  # + guide
            noise = [rng("cpu", cfg.seed, z, 4) for *_, z in asked]  # + guide
        xt = torch.stack([torch.randn(ddpm.shape, generator=g) for g in noise])
        xt, g = xt.to(device), rng(device, cfg.seed, ids[0], 5)
        x0 = ddpm.sample(xt.shape, cfg.sampling_steps, cfg.sampler, cfg.eta, g, xt)
        for i, image in zip(ids, ((x0 + 1) * 127.5).round().byte().cpu(), strict=True):
            to_pil_image(image).save(out / f"{i:06}.png")
        bar.update(min(world * len(ids), cfg.n_samples - bar.n))
    bar.close()
    barrier()
    rate = cfg.n_samples / (time.perf_counter() - clock)
    if rank == 0:
        shown = range(min(cfg.n_samples, 400))
        images = [pil_to_tensor(Image.open(out / f"{i:06}.png")) for i in shown]
        nrow = math.ceil(len(images) ** 0.5)
        if cfg.class_cond:  # + guide
            cells, nrow = table(len(images), ws)  # + guide
            blank = torch.full_like(images[0], 255)  # + guide
            images[:] = [blank if i is None else images[i] for i in cells]  # + guide
            (out / "labels.csv").write_text(as_csv(cfg.n_samples, ws))  # + guide
        save_grid(torch.stack(images) / 127.5 - 1, out / "grid.png", nrow)
        if not cfg.quiet:
            print(f"{cfg.n_samples} images in {out}, {rate:.1f} images/s")


# ---- 6. Main -----------------------------------------------------------------------
def parse(args):
    """Return the Config of a command line, over that of its checkpoint or recipe."""
    talk = os.environ.get("RANK", "0") == "0"
    ask = partial(tyro.cli, Config, description=__doc__, console_outputs=talk)
    cfg = ask(args=[a for a in args if a not in ("-h", "--help")], default=Config())
    path = cfg.sample or find_run(cfg)[1]
    default = read_checkpoint(path)["config"] if path else Config(data=cfg.data)
    if any(arg.startswith("--epochs") for arg in args):
        default = replace(default, steps=0)
    return ask(args=args, default=default)


def main():
    try:
        cfg = parse(sys.argv[1:])
        draw(cfg) if cfg.sample else train(cfg)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        sys.stderr.write(f"{SCRIPT}.py: {error}\n")
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
