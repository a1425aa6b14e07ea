"""Turn pictures and films into arrays that the training scripts map from disk.

    python prepare.py mnist --download              fetches MNIST, writes data/mnist28
    python prepare.py celeba --image-size 64        looks where CELEBA_PATH points
    python prepare.py folder --data-dir pictures    all pictures below that folder
    python prepare.py frames --data-dir films       each folder of pictures is a clip
    python prepare.py npz --data-dir clips.npz      clips, uint8 (N, F, H, W[, 3])

It writes train.npy and held.npy (for tests): uint8 (N, C, S, S), clips (N, F, C, S, S);
train_labels.npy, int64 (N,), or train_motion.npy, float32 (N, F - 1), if there are any,
likewise for held; and recipe.json, training options that suit the data.

The middle square of each picture is resized, of CelebA's the middle 140 pixels, the
face. Transparent parts become white, 16 bits become 8. If all is grey, one channel is
kept. Data without a test set has a fifth held out, by a hash of the names: a picture
keeps its part when others are added. At most 1,024 held-out pictures or frames are
kept, above 32x32 only as many pixels as these have: one batch is to hold them. A clip
is named after its folder, say cats/0001, or its number in the npz, 000000. Its motion
is cats/0001.npy in --motion-dir, in pixels of the original frames: (F - 1,), or maps
(F - 1, H, W), which are averaged.
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
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
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
    "fashion": (32, 20, 128, 2e-3, 0.999, 1, False),  # its shoes all point to the left
    "cifar10": (64, 200, 128, 1e-3, 0.9995, 5, True),
    "folder": (32, 100, 64, 1e-3, 0.999, 5, False),  # writing must not be mirrored
    "npz": (32, 20, 16, 2e-3, 0.999, 1, False),
    "frames": (32, 20, 16, 2e-3, 0.999, 1, False),
}
LABELLED = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}
CLIPS = ("npz", "frames")
CELEBA = """CelebA is not downloaded: unpack img_align_celeba.zip from its authors' page
mmlab.ie.cuhk.edu.hk/projects/CelebA.html and say where: --data-dir, or CELEBA_PATH"""


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


def check(cfg):
    """Return cfg with its image size. ValueError: its options do not go together."""
    side = cfg.image_size or (28 if cfg.name in ("mnist", "fashion") else 32)
    if side % 4 or not 8 <= side <= 1024 or cfg.n_train < 0 or cfg.seq_len < 2:
        least = "--n-train is 0 or more, --seq-len 2 or more"
        raise ValueError(f"--image-size is 8, 12, 16 ... 1024, {least}")
    if cfg.download and cfg.name not in LABELLED:
        raise ValueError(f"--download is for {', '.join(LABELLED)}. {CELEBA}")
    if (cfg.motion_dir or cfg.seq_len != 16) and cfg.name not in CLIPS:
        raise ValueError("--motion-dir and --seq-len are for npz and frames")
    return replace(cfg, image_size=side)


# ---- 2. Find -----------------------------------------------------------------------
# An item is (sources, extra): a file or an array for each frame, and a label or motion.
def find_labelled(cfg, root):
    """Return the items of mnist, fashion or cifar10: to train on, to hold out."""
    from torchvision import datasets  # here, because importing torch takes seconds

    name = LABELLED[cfg.name]
    kind = partial(getattr(datasets, name), root, download=cfg.download)
    try:
        return [[([x], y) for x, y in kind(train=train)] for train in (True, False)]
    except Exception as error:  # missing, broken, unreachable: torchvision has them all
        how = "--data-dir says where it is, --download fetches it"
        why = str(error).replace("download=True", "--download") or repr(error)
        raise ValueError(f"no usable {name} in {root} ({how}): {why}") from None


def find_files(cfg, root, notes):
    """Return {name: files} of the pictures or clips below root, in natural order."""
    endings, hidden = Image.registered_extensions(), (".", "@eaDir", "__MACOSX")
    found, seen, closed = defaultdict(list), set(), []
    for top, folders, files in os.walk(root, onerror=closed.append, followlinks=True):
        if os.path.realpath(top) in seen:  # links can lead round in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(top))
        folders[:] = sorted(x for x in folders if not x.startswith(hidden))
        files = sorted(x for x in files if not x.startswith(hidden))
        files.sort(key=lambda x: re.sub("[0-9]+", lambda n: n[0].zfill(20), x))  # 2, 10
        for file in files:
            path = os.path.join(top, file)
            name = Path(top if cfg.name == "frames" else path).relative_to(root)
            known = endings.get(os.path.splitext(file)[1].lower()) in Image.OPEN
            with suppress(Exception):  # what Pillow cannot open is something else
                if known or Image.open(path):
                    found[name.as_posix()].append(path)
                    continue
            notes["other files left out"].add(path)
    notes["unreadable folders left out"].update(map(str, closed))
    return found


def read_array(file):
    """Return the array in a .npy, or the one named clips, or the first, in a .npz."""
    try:
        x = np.load(file, mmap_mode="r")  # so a .npy may be larger than the memory
        if isinstance(x, np.ndarray):
            return x
        return x["clips" if "clips" in x else x.files[0]]
    except Exception as error:  # np.load raises nearly anything on a foreign file
        raise ValueError(f"cannot read {file}: {error}") from None


def find_arrays(root):
    """Return {number: frames (F, H, W[, 3])} of the clips in a file."""
    x = read_array(root)
    fits = x.dtype == np.uint8 and x.ndim > 3 and x.shape[4:] in ((), (1,), (3,))
    if fits and 1 < x.shape[0] < x.shape[1]:  # little changes along the axis of time
        few = x[:20, :20].astype(np.float32)
        change = [np.abs(np.diff(few, axis=axis)).mean() for axis in (0, 1)]
        fits = change[0] > 0.9 * change[1]
    if not fits:
        wanted = "uint8 (N, F, H, W) or (N, F, H, W, 3); np.swapaxes turns (F, N, H, W)"
        raise ValueError(f"{root} holds {x.dtype} {x.shape}, not {wanted}")
    return {f"{i:06}": clip for i, clip in enumerate(x)}


def read_motion(cfg, name, pairs):
    """Return the motion (pairs,) of a clip; what stands for pixels is averaged."""
    file = Path(cfg.motion_dir, f"{name}.npy").expanduser()
    x = read_array(file)
    fits = x.dtype.kind in "fiu" and x.ndim in (1, 3) and len(x) == pairs
    if not (fits and (x >= 0).all()):
        raise ValueError(f"{file} is {x.shape}, not {pairs} numbers or maps >= 0")
    return x.reshape(pairs, -1).mean(1)


def split(names, cfg):
    """Return which names to train on, and which to hold out."""
    if cfg.name == "celeba":  # its own parts go by number; its test part is not used
        numbers = {Path(name).stem: name for name in sorted(names, reverse=True)}
        order = sorted(n for n in numbers if re.fullmatch("[0-9]{6}", n))
        train = [numbers[n] for n in order if n <= "162770"]
        return train, [numbers[n] for n in order if "162770" < n <= "182637"]
    digests = {name: hashlib.sha256(os.fsencode(name)).digest() for name in names}
    order = sorted(names, key=digests.get)
    n = sum(digest[0] < 256 / 5 for digest in digests.values())
    n = max(1, min(n, len(names) - 1))  # of a few names each part gets one
    return order[n:], order[:n]


def find(cfg, root, notes):
    """Return the items of all other data: to train on, to hold out."""
    found = find_arrays(root) if cfg.name == "npz" else find_files(cfg, root, notes)
    length, parts = cfg.seq_len if cfg.name in CLIPS else 1, ([], [])
    short = {name for name in found if len(found[name]) < length}
    notes[f"clips of less than {length} frames left out"] |= short
    for items, names in zip(parts, split(found.keys() - short, cfg), strict=True):
        for name in names:
            pairs = len(found[name]) - 1
            motion = read_motion(cfg, name, pairs) if cfg.motion_dir else ()
            for k in range(0, pairs - length + 2, length):
                frames = found[name][k : k + length]
                items.append((frames, motion[k : k + length - 1]))
    if not all(parts):
        how = CELEBA if cfg.name == "celeba" else "python prepare.py --help"
        raise ValueError(f"nothing to train on or to hold out in {root}: {how}")
    return parts


# ---- 3. Decode ---------------------------------------------------------------------
def to_8_bits(image):
    """Return a grey image of 16 bits, or of floats in 0..1, with 8 bits."""
    x, top = np.asarray(image, np.float64), 1 if image.mode == "F" else 65535
    # 32 bits have no agreed white, and 0 to 255 would be black; but these say 16 bits
    vague = image.mode == "I" and image.format not in ("PNG", "PPM") and x.max() < 256
    if vague or not (x.min() >= 0 and x.max() <= top):  # so NaN is refused as well
        raise ValueError(f"its values are {x.min():g} to {x.max():g}, not 0 to {top}")
    return Image.fromarray((x * (255 / top)).round().astype(np.uint8))


def decode(source, cfg, notes):
    """Return the middle of a file or an array as uint8 (3, S, S), or None: skip it."""
    in_file, size = isinstance(source, str), cfg.image_size
    name = source if in_file else cfg.data_dir
    try:
        image = Image.open(source) if in_file else Image.fromarray(np.squeeze(source))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            image = to_8_bits(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        (w, h), side = image.size, min(image.size)
        if cfg.name == "celeba" and (w, h) == (178, 218):
            side = 140
        elif cfg.name == "celeba" or w != h:
            notes["of unusual shape, cut to their middle square"].add(name)
        if side < size and cfg.name not in LABELLED:
            raise ValueError(f"its middle {side} x {side} is below image size {size}")
        x, y = (w - side) // 2, (h - side) // 2
        image = image.convert("RGB").crop((x, y, x + side, y + side))
        image = image.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises nearly anything on a broken file
        if not cfg.skip_bad_images:
            how = "; --skip-bad-images leaves such files out" if in_file else ""
            raise ValueError(f"cannot use {name}: {error}{how}") from None
        notes["unusable files left out"].add(f"{name}: {error}")


def decode_all(items, cfg, notes):
    """Yield the decoded frames of all items, in order; all processor cores work."""
    sources = [source for item in items for source in item[0]]
    # in blocks: what waits for a slow disk must not fill the memory
    blocks = (sources[k : k + 1024] for k in range(0, len(sources), 1024))
    one = partial(decode, cfg=cfg, notes=notes)
    with ThreadPool() as pool:
        frames = (frame for block in blocks for frame in pool.imap(one, block))
        quiet = cfg.quiet or None  # None: a bar only where someone is watching
        yield from tqdm(frames, total=len(sources), leave=False, disable=quiet)


# ---- 4. Write ----------------------------------------------------------------------
def write(file, items, channels, cfg, notes):
    """Decode items into a .npy file; return the extras of those that are in it."""
    extras, frames = [], decode_all(items, cfg, notes)
    with open(file, "wb") as f:  # no memory map: on a full disk it kills the process
        f.write(bytes(128))  # place for the header, which has the number of items
        for sources, extra in items:
            pixels = [next(frames) for _ in sources]
            if all(x is not None for x in pixels):
                x = np.stack(pixels)[:, :channels]
                x = x if cfg.name in CLIPS else x[0]
                f.write(x.tobytes())
                extras.append(extra)
        if not extras:
            raise ValueError(f"none of {len(items)} images or clips is readable")
        about = {"descr": "|u1", "fortran_order": False}
        about["shape"] = (len(extras), *x.shape)
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, about)
    return extras


def prepare(cfg):
    """Write the folder that cfg asks for; return its path. Its errors are for the user.

    It has another name until it is complete; what a failed run has written goes again.
    """
    say = (lambda line: None) if cfg.quiet else print
    cfg, root, notes = check(cfg), cfg.data_dir, defaultdict(set)
    if cfg.name == "celeba" and not root:
        root = os.environ.get("CELEBA_PATH") or dotenv_values(".env").get("CELEBA_PATH")
    root = Path(root or "data").expanduser()
    out = Path(cfg.out or f"data/{cfg.name}{cfg.image_size}").expanduser()
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists: delete it, or choose another --out")
    labelled, place = cfg.name in LABELLED, out.resolve()
    part = place.with_name(f".{place.name}.part-{os.getpid()}")
    raw = root / LABELLED.get(cfg.name, "") / "raw"  # where torchvision downloads to
    new = [x for y in (part, raw) for x in (y, *y.parents) if not x.exists()]
    try:
        train, held = find_labelled(cfg, root) if labelled else find(cfg, root, notes)
        most = 2**20 // max(32, cfg.image_size) ** 2 // len(held[0][0])  # for one batch
        train, held = train[: cfg.n_train or None], held[: most or 1]
        for killed in place.parent.glob(f".{glob.escape(place.name)}.part-*"):
            shutil.rmtree(killed)
        part.mkdir(parents=True)
        frames = (x for x in decode_all(train + held, cfg, notes) if x is not None)
        grey = all((x == x[:1]).all() for x in frames)
        frames.close()
        for name, items in (("held", held), ("train", train)):
            extras = write(part / f"{name}.npy", items, 1 if grey else 3, cfg, notes)
            if labelled:
                np.save(part / f"{name}_labels.npy", np.array(extras, np.int64))
            if cfg.motion_dir:
                np.save(part / f"{name}_motion.npy", np.array(extras, np.float32))
        recipe = dict(zip(RECIPE, RECIPES[cfg.name], strict=True))
        recipe["batch"] = min(recipe["batch"], 2 ** (len(extras).bit_length() - 1))
        (part / "recipe.json").write_text(json.dumps(recipe, indent=2))
        part.rename(place)
    except OSError as error:
        error.filename = error.filename or str(out)  # a full disk does not say where
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in new:
            with suppress(OSError):
                folder.rmdir()  # if it is empty
        for what, files in notes.items():
            if files:
                say(f"{what}: {len(files)}, such as {min(files)}")
    script = "supervideo.py" if cfg.name in CLIPS else "superminddpm.py"
    say(f"{len(extras)} of {len(train)} to train on. Now:")
    say(f"python {script} --data {shlex.quote(out.as_posix())}")
    return out


# ---- 5. Main -----------------------------------------------------------------------
def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # not all terminals know UTF-8
    try:
        prepare(tyro.cli(Config, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print("prepare.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
