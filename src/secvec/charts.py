"""Curves and histograms as SVG for a page without scripts; pure functions, no torch.

Drawn for a width of 400 units, so that their words can be read on a phone and in print; colours are the page's.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 250, 46, 12, 14, 44
_MOST_TICKS, _MOST_MARKS = 6, 30
Point = tuple[float, float]


def curves(
    lines: Mapping[str, Sequence[Point]], *, title: str, x: str, y: str, marks: Mapping[str, float] | None = None
) -> str:
    """Draw a curve for each name, told apart by colour and dashes.

    x, y: what the axes say; marks: where on the x axis something happened, by a word for it.
    """
    marks = marks or {}
    points = [point for line in lines.values() for point in line]
    frame = _Frame(max(point[0] for point in points), max(point[1] for point in points), min(p[0] for p in points))
    parts = [frame.axes(x, y)]
    for number, line in enumerate(lines.values()):
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in line)
        parts.append(f'<polyline class="curve curve-{number % 4}" points="{path}"/>')
        # A line through one point would not be seen, and marks on many would hide it.
        marked = line if len(line) <= _MOST_MARKS else ()
        parts += [
            f'<circle class="mark-{number % 4}" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2.5"/>'
            for a, b in marked
        ]
    parts += [_mark(name, frame.x(at)) for name, at in marks.items()]
    ends = [f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in lines.items()]
    ends += [f"{name} at {at:g}" for name, at in marks.items()]
    return _svg(title, f"{y} by {x}: {'; '.join(ends)}", parts)


def histogram(bars: Mapping[str, Any], cuts: Sequence[float], *, title: str, x: str, y: str) -> str:
    """Draw counts as bars in two parts, not explained below and explained above.

    bars: `start`, `width` and `counts` ([not explained, explained] a bar), as a scan counts them; cuts: thresholds.
    """
    counts, start, width = bars["counts"], bars["start"], bars["width"]
    end = start + width * len(counts)
    frame = _Frame(end, max(sum(pair) for pair in counts), start)
    parts = [frame.axes(x, y)]
    for number, (others, explained) in enumerate(counts):
        left, right = frame.x(start + number * width), frame.x(start + (number + 1) * width)
        for low, high, kind in ((0, others, "other"), (others, others + explained, "explained")):
            if high > low:
                # A bar of one row among thousands must still be seen.
                tall = max(frame.y(low) - frame.y(high), 1.5)
                parts.append(
                    f'<rect class="{kind}" x="{left + 0.4:.1f}" y="{frame.y(low) - tall:.1f}" '
                    f'width="{max(right - left - 0.8, 0.8):.1f}" height="{tall:.1f}"/>'
                )
    parts += [_cut(frame.x(cut)) for cut in cuts if start <= cut <= end]
    total = [sum(pair[kind] for pair in counts) for kind in (0, 1)]
    return _svg(title, f"{total[1]:,} rows explained, {total[0]:,} not, from {start:.2f} to {end:.2f} {x}", parts)


class _Frame:
    """Where values lie in a chart whose y axis starts at zero."""

    def __init__(self, x_most: float, y_most: float, x_least: float) -> None:
        self._low, self._high = x_least, x_most if x_most > x_least else x_least + 1
        self._most = y_most if y_most > 0 else 1.0

    def x(self, value: float) -> float:
        return _LEFT + (value - self._low) / (self._high - self._low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self._most * (_HEIGHT - _BOTTOM - _TOP)

    def axes(self, x: str, y: str) -> str:
        base = _HEIGHT - _BOTTOM
        parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>']
        for tick in _ticks(self._low, self._high):
            parts.append(f'<text x="{self.x(tick):.1f}" y="{base + 16}" text-anchor="middle">{tick:g}</text>')
        for tick in _ticks(0.0, self._most):
            at = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
        parts.append(f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
        middle = (_TOP + base) / 2
        parts.append(
            f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
        )
        return "".join(parts)


def _cut(at: float) -> str:
    return f'<line class="cut" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'


def _mark(name: str, at: float) -> str:
    """Draw a line with a word above it, inside the picture."""
    side = "start" if at < _WIDTH / 2 else "end"
    return f'{_cut(at)}<text x="{at:.1f}" y="{_TOP - 3}" text-anchor="{side}">{escape(name)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high`, at most six."""
    least = (high - low) / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _svg(title: str, description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )
