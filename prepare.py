"""Turn pictures and films into arrays that the training scripts map from disk.

    python prepare.py mnist --download              fetches MNIST, writes data/mnist28
    python prepare.py celeba --image-size 64        looks where CELEBA_PATH points
    python prepare.py folder --data-dir pictures    all pictures below that folder
    python prepare.py frames --data-dir films       each folder of pictures is a clip
    python prepare.py npz --data-dir clips.npz      clips, uint8 (N, F, H, W[, 3])

It writes a folder with
    train.npy, held.npy    uint8 (N, C, S, S), clips (N, F, C, S, S); held is for tests
    train_labels.npy ...   int64 (N,), where there are labels
    train_motion.npy ...   float32 (N, F - 1), pixels per frame, with --motion-dir
    recipe.json            options of the training scripts that suit the data

The middle square of each picture is resized to S x S pixels (of CelebA's photographs
the middle 140 x 140: the face). Transparent parts become white, 16 bits become 8. If
all pictures are grey, one channel is kept. Where the data has no test set of its own, a
hash of the name holds out a fifth: a picture keeps its part when others are added.

A clip is named after its folder below --data-dir, such as cats/0001, or in an npz after
its number, 000000. --motion-dir has its motion in cats/0001.npy: (F - 1,), or
(F - 1, H, W), of which the mean counts; in pixels of the original frames.
"""

# ---- 1. Config ---------------------------------------------------------------------
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from dotenv import dotenv_values
from PIL import Image, ImageOps
from tqdm.auto import tqdm

RECIPE = "n_feat epochs batch lr ema_decay every flip".split()
RECIPES = {
    "celeba": (32, 80, 256, 1e-3, 0.9995, 4, True),
    "mnist": (32, 20, 128, 2e-3, 0.999, 1, False),
    "fashion": (32, 20, 128, 2e-3, 0.999, 1, False),  # all shoes point to the left
    "cifar10": (64, 200, 128, 1e-3, 0.9995, 5, True),
    "folder": (32, 100, 64, 1e-3, 0.999, 5, False),  # writing must not be mirrored
    "npz": (32, 20, 16, 2e-3, 0.999, 1, False),
    "frames": (32, 20, 16, 2e-3, 0.999, 1, False),
}
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}
CLIPS = ("npz", "frames")
WANTED = {
    "celeba": "the folder with img_align_celeba/000001.jpg ...; it is not downloaded: "
    "unpack img_align_celeba.zip from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, and "
    "name the folder here or as CELEBA_PATH, in the environment or in a file .env",
    "folder": "a folder with 2 pictures or more",
    "npz": "a file with 2 clips or more, uint8 (N, F, H, W) or (N, F, H, W, 3)",
    "frames": "a folder with 2 clips or more, each a sub-folder of --seq-len pictures",
}


@dataclass(frozen=True)
class Config:
    """What to prepare, and how."""

    name: tyro.conf.Positional[Literal[tuple(RECIPES)]]  # which data
    data_dir: str = ""  # where it is (empty: data; for celeba $CELEBA_PATH or .env)
    out: str = ""  # folder to write (empty: data/NAME and the image size)
    image_size: int = 0  # side in pixels, a multiple of 4 (0: 28 for mnist, else 32)
    n_train: int = 0  # keep the first N training images or clips (0: all)
    download: bool = False  # let torchvision fetch mnist, fashion or cifar10
    skip_bad_images: bool = False  # leave out unusable files, and clips that have one
    seq_len: int = 16  # frames of a clip; a longer film gives several clips
    motion_dir: str = ""  # where the motion of the clips is
    quiet: bool = False  # no progress bar and no messages

    def __post_init__(self):
        if not self.image_size:
            side = 28 if self.name in ("mnist", "fashion") else 32
            object.__setattr__(self, "image_size", side)
        if self.image_size % 4 or not 8 <= self.image_size <= 1024:
            raise ValueError("--image-size is a multiple of 4, from 8 to 1024")
        if self.n_train < 0 or self.seq_len < 2:
            raise ValueError("--n-train is 0 or more, --seq-len 2 or more")
        if self.download and self.name not in TORCHVISION:
            what = f"--data-dir is {WANTED[self.name]}"
            raise ValueError(f"--download is for {', '.join(TORCHVISION)}; {what}")
        if self.skip_bad_images and self.name in ("npz", *TORCHVISION):
            raise ValueError("--skip-bad-images is for celeba, folder and frames")
        if (self.motion_dir or self.seq_len != 16) and self.name not in CLIPS:
            raise ValueError("--motion-dir and --seq-len are for npz and frames")


