"""Training some of the encoder's own parameters: biases, norms, upper layers, or all of it.

BitFit: Ben Zaken et al., 2021, arXiv 2106.10199.
"""

import torch
from torch import nn

from hff_modules.adapters.base import Adapter, AdapterError


class Tuning(Adapter):
    """Train parameters that the encoder has already; nothing is added.

    The values they had are kept, so that disabling or removing gives the plain encoder back; so are
    the statistics of batch norms that are trained, which count padding, as Hugging Face's do.
    "bias" and "norm" leave batch norms alone, as their statistics would then follow the training
    data. In 12 layers of 768 and 3072 "bias" trains
    101,376 numbers (norms' biases included) and "norm" 36,864.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to train in.
    what : str
        "bias" (BitFit), "norm" (LayerNorms), or "everything" (top-k and full fine-tuning).
    outside : bool
        Also train what lies outside the layers, the waveform CNN excepted.
    """

    switched_by_row = False

    def __init__(self, layers="all", what: str = "everything", outside: bool = False):
        if what not in ("bias", "norm", "everything"):
            raise AdapterError(f"what={what!r}: expected 'bias', 'norm' or 'everything'")
        super().__init__(layers, what=what, outside=outside)
        self._tuned: dict[str, nn.Parameter] = {}  # live, owned by the encoder
        self._statistics: dict[str, tuple[nn.Module, str]] = {}  # statistics beside them
        self._original: dict[str, torch.Tensor] = {}
        self._parked: dict[str, torch.Tensor] = {}  # trained values while disabled
        self._learns: dict[str, bool] = {}  # and whether they are trained further when enabled

    def attach(self, encoder: nn.Module) -> None:  # noqa: D102
        super().attach(encoder)
        if self.options["outside"]:
            self._take("outside", encoder.outside_parameters(), encoder.outside_buffers())

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        self._take(str(number), encoder.layer_parameters(number), encoder.layer_buffers(number))

    def lowest_changed(self) -> int:  # noqa: D102
        return 0 if self.options["outside"] else super().lowest_changed()

    def _take(self, place: str, parameters: dict, buffers: dict) -> None:
        if self.options["what"] == "everything":
            for name, (module, buffer) in buffers.items():
                self._statistics[f"{place}.{name}"] = (module, buffer)
                self._original[f"{place}.{name}"] = getattr(module, buffer).clone()
        for name, parameter in parameters.items():
            # Every family calls its norms so.
            chosen = {"bias": name.endswith("bias"), "norm": "norm" in name, "everything": True}
            if self.options["what"] != "everything" and "batch_norm" in name:
                continue
            if not chosen[self.options["what"]]:
                continue
            key = f"{place}.{name}"
            if parameter.requires_grad:
                raise AdapterError(
                    f"{key} is trained already; two methods cannot own one parameter"
                )
            self._tuned[key] = parameter
            self._original[key] = parameter.detach().clone()
            parameter.requires_grad_(True)

    def _live(self) -> dict[str, torch.Tensor]:
        buffers = {name: getattr(*place) for name, place in self._statistics.items()}
        return {name: p.data for name, p in self._tuned.items()} | buffers

    def tensors(self) -> dict[str, torch.Tensor]:
        """Trained values by name, whether enabled or not."""
        return self._live() | self._parked

    def trained(self) -> list[nn.Parameter]:  # noqa: D102
        return list(self._tuned.values())

    def changed_weights(self) -> list[nn.Parameter]:  # noqa: D102
        return list(self._tuned.values())

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take values that :meth:`tensors` gave."""
        for name, target in self.tensors().items():
            target.copy_(tensors[name])

    def requires_grad_(self, requires_grad: bool = True) -> "Tuning":
        """Freeze what it trains, or train it again; while disabled, from then on."""
        self._learns = dict.fromkeys(self._tuned, requires_grad)
        for parameter in self._tuned.values():
            parameter.requires_grad_(requires_grad and self.enabled)
        return self

    def set_enabled(self, enabled: bool) -> None:  # noqa: D102
        if enabled == self.enabled:
            return
        if not enabled:
            self._learns = {name: p.requires_grad for name, p in self._tuned.items()}
        for name, value in self._live().items():
            if not enabled:
                self._parked[name] = value.clone()
            value.copy_(self._parked[name] if enabled else self._original[name])
        if enabled:
            self._parked.clear()
        for name, parameter in self._tuned.items():
            parameter.requires_grad_(enabled and self._learns[name])
        super().set_enabled(enabled)

    def detach(self) -> None:  # noqa: D102
        self.set_enabled(False)
        super().detach()
