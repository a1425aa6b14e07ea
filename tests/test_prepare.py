"""prepare.py, on small files in their true format, which are made here."""

import gzip
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from prepare import Config

SCRIPT = Path(prepare.__file__)
RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CELEBA_PATH", raising=False)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def run(name, out="out", **options):
    """Prepare data into a new folder; return its arrays by name, and its recipe."""
    options = {"data_dir": "d", "quiet": True, **options}
    folder = prepare.prepare(Config(name, out=str(out), **options))
    found = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    return found | {"recipe": json.loads((folder / "recipe.json").read_text())}


def both(found):
    """Return the pixels of all images, those held out at the end."""
    return np.concatenate([found["train"], found["held"]])


def greys(found):
    """Return the sorted mean brightness of all images of one colour each."""
    return sorted(both(found).mean((1, 2, 3)).round().astype(int).tolist())


# ---- the data sets -----------------------------------------------------------------
def write_idx(path, array):
    """Write a uint8 array in the IDX format of MNIST."""
    n = array.ndim
    head = struct.pack(f">HBB{n}I", 0, 8, n, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + array.tobytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")]
)
def test_idx_files_are_taken_pixel_by_pixel_with_their_labels(name, folder):
    for part, n in (("train", 30), ("t10k", 1030)):
        raw = Path("d", folder, "raw")
        write_idx(raw / f"{part}-images-idx3-ubyte", noise(n, 28, 28))
        write_idx(raw / f"{part}-labels-idx1-ubyte", noise(n) % 10)
    found = run(name, n_train=25)
    assert np.array_equal(found["train"][:, 0], noise(30, 28, 28)[:25])
    assert np.array_equal(found["held"][:, 0], noise(1030, 28, 28)[:1024])
    for part, n, of in (("train", 25, 30), ("held", 1024, 1030)):
        assert np.array_equal(found[f"{part}_labels"], (noise(of) % 10)[:n])
        assert found[f"{part}_labels"].dtype == np.int64
        assert found[part].dtype == np.uint8 and found[part].shape == (n, 1, 28, 28)
    assert list(found["recipe"]) == prepare.RECIPE
    assert found["recipe"]["batch"] == 16 and found["recipe"]["flip"] is False
    large = run(name, out="large", image_size=64)
    assert large["train"].shape == (30, 1, 64, 64) and len(large["train_labels"]) == 30
    assert len(large["held"]) == len(large["held_labels"]) == 256  # for one batch


def test_cifar10_files(monkeypatch):
    folder = Path("d", "cifar-10-batches-py")
    folder.mkdir(parents=True)
    for name, n in [*((f"data_batch_{k}", 60) for k in range(1, 6)), ("test_batch", 6)]:
        batch = {"data": noise(n, 3072), "labels": [i % 10 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["x"] * 10}))
    sums = "torchvision.datasets.cifar.check_integrity"  # those of the real files
    monkeypatch.setattr(sums, lambda *_: True)
    found = run("cifar10")
    assert np.array_equal(found["train"][:60], noise(60, 3072).reshape(60, 3, 32, 32))
    assert found["train_labels"].tolist() == [i % 10 for i in range(60)] * 5
    assert found["held"].shape == (6, 3, 32, 32) and found["recipe"]["batch"] == 128
    assert found["recipe"]["flip"] is True


def celeba(root, numbers, shape=(218, 178), ending="jpg"):
    """Write pictures that are black, but for the 140 pixels in the middle."""
    face = np.zeros((*shape, 3), np.uint8)
    face[39:179, 19:159] = (200, 150, 100)
    if shape != (218, 178):
        face[:] = (200, 150, 100)
    for n in numbers:
        path = Path(root, "img_align_celeba", f"{n:06}.{ending}")
        save(path, face, quality=100, subsampling=0)


