"""The training loop as people write it, for comparison.  benchmarks/speed.py runs it.

A Dataset of JPEG files, opened and decoded at each access; a DataLoader with workers;
float32; Adam with its defaults; an average over the weights one by one; loss.item() at
each step. The files are made here, so that no data is needed.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Files(Dataset):
    """n times an image from files, opened anew each time, as (3, S, S) in [-1, 1]."""

    def __init__(self, files, n, size):
        self.files, self.n = files, n
        parts = [transforms.CenterCrop(140), transforms.Resize(size)]
        parts += [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*parts, transforms.Normalize(0.5, 0.5)])

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        image = Image.open(self.files[i % len(self.files)])
        return self.transform(image.convert("RGB"))


def write_files(folder, n):
    """Write n JPEG files like CelebA's, 178x218 and of about 7 kB; return their paths.

    Smooth pictures with as much texture as a face has, so that decoding takes as long.
    """
    g, paths = np.random.default_rng(0), []
    for i in range(n):
        picture = np.full((218, 178, 3), 128.0)
        for side, strength in ((4, 60), (16, 25), (64, 9)):
            grid = Image.fromarray(g.integers(0, 256, (side, side, 3), np.uint8))
            blur = np.asarray(grid.resize((178, 218), Image.Resampling.BICUBIC))
            picture += strength * (blur / 74 - 1.7)  # 74: the deviation of these bytes
        paths.append(str(Path(folder, f"{i:06}.jpg")))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def train(ddpm, batches, lr=1e-3, decay=0.9995):
    """Train ddpm on batches, x0 each; return its average and the losses."""
    device, losses = ddpm.beta.device, []
    ema = copy.deepcopy(ddpm)
    opt = torch.optim.Adam(ddpm.parameters(), lr)
    for x0 in batches:
        x0 = x0.to(device)
        t = torch.randint(1, ddpm.T + 1, (len(x0),), device=device)
        loss = ddpm(x0, t, torch.randn_like(x0))
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.no_grad():
            for a, w in zip(ema.parameters(), ddpm.parameters(), strict=True):
                a.mul_(decay).add_(w, alpha=1 - decay)
        losses.append(loss.item())
    return ema, losses


def train_on_files(ddpm, files, shape, batch, workers, n):
    """Make n steps of the plain loop."""
    data = Files(files, n * batch, shape[-1])
    return train(ddpm, DataLoader(data, batch, shuffle=True, num_workers=workers))
