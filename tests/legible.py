"""Whether the texts of a drawing can be read."""

from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def drawn_texts(figure: Figure) -> list[Text]:
    """Texts that are seen: not of hidden axes, nor of ticks beyond an axis' ends."""
    hidden = {text for ax in figure.axes if not ax.get_visible() for text in ax.findobj(Text)}
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - 1e-9 * abs(low) <= tick.get_loc() <= high + 1e-9 * abs(high):
                hidden |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]


def illegible(figure: Figure) -> list[str]:
    """Texts that overlap, leave the figure, or are struck through by a line."""
    FigureCanvasAgg(figure).draw()
    boxes = {text: Text.get_window_extent(text).padded(-0.5) for text in drawn_texts(figure)}  # without arrows
    found = [
        f"{text.get_text()!r} leaves"
        for text, box in boxes.items()
        if not all(figure.bbox.contains(*corner) for corner in (box.min, box.max))
    ]
    found += [f"{a.get_text()!r} {b.get_text()!r}" for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    paths = [line.get_transform().transform_path(line.get_path()) for ax in figure.axes for line in ax.lines]
    found += [
        f"{text.get_text()!r} under a line"
        for text, box in boxes.items()
        if any(len(path.vertices) and path.intersects_bbox(box, filled=False) for path in paths)
    ]
    return found
