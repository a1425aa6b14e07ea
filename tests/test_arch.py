"""The networks: shapes, sizes, what reaches what, against diffusers and by hand."""

import pytest
import torch
import torch.nn.functional as F
from test_train import SMALL, state

import superarch
from superarch import ARCHS, Attention, Config, NaiveUNet, build, held_out_loss, rng

OTHERS = sorted(ARCHS.keys() - {"base"})
others = pytest.mark.parametrize("arch", OTHERS)


def net(arch, size=8, channels=1, n_feat=8, **options):
    """Return a network whose last layer is not 0, as it would be at the start."""
    torch.manual_seed(0)
    cfg = Config(arch=arch, image_size=size, n_feat=n_feat, **options)
    made = build(cfg, (channels, size, size)).net.eval()
    for name, weight in made.named_parameters():
        if name.split(".")[-2:] in (["out", "weight"], ["out", "bias"]):
            torch.nn.init.normal_(weight, std=0.3)
    return made


def count(net):
    return sum(weight.numel() for weight in net.parameters())


@others
@pytest.mark.parametrize("size", [8, 12, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_has_the_shape_of_the_input(arch, size, channels):
    xt = torch.randn(2, channels, size, size)
    assert net(arch, size, channels)(xt, torch.tensor([1, 1000])).shape == xt.shape


@others
def test_the_time_matters_images_do_not_mix_and_all_weights_learn(arch):
    made, xt, t = net(arch), torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 900])
    all_three = made(xt, t)
    alone = made(xt[1:2], t[1:2])
    torch.testing.assert_close(all_three[1:2], alone, atol=1e-4, rtol=1e-4)
    assert (alone - made(xt[1:2], t[2:])).abs().max() > 1e-3
    made.train()(xt, t).square().sum().backward()
    silent = [name for name, w in made.named_parameters() if not w.grad.abs().sum()]
    # behind a GroupNorm one channel a group wide, a 1x1 map is 0 and so is its slope
    assert len(silent) < 0.2 * len([*made.parameters()]), silent


def test_sizes():
    sizes = {arch: count(net(arch, 32, 3, 32)) for arch in ARCHS}
    assert sizes["small"] < sizes["base"] < sizes["big"]
    assert 1.6e6 < sizes["film"] < 2.4e6
    assert count(net("attention", 32, 3, 128)) > 15e6
    wider = net("custom", n_feat=8, mults="1,2,4,4", blocks=3)
    assert len(wider.down) == 4 and len(wider.up) == 3
    assert all(len(level.blocks) == 3 for level in (*wider.down, *wider.up))
    widths = [level.blocks[0].conv2.out_channels for level in wider.down]
    assert widths == [8, 16, 32, 32]


def test_attention_is_at_the_levels_asked_and_equals_softmax_by_hand():
    made = net("attention", attend="0,3")
    found = [isinstance(level.attend[0], Attention) for level in made.down]
    assert found == [True, False, False, True]
    torch.manual_seed(0)
    layer, x = Attention(16), torch.randn(2, 16, 3, 5)
    assert torch.equal(layer(x), x)  # it starts as if it were not there
    torch.nn.init.normal_(layer.out.weight)
    qkv = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)  # (B, c, pixels) each
    heads = []
    for q, k, v in zip(*(part.split(4, dim=1) for part in qkv), strict=True):
        heads.append(v @ (q.mT @ k / 2).softmax(-1).mT)
    want = x + layer.out(torch.cat(heads, dim=1).view_as(x))
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


def test_a_resnet_sees_near_pixels_only_and_a_unet_sees_all():
    """6 blocks of two 3x3 convolutions, the first and the last: 14 pixels each way.

    Through GroupNorm's mean and variance a far pixel still speaks; without it, not.
    """
    reach = {}
    for arch in ("resnet", "big"):
        made = net(arch, 40, blocks=6 if arch == "resnet" else 0)
        for layer in made.modules():
            if isinstance(layer, torch.nn.GroupNorm):
                layer.forward = lambda x: x
        xt = torch.randn(1, 1, 40, 40, requires_grad=True)
        made(xt, torch.tensor([5]))[0, 0, 0, 0].backward()
        reach[arch] = int(xt.grad[0, 0].nonzero().max())
    assert reach["resnet"] == 14 and reach["big"] > 14


