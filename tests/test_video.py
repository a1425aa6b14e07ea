"""Clips, noise that frames share, the penalty, the temporal layers, what is written."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import state

import supervideo
from supervideo import (
    Config,
    InTime,
    animate,
    bounce,
    build,
    correlate,
    displacement,
    flicker,
    load_images,
    rng,
    set_moving,
    strips,
    train,
)

TINY = {"n_feat": 8, "n_train": 40, "batch": 4, "seq_len": 3, "canvas": 12, "speed": 2}
TINY |= {"quiet": True, "sample_every": 100, "save_every": 100}


def model(channels=1, awake=True, **options):
    """Return an untrained DDPM for clips; awake: no layer is 0 any more."""
    torch.manual_seed(0)
    cfg = Config(**{"n_feat": 8, "seq_len": 4, **options})
    ddpm = build(cfg, (cfg.seq_len * channels, 12, 12)).eval()
    for name, weight in ddpm.net.named_parameters():
        if awake and name.split(".")[-2] == "out":
            torch.nn.init.normal_(weight, std=0.3)
    return ddpm


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=rng("cpu", seed))


# ---- generated clips ---------------------------------------------------------------


def test_points_bounce_as_a_ball_does_step_by_step():
    at = bounce(400, 30, 5, 2, rng("cpu", 1))
    assert at.shape == (400, 30, 2) and at.min() == 0 and at.max() == 5
    seen = set()
    for path in at.reshape(400, 30, 2).movedim(-1, 1).reshape(800, 30).tolist():
        fits = []
        for v in range(-2, 3):
            p, way, speed = path[0], [path[0]], v
            for _ in range(29):
                p += speed
                if p < 0 or p > 5:
                    p = -p if p < 0 else 10 - p
                    speed = -speed
                elif p in (0, 5) and speed and p - speed not in (0, 5):
                    pass
                way.append(p)
                if p == 0 and speed < 0 or p == 5 and speed > 0:
                    speed = -speed
            fits += [v] if way == path else []
        assert fits, path
        seen |= set(fits)
    assert seen == {-2, -1, 0, 1, 2}
    moves = at.diff(dim=1).abs().sum((1, 2))
    assert moves.min() > 0  # nobody stands still
    assert torch.equal(at, bounce(400, 30, 5, 2, rng("cpu", 1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_each_frame_is_the_image_pasted_where_the_point_is(channels):
    cfg = Config(seq_len=5, canvas=16, speed=2)
    g = rng("cpu", 2)
    images = torch.randint(0, 256, (40, channels, 8, 8), generator=g, dtype=torch.uint8)
    clips, motion = set_moving(images, cfg, rng("cpu", 3))
    at = bounce(40, 5, 8, 2, rng("cpu", 3)).tolist()
    assert clips.shape == (40, 5 * channels, 16, 16) and clips.dtype == torch.uint8
    for i in range(40):
        for f, (y, x) in enumerate(at[i]):
            frame = np.zeros((channels, 16, 16), np.uint8)
            frame[:, y : y + 8, x : x + 8] = images[i]
            own = clips[i, f * channels : (f + 1) * channels]
            assert np.array_equal(frame, own)
            if f:
                y0, x0 = at[i][f - 1]
                assert motion[i, f - 1] == pytest.approx(np.hypot(y - y0, x - x0))


def test_the_motion_of_real_clips_is_measured_exactly():
    """The generator knows the truth; so does numpy's roll, for any picture."""
    clips, motion, held, _ = load_images(Config(n_train=200, speed=2))
    assert clips.shape == (200, 8, 12, 12) and held.shape == (128, 8, 12, 12)
    shift, match = displacement(clips / 127.5 - 1, 1)
    assert torch.equal(shift.float().norm(dim=-1), motion)
    torch.testing.assert_close(match, torch.ones(200, 7))
    for dy, dx in [(0, 0), (3, -2), (-7, 6), (1, 8)]:
        first = normal(1, 3, 16, 16).sigmoid().numpy()
        clip = np.concatenate([first, np.roll(first, (dy, dx), (2, 3))], axis=1)
        shift, match = displacement(torch.tensor(clip) * 2 - 1, 3)
        assert [(d + 8) % 16 for d in shift[0, 0].tolist()] == [
            (dy + 8) % 16,
            (dx + 8) % 16,
        ]
        assert match.item() == pytest.approx(1, abs=1e-4)
    _, match = displacement(normal(1, 2, 16, 16).sigmoid() * 2 - 1, 1)
    assert match < 0.95  # two pictures that have nothing to do with one another


