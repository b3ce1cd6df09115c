"""Plots as inline SVG text: lines, intervals and sparklines, without a library and without scripts.

Colours come from the page's CSS (`.s0` to `.s5` with a dash pattern each, so that lines differ
without colour too). Every plot has a title and a description for screen readers, and a tooltip on
its points.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34
NUM_STYLES = 6


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points in the order they are joined."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    style: int = 0
    """Colour and dashes; a stage keeps its own through the page."""


def format_number(value: float) -> str:
    """Return a number with about four digits, the way a table shows it: 0.0213, 1.3e-06, 12,345."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 3 - math.floor(math.log10(size)))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers (steps of 1, 2 or 5 times a power of ten) from `low` to `high`."""
    if high <= low:
        return [low]
    power = 10.0 ** (math.floor(math.log10((high - low) / most)))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def downsample(xs: Sequence[float], ys: Sequence[float], limit: int
               ) -> tuple[list[float], list[float]]:
    """Return at most `limit` points that keep the lowest and highest of each stretch.

    A spike of one step stays visible, which taking every n-th point would lose.
    """
    if len(xs) <= limit:
        return list(xs), list(ys)
    buckets = (limit - 2) // 2
    kept = {0, len(xs) - 1}
    for bucket in range(buckets):
        stretch = range(bucket * len(xs) // buckets, (bucket + 1) * len(xs) // buckets)
        kept |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}
    order = sorted(kept)
    return [xs[i] for i in order], [ys[i] for i in order]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to pixels."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.begin + share * (self.end - self.begin), 1)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest with some air; what varies by less than a thousandth looks flat."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    air = 0.06 * (high - low) if high - low > 1e-3 * size else 0.1 * size
    return (low - air, high + air) if air else (low - 1.0, high + 1.0)


def line_plot(title: str, series: Sequence[Series], x_label: str, *, label_id: str,
              diagonal: bool = False, max_points: int = 240) -> str:
    """Return an SVG with one line per series.

    Args:
        title: Name of what is plotted, for screen readers.
        series: At least one, each with at least one point; values are finite.
        x_label: What the horizontal axis shows.
        label_id: Unique in the page; begins the ids of title and description.
        diagonal: Draw y = x, for calibration.
        max_points: Longer lines are thinned out to this many points.
    """
    xs = [x for line in series for x in line.xs]
    ys = [y for line in series for y in line.ys]
    x_axis = _Axis(*((min(xs), max(xs)) if min(xs) < max(xs) else _range(xs)),
                   _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(*_range(ys), _HEIGHT - _BOTTOM, _TOP)
    last = "; ".join(f"{line.name}: {format_number(line.ys[0])} to {format_number(line.ys[-1])}"
                     for line in series)
    parts = [_head(title, f"Against {x_label}. {last}.", label_id, _WIDTH, _HEIGHT),
             *_grid(x_axis, y_axis, x_label)]
    if diagonal:
        low, high = max(x_axis.low, y_axis.low), min(x_axis.high, y_axis.high)
        parts.append(f'<path class="base" d="M{x_axis(low)} {y_axis(low)}'
                     f'L{x_axis(high)} {y_axis(high)}"/>')
    parts += [_line(line, x_axis, y_axis, x_label, max_points) for line in series]
    return "".join(parts) + "</svg>"


def legend(series: Sequence[Series]) -> str:
    """Return HTML that names the lines of a plot; nothing where the only line is the first."""
    if not any(line.style for line in series):
        return ""
    entries = "".join(
        f'<span><svg viewBox="0 0 26 8" aria-hidden="true"><g class="s{line.style % NUM_STYLES}">'
        f'<path class="line" d="M0 4H26"/></g></svg>{escape(line.name)}</span>' for line in series)
    return f'<div class="legend">{entries}</div>'


def _head(title: str, description: str, label_id: str, width: int, height: int) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" role="img" '
            f'aria-labelledby="{label_id}-t {label_id}-d">'
            f'<title id="{label_id}-t">{escape(title)}</title>'
            f'<desc id="{label_id}-d">{escape(description)}</desc>')


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str) -> list[str]:
    """Lines and numbers of both axes."""
    parts = []
    for tick in nice_ticks(y_axis.low, y_axis.high):
        y = y_axis(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>'
                     f'<text x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">'
                     f"{format_number(tick)}</text>")
    for tick in nice_ticks(x_axis.low, x_axis.high):
        parts.append(f'<text x="{x_axis(tick)}" y="{_HEIGHT - _BOTTOM + 15}" '
                     f'text-anchor="middle">{format_number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
                 f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}" '
                 f'text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _line(line: Series, x_axis: _Axis, y_axis: _Axis, x_label: str, max_points: int) -> str:
    """One line with tooltips on some of its points, the last one always."""
    xs, ys = downsample(line.xs, line.ys, max_points)
    points = "L".join(f"{x_axis(x)} {y_axis(y)}" for x, y in zip(xs, ys, strict=True))
    every = math.ceil(6 * len(xs) / max_points)
    shown = sorted({*range(0, len(xs), every), len(xs) - 1})
    dots = "".join(
        f'<circle cx="{x_axis(xs[i])}" cy="{y_axis(ys[i])}" r="{3 if i == len(xs) - 1 else 6}"'
        f'{"" if i == len(xs) - 1 else " class=dot"}>'
        f"<title>{escape(line.name)}, {escape(x_label)} {format_number(xs[i])}: "
        f"{format_number(ys[i])}</title></circle>" for i in shown)
    return f'<g class="s{line.style % NUM_STYLES}"><path class="line" d="M{points}"/>{dots}</g>'


