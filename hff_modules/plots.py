"""Pictures that can be read in black and white; needs matplotlib, an optional extra."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hff_modules.tables import SCORES, score_title

MISSING = "no pictures: matplotlib is not installed; pip install 'hff-modules[plots]'"


def available() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float, columns: int = 1):
    """Give a figure of that size (inches) and its axes, without any display.

    Raises
    ------
    ValueError
        matplotlib is not installed.
    """
    if not available():
        raise ValueError(MISSING)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


@dataclass(frozen=True)
class Point:
    """A method in a picture: its cost ``x``, its score ``y`` and the score's spread."""

    label: str
    x: float
    y: float
    spread: float | None = None


def pareto_front(points: Sequence[Point], larger_is_better: bool = False) -> list[Point]:
    """The points that no other one beats in cost or score while being as good in the other.

    Example
    -------
    >>> points = [Point("a", 1, 9), Point("b", 2, 5), Point("c", 3, 7)]
    >>> [point.label for point in pareto_front(points)]
    ['a', 'b']
    """
    sign = -1 if larger_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not front or sign * point.y < sign * front[-1].y:
            front.append(point)
    return front


def off_the_scale(points: Sequence[Point], larger_is_better: bool = False) -> list[Point]:
    """Points so much worse than the bulk that showing them would squeeze all others into a line.

    Worse than the middle half by five times what it spans, and room for them would double the axis.

    Example
    -------
    >>> points = [Point(str(y), 1, y) for y in (50, 51, 52, 53, 54, 99)]
    >>> [point.label for point in off_the_scale(points)]
    ['99']
    """
    sign = -1 if larger_is_better else 1
    ordered = sorted(points, key=lambda point: sign * point.y)
    if len(ordered) < 6:
        return []
    low, high = (sign * ordered[end].y for end in (len(ordered) // 4, -1 - len(ordered) // 4))
    near = [p for p in ordered if sign * p.y <= high + 5 * (high - low)]
    far = []
    for point in ordered[len(near) :]:
        best, worst = _ends(near, sign)
        span = worst - best
        (far if span > 0 and sign * point.y > worst + span else near).append(point)
    return far


def _ends(points: Sequence[Point], sign: int) -> tuple[float, float]:
    """The best and the worst that is drawn of points, error bars included; the lower the better."""
    ends = [sign * p.y + side * (p.spread or 0) for p in points for side in (-1, 1)]
    return min(ends), max(ends)


def scatter(
    points: Sequence[Point],
    path: Path,
    x_label: str,
    y_label: str,
    larger_is_better: bool = False,
) -> None:
    """Draw scores against cost, the Pareto front marked, as a PNG.

    Arguments
    ---------
    points : Sequence[Point]
    path : pathlib.Path
    x_label, y_label : str
        With units.
    larger_is_better : bool
        Of the score.
    """
    figure, axes = new_figure(9, 6)
    far = off_the_scale(points, larger_is_better)
    near = [point for point in points if point not in far]
    front = pareto_front(points, larger_is_better)
    _scale(axes, [point.x for point in points])
    axes.step(
        *([p.x for p in front if p in near], [p.y for p in front if p in near]),
        **{"where": "post", "color": "0.55", "linestyle": "--", "linewidth": 1, "zorder": 1},
    )
    for of_front, fill, name in (
        (True, "black", "Pareto front: nothing is better at the same cost or less"),
        (False, "white", "other methods"),
    ):
        chosen = [p for p in near if (p in front) == of_front]
        if chosen:
            axes.errorbar(
                [p.x for p in chosen],
                [p.y for p in chosen],
                yerr=[p.spread or 0 for p in chosen],
                **{"fmt": "o", "color": "black", "mfc": fill, "ms": 7, "elinewidth": 0.8},
                **{"capsize": 3, "label": name, "zorder": 3},
            )
    if far:
        sign = -1 if larger_is_better else 1
        best, worst = _ends(near, sign)
        edge, name = sign * (worst + 0.12 * (worst - best)), "off the scale, score beside it"
        for point in far:
            marks = {"color": "black", "mfc": "black" if point in front else "white", "ms": 7}
            axes.plot(point.x, edge, "v" if larger_is_better else "^", label=name, **marks)
            name = None  # once in the legend
        far = [Point(f"{p.label}: {p.y:.1f}", p.x, edge) for p in far]
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"{y_label}, {'higher' if larger_is_better else 'lower'} is better")
    axes.margins(x=0.12, y=0.15)
    axes.grid(True, color="0.9", zorder=0)
    spread = "; bars: standard deviation over seeds" if any(p.spread for p in points) else ""
    figure.legend(loc="outside upper left", ncols=3, frameon=False, title=None, fontsize=9)
    axes.set_title(f"{len(points)} methods{spread}", fontsize=9, loc="left", color="0.3")
    _label(figure, axes, [*near, *far])
    figure.savefig(path)


def _scale(axes, values: Sequence[float]) -> None:
    """Logarithmic where values differ by more than a factor of ten; zero then gets a place."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= 10 * min(positive):
        return
    from matplotlib.ticker import FixedLocator, FuncFormatter

    lowest, ticks = 10.0 ** math.floor(math.log10(min(positive))), []
    if len(positive) < len(values):
        axes.set_xscale("symlog", linthresh=lowest, linscale=0.4)
        ticks = [0.0]
    else:
        axes.set_xscale("log")
    while lowest <= 1.5 * max(positive):
        ticks.append(lowest)
        lowest *= 10
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    for size, sign in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


def _label(figure, axes, points: Sequence[Point]) -> None:
    """Write each point's label where it covers no other label and no point."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()  # now the places of everything are known
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    spots = {point: axes.transData.transform((point.x, point.y)) for point in points}
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in spots.values()]
    for point in points:
        if point.spread:
            x, low = axes.transData.transform((point.x, point.y - point.spread))
            high = axes.transData.transform((point.x, point.y + point.spread))[1]
            taken.append(Bbox.from_extents(x - 4, low, x + 4, high))
    figure.set_layout_engine("none")  # what was measured must stay
    directions = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    directions += [(0.5, 1), (-0.5, 1), (0.5, -1), (-0.5, -1)]
    places = [(r * x, r * y) for r in (8, 16, 26, 38, 52, 68, 86, 106) for x, y in directions]
    for point in sorted(points, key=lambda p: spots[p][1]):
        tried = []
        for place in places:
            text = _write(axes, point, place)
            box = text.get_window_extent(renderer)
            text.remove()
            inside = frame.x0 < box.x0 and box.x1 < frame.x1
            inside = inside and frame.y0 < box.y0 and box.y1 < frame.y1
            tried.append((sum(_overlap(box, b) for b in taken) + 1e6 * (not inside), place, box))
            if tried[-1][0] == 0:
                break
        _, place, box = min(tried, key=lambda candidate: candidate[0])
        line = {"arrowstyle": "-", "color": "0.3", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        _write(axes, point, place, arrowprops=line if max(map(abs, place)) > 10 else None)
        taken.append(box)


def _write(axes, point: Point, place: tuple[float, float], **more):
    x, y = place
    return axes.annotate(
        point.label,
        (point.x, point.y),
        **{"xytext": place, "textcoords": "offset points", "fontsize": 8.5, "zorder": 2},
        **{"bbox": {"boxstyle": "square,pad=0.05", "color": "white", "alpha": 0.8}},
        ha="center" if abs(x) < 0.9 * abs(y) else "left" if x > 0 else "right",
        va="center" if abs(y) < 0.4 * abs(x) else "bottom" if y > 0 else "top",
        **more,
    )


def _overlap(one, other) -> float:
    """Area that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0, width) * max(0, height)


def layers(report: Mapping[str, Any], path: Path) -> None:
    """Draw an analysis of layers: scores, learned weights and similarities, side by side.

    Arguments
    ---------
    report : Mapping[str, Any]
        From :meth:`hff_modules.auto_layers.Analysis.report`.
    path : pathlib.Path
        PNG file.
    """
    figure, (scores, weights, similar) = new_figure(15, 5, columns=3)
    numbers, sum_of_all = report["layers"], report["weighted_sum"]
    score = next(key for key in SCORES if key in report["probes"][0])  # CER tells more than WER
    values = [probe[score] for probe in report["probes"]]
    chosen = report.get("auto", {}).get("chosen", [])
    scores.plot(numbers, values, "-o", color="black", mfc="white", label="one layer")
    scores.plot(
        *(chosen, [values[numbers.index(n)] for n in chosen]),
        **{"linestyle": "none", "marker": "o", "color": "black"},
        label="chosen: auto",
    )
    scores.axhline(sum_of_all[score], color="0.4", linestyle="--", label="weighted sum of all")
    for compared in report.get("auto", {}).get("compared", [])[:1]:
        scores.axhline(compared[score], color="black", linestyle=":", label="chosen ones together")
    higher = "higher" if score == "accuracy" else "lower"
    scores.set_ylabel(f"{score_title(score)} of a linear probe on dev (%), {higher} is better")
    handles, names = scores.get_legend_handles_labels()
    shown = [n for n, name in enumerate(names) if chosen or "chosen" not in name]
    scores.legend([handles[n] for n in shown], [names[n] for n in shown], fontsize=8)
    bars = weights.bar(numbers, sum_of_all["weights"], color="0.75", edgecolor="black")
    for number, bar in zip(numbers, bars, strict=True):
        if number in chosen:
            bar.set_hatch("///")
            bar.set_label("chosen: auto" if number == min(chosen) else None)
    weights.axhline(1 / len(numbers), color="0.4", linestyle="--", label="all alike")
    weights.set_ylabel("weight in a learned sum of all layers (they add up to 1)")
    weights.legend(fontsize=8)
    for axes in (scores, weights):
        axes.set_xlabel("layer (0: what enters layer 1)")
        axes.set_xticks(numbers[:: max(1, len(numbers) // 13)])
        axes.grid(True, axis="y", color="0.9", zorder=0)
        axes.set_axisbelow(True)
    count = len(numbers)
    edges = (numbers[0] - 0.5, numbers[-1] + 0.5)
    image = similar.imshow(
        *(report["cka"],),
        **{"cmap": "gray_r", "vmin": 0, "vmax": 1, "origin": "lower", "extent": edges * 2},
    )
    if count <= 14:
        for i, row in enumerate(report["cka"]):
            for j, value in enumerate(row):
                ink = "white" if value > 0.5 else "black"
                place = (numbers[j], numbers[i])
                text = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
                similar.text(*place, text, ha="center", va="center", fontsize=6.5, color=ink)
    similar.set_xlabel("layer")
    similar.set_ylabel("layer")
    for set_ticks in (similar.set_xticks, similar.set_yticks):
        set_ticks(numbers[:: max(1, len(numbers) // 13)])
    figure.colorbar(image, ax=similar, label="linear CKA of standardised states", shrink=0.8)
    figure.suptitle(f"{Path(report['encoder']).name}, {report['task']}", fontsize=11)
    figure.savefig(path)
