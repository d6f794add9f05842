"""Charts as inline SVG, drawn by hand so that their colours follow the page (light or dark) and nothing is fetched."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
MOST_POINTS = 240  # a line; more cannot be told apart at this size


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]
    colour: int  # 0..5: the page's palette
    dashed: bool = False
    dots: bool = False


def line_chart(series: Sequence[Series], x_name: str, *, share: bool, log_x: bool = False, label: str) -> Markup:
    """`share`: the values are fractions, shown per cent. `label` says what is drawn, to those who cannot see it."""
    series = [Series(s.name, thin(s.points), s.colour, s.dashed, s.dots) for s in series if s.points]
    if not series:
        return Markup()
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    place_x: Callable[[float], float] = math.log10 if log_x else float
    x_low, x_high = place_x(min(xs)), place_x(max(xs))
    y_ticks = ticks(min(ys), max(ys), most=1.0 if share else math.inf)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (place_x(x) - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    decimals = _decimals(y_ticks, 100 if share else 1)
    for tick in y_ticks:
        _, y = at(min(xs), tick)
        shown = _signed(f"{100 * tick if share else tick:.{decimals}f}")
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{shown}</text>')
    for tick in sorted(set(xs)) if log_x else [t for t in ticks(min(xs), max(xs)) if min(xs) <= t <= max(xs)]:
        x, _ = at(tick, y_low)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_name)}</text>')
    for s in series:
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in s.points)
        parts.append(f'<polyline class="line c{s.colour}{" dashed" if s.dashed else ""}" points="{path}"/>')
        if s.dots or len(s.points) == 1:
            for x, y in s.points:
                value = f"{100 * y:.1f} %" if share else _signed(f"{y:.3g}")
                place = 'cx="{:.1f}" cy="{:.1f}"'.format(*at(x, y))
                parts.append(
                    f'<circle class="dot c{s.colour}" {place} r="2.6"><title>{escape(s.name)}, {_short(x)}: {value}</title></circle>'
                )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return Markup(svg) + legend(series)


def legend(series: Sequence[Series]) -> Markup:
    if len(series) < 2:
        return Markup()
    keys = (f'<span class="key"><i class="c{s.colour}{" dashed" if s.dashed else ""}"></i>{escape(s.name)}</span>' for s in series)
    return Markup(f'<div class="legend">{"".join(keys)}</div>')


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS: means of equal stretches, so that nothing is hidden by what happens to be drawn."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / MOST_POINTS)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [(stretch[-1][0], sum(y for _, y in stretch) / len(stretch)) for stretch in stretches]


def ticks(low: float, high: float, most: float = math.inf) -> list[float]:
    """Round numbers that enclose low..high, four to seven of them, none above `most`."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = (low - 0.01, high + 0.01) if high < most else (low - 0.02, high)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(min(high, most) / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _decimals(values: Sequence[float], scale: float) -> int:
    return next(d for d in range(8) if d == 7 or all(abs(round(v * scale, d) - v * scale) < 1e-9 for v in values))


def _short(number: float) -> str:
    return _signed(f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:g}")


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def bars(rows: Sequence[tuple[str, float, float | None]], *, label: str) -> Markup:
    """Shares as horizontal bars (name, share, where to set a mark or None), all from zero to the largest."""
    if not rows:
        return Markup()
    height, margin = 17, 96
    largest = max(max(share, mark or 0) for _, share, mark in rows) or 1
    across = (WIDTH - margin - 48) / largest
    parts = []
    for number, (name, share, mark) in enumerate(rows):
        y = number * height
        parts.append(f'<text class="tick" x="{margin - 6}" y="{y + 12}" text-anchor="end">{escape(clip(name))}</text>')
        parts.append(f'<rect class="right" x="{margin}" y="{y + 3}" width="{share * across:.1f}" height="{height - 5}" rx="2"/>')
        if mark is not None:
            x = margin + mark * across
            parts.append(f'<line class="line c1" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 1}" y2="{y + height - 1}"/>')
        parts.append(f'<text class="tick" x="{margin + max(share, mark or 0) * across + 5:.1f}" y="{y + 12}">{100 * share:.1f}</text>')
    return Markup(f'<svg viewBox="0 0 {WIDTH} {len(rows) * height + 2}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def heat_map(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """Rows: true class; columns: predicted. Colour is the share of the row; numbers where they can be read."""
    size = len(names)
    longest = max(len(name) for name in names)
    margin = min(92, 14 + 6.2 * min(longest, 13))
    cell = (WIDTH - margin - 2) / size
    turned = longest > 2
    top = margin if turned else 20
    font = min(12.0, cell * 0.42)
    parts = []
    for row, counts in enumerate(confusion):
        total, y = max(1, sum(counts)), top + row * cell
        parts.append(
            f'<text class="tick" x="{margin - 6:.1f}" y="{y + cell / 2 + 3.5:.1f}" text-anchor="end">{escape(clip(names[row]))}</text>'
        )
        x = margin + (row + 0.5) * cell
        spot = (
            f'transform="translate({x + 3.5:.1f},{top - 6:.1f}) rotate(-90)"'
            if turned
            else f'x="{x:.1f}" y="{top - 6}" text-anchor="middle"'
        )
        parts.append(f'<text class="tick" {spot}>{escape(clip(names[row]))}</text>')
        for column, count in enumerate(counts):
            share, x = count / total, margin + column * cell
            kind = "right" if row == column else "wrong"
            opacity = 0.12 + 0.88 * share if row == column else min(1.0, 0.25 + 3 * share) if count else 0.0
            place = f'x="{x + 0.75:.1f}" y="{y + 0.75:.1f}" width="{cell - 1.5:.1f}" height="{cell - 1.5:.1f}" rx="2"'
            title = f"<title>{escape(names[row])} taken for {escape(names[column])}: {count} of {total}</title>"
            parts.append(f'<rect class="empty" {place}/><rect class="{kind}" {place} fill-opacity="{opacity:.2f}">{title}</rect>')
            if count and cell >= 17:
                strong = " strong" if opacity > 0.55 else ""
                middle = f'x="{x + cell / 2:.1f}" y="{y + cell / 2 + font * 0.36:.1f}"'
                parts.append(f'<text class="count{strong}" {middle} font-size="{font:.1f}" text-anchor="middle">{count}</text>')
    view = f"0 0 {WIDTH} {top + size * cell + 2:.0f}"
    return Markup(f'<svg viewBox="{view}" role="img" aria-label="Confusion matrix: rows true, columns predicted">{"".join(parts)}</svg>')


def clip(name: str, most: int = 13) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
