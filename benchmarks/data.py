"""How fast does CelebA load, in how much memory, and a set larger than the memory?

    python benchmarks/data.py                      all 202,599 files, ten minutes
    python benchmarks/data.py --files 20000        a part of them

Makes JPEG files as CelebA's are, 178x218 and about 6 kB, in a temporary folder: 400
different ones, linked under all of the official names. Linux only, for its /proc. The
files come from the memory, not from a disk. Each line is a process of its own:

 - decoding of 4024 files by 1, 2, 4 ... threads, three times;
 - the first start of --data celeba, which decodes what is trained on or held out, and
   the second, which maps the cache: seconds by the clock and of processor time, and the
   memory at its peak. Anonymous memory is what cannot be dropped when memory is short;
   the rest is mapped files;
 - a training on a set larger than the memory of the machine, a sparse file of zeros:
   anonymous memory along the way.
"""

import io
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import superminddpm as base


def memory(name, about="self/status"):
    """Return an entry of a file of /proc in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc", about).read_text())
    return int(found[1]) * 1024 / 1e6


def made_up(seed):
    """Return a JPEG file of 178x218 pixels: blurs and texture, as rich as a face."""
    r, picture = np.random.default_rng(seed), np.full((218, 178, 3), 128.0)
    for side, strength in ((4, 60), (16, 25), (64, 8)):
        grid = Image.fromarray(r.integers(0, 256, (side, side, 3), np.uint8))
        blur = np.asarray(grid.resize((178, 218), Image.Resampling.BICUBIC))
        picture += strength * (blur / 74 - 1.7)  # 74: the deviation of these bytes
    file = io.BytesIO()
    picture = picture.clip(0, 255).astype(np.uint8)
    Image.fromarray(picture).save(file, "JPEG", quality=75)
    return file.getvalue()


def make_files(n, root):
    """Write the first n of CelebA's files, at least one of them to be held out."""
    (root / "img_align_celeba").mkdir(parents=True)
    for k in range(400):
        (root / f"{k}.made-up").write_bytes(made_up(k))
    for i in {*range(1, n), max(n, 170_000)}:
        os.link(root / f"{i % 400}.made-up", root / f"img_align_celeba/{i:06}.jpg")


def load(cfg, threads=None):
    """Return images, seconds, processor seconds and MB, of a start with cfg."""
    base.ThreadPool = partial(ThreadPool, threads)
    peaks, over = [memory("RssAnon")], threading.Event()

    def watch():
        while not over.wait(0.02):
            peaks.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    clock, cpu = time.perf_counter(), time.process_time()
    images, _, held, _ = base.load_images(cfg)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    over.set()
    watcher.join()
    return len(images) + len(held), clock, cpu, memory("VmHWM"), peaks[0], max(peaks)


def train(cfg, size):
    """Train with a cache of size bytes; return n, and anonymous MB at each step."""
    base.load_images(cfg)  # two images to train on and one held out
    cache = max(Path("runs/cache").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(cache, size)  # zeros, which take no place on the disk
    forward, seen = base.DDPM.forward, [memory("RssAnon")]

    def spy(self, *inputs):
        seen.append(memory("RssAnon"))
        return forward(self, *inputs)

    base.DDPM.forward = spy
    base.train(cfg)
    return size // (3 * cfg.image_size**2), seen


def alone(work, *given):
    """Return work(*given), called in a new process in the same folder."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(work, *given).result()


def main(files: int = 202_599):
    """files: how many of CelebA's files to make, 3000 or more."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "faces")
        make_files(files, root)
        cfg = base.Config(data="celeba", data_dir=str(root), quiet=True)
        threads = [1]
        while threads[-1] < os.cpu_count():
            threads.append(min(2 * threads[-1], os.cpu_count()))
        for n in threads:
            rates = []
            for _ in range(3):
                os.chdir(tempfile.mkdtemp(dir=folder))
                done, clock, *_ = alone(load, base.replace(cfg, n_train=3000), n)
                rates.append(done / clock)
            print(f"threads {n}: {max(rates):.0f} files/s, the best of ", end="")
            print(", ".join(f"{rate:.0f}" for rate in rates), flush=True)

        os.chdir(tempfile.mkdtemp(dir=folder))
        for start in ("first", "second"):
            done, clock, cpu, peak, before, anonymous = alone(load, cfg)
            rate = f" ({done / clock:.0f} files/s)" if start == "first" else ""
            print(
                f"{start} start, {done} of {files} files: {clock:.2f} s{rate}, ", end=""
            )
            print(f"{cpu:.2f} s of processor")
            print(f"  peak {peak:.0f} MB, of it anonymous {anonymous:.0f} MB, ", end="")
            print(f"before loading {before:.0f} MB", flush=True)
        caches = sum(file.stat().st_size for file in Path("runs/cache").iterdir())
        print(f"cache on disk: {caches / 1e6:.0f} MB")

        os.chdir(tempfile.mkdtemp(dir=folder))
        total = memory("MemTotal", "meminfo")
        make_files(3, Path("few"))
        few = {"data_dir": "few", "skip_bad_images": True, "n_feat": 8, "batch": 16}
        few |= {"steps": 200, "out": "run"}
        size = int(1.25e6 * total) // 3072 * 3072  # whole images
        n, seen = alone(train, base.replace(cfg, **few), size)
        print(f"a set of {size / 1e9:.1f} GB, {n} images, ", end="")
        print(f"in {total / 1e3:.1f} GB of memory, batch 16:")
        print(f"  anonymous {seen[0]:.0f} MB before, at step ", end="")
        print(", ".join(f"{k}: {seen[k]:.0f} MB" for k in (1, 10, 50, 100, 200)))
        print(f"  of it the order of an epoch: {8 * n / 1e6:.0f} MB")
        os.chdir("/")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
