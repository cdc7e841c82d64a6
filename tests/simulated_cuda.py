"""A CUDA device in memory of the CPU, for what a first run on a GPU trips over: tensors of two devices in one
operation, and waiting for the device.

    with SimulatedCuda() as gpu:
        model.to("cuda")(ids.to("cuda")).loss.backward()
    gpu.waits       # each wait of the host: the operation, and the line that asked for it
    gpu.operations  # number of operations by name; a view is none

Tensors there say that they are on "cuda:0", refuse CPU tensors of one or more dimensions as CUDA's kernels do, and run
CPU kernels. Autograd takes them for CPU tensors, which a build without CUDA needs: only Python sees the device.
What a kernel of CUDA's does otherwise than the CPU's is not simulated: docs/gpu.md.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = str(Path(__file__).parent.parent)
DEVICE = torch.device("cuda:0")
# Their results, or their status, are read by the host, or the size of a result depends on values.
WAITING = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_lstsq", "_linalg_check_errors",
}  # fmt: skip
# Here a CPU tensor may not even be an argument if it has no dimensions, nor in an operation on lists.
STRICT = {"cat", "stack", "mm", "bmm", "addmm", "baddbmm", "index_select", "gather", "embedding"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
FACTORIES_WITHOUT_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class Wait:
    """The host waits for the device in ``operation``, because of the line ``where``, "fnl_hf/optim/lamb.py:241"."""

    operation: str
    where: str


class SimulatedTensor(Tensor):
    """A tensor on the simulated device; its values are in ``memory``, a CPU tensor."""

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor, requires_grad: bool = False):
        made = Tensor._make_wrapper_subclass(
            cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype,
            layout=memory.layout, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip
        made.memory = memory
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    # With these two ``nn.Module.to`` exchanges parameters in place, so that tied ones stay tied.
    def __tensor_flatten__(self):
        return ["memory"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return SimulatedTensor(inner["memory"])

    __torch_function__ = torch._C._disabled_torch_function_impl  # SimulatedCuda sees every call first

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        SimulatedCuda.active().examine(func, args, kwargs)
        inner_args, inner_kwargs = tree_map_only(SimulatedTensor, lambda t: t.memory, (args, kwargs))
        return _wrap_results(func, args, kwargs, func(*inner_args, **inner_kwargs))


class Generator(torch.Generator):
    """Of the simulated device if so asked."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.is_simulated = _is_cuda(device)
        return made

    @property
    def device(self):
        return DEVICE if self.is_simulated else torch.device("cpu")


