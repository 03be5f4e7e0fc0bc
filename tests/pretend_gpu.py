"""A GPU that is only pretended: CPU tensors that say they are on ``cuda:0`` and mix with no others.

On a machine without one, code for a GPU goes wrong in one way above all: a tensor is made on the
CPU and meets one on the GPU. Inside ``PretendGPU()`` every tensor that comes from one "on the GPU"
is marked, and an operation that CUDA would refuse, because of where its tensors are, raises here,
too. What is computed stays on the CPU, and so right. Kernels, streams, autocast, NCCL: not tested.
"""

from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
# Where CUDA takes CPU tensors beside its own.
MAY_MIX = {
    "copy_",
    "_pack_padded_sequence",
    "_pad_packed_sequence",
    "ctc_loss",
    "lstm",
    "gru",
    "set_",
    "data",
}


def is_on_gpu(tensor):
    """Whether a tensor pretends to be on the GPU."""
    return getattr(tensor, "pretends", False)


def _mark(result, gpu=True):
    for tensor in tree_leaves(result):
        if isinstance(tensor, torch.Tensor):
            tensor.pretends = gpu
    return result


def _device(value):
    """The device that an argument names, if it does."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "meta"):
        return torch.device(value)
    return None


class PretendGPU(TorchFunctionMode):
    """Context in which ``"cuda"`` is a device: see the module's docstring.

    Raises
    ------
    RuntimeError
        Inside: an operation got tensors from both devices.
    TypeError
        Inside: NumPy was given a tensor on the GPU.
    """

    def __enter__(self):
        self.patches = [
            mock.patch.object(torch.nn.Module, "to", _module_to(torch.nn.Module.to)),
            mock.patch.object(torch.nn.Module, "cuda", lambda module, _=None: module.to("cuda")),
            mock.patch.object(torch.nn.Module, "cpu", lambda module: module.to("cpu")),
            mock.patch("torch.load", _load(torch.load)),
        ]
        answers = {"is_available": True, "device_count": 1, "current_device": 0}
        answers |= {"max_memory_allocated": 0, "get_rng_state": torch.zeros(8, dtype=torch.uint8)}
        answers |= {
            "is_bf16_supported": True,
            "is_current_stream_capturing": False,
            "get_device_name": "pretended",
        }
        for name in ("set_device", "synchronize", "reset_peak_memory_stats", "empty_cache"):
            answers[name] = None
        for name in ("set_rng_state", "manual_seed_all"):
            answers[name] = None
        for name, answer in answers.items():
            self.patches.append(
                mock.patch(f"torch.cuda.{name}", lambda *a, answer=answer, **k: answer)
            )
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "device":
                return GPU if is_on_gpu(args[0]) else func(*args)
            if name in ("is_cuda", "is_cpu"):
                return is_on_gpu(args[0]) == (name == "is_cuda")
            return _mark(func(*args)) if is_on_gpu(args[0]) else func(*args)
        if name in ("to", "type_as", "cuda", "cpu") and args and isinstance(args[0], torch.Tensor):
            return _to(func, name, args, kwargs)
        if name in ("numpy", "__array__") and is_on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "pin_memory":
            return args[0]
        device = _device(kwargs.get("device"))
        if device is not None:
            kwargs["device"] = CPU if device.type == "cuda" else device
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_gpu = any(map(is_on_gpu, tensors))
        if on_gpu:
            _check(func, name, args, tensors)
        result = func(*args, **kwargs)
        if name in ("_pack_padded_sequence", "_pad_packed_sequence") and on_gpu:
            return _mark(result[0]), result[1]  # lengths stay where they were: on the CPU
        if device is not None:
            return _mark(result) if device.type == "cuda" else result
        return _mark(result) if on_gpu and name != "__set__" else result


def _check(func, name, args, tensors):
    if name == "_pack_padded_sequence" and is_on_gpu(args[1]):
        raise RuntimeError("pack_padded_sequence: 'lengths' should be on the CPU")
    if name in MAY_MIX:
        return
    if name == "__getitem__" and is_on_gpu(args[0]):
        return  # an index may be on the CPU
    if name == "__setitem__" and is_on_gpu(args[0]):
        tensors = [t for t in tensors if t is not args[2]]  # copied, if the index has no tensors
    elsewhere = [tuple(t.shape) for t in tensors if t.dim() and not is_on_gpu(t)]
    if elsewhere:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu "
            f"(of shape {elsewhere})"
        )


def _to(func, name, args, kwargs):
    tensor, rest = args[0], list(args[1:])
    goal = {"cuda": GPU, "cpu": CPU}.get(name)
    if name == "type_as":
        goal, result = GPU if is_on_gpu(args[1]) else CPU, func(*args)
    elif name == "to":
        for given in [*rest, *kwargs.values()]:
            if isinstance(given, torch.Tensor):
                goal = GPU if is_on_gpu(given) else CPU
            elif _device(given) is not None:
                goal = _device(given)
        keep = lambda given: _device(given) is None and not isinstance(given, torch.Tensor)  # noqa: E731
        dtypes = [given.dtype for given in rest if isinstance(given, torch.Tensor)]
        rest = [given for given in rest if keep(given)] or dtypes
        kwargs = {k: v for k, v in kwargs.items() if keep(v)}
        result = func(tensor, *rest, **kwargs) if rest or kwargs else tensor
    else:
        result = tensor
    here = is_on_gpu(tensor)
    there = here if goal is None else goal.type == "cuda"
    if result is tensor and here != there:
        result = tensor.clone()
    return _mark(result, there)


def _module_to(original):
    def to(module, *args, **kwargs):
        goal = [_device(given) for given in (*args, *kwargs.values()) if _device(given)]
        if goal and goal[0].type not in ("cpu", "cuda"):
            return original(module, *args, **kwargs)
        rest = [given for given in args if _device(given) is None]
        more = {k: v for k, v in kwargs.items() if _device(v) is None}
        if rest or more:
            original(module, *rest, **more)
        if goal:
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.pretends = goal[0].type == "cuda"
        return module

    return to


def _load(original):
    def load(*args, map_location=None, **kwargs):
        goal = _device(map_location)
        loaded = original(*args, map_location=CPU if goal else map_location, **kwargs)
        return _mark(loaded) if goal is not None and goal.type == "cuda" else loaded

    return load
