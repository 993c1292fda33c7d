"""Panels as pictures: curves described as data, drawn for a page, a file or a notebook.

A `Panel` says what is plotted and nothing about how. Three ways to look at panels:

- `svg(panels, prefix)` is an `<svg>` element to put inside an HTML page. Text and axes take the page's
  text colour (`currentColor`), curves the variables `--plot-1` ... `--plot-8` that `theme()` defines for
  light and dark, so that one drawing suits both.
- `save(panels, path)` writes a PNG or SVG file on white.
- `figure(panels)` is a `matplotlib.figure.Figure` for everything else.

The same panels give the same bytes: no dates, no random ids. Only matplotlib's object interface is used,
so a user's own pyplot figures and settings are left alone; matplotlib is imported on the first drawing.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = ["Panel", "downsample", "figure", "save", "short_number", "svg", "theme"]

Curve = tuple[Sequence[float], Sequence[float]]
Style = Literal["line", "faint", "points"]

LIGHT = ("#2460c4", "#d4541c", "#0b8468", "#8a46c7", "#a87400", "#c2337e", "#4f7d1b", "#5b6b80")
DARK = ("#74abff", "#ff9f66", "#45d0a8", "#c6a0f7", "#e6c24f", "#f78cc0", "#a3d672", "#a9b6c6")
INK, PAPER = "#20262e", "#ffffff"

POINTS_PER_INCH = 72
FONT_SIZE = 8.5
# What the labels left of the axes take at most, in inches.
LABELS_WIDTH = 0.8


@dataclass(frozen=True)
class Panel:
    """One plot: named curves of (x, y).

    Values that are not finite, and values <= 0 on a logarithmic axis, leave a gap in their curve.

    Args:
        title: heading above the plot; may be empty.
        x_label: quantity (and unit) of the horizontal axis; may be empty.
        y_label: quantity (and unit) of the vertical axis; may be empty.
        curves: name -> (x, y), two sequences of the same length; drawn in this order.
        log_x: logarithmic horizontal axis.
        log_y: logarithmic vertical axis.
        from_zero: a linear vertical axis that starts at zero, for amounts whose size matters.
        styles: curve name -> "line" (default), "points" (marked and joined by a thin line) or "faint" (thin and pale,
            in the colour of the curve after it: raw values behind their mean).
        marks: x positions of thin vertical lines.

    Raises:
        ValueError: if a curve's x and y differ in length, or `styles` names an unknown curve or style.

    >>> panel = Panel("Loss", "step", "nats per token", {"AdamW": ([1, 2, 3], [5.1, 4.2, 3.9])})
    >>> svg([panel], prefix="loss").startswith("<svg")
    True

    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    styles: Mapping[str, Style] = field(default_factory=dict)
    marks: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name, (x, y) in self.curves.items():
            if len(x) != len(y):
                raise ValueError(f"curve {name!r} must have as many x as y, got {len(x)} and {len(y)}")
        for name, style in self.styles.items():
            if name not in self.curves:
                raise ValueError(f"styles must name curves of the panel, got {name!r}")
            if style not in ("line", "faint", "points"):
                raise ValueError(f"style of {name!r} must be one of 'line', 'faint', 'points', got {style!r}")


def figure(panels: Sequence[Panel], *, width: float = 5.2, height: float = 3.2) -> Figure:
    """A figure with one plot per panel, two to a row.

    Args:
        panels: at least one.
        width: inches per panel.
        height: inches per panel.

    Raises:
        ValueError: if there is no panel.

    >>> len(figure([Panel("", "x", "y", {"f": ([0, 1], [0, 1])})]).axes)
    1

    """
    if not panels:
        raise ValueError("panels must hold at least one Panel, got none")
    with _settings():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04, hspace=0.08)
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        drawing = Figure(figsize=(width * columns, height * rows), layout=layout, facecolor="none")
        FigureCanvasAgg(drawing)
        for number, panel in enumerate(panels):
            axes = drawing.add_subplot(rows, columns, number + 1, facecolor="none")
            axes.set_gid(f"panel-{number}")
            _draw(axes, panel, width)
        return drawing


def save(panels: Sequence[Panel], path: str | Path, *, width: float = 5.2, height: float = 3.2) -> Path:
    """Write the panels' figure to a `.png` or `.svg` file, on white, and return its path.

    Args:
        panels: at least one.
        path: file to write; its folder must exist.
        width: inches per panel.
        height: inches per panel.

    Raises:
        ValueError: if the path ends in neither `.png` nor `.svg`, or there is no panel.

    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path must end in .png or .svg, got {str(path)!r}")
    drawing = figure(panels, width=width, height=height)
    vector = path.suffix.lower() == ".svg"
    with _settings():
        drawing.savefig(
            path,
            format="svg" if vector else "png",
            dpi=200,
            facecolor=PAPER,
            metadata={"Date": None} if vector else {"Software": None},
        )
    return path


def svg(panels: Sequence[Panel], prefix: str, *, width: float = 5.2, height: float = 3.2, label: str = "") -> str:
    """The panels as an `<svg>` element for an HTML page, in the page's own colours.

    Every id begins with `prefix`, so that several drawings share a page. Each plot is a group with
    `data-frame` (left, top, right and bottom of its axes), `data-x` and `data-y` (first value, last value, "linear"
    or "log"); each curve is a group with `data-curve` (its name): enough for a script to read values back.

    Args:
        panels: at least one.
        prefix: letters, digits, "-" and "_", beginning with a letter; different for each drawing of the page.
        width: inches per panel; the element keeps this proportion and fills the width it is given.
        height: inches per panel.
        label: what a screen reader says; the panels' titles if empty.

    Raises:
        ValueError: if the prefix has another form, or there is no panel.

    >>> drawing = svg([Panel("", "x", "y", {"f": ([0, 1], [0, 1])})], prefix="first", label="a straight line")
    >>> 'aria-label="a straight line"' in drawing, "var(--plot-1, #2460c4)" in drawing
    (True, True)

    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", prefix):
        raise ValueError(f"prefix must be letters, digits, '-' and '_', beginning with a letter, got {prefix!r}")
    drawing = figure(panels, width=width, height=height)
    with _settings():
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        # `savefig` would draw everything twice, once for the layout alone.
        drawing.get_layout_engine().execute(drawing)  # type: ignore[union-attr]
        drawing.set_layout_engine("none")
        text = io.StringIO()
        FigureCanvasSVG(drawing).print_svg(text, metadata={"Date": None})
    label = label or ", ".join(panel.title or panel.y_label for panel in panels)
    return _inline(text.getvalue(), drawing, panels, prefix, label)


def theme() -> str:
    """Style sheet with the colours of `svg` drawings, light and, where the reader prefers it, dark."""
    light = " ".join(f"--plot-{number}: {colour};" for number, colour in enumerate(LIGHT, start=1))
    dark = " ".join(f"--plot-{number}: {colour};" for number, colour in enumerate(DARK, start=1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def downsample(x: ArrayLike, y: ArrayLike, limit: int = 2000) -> tuple[list[float], list[float]]:
    """At most `limit` of the points (x, y), chosen so that a plot of them looks like a plot of all.

    The points are cut into runs of equal length and the smallest and largest y of each run are kept, in their order,
    with the first and the last point: a single spike among millions stays. Points whose y is not finite count only
    where a run has nothing else.

    Args:
        x: positions, in ascending order.
        y: as many values.
        limit: >= 4. Default: about twice the pixels that a curve has on a page.

    Raises:
        ValueError: if x and y differ in length or `limit` is below 4.

    >>> x, y = downsample(range(100_000), [0.0] * 77_777 + [9.0] + [0.0] * 22_222, limit=100)
    >>> len(x) <= 100, max(y), x[0], x[-1]
    (True, 9.0, 0.0, 99999.0)

    """
    positions, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(positions) != len(values):
        raise ValueError(f"x and y must have the same length, got {len(positions)} and {len(values)}")
    if limit < 4:
        raise ValueError(f"limit must be >= 4, got {limit}")
    if len(values) > limit:
        keep = {0, len(values) - 1}
        edges = np.linspace(0, len(values), (limit - 2) // 2 + 1).astype(int)
        finite = np.isfinite(values)
        lowest, highest = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
        for start, stop in pairwise(edges):
            keep.add(int(start + lowest[start:stop].argmin()))
            keep.add(int(start + highest[start:stop].argmax()))
        chosen = sorted(keep)
        positions, values = positions[chosen], values[chosen]
    return positions.tolist(), values.tolist()


def short_number(value: float, size: float | None = None) -> str:
    """A number in few characters, as on an axis.

    Args:
        value: any number.
        size: the number whose magnitude decides the form (k, M, B, powers of ten); an axis passes its largest.
            Default: `value` itself.

    >>> [short_number(value) for value in (0, 0.25, 12, 1500, 25_000, 1.5e6, 3e-4)]
    ['0', '0.25', '12', '1500', '25k', '1.5M', '3e−4']

    """
    size = abs(value if size is None else size)
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if unit <= size < 1e13:
            text = f"{value / (1e3 if suffix == 'k' else unit):.6g}{suffix}"
            break
    else:
        if 0.01 <= size < 1e4:
            text = f"{value:.6g}"
        else:
            mantissa, exponent = f"{value:.3e}".split("e")
            text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace("-", "−")


@contextmanager
def _settings() -> Iterator[None]:
    """The defaults of matplotlib plus ours, whatever the user has set; theirs come back at the end."""
    import matplotlib

    keep = {"backend", "backend_fallback", "interactive", "toolbar", "timezone", "webagg.port"}
    settings: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in keep}
    settings |= {
        "font.family": ["DejaVu Sans"],
        "font.size": FONT_SIZE,
        "text.parse_math": False,
        "text.color": INK,
        "path.simplify": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "headway",
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(settings):
        yield


def _draw(axes: Axes, panel: Panel, width: float) -> None:
    colour = 0
    for number, (name, (x, y)) in enumerate(panel.curves.items()):
        style = panel.styles.get(name, "line")
        positions, values = _drawable(x, panel.log_x), _drawable(y, panel.log_y)
        axes.plot(
            positions,
            values,
            label=name,
            gid=f"{axes.get_gid()}-curve-{number}",
            color=LIGHT[colour % len(LIGHT)],
            linestyle="-" if colour < len(LIGHT) else "--",
            zorder=2 + {"faint": 0.0, "line": 0.2, "points": 0.4}[style],
            **_line(style, int((np.isfinite(positions) & np.isfinite(values)).sum())),
        )
        colour += style != "faint"
    for mark in panel.marks:
        axes.axvline(mark, color=INK, alpha=0.5, linewidth=0.8, linestyle=(0, (1.5, 2.5)), zorder=1.5)
    _scales(axes, panel, width)
    _dress(axes, panel, width)


def _drawable(values: Sequence[float], logarithmic: bool) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    return np.where(np.isfinite(numbers) & ((numbers > 0) | (not logarithmic)), numbers, np.nan)


def _line(style: Style, points: int) -> dict[str, Any]:
    if style == "faint":
        return {"linewidth": 0.7, "alpha": 0.45, "marker": "." if points == 1 else "", "markersize": 4}
    marked = style == "points" or points <= 12
    return {
        "linewidth": 1.0 if style == "points" else 1.6,
        "marker": "o" if marked else "",
        "markersize": 4.6,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.8,
        "solid_capstyle": "round",
        "solid_joinstyle": "round",
    }


def _scales(axes: Axes, panel: Panel, width: float) -> None:
    lines = axes.lines[: len(panel.curves)]
    everything = np.concatenate([np.asarray(line.get_xydata()) for line in lines]) if lines else np.empty((0, 2))
    everything = everything[np.isfinite(everything).all(axis=1)]
    if not len(everything):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", alpha=0.6)
        return
    whole = bool((everything[:, 0] == everything[:, 0].round()).all())
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_xlim(_scale(axes.xaxis, everything[:, 0], panel.log_x, margin=0.02, ticks=round(width) + 1, whole=whole))
    axes.set_ylim(_scale(axes.yaxis, everything[:, 1], panel.log_y, margin=0.06, ticks=5, from_zero=panel.from_zero))


def _scale(
    axis: Axis,
    values: np.ndarray,
    logarithmic: bool,
    margin: float,
    ticks: int,
    whole: bool = False,
    from_zero: bool = False,
) -> tuple[float, float]:
    """Give an axis its ticks, labelled in one form; the limits that the values need."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = float(values.min()), float(values.max())
    if logarithmic:
        decades = math.log10(high / low)
        if decades > 0 and high < 10_000 and (np.log2(values) % 1 == 0).all():
            axis.set_major_locator(LogLocator(base=2, numticks=12))
        elif decades < 0.8:
            axis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
        elif decades < 1.5:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        else:
            axis.set_major_locator(LogLocator(numticks=8))
        axis.set_minor_locator(NullLocator())
        # Below one, all in the form of the smallest, so that 0.01 does not stand beside 1e−3.
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, low if value < 1 else value)))
        widen = 10 ** (margin * decades if decades > 0.01 else 0.3)
        return low / widen, high * widen
    axis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10], integer=whole))
    size = max(abs(low), abs(high))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value, size)))
    if from_zero and low >= 0:
        return 0, (1 + margin) * high or 1
    if high - low <= 1e-9 * size:
        spread = 1.0 if whole or size == 0 else 0.1 * size
        return low - spread, high + spread
    return low - margin * (high - low), high + margin * (high - low)


def _dress(axes: Axes, panel: Panel, width: float) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=INK, alpha=0.45, linewidth=0.8)
    axes.tick_params(which="both", color=INK, labelcolor=INK, length=0, pad=4)
    axes.grid(True, which="major", axis="y", color=INK, alpha=0.13, linewidth=0.8)
    if panel.log_x:
        axes.grid(True, which="major", axis="x", color=INK, alpha=0.13, linewidth=0.8)
    axes.set_xlabel(panel.x_label, color=INK, alpha=0.75, labelpad=3)
    axes.set_ylabel(panel.y_label, color=INK, alpha=0.75, labelpad=5)
    legend_height = _legend(axes, panel, width)
    if panel.title:
        size, pad = FONT_SIZE + 2, 8 + legend_height
        axes.set_title(panel.title, loc="left", color=INK, fontsize=size, fontweight="bold", pad=pad)


def _legend(axes: Axes, panel: Panel, width: float) -> float:
    """Name the curves above the axes, where the names cover nothing, in as few rows as fit; the height in points."""
    names = list(panel.curves)
    if not names or (len(names) == 1 and names[0].lower() in ("", panel.title.lower(), panel.y_label.lower())):
        return 0.0
    dots = axes.figure.dpi
    for columns in range(len(names), 0, -1):
        legend = axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.25,
            borderpad=0,
            ncols=columns,
            frameon=False,
            labelcolor=INK,
            handlelength=1.5,
            handletextpad=0.6,
            columnspacing=1.4,
            labelspacing=0.4,
        )
        extent = legend.get_window_extent()
        if extent.width <= (width - LABELS_WIDTH) * dots:
            break
    for name, handle in zip(names, legend.legend_handles, strict=True):
        if handle is not None and panel.styles.get(name) == "faint":
            handle.set(linewidth=1.4, alpha=0.6)
    return extent.height / dots * POINTS_PER_INCH


def _inline(text: str, drawing: Figure, panels: Sequence[Panel], prefix: str, label: str) -> str:
    """A stand-alone SVG document as part of a page: prefixed ids, its colours and font, no global style."""
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*|<!--.*?-->\s*", "", text, flags=re.S
    )
    text = re.sub(r"<[^>]+>", lambda tag: _page_tag(tag[0], prefix), text)
    points = POINTS_PER_INCH * drawing.get_figwidth(), POINTS_PER_INCH * drawing.get_figheight()
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="plot" role="img" '
        f'aria-label="{html.escape(label)}" viewBox="0 0 {points[0]:g} {points[1]:g}" '
        'width="100%" style="stroke-linejoin: round; stroke-linecap: butt">'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: root, text, count=1)
    for number, (panel, axes) in enumerate(zip(panels, drawing.axes, strict=True)):
        group = f'<g id="{prefix}-panel-{number}"'
        text = text.replace(f"{group}>", f"{group}{_read_back(axes, panel, points[1])}>")
        for index, name in enumerate(panel.curves):
            curve = f'<g id="{prefix}-panel-{number}-curve-{index}"'
            text = text.replace(f"{curve}>", f'{curve} data-curve="{html.escape(name)}">')
    return re.sub(r"\n\s*", "\n", text).strip()


def _page_tag(tag: str, prefix: str) -> str:
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    tag = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", tag)
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--plot-font, system-ui, sans-serif)", tag)
    for number, colour in enumerate(LIGHT, start=1):
        tag = tag.replace(colour, f"var(--plot-{number}, {colour})")
    tag = tag.replace(INK, "currentColor").replace(PAPER, f"var(--plot-paper, {PAPER})")
    return re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3f}".rstrip("0").rstrip("."), tag)


def _read_back(axes: Axes, panel: Panel, height: float) -> str:
    box = axes.get_position()
    page = axes.figure.get_figwidth() * POINTS_PER_INCH  # type: ignore[union-attr]
    frame = (box.x0 * page, (1 - box.y1) * height, box.x1 * page, (1 - box.y0) * height)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return (
        f' data-frame="{" ".join(f"{edge:.3f}" for edge in frame)}"'
        f' data-x="{left:.9g} {right:.9g} {"log" if panel.log_x else "linear"}"'
        f' data-y="{bottom:.9g} {top:.9g} {"log" if panel.log_y else "linear"}"'
    )
