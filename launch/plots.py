"""What all pictures of numbers have in common."""

import math

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")  # Okabe and Ito's
MARKERS = "osD^vPX*"
STROKES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "pdf.fonttype": 42,  # letters as letters, which publishers ask for
}


def look(number: int) -> dict[str, str]:
    """Colour, marker and stroke of one of several lines: colours that differ for all eyes, eight times four of them."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": STROKES[number // len(COLOURS) % len(STROKES)],
    }


def heading(*names: str) -> str:
    """Names of the program's as a person writes them: `goals: top right` of `goals/top_right`."""
    return ": ".join(name.replace("_", " ") for name in "/".join(names).split("/"))


def grid(count: int, most: int) -> tuple[int, int]:
    """Rows and columns of so many panels, at most `most` beside each other and none much emptier than the others."""
    rows = math.ceil(count / most)
    return rows, math.ceil(count / rows)
