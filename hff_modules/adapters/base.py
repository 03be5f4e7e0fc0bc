"""The contract of all adapters: attached under a name, taken off again, saved, switched.

An adapter adds parameters of its own beside a frozen encoder; nothing of the encoder is replaced.
It works through hooks on the modules that ``families`` names, or gives frames that the encoder
puts in front of the speech. At birth it changes
nothing (prompts and prefixes do, and say so by ``identity_at_birth = False``); disabled it is as
good as absent, bit for bit; removed, the encoder is as it was.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hff_modules.layers import LayerSpec, parse_layers


class AdapterError(ValueError):
    """An adapter that does not fit; says what differs."""


WIDTHS = ("bottleneck", "rank", "length", "division")  # of the options


class Adapter(nn.Module):
    """One method, attached under one name to some layers of one encoder.

    A method overrides :meth:`insert`, which makes the parts (parameters) of a layer and calls
    :meth:`change_output` for each place where something is added.

    Arguments
    ---------
    layers : str | int | Sequence[int]
        Layers to attach to, see :func:`hff_modules.layers.parse_layers`.
    **options
        Settings of the method, JSON-able; they are saved with its tensors.
    """

    identity_at_birth = True
    in_layers = True  # False: in front of the layers, with no choice among them
    frames_stay = False  # whether frames_in_front go on to the layers above
    switched_by_row = True  # whether utterances of one batch may use different ones
    merges = False

    def __init__(self, layers: LayerSpec = "all", **options):
        super().__init__()
        for name in WIDTHS:
            width = options.get(name, 1)
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise AdapterError(f"{name}={width!r}: expected a whole number above 0")
        self.method = ""  # set by attach
        self.layer_spec, self.options = layers, options
        self.layers: list[int] = []
        self.parts = nn.ModuleDict()
        self.enabled = True
        self.rows: torch.Tensor | None = None  # of the present batch; None for all
        self._handles: list[RemovableHandle] = []

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that was trained, by name."""
        return self.state_dict()

    def trained(self) -> list[nn.Parameter]:
        """Every parameter that it trains, its own or the encoder's."""
        return list(self.parameters())

    def changed_weights(self) -> list[nn.Parameter]:
        """The encoder's own parameters whose values it changes while it is switched on."""
        return []

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take what :meth:`tensors` gave; names and shapes have been checked."""
        self.load_state_dict(tensors)

    # What a method gives

    def insert(self, encoder: nn.Module, number: int) -> None:
        """Attach to layer ``number`` (from 1) of ``encoder`` (an :class:`SSLEncoder`).

        Methods that are not in layers are called once, with 0.
        """
        raise NotImplementedError

    def frames_in_front(self, number: int) -> torch.Tensor | None:
        """Learned frames (length, width) for the front of what enters layer ``number``."""
        return None

    def lowest_changed(self) -> int:
        """The lowest state that depends on this adapter; 0 for the front end."""
        return min(self.layers, default=0)

    # What attach, remove, enable and disable call

    def attach(self, encoder: nn.Module) -> None:
        """Insert into every chosen layer."""
        if self.in_layers:
            try:
                self.layers = parse_layers(self.layer_spec, encoder.top, lowest=1)
            except ValueError as error:  # the encoder's own layers may be chosen by a key like this
                raise ValueError(f"{self.method}: {error}") from None
        for number in self.layers if self.in_layers else [0]:
            self.insert(encoder, number)
        device = next(encoder.model.parameters()).device
        self.to(device)

    def detach(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set_enabled(self, enabled: bool) -> None:
        """Switch on or off."""
        self.enabled = enabled

    def merge(self) -> None:
        """Fold into the encoder's weights, for methods that can."""
        raise TypeError(f"{self.method!r} cannot be merged into the encoder's weights")

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit."""
        raise TypeError(f"{self.method!r} cannot be merged into the encoder's weights")

    # What methods build with

    def change_output(
        self,
        module: nn.Module,
        change: Callable[..., torch.Tensor],
        reads: nn.Module | None = None,
    ) -> None:
        """Pass the output of ``module`` through ``change``.

        Arguments
        ---------
        module : nn.Module
            Gives a tensor (batch, ...) or a tuple that begins with one.
        change : Callable
            ``change(output)``, or ``change(output, input)`` with ``reads``. No closure:
            ``functools.partial`` of a function and the part, so that deep copies work.
        reads : nn.Module, optional
            The module whose input is handed to ``change`` as well; may be ``module`` itself.
        """
        hook = _OutputHook(self, change, reads is not None)
        if reads is not None:
            self._handles.append(reads.register_forward_pre_hook(hook.look))
        self._handles.append(module.register_forward_hook(hook.alter))

    def applies(self) -> bool:
        """Whether anything of the present batch passes through this adapter."""
        return self.enabled and (self.rows is None or len(self.rows) > 0)

    def on_rows(self, change: Callable, output: torch.Tensor, *inputs: torch.Tensor):
        """Apply ``change`` to the utterances that use this adapter; others stay as they are."""
        if self.rows is None:
            return change(output, *inputs)
        changed = change(output[self.rows], *(tensor[self.rows] for tensor in inputs))
        return output.index_copy(0, self.rows, changed.to(output.dtype))


class _OutputHook:
    """Pass a module's output, and perhaps the input of another, through a change.

    An object and not a closure, so that a deep copy of an encoder has hooks of its own.
    """

    def __init__(self, adapter: Adapter, change: Callable, reads: bool):
        self.adapter, self.change, self.reads = adapter, change, reads
        self.seen: torch.Tensor | None = None

    def applies(self) -> bool:
        return self.adapter.applies()

    def look(self, module: nn.Module, args: tuple) -> None:
        self.seen = args[0] if self.applies() else None

    def alter(self, module: nn.Module, args: tuple, output):
        if not self.applies():
            return None
        first = output[0] if isinstance(output, tuple) else output
        inputs, self.seen = (self.seen,) if self.reads else (), None
        changed = self.adapter.on_rows(self.change, first, *inputs)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def join_frames(
    adapters: nn.ModuleDict, number: int, batch: int, stay: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]] | None:
    """Collect what adapters put in front of the frames that enter a layer.

    Arguments
    ---------
    adapters : nn.ModuleDict
        Adapters of an encoder by name, their rows selected.
    number : int
        Layer, from 1.
    batch : int
        Utterances in the batch.
    stay : bool
        Frames that stay for the layers above, or those that are taken off behind this one.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor, tuple[str, ...]] | None
        Frames (batch, more, width), where an utterance has them (batch, more), and the names of
        the adapters that they are from. None if there are none.
    """
    given = {
        name: (adapter.rows, frames)
        for name, adapter in adapters.items()
        if adapter.frames_stay == stay and adapter.applies()
        if (frames := adapter.frames_in_front(number)) is not None
    }
    if not given:
        return None
    if all(rows is None for rows, _ in given.values()):
        joined = torch.cat([frames for _, frames in given.values()])
        there = torch.ones(batch, len(joined), dtype=torch.bool, device=joined.device)
        return joined.expand(batch, -1, -1), there, tuple(given)
    # The frames of an utterance stand right in front of its speech, where they would be without
    # those of the others.
    by_row: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    for rows, frames in given.values():
        for row in range(batch) if rows is None else rows.tolist():
            by_row[row].append(frames)
    more = max(sum(map(len, own)) for own in by_row)
    first = next(iter(given.values()))[1]
    joined = first.new_zeros(batch, more, first.shape[-1])
    there = torch.zeros(batch, more, dtype=torch.bool, device=first.device)
    for row, own in enumerate(by_row):
        if own:
            start = more - sum(map(len, own))
            joined[row, start:], there[row, start:] = torch.cat(own), True
    return joined, there, tuple(given)


def select_rows(
    adapters: nn.ModuleDict, names: str | Sequence[str | Sequence[str] | None] | None, batch: int
) -> None:
    """Tell each adapter which utterances of the coming batch are its own.

    Arguments
    ---------
    adapters : nn.ModuleDict
        Adapters of an encoder by name.
    names : str | Sequence[str | Sequence[str] | None], optional
        One name for the whole batch; one or several for each utterance (None: the plain encoder);
        or nothing: every adapter that is enabled, everywhere.
    batch : int
        Utterances in the batch.

    Raises
    ------
    KeyError
        For a name that is not attached.
    ValueError
        For an adapter that is switched off, a number of names that is not the batch's, or methods
        that cannot differ by utterance.
    """
    if names is None:
        for adapter in adapters.values():
            adapter.rows = None
        return
    choices = [names] * batch if isinstance(names, str) else names
    by_row = [{one} if isinstance(one, str) else set(one or ()) for one in choices]
    chosen = set().union(*by_row)
    unknown = sorted(chosen - set(adapters))
    if unknown:
        raise KeyError(f"no adapter {unknown[0]!r} is attached; there are {list(adapters)}")
    disabled = sorted(name for name in chosen if not adapters[name].enabled)
    if disabled:
        raise ValueError(f"adapter {disabled[0]!r} is switched off; enable it first")
    if len(by_row) != batch:
        raise ValueError(f"{len(by_row)} adapter names were given for {batch} utterances")
    for name, adapter in adapters.items():
        rows = [row for row, own in enumerate(by_row) if name in own]
        everywhere = len(rows) == batch
        if not everywhere and not adapter.switched_by_row and adapter.enabled:
            raise ValueError(
                f"adapter {name!r} ({adapter.method}) changes the encoder's own weights and cannot "
                "be switched by utterance; use enable and disable"
            )
        device = next((p.device for p in adapter.parameters()), None)
        adapter.rows = None if everywhere else torch.tensor(rows, dtype=torch.long, device=device)
