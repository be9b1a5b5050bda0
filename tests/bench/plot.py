"""A line chart as SVG, without any library: a few points, two or three lines."""

from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 76, 52
COLOURS = ["#b5532a", "#1f6f8b", "#5a7d2a"]


def _round_up(value):
    step = 10 ** max(0, len(str(int(value))) - 1)
    return -(-value // step) * step if value > 0 else 1


def line_chart(curves, title, x_name, y_name):
    """`curves`: name -> [(x, y)], x and y from 0 on. Returns the SVG's text."""
    points = [point for curve in curves.values() for point in curve]
    x_end = max(x for x, _ in points)
    y_end = _round_up(max(y for _, y in points))

    def place(x, y):
        return (LEFT + x / x_end * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - y / y_end * (HEIGHT - TOP - BOTTOM))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="13">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{WIDTH / 2}" y="24" text-anchor="middle" font-size="15">{escape(title)}</text>']
    for i in range(5):
        value = y_end * i / 4
        _, y = place(0, value)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for x_value in sorted({x for x, _ in points}):
        x, y = place(x_value, 0)
        out.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{x_value:g}</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>'
               f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" '
               f'transform="rotate(-90 16 {HEIGHT / 2})">{escape(y_name)}</text>')
    for (name, curve), colour in zip(curves.items(), COLOURS):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point, (_, value) in zip((place(*point) for point in curve), curve):
            out.append(f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3" fill="{colour}"/>'
                       f'<text x="{point[0]:.1f}" y="{point[1] - 8:.1f}" text-anchor="middle" '
                       f'font-size="11" fill="{colour}">{value:.3g}</text>')
        x, y = place(*curve[-1])
        out.append(f'<text x="{x - 6:.1f}" y="{y - 22:.1f}" text-anchor="end" fill="{colour}">'
                   f'{escape(name)}</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"
