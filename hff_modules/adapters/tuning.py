"""Training some of the encoder's own parameters: biases, norms, upper layers, or all of it.

BitFit: Ben Zaken et al., 2021, arXiv 2106.10199.
"""

import torch
from torch import nn

from hff_modules.adapters.base import Adapter, AdapterError


class Tuning(Adapter):
    """Train parameters that the encoder has already; nothing is added.

    The values they had are kept, so that disabling or removing gives the plain encoder back.

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
        self._original: dict[str, torch.Tensor] = {}
        self._parked: dict[str, torch.Tensor] = {}  # trained values while disabled

    def attach(self, encoder: nn.Module) -> None:  # noqa: D102
        super().attach(encoder)
        if self.options["outside"]:
            self._take("outside", encoder.outside_parameters())

    def insert(self, encoder: nn.Module, number: int) -> None:  # noqa: D102
        self._take(str(number), encoder.layer_parameters(number))

    def _take(self, place: str, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            is_norm = "norm" in name  # every family calls its norms so
            chosen = {"bias": name.endswith("bias") and not is_norm, "norm": is_norm}
            if not chosen.get(self.options["what"], True):
                continue
            key = f"{place}.{name}"
            if parameter.requires_grad:
                raise AdapterError(
                    f"{key} is trained already; two methods cannot own one parameter"
                )
            self._tuned[key] = parameter
            self._original[key] = parameter.detach().clone()
            parameter.requires_grad_(True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Trained values by name, whether enabled or not."""
        return {name: self._parked.get(name, p.detach()) for name, p in self._tuned.items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take values that :meth:`tensors` gave."""
        for name, parameter in self._tuned.items():
            target = self._parked[name] if name in self._parked else parameter.data
            target.copy_(tensors[name])

    def set_enabled(self, enabled: bool) -> None:  # noqa: D102
        if enabled == self.enabled:
            return
        for name, parameter in self._tuned.items():
            if enabled:
                parameter.data.copy_(self._parked[name])
            else:
                self._parked[name] = parameter.detach().clone()
                parameter.data.copy_(self._original[name])
            parameter.requires_grad_(enabled)
        if enabled:
            self._parked.clear()
        super().set_enabled(enabled)

    def detach(self) -> None:  # noqa: D102
        self.set_enabled(False)
        super().detach()
