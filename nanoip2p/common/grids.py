"""Draw labelled pictures side by side."""

import textwrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

LABEL_WIDTH = 192  # pixels; a grid enlarges narrower pictures so that their labels fit
LABEL_SIZE, LABEL_LETTERS = 14, 200  # font size in pixels; maximum number of characters
GAP = 8  # pixels between the pictures of a grid


def grid(rows: list[list[Image.Image]], labels: list[list[str]]) -> Image.Image:
    """Draw rows of pictures of any sizes, with a label below each. Enlarges narrow pictures."""
    font, line_height = ImageFont.load_default(LABEL_SIZE), LABEL_SIZE + 4
    rows = [[ImageOps.scale(image, max(1, -(-LABEL_WIDTH // image.width)), Image.Resampling.LANCZOS)
             for image in row] for row in rows]
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    wrapped = [[_wrap(label, width, font) for label, width in zip(row, widths)] for row in labels]
    heights = [max(image.height for image in row) for row in rows]
    text_heights = [max(map(len, row)) * line_height for row in wrapped]
    size = sum(widths) + GAP * (len(widths) + 1), sum(heights + text_heights) + GAP * (len(rows) + 1)
    canvas = Image.new("RGB", size, "white")
    draw, y = ImageDraw.Draw(canvas), GAP
    for row, texts, height, text_height in zip(rows, wrapped, heights, text_heights):
        x = GAP
        for image, lines, width in zip(row, texts, widths):
            canvas.paste(image, (x + (width - image.width) // 2, y))
            for i, line in enumerate(lines):
                left = x + (width - draw.textlength(line, font=font)) / 2
                draw.text((left, y + height + i * line_height), line, fill="black", font=font)
            x += width + GAP
        y += height + text_height + GAP
    return canvas


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Wrap a label into lines of at most `width` pixels. Truncates it to LABEL_LETTERS characters."""
    text = text if len(text) <= LABEL_LETTERS else text[: LABEL_LETTERS - 1] + "…"
    for columns in range(max(len(text), 1), 0, -1):
        lines = textwrap.wrap(text, columns) or [""]
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines
