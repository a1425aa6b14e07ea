"""Cost on paper: what training the base's network asks for, before it is run.

    python benchmarks/cost.py                  hours: not measured
    python benchmarks/cost.py --tflops 100     hours at a rate that you know
    python benchmarks/cost.py --speed benchmarks/results/speed-h200-1024.json

Everything but the hours is counted, on tensors without data, so that no size is too
large for the machine that counts:
 - FLOPs of forward and backward pass, by torch's FlopCounterMode: convolutions and
   matrix products, two for each multiplication with its addition. What works on single
   numbers (norms, SiLU, Adam) is not in it.
 - Model: weights, gradients, Adam's two moments and step counts, averaged weights, all
   in float32.
 - Activations: the storages that autograd keeps for the backward pass, each counted
   once, without the weights, in float32. bf16 autocast keeps less, and torch.compile
   may, too.

The hours take one rate for every size; larger networks usually reach a higher one.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import prepare
import superminddpm as base

SIZES = (("CelebA", 32), ("CelebA", 64), ("CelebA", 128), ("ImageNet", 64))
N_TRAIN = {"CelebA": 162_770, "ImageNet": 1_281_167}  # their official training parts
NOT_MEASURED = "not measured"
CELEBA = dict(zip(prepare.RECIPE, prepare.RECIPES["celeba"], strict=True))
EPOCHS = CELEBA["epochs"]  # as many for ImageNet, where no recipe is


@dataclass(frozen=True)
class Options:
    """Options of the count."""

    n_feats: tuple[int, ...] = (32, 64, 128)  # widths
    tflops: float = 0  # rate that training reaches, in TFLOP/s (0: --speed, or none)
    speed: str = ""  # JSON of benchmarks/speed.py to take the rate from


def bare_loss(net, shape):
    """Return a function: the loss of eps_hat of net on batch images of this shape.

    It is the loss of DDPM without its schedule, whose tables have no form without data.
    """

    def loss(batch):
        device = net.out.weight.device
        xt, eps = (torch.zeros(batch, *shape, device=device) for _ in range(2))
        t = torch.ones(batch, dtype=torch.long, device=device)
        return (net(xt, t) - eps).square().mean()

    return loss


def flops(loss):
    """Return the FLOPs of loss(1) and of its backward pass."""
    with FlopCounterMode(display=False) as counter:
        loss(1).backward()
    return counter.get_total_flops()


def activations(loss):
    """Return the bytes that autograd keeps of loss(batch) for each further image."""

    def kept(batch):
        storages = {}  # views share one; held here, none is freed and its name reused

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(batch)
        return sum(storage.nbytes() for storage in storages.values())

    return kept(2) - kept(1)  # so the weights, which it keeps as well, do not count


def model_bytes(weights):
    """Return the bytes of weights, gradients, Adam's state and averaged weights."""
    return sum(5 * w.nbytes for w in weights) + 4 * len(weights)


def measured_rate(path):
    """Return the best rate in TFLOP/s of the training loop in a JSON of speed.py."""
    pairs = json.loads(Path(path).read_text())["pairs"]
    return max(
        row["images_per_s"] * pair["flop_image"] / 1e12
        for pair in pairs
        for row in pair["rows"]
        if row["what"].startswith("loop")
    )


def in_hours(seconds):
    """Return seconds as hours, with two digits where they are few."""
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def table(n_feats, tflops):
    """Return the rows of the table, in Markdown."""
    rate = f"hours at {tflops:.3g} TFLOP/s" if tflops else "hours"
    head = "data, pixels | n-feat | weights, M | GFLOP an image | model, MiB | "
    head += f"activations an image, MiB | images, M | EFLOP | {rate}"
    rows = [head, " | ".join(["---"] * 9)]
    for data, size in SIZES:
        images, shape = EPOCHS * N_TRAIN[data], (3, size, size)
        for n_feat in n_feats:
            with torch.device("meta"):
                net = base.UNet(3, n_feat)
            weights, loss = list(net.parameters()), bare_loss(net, shape)
            one, millions = flops(loss), sum(w.numel() for w in weights) / 1e6
            hours = in_hours(images * one / tflops / 1e12) if tflops else NOT_MEASURED
            rows.append(
                f"{data} {size}x{size} | {n_feat} | {millions:.2f} | "
                f"{one / 1e9:.2f} | {model_bytes(weights) / 2**20:.1f} | "
                f"{activations(loss) / 2**20:.1f} | {images / 1e6:.1f} | "
                f"{images * one / 1e18:.3g} | {hours}"
            )
    return [f"| {row} |" for row in rows]


def report(options):
    """Return the whole output as text."""
    if options.tflops and options.speed:
        raise ValueError("--tflops or --speed, not both")
    tflops = measured_rate(options.speed) if options.speed else options.tflops
    command = " ".join(["$ python benchmarks/cost.py", *sys.argv[1:]])
    lines = [command, *table(options.n_feats, tflops), ""]
    lines += [
        f"{EPOCHS} passes over the official training part of each set: the recipe of",
        "celeba; for ImageNet a choice, no recipe. Model and activations in float32;",
        "FLOPs are those of convolutions and matrix products.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(report(tyro.cli(Options, description=__doc__)))
    except (ValueError, OSError) as error:
        sys.exit(f"cost.py: {error}")
