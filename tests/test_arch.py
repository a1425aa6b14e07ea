"""The networks: shapes, sizes, what reaches what; against formulas and minDiffusion."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_run, command_line, finish, start, state
from test_family import small, train
from torch.nn.attention import SDPBackend, sdpa_kernel

import superarch
from superarch import ARCHS, Attention, Config, NaiveUNet, build

OTHERS = ["naive", *ARCHS]
others = pytest.mark.parametrize("arch", OTHERS)
T12 = torch.tensor([1, 1000])


def net(arch, channels=1, n_feat=8, **options):
    """Return a network whose last layers are not 0, as they would be at the start."""
    torch.manual_seed(0)
    made = build(Config(arch=arch, n_feat=n_feat, **options), (channels, 8, 8)).net
    for name, weight in made.named_parameters():
        if name in ("out.weight", "out.bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return made.eval()


def kinds(made, kind):
    return [layer for layer in made.modules() if isinstance(layer, kind)]


def count(made):
    return sum(weight.numel() for weight in made.parameters())


@others
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 3), (30, 1)])
def test_output_has_the_shape_of_the_input(arch, size, channels):
    xt = torch.randn(2, channels, size, size)
    assert net(arch, channels)(xt, T12).shape == xt.shape


@others
def test_the_time_matters_images_do_not_mix_and_all_weights_learn(arch):
    made, xt, t = net(arch), torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 900])
    all_three, alone = made(xt, t), made(xt[1:2], t[1:2])
    torch.testing.assert_close(all_three[1:2], alone, atol=1e-4, rtol=1e-4)
    assert (alone - made(xt[1:2], t[2:])).abs().max() > 1e-3
    made.train()(xt, t).square().sum().backward()
    for name, weight in made.named_parameters():
        assert weight.grad.abs().sum() > 0, name


@others
def test_every_network_learns(arch):
    cfg = Config(arch=arch, n_feat=8)
    torch.manual_seed(0)
    ddpm = build(cfg, (1, 8, 8))
    x0 = superarch.load_images(cfg)[0][:64] / 127.5 - 1
    t, eps, losses = torch.arange(8, 1000, 16)[:62], torch.randn(62, 1, 8, 8), []
    opt = torch.optim.Adam(ddpm.parameters(), 3e-3)
    for _ in range(25):
        losses.append(ddpm(x0[:62], t, eps))
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_untrained_all_is_noise(arch):
    ddpm, xt = build(Config(arch=arch, n_feat=8), (1, 8, 8)), torch.randn(2, 1, 8, 8)
    assert torch.equal(ddpm.eps_hat(xt, T12), xt)
    torch.nn.init.ones_(ddpm.net.out.bias)
    torch.testing.assert_close(ddpm.eps_hat(xt, T12), xt + 1)


# ---- sizes, by hand ------------------------------------------------------------------


def conv(a, b, k=3):
    return k * k * a * b + b


def block(a, b, c_time):
    """Two GroupNorms, two convolutions, the way past them, the Linear of FiLM."""
    past = conv(a, b, 1) if a != b else 0
    return 2 * a + conv(a, b) + 2 * b + conv(b, b) + past + 2 * b * (c_time + 1)


def test_film_has_about_2_million_weights_on_mnist():
    n, a, b, c, c_time = 32, 64, 128, 192, 128
    want = (2 * n + 1) * c_time + (c_time + 1) * c_time  # the two layers for the time
    want += block(a, a, c_time) + block(a, b, c_time) + block(b, c, c_time)
    want += block(c + b, b, c_time) + block(b + a, a, c_time)
    want += conv(1, a) + 2 * a + conv(a, 1)
    assert count(net("film", n_feat=32)) == want == 1_776_577


def test_attention_has_the_sizes_of_its_recipe():
    """Width 128, multipliers 1,2,2,2, two blocks a level, attention at 16 and at 8."""
    made = net("attention", 3, n_feat=128, dropout=0.01)
    n = 512
    want = (256 + 1) * n + (n + 1) * n + conv(3, 128) + 2 * 128 + conv(128, 3)
    want += block(128, 128, n) * 2 + block(128, 256, n) + block(256, 256, n) * 5
    want += 2 * (block(512, 256, n) + block(256, 256, n))
    want += block(384, 128, n) + block(128, 128, n)
    want += 8 * (conv(256, 3 * 256, 1) + conv(256, 256, 1))
    assert count(made) == want
    assert [x.p for x in kinds(made, torch.nn.Dropout)] == 14 * [0.01]
    sizes = []
    for layer in kinds(made, Attention):
        layer.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[-1]))
    made(torch.randn(1, 3, 32, 32), T12[:1])
    assert sizes == [16, 16, 8, 8, 8, 8, 16, 16]


def test_the_others_are_what_their_names_say():
    sizes = {arch: count(net(arch)) for arch in ("small", "base", "big")}
    assert 2 * sizes["small"] < sizes["base"] < sizes["big"] / 2
    for widths in ((1, 3, 2), (2,)):
        levels = net("custom", widths=widths).levels
        found = [level[-1].norm2.num_channels // 8 for level in levels]
        assert found == [*widths, *widths[-2::-1]]
        assert all(len(level) == 2 for level in levels)
    assert count(net("small", widths=(1, 2, 4))) < count(net("big")) / 2


# ---- parts ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_the_time_is_that_of_the_base(arch):
    given = []
    for made in (net("base"), net(arch)):
        made.time1.register_forward_pre_hook(lambda _, x: given.append(x[0]))
        made(torch.randn(2, 1, 8, 8), T12)
    assert torch.equal(*given)


def test_a_unet_of_two_levels_by_hand():
    made, xt = net("small", widths=(1, 3)), torch.randn(2, 1, 10, 10)
    seen, ((a,), (b,), (c,)) = {}, made.levels
    a.register_forward_pre_hook(lambda _, given: seen.update(temb=given[1]))
    out = made(xt, T12)
    skip = a(made.init(xt), seen["temb"])
    means = skip.unflatten(3, (5, 2)).mean(4).unflatten(2, (5, 2)).mean(3)
    low = b(means, seen["temb"])  # (2, 24, 5, 5)
    h = torch.cat([low.repeat_interleave(2, 2).repeat_interleave(2, 3), skip], dim=1)
    h = made.norm(c(h, seen["temb"]))
    torch.testing.assert_close(out, made.out(h * h.sigmoid()))


def test_attention_is_a_weighted_mean_over_all_pixels():
    """Pixel by pixel, head by head; and its fused kernels take what it passes on."""
    torch.manual_seed(0)
    layer, x = Attention(16, 4, batch_first=True), torch.randn(2, 16, 3, 5)
    weight = layer.in_proj_weight.detach(), torch.randn(48)
    layer.in_proj_bias.data.copy_(weight[1])
    want = []
    for image in F.group_norm(x, 8).flatten(2):  # (c, pixels)
        heads = []
        parts = [p.chunk(4) for p in (weight[0] @ image + weight[1][:, None]).chunk(3)]
        for q, k, v in zip(*parts, strict=True):  # (d, pixels)
            looks = [(q[:, i] @ k / 4**0.5).softmax(0) for i in range(15)]
            heads.append(torch.stack([v @ look for look in looks], dim=1))
        want.append(layer.out_proj.weight @ torch.cat(heads))
    want = x + torch.stack(want).view_as(x)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # or else it raises an error
        torch.testing.assert_close(layer(x, None), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x, None), want, atol=1e-4, rtol=1e-4)


def reach(arch, **options):
    """Return how far from a corner a pixel may lie that its output depends on.

    Without the GroupNorms, through whose mean and variance every pixel speaks a bit.
    """
    made = net(arch, **options)
    for layer in kinds(made, torch.nn.GroupNorm):
        layer.forward = lambda x: x
    xt = torch.randn(1, 1, 40, 40, requires_grad=True)
    made(xt, T12[:1])[0, 0, 0, 0].backward()
    return int(xt.grad[0, 0].nonzero().max())


def test_what_a_pixel_sees():
    """A 3x3 convolution reaches 1 pixel, half the size doubles it, attention sees all.

    In small, the last convolution and the two of the block before it read pixels 0 to 3
    of the last map, that is 0 and 1 of the half-size one. Its block reads 0 to 3, which
    are means of 0 to 7; the first block and the first convolution add 3.
    """
    assert reach("resnet") == 2 * 6 + 2
    assert reach("small") == (3 // 2 + 2) * 2 + 1 + 3
    assert reach("custom", widths=(1, 1, 1)) > 1.5 * reach("custom", widths=(1, 1))
    assert reach("attention") == 39 > reach("custom", widths=(1, 2))


# ---- naive ---------------------------------------------------------------------------


def wave(weights):
    """Fill weights with sines of their places, so that anyone can fill theirs alike."""
    with torch.no_grad():
        for k, w in enumerate(weights):
            i = torch.arange(w.numel(), dtype=torch.float64)
            w.copy_((0.7 * i + k).sin().view(w.shape) / w[0].numel() ** 0.5)


def test_naive_answers_as_the_unet_of_mindiffusion():
    """Figures of its mindiffusion/unet.py at commit 6c0abed, n_feat 8, t/T as there."""
    ddpm = build(Config(arch="naive", n_feat=8), (3, 32, 32))
    wave(ddpm.net.parameters())
    i = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    xt = (0.37 * i).sin().view(2, 3, 32, 32).float()
    eps_hat = ddpm.eps_hat(xt, torch.tensor([1, 777]))
    want = torch.tensor([[0.9861, 0.5117, -0.1503], [1.1716, 0.6928, 0.0132]])
    torch.testing.assert_close(eps_hat[:, :, 5, 9], want, atol=2e-4, rtol=0)
    size = torch.tensor([0.6730, 0.6692])
    torch.testing.assert_close(eps_hat.abs().mean((1, 2, 3)), size, atol=2e-4, rtol=0)
    assert count(NaiveUNet(3, 32, 1000)) == 714_659


def test_naive_hears_the_time_at_two_places_and_never_rounds_it():
    made, seen = net("naive"), {}
    parts = {"time2": made.time2, "up0": made.up0, "up1": made.up[0], "up2": made.up[1]}
    for name, layer in parts.items():
        layer.register_forward_hook(
            lambda layer, given, out, name=name: seen.update({name: (given[0], out)})
        )
    xt, t = torch.randn(2, 1, 32, 32), torch.tensor([1, 1000])
    made(xt, t)
    temb, skip = seen["time2"][1], seen["up1"][0][:, 16:]  # d3, beside up0's
    vec = skip.mean((2, 3)) + temb
    torch.testing.assert_close(seen["up0"][0][:, :, 0, 0], vec)
    late = seen["up1"][1] + temb[:, :, None, None]
    torch.testing.assert_close(seen["up2"][0][:, :16], late)
    with torch.autocast("cpu", torch.bfloat16):
        made(xt, t)
    assert torch.equal(seen["time2"][1], temb) and seen["up0"][1].dtype != torch.float
    for T, t in ((1000, 500), (200, 100)):  # t / T counts, not t
        short = build(Config(arch="naive", n_feat=8, T=T), (1, 8, 8)).net
        wave(short.parameters())
        seen[T] = short(xt[:1], torch.tensor([t]))
    assert torch.equal(seen[1000], seen[200])


# ---- training ------------------------------------------------------------------------


def test_dropout_drops_its_share_in_training_only():
    made, xt = net("attention", dropout=0.25), torch.randn(8, 1, 8, 8)
    t, shares = torch.full((8,), 300), []
    assert torch.equal(made(xt, t), made(xt, t))
    for layer in kinds(made, torch.nn.Dropout):
        layer.register_forward_hook(
            lambda layer, given, out: shares.append((out == 0).float().mean())
        )
    made.train()
    assert not torch.equal(made(xt, t), made(xt, t))
    assert len(shares) == 2 * 14 and abs(sum(shares) / len(shares) - 0.25) < 0.03


def test_pictures_are_without_dropout_and_change_no_run(tiny, monkeypatch):
    def save_grid(ema, ddpm, *_):
        assert not any(layer.training for layer in (*ema.modules(), *ddpm.modules()))
        torch.rand(7)

    monkeypatch.setattr(superarch, "save_grid", save_grid)
    seed, seeds = torch.manual_seed, []
    monkeypatch.setattr(torch, "manual_seed", lambda x: (seeds.append(x), seed(x)))
    for name, cadence in (("seldom", 100), ("often", 1)):
        train("superarch", name, arch="small", dropout=0.3, every=cadence)
    assert len(seeds) == 2 * 13 and len({*seeds}) == 13  # weights, and each step anew
    seldom, often = state("seldom"), state("often")
    assert all(torch.equal(w, often["net"][k]) for k, w in seldom["net"].items())
    train("superarch", "without", arch="small", every=100)
    other = state("without")["net"]
    assert any(not torch.equal(w, other[k]) for k, w in seldom["net"].items())


def note_seeds(cfg):
    """Train; write down with which seeds this process draws what it drops."""
    seed, seeds = torch.manual_seed, []
    torch.manual_seed = lambda number: (seeds.append(number), seed(number))
    superarch.train(cfg)
    torch.save(seeds[1:], f"seeds{torch.distributed.get_rank()}")  # [0]: the weights
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_drop_apart_and_resume_bit_for_bit(tiny):
    options = {"arch": "small", "dropout": 0.3}
    cfg = small("superarch", "whole", **options)
    assert finish(start(note_seeds, cfg, world=2)) == [0, 0]
    seeds = torch.load("seeds0") + torch.load("seeds1")
    assert len(seeds) == len({*seeds}) == 2 * 12  # no two alike
    superarch.Path("parts").mkdir()
    superarch.Path("whole/checkpoint_epoch_001.pt").replace("parts/last.pt")
    cfg = small("superarch", "parts", resume=True, **options)
    assert finish(start(note_seeds, cfg, world=2)) == [0, 0]
    assert_same_run("whole", "parts")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--arch base --widths 1 2", "--arch base takes no --widths"),
        ("--arch naive --dropout 0.1", "--arch naive takes no"),
        ("--arch custom --widths 1 0", "invalid choice '0'"),
        ("--arch unet", "invalid choice 'unet'"),
        ("--arch attention --dropout 1.5", "between 0 and 1"),
        ("--arch attention --dropout -0.1", "--dropout cannot be -0.1"),
    ],
)
def test_what_does_not_fit_is_refused(capsys, line, words):
    assert command_line(superarch, line) == 2
    said = capsys.readouterr().err
    assert words in said.replace("'--widths'", "--widths") and "Traceback" not in said
    assert not superarch.Path("runs").exists()


def test_the_command_line_makes_the_network_that_it_asks_for(tiny):
    line = "--arch custom --widths 1 3 --dropout 0.1 --steps 3 --quiet"
    assert command_line(superarch, f"--data {tiny} {line} --out run") == 0
    made = superarch.load("run/last.pt").net
    assert [level[-1].norm2.num_channels for level in made.levels] == [8, 24, 8]
    assert {layer.p for layer in kinds(made, torch.nn.Dropout)} == {0.1}