def test_clips_follow_from_the_seed_and_held_ones_never_change():
    one, again, two = (load_images(Config(n_train=30, seed=k)) for k in (0, 0, 1))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], two[0])
    assert torch.equal(one[2], two[2]) and torch.equal(one[3], two[3])


# ---- clips from files --------------------------------------------------------------


def numbered(n=10, frames=7, size=8, channels=()):
    """Return clips (n, frames, size, size) whose pixels tell clip and frame."""
    value = 20 * np.arange(n)[:, None] + np.arange(frames)
    shape = (n, frames, size, size, *channels)
    return np.broadcast_to(
        value.reshape(n, frames, *[1] * (len(shape) - 2)), shape
    ).astype(np.uint8)


def write_folders(root, clips):
    for i, clip in enumerate(clips):
        folder = Path(root, "nested", f"clip{i:02}")
        folder.mkdir(parents=True)
        for f, frame in enumerate(clip):
            Image.fromarray(frame).save(folder / f"{f:03}.png")
    return root


@pytest.mark.parametrize("data", ["npz", "frames"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_clips_from_files_are_cut_in_order_and_held_out_whole(data, channels):
    clips = numbered(channels=channels)
    if channels:
        clips = clips.copy()
        clips[..., 1] += 1  # not grey
    name = "moving.npz" if data == "npz" else "films"
    np.savez(name, clips=clips) if data == "npz" else write_folders(name, clips)
    cfg = Config(data=data, data_dir=name, image_size=8, seq_len=3, quiet=True)
    images, motion, held, held_motion = load_images(cfg)
    c = 3 if channels else 1
    assert images.shape == (16, 3 * c, 8, 8) and held.shape == (4, 3 * c, 8, 8)
    assert motion is held_motion is None
    found = []
    for part in (images, held):
        for clip in part[:, ::c, 0, 0].tolist():  # red
            i, f = divmod(clip[0], 20)
            assert clip == [20 * i + f, 20 * i + f + 1, 20 * i + f + 2] and f in (0, 3)
            found.append((i, f))
    assert sorted(found) == [(i, f) for i in range(10) for f in (0, 3)]
    assert not {i for i, _ in found[:16]} & {i for i, _ in found[16:]}
    if channels:
        assert torch.equal(images[:, 1::3], images[:, ::3] + 1)


@pytest.mark.parametrize("data", ["npz", "frames"])
@pytest.mark.parametrize("pixels", [(), (4, 4)])
def test_motion_from_files_stays_with_its_clip(data, pixels):
    """Motion here: 100 clip + frame + 1; if it stands for pixels, the mean counts."""
    name = "moving.npz" if data == "npz" else "films"
    clips = numbered()
    np.savez(name, clips) if data == "npz" else write_folders(name, clips)
    Path("motion").mkdir()
    for i in range(10):
        motion = (100 * i + np.arange(6.0) + 1).reshape(6, *[1] * len(pixels))
        motion = np.broadcast_to(motion, (6, *pixels)).copy()
        if pixels:
            motion[:, 0] += 1
            motion[:, 1] -= 1
        key = f"{i:06}" if data == "npz" else f"clip{i:02}"
        np.save(f"motion/{key}.npy", motion)
    options = {"data": data, "data_dir": name, "image_size": 8, "seq_len": 3}
    cfg = Config(**options, flow_weight=True, motion_dir="motion", quiet=True)
    images, motion, held, held_motion = load_images(cfg)
    for x, own in ((images, motion), (held, held_motion)):
        i, f = x[:, 0, 0, 0].long() // 20, x[:, 0, 0, 0].long() % 20
        want = torch.stack([100 * i + f + 1, 100 * i + f + 2], dim=1).float()
        assert own.shape == (len(x), 2)
        torch.testing.assert_close(own, want)


def test_files_that_do_not_fit_are_refused_in_a_line():
    np.savez("short.npz", clips=numbered(frames=2))
    np.savez("floats.npz", clips=numbered() / 255)
    np.savez("good.npz", clips=numbered())
    Path("foreign.npz").write_text("no zip")
    npz = {"data": "npz", "image_size": 8, "seq_len": 3, "quiet": True}
    for file in ("none.npz", "foreign.npz"):
        with pytest.raises(FileNotFoundError, match="wants --data-dir FILE.npz"):
            load_images(Config(**npz, data_dir=file))
    with pytest.raises(ValueError, match="floats.npz holds float64"):
        load_images(Config(**npz, data_dir="floats.npz"))
    with pytest.raises(ValueError, match="5 or more clips of 3 frames"):
        load_images(Config(**npz, data_dir="short.npz"))
    with pytest.raises(ValueError, match="5 or more clips"):
        load_images(Config(**{**npz, "data": "frames"}, data_dir="nowhere"))
    moving = {**npz, "data_dir": "good.npz", "flow_weight": True}
    with pytest.raises(FileNotFoundError, match="there is no array m/0000"):
        load_images(Config(**moving, motion_dir="m"))
    Path("m").mkdir()
    for i in range(10):
        np.save(f"m/{i:06}.npy", np.ones(5))
    with pytest.raises(ValueError, match="wants 6 rows >= 0 for 7 frames"):
        load_images(Config(**moving, motion_dir="m"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seq_len": 0}, "--seq-len is 1"),
        ({"correlation": 1.5}, "--correlation is 0 to 1"),
        ({"canvas": 8}, "--canvas is a multiple of 4 above --image-size"),
        ({"canvas": 18}, "--canvas is a multiple of 4"),
        ({"speed": 0}, "--speed is 1 or more"),
        ({"data": "npz", "seq_len": 1}, "wants --seq-len 2 or more"),
        ({"data": "frames", "flow_weight": True}, "wants --motion-dir"),
        ({"motion_dir": "m"}, "--motion-dir is for"),
        ({"data": "npz", "motion_dir": "m"}, "--motion-dir is for"),
        ({"data": "frames", "skip_bad_images": True}, "no neighbours"),
        ({"noise": "mixed", "reg_weight": -1.0}, "--reg-weight cannot be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Config(**options)


# ---- noise -------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 1.0])
def test_noise_is_normal_in_each_frame_and_correlated_as_asked(rho):
    eps = correlate(normal(20000, 4 * 2, 2, 2), 2, rho)
    x = eps.unflatten(1, (4, 2)).movedim(1, -1).flatten(0, -2).double()  # (n, F)
    apart = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    torch.testing.assert_close(x.T.cov(), rho ** apart.double(), atol=0.02, rtol=0)
    kurtosis = (x**4).mean(0) / (x**2).mean(0) ** 2
    torch.testing.assert_close(kurtosis, torch.full_like(kurtosis, 3), atol=0.1, rtol=0)
    own = normal(20000, 4 * 2, 2, 2)
    assert torch.equal(eps[:, :2], own[:, :2])
    if rho == 1:  # one eps for all frames, to the bit
        assert all(torch.equal(frame, own[:, :2]) for frame in eps.split(2, dim=1))
    if rho == 0:
        assert torch.equal(eps, own)


@pytest.mark.parametrize(
    ("noise", "rho"), [("shared", 1), ("mixed", 0.7), ("independent", 0)]
)
def test_training_and_sampling_use_the_noise_that_is_asked(noise, rho):
    """With x_0 = 0 the net sees sqrt(1 - abar) eps; and the samplers' x_T and z."""
    ddpm = model(noise=noise, correlation=0.7)
    seen = []
    ddpm.net.forward = lambda xt, t: seen.append(xt) or torch.zeros_like(xt)
    ddpm.residual(
        torch.zeros(500, 4, 12, 12), torch.full((500,), 700), normal(500, 4, 12, 12)
    )
    ddpm.sample((500, 4, 12, 12), steps=1, generator=rng("cpu", 2))
    ab = ddpm.alphabar[700]
    z = ddpm.p_sample(
        torch.zeros(500, 4, 12, 12), torch.full((500,), 700), rng("cpu", 3)
    )
    t, s = torch.full((500,), 700), torch.full((500,), 400)
    y = ddpm.ddim_step(torch.zeros(500, 4, 12, 12), t, s, 1.0, rng("cpu", 4))
    own = [seen[0] / (1 - ab).sqrt(), seen[1], z / ddpm.beta[700].sqrt(), y / y.std()]
    for eps in own:
        x = eps.movedim(1, 0).flatten(1).double()
        apart = (torch.arange(4)[:, None] - torch.arange(4)).abs()
        torch.testing.assert_close(x.cov(), rho ** apart.double(), atol=0.03, rtol=0)
    if noise == "shared":
        for eps in own:
            assert all(torch.equal(eps[:, :1], eps[:, f : f + 1]) for f in range(4))


# ---- the penalty -------------------------------------------------------------------


def test_the_loss_is_eq_14_plus_the_penalty_as_promised():
    """Shared eps: the penalty is the difference of neighbouring eps_hat, by hand."""
    ddpm = model(channels=3, noise="shared", reg_weight=0.25)
    x0, eps = normal(5, 12, 12, 12), normal(5, 12, 12, 12, seed=2)
    t = torch.tensor([1, 200, 400, 700, 1000])
    one = eps[:, :3].repeat(1, 4, 1, 1)
    xt = ddpm.q_sample(x0, t, one)
    eps_hat = ddpm.eps_hat(xt, t)
    mse = (eps_hat - one).square().mean()
    frames = eps_hat.view(5, 4, 3, 12, 12)
    pairs = torch.zeros(5, 3)
    for b in range(5):
        for f in range(3):
            pairs[b, f] = (frames[b, f + 1] - frames[b, f]).square().mean()
    torch.testing.assert_close(ddpm(x0, t, eps), mse + 0.25 * pairs.mean())
    motion = normal(5, 3, seed=3).abs()
    ddpm.calm = 1 / (1 + motion)
    want = mse + 0.25 * (pairs / (1 + motion)).mean()
    torch.testing.assert_close(ddpm(x0, t, eps), want)
    ddpm.reg_weight = 0.0
    torch.testing.assert_close(ddpm(x0, t, eps), mse)


@pytest.mark.parametrize("noise", ["shared", "mixed", "independent"])
def test_the_penalty_is_0_where_eps_hat_is_eps_whatever_the_noise(noise):
    ddpm = model(noise=noise, reg_weight=1.0)
    x0, t = normal(5, 4, 12, 12), torch.tensor([1, 200, 400, 700, 1000])
    ab = ddpm.alphabar[t][:, None, None, None]

    def knows(xt, t):
        return (xt - ab.sqrt() * x0) / (1 - ab).sqrt()

    ddpm.net.forward = knows
    assert ddpm(x0, t, normal(5, 4, 12, 12, seed=2)) < 1e-6
    ddpm.net.forward = lambda xt, t: knows(xt, t) + 1  # wrong, but alike in all frames
    assert ddpm(x0, t, normal(5, 4, 12, 12, seed=2)) == pytest.approx(1, abs=1e-3)


def test_the_jitter_of_x0_hat_is_the_penalty_times_noise_over_signal():
    ddpm = model(noise="shared")
    x0, eps, t = (
        normal(5, 4, 12, 12),
        normal(5, 4, 12, 12, seed=2),
        torch.full((5,), 300),
    )
    error = ddpm.residual(x0, t, eps)
    ab = ddpm.alphabar[300]
    eps = correlate(eps, 1, 1.0)
    xt = ddpm.q_sample(x0, t, eps)
    x0_hat = (xt - (1 - ab).sqrt() * ddpm.eps_hat(xt, t)) / ab.sqrt()
    want = flicker(error, 1) * (1 - ab) / ab
    torch.testing.assert_close(flicker(x0_hat - x0, 1), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("data", ["digits", "npz"])
def test_the_weights_of_a_step_belong_to_the_clips_of_that_step(monkeypatch, data):
    """What forward gets as weights fits the motion that is measured in its x0."""
    options = {"flow_weight": True, **TINY}
    if data == "npz":
        own = Config(n_train=60, seq_len=3, canvas=12, speed=2)
        clips, motion = load_images(own)[:2]
        np.savez("moving.npz", clips=clips.numpy())
        Path("m").mkdir()
        for i, own in enumerate(motion.numpy()):
            np.save(f"m/{i:06}.npy", own)
        options |= {"data": "npz", "data_dir": "moving.npz", "motion_dir": "m"}
        options |= {"image_size": 12}
    seen, forward = [], supervideo.DDPM.forward

    def spy(self, x0, t, eps):
        shift, _ = displacement(x0, 1)
        seen.append((self.calm, 1 / (1 + shift.float().norm(dim=-1))))
        return forward(self, x0, t, eps)

    monkeypatch.setattr(supervideo.DDPM, "forward", spy)
    train(Config(out="run", steps=5, **options))
    assert len(seen) == 5
    for calm, want in seen:
        assert calm.shape == (4, 2)
        torch.testing.assert_close(calm, want)


# ---- the network -------------------------------------------------------------------


def test_a_new_temporal_layer_changes_nothing():
    """So a video model may start from an image model: --init takes its weights."""
    plain, video = model(temporal=False), model(awake=False)
    assert not any("in_time" in name for name in plain.state_dict())
    new = {name for name in video.state_dict() if "in_time" in name}
    assert len({name.split(".")[2] for name in new}) == 4 and len(new) == 24
    video.load_state_dict(plain.state_dict(), strict=False)
    xt, t = normal(3, 4, 12, 12), torch.tensor([1, 300, 900])
    assert torch.equal(plain.eps_hat(xt, t), video.eps_hat(xt, t))
    frames = [plain.eps_hat(xt[:, f : f + 1], t) for f in range(4)]
    torch.testing.assert_close(plain.eps_hat(xt, t), torch.cat(frames, dim=1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("temporal", [False, True])
def test_frames_hear_of_one_another_only_through_temporal_layers(channels, temporal):
    ddpm = model(channels, temporal=temporal)
    xt, t = normal(2, 4 * channels, 12, 12), torch.tensor([100, 800])
    other = xt.clone()
    other[0, channels : 2 * channels] += 1  # the second frame of the first clip
    change = (ddpm.eps_hat(xt, t) - ddpm.eps_hat(other, t)).abs()
    change = change.unflatten(1, (4, channels)).amax((2, 3, 4))  # (clip, frame)
    assert change[0, 1] > 1e-3 and change[1].max() < 1e-5
    assert (change[0, [0, 2, 3]] > 1e-4).all() == temporal
    assert (change[0, [0, 2, 3]] < 1e-5).all() != temporal


def test_a_temporal_layer_is_two_convolutions_over_the_frames_by_hand():
    torch.manual_seed(0)
    layer = InTime(8)
    x = normal(2 * 5, 8, 3, 2)
    assert torch.equal(layer(x, 2), x)
    torch.nn.init.normal_(layer.out.weight)
    torch.nn.init.normal_(layer.out.bias)
    h = torch.nn.functional.silu(layer.norm(x)).view(2, 5, 8, 3, 2)
    want = x.clone().view(2, 5, 8, 3, 2)
    for b in range(2):
        for i in range(3):
            for j in range(2):
                pixel = h[b, :, :, i, j].T[None]  # (1, c, F)
                for conv in (layer.conv, layer.out):
                    if conv is layer.out:
                        pixel = torch.nn.functional.silu(pixel)
                    kernel = conv.weight[..., 0]  # (c, c, 3)
                    pixel = torch.nn.functional.conv1d(
                        pixel, kernel, conv.bias, padding=1
                    )
                want[b, :, :, i, j] += pixel[0].T
    torch.testing.assert_close(layer(x, 2).view_as(want), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_without_time_shared_noise_makes_still_pictures_and_own_noise_strangers(
    sampler,
):
    """Why it cannot move: each frame is one function of its own noise, and no more."""
    still = model(temporal=False, noise="shared", T=25)
    clip = still.sample((2, 4, 12, 12), 5, sampler, generator=rng("cpu", 1))
    for frame in clip.split(1, dim=1):
        assert torch.equal(frame, clip[:, :1])
    if sampler == "ddim":
        apart, xt = model(temporal=False, noise="independent"), normal(2, 4, 12, 12)
        clip = apart.sample(xt.shape, 5, xt=xt)
        for f in range(4):
            alone = apart.sample((2, 1, 12, 12), 5, xt=xt[:, f : f + 1])
            torch.testing.assert_close(clip[:, f : f + 1], alone, atol=1e-3, rtol=0)


# ---- runs --------------------------------------------------------------------------


def test_a_video_model_starts_from_a_checkpoint_of_images(capsys):
    import superminddpm as base

    few = {"n_feat": 8, "n_train": 40, "batch": 4, "steps": 2, "lr": 1e-2}
    base.train(base.Config(out="images", quiet=True, **few))
    options = {**TINY, "quiet": False, "steps": 1, "lr": 0.0}
    train(Config(out="run", init="images/last.pt", **options))
    said = capsys.readouterr().out
    old, new = state("images")["ema"], state("run")["net"]
    taken = [name for name in new if name in old]
    assert all(torch.equal(old[name], new[name]) for name in taken)
    assert {name for name in new if name not in old} == {
        n for n in new if "in_time" in n
    }
    assert "drawn clips move" in said and "real ones" in said


def test_flow_weights_and_noise_change_the_run():
    found = {}
    for name, options in {
        "default": {},
        "shared": {"noise": "shared"},
        "independent": {"noise": "independent"},
        "flow": {"flow_weight": True},
        "no penalty": {"reg_weight": 0.0},
        "still": {"temporal": False},
    }.items():
        train(Config(out=name, steps=3, lr=1e-2, **{**TINY, **options}))
        found[name] = state(name)["net"]["net.init.weight"]
    names = [*found]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(found[a], found[b]), (a, b)


def test_a_run_and_its_samples_leave_strips_and_films(monkeypatch):
    argv = "--out run --steps 2 --batch 4 --n-train 40 --n-feat 8 --seq-len 3 --quiet"

    def main(words):
        monkeypatch.setattr("sys.argv", ["supervideo.py", *words.split()])
        supervideo.main()

    main(argv)
    film = Image.open("run/samples_epoch_001.webp")
    assert film.n_frames == 3 and film.size == (4 * 62, 4 * 62)
    page = np.asarray(Image.open("run/samples_epoch_001.png"))
    assert page.shape[:2] == (16 * 62, 3 * 60 + 2)
    with open("run/metrics.csv") as f:
        assert float(next(csv.DictReader(f))["held_loss"]) > 0

    ask = "--sample run/last.pt --quiet --n-samples 5 --sampling-steps 2 --batch 2"
    main(f"{ask} --out a")
    main(f"{ask} --out b")
    names = sorted(path.name for path in Path("a").iterdir())
    assert names == [*(f"{i:06}.png" for i in range(5)), "grid.png", "grid.webp"]
    for name in names:
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    clip = np.asarray(Image.open("a/000003.png"))
    assert clip.shape == (12, 3 * 12)
    film = Image.open("a/grid.webp")
    assert film.n_frames == 3 and film.size == (3 * 62, 2 * 62)
    for f in range(3):  # the fourth clip, f-th frame: second row, first column
        film.seek(f)
        shown = np.asarray(film.convert("L"))[62:122:5, 0:60:5]
        assert np.abs(shown.astype(int) - clip[:, 12 * f : 12 * f + 12]).max() <= 1
    main(f"{ask} --seq-len 6 --noise independent --out longer")
    assert Image.open("longer/000000.png").size == (6 * 12, 12)
    assert Image.open("longer/grid.webp").n_frames == 6
    main(f"{ask} --noise shared --out still")  # the layers of time are still near 0
    frames = np.split(np.asarray(Image.open("still/000000.png")).astype(int), 3, axis=1)
    assert max(np.abs(frame - frames[0]).max() for frame in frames) < 20
    frames = np.split(clip.astype(int), 3, axis=1)
    assert max(np.abs(frame - frames[0]).max() for frame in frames) > 50


def test_strips_and_films_show_each_frame_once_in_order():
    clips = torch.arange(2 * 4 * 3).view(2, 12, 1, 1).expand(2, 12, 8, 8) / 12 - 1
    shown = strips(clips, 3)
    assert shown.shape == (2, 3, 8, 32)
    for b in range(2):
        for f in range(4):
            frame = clips[b, 3 * f : 3 * f + 3]
            assert torch.equal(shown[b, :, :, 8 * f : 8 * f + 8], frame)
    animate(clips, 3, "film.webp")
    film = Image.open("film.webp")
    assert film.n_frames == 4
    for f in range(4):
        film.seek(f)
        pixels = np.asarray(film.convert("RGB"))
        for b in range(2):
            want = (clips[b, 3 * f : 3 * f + 3, 0, 0] + 1) * 127.5
            own = pixels[5, b * 66 + 5]
            assert np.abs(own - want.numpy()).max() < 1