@pytest.mark.parametrize("how", ["option", "environment", "dotenv", "empty"])
def test_celeba_is_found_cropped_and_split_by_number(tmp_path, monkeypatch, how):
    root = tmp_path / "faces"
    celeba(root, [1, 2, 162770, 162771, 182637, 182638, 202599])
    save(root / "other" / "000001.jpg", noise(218, 178, 3))  # the same number again
    save(root / "img_align_celeba" / "00001.jpg", noise(218, 178, 3))
    if how in ("environment", "empty"):
        monkeypatch.setenv("CELEBA_PATH", str(root) if how == "environment" else "")
    if how in ("dotenv", "empty"):
        Path(".env").write_text(f"CELEBA_PATH={root}\n")
    found = run("celeba", data_dir=str(root) if how == "option" else "")
    assert found["train"].shape == (3, 3, 32, 32) and len(found["held"]) == 2
    off = both(found).astype(int) - np.array([200, 150, 100])[:, None, None]
    assert abs(off).max() <= 2  # no black border
    assert found.keys() == {"train", "held", "recipe"}  # no labels


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (109, 89), (256, 256)])
def test_celeba_cropped_by_others_gets_no_frame_and_is_said_once(capsys, shape):
    celeba("d", [1, 2, 162771], shape, ending="png")
    found = run("celeba", quiet=False)
    assert abs(both(found).astype(int).min((0, 2, 3)) - [200, 150, 100]).max() <= 2
    assert capsys.readouterr().out.count("middle square: 3, such as") == 1


def test_a_picture_below_the_image_size_is_refused_for_the_true_reason():
    celeba("d", [1, 162771])
    with pytest.raises(
        ValueError, match=r"\.jpg: its middle 140 x 140 is below image size 144"
    ):
        run("celeba", image_size=144)
    save("e/a.png", noise(40, 30))
    save("e/b.png", noise(40, 30))
    with pytest.raises(
        ValueError, match=r"e/.\.png: its middle 30 x 30 is below image size 32"
    ):
        run("folder", data_dir="e")
    assert not Path("out").exists()


# ---- pictures of all kinds ---------------------------------------------------------
def deep(path, array, order="<"):
    """Save 16-bit or float pixels, in big-endian order where it is asked."""
    image = Image.fromarray(array)
    if order == ">":
        image = Image.frombytes("I;16B", image.size, array.byteswap().tobytes())
    image.save(path)


def test_more_than_8_bits_are_scaled_by_the_range_of_the_mode():
    """A ramp from black to white stays one, in every format."""
    Path("d").mkdir()
    ramp16 = (RAMP * 65535).round().astype(np.uint16)
    for name in ("a.png", "b.tif", "c.pgm"):
        deep(f"d/{name}", ramp16)
    deep("d/d.tif", ramp16, ">")
    deep("d/e.tif", RAMP.astype(np.float32))
    deep("d/g.tif", (RAMP * 65535).round().astype(np.int32))
    found = both(run("folder", image_size=64))
    assert found.shape == (6, 1, 64, 64)
    assert abs(found.astype(float) - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    "bad", [RAMP * 255, RAMP - 0.1, np.where(RAMP > 0.5, np.nan, RAMP)]
)
def test_floats_outside_0_to_1_are_refused_by_name(bad):
    Path("d").mkdir()
    deep("d/good.tif", RAMP.astype(np.float32))
    deep("d/bad.tif", bad.astype(np.float32))
    with pytest.raises(ValueError, match=r"bad\.tif: its values are .* not 0 to 1"):
        run("folder")


def test_whole_numbers_of_unknown_range_are_refused_by_name():
    for top in (1e6, 255):  # 255 would be black if 65535 were white
        Path("d").mkdir(exist_ok=True)
        deep("d/a.tif", (RAMP * 65535).astype(np.uint16))
        deep("d/b.tif", (RAMP * top).astype(np.int32))
        with pytest.raises(ValueError, match=r"b\.tif: its values are .* not 0 to 65"):
            run("folder")


def test_other_modes_keep_their_colour_and_what_is_clear_lies_on_white():
    Path("d").mkdir()
    size, red = (40, 40), Image.new("RGB", (40, 40), (200, 30, 30))
    for mode in ("L", "CMYK"):
        red.convert(mode).save(f"d/{mode}.tif")
    red.quantize().save("d/palette.gif")
    Image.new("LAB", size, (128, 128, 128)).save("d/LAB.tif")  # the middle: grey
    Image.new("1", size, 1).save("d/one.png")
    Image.new("RGBA", size, (0, 0, 0, 0)).save("d/clear.png")
    Image.new("LA", size, (0, 0)).save("d/clear-grey.png")
    Image.new("P", size, 0).save("d/clear-palette.png", transparency=0)
    found = both(run("folder")).astype(float).mean((2, 3)).round().tolist()
    want = [[78] * 3, [200, 30, 30], [200, 30, 30], [119] * 3, *[[255] * 3] * 4]
    assert np.abs(np.subtract(sorted(found), sorted(want))).max() <= 4


