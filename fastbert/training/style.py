"""How fastbert's pictures look: one drawing, for light and for dark pages.

An SVG's texts stay texts, in the fonts of the reader's system. The drawing is laid out in DejaVu Sans, which matplotlib
carries and which is wider than any of those: so the same figure has the same bytes everywhere, and no text needs more
room than it was given. Colours are drawn as on a light page; for a dark one others take their places.
"""

import io
import re
from pathlib import Path
from typing import Any

PAPER, INK, GREY, RULE = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
BLUE, ORANGE, GREEN, VIOLET = "#0969da", "#bc4c00", "#1a7f37", "#8250df"
PINK, BROWN, SLATE, PALE = "#bf3989", "#9a6700", "#6e7781", "#afb8c1"
_DARK = {
    PAPER: "#0d1117",
    INK: "#e6edf3",
    GREY: "#9198a1",
    RULE: "#3d444d",
    BLUE: "#58a6ff",
    ORANGE: "#f0883e",
    GREEN: "#3fb950",
    VIOLET: "#bc8cff",
    PINK: "#f778ba",
    BROWN: "#d29922",
    SLATE: "#8b949e",
    PALE: "#656c76",
}
_FONTS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": GREY,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.facecolor": PAPER,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastbert",
}


def save(figure: Any, path: Path) -> None:
    """As an SVG where the name ends so, else in the format that it ends in.

    Raises:
        OSError, ValueError: if it cannot be written, or nobody knows the format.
    """
    if path.suffix.lower() == ".svg":
        path.write_text(svg(figure), encoding="utf-8")
    else:
        figure.savefig(path)


def svg(figure: Any) -> str:
    figure.savefig(file := io.StringIO(), format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue().replace("'DejaVu Sans'", _FONTS)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def darkened(text: str) -> str:
    """An SVG for dark pages."""
    return re.sub("#[0-9a-f]{6}", lambda colour: _DARK.get(colour[0], colour[0]), text)
