"""Draw pictures side by side, with labels."""

import importlib.util
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

LABEL_WIDTH = 192  # pixels; a grid enlarges narrower pictures so that their labels fit
LABEL_SIZE, LABEL_LETTERS = 14, 200  # font size in pixels; maximum number of characters
GAP = 8  # pixels between the pictures of a grid
WIDTH = 1300  # pixels; `wrap` breaks wider rows, but leaves at least four pictures in each
FONTS = ("~/.local/share/fonts", "~/.fonts", "~/Library/Fonts", "/usr/local/share/fonts", "/usr/share/fonts",
         "/Library/Fonts", "/System/Library/Fonts")


def grid(rows: list[list[Image.Image]], labels: list[list[str]]) -> Image.Image:
    """Draw rows of pictures of any sizes, with a label below each. Enlarges narrow pictures.

    Warns of letters that no installed font has.
    """
    line_height = LABEL_SIZE + 4
    rows = [[ImageOps.scale(image, _scale(image), Image.Resampling.LANCZOS) for image in row] for row in rows]
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    wrapped = [[_wrap(label, width) for label, width in zip(row, widths)] for row in labels]
    heights = [max(image.height for image in row) for row in rows]
    text_heights = [max(len(lines) for lines, *_ in row) * line_height for row in wrapped]
    if lacking := set().union(*(lacking for row in wrapped for *_, lacking in row)):
        warnings.warn(f"no installed font has the letters {''.join(sorted(lacking))}: boxes stand for them; "
                      "install one that has them, such as Noto Sans", stacklevel=2)
    size = sum(widths) + GAP * (len(widths) + 1), sum(heights + text_heights) + GAP * (len(rows) + 1)
    canvas = Image.new("RGB", size, "white")
    draw, y = ImageDraw.Draw(canvas), GAP
    for row, texts, height, text_height in zip(rows, wrapped, heights, text_heights):
        x = GAP
        for image, (lines, font, _), width in zip(row, texts, widths):
            canvas.paste(image, (x + (width - image.width) // 2, y))
            for i, line in enumerate(lines):
                left = x + (width - draw.textlength(line, font=font)) / 2
                draw.text((left, y + height + i * line_height), line, fill="black", font=font)
            x += width + GAP
        y += height + text_height + GAP
    return canvas


def wrap(rows: list[list], labels: list[list[str]], groups: tuple[int, ...] = (1,)) -> tuple[list, list]:
    """Break rows wider than WIDTH. The lines after the first begin with a white picture.

    groups: numbers of pictures to keep together; the first number that fits is used.
    """
    widest = max(image.width * _scale(image) for row in rows for image in row) + GAP
    most = max(3, (WIDTH - GAP) // widest - 1)  # beside the first picture
    group = next((size for size in groups if size <= most), 1)
    broken, texts = [], []
    for (first, *row), (label, *words) in zip(rows, labels):
        lines = -(-len(row) // (most - most % group))
        step = -(-len(row) // (group * max(lines, 1))) * group or 1  # about equally many in each line
        for i in range(0, len(row), step):
            broken.append([Image.new("RGB", first.size, "white") if i else first, *row[i : i + step]])
            texts.append(["" if i else label, *words[i : i + step]])
    return broken, texts


def _scale(image: Image.Image) -> int:
    """The factor by which `grid` enlarges a picture."""
    return max(1, -(-LABEL_WIDTH // image.width))


def _wrap(text: str, width: int) -> tuple[list[str], ImageFont.FreeTypeFont, set[str]]:
    """(lines of at most `width` pixels, font, its missing letters). Truncates to LABEL_LETTERS characters."""
    text = text if len(text) <= LABEL_LETTERS else text[: LABEL_LETTERS - 1] + "…"
    font, lacking = _font(frozenset(text))
    for columns in range(max(len(text), 1), 0, -1):
        lines = textwrap.wrap(text, columns) or [""]
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines, font, lacking


@lru_cache(maxsize=1024)
def _font(letters: frozenset[str]) -> tuple[ImageFont.FreeTypeFont, set[str]]:
    """The font that lacks the fewest of the letters (the first such font), and the letters that it lacks."""
    best = None
    for font in _fonts():
        with suppress(OSError):  # a damaged font
            box = _drawn(font, "\U0010fffe")  # no character: shows the box for missing letters
            lacking = {letter for letter in letters if unicodedata.category(letter)[0] in "LNPS"
                       and _drawn(font, letter) == box}
            best = min(best or (font, lacking), (font, lacking), key=lambda found: len(found[1]))
            if not lacking:
                break
    return best


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _fonts() -> Iterator[ImageFont.FreeTypeFont]:
    """Yield Pillow's font (little more than ASCII), then matplotlib's font, then installed fonts."""
    yield ImageFont.load_default(LABEL_SIZE)
    for path in _font_files():
        with suppress(OSError):  # a bitmap font
            yield ImageFont.truetype(path, LABEL_SIZE)


@lru_cache
def _font_files() -> list[str]:
    """matplotlib's DejaVu, then the files in FONTS: upright sans-serif fonts first."""
    found = [path for folder in FONTS for path in Path(folder).expanduser().rglob("*.[oOtT][tT][fFcC]")
             if not re.search("last|blank", path.stem.lower())]  # LastResort has a box for everything
    odd = re.compile("(?i)bold|italic|oblique|mono|light|thin|black|narrow|condensed")
    found.sort(key=lambda path: ("sans" not in path.stem.lower(), bool(odd.search(path.stem)), path.name))
    if plots := importlib.util.find_spec("matplotlib"):
        found.insert(0, Path(plots.origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans.ttf")
    return list(map(str, found))
