"""The network: shapes, and what reaches what."""

import pytest
import torch

from superminddpm import UNet


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("size", [8, 12, 28, 32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_output_has_the_shape_of_the_input_and_starts_at_zero(size, channels):
    xt = torch.randn(2, channels, size, size)
    eps_hat = UNet(channels, 8)(xt, torch.tensor([1, 1000]))
    assert eps_hat.shape == xt.shape
    assert (eps_hat == eps_hat[:, :, :1, :1]).all()  # only the bias speaks


def test_the_time_reaches_every_block_and_the_bottleneck():
    net = UNet(1, 8)
    torch.nn.init.normal_(net.out.weight)
    net(torch.randn(2, 1, 8, 8), torch.tensor([3, 700])).square().sum().backward()
    films = [p for name, p in net.named_parameters() if "film.weight" in name]
    assert len(films) == 6
    assert all(p.grad.abs().sum() > 0 for p in [*films, net.vec_time.weight])


def test_the_bottleneck_is_a_vector_that_matters():
    net = UNet(3, 8)
    torch.nn.init.normal_(net.out.weight)
    xt, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 5])
    before = net(xt, t)
    with torch.no_grad():
        net.up0.weight.zero_()
    assert net.to_vec.out_channels == 2 * 8 and not torch.allclose(before, net(xt, t))


def test_images_of_a_batch_do_not_mix():
    net = UNet(1, 8)
    torch.nn.init.normal_(net.out.weight)
    xt, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 900])
    torch.testing.assert_close(
        net(xt, t)[1:2], net(xt[1:2], t[1:2]), atol=1e-5, rtol=1e-4
    )


def test_it_stays_about_as_small_as_the_plain_one():
    assert 0.5e6 < count(UNet(3, 32)) < 1.1e6
