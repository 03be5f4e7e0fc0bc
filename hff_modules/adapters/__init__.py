"""Adapters for frozen speech encoders: one contract, any method, any family.

>>> from hff_modules import SSLEncoder, adapters
>>> encoder = SSLEncoder("builtin", layers=[3, 6, 9])
>>> adapter = adapters.attach(encoder, "tpa", layers="last:3", bottleneck=64)
>>> encoder.horizon
6
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from hff_modules.adapters.adapter_bias import AdapterBias
from hff_modules.adapters.base import Adapter, AdapterError
from hff_modules.adapters.bottleneck import SerialBottleneck, TwoParallelAdapters
from hff_modules.adapters.cnn import CNNAdapters
from hff_modules.adapters.compacter import Compacter
from hff_modules.adapters.lora import LoRA
from hff_modules.adapters.prefix import Prefix
from hff_modules.adapters.prompts import PAdapter, Prompts
from hff_modules.adapters.tuning import Tuning
from hff_modules.adapters.unipet import UniPET
from hff_modules.files import write_atomically

# Method name -> class and the settings that make it the published one; any may be overridden.
METHODS: dict[str, tuple[type[Adapter], dict]] = {
    "houlsby": (SerialBottleneck, {}),
    "pfeiffer": (SerialBottleneck, {"places": ("feed_forward",)}),
    "thomas": (SerialBottleneck, {"norm": "before"}),
    # With its authors' init_std=1e-3 it is not quite the identity at birth: the norm enlarges what
    # the tiny weights give. Our default, a norm whose scale is zero, is.
    "e_adapter": (SerialBottleneck, {"places": ("feed_forward",), "norm": "after"}),
    "compacter": (Compacter, {}),
    "adapter_bias": (AdapterBias, {}),
    "tpa": (TwoParallelAdapters, {}),
    "inner": (TwoParallelAdapters, {}),  # of inner + inter; the other half is a fusion
    "lora": (LoRA, {}),
    "prefix": (Prefix, {}),
    "prompts": (Prompts, {}),
    "p_adapter": (PAdapter, {}),
    "unipet": (UniPET, {}),
    "cnn": (CNNAdapters, {}),
    "bitfit": (Tuning, {"what": "bias"}),
    "layernorm": (Tuning, {"what": "norm"}),
    "top_k": (Tuning, {"what": "everything"}),
    "full": (Tuning, {"what": "everything", "outside": True}),
}

CONFIG, TENSORS = "adapter.json", "adapter.safetensors"


def attach(encoder: nn.Module, method: str, name: str | None = None, **options) -> Adapter:
    """Attach an adapter to an encoder.

    Arguments
    ---------
    encoder : SSLEncoder
        Stays frozen apart from the adapter.
    method : str
        One of ``METHODS``.
    name : str, optional
        To switch, save and remove it by; the method's name by default.
    **options
        ``layers`` (see :func:`hff_modules.layers.parse_layers`) and the method's own settings.

    Returns
    -------
    Adapter

    Raises
    ------
    AdapterError
        Unknown method or option, a name that is taken or that torch has for itself, parameters of
        the encoder that another adapter changes.
    """
    if method not in METHODS:
        raise AdapterError(f"method={method!r} is unknown; there are {', '.join(METHODS)}")
    name = name or method
    if name in encoder.adapters:
        raise AdapterError(f"an adapter called {name!r} is attached already; give another name")
    if "." in name or hasattr(encoder.adapters, name):
        raise AdapterError(
            f"name={name!r}: torch.nn.ModuleDict takes no names with dots or of its own methods"
        )
    kind, defaults = METHODS[method]
    try:
        adapter = kind(**{**defaults, **options})
    except TypeError as error:
        raise AdapterError(f"{method}: {error}") from None
    adapter.method = method
    try:
        adapter.attach(encoder)
        _refuse_shared(encoder, name, adapter)
    except BaseException:
        adapter.detach()
        raise
    encoder.adapters[name] = adapter
    encoder.train(encoder.training)
    return adapter


def get(encoder: nn.Module, name: str) -> Adapter:
    """Give the adapter that is attached under ``name``."""
    if name not in encoder.adapters:
        raise AdapterError(f"no adapter {name!r} is attached; there are {list(encoder.adapters)}")
    return encoder.adapters[name]


def _refuse_shared(encoder: nn.Module, name: str, adapter: Adapter) -> None:
    """Two that change the same weights of the encoder: undoing one would undo the other, too."""
    own = {id(weight) for weight in adapter.changed_weights()}
    for other, there in encoder.adapters.items():
        shares = any(id(weight) in own for weight in there.changed_weights())
        if there is not adapter and there.enabled and shares:
            raise AdapterError(
                f"{name!r} and {other!r} change the same weights of the encoder; disable, unmerge "
                f"or remove {other!r} first"
            )


def enable(encoder: nn.Module, name: str) -> None:
    """Switch an adapter on; refused beside another one that changes the same weights."""
    adapter = get(encoder, name)
    _refuse_shared(encoder, name, adapter)
    adapter.set_enabled(True)
    encoder.train(encoder.training)


def disable(encoder: nn.Module, name: str) -> None:
    """Switch an adapter off: the encoder gives what it gave without, bit for bit."""
    get(encoder, name).set_enabled(False)
    encoder.train(encoder.training)


def merge(encoder: nn.Module, name: str) -> None:
    """Fold an adapter into the encoder's weights, where the method can; it costs no time then."""
    adapter = get(encoder, name)
    adapter.merge()
    try:
        _refuse_shared(encoder, name, adapter)
    except AdapterError:
        adapter.unmerge()
        raise


