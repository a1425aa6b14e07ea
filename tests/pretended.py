"""A GPU for machines without one: tensors of the CPU that are marked as lying on it.

Inside `with pretended() as waits:` torch says that there is a GPU. What is sent there
stays an ordinary tensor of the CPU whose storage is marked. Each operation, also of the
backward pass, checks that its inputs lie together, and raises where a GPU would. waits
counts what makes Python wait for the GPU: a number or a shape that depends on values
there, and a copy from or to the CPU. float64 is refused, as by MPS.
It says nothing about kernels, memory, speed, torch.compile or several processes.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import Mock, patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
waits = Counter()


def tensors(tree):
    """Return the tensors in lists, tuples and dicts."""
    tree = list(tree.values()) if isinstance(tree, dict) else tree
    if isinstance(tree, list | tuple):
        return [x for part in tree for x in tensors(part)]
    return [tree] if isinstance(tree, torch.Tensor) else []


def on_gpu(x):
    """Return whether a tensor is marked, or whether a device or its name is a GPU."""
    if isinstance(x, torch.Tensor):
        return getattr(x.untyped_storage(), "on_gpu", False)
    return torch.device(x).type != "cpu"


def mark(x, there):
    x.untyped_storage().on_gpu = there
    return x


class Generator(torch.Generator):
    """A generator of the CPU that says it is one of the device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.on_gpu = on_gpu(device)


class Places(TorchFunctionMode):
    """Moves and makes tensors, and answers where they lie."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), f.__name__
        x = args[0] if args else None
        there = isinstance(x, torch.Tensor) and on_gpu(x)
        if name == "__get__" and f.__self__.__name__ == "device":
            return GPU if there else CPU
        if name in ("to", "cpu"):
            to = args[1:] if name == "to" else ("cpu",)
            device, dtype, later, _ = torch._C._nn._parse_to(*to, **kwargs)
            device = next(iter(tensors(to)), device)  # as in x.to(y)
            x = x.to(dtype) if dtype else x
            if device is None or on_gpu(device) == there:
                return x
            waits["copy"] += not later
            return mark(x.clone(), not there)
        if there and name in ("numpy", "__array__"):
            raise TypeError("a tensor of the GPU has no numpy(): use cpu() first")
        waits["tolist"] += there and name == "tolist"
        device = kwargs.pop("device", None)
        made_there = there if device is None else on_gpu(device)
        generator = kwargs.get("generator")
        if generator is not None and generator.on_gpu != made_there:
            raise RuntimeError(f"{name}: the generator is of another device")
        out = f(*args, **kwargs)
        if device is not None and name in ("tensor", "as_tensor"):
            waits["copy"] += made_there != there
            out = out.clone() if made_there != there else out
        made = device is not None or name == "__deepcopy__"
        return mark(out, made_there) if made else out


class Check(TorchDispatchMode):
    """Raises where the inputs of an operation lie apart, and marks its results."""

    def there(self, f, args, kwargs):
        """Return whether the results lie on the GPU."""
        inputs, name = tensors([args, kwargs]), f.overloadpacket.__name__
        left = [x for x in inputs if not on_gpu(x)]
        if len(left) == len(inputs):
            return False
        if name == "copy_":
            waits["copy"] += len(left) and True not in args[2:]
            return on_gpu(inputs[0])
        indexing = name.rstrip("_") in ("index", "index_put")
        if indexing or torch.Tag.pointwise in f.tags or "fill" in name:
            left = [x for x in left if x.dim()]  # a number may lie on the CPU
        if indexing:  # and so may indices, but they are sent, and a mask is counted
            sent = [i for i in tensors(args[1]) if not on_gpu(i)]
            masks = [i for i in tensors(args[1]) if i.dtype == torch.bool]
            left = [x for x in left if not any(x is i for i in sent)]
            values = [x for x in tensors(args[2:3]) if not on_gpu(x)]
            waits["index"] += len(sent) + len(masks) + len(values)
        elif WAITS & {*f.tags}:
            waits[name] += 1
        if left or indexing and not on_gpu(inputs[0]):
            raise RuntimeError(f"{f}: {len(left)} on the CPU, other inputs on the GPU")
        return True

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        there = self.there(f, args, kwargs or {})
        out = f(*args, **kwargs or {})
        for x in tensors(out) if there else ():
            if x.dtype == torch.float64:
                raise TypeError(f"{f}: there is no float64 on MPS")
            mark(x, there)
        return out


@contextmanager
def pretended():
    """Pretend one GPU; give the Counter of what waits for it."""
    group, autocast = torch._C._group_tensors_by_device_and_dtype, torch.autocast

    def grouped(lists, *args):  # of clip_grad_norm_ and Adam
        groups = group(lists, *args).items()
        return {(x[0][0][0].device, dtype): x for (_, dtype), x in groups}

    def low(_, *args, **kwargs):
        return autocast("cpu", *args, **kwargs)

    stream = Mock(**{"is_capturing.return_value": False})  # Adam asks it
    kind = torch.device(GPU.type)
    changes = [
        (torch.accelerator, "current_accelerator", Mock(return_value=kind)),
        (torch.accelerator, "device_count", Mock(return_value=1)),
        (torch.accelerator, "current_stream", Mock(return_value=stream)),
        (torch._C, group.__name__, grouped),
        (torch, "autocast", low),
        (torch, "Generator", Generator),
    ]
    waits.clear()
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(patch.object(*change))
        stack.enter_context(Check())
        stack.enter_context(Places())
        yield waits
