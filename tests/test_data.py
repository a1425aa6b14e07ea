"""Every data set, on small files in its true on-disk format, written here."""

import gzip
import os
import pickle
import resource
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finish, start
from PIL import Image
from sklearn.datasets import load_digits

import superminddpm as base
from superminddpm import Config, load_images, train


def write_idx(folder, name, array):
    """Write a uint8 array in the IDX format of yann.lecun.com/exdb/mnist."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(head + array.tobytes())


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save(array, path, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(
        path
    )


def test_digits_are_sklearns_and_a_fixed_fifth_is_held_out():
    images, labels, held, held_labels = load_images(Config())
    assert images.shape == (1438, 1, 8, 8) and held.shape == (359, 1, 8, 8)
    assert images.dtype == held.dtype == torch.uint8 and images.max() == 255
    assert labels.shape == (1438,) and held_labels.shape == (359,)
    digits = load_digits()
    both = torch.cat([images, held]).flatten(1).float() * 16 / 255
    ours = sorted(
        zip(
            both.round().tolist(),
            [*labels.tolist(), *held_labels.tolist()],
            strict=True,
        )
    )
    theirs = sorted(zip(digits.data.tolist(), digits.target.tolist(), strict=True))
    assert ours == theirs
    again = load_images(Config(seed=5))
    assert torch.equal(again[0], images)  # fixed: the seed does not move it


@pytest.mark.parametrize(
    ("data", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")]
)
def test_idx_files(tmp_path, data, folder):
    raw = tmp_path / "d" / folder / "raw"
    for part, n in (("train", 30), ("t10k", 20)):
        write_idx(raw, f"{part}-images-idx3-ubyte", noise(n, 28, 28))
        write_idx(raw, f"{part}-labels-idx1-ubyte", noise(n) % 10)
    cfg = Config(data=data, data_dir=str(tmp_path / "d"), n_train=25)
    images, labels, held, held_labels = load_images(cfg)
    assert images.shape == (25, 1, 28, 28) and held.shape == (20, 1, 28, 28)
    assert np.array_equal(images[:, 0].numpy(), noise(30, 28, 28)[:25])
    assert labels.tolist() == (noise(30) % 10)[:25].tolist() and len(held_labels) == 20
    assert load_images(base.replace(cfg, image_size=32))[0].shape == (25, 1, 32, 32)


def test_cifar10_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, n in [*((f"data_batch_{k}", 4) for k in range(1, 6)), ("test_batch", 6)]:
        batch = {"data": noise(n, 3072), "labels": list(range(n))}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": list("abcdefghij")})
    )
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # the checksums are those of the real files
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        images, labels, held, _ = load_images(
            Config(data="cifar10", data_dir=str(tmp_path))
        )
    assert images.shape == (20, 3, 32, 32) and held.shape == (6, 3, 32, 32)
    assert np.array_equal(images[0].numpy(), noise(4, 3072)[0].reshape(3, 32, 32))
    assert labels.tolist() == [0, 1, 2, 3] * 5


def celeba(folder, numbers):
    """Write 178x218 JPEGs: black, but bright in the 140 pixels that we keep."""
    face = np.zeros((218, 178, 3), np.uint8)
    face[39:179, 19:159] = (200, 150, 100)
    for number in numbers:
        path = folder / "img_align_celeba" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(face).save(path, quality=100, subsampling=0)


@pytest.mark.parametrize("how", ["option", "environment", "dotenv"])
def test_celeba_is_cropped_and_split_by_its_own_numbers(tmp_path, monkeypatch, how):
    root = tmp_path / "faces"
    celeba(root, [1, 2, 162770, 162771, 182637, 182638, 202599])
    if how == "environment":
        monkeypatch.setenv("CELEBA_PATH", str(root))
    if how == "dotenv":
        monkeypatch.setattr(os, "environ", os.environ.copy())
        (tmp_path / ".env").write_text(f"CELEBA_PATH={root}\n")
    cfg = Config(
        data="celeba", data_dir=str(root) if how == "option" else "", quiet=True
    )
    images, labels, held, _ = load_images(cfg)
    assert images.shape == (3, 3, 32, 32) and len(held) == 2 and labels is None
    inner = images.float() - torch.tensor([200, 150, 100]).view(1, 3, 1, 1)
    assert inner.abs().max() <= 2  # no black border: the crop is the middle 140 pixels


def test_the_cache_is_mapped_reused_and_renewed(tmp_path, monkeypatch):
    celeba(tmp_path / "f", [1, 2, 3, 170000])
    cfg = Config(data="celeba", data_dir=str(tmp_path / "f"), quiet=True)
    first = load_images(cfg)[0].clone()
    monkeypatch.setattr(base, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load_images(cfg)[0], first)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    save(noise(218, 178, 3), tmp_path / "f" / "img_align_celeba" / "000002.jpg")
    assert not torch.equal(load_images(cfg)[0], first)
    assert len(load_images(base.replace(cfg, image_size=16))[0][0, 0]) == 16


def largest_cache():
    return max(Path("runs/cache").iterdir(), key=lambda path: path.stat().st_size)


def test_a_cache_of_the_wrong_size_is_made_anew(tmp_path):
    celeba(tmp_path / "f", [1, 2, 3, 170000])
    cfg = Config(data="celeba", data_dir=str(tmp_path / "f"), quiet=True)
    first = load_images(cfg)[0].clone()
    path = largest_cache()
    for size in (0, 2 * 32 * 32 * 3, 5000, 4 * 32 * 32 * 3):
        os.truncate(path, size)
        assert torch.equal(load_images(cfg)[0], first)


def test_decoded_images_do_not_pile_up_while_the_disk_is_slow(tmp_path, monkeypatch):
    """The writer is slow at the start, and the threads may not run far ahead of it."""
    decoded, waiting = [], []

    def decode(file, cfg):
        decoded.append(file)
        return bytes(32 * 32 * 3)

    def slow(pixels, *_, **__):
        for n, image in enumerate(pixels):
            waiting.append(len(decoded) - n)
            yield image
            time.sleep(0.5 if n == 10 else 0)

    monkeypatch.setattr(base, "decode", decode)
    monkeypatch.setattr(base, "tqdm", slow)
    celeba(tmp_path, [1])
    files = [str(tmp_path / "img_align_celeba" / "000001.jpg")] * 9000
    assert len(base.decode_all(files, Config(data="celeba"))) == len(decoded) == 9000
    assert max(waiting) <= 1024


def train_and_count(cfg):
    """Train as a worker; write down what it decodes, and which cache it maps."""
    decode = base.decode

    def spy(file, cfg):
        with open("decoded", "a") as f:
            f.write(f"{file}\n")
        time.sleep(0.02)  # long enough for the other process to want the cache
        return decode(file, cfg)

    def look(self, *inputs):
        maps = Path("/proc/self/maps").read_text()
        caches = {line.split("/")[-1] for line in maps.split("\n") if ".bin" in line}
        Path(f"maps{os.environ['RANK']}").write_text(" ".join(sorted(caches)))
        return forward(self, *inputs)

    forward, base.DDPM.forward, base.decode = base.DDPM.forward, look, spy
    train(cfg)
    torch.distributed.destroy_process_group()


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's memory")


@LINUX
def test_two_processes_decode_once_and_map_the_same_cache(tmp_path):
    celeba(tmp_path / "f", [*range(1, 31), *range(170000, 170010)])
    small = {"n_feat": 8, "batch": 8, "steps": 2, "out": "run", "image_size": 8}
    cfg = Config(data="celeba", data_dir=str(tmp_path / "f"), quiet=True, **small)
    assert finish(start(train_and_count, cfg, world=2)) == [0, 0]
    decoded = Path("decoded").read_text().split()
    assert len(decoded) == len(set(decoded)) == 40
    caches = {path.name: path.read_bytes() for path in Path("runs/cache").iterdir()}
    for rank in (0, 1):
        assert set(Path(f"maps{rank}").read_text().split()) == {*caches}
    images, _, held, _ = load_images(cfg)  # training has not written into the cache
    faces = torch.cat([images, held])
    assert torch.equal(faces, faces[:1].expand_as(faces)) and len(faces) == 40


def train_with_little_memory(cfg, size):
    """Train as a worker with a cache of size bytes, and with half as much memory."""
    load_images(cfg)
    os.truncate(largest_cache(), size)  # zeros, which take no place on the disk
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + size // 2, used + size // 2))
    with pytest.raises(RuntimeError, match="allocate"):  # the limit is one
        torch.ones(size, dtype=torch.uint8)
    train(cfg)


@LINUX
def test_a_set_larger_than_the_memory_trains(tmp_path):
    celeba(tmp_path / "f", [1, 2, 170000])
    small = {"n_feat": 8, "batch": 8, "steps": 12, "out": "run", "image_size": 8}
    small |= {"skip_bad_images": True}  # then a cache may have any number of images
    cfg = Config(data="celeba", data_dir=str(tmp_path / "f"), quiet=True, **small)
    assert finish(start(train_with_little_memory, cfg, 5_000_000 * 192)) == [0]
    assert Path("run/last.pt").exists()


def test_a_killed_decode_leaves_no_half_cache(tmp_path, monkeypatch):
    celeba(tmp_path / "f", [*range(1, 400), 170000])
    cfg = Config(data="celeba", data_dir=str(tmp_path / "f"), quiet=True)
    cache = tmp_path / "runs" / "cache"
    worker = start(load_images, cfg)[0]
    while worker.is_alive() and not (cache.exists() and any(cache.iterdir())):
        time.sleep(0.001)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    names = [path.name for path in cache.iterdir()]
    assert names and not [name for name in names if name.endswith(".bin")]
    again = load_images(cfg)[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(again, load_images(cfg)[0]) and len(again) == 399


def test_a_folder_of_all_kinds(tmp_path):
    root = tmp_path / "own"
    save(np.full((60, 40), 90, np.uint8), root / "a" / "grey.png")
    save(np.full((40, 60, 3), (10, 200, 30), np.uint8), root / "b" / "colour.jpg")
    clear = np.zeros((50, 50, 4), np.uint8)
    save(clear, root / "alpha.png")
    Image.fromarray(noise(40, 40) % 4).convert("P").save(root / "palette.gif")
    save(noise(40, 40), root / "LOUD.PNG")
    cfg = Config(data="folder", data_dir=str(root), quiet=True)
    with pytest.raises(FileNotFoundError, match="5 images or more"):
        (root / "LOUD.PNG").rename(root / "LOUD.txt")
        load_images(base.replace(cfg, data_dir=str(root / "a")))
    (root / "LOUD.txt").rename(root / "LOUD.PNG")
    save(noise(40, 40, 3), root / "more.bmp")
    images, labels, held, _ = load_images(cfg)
    assert images.shape[1:] == (3, 32, 32) and len(images) + len(held) in (5, 6)
    means = torch.cat([images, held]).float().mean((2, 3)).round().tolist()
    assert [90.0, 90.0, 90.0] in means  # grey
    assert [255.0, 255.0, 255.0] in means  # what is clear lies on white


def test_a_grey_folder_has_one_channel(tmp_path):
    for k in range(6):
        save(noise(40, 40), tmp_path / "g" / f"{k}.png")
    images, _, held, _ = load_images(
        Config(data="folder", data_dir=str(tmp_path / "g"), quiet=True)
    )
    assert images.shape == (5, 1, 32, 32) and held.shape == (1, 1, 32, 32)


@pytest.mark.parametrize("broken", ["cut", "text", "small"])
def test_a_bad_image_is_named_or_left_out(tmp_path, capsys, broken):
    root = tmp_path / "own"
    for k in range(10):
        save(noise(48, 48, 3), root / f"{k}.png")
    bad = root / "3.png"
    if broken == "cut":
        bad.write_bytes(bad.read_bytes()[:900])
    elif broken == "text":
        bad.write_text("not an image")
    else:
        save(noise(20, 48, 3), bad)
    cfg = Config(data="folder", data_dir=str(root), quiet=True)
    with pytest.raises(ValueError, match=r"own/3\.png.*--skip-bad-images"):
        load_images(cfg)
    whole = [
        8 * 32 * 32 * 3,
        2 * 32 * 32 * 3,
    ]  # of the other part at most: no half cache
    caches = [cache.stat().st_size for cache in (tmp_path / "runs").rglob("*.bin")]
    assert len(caches) <= 1 and all(size in whole for size in caches)
    assert len(list((tmp_path / "runs").rglob("*.*"))) == len(caches)  # nothing else
    for _ in range(2):  # from the files, then from the cache
        images, _, held, _ = load_images(base.replace(cfg, skip_bad_images=True))
        assert len(images) + len(held) == 9
        assert "left out 1 of" in capsys.readouterr().out


def test_photographs_are_turned_upright(tmp_path):
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:10] = 255  # bright at the top; the tag says: turn it upside down
    for k in range(6):
        exif = Image.Exif()
        exif[0x0112] = 3
        path = tmp_path / "own" / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path, exif=exif)
    cfg = Config(data="folder", data_dir=str(tmp_path / "own"), quiet=True)
    image = load_images(cfg)[0][0].float()
    assert image[:, 0].mean() < 20 and image[:, -1].mean() > 235


def test_nothing_readable_is_an_error(tmp_path):
    for k in range(6):
        (tmp_path / f"{k}.png").write_text("no")
    cfg = Config(data="folder", data_dir=str(tmp_path), skip_bad_images=True)
    with pytest.raises(ValueError, match="none of 5 images is readable"):
        load_images(cfg)


@pytest.mark.parametrize("data", ["mnist", "fashion", "cifar10", "celeba", "folder"])
def test_missing_data_is_said_in_words(tmp_path, data):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*(--download|--data-dir)"):
        load_images(Config(data=data, data_dir=str(tmp_path / "nowhere")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"nonsense of some length"])
def test_broken_idx_files_are_said_in_words(tmp_path, content):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(content)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="no usable MNIST"):
        load_images(Config(data="mnist", data_dir=str(tmp_path)))


def test_gzipped_idx_files_are_not_silently_used(tmp_path):
    """torchvision wants them unpacked; say so by the same line as for missing ones."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(FileNotFoundError, match="no usable MNIST"):
        load_images(Config(data="mnist", data_dir=str(tmp_path)))
