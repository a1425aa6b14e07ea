"""How fast is CelebA prepared, and in how much memory does a large set train?

    python benchmarks/data.py                      all 202,599 files, some minutes
    python benchmarks/data.py --files 20000        a part of them

Makes JPEG files like CelebA's in a temporary folder: 400 different ones (plain.py),
linked under the official names, so that they come from the memory and not from a disk.
Then, each in a process of its own:

 - `python prepare.py celeba`: seconds by the clock and of processor time, and the peak
   of its memory;
 - a training of 100 steps on a set larger than the memory of the machine, images of
   zeros that take no place on the disk: the peak of the memory that is the process's
   own, without the mapped file. An epoch's order alone has 8 bytes an image.

Linux only, for its /proc.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from plain import write_files


def memory(process, name):
    """Return an entry of a file of /proc in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc", process).read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0


def make_files(n, root):
    """Write the first n of CelebA's files, at least one of them to be held out."""
    for name in ("made", "faces"):
        (root / name).mkdir()
    made = write_files(root / "made", 400)
    for i in {*range(1, n), max(n, 170_000)}:
        os.link(made[i % 400], root / f"faces/{i:06}.jpg")


def make_zeros(root, size):
    """Write a prepared folder of about size bytes of zeros; return its images."""
    n = int(size // 3072)
    for name, count in (("train", n), ("held", 64)):
        with open(root / f"{name}.npy", "wb") as f:
            about = {"descr": "|u1", "fortran_order": False}
            about["shape"] = (count, 3, 32, 32)
            np.lib.format.write_array_header_1_0(f, about)
            f.truncate(f.tell() + count * 3072)
    recipe = {"n_feat": 8, "batch": 16, "epochs": 1, "every": 1}
    (root / "recipe.json").write_text(json.dumps(recipe))
    return n


def watch(*words):
    """Run a script; return its seconds, processor seconds, and MB at the peak.

    MB: of all its memory, and of anonymous memory, which no file backs.
    """
    start, anonymous, total = time.perf_counter(), 0, 0
    process = subprocess.Popen([sys.executable, ROOT / words[0], *words[1:], "--quiet"])
    before = os.times()
    while process.poll() is None:
        anonymous = max(anonymous, memory(f"{process.pid}/status", "RssAnon"))
        total = max(total, memory(f"{process.pid}/status", "VmHWM"))
        time.sleep(0.05)
    if process.returncode:
        raise ValueError(f"{words[0]} ended with exit code {process.returncode}")
    after = os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    return time.perf_counter() - start, used, total, anonymous


def main(files: int = 202_599):
    """files: how many of CelebA's files to make, 3000 or more."""
    print(" ".join(["$ python benchmarks/data.py", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_files(files, root)
        where = ["--data-dir", f"{folder}/faces", "--out", f"{folder}/celeba32"]
        seconds, used, total, _ = watch("prepare.py", "celeba", *where)
        parts = [np.load(root / f"celeba32/{x}.npy", "r") for x in ("train", "held")]
        n, size = sum(map(len, parts)), sum(x.nbytes for x in parts)
        print(f"prepare.py celeba: {n} images of {files} files, {size / 1e6:.0f} MB")
        print(f"  {seconds:.1f} s ({n / seconds:.0f} images/s), ", end="")
        print(f"{used:.1f} s of processor")
        print(f"  memory at its peak: {total:.0f} MB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        size = 1.25e6 * memory("meminfo", "MemTotal")
        n = make_zeros(Path(folder), size)
        where = ["--data", folder, "--out", f"{folder}/run", "--steps", "100"]
        *_, anonymous = watch("superminddpm.py", *where, "--device", "cpu")
        print(f"training on {n} images, {size / 1e9:.1f} GB, in {size / 1.25e9:.1f} GB")
        print(f"  own memory at its peak: {anonymous:.0f} MB, ", end="")
        print(f"of it the order of an epoch {8 * n / 1e6:.0f} MB")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
