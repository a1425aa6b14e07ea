"""The networks: shapes, sizes, what reaches what; against diffusers and by hand."""

import csv
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import finish, start
from test_family import small, train, work
from test_train import assert_same_run, state

import superarch
from superarch import ARCHS, Attention, Block, Config, NaiveUNet, build

OTHERS = sorted(ARCHS.keys() - {"base"})
others = pytest.mark.parametrize("arch", OTHERS)


def net(arch, size=8, channels=1, n_feat=16, **options):
    """Return a network whose last layers are not 0, as they would be at the start."""
    torch.manual_seed(0)
    cfg = Config(arch=arch, image_size=size, n_feat=n_feat, **options)
    made = build(cfg, (channels, size, size)).net.eval()
    for name, weight in made.named_parameters():
        if name.split(".")[-2:] in (["out", "weight"], ["out", "bias"]):
            torch.nn.init.normal_(weight, std=0.3)
    return made


def count(net):
    return sum(weight.numel() for weight in net.parameters())


def dropouts(made):
    return [m for m in made.modules() if isinstance(m, torch.nn.Dropout)]


@others
@pytest.mark.parametrize("size", [8, 12, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_has_the_shape_of_the_input(arch, size, channels):
    xt = torch.randn(2, channels, size, size)
    made = net(arch, size, channels, n_feat=8)
    assert made(xt, torch.tensor([1, 1000])).shape == xt.shape


@others
def test_the_time_matters_images_do_not_mix_and_all_weights_learn(arch):
    made, xt, t = net(arch), torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 900])
    all_three = made(xt, t)
    alone = made(xt[1:2], t[1:2])
    torch.testing.assert_close(all_three[1:2], alone, atol=1e-4, rtol=1e-4)
    assert (alone - made(xt[1:2], t[2:])).abs().max() > 1e-3
    made.train()(xt, t).square().sum().backward()
    for name, weight in made.named_parameters():
        assert weight.grad.abs().sum() > 0, name


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
    want += conv(1, a) + conv(a, a) + conv(b, b)  # init, and twice to half the size
    want += block(a, a, c_time) + block(a, b, c_time) + block(b, c, c_time)
    want += block(c + b, b, c_time) + block(b + a, a, c_time)
    want += 2 * a + conv(a, 1)
    made = build(Config(data="mnist", arch="film"), (1, 28, 28)).net
    assert count(made) == want == 1_961_089


def test_attention_has_the_sizes_of_its_recipe():
    """Width 128, multipliers 1,2,2,2, two blocks a level, dropout 0.01."""
    cfg = Config(data="cifar10", arch="attention", n_feat=128)
    made = build(cfg, (3, 32, 32)).net
    widths, n = [128, 256, 256, 256], 512
    want = (256 + 1) * n + (n + 1) * n + conv(3, 128) + 2 * 128 + conv(128, 3)
    want += block(128, 128, n) * 2 + block(128, 256, n) + block(256, 256, n) * 5
    want += conv(128, 128) + 2 * conv(256, 256)
    want += 2 * (block(512, 256, n) + block(256, 256, n))
    want += block(384, 128, n) + block(128, 128, n)
    want += 8 * (2 * 256 + conv(256, 3 * 256, 1) + conv(256, 256, 1))
    assert count(made) == want
    assert [level.blocks[-1].norm2.num_channels for level in made.down] == widths
    assert [layer.p for layer in dropouts(made)] == 14 * [0.01]
    sizes = {}
    for k, level in enumerate(made.down):
        level.register_forward_hook(lambda *x, k=k: sizes.update({k: x[2].shape[-1]}))
    made(torch.randn(1, 3, 32, 32), torch.tensor([1]))
    assert [*sizes.values()] == [32, 16, 8, 4]


def test_small_base_and_big_are_in_order():
    for data, shape in (("digits", (1, 8, 8)), ("cifar10", (3, 32, 32))):
        made = [build(Config(data=data, arch=x), shape) for x in ARCHS]
        sizes = dict(zip(ARCHS, map(count, made), strict=True))
        assert 2 * sizes["small"] < sizes["base"] < sizes["big"] / 2