@dataclass(frozen=True, slots=True)
class Interval:
    """A share with its 95% interval."""

    name: str
    rate: float
    low: float
    high: float


def interval_plot(title: str, rows: Sequence[Interval], *, label_id: str) -> str:
    """Return an SVG of shares from 0 to 1 as dots with whiskers, and a line at one half."""
    row_height, width, top = 40, 360, 6
    height = top + row_height * len(rows) + 24
    axis = _Axis(0.0, 1.0, 16, width - 16)
    base = height - 20
    description = "; ".join(f"{row.name}: {row.rate:.3f}, 95% interval {row.low:.3f} to "
                            f"{row.high:.3f}" for row in rows)
    parts = [_head(title, description + ".", label_id, width, height)]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        style = "base" if tick == 0.5 else "grid"
        parts.append(f'<path class="{style}" d="M{axis(tick)} {top}V{base}"/>'
                     f'<text x="{axis(tick)}" y="{height - 5}" text-anchor="middle">'
                     f"{format_number(tick)}</text>")
    for index, row in enumerate(rows):
        y = top + row_height * index + 28
        parts.append(
            f'<text class="name" x="16" y="{y - 12}">{escape(row.name)}</text>'
            f'<g class="s{index % NUM_STYLES}">'
            f'<path class="whisker" d="M{axis(row.low)} {y}H{axis(row.high)}"/>'
            f'<circle cx="{axis(row.rate)}" cy="{y}" r="5"><title>{escape(row.name)}: '
            f"{row.rate:.3f} ({row.low:.3f} to {row.high:.3f})</title></circle></g>")
    return "".join(parts) + "</svg>"


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with its name and 95% intervals both ways, and the points that it is the mean of."""

    name: str
    x: Interval
    y: Interval
    points: tuple[tuple[float, float], ...] = ()


def scatter_plot(title: str, marks: Sequence[Mark], x_label: str, *, label_id: str,
                 base: float | None = None) -> str:
    """Return an SVG of named points with whiskers; what they are the means of in faint dots.

    The axes hold the points; a whisker that is longer ends at the edge.

    Args:
        title: Name of what is plotted, for screen readers.
        marks: At least one.
        x_label: What the horizontal axis shows.
        label_id: Unique in the page; begins the ids of title and description.
        base: Draw a dashed line at this height.
    """
    ys = [y for mark in marks for y in (mark.y.low, mark.y.high, *(y for _, y in mark.points))]
    xs = [x for mark in marks for x in (mark.x.rate, *(x for x, _ in mark.points))]
    low, high = _range(xs)
    x_axis = _Axis(low, high + 0.12 * (high - low), _LEFT, _WIDTH - _RIGHT)  # room for names
    y_axis = _Axis(*_range([*ys, *([] if base is None else [base])]), _HEIGHT - _BOTTOM, _TOP)
    described = "; ".join(f"{mark.name}: {format_number(mark.y.rate)} at "
                          f"{format_number(mark.x.rate)}" for mark in marks)
    parts = [_head(title, f"Against {x_label}. {described}.", label_id, _WIDTH, _HEIGHT),
             *_grid(x_axis, y_axis, x_label)]
    if base is not None:
        parts.append(f'<path class="base" d="M{_LEFT} {y_axis(base)}H{_WIDTH - _RIGHT}"/>')
    heights = _apart([y_axis(mark.y.rate) for mark in marks])
    for index, (mark, height) in enumerate(zip(marks, heights, strict=True)):
        x, y = x_axis(mark.x.rate), y_axis(mark.y.rate)
        left, right = (x_axis(min(max(end, x_axis.low), x_axis.high))
                       for end in (mark.x.low, mark.x.high))
        dots = "".join(f'<circle class="seed" cx="{x_axis(px)}" cy="{y_axis(py)}" r="2"/>'
                       for px, py in mark.points)
        parts.append(
            f'<g class="s{index % NUM_STYLES}">{dots}'
            f'<path class="thin" d="M{x} {y_axis(mark.y.low)}V{y_axis(mark.y.high)}'
            f'M{left} {y}H{right}"/><circle cx="{x}" cy="{y}" r="4"><title>{escape(mark.name)}: '
            f"{mark.y.rate:.3f} ({mark.y.low:.3f} to {mark.y.high:.3f}) at "
            f"{format_number(mark.x.rate)}</title></circle></g>"
            f'<text class="name" x="{x + 7}" y="{height - 3}">{escape(mark.name)}</text>')
    return "".join(parts) + "</svg>"


def _apart(heights: Sequence[float], gap: float = 12.0) -> list[float]:
    """Heights of labels that keep a distance, each as near as that allows to the one above it."""
    placed = list(heights)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for above, below in itertools.pairwise(order):
        placed[below] = round(max(placed[below], placed[above] + gap), 1)
    return placed


def sparkline(ys: Sequence[float], max_points: int = 60) -> str:
    """Return a small line without axes; decoration beside numbers, hidden from screen readers."""
    _, values = downsample(range(len(ys)), ys, max_points)
    low, high = _range(values)
    x_axis, y_axis = _Axis(0, max(len(values) - 1, 1), 1, 79), _Axis(low, high, 19, 1)
    points = "L".join(f"{x_axis(i)} {y_axis(y)}" for i, y in enumerate(values))
    return ('<svg class="spark" viewBox="0 0 80 20" aria-hidden="true">'
            f'<g class="s0"><path class="line" d="M{points}"/></g></svg>')