def test_fine_stripes_become_grey_and_not_black_or_white():
    for k in range(3):
        save(f"d/{k}.png", (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8))
    assert abs(both(run("folder")).astype(float) - 127.5).max() < 10


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 3  # turn it upside down
    for k in range(4):
        top = np.zeros((40, 40, 3), np.uint8)
        top[:10] = 255
        save(f"d/{k}.jpg", top, exif=exif)
    image = run("folder")["train"][0]
    assert image[:, 0].mean() < 20 and image[:, -1].mean() > 235


def test_one_channel_is_kept_only_if_all_pictures_are_grey():
    for k in range(9):
        save(f"d/{k}.png", noise(40, 40))
    save("d/9.png", np.repeat(noise(40, 40, 1), 3, axis=2))  # grey, but says RGB
    assert both(run("folder")).shape == (10, 1, 32, 32)
    for k in (3, 7):  # of the first 1024 files or of the last, to train on or held out
        save(f"d/{k}.png", noise(40, 40, 3))
        assert both(run("folder", out=f"with-{k}")).shape == (10, 3, 32, 32)
        save(f"d/{k}.png", noise(40, 40))


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "small", "gone"])
def test_a_bad_file_is_named_or_left_out_and_counted(capsys, kind):
    for k in range(12):
        save(f"d/{k}.png", noise(48, 48, 3, seed=k))
    bad = Path("d/3.png")
    good = bad.read_bytes()
    {
        "cut": lambda: bad.write_bytes(good[:900]),
        "text": lambda: bad.write_text("no picture"),
        "empty": lambda: bad.write_bytes(b""),
        "small": lambda: save(bad, noise(20, 48, 3)),
        "gone": lambda: (bad.unlink(), bad.symlink_to("nowhere.png")),
    }[kind]()
    with pytest.raises(ValueError, match=r"d/3\.png: .*--skip-bad-images"):
        run("folder", out="deep/below/out")
    assert not Path("deep").exists()  # nor any half of it
    found = run("folder", skip_bad_images=True, quiet=False)
    assert len(both(found)) == 11
    assert "unusable files left out: 1, such as d/3.png: " in capsys.readouterr().out


def test_nothing_readable_is_an_error():
    for k in range(6):
        save(f"d/{k}.png", noise(9, 9))
    with pytest.raises(ValueError, match="none of . images or clips is readable"):
        run("folder", skip_bad_images=True)
    assert not Path("out").exists()


# ---- folders -----------------------------------------------------------------------
def test_what_pillow_decodes_counts_whatever_its_ending(capsys):
    for name in ("a.gif", "b.jfif", "c.avif", "d.webp", "E.PNG", "f.bmp"):
        save(f"d/{name}", noise(40, 40, 3))
    Path("d/a.gif").rename("d/without-ending")
    Path("d/b.jfif").rename("d/of.another")
    for name in ("g.heic", "h.heic", "notes.txt", "no-picture"):
        Path("d", name).write_bytes(b"something else")
    assert len(both(run("folder", quiet=False))) == 6
    assert "other files left out: 4, such as d/g.heic" in capsys.readouterr().out
    Path("heic").mkdir()
    Path("d/g.heic").rename("heic/g.heic")
    with pytest.raises(ValueError, match="nothing to train on .* in heic"):
        run("folder", data_dir="heic", quiet=False, out="x")
    assert "other files left out: 1" in capsys.readouterr().out


def test_links_are_followed_but_not_round_in_circles(capsys):
    for k in range(5):
        save(f"elsewhere/{k}.png", noise(40, 40))
        save(f"d/own/{k}.png", noise(40, 40))
    Path("d/link").symlink_to(Path("elsewhere").resolve())
    Path("d/own/circle").symlink_to(Path("d").resolve())
    Path("d/again").symlink_to(Path("d/own").resolve())  # no picture counts twice
    Path("d/own/dead").symlink_to("nowhere")
    assert len(both(run("folder"))) == 10
    Path("root").symlink_to("d")
    assert len(both(run("folder", data_dir="root", out="2"))) == 10