def test_widths_blocks_and_levels_are_those_asked():
    made = net("custom", widths="16,48,8", blocks=3)
    levels = [*made.down, *made.up]
    assert [level.blocks[0].norm2.num_channels for level in levels] == [
        16,
        48,
        8,
        48,
        16,
    ]
    assert all(len(level.blocks) == 3 for level in levels)
    same = net("custom", mults="1,3,2", blocks=1), net("small", widths="16,48,32")
    assert count(same[0]) == count(same[1])
    for attend, want in (("", [1, 2]), ("0,3", [0, 3]), ("none", [])):
        made = net("attention", attend=attend)
        found = [level.attend[-1] for level in made.down]
        assert [k for k in range(4) if isinstance(found[k], Attention)] == want


# ---- against diffusers, imported here since it takes seconds -------------------------


@pytest.mark.parametrize("arch", ["base", "film"])
def test_the_time_is_told_as_in_diffusers(arch):
    from diffusers.models.embeddings import get_timestep_embedding

    made, t, seen = net(arch), torch.tensor([1, 77, 1000]), []
    made.time1.register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    made(torch.randn(3, 1, 8, 8), t)
    want = get_timestep_embedding(t, 32, downscale_freq_shift=0)
    torch.testing.assert_close(seen[0], want, atol=1e-4, rtol=0)


def copy_weights(ours, theirs):
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            torch.nn.init.normal_(mine, std=0.3)
            other.copy_(mine.view_as(other))


@pytest.mark.parametrize(("a", "b"), [(16, 16), (16, 32)])
def test_a_block_is_the_one_of_diffusers_with_film(a, b):
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    ours = Block(a, b, 24)
    theirs = ResnetBlock2D(
        in_channels=a,
        out_channels=b,
        temb_channels=24,
        groups=8,
        eps=1e-5,
        time_embedding_norm="scale_shift",
    )
    names = ("norm1", "conv1", "film", "norm2", "conv2", "skip")
    mine = [w for name in names for w in getattr(ours, name).parameters()]
    copy_weights(mine, theirs.parameters())
    x, temb = torch.randn(2, a, 5, 5), torch.randn(2, 24)
    torch.testing.assert_close(
        ours(x, F.silu(temb)), theirs(x, temb), atol=1e-4, rtol=1e-4
    )


def test_film_is_h_times_1_plus_gamma_plus_beta():
    torch.manual_seed(0)
    layer, x, temb = Block(8, 8, 4), torch.randn(2, 8, 3, 3), torch.randn(2, 4)
    seen = {}
    layer.norm2.register_forward_hook(lambda *x: seen.update(h=x[2]))
    layer.conv2.register_forward_hook(lambda *x: seen.update(given=x[1][0]))
    layer(x, temb)
    told = temb @ layer.film.weight.T + layer.film.bias
    for i in range(2):
        for c in range(8):
            want = seen["h"][i, c] * (1 + told[i, c]) + told[i, 8 + c]
            torch.testing.assert_close(seen["given"][i, c], F.silu(want))


def test_attention_equals_diffusers_and_starts_as_the_identity():
    from diffusers.models.attention_processor import Attention as TheirAttention

    torch.manual_seed(0)
    ours, x = Attention(16), torch.randn(2, 16, 3, 5)
    assert torch.equal(ours(x), x)
    theirs = TheirAttention(
        16,
        heads=4,
        dim_head=4,
        bias=True,
        norm_num_groups=8,
        eps=1e-5,
        residual_connection=True,
    )
    q, k, v = zip(ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True)
    mine = [*ours.norm.parameters(), *q, *k, *v, *ours.out.parameters()]
    copy_weights(mine, theirs.parameters())
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


# ---- what a pixel sees ---------------------------------------------------------------


def reach(arch, **options):
    """Return how far from a corner a pixel may lie that its output depends on.

    Without the GroupNorms, through whose mean and variance every pixel speaks a bit.
    """
    made = net(arch, 40, **options)
    for layer in made.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    xt = torch.randn(1, 1, 40, 40, requires_grad=True)
    made(xt, torch.tensor([5]))[0, 0, 0, 0].backward()
    return int(xt.grad[0, 0].nonzero().max())


def test_a_resnet_sees_near_pixels_only_if_it_does_not_attend():
    """Blocks of two 3x3 convolutions, and the first and the last: 1 pixel each."""
    assert reach("resnet") == 2 * 6 + 2 and reach("resnet", blocks=2) == 2 * 2 + 2
    assert reach("resnet", blocks=2, attend="0") == 39