# ---- 2. Find -----------------------------------------------------------------------
# Each find_... returns two lists of items, to train on and to hold out. An item is
# (sources, extra): file names or arrays, one for each frame, and a label or motion.
def find_known(cfg, root):
    """Find mnist, fashion or cifar10, with labels."""
    from torchvision import datasets  # here, because importing torch takes seconds

    name, parts = TORCHVISION[cfg.name], []
    try:
        with undo_if_it_fails(root / name / "raw"):
            for train in (True, False):
                part = getattr(datasets, name)(root, train, download=cfg.download)
                pairs = zip(np.array(part.data), part.targets, strict=True)
                parts.append([([pixels], int(label)) for pixels, label in pairs])
    except Exception as error:  # missing, broken, unreachable: torchvision has them all
        how = "--data-dir says where it is, --download fetches it"
        why = str(error).replace("download=True", "--download")
        raise ValueError(f"no usable {name} in {root} ({how}): {why}") from None
    return parts


def natural(name):
    """Return a key that sorts frame2 before frame10."""
    parts = re.split("([0-9]+)", name)
    return [int(x) if i % 2 else x for i, x in enumerate(parts)], name


def is_picture(path, cfg):
    """Tell by its name whether a file is a picture, or else by what is in it."""
    if cfg.name == "celeba":
        return re.fullmatch(r"[0-9]{6}\.(jpe?g|png)", os.path.basename(path), re.I)
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    with suppress(Exception):
        return kind in Image.OPEN or not Image.open(path).close()


