"""A device without hardware, which says where its host would wait.

Its tensors compute on the CPU, with real values, and say that they lie on a
device. Where a GPU would refuse, or its host wait, `Waits` is raised.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# Of a type that autocast and fused optimisers know, and that torch makes no
# library ready for; without an index torch would ask one for it.
DEVICE = torch.device("mps:0")
# A copy from memory that is not pinned is staged up to this size, in bytes; for
# a larger one CUDA's driver may wait.
STAGED = 2**16
# Operations whose result, or its shape, the host must know.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,  # unless it is told
}


class Waits(AssertionError):
    """The host would wait for the device, or the device refuse."""


class Pretended(torch.Tensor):
    """A tensor of the device; `held`, on the CPU, has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        # To torch's core a meta tensor: autograd asks those for no queue.
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )

    def __init__(self, held):
        self.held = held

    @property
    def device(self):
        return DEVICE

    def __setitem__(self, key, value):
        if not isinstance(value, torch.Tensor):
            # torch's core would make a number a meta tensor, without a value.
            value = torch.full((), value, dtype=self.dtype, device=DEVICE)
        super().__setitem__(key, value)

    def __repr__(self):
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise TypeError(f"{function} without the mode of this device")


class PretendedDevice(TorchDispatchMode):
    """Lets torch compute on the device; `nothing_waits` judges that."""

    judging = False
    pinned = frozenset()  # addresses of memory on the host
    copies: list[tuple] = []  # shapes of what was sent from the host

    def __enter__(self):
        # `torch.tensor` would otherwise ask for the device's own memory.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *raised):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Pretended)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        # torch's core makes zeros "where the gradient is": meta.
        if not given and target not in (DEVICE.type, "meta"):
            return function(*args, **kwargs)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if self.judging:
            self.copies += judge(
                function, args, kwargs, leaves, target, self.pinned
            )
        plain = tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
        found = function(*plain[0], **plain[1])
        if target == "cpu":
            return found
        # What an operation in place returns is what it was given.
        own = {id(x.held): x for x in given}
        return tree_map_only(
            torch.Tensor,
            lambda x: own[id(x)] if id(x) in own else Pretended(x),
            found,
        )


@contextlib.contextmanager
def nothing_waits(device, *pinned):
    """Raises where the host would wait for the device: this one, or a GPU.

    `pinned` are tensors of the host that count as pinned here. Yields a list,
    which gets the shape of each copy to this device.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield []
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    PretendedDevice.pinned = {x.data_ptr() for x in pinned}
    PretendedDevice.copies = []
    PretendedDevice.judging = True
    try:
        yield PretendedDevice.copies
    finally:
        PretendedDevice.judging = False


def present(device):
    """Returns a context in which the device is there."""
    same = torch.device(device) == DEVICE
    return PretendedDevice() if same else contextlib.nullcontext()


class NothingReadByTheHost(TorchDispatchMode):
    """Raises Waits where a GPU's host would wait, with tensors of the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        check_reading(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def check_reading(function, args, kwargs):
    """Raises Waits for an operation whose result the host must know."""
    if function in READS and kwargs.get("output_size") is None:
        raise Waits(f"the host reads a tensor: {function}")
    if function in (aten.index.Tensor, aten.index_put_.default):
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
        # A single value is filled in without counting the places.
        fills = function is aten.index_put_.default and args[2].numel() == 1
        if masks and not fills:
            raise Waits(f"the host counts the places of a mask: {function}")


def judge(function, args, kwargs, leaves, target, pinned):
    """Raises Waits where the host would wait, or the devices do not match.

    Returns the shapes of what is sent from the host. `target` is the type of
    the device asked for, if there is one, `pinned` holds addresses of memory
    from which copies of any size go on their own.
    """
    check_reading(function, args, kwargs)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    on_host = [x for x in tensors if not isinstance(x, Pretended)]
    is_copy = function in (aten._to_copy.default, aten.copy_.default)
    if is_copy and target == "cpu":
        raise Waits("a copy to the host")
    if not is_copy:
        # Numbers go along with the operation.
        if any(x.ndim > 0 for x in on_host) and len(on_host) < len(tensors):
            raise Waits(f"tensors of two devices: {function}")
        return []
    if function is aten.copy_.default:
        if not isinstance(args[0], Pretended):
            raise Waits("a copy to the host")
        non_blocking = len(args) > 2 and args[2]
    else:
        non_blocking = kwargs.get("non_blocking")
    for x in on_host:
        if not non_blocking:
            raise Waits(f"a copy of {tuple(x.shape)} that the host waits for")
        if x.nbytes > STAGED and x.data_ptr() not in pinned:
            raise Waits(f"a copy of {x.nbytes} bytes from memory not pinned")
    return [tuple(x.shape) for x in on_host]