def test_each_halving_doubles_what_a_pixel_sees():
    """On level k a 3x3 convolution reaches 2^k pixels; halving and doubling, too."""
    reaches = [reach("custom", widths=widths, blocks=1) for widths in ("8,8", "8,8,8")]
    assert 2 + 2 + 2 < reaches[0] < 40 and reaches[1] > 1.5 * reaches[0]
    assert reach("attention") == 39


# ---- naive ---------------------------------------------------------------------------


def wave(weights):
    """Fill weights with sines of their places, so that anyone can fill theirs alike."""
    with torch.no_grad():
        for k, w in enumerate(weights):
            i = torch.arange(w.numel(), dtype=torch.float64)
            w.copy_((0.7 * i + k).sin().view(w.shape) / w[0].numel() ** 0.5)


def test_naive_answers_as_the_unet_of_mindiffusion():
    """Figures of its mindiffusion/unet.py at commit 6c0abed, n_feat 8, t/T as there."""
    made = NaiveUNet(3, 8, 1000)
    wave(made.parameters())
    i = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    xt = (0.37 * i).sin().view(2, 3, 32, 32).float()
    eps_hat = made(xt, torch.tensor([1, 777]))
    want = torch.tensor([[0.9861, 0.5117, -0.1503], [1.1716, 0.6928, 0.0132]])
    torch.testing.assert_close(eps_hat[:, :, 5, 9], want, atol=2e-4, rtol=0)
    size = torch.tensor([0.6730, 0.6692])
    torch.testing.assert_close(eps_hat.abs().mean((1, 2, 3)), size, atol=2e-4, rtol=0)


def test_naive_has_the_weights_of_the_unet_of_mindiffusion():
    n = 32

    def triple(a, b):
        return conv(a, b) + 2 * conv(b, b) + 3 * 2 * b

    want = triple(3, n) + triple(n, n) + triple(n, 2 * n) + triple(2 * n, 2 * n)
    want += 2 * n + conv(2 * n, 2 * n, 1)  # time: a sine of its own for each channel
    want += conv(2 * n, 2 * n, 4) + 2 * 2 * n  # up0
    for a, b in ((4 * n, 2 * n), (4 * n, n), (2 * n, n)):
        want += conv(a, b, 2) + 2 * triple(b, b)
    want += conv(2 * n, 3)
    cfg = Config(data="celeba", arch="naive")
    assert cfg.n_feat == 32 and cfg.image_size == 32
    assert count(build(cfg, (3, 32, 32)).net) == want == 714_659


def test_the_time_enters_naive_at_two_places():
    """It is added to the vector, 2 n_feat channels, and behind up1; nowhere else."""
    made, seen = net("naive", 32), {}
    for name, layer in made.named_children():
        layer.register_forward_hook(
            lambda layer, given, out, name=name: seen.update({name: (given[0], out)})
        )
    made(torch.randn(2, 1, 32, 32), torch.tensor([1, 1000]))
    temb = seen["time2"][1][:, :, None, None]
    d2, d3 = (F.max_pool2d(seen[name][1], 2) for name in ("down2", "down3"))
    assert d3.shape == (2, 32, 4, 4) and seen["up0"][0].shape == (2, 32, 1, 1)
    vec = d3.mean((2, 3), keepdim=True) + temb
    torch.testing.assert_close(seen["up0"][0], vec)
    torch.testing.assert_close(seen["up1"][0], torch.cat([seen["up0"][1], d3], dim=1))
    after = torch.cat([seen["up1"][1] + temb, d2], dim=1)
    torch.testing.assert_close(seen["up2"][0], after)
    torch.testing.assert_close(seen["time1"][0], torch.tensor([[0.001], [1.0]]))


# ---- training ------------------------------------------------------------------------


def test_dropout_drops_its_share_in_training_only():
    made, xt = net("attention", dropout=0.25), torch.randn(2, 1, 8, 8)
    t, shares = torch.tensor([3, 700]), []
    assert torch.equal(made(xt, t), made(xt, t))
    for layer in dropouts(made):
        layer.register_forward_hook(
            lambda layer, given, out: shares.append((out == 0).float().mean())
        )
    made.train()
    assert not torch.equal(made(xt, t), made(xt, t))
    assert len(shares) == 2 * 14 and abs(sum(shares) / len(shares) - 0.25) < 0.03
    assert not dropouts(net("big")) and dropouts(net("big", dropout=0.1))