class SimulatedCuda(TorchFunctionMode):
    """The device, while it is there; what was done on it in ``operations`` and ``waits``."""

    _stack: list["SimulatedCuda"] = []

    def __init__(self):
        super().__init__()
        self.reset()

    @classmethod
    def active(cls) -> "SimulatedCuda":
        assert cls._stack, "a simulated tensor outlived its device"
        return cls._stack[-1]

    def reset(self) -> None:
        self.waits: list[Wait] = []
        self.operations: Counter[str] = Counter()

    def __enter__(self):
        self._patches = ExitStack()
        for owner, name, value in _patches():
            self._patches.enter_context(mock.patch.object(owner, name, value))
        self._stack.append(self)
        return super().__enter__()

    def __exit__(self, *exception):
        self._stack.pop()
        self._patches.close()
        return super().__exit__(*exception)

    # ---- calls of torch's functions ----

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _METHODS:
            return _METHODS[func](self, func, *args, **kwargs)
        device = kwargs.get("device")
        if device is None or func.__name__ == "_parse_to":  # which only reads arguments
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": "cpu"})
        return self._place(func, made, kwargs) if isinstance(made, Tensor) else made

    def _place(self, func, made: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The result of a function that was given a device, on that device."""
        name, generator = func.__name__, kwargs.get("generator")
        if generator is not None and _is_cuda(generator.device) != _is_cuda(kwargs["device"]):
            raise RuntimeError(f"{name}: a generator of {generator.device} for a tensor on {kwargs['device']}")
        if _is_cuda(kwargs["device"]) == isinstance(made, SimulatedTensor):
            return made
        if isinstance(made, SimulatedTensor):
            return made.memory
        if name in ("tensor", "as_tensor", "asarray"):
            self.wait("copy to the device")
        elif name not in FACTORIES_WITHOUT_KERNEL:
            self.operations[name] += 1
        return SimulatedTensor(made.detach(), requires_grad=made.requires_grad)

    def move(self, tensor: Tensor, device, non_blocking: bool, copy: bool) -> Tensor:
        """``tensor`` on ``device``, by a copy if it is not there."""
        to_cuda = tensor.is_cuda if device is None else _is_cuda(device)
        if to_cuda == tensor.is_cuda:
            return tensor.clone() if copy else tensor
        if not to_cuda or not non_blocking:
            self.wait("copy to the device" if to_cuda else "copy to the CPU")
        return _Move.apply(tensor)

    # ---- operations on the device ----

    def wait(self, operation: str) -> None:
        self.waits.append(Wait(operation, _line_that_asked()))

    def examine(self, func, args, kwargs) -> None:
        """Count an operation; refuse tensors on the CPU; note a wait."""
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "_unsafe_view", *FACTORIES_WITHOUT_KERNEL):
            self.operations[name] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
        generator = kwargs.get("generator")
        if generator is not None and not _is_cuda(generator.device):
            raise RuntimeError(f"{name}: a generator of the CPU for a tensor on {DEVICE}")
        if name in ("copy_", "_foreach_copy_"):
            is_non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if on_cpu and not (is_non_blocking and isinstance(tree_leaves(args[0])[0], SimulatedTensor)):
                self.wait(name)
            return
        if name in INDEXING:
            self._examine_indices(name, args)
            return
        is_strict = name in STRICT or name.startswith("_foreach_")
        if on_cpu and (is_strict or any(t.dim() for t in on_cpu) or _writes_to(func, args, on_cpu)):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in on_cpu)
            raise RuntimeError(f"{name}: tensors on {DEVICE} and on the CPU, of shape {shapes} ({_line_that_asked()})")
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)

    def _examine_indices(self, name, args) -> None:
        self_, indices, *values = args
        if not isinstance(self_, SimulatedTensor):
            raise RuntimeError(f"{name}: indices or values on {DEVICE} of a tensor on the CPU ({_line_that_asked()})")
        given = [index for index in indices if index is not None]
        if any(value.dim() for value in values if isinstance(value, Tensor) and not value.is_cuda):
            raise RuntimeError(f"{name}: values on the CPU for a tensor on {DEVICE} ({_line_that_asked()})")
        if any(index.dtype in (torch.bool, torch.uint8) or not index.is_cuda for index in given):
            self.wait(name)


class _Active(TorchFunctionMode):
    """The active device's functions, where its mode is not in force because one of them calls others."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return SimulatedCuda.active().__torch_function__(func, types, args, kwargs)


class _Move(torch.autograd.Function):
    """From one of the two devices to the other."""

    @staticmethod
    def forward(ctx, tensor):
        if isinstance(tensor, SimulatedTensor):
            return tensor.memory.detach().clone()
        return SimulatedTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return _Move.apply(gradient)


def _is_cuda(device) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _line_that_asked() -> str:
    """The innermost line of ours on the stack; where there is none, of any library but torch."""
    frame, other = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith((f"{ROOT}/fnl_hf/", f"{ROOT}/run_", f"{ROOT}/examples/")):
            return f"{file[len(ROOT) + 1 :]}:{frame.f_lineno}"
        if not other and file != __file__ and "/torch/" not in file:
            other = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return other


def _alias(spec) -> frozenset[str]:
    """What an argument or a result of an operation is written as; empty for what is only read, or new."""
    is_written = spec.alias_info is not None and spec.alias_info.is_write
    return frozenset(spec.alias_info.before_set or {spec.name}) if is_written else frozenset()


def _writes_to(func, args, tensors) -> bool:
    written = [arg for spec, arg in zip(func._schema.arguments, args) if _alias(spec)]
    return any(leaf is tensor for leaf in tree_leaves(written) for tensor in tensors)


def _wrap_results(func, args, kwargs, results):
    """What was written in place is returned as it is; all else is new on the device."""
    written = {_alias(spec): args[i] if i < len(args) else kwargs.get(spec.name)
               for i, spec in enumerate(func._schema.arguments) if _alias(spec)}  # fmt: skip

    def wrap(spec, result):
        if spec is None or not _alias(spec):
            return tree_map_only(Tensor, SimulatedTensor, result)
        original = written[_alias(spec)]
        assert not isinstance(original, Tensor) or original.shape == result.shape, f"{func} changes a shape in place"
        return original

    returns = func._schema.returns
    if isinstance(results, tuple) and len(returns) == len(results):
        return tuple(wrap(spec, result) for spec, result in zip(returns, results))
    return wrap(returns[0] if len(returns) == 1 else None, results)


# ---- methods that move, read or copy: their first argument may be on either device ----


def _to(gpu, func, tensor, *args, **kwargs):
    device, copy = kwargs.pop("device", None), kwargs.get("copy", False)
    if args and isinstance(args[0], Tensor):
        device, args = args[0].device, (args[0].dtype, *args[1:])
    elif args and isinstance(args[0], str | int | torch.device):
        device, args = args[0], args[1:]
    elif args and args[0] is None:
        args = args[1:]
    if kwargs.get("dtype", 0) is None:
        del kwargs["dtype"]
    args = args[1:] if args and args[0] is None else args  # Module.to gives a dtype of None
    dtype = args[0] if args and isinstance(args[0], torch.dtype) else kwargs.get("dtype", tensor.dtype)
    flags = [arg for arg in args if isinstance(arg, bool)]
    non_blocking = kwargs.get("non_blocking", bool(flags and flags[0]))
    moved = gpu.move(tensor, device, non_blocking, copy or (len(flags) > 1 and flags[1]))
    return moved if moved.dtype == dtype else func(moved, dtype)


def _tolist(gpu, func, tensor):
    if not tensor.is_cuda:
        return func(tensor)
    gpu.wait("tolist")
    return tensor.memory.tolist()


def _numpy(gpu, func, tensor, *args, **kwargs):
    if tensor.is_cuda:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")
    return func(tensor, *args, **kwargs)


def _deepcopy(gpu, func, tensor, memo):
    if not tensor.is_cuda:
        return func(tensor, memo)
    if id(tensor) not in memo:
        copied = SimulatedTensor(tensor.memory.clone(), requires_grad=tensor.requires_grad)
        copied.__dict__ |= {key: value for key, value in tensor.__dict__.items() if key != "memory"}
        memo[id(tensor)] = copied
    return memo[id(tensor)]


def _reduce(gpu, func, tensor, protocol):
    if tensor.is_cuda:
        gpu.wait("pickle")
        tensor = tensor.memory.detach()
    return func(tensor, protocol)


def _backward(gpu, func, tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None):
    """With the mode active, for what checkpointing computes again."""
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    run = torch.autograd.Variable._execution_engine.run_backward
    with _Active():
        run((tensor,), (gradient,), bool(retain_graph), create_graph, tuple(inputs or ()), True, True)


def _of_memory(gpu, func, tensor, *args, **kwargs):
    return func(tensor.memory if tensor.is_cuda else tensor, *args, **kwargs)


_METHODS: dict[Any, Any] = {
    Tensor.to: _to,
    Tensor.cpu: lambda gpu, func, tensor, *a, **k: gpu.move(tensor, "cpu", False, False),
    Tensor.cuda: lambda gpu, func, tensor, *a, **k: gpu.move(tensor, "cuda", k.get("non_blocking", False), False),
    Tensor.backward: _backward,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.__reduce_ex__: _reduce,
    Tensor.untyped_storage: _of_memory,
    Tensor.data_ptr: _of_memory,
    Tensor.record_stream: lambda gpu, func, tensor, stream: None,
    Tensor.pin_memory: lambda gpu, func, tensor, *a, **k: tensor,
}


# ---- what torch itself says of its devices ----


def _group_by_device_and_dtype(tensor_lists, with_indices=False):
    """``torch._C._group_tensors_by_device_and_dtype``, which would not see the simulated device."""
    groups: dict[Any, Any] = {}
    for index, first in enumerate(tensor_lists[0]):
        lists, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in tensor_lists], []))
        for one, tensors in zip(lists, tensor_lists):
            if tensors:
                one.append(tensors[index])
        indices.append(index)
    return {key: (lists, indices if with_indices else []) for key, (lists, indices) in groups.items()}


def _synchronize(*args):
    SimulatedCuda.active().wait("synchronize")


def _patches() -> list[tuple[Any, str, Any]]:
    of_cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "simulated",
        "is_bf16_supported": lambda *args, **kwargs: True,
        "synchronize": _synchronize,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "manual_seed_all": lambda seed: None,
        "_lazy_init": lambda: None,
    }
    autocast = torch.amp.autocast_mode.autocast.__init__
    return [
        *((torch.cuda, name, value) for name, value in of_cuda.items()),
        (torch.accelerator, "synchronize", _synchronize),
        (torch, "Generator", Generator),
        (
            torch.amp.autocast_mode.autocast,
            "__init__",
            lambda self, device_type, *a, **k: autocast(self, "cpu", *a, **k),
        ),
        (torch._C, "_group_tensors_by_device_and_dtype", _group_by_device_and_dtype),
        (_foreach_utils, "_foreach_supported_types", [Tensor, SimulatedTensor]),
        (
            sys.modules["torch.optim.optimizer"],
            "_foreach_supported_types",
            [Tensor, torch.nn.Parameter, SimulatedTensor],
        ),
    ]