def test_a_folder_that_cannot_be_read_is_named(capsys, monkeypatch):
    for folder in ("open", "closed"):
        for k in range(5):
            save(f"d/{folder}/{k}.png", noise(40, 40))
    scandir = os.scandir

    def refuse(path):  # as for a user without the right to read it
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(both(run("folder", quiet=False))) == 5
    said = capsys.readouterr().out
    assert "unreadable folders left out: 1, such as" in said and "d/closed" in said


def test_hidden_copies_are_no_pictures():
    for k in range(5):
        save(f"d/sub/{k}.png", noise(40, 40))
    for name in (
        ".ipynb_checkpoints/0.png",
        "@eaDir/1.png",
        "__MACOSX/2.png",
        "._3.png",
    ):
        save(f"d/sub/{name}", noise(40, 40))
    assert len(both(run("folder"))) == 5


def test_a_picture_keeps_its_part_when_others_are_added():
    """All pictures have another grey, by which we know them again."""
    for k in range(100):
        save(f"d/{k % 3}/{k}.png", np.full((40, 40), k, np.uint8))
    old = run("folder", out="old")
    for k in range(100, 220):
        save(f"d/{k % 5}/{k}.png", np.full((40, 40), k, np.uint8))
    new = run("folder", out="new")
    for part in ("train", "held"):
        assert set(old[part][:, 0, 0, 0]) <= set(new[part][:, 0, 0, 0])
    assert 0.1 < len(old["held"]) / 100 < 0.3 and len(both(new)) == 220
    few = run("folder", out="few", n_train=30)["train"][
        :, 0, 0, 0
    ]  # of all sub-folders
    assert len(few) == 30 and {*few % 5} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("n", range(6))
def test_of_a_few_pictures_each_part_gets_one(n):
    Path("d").mkdir()
    for k in range(n):
        save(f"d/{k}.png", np.full((40, 40), k, np.uint8))
    if n < 2:
        with pytest.raises(ValueError, match="nothing to train on or to hold out"):
            run("folder")
    else:
        found = run("folder")
        assert sorted(both(found)[:, 0, 0, 0]) == list(range(n))
        assert len(found["held"]) >= 1 and len(found["train"]) >= 1
        assert found["recipe"]["batch"] <= len(found["train"])


# ---- clips -------------------------------------------------------------------------
def numbered(n=10, frames=7, shape=(32, 32)):
    """Return clips (n, frames, *shape) whose pixels tell the clip and the frame."""
    value = 20 * np.arange(n)[:, None] + np.arange(frames)
    value = value.reshape(n, frames, *[1] * len(shape))
    return np.broadcast_to(value, (n, frames, *shape)).astype(np.uint8)


def write_clips(kind, clips, names):
    """Write clips as an npz, or as folders of frames with these names."""
    if kind == "npz":
        return np.savez("d.npz", np.float32(0), clips=clips)
    for name, clip in zip(names, clips, strict=True):
        for f, frame in enumerate(clip, start=8):  # frame10 follows frame9
            save(f"d/{name}/frame{f}.png", frame)


def pieces(found):
    """Return [(clip, first frame)] of all pieces, which must be in order."""
    start = []
    for frames in both(found)[:, :, 0, 0, 0].astype(int).tolist():
        i, f = divmod(frames[0], 20)
        assert frames == [20 * i + f + k for k in range(len(frames))]
        start.append((i, f))
    return start


NAMES = [f"{part}/0001/{k}/frames" for part in ("train", "val") for k in range(5)]