def test_dropout_is_off_in_pictures_and_on_again_behind_them(monkeypatch):
    def sample(self, shape, xt):
        assert not any(layer.training for layer in self.modules())
        return xt

    monkeypatch.setattr(superarch.DDPM, "sample", sample)
    monkeypatch.setattr(superarch, "plot_history", lambda *_: None)
    options = {"arch": "resnet", "blocks": 1, "dropout": 0.3}
    for name, cadence in (("seldom", 100), ("often", 1)):
        train("superarch", name, sample_every=cadence, **options)
    seldom, often = state("seldom"), state("often")
    assert all(torch.equal(w, often["net"][k]) for k, w in seldom["net"].items())


def note_seeds(cfg):
    """Train; write down with which seeds this process draws what it drops."""
    seed, seeds = torch.manual_seed, []
    torch.manual_seed = lambda number: (seeds.append(number), seed(number))
    superarch.train(cfg)
    name = f"seeds{torch.distributed.get_rank()}"
    torch.save(seeds[1:], name)  # the first is for the weights
    torch.distributed.destroy_process_group()


def test_two_processes_drop_apart_and_resume_bit_for_bit(monkeypatch):
    options = {"arch": "resnet", "blocks": 1, "dropout": 0.3}
    cfg = small("superarch", "whole", **options)
    assert finish(start(note_seeds, cfg, world=2)) == [0, 0]
    seeds = torch.load("seeds0") + torch.load("seeds1")
    assert len(seeds) == len({*seeds}) == 2 * 12  # no two alike
    cfg = small("superarch", "parts", resume="auto", **options)
    assert finish(start(work, "superarch", cfg, (5,), world=2))[0] == 7
    assert finish(start(work, "superarch", cfg, world=2)) == [0, 0]
    assert_same_run("whole", "parts")


@others
def test_every_network_learns_and_its_checkpoint_draws(arch, monkeypatch):
    options = {"steps": 40, "lr": 3e-3, "sample_every": 1000, "out": "run"}
    ask = sys.argv[:1] + ["--arch", arch, "--quiet", "--n-feat", "8"]
    ask += ["--batch", "32", "--n-train", "160"]
    for name, value in options.items():
        ask += [f"--{name.replace('_', '-')}", str(value)]
    if arch == "custom":
        ask += ["--widths", "16,8", "--attend", "1", "--dropout", "0.1"]
    monkeypatch.setattr(sys, "argv", ask)
    superarch.main()
    with open("run/metrics.csv") as f:
        assert float([*csv.DictReader(f)][-1]["held_loss"]) < 0.8  # guessing 0 costs 1
    again = superarch.load("run/last.pt")
    assert len(again.net.down) == 2 if arch == "custom" else again.net
    ask = ["--sample", "run/last.pt", "--n-samples", "2", "--sampling-steps", "2"]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:1], *ask, "--quiet"])
    superarch.main()
    assert superarch.Path("run/samples/000001.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "base", "mults": "1,2"}, "--arch base takes no --widths"),
        ({"arch": "naive", "blocks": 2}, "--arch naive takes no"),
        ({"arch": "naive", "dropout": 0.0}, "--arch naive takes no"),
        ({"arch": "resnet", "mults": "1,1"}, "--arch resnet has one level"),
        ({"arch": "custom", "mults": "1,x"}, "1,x is no list of numbers"),
        ({"arch": "custom", "mults": "1,0"}, "--mults 1, 2, 3"),
        ({"arch": "custom", "widths": "16,20"}, "--widths are 8, 16, 24"),
        ({"arch": "custom", "widths": "8", "mults": "1"}, "give one of them"),
        ({"arch": "custom", "mults": "1,1,1,1,1"}, "--image-size 8 has 4 levels at"),
        ({"arch": "custom", "attend": "3"}, "--attend is 0 to 2 or none"),
        ({"arch": "custom", "attend": "-1"}, "--attend is 0 to 2 or none"),
        ({"arch": "attention", "dropout": 1.0}, "--dropout below 1"),
        ({"arch": "attention", "dropout": -0.1}, "--dropout cannot be -0.1"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)


def test_a_refusal_is_told_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--arch", "naive", "--blocks", "3"])
    with pytest.raises(SystemExit, match="2"):
        superarch.main()
    said = capsys.readouterr().err
    assert "--arch naive takes no --widths" in said and "Traceback" not in said
