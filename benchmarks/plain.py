"""The training loop as people write it, for comparison.  benchmarks/speed.py runs it.

A Dataset of JPEG files, opened and decoded at each access; a DataLoader with workers;
float32; AdamW with its defaults; an average over the weights one by one; loss.item() at
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
    """n times an image from files, opened anew each time, as (C, S, S) in [-1, 1]."""

    def __init__(self, files, n, shape):
        self.files, self.n, self.mode = files, n, "L" if shape[0] == 1 else "RGB"
        parts = [transforms.CenterCrop(140), transforms.Resize(shape[-1])]
        parts += [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*parts, transforms.Normalize(0.5, 0.5)])

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        image = Image.open(self.files[i % len(self.files)])
        return self.transform(image.convert(self.mode))


def write_files(folder, n):
    """Write n JPEG files of CelebA's size, 178x218, smooth with some grain.

    At 12 kB they are somewhat larger than CelebA's, of 7 kB.
    """
    g = np.random.default_rng(0)
    for i in range(n):
        blobs = g.integers(256, size=(14, 11, 3), dtype=np.uint8)
        image = Image.fromarray(blobs).resize((178, 218), Image.Resampling.BICUBIC)
        grain = np.asarray(image) + g.normal(0, 3, size=(218, 178, 1))
        image = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
        image.save(f"{folder}/{i:06}.jpg", quality=90)
    return sorted(map(str, Path(folder).iterdir()))


def train(ddpm, batches, lr=1e-3, decay=0.9995):
    """Train ddpm on batches, x0 each; return its average and the losses."""
    device, losses = ddpm.beta.device, []
    ema = copy.deepcopy(ddpm)
    opt = torch.optim.AdamW(ddpm.parameters(), lr)
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
    loader = DataLoader(
        Files(files, n * batch, shape), batch, shuffle=True, num_workers=workers
    )
    return train(ddpm, loader)
