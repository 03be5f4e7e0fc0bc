"""The one grammar for choosing layers, used for states, adapters and unfreezing alike."""

import re
from collections.abc import Sequence

LayerSpec = str | int | Sequence[int]

_GRAMMAR = (
    "a list such as [3, 6, 9], one number, 'all', 'every:3', 'first:4', 'last:4', "
    "'all but last:1' or '4-9'"
)


def parse_layers(spec: LayerSpec, num_layers: int, lowest: int = 0) -> list[int]:
    """Turn a layer specification into ascending layer numbers.

    Layer ``k`` is counted from 1; 0 stands for what enters layer 1.

    Arguments
    ---------
    spec : str | int | Sequence[int]
        ``[3, 6, 9]``, ``6``, ``"all"``, ``"every:3"`` (3, 6, 9, ...), ``"first:4"``,
        ``"last:4"``, ``"all but first:1"``, ``"all but last:1"`` or ``"4-9"``.
    num_layers : int
        How many layers the encoder has.
    lowest : int
        Lowest number that may be chosen: 0 for states, 1 for things that live inside layers.

    Returns
    -------
    list[int]

    Raises
    ------
    ValueError
        For a layer that the encoder does not have, one named twice, an empty choice, or a
        specification outside the grammar.

    Example
    -------
    >>> parse_layers("every:3", 12)
    [3, 6, 9, 12]
    >>> parse_layers("last:2", 12)
    [11, 12]
    """
    if isinstance(spec, str):
        chosen = _parse_text(spec.strip(), num_layers, lowest)
    elif isinstance(spec, Sequence):
        chosen = list(spec)
    else:
        chosen = [spec]
    if not chosen:
        raise ValueError(f"layers={spec!r} selects no layer; expected {_GRAMMAR}")
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValueError(
                f"layers={spec!r}: {layer!r} is not a layer number; expected {_GRAMMAR}"
            )
        if not lowest <= layer <= num_layers:
            raise ValueError(
                f"layers={spec!r}: there is no layer {layer}; this encoder has layers "
                f"{lowest} to {num_layers}"
            )
    repeated = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if repeated:
        raise ValueError(f"layers={spec!r} names layer {repeated[0]} more than once")
    return sorted(chosen)


def _parse_text(spec: str, num_layers: int, lowest: int) -> list[int]:
    if spec == "all":
        return list(range(lowest, num_layers + 1))
    if match := re.fullmatch(r"all but (first|last):(\d+)", spec):
        chosen, number = list(range(lowest, num_layers + 1)), int(match[2])
        return chosen[number:] if match[1] == "first" else chosen[: max(len(chosen) - number, 0)]
    if match := re.fullmatch(r"(every|first|last):(\d+)", spec):
        kind, number = match[1], int(match[2])
        if number < 1 or number > num_layers:
            raise ValueError(
                f"layers={spec!r}: expected a number from 1 to {num_layers}, the layers there are"
            )
        if kind == "every":
            return list(range(number, num_layers + 1, number))
        if kind == "first":
            return list(range(1, number + 1))
        return list(range(num_layers - number + 1, num_layers + 1))
    if match := re.fullmatch(r"(\d+)-(\d+)", spec):
        return list(range(int(match[1]), int(match[2]) + 1))
    if re.fullmatch(r"\d+(,\s*\d+)*", spec):
        return [int(number) for number in spec.split(",")]
    raise ValueError(f"layers={spec!r} is not understood; expected {_GRAMMAR}")
