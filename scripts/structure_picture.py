"""The picture of `scripts/structure.py`: rooms as boxes, and arrows for what they import of each other."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, PathPatch, Polygon
from matplotlib.path import Path as Curve
from structure import LAYERS, Edge, Package, circles, is_layered, upward

_COLOURS = (
    "#4C72B0",
    "#DD8452",
    "#55A868",
    "#C44E52",
    "#8172B3",
    "#937860",
    "#DA8BC3",
    "#5F7F95",
    "#B8860B",
    "#2A9D8F",
)
_WRONG = "#C1121F"


def draw(package: Package, out: Path, title: str) -> None:
    """Draw rooms and imports: in layers if the package has them, in a circle otherwise.

    Args:
        package: that is drawn.
        out: the picture, .png or .svg.
        title: above it.
    """
    figure, axes = pyplot.subplots(figsize=(11, 13) if is_layered(package) else (12, 12.6))
    axes.set_axis_off()
    axes.set_aspect("equal")
    groups = circles(package.modules, package.edges)
    room_groups = circles(package.rooms, package.room_edges)
    said = f"{len(package.modules)} modules, {len(package.edges)} imports, "
    if room_groups:
        said += f"{sum(map(len, room_groups))} rooms and {sum(map(len, groups))} modules in circles"
    else:
        said += f"{sum(map(len, groups))} modules in circles"
    axes.set_title(f"{title}\n", fontsize=17, fontweight="bold", loc="left")
    axes.text(0.0, 1.005, said, transform=axes.transAxes, fontsize=11.5, color="#555555")
    (_draw_layers if is_layered(package) else _draw_circle)(package, axes)
    figure.savefig(out, dpi=150, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)


def _width(imports: int) -> float:
    return 0.7 + 0.75 * math.sqrt(imports)


def _draw_layers(package: Package, axes: Axes) -> None:
    """Rooms as boxes, one below the other, those of one layer in one band.

    An import of the next room is a straight arrow, others are arcs at the sides: one side for each importing room. What
    leads up or sideways is red. The modules that all rooms may import are one row at the bottom, without arrows.
    """
    rows = [[room for room in row if room in package.rooms] for row in LAYERS[:-1]]
    width, height, gap, within = 3.4, 0.8, 0.62, 0.14
    middle: dict[str, float] = {}
    y = 0.0
    for row in filter(None, rows):
        tall = len(row) * height + (len(row) - 1) * within
        if len(row) > 1:
            axes.add_patch(
                _box(-width / 2 - 0.14, y - tall - 0.14, width + 0.28, tall + 0.28, "#F0F2F5", "none", order=0)
            )
        for room in row:
            middle[room] = y - height / 2
            y -= height + within
        y += within - gap
    order = list(middle)
    colours = {room: _COLOURS[number % len(_COLOURS)] for number, room in enumerate(order)}
    side = {room: 1 if number % 2 else -1 for number, room in enumerate(order)}
    wrong = set(upward(package))
    edges = [edge for edge in package.room_edges if edge[0] in middle and edge[1] in middle]
    arcs = [edge for edge in edges if order.index(edge[1]) - order.index(edge[0]) != 1]
    # Where arcs meet a box: at its side, those to and from the farthest rooms outermost.
    ports: dict[tuple[str, int], list[Edge]] = defaultdict(list)
    for edge in arcs:
        for room in edge:
            ports[room, side[edge[0]]].append(edge)

    def port(room: str, edge: Edge) -> float:
        here = ports[room, side[edge[0]]]
        other = {one: one[1] if one[0] == room else one[0] for one in here}
        # (From the top: what comes from above, the farthest first; then what leads down, the nearest last.)
        ranked = sorted(here, key=lambda one: (middle[other[one]] < middle[room], -middle[other[one]]))
        above = [one for one in ranked if middle[other[one]] > middle[room]]
        below = [one for one in ranked if one not in above]
        ranked = above[::-1] + below[::-1]
        return middle[room] + height * (0.5 - (ranked.index(edge) + 0.5) / len(ranked)) * 0.86

    for edge in sorted(edges, key=lambda edge: edge in wrong):
        importer, imported = edge
        colour, thick = _WRONG if edge in wrong else colours[importer], _width(package.room_edges[edge])
        if edge in arcs:
            at = side[importer]
            start, end = port(importer, edge), port(imported, edge)
            edge_x = at * width / 2
            out = edge_x + at * (0.55 + 0.46 * abs(end - start))
            tip = edge_x + at * 0.16
            points = [(edge_x, start), (out, start), (out, end), (tip, end)]
            curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
            head = [(edge_x, end), (tip, end + 0.065), (tip, end - 0.065)]
        else:
            start, end = middle[importer] - height / 2, middle[imported] + height / 2
            curve = Curve([(0.0, start), (0.0, end + 0.14)])
            head = [(0.0, end), (-0.08, end + 0.16), (0.08, end + 0.16)]
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=thick, alpha=0.75, capstyle="butt"))
        axes.add_patch(Polygon(head, facecolor=colour, edgecolor=colour, linewidth=thick / 2, zorder=3))
    for room, centre in middle.items():
        inside = package.rooms[room]
        axes.add_patch(_box(-width / 2, centre - height / 2, width, height, "white", colours[room]))
        modules = f"{len(inside)} modules, " if len(inside) > 1 else ""
        axes.text(0, centre + 0.13, room, ha="center", va="center", fontsize=14, fontweight="bold", zorder=4)
        words = f"{modules}{sum(module.lines for module in inside):,} lines"
        axes.text(0, centre - 0.2, words, ha="center", va="center", fontsize=9.5, color="#555555", zorder=4)
    vocabulary = [room for room in LAYERS[-1] if room in package.rooms]
    axes.add_patch(
        FancyBboxPatch((-4.6, y - 0.75), 9.2, 0.75, boxstyle="round,pad=0", facecolor="#F0F2F5", edgecolor="none")
    )
    axes.text(0, y - 0.26, "   ".join(vocabulary), ha="center", va="center", fontsize=13, fontweight="bold")
    axes.text(
        0,
        y - 0.56,
        "the words of the library: every room may import them",
        ha="center",
        va="center",
        fontsize=9.5,
        color="#555555",
    )
    axes.set_xlim(-6.9, 6.9)
    axes.set_ylim(y - 0.9, 0.2)


def _box(x: float, y: float, width: float, height: float, face: str, edge: str, order: int = 2) -> Patch:
    style = "round,pad=0,rounding_size=0.12"
    return FancyBboxPatch(
        (x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=2.2, zorder=order
    )


def _draw_circle(package: Package, axes: Axes) -> None:
    """Rooms on a circle, by name. Imports that are part of an import circle are red."""
    names = sorted(package.rooms)
    place = {name: 2 * math.pi * number / len(names) for number, name in enumerate(names)}
    group_of = {
        name: number for number, group in enumerate(circles(package.rooms, package.room_edges)) for name in group
    }
    for (importer, imported), imports in sorted(package.room_edges.items(), key=lambda item: item[0][0] in group_of):
        start, end = place[importer], place[imported]
        in_circle = importer in group_of and group_of[importer] == group_of.get(imported)
        axes.add_patch(
            FancyArrowPatch(
                (math.cos(start), math.sin(start)),
                (math.cos(end), math.sin(end)),
                connectionstyle=f"arc3,rad={-0.25 if (end - start) % (2 * math.pi) < math.pi else 0.25}",
                arrowstyle="-|>,head_length=4,head_width=2",
                linewidth=_width(imports) * 0.75,
                color=_WRONG if in_circle else "#5F7F95",
                alpha=0.75 if in_circle else 0.4,
                shrinkA=3,
                shrinkB=4,
                zorder=2 if in_circle else 1,
            )
        )
    for name, angle in place.items():
        lines = sum(module.lines for module in package.rooms[name])
        axes.plot(math.cos(angle), math.sin(angle), "o", markersize=3 + math.sqrt(lines) / 7, color="#33415C", zorder=3)
        turned, left = math.degrees(angle), math.cos(angle) < 0
        axes.text(
            1.055 * math.cos(angle),
            1.055 * math.sin(angle),
            f"{name}/" if len(package.rooms[name]) > 1 else name,
            rotation=turned + 180 if left else turned,
            rotation_mode="anchor",
            ha="right" if left else "left",
            va="center",
            fontsize=10.5,
            fontweight="bold" if len(package.rooms[name]) > 1 else "normal",
        )
    axes.set_xlim(-1.45, 1.45)
    axes.set_ylim(-1.45, 1.45)