def test_naive_is_the_unet_of_the_core():
    """At 32x32, step by step as SPEC has it: widths, sizes, where the time enters."""
    n, seen = 16, {}
    torch.manual_seed(0)
    made = NaiveUNet(3, n, 1000)
    for name, layer in made.named_children():
        layer.register_forward_hook(
            lambda layer, given, out, name=name: seen.update({name: (given[0], out)})
        )
    made(torch.randn(2, 3, 32, 32), torch.tensor([1, 1000]))
    shapes = {name: tuple(out.shape[1:]) for name, (_, out) in seen.items()}
    assert shapes["down1"] == (n, 32, 32) and shapes["down2"] == (2 * n, 16, 16)
    assert shapes["down3"] == (2 * n, 8, 8) and shapes["up0"] == (2 * n, 4, 4)
    assert shapes["up1"] == (2 * n, 8, 8) and shapes["up2"] == (n, 16, 16)
    assert shapes["up3"] == (n, 32, 32) and shapes["out"] == (3, 32, 32)
    temb = seen["time2"][1][:, :, None, None]
    d3 = F.max_pool2d(seen["down3"][1], 2)
    vec = F.gelu(F.avg_pool2d(d3, 4)) + temb
    torch.testing.assert_close(seen["up0"][0], vec)
    d2, d1 = (F.max_pool2d(seen[name][1], 2) for name in ("down2", "down1"))
    torch.testing.assert_close(seen["up1"][0], torch.cat([seen["up0"][1], d3], dim=1))
    up2 = torch.cat([seen["up1"][1] + temb, d2], dim=1)
    torch.testing.assert_close(seen["up2"][0], up2)
    torch.testing.assert_close(seen["up3"][0], torch.cat([seen["up2"][1], d1], dim=1))
    torch.testing.assert_close(seen["time1"][0], torch.tensor([[0.001], [1.0]]))


def test_dropout_drops_in_training_only_and_by_seed():
    made, xt = net("attention", dropout=0.5), torch.randn(2, 1, 8, 8)
    t = torch.tensor([3, 700])
    assert torch.equal(made(xt, t), made(xt, t))
    made.train()
    assert not torch.equal(made(xt, t), made(xt, t))
    assert not [m for m in net("film").modules() if isinstance(m, torch.nn.Dropout)]


@others
def test_every_network_learns(arch):
    cfg = Config(**SMALL, out="run", arch=arch, steps=40, lr=3e-3, sample_every=1000)
    held = superarch.load_images(cfg)[2]
    ddpm = superarch.train(cfg)
    losses = held_out_loss(ddpm, held[:100])
    assert sum(losses.values()) / len(losses) < 0.8  # to guess 0 costs 1
    again = superarch.load("run/last.pt")
    assert type(again.net) is type(ddpm.net)
    images = again.sample((2, 1, 8, 8), 3, generator=rng("cpu", 1))
    assert images.isfinite().all() and state("run")["config"]["arch"] == arch


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "base", "mults": "1,2"}, "do not all fit --arch base"),
        ({"arch": "naive", "blocks": 2}, "do not all fit --arch naive"),
        ({"arch": "resnet", "attend": "0"}, "do not all fit --arch resnet"),
        ({"arch": "custom", "mults": "1,x"}, "want numbers like 1,2,2"),
        ({"arch": "custom", "mults": "1,0"}, "--mults is 1 or more"),
        ({"arch": "custom", "mults": "1,1,1,1,1"}, "a level for each halving"),
        ({"arch": "custom", "attend": "3"}, "--attend is 0 to 2"),
        ({"arch": "attention", "dropout": 1.0}, "--dropout below 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Config(**options)