def find_pictures(cfg, root, say):
    """Return all picture files below root, in natural order; say what is left out."""
    hidden = re.compile(r"\.|(@eaDir|__MACOSX)$").match
    files, others, closed, seen = [], Counter(), [], set()
    for top, folders, names in os.walk(root, onerror=closed.append, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:  # links can lead round in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted((x for x in folders if not hidden(x)), key=natural)
        for name in sorted((x for x in names if not hidden(x)), key=natural):
            path = os.path.join(top, name)
            if is_picture(path, cfg):
                files.append(path)
            else:
                others[os.path.splitext(name)[1].lower() or "without ending"] += 1
    if closed:
        say(f"left out {len(closed)} folders that cannot be read: {closed[0]} ...")
    if others:
        kinds = ", ".join(f"{n} {ending}" for ending, n in others.most_common())
        say(f"left out {others.total()} other files: {kinds}")
    return files


def split(names, cfg, root):
    """Return which of the names to train on, and which fifth to hold out."""
    if len(names) < 2:
        raise ValueError(f"too little in {root}: --data-dir is {WANTED[cfg.name]}")
    places = {name: hashlib.sha256(os.fsencode(name)).digest() for name in names}
    order = sorted(names, key=places.get)
    n = sum(place[0] < 256 / 5 for place in places.values())
    n = min(max(n, 1), len(names) - 1)  # a few names: each part gets one of them
    return order[n:], order[:n]


def find_images(cfg, root, say):
    """Find the pictures of celeba or folder."""
    files = find_pictures(cfg, root, say)
    if cfg.name == "folder":
        files = {Path(file).relative_to(root).as_posix(): file for file in files}
        train, held = split(files, cfg, root)
    else:  # CelebA's own parts go by number, and the third one is not used
        files = {os.path.basename(file)[:6]: file for file in reversed(files)}
        train = sorted(number for number in files if number <= "162770")
        held = sorted(number for number in files if "162770" < number <= "182637")
    if not (train and held):
        count = f"{len(train)} pictures up to 162770 and {len(held)} up to 182637"
        raise ValueError(f"{count} in {root}: --data-dir is {WANTED[cfg.name]}")
    return [[([files[name]], None) for name in part] for part in (train, held)]


def read_array(file):
    """Return the array of a .npy file, mapped, or of a .npz: clips, or the first."""
    try:
        found = np.load(file, mmap_mode="r")
        if isinstance(found, np.ndarray):
            return found
        return found["clips" if "clips" in found else found.files[0]]
    except Exception as error:  # np.load raises nearly anything on a foreign file
        raise ValueError(f"cannot read {file}: {error}") from None


def read_clips(file):
    """Return the clips in a file, uint8 (N, F, H, W) or (N, F, H, W, 3)."""
    clips = read_array(file)
    n, frames, *_, depth = shape = clips.shape if clips.ndim > 3 else (0, 0, 0)
    if clips.dtype != np.uint8 or clips.ndim > 5 or clips.ndim == 5 and depth not in (1, 3):
        what = f"--data-dir is {WANTED['npz']}"
        raise ValueError(f"{file} holds {clips.dtype} {clips.shape}: {what}")
    if 1 < n < frames:  # more alike along the first axis than the second: that is time
        few = clips[:20, :20].astype(np.float32)
        jump = [np.abs(np.diff(few, axis=axis)).mean() for axis in (0, 1)]
        if 10 * n < frames or jump[0] < 0.9 * jump[1]:
            how = "np.swapaxes(clips, 0, 1) puts the clips first; or cut long films"
            raise ValueError(f"{file} {shape} looks like (F, N, H, W): {how}")
    return clips[..., 0] if shape[4:] == (1,) else clips


def read_motion(file, frames):
    """Return the motion (frames - 1,) in a file; what stands for pixels is averaged."""
    motion = read_array(file)
    fits = motion.ndim in (1, 3) and len(motion) == frames - 1
    if not (fits and (motion >= 0).all()):
        what = f"({frames - 1},) or ({frames - 1}, H, W), not negative"
        raise ValueError(f"{file} holds {motion.shape}; {frames} frames want {what}")
    return motion.reshape(frames - 1, -1).mean(1)


def find_clips(cfg, root, say):
    """Find the clips of npz or frames, with their motion."""
    films, length, parts = {}, cfg.seq_len, []
    if cfg.name == "npz":
        films = {f"{i:06}": film for i, film in enumerate(read_clips(root))}
    else:
        for file in find_pictures(cfg, root, say):
            name = Path(file).parent.relative_to(root).as_posix()
            films.setdefault(name, []).append(file)
    short = sorted(name for name in films if len(films[name]) < length)
    if short:
        say(f"left out {len(short)} clips of less than {length} frames: {short[0]} ...")
    for names in split(films.keys() - short, cfg, root):
        items = []
        for name in names:
            motion, n = None, len(films[name])
            if cfg.motion_dir:
                motion = read_motion(Path(cfg.motion_dir, f"{name}.npy").expanduser(), n)
            for k in range(0, n - length + 1, length):
                moves = None if motion is None else motion[k : k + length - 1]
                items.append((films[name][k : k + length], moves))
        parts.append(items)
    return parts


# ---- 3. Decode ---------------------------------------------------------------------
def to_8_bits(image):
    """Return a grey image of 16 bits, or of floats in 0..1, with 8 bits."""
    x, top = np.asarray(image, np.float64), 1 if image.mode == "F" else 65535
    # 32 bits have no agreed white, unless the format says 16: 0 to 255 would be black
    vague = image.mode == "I" and image.format not in ("PNG", "PPM") and x.max() < 256
    if vague or not (x.min() >= 0 and x.max() <= top):  # so NaN is refused as well
        raise ValueError(f"its values are {x.min():g} to {x.max():g}, not 0 to {top}")
    return Image.fromarray((x * (255 / top)).round().astype(np.uint8))


def square(image, cfg):
    """Return the middle of an image, uint8 (3, S, S), and whether its shape is odd."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    (w, h), size = image.size, cfg.image_size
    side, odd = min(w, h), w != h
    if cfg.name == "celeba":
        odd = (w, h) != (178, 218)  # if so, someone else has cropped it already
        side = side if odd else 140
    if side < size and cfg.name not in TORCHVISION:
        raise ValueError(f"its middle {side} x {side} are less than --image-size {size}")
    x, y = (w - side) // 2, (h - side) // 2
    image = image.convert("RGB").crop((x, y, x + side, y + side))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1), odd


def decode(item, cfg):
    """Return an item's pixels, uint8 (F, 3, S, S), and whether its shape is odd.

    With --skip-bad-images: None, and why, if a source cannot be used.
    """
    squares = []
    for source in item[0]:
        file = source if isinstance(source, str) else None
        try:
            with Image.open(file) if file else Image.fromarray(source) as image:
                squares.append(square(image, cfg))
        except Exception as error:  # Pillow raises nearly anything on a broken file
            why = f"{file or cfg.data_dir}: {error}"
            if cfg.skip_bad_images:
                return None, why
            how = "; --skip-bad-images leaves such files out" if file else ""
            raise ValueError(f"cannot use {why}{how}") from None
    pixels, odd = zip(*squares, strict=True)
    return np.stack(pixels), any(odd)


def decode_all(items, cfg, label, extras, bad, odd):
    """Yield the pixels of the items in blocks; append to the three lists."""
    size = 1024 // len(items[0][0]) or 1  # items: what waits must not fill the memory
    bar = tqdm(total=len(items), desc=label, disable=cfg.quiet or None)
    with ThreadPool() as pool, bar:
        for k in range(0, len(items), size):
            block = items[k : k + size]
            pixels = []
            results = pool.map(partial(decode, cfg=cfg), block)
            for (sources, extra), (x, remark) in zip(block, results, strict=True):
                if x is None:
                    bad.append(remark)
                    continue
                pixels.append(x if cfg.name in CLIPS else x[0])
                extras.append(extra)
                odd += [sources[0]] * remark
            bar.update(len(block))
            if pixels:
                yield np.stack(pixels)


# ---- 4. Write ----------------------------------------------------------------------
@contextmanager
def undo_if_it_fails(folder):
    """On an error remove folder and its parents, as far as they are new (and empty)."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(folder)  # a full disk does not say where it is full
        for path in new:
            with suppress(OSError):
                shutil.rmtree(path) if path == folder else path.rmdir()
        raise


def save(path, blocks):
    """Write arrays (n, ...) one after the other as one .npy file."""
    total = 0
    with open(path, "wb") as f:  # no memory map: on a full disk it kills the process
        for block in blocks:
            about = {"descr": block.dtype.str, "fortran_order": False}
            if not total:
                about["shape"] = (0, *block.shape[1:])
                np.lib.format.write_array_header_1_0(f, about)
            f.write(np.ascontiguousarray(block))
            total += len(block)
        if total:  # now the header, which numpy makes as long for any number
            f.seek(0)
            np.lib.format.write_array_header_1_0(f, {**about, "shape": (total, *block.shape[1:])})


def keep_one_channel(paths):
    """Drop two channels from files of arrays (N, [F,] 3, S, S) if all three are equal."""
    arrays = [np.load(path, mmap_mode="r") for path in paths]

    def red(x):
        return (x[k : k + 256, ..., :1, :, :] for k in range(0, len(x), 256))

    ...


def prepare(cfg):
    """Write the folder that cfg asks for and return its path.

    Raises ValueError or OSError, in words for the user.
    """
    say = (lambda line: None) if cfg.quiet else print
    root = cfg.data_dir
    if cfg.name == "celeba":
        own = os.environ.get("CELEBA_PATH") or dotenv_values(".env").get("CELEBA_PATH")
        root = root or own
    root = Path(root or "data").expanduser()
    out = Path(cfg.out or f"data/{cfg.name}{cfg.image_size}").expanduser()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists: delete it, or choose another --out")
    find = find_clips if cfg.name in CLIPS else find_images
    if cfg.name in TORCHVISION: 
        parts = find_known(cfg, root)
    elif not root.exists():
        raise ...
    else: parts = find(cfg, root, say)
    ...
    
    place = out.resolve()
    for left in place.parent.glob(f"{glob.escape(place.name)}.part-*"):
        shutil.rmtree(left)  # of a run that was killed
    part = place.with_name(f"{place.name}.part-{os.getpid()}")
    with undo_if_it_fails(part):
        part.mkdir(parents=True)
        for ...