def unmerge(encoder: nn.Module, name: str) -> None:
    """Undo :func:`merge`; the encoder's weights are as they were, bit for bit."""
    get(encoder, name).unmerge()


def remove(encoder: nn.Module, name: str) -> None:
    """Take an adapter off; the encoder is as it was."""
    get(encoder, name).detach()
    del encoder.adapters[name]
    encoder.train(encoder.training)


def trainable_parameters(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """Everything in the encoder and its adapters that is trained, by name."""
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}


def save_adapter(encoder: nn.Module, name: str, folder: str | Path) -> None:
    """Write ``adapter.json`` and ``adapter.safetensors`` into a folder.

    Arguments
    ---------
    encoder : SSLEncoder
        Has the adapter.
    name : str
        Of the adapter.
    folder : str | Path
        Is made if it is not there.
    """
    adapter, folder = get(encoder, name), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": 1,
        "method": adapter.method,
        "name": name,
        "layers": adapter.layers,
        "options": adapter.options,
        "encoder": _encoder_facts(encoder, adapter.layers),
    }
    tensors = {key: t.detach().cpu().contiguous() for key, t in adapter.tensors().items()}
    write_atomically(folder / TENSORS, save(tensors))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load_adapter(encoder: nn.Module, folder: str | Path, name: str | None = None) -> Adapter:
    """Attach an adapter that :func:`save_adapter` wrote.

    Arguments
    ---------
    encoder : SSLEncoder
        Must be the encoder that the adapter was made for.
    folder : str | Path
        Holds ``adapter.json`` and ``adapter.safetensors``; nothing in it is executed.
    name : str, optional
        Other than the one it was saved under.

    Returns
    -------
    Adapter

    Raises
    ------
    AdapterError
        A missing or broken file; another encoder, layer or width, with the difference spelled out.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        method, layers, options = config["method"], config["layers"], config["options"]
        made_for, saved_name = config["encoder"], config["name"]
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{folder} holds no readable adapter: {error}") from None
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG} is no description of an adapter: {error}") from None
    if method not in METHODS:
        raise AdapterError(f"{folder / CONFIG}: method {method!r} is unknown")
    if max(layers, default=0) > encoder.top:
        raise AdapterError(
            f"the adapter in {folder} is in layers {layers}; this encoder is cut above layer "
            f"{encoder.top}"
        )
    facts = _encoder_facts(encoder, layers)
    differing = [
        f"{key}: {made_for.get(key)!r} in {folder}, {value!r} here"
        for key, value in facts.items()
        if made_for.get(key) != value
    ]
    if differing:
        raise AdapterError("the adapter was made for another encoder:\n  " + "\n  ".join(differing))
    name = name or saved_name
    chosen = {"layers": layers} if METHODS[method][0].in_layers else {}
    adapter = attach(encoder, method, name, **options, **chosen)
    expected = {key: tuple(t.shape) for key, t in adapter.tensors().items()}
    given = {key: tuple(t.shape) for key, t in tensors.items()}
    if expected != given:
        remove(encoder, name)
        key = min(k for k in expected.keys() | given.keys() if expected.get(k) != given.get(k))
        raise AdapterError(
            f"{folder / TENSORS}: {key} is {given.get(key)}, expected {expected.get(key)}"
        )
    with torch.no_grad():
        adapter.load_tensors(tensors)
    return adapter


def _encoder_facts(encoder: nn.Module, layers: list[int]) -> dict:
    manifest = encoder.manifest()
    facts = {key: manifest[key] for key in ("family", "hidden_size", "num_layers")}
    # What lies above the adapter may be cut off or not: only what is below must be the same.
    return {**facts, "weights": encoder.fingerprint_up_to(max(layers, default=0))}
