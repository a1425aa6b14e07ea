"""Clips, noise that frames share, the penalty, the layers that mix frames, the film."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command_line, state
from PIL import Image

import supervideo
from supervideo import (
    Config,
    MixFrames,
    build,
    correlate,
    load,
    load_clips,
    load_images,
    rng,
    set_moving,
    train,
)

TINY = {"n_feat": 8, "batch": 4, "seq_len": 4, "every": 1000, "quiet": True}
APART = (torch.arange(4)[:, None] - torch.arange(4)).abs().double()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=rng("cpu", seed))


def model(channels=1, **options):
    """Return an untrained DDPM for clips of 4 frames; none of its layers is 0."""
    torch.manual_seed(0)
    cfg = Config(**{"n_feat": 8, "seq_len": 4, **options})
    ddpm = build(cfg, (cfg.seq_len * channels, 8, 8)).eval()
    for name, weight in ddpm.named_parameters():
        if "mix" in name or "net.out" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return ddpm.requires_grad_(False)


@pytest.fixture
def clips():
    """Make a folder of 12 + 5 clips (8 frames, RGB) that know who they are; its name.

    Pixels are 20 clip + frame in red, and 1 and 2 more in green and blue; the motion
    from a frame to the next is 100 clip + frame.
    """
    Path("films").mkdir()
    for part, n in {"train": 12, "held": 5}.items():
        who = np.add.outer(20 * np.arange(n), np.arange(8))
        pixels = np.add.outer(who, np.arange(3)).astype(np.uint8)[..., None, None]
        np.save(f"films/{part}.npy", np.broadcast_to(pixels, (n, 8, 3, 8, 8)))
        motion = np.add.outer(100 * np.arange(n), np.arange(7.0))
        np.save(f"films/{part}_motion.npy", motion.astype(np.float32))
    recipe = {"n_feat": 8, "epochs": 1, "batch": 4, "lr": 1e-3, "every": 1}
    Path("films/recipe.json").write_text(json.dumps({**recipe, "ema_decay": 0.9}))
    return "films"


# ---- clips ---------------------------------------------------------------------------


def reflect(start, v, frames, room):
    """Return the places of a ball that goes by steps of 1 and turns at 0 and room."""
    way, p = [start], start
    for _ in range(frames - 1):
        for _ in range(abs(v)):
            v = -v if not 0 <= p + (v > 0) - (v < 0) <= room else v
            p += (v > 0) - (v < 0)
        way.append(p)
    return way


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_clips_are_images_that_bounce_and_their_motion_is_true(shape):
    side, room, speed = shape[-1], shape[-1] // 2, shape[-1] // 8
    g = rng("cpu", 2)
    images = torch.randint(1, 256, (200, *shape), generator=g, dtype=torch.uint8)
    moving, motion = set_moving(images, 9, g)
    assert moving.shape == (200, 9 * shape[0], side + room, side + room)
    assert moving.dtype == torch.uint8 and motion.shape == (200, 8)
    starts, speeds = set(), set()
    for i, clip in enumerate(moving.unflatten(1, (9, -1))):
        places = []
        for frame in clip:
            y, x = (int(frame.any(0).any(axis).float().argmax()) for axis in (1, 0))
            assert torch.equal(frame[:, y : y + side, x : x + side], images[i])
            assert frame.count_nonzero() == images[i].numel()  # the rest is black
            places.append((y, x))
        moves = torch.tensor(places).diff(dim=0).float().norm(dim=1)
        assert torch.equal(moves, motion[i]) and moves.max() > 0
        for way in zip(*places, strict=True):
            ways = [
                v for v in (0, speed, -speed) if [*way] == reflect(way[0], v, 9, room)
            ]
            assert ways, way
            speeds |= set(ways)
        starts.add(places[0])
    assert speeds == {0, speed, -speed} and len(starts) > room**2


def test_the_default_clips_are_the_digits_and_the_same_for_all_seeds():
    images, held = load_images(Config())
    again, other = load_images(Config(seed=5))
    assert torch.equal(images, again) and torch.equal(held, other)
    assert images.shape == (1438, 8, 12, 12) and held.shape == (128, 8, 12, 12)
    still, still_held = load_images(Config(seq_len=1))
    for x, source in ((images, still), (held, still_held[:128])):
        assert torch.equal(x.sum((2, 3)), source.sum((2, 3)).expand(-1, 8))
    short = load_images(Config(seq_len=3))[0]
    assert torch.equal(short, images[:, :3])


def test_images_of_a_folder_are_set_moving_too(tiny):
    images, held, motion = load_clips(Config(tiny, seq_len=3))
    assert images.shape == (160, 3, 12, 12) and held.shape == (40, 3, 12, 12)
    assert motion.shape == (160, 2) and motion.min() >= 0 < motion.max()


@pytest.mark.parametrize("length", [2, 4, 8])
def test_stored_clips_are_cut_in_order_and_keep_their_motion(
    monkeypatch, clips, length
):
    cfg = Config(clips, seq_len=length, flow_weight=True)
    images, held, motion = load_clips(cfg)
    for x, n in ((images, 12), (held, 5)):
        assert x.shape == (n * 8 // length, length * 3, 8, 8)
        red = x[:, ::3, 0, 0].long()
        starts = [20 * i + f for i in range(n) for f in range(0, 8, length)]
        assert red[:, 0].tolist() == starts
        assert (red.diff(dim=1) == 1).all() and torch.equal(x[:, 2::3], x[:, ::3] + 2)
    i, f = images[:, 0, 0, 0].long() // 20, images[:, 0, 0, 0].long() % 20
    want = (100 * i + f)[:, None] + torch.arange(length - 1)
    assert torch.equal(motion, want.float())
    assert torch.equal(images, load_images(cfg)[0])

    stored = load_images(Config(clips, seq_len=1))
    monkeypatch.setattr(supervideo, "load_images", lambda cfg: stored)
    for x, y in zip(load_clips(cfg)[:2], stored, strict=True):
        assert x.data_ptr() == y.data_ptr()  # mapped from the file, not copied


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seq_len": 0}, "--seq-len 1 ..."),
        ({"seq_len": 1, "flow_weight": True}, "--seq-len 2 ..."),
        ({"correlation": 1.5}, "--correlation 0 to 1"),
        ({"correlation": -0.1}, "--correlation cannot be -0.1"),
        ({"reg_weight": -1.0}, "--reg-weight cannot be -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Config(**options)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--data films --seq-len 16", "--seq-len does not divide 8 frames"),
        ("--data films --seq-len 3", "--seq-len does not divide 8 frames"),
        ("--data films --seq-len 1", "films holds clips, not images"),
        ("--data bare --flow-weight", "bare/train_motion.npy"),
    ],
)
def test_data_that_do_not_fit_are_refused_in_a_line(clips, capsys, line, says):
    Path("bare").mkdir()
    for name in ("train.npy", "held.npy", "recipe.json"):
        Path("bare", name).write_bytes(Path("films", name).read_bytes())
    assert command_line(supervideo, f"{line} --out run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said and not Path("run").exists()


# ---- noise ---------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 1.0])
def test_each_frame_is_normal_and_frames_k_apart_correlate_by_rho_to_the_k(rho):
    own = normal(10000, 4 * 2, 2, 2)
    eps = correlate(own, 2, rho)
    x = eps.unflatten(1, (4, 2)).transpose(0, 1).flatten(1).double()  # (F, n)
    torch.testing.assert_close(x.cov(), rho**APART, atol=0.02, rtol=0)
    torch.testing.assert_close(
        (x**4).mean(1), torch.full((4,), 3.0).double(), rtol=0.05, atol=0
    )
    assert torch.equal(eps[:, :2], own[:, :2])
    if rho == 0:
        assert torch.equal(eps, own)
    if rho == 1:
        assert torch.equal(eps, own[:, :2].repeat(1, 4, 1, 1))


@pytest.mark.parametrize(
    ("noise", "rho"), [("shared", 1), ("progressive", 0.7), ("independent", 0)]
)
def test_training_and_sampling_use_the_noise_that_is_asked_for(monkeypatch, noise, rho):
    """With x_0 = 0 the net sees sqrt(1 - abar) eps; then x_T; then what z adds."""
    ddpm, seen = model(noise=noise, correlation=0.7), []
    monkeypatch.setattr(ddpm.net, "forward", lambda xt, t: seen.append(xt) or 0 * xt)
    eps, t = normal(1000, 4, 8, 8), torch.full((1000,), 700)
    ddpm(0 * eps, t, eps)
    seen[0] = seen[0] / (1 - ddpm.alphabar[700]).sqrt()
    xt = normal(1000, 4, 8, 8, seed=2)
    kept = xt.clone()
    ddpm.sample(xt.shape, steps=1, xt=xt)
    ddpm.sample(xt.shape, steps=1, generator=rng("cpu", 2))
    ddpm.sample(xt.shape, steps=2, eta=1.0, xt=0 * xt, generator=rng("cpu", 3))
    assert torch.equal(xt, kept) and torch.equal(seen[1], seen[2])
    for eps in (seen[0], seen[1], seen[4] / seen[4].std()):
        x = eps.reshape(1000, 4, 64).transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(x.cov(), rho**APART, atol=0.03, rtol=0)


# ---- the penalty ---------------------------------------------------------------------


def test_the_loss_is_eq_14_plus_the_penalty_as_promised():
    """With shared noise the penalty is that on neighbouring eps_hat; all by hand."""
    ddpm = model(channels=3, noise="shared", reg_weight=0.25)
    x0, eps = normal(5, 12, 8, 8), normal(5, 12, 8, 8, seed=2)
    t = torch.tensor([1, 200, 400, 700, 1000])
    one = eps[:, :3].repeat(1, 4, 1, 1)
    eps_hat = ddpm.eps_hat(ddpm.q_sample(x0, t, one), t)
    mse = (eps_hat - one).square().mean()
    pairs = torch.zeros(5, 3)
    for b in range(5):
        for f in range(3):
            now, then = eps_hat[b, 3 * f : 3 * f + 3], eps_hat[b, 3 * f + 3 : 3 * f + 6]
            pairs[b, f] = (then - now).square().mean()
    torch.testing.assert_close(ddpm(x0, t, eps), mse)  # held out: the error alone
    ddpm.train()
    torch.testing.assert_close(ddpm(x0, t, eps), mse + 0.25 * pairs.mean())
    weights = normal(5, 3, seed=3).abs()
    ddpm.reg_weight = weights
    torch.testing.assert_close(ddpm(x0, t, eps), mse + (weights * pairs).mean())


@pytest.mark.parametrize("noise", ["shared", "progressive", "independent"])
def test_the_penalty_is_0_where_all_frames_err_alike(monkeypatch, noise):
    ddpm = model(noise=noise, reg_weight=1.0).train()
    x0, t = normal(5, 4, 8, 8), torch.tensor([100, 200, 400, 700, 900])
    ab = ddpm.alphabar[t, None, None, None]
    for wrong in (0.0, 1.0):

        def knows(xt, t, wrong=wrong):
            return (xt - ab.sqrt() * x0) / (1 - ab).sqrt() + wrong

        monkeypatch.setattr(ddpm, "eps_hat", knows)
        loss = ddpm(x0, t, normal(5, 4, 8, 8, seed=2))
        assert loss.item() == pytest.approx(wrong, abs=1e-3)


@pytest.mark.parametrize("data", ["digits", "films"])
def test_the_weights_of_a_step_belong_to_its_clips(monkeypatch, clips, data):
    """What forward sees in x0 is as far apart as its weights say."""
    seen, forward = [], supervideo.DDPM.forward

    def spy(self, x0, t, eps):
        if self.training:
            seen.append(((x0 + 1) * 127.5, self.reg_weight))
        return forward(self, x0, t, eps)

    monkeypatch.setattr(supervideo.DDPM, "forward", spy)
    monkeypatch.setattr(supervideo, "save_grid", lambda *_: None)
    monkeypatch.setattr(supervideo, "held_out_loss", lambda *_: {"held_loss": 0.0})
    train(Config(data, out="run", steps=3, flow_weight=True, reg_weight=3.0, **TINY))
    assert len(seen) == 3
    for x0, weights in seen:
        if data == "films":  # each clip says who it is
            first = x0[:, 0, 0, 0].round()
            motion = 100 * (first // 20) + first % 20
            motion = motion[:, None] + torch.arange(3)
        else:  # the centre of the ink moves as the digit does
            place, ink = torch.arange(12.0), x0.sum((2, 3))
            y, x = ((x0.sum(k) * place).sum(2) / ink for k in (3, 2))
            motion = torch.stack([y, x], dim=2).diff(dim=1).norm(dim=2)
        torch.testing.assert_close(weights, 3 / (1 + motion), atol=1e-3, rtol=0)


# ---- the layers ----------------------------------------------------------------------


def test_a_layer_is_a_convolution_over_the_frames_by_hand():
    torch.manual_seed(0)
    layer, x = MixFrames(8, 5), normal(2 * 5, 8, 3, 2)
    assert torch.equal(layer(x), x)  # it starts at 0
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    want = x.clone().view(2, 5, 8, 3, 2)
    for b, i, j in np.ndindex(2, 3, 2):
        pixel = x.view(2, 5, 8, 3, 2)[b, :, :, i, j].T[None]  # (1, c, F)
        h = F.conv1d(pixel, layer.weight[..., 0], layer.bias, padding=4)
        want[b, :, :, i, j] += h[0].T
    with torch.no_grad():
        torch.testing.assert_close(layer(x).view_as(want), want, atol=1e-4, rtol=1e-4)


def test_a_new_video_model_is_the_image_model_frame_by_frame():
    """Of the same seed, and with the same weights: the layers are all that is new."""
    made = []
    for temporal in (False, True):
        torch.manual_seed(0)
        cfg = Config(n_feat=8, seq_len=4, temporal=temporal)
        made.append(build(cfg, (12, 8, 8)).eval().requires_grad_(False))
    plain, video = made
    new = {name for name in video.state_dict() if ".mix." in name}
    assert len(new) == 12 and {*plain.state_dict()} == {*video.state_dict()} - new
    for ddpm in made:
        torch.nn.init.constant_(ddpm.net.out.weight, 0.1)
    xt, t = normal(3, 12, 8, 8), torch.tensor([1, 300, 900])
    assert torch.equal(plain.eps_hat(xt, t), video.eps_hat(xt, t))
    frames = [plain.eps_hat(xt[:, f : f + 3], t) for f in range(0, 12, 3)]
    torch.testing.assert_close(plain.eps_hat(xt, t), torch.cat(frames, dim=1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("temporal", [False, True])
def test_only_the_layers_carry_from_frame_to_frame(channels, temporal):
    ddpm = model(channels, temporal=temporal)
    xt, t = normal(2, 4 * channels, 8, 8), torch.tensor([100, 800])
    other = xt.clone()
    other[0, channels : 2 * channels] += 1  # the second frame of the first clip
    change = (ddpm.eps_hat(xt, t) - ddpm.eps_hat(other, t)).abs()
    change = change.unflatten(1, (4, channels)).amax((2, 3, 4))  # (clip, frame)
    assert change[0, 1] > 1e-3 and change[1].max() < 1e-5
    assert (change[0, [0, 2, 3]] > 1e-4).all() == temporal
    assert (change[0, [0, 2, 3]] < 1e-5).all() != temporal


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_layers_shared_noise_draws_still_pictures(eta):
    """And from noise of its own each frame becomes what it would become alone."""
    still, g = model(temporal=False, noise="shared", T=50), rng("cpu", 1)
    clip = still.sample((2, 4, 8, 8), 5, eta, g)
    assert torch.equal(clip, clip[:, :1].expand(-1, 4, -1, -1))
    if eta == 0:
        apart, xt = model(temporal=False, noise="independent"), normal(2, 4, 8, 8)
        clip = apart.sample(xt.shape, 5, xt=xt)
        for f in range(4):
            alone = apart.sample((2, 1, 8, 8), 5, xt=xt[:, f : f + 1])
            torch.testing.assert_close(clip[:, f : f + 1], alone, atol=1e-3, rtol=0)


# ---- runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 4])
def test_a_run_leaves_clips_in_columns_and_a_film(monkeypatch, clips, length):
    """Samples here tell by the colour of a tile its clip, frame and channel."""

    def colours(self, shape, xt):
        value = 37 * torch.arange(shape[0] * shape[1]) % 256 / 127.5 - 1
        return value.view(shape[0], -1, 1, 1).expand(shape)

    monkeypatch.setattr(supervideo.DDPM, "sample", colours)
    train(Config(clips, out="run", steps=1, **{**TINY, "seq_len": length}))
    page = np.asarray(Image.open("run/samples_epoch_001.png")).astype(int)
    assert page.shape == (length * 66 + 2, 16 * 66 + 2, 3)
    held = load_images(Config(clips, seq_len=length))[1][:16]
    shown = torch.linspace(0, 47 + len(held), 16).long().tolist()
    assert min(shown) == 0 and any(32 <= k < 48 for k in shown) and shown[-1] > 48
    for f, (i, k) in product(range(length), enumerate(shown)):
        tile = page[f * 66 + 2 : f * 66 + 66, i * 66 + 2 : i * 66 + 66]
        assert (tile == tile[:1, :1]).all()
        c = 3 * f + np.arange(3)
        want = 37 * (k % 32 * 3 * length + c) % 256  # 0..31 averaged, 32..47 raw
        if k >= 48:
            want = held[k - 48, c, 0, 0].numpy()
        assert np.abs(tile[0, 0] - want).max() <= 1, (f, i)
    film = Image.open("run/samples_epoch_001.webp")
    assert film.n_frames == length and film.size == (page.shape[1], 66)
    for f in range(length):
        film.seek(f)
        line = np.asarray(film.convert("RGB")).astype(int)
        assert np.abs(line - page[66 * f : 66 * f + 66]).mean() < 3  # webp is lossy


def test_load_brings_back_what_sampling_needs(monkeypatch, clips):
    monkeypatch.setattr(supervideo, "save_grid", lambda *_: None)
    for noise, rho in {"shared": 1, "progressive": 0.3, "independent": 0}.items():
        options = {"out": noise, "noise": noise, "correlation": 0.3, "steps": 1}
        train(Config(clips, **options, **TINY))
        ddpm = load(f"{noise}/last.pt")
        assert (ddpm.channels, ddpm.correlation, ddpm.shape) == (3, rho, (12, 8, 8))
    assert load("shared/last.pt").sample((1, 12, 8, 8), 2).shape == (1, 12, 8, 8)


def test_every_option_of_the_idea_changes_the_run(monkeypatch, clips):
    monkeypatch.setattr(supervideo, "save_grid", lambda *_: None)
    found = {}
    for name, options in {
        "default": {},
        "shared": {"noise": "shared"},
        "independent": {"noise": "independent"},
        "correlation": {"correlation": 0.9},
        "flow": {"flow_weight": True},
        "no penalty": {"reg_weight": 0.0},
        "no layers": {"temporal": False},
        "shorter": {"seq_len": 2},
    }.items():
        train(Config(out=name, **{**TINY, "data": clips, "steps": 5, **options}))
        found[name] = state(name)["net"]["net.init.weight"]
    names = [*found]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(found[a], found[b]), (a, b)
