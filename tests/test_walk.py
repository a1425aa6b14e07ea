"""The moving picture of the walk from noise to digits: decoded again by Pillow."""

import runpy

import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image, ImageSequence
from torchvision.transforms.functional import pil_to_tensor

from superminddpm import Config, load, rng, train

WALK = runpy.run_path(str(ROOT / "benchmarks" / "walk.py"))


def frames(path):
    """Return the frames of an animation, (N, H, W), and their times in milliseconds."""
    with Image.open(path) as film:
        assert film.info["loop"] == 0  # for ever
        seen = [
            (pil_to_tensor(frame.convert("L"))[0], frame.info["duration"])
            for frame in ImageSequence.Iterator(film)
        ]
    images, times = zip(*seen, strict=True)
    return torch.stack(images), list(times)


def rows(frame):
    """Return the two rows of ten images in a frame, (2, 10, 1, 8, 8), in 0..255."""
    small = frame[3::7, 3::7]  # the middle of each enlarged pixel
    assert torch.equal(small.repeat_interleave(7, 0).repeat_interleave(7, 1), frame)
    tiles = small[1:, 1:].unfold(0, 8, 9).unfold(1, 8, 9)
    return tiles[:, :, None]


def test_the_walk_begins_with_noise_and_ends_with_the_samples(tmp_path):
    ddpm = train(Config(steps=20, out=str(tmp_path / "run"), quiet=True))
    assert WALK["main"](tmp_path / "run" / "last.pt", tmp_path / "walk.webp") is None
    seen, times = frames(tmp_path / "walk.webp")
    assert times == [100] * 40 + [2000]
    noise = torch.randn(10, 1, 8, 8, generator=rng("cpu", 0, 3))
    made = load(tmp_path / "run" / "last.pt").sample(noise.shape, 40, xt=noise)
    (xt, _), (last, same) = rows(seen[0]), rows(seen[-1])
    for shown, x in ((xt, noise), (last, made), (same, made)):
        want = (x.clamp(-1, 1) + 1) / 2 * 255
        assert torch.equal(shown, want.byte())
    with torch.no_grad():  # the second frame, after one step
        t, s = (torch.full((10,), k) for k in (1000, 975))
        second = (ddpm.p_sample(noise, t, s, 0.0, 0.0).clamp(-1, 1) + 1) / 2 * 255
    assert (rows(seen[1])[0].float() - second).abs().max() < 2


def test_the_stored_walk_is_small_and_goes_from_noise_to_digits():
    path = ROOT / "benchmarks" / "results" / "walk.webp"
    assert path.stat().st_size < 500e3
    seen, times = frames(path)
    assert 30 <= len(seen) <= 50 and times[-1] >= 1000 and seen.shape[2] >= 480
    noise = torch.randn(10, 1, 8, 8, generator=rng("cpu", 0, 3))
    (xt, _), (last, same) = rows(seen[0]), rows(seen[-1])
    assert torch.equal(xt, ((noise.clamp(-1, 1) + 1) / 2 * 255).byte())
    assert torch.equal(last, same)

    def smooth(x):  # neighbouring pixels are alike in digits, and not in noise
        x = x.float() - x.float().mean()
        pair = x[..., 1:].flatten(), x[..., :-1].flatten()
        return F.cosine_similarity(*pair, dim=0)

    assert smooth(xt) < 0.1 and smooth(last) > 0.3
