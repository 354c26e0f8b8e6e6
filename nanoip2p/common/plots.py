"""Curves as pictures, where matplotlib is installed (pip install 'nanoip2p[plots]')."""

from collections.abc import Callable
from pathlib import Path

from nanoip2p.common.files import replacing


def plot(path: Path, draw: Callable, size: tuple[float, float] = (8, 4.5), **labels: str) -> bool:
    """Let `draw` draw on axes with these labels (xlabel, ylabel, yscale), and write a PNG. size: inches.

    False when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size)
    draw(axes)
    axes.set(**labels)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    return True
