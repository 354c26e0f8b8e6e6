"""Plots as PNG files, if matplotlib is installed (pip install 'nanoip2p[plots]')."""

from collections.abc import Callable
from pathlib import Path

from nanoip2p.common.cli import one_line
from nanoip2p.common.files import replacing, tidy


def plot(path: Path, draw: Callable, size: tuple[float, float] = (8, 4.5), **labels: str) -> bool:
    """Call draw(axes), set the `labels` (xlabel, ylabel, yscale), and write a PNG. size: in inches. Returns
    False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=size)
    axes = figure.subplots()
    draw(axes)
    axes.set(**labels)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return True


def label_of(weights: str, settings: str) -> str:
    """A curve's label on one line: the name of the weights, then `settings`."""
    name = tidy(Path(weights).name)[:100].replace("$", r"\$")  # matplotlib would read formulas between $
    return one_line(f"{name}, {settings}")
