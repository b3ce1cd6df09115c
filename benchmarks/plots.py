"""Plots of result files as SVG text: points and lines on logarithmic axes, and stacked bars.

A file of its own each, which Markdown shows as an image; colours that read on light and dark pages,
and a marker for each line, so that lines differ without colour too.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from fastrl.report_svg import Series, format_number

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 340, 70, 16, 34, 44
_LINE = 16
"""Height of a line of the legend."""
COLOURS = ("#3b82c4", "#d9822b", "#3f9a5f", "#b45fae", "#8a8f2a", "#c2504f")
MARKERS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-4 -4H4V4H-4Z", "M0 -5L5 4H-5Z",
           "M0 -5L5 0L0 5L-5 0Z", "M-5 -1H-1V-5H1V-1H5V1H1V5H-1V1H-5Z", "M0 5L5 -4H-5Z")


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>')


def _document(title: str, parts: Sequence[str], height: float) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
            f'font-family="sans-serif" font-size="12" fill="#808080" role="img">'
            f"<title>{escape(title)}</title>"
            + _text(_WIDTH / 2, 18, title, extra=' font-size="14"') + "".join(parts) + "</svg>\n")


def _ticks(low: float, high: float, base: int) -> list[float]:
    """Powers of the base from `low` to `high`, at most eight; of ten also 2 and 5 times a few."""
    first, last = (math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9))
    if base == 10 and last - first <= 2:
        steps = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
        begin = max(step for step in steps if step <= low * (1 + 1e-9))
        end = min((step for step in steps if step >= high), default=steps[-1])
        return [step for step in steps if begin <= step <= end]
    every = max(1, -(-(last - first + 1) // 8))
    return [float(base)**power for power in range(first, last + 1, every)]


def log_plot(title: str, series: Sequence[Series], x_label: str, y_label: str, *, base: int = 10,
             guides: Sequence[Series] = (), joined: bool = True) -> str:
    """An SVG with logarithmic axes.

    Args:
        series: At least one point; all coordinates positive. `style` picks colour and marker.
        base: Of the ticks of the horizontal axis: 2 where sizes double.
        guides: Dashed lines without markers, such as limits.
        joined: Draw lines between the points of a series.
    Raises:
        ValueError: when there is no point, or one that has no logarithm.
    """
    everything = [*series, *guides]
    xs = [x for line in everything for x in line.xs]
    ys = [y for line in everything for y in line.ys]
    if not xs or min(*xs, *ys) <= 0:
        raise ValueError(f"{title}: expected points with positive coordinates, got "
                         f"{min([*xs, *ys], default=None)}")
    x_ticks, y_ticks = _ticks(min(xs), max(xs), base), _ticks(min(ys), max(ys), 10)

    def scaled(value: float, ticks: Sequence[float], begin: float, end: float) -> float:
        low, high = math.log(ticks[0]), math.log(max(ticks[-1], 2 * ticks[0]))
        return begin + (math.log(value) - low) / (high - low) * (end - begin)

    def at(x: float, y: float) -> tuple[float, float]:
        return (scaled(x, (*x_ticks[:1], max(x_ticks[-1], max(xs))), _LEFT, _WIDTH - _RIGHT),
                scaled(y, (*y_ticks[:1], max(y_ticks[-1], max(ys))), _HEIGHT - _BOTTOM, _TOP))

    parts = []
    for tick in y_ticks:
        y = at(xs[0], tick)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#80808040"/>'
                     + _text(_LEFT - 6, y + 4, format_number(tick), "end"))
    parts += [_text(at(tick, ys[0])[0], _HEIGHT - _BOTTOM + 16, format_number(tick))
              for tick in x_ticks]
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 10, x_label))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(_text(14, middle, y_label, extra=f' transform="rotate(-90 14 {middle:.0f})"'))
    for number, line in enumerate(everything):
        points = [at(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        is_guide = number >= len(series)
        colour = "#808080" if is_guide else COLOURS[line.style % len(COLOURS)]
        if len(points) > 1 and (joined or is_guide):
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"'
                         + (' stroke-dasharray="5 4"' if is_guide else "") + "/>")
        if not is_guide:
            parts += [f'<path d="{MARKERS[line.style % len(MARKERS)]}" fill="{colour}" '
                      f'transform="translate({x:.1f} {y:.1f})"/>' for x, y in points]
        legend = _HEIGHT + 4 + _LINE * number
        mark = (f'<path d="M{_LEFT - 8} {legend}h16" stroke="{colour}" stroke-dasharray="5 4"/>'
                if is_guide else f'<path d="{MARKERS[line.style % len(MARKERS)]}" fill="{colour}" '
                f'transform="translate({_LEFT} {legend})"/>')
        parts.append(mark + _text(_LEFT + 14, legend + 4, line.name, "start"))
    return _document(title, parts, _HEIGHT + _LINE * len(everything) + 4)


def bar_plot(title: str, bars: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """An SVG of horizontal bars, each of named pieces one after the other.

    Args:
        bars: Name of the bar -> name of the piece -> its size, not negative.
    Raises:
        ValueError: when there is nothing to draw.
    """
    longest = max((sum(pieces.values()) for pieces in bars.values()), default=0.0)
    if longest <= 0:
        raise ValueError(f"{title}: expected a bar of some length")
    names = list(dict.fromkeys(name for pieces in bars.values() for name in pieces))
    left, parts = 130, []
    for row, (bar, pieces) in enumerate(bars.items()):
        x, y = float(left), _TOP + 8 + 34 * row
        parts.append(_text(left - 8, y + 15, bar, "end"))
        for name, size in pieces.items():
            width = size / longest * (_WIDTH - left - 80)
            parts.append(f'<path d="M{x:.1f} {y}h{width:.1f}v22h-{width:.1f}Z" '
                         f'fill="{COLOURS[names.index(name) % len(COLOURS)]}"><title>'
                         f"{escape(name)}: {format_number(size)} {escape(unit)}</title></path>")
            x += width
        parts.append(_text(x + 6, y + 15, f"{format_number(sum(pieces.values()))} {unit}", "start"))
    below = _TOP + 8 + 34 * len(bars) + 14
    for number, name in enumerate(names):
        y = below + _LINE * number
        parts.append(f'<path d="M{left} {y - 9}h10v10h-10Z" fill="'
                     f'{COLOURS[number % len(COLOURS)]}"/>' + _text(left + 16, y, name, "start"))
    return _document(title, parts, below + _LINE * len(names))