@pytest.mark.parametrize("kind", ["npz", "frames"])
@pytest.mark.parametrize("colour", [False, True])
def test_clips_are_cut_in_order_and_held_out_whole(kind, colour):
    """Their names differ only in the middle."""
    clips = numbered(shape=(32, 32, 3) if colour else (32, 32)).copy()
    if colour:
        clips[..., 1] += 1
    write_clips(kind, clips, NAMES)
    found = run(kind, data_dir="d.npz" if kind == "npz" else "d", seq_len=3)
    start, n = pieces(found), len(found["train"])
    assert sorted(start) == [(i, f) for i in range(10) for f in (0, 3)]
    assert not {i for i, _ in start[:n]} & {i for i, _ in start[n:]} and 10 < n < 20
    assert found["train"].shape[1:] == (3, 3 if colour else 1, 32, 32)
    if colour:
        assert np.array_equal(found["train"][:, :, 1], found["train"][:, :, 0] + 1)
    assert found["recipe"]["batch"] in (8, 16) and "train_motion" not in found


@pytest.mark.parametrize("kind", ["npz", "frames"])
@pytest.mark.parametrize("pixels", [(), (4, 4)])
def test_motion_stays_with_its_clip(kind, pixels):
    """Motion here is 100 clip + frame + 1; if it stands for pixels, their mean is."""
    write_clips(kind, numbered(), NAMES)
    for i, name in enumerate(NAMES):
        motion = (100.0 * i + np.arange(6) + 1).reshape(6, *[1] * len(pixels))
        motion = np.broadcast_to(motion, (6, *pixels)).copy()
        if pixels:
            motion[:, 0] += 1
            motion[:, 1] -= 1
        file = Path("m", f"{i:06}.npy" if kind == "npz" else f"{name}.npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, motion)
    options = {"seq_len": 3, "motion_dir": "m", "n_train": 9}
    found = run(kind, data_dir="d.npz" if kind == "npz" else "d", **options)
    motion = np.concatenate([found["train_motion"], found["held_motion"]])
    want = [[100 * i + f + 1, 100 * i + f + 2] for i, f in pieces(found)]
    assert np.array_equal(motion, want) and motion.dtype == np.float32
    assert len(found["train"]) == len(found["train_motion"]) == 9
    for wrong in (np.ones(5), -np.ones(6), np.ones((6, 2)), np.full(6, np.nan)):
        np.save(file, wrong)
        with pytest.raises(ValueError, match=f"{file.name} is .* not 6 numbers"):
            run(kind, data_dir="d.npz" if kind == "npz" else "d", out="x", **options)
    file.unlink()
    with pytest.raises(ValueError, match=f"cannot read .*{file.name}"):
        run(kind, data_dir="d.npz" if kind == "npz" else "d", out="x", **options)


def test_short_clips_and_clips_with_a_bad_frame_are_left_out(capsys):
    write_clips("frames", numbered(frames=4), NAMES)
    write_clips("frames", numbered(n=1, frames=2), ["short"])
    Path("d", NAMES[4], "frame9.png").write_text("bad")
    with pytest.raises(ValueError, match="frame9.png.*--skip-bad-images"):
        run("frames", seq_len=3)
    found = run("frames", seq_len=3, skip_bad_images=True, quiet=False)
    assert sorted(pieces(found)) == [(i, 0) for i in range(10) if i != 4]
    said = capsys.readouterr().out
    assert said.endswith("python supervideo.py --data out\n")
    assert "clips of less than 3 frames left out: 1, such as short" in said
    assert "unusable files left out: 1" in said


def test_clips_with_time_as_the_first_axis_are_refused():
    """Moving MNIST is published as (20, 10000, 64, 64)."""
    still = numbered(30, 8)  # neighbouring frames are nearly alike
    arrays = [np.zeros((20, 300, 32, 32), np.uint8), still.swapaxes(0, 1)]
    for clips in arrays:
        np.savez("d.npz", clips=clips)
        with pytest.raises(
            ValueError, match=r"d.npz holds .* np.swapaxes turns \(F, N"
        ):
            run("npz", data_dir="d.npz", seq_len=4)
    np.save("d.npy", numbered(3, 60))  # but a few long clips are good
    assert len(both(run("npz", data_dir="d.npy", seq_len=10))) == 18


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 48, 1)])
def test_clips_that_are_not_square_are_cut_not_squashed(capsys, shape):
    frame = np.zeros(shape, np.uint8)
    cut = [slice((n - 32) // 2, (n + 32) // 2) for n in shape[:2]]
    frame[tuple(cut)] = 255
    np.savez("d.npz", np.broadcast_to(frame, (6, 4, *shape)))
    assert (both(run("npz", data_dir="d.npz", seq_len=4, quiet=False)) == 255).all()
    assert "of unusual shape, cut to their middle square" in capsys.readouterr().out


def test_files_that_hold_no_clips_are_refused_by_name():
    np.savez("floats.npz", clips=numbered() / 255)
    np.savez("flat.npz", clips=np.zeros((9, 9), np.uint8))
    np.savez("small.npz", clips=numbered(shape=(16, 16)))
    np.savez("empty.npz")
    np.savez("short.npz", clips=numbered())
    Path("foreign.npz").write_text("no zip")
    Path("void.npz").write_bytes(b"")
    for name in "floats flat small empty short foreign void none".split():
        seq_len = 16 if name == "short" else 2
        with pytest.raises((ValueError, OSError), match=f"{name}.npz"):
            run("npz", data_dir=f"{name}.npz", seq_len=seq_len)
    assert not Path("out").exists()


# ---- what is written ---------------------------------------------------------------
def test_another_user_may_map_the_files():
    """Plain .npy in C order, which everyone may read and no one needs to write."""
    for k in range(9):
        save(f"d/{k}.png", noise(40, 40, 3))
    old = os.umask(0o022)
    try:
        run("folder")
    finally:
        os.umask(old)
    assert os.stat("out").st_mode & 0o777 == 0o755
    for file in Path("out").iterdir():
        assert file.stat().st_mode & 0o777 == 0o644
        file.chmod(0o444)
    x = np.load("out/train.npy", mmap_mode="r")
    assert (
        x.flags.c_contiguous and Path("out/train.npy").stat().st_size == 128 + x.nbytes
    )


def test_an_existing_folder_is_refused_and_not_touched():
    for k in range(5):
        save(f"d/{k}.png", noise(40, 40))
    run("folder")
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in Path("out").iterdir()}
    with pytest.raises(ValueError, match="out exists: delete it, or choose another"):
        run("folder")
    assert before == {
        f: (f.read_bytes(), f.stat().st_mtime_ns) for f in Path("out").iterdir()
    }
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    run("folder", out="link")
    assert Path("empty/train.npy").exists() and not list(Path().glob(".*.part-*"))
    Path("d").rename("new.part-1")  # only looks like what a killed run has left
    run("folder", data_dir="new.part-1", out="new")
    assert len(list(Path("new.part-1").iterdir())) == 5


SLOW = """
import time, prepare
decode = prepare.decode
def slow(*args, **kwargs):
    time.sleep(0.002)
    return decode(*args, **kwargs)
prepare.decode = slow
prepare.prepare(prepare.Config("folder", data_dir="d", out="o/x", quiet=True))
"""


def test_a_killed_run_leaves_nothing_half_and_the_next_one_clears_up():
    save("d/0.png", noise(40, 40, 3))
    for k in range(1, 2500):
        os.link("d/0.png", f"d/{k}.png")
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    run_ = subprocess.Popen([sys.executable, "-c", SLOW], env=env)
    parts = []
    while run_.poll() is None and not any(p.stat().st_size > 128 for p in parts):
        parts = list(Path("o").glob(".x.part-*/train.npy"))
        time.sleep(0.01)
    os.kill(run_.pid, signal.SIGKILL)
    run_.wait()
    assert [p.name for p in Path("o").iterdir()] == [f".x.part-{run_.pid}"]
    assert len(both(run("folder", out="o/x"))) > 2000
    assert [p.name for p in Path("o").iterdir()] == ["x"]


def test_decoded_images_do_not_pile_up_while_the_disk_is_slow(monkeypatch):
    done, waiting = [], []
    monkeypatch.setattr(prepare, "decode", lambda source, **_: done.append(0))
    for n, _ in enumerate(prepare.decode_all([("x", ())] * 9000, Config("folder"), {})):
        waiting.append(len(done) - n)
        time.sleep(0.3 if n in (10, 5000) else 0)
    assert len(done) == 9000 and max(waiting) <= 1024


def test_a_full_disk_is_said_with_the_place(tmp_path):
    for k in range(40):
        save(f"d/{k}.png", noise(40, 40, 3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # of one file
    try:
        with pytest.raises(OSError, match="File too large: 'o/out'"):
            run("folder", out="o/out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not Path("o").exists()


# ---- options and messages ----------------------------------------------------------
def test_the_home_folder_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    np.savez("clips.npz", clips=numbered())
    Path("home/m").mkdir(parents=True)
    for i in range(10):
        np.save(f"home/m/{i:06}.npy", np.ones(6))
    Path("clips.npz").rename("home/clips.npz")
    paths = {"data_dir": "~/clips.npz", "out": "~/out", "motion_dir": "~/m"}
    run("npz", seq_len=3, **paths)
    celeba("home/faces", [1, 162771])
    monkeypatch.setenv("CELEBA_PATH", "~/faces")
    run("celeba", data_dir="")
    assert Path("home/out/train_motion.npy").exists() and not Path("~").exists()


def test_the_reason_of_a_failed_download_is_shown(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("mnist", "cifar10"):
        with pytest.raises(ValueError, match="(?s)no usable .* in d .*no route"):
            run(name, download=True)
    assert not list(Path().iterdir())  # not even torchvision's empty folders


@pytest.mark.parametrize("content", ["missing", "empty", "nonsense", "gzip"])
def test_unusable_idx_files_are_said_in_words(content):
    raw = Path("d/MNIST/raw")
    for part in ("train", "t10k") if content != "missing" else ():
        for kind in ("images-idx3", "labels-idx1"):
            file = raw / f"{part}-{kind}-ubyte"
            write_idx(file, noise(3))
            if content == "gzip":  # torchvision wants them unpacked
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(b"x"))
                file.unlink()
            else:
                file.write_bytes(b"" if content == "empty" else b"nonsense, and more")
    with pytest.raises(ValueError, match="no usable MNIST in d .*--download.*: ."):
        run("mnist")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("folder", {"image_size": 30}, "--image-size is 8, 12, 16"),
        ("folder", {"image_size": 4}, "--image-size is 8, 12, 16"),
        ("folder", {"image_size": -8}, "--image-size is 8, 12, 16"),
        ("folder", {"image_size": 4096}, "--image-size is 8, 12, 16"),
        ("folder", {"n_train": -1}, "--n-train is 0 or more"),
        ("npz", {"seq_len": 1}, "--seq-len 2 or more"),
        ("celeba", {"download": True}, "--download is for .* unpack img_align_celeba"),
        ("celeba", {}, "in d: CelebA is not downloaded: unpack img_align_celeba.zip"),
        ("folder", {"motion_dir": "m"}, "--motion-dir and --seq-len are for npz"),
        ("mnist", {"seq_len": 8}, "--motion-dir and --seq-len are for npz"),
        ("folder", {}, "nothing to train on or to hold out in d"),
        ("frames", {}, "nothing to train on or to hold out in d"),
    ],
)
def test_what_cannot_be_is_refused_in_words(name, options, says):
    with pytest.raises(ValueError, match=says):
        run(name, **options)
    assert not list(Path().iterdir())


def command(*line, **env):
    """Run the command line; return its exit code, stdout and stderr."""
    line = [sys.executable, str(SCRIPT), *line]
    done = subprocess.run(line, env=os.environ | env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_says_what_to_type_next_in_any_encoding():
    for k in range(9):
        save(f"d/{k}.png", noise(40, 40))
    code, out, err = command(
        "folder", "--data-dir", "d", "--out", "größe 2", PYTHONIOENCODING="ascii"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("python superminddpm.py --data 'gr")
    Path("d/notes.txt").write_text("no picture")
    assert command("folder", "--data-dir", "d", "--quiet") == (0, "", "")
    assert np.load("data/folder32/train.npy").shape[1:] == (1, 32, 32)
    code, out, err = command("folder", "--data-dir", "d", "--image-size", "30")
    assert (code, out) == (2, "") and err.startswith("prepare.py: --image-size")
    assert len(err.splitlines()) == 1
    Path("d/3\n.png").write_text("no")
    code, out, err = command("folder", "--data-dir", "d", "--out", "x")
    assert (code, err.count("\n")) == (2, 1) and err.startswith(
        "prepare.py: cannot use"
    )
