"""Render a `Scene` of the nano world with Pillow.

Rendering is deterministic: the scene determines every pixel, so the correct result of each edit is known.
"""

import math
from functools import lru_cache

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 46, 48), "orange": (242, 134, 32), "yellow": (250, 212, 50), "green": (46, 158, 74),
    "blue": (44, 98, 216), "purple": (134, 62, 178), "pink": (246, 136, 186), "white": (244, 244, 240),
}

LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.80, 0.70), "night": (0.62, 0.64, 0.86)}  # red, green, blue
SKY = {"day": ((70, 148, 232), (196, 228, 250)),  # top, horizon
       "sunset": ((92, 62, 138), (255, 164, 84)),
       "night": ((10, 14, 44), (46, 56, 110))}
GREY_SKY = {"day": (166, 176, 188), "sunset": (156, 122, 122), "night": (42, 46, 62)}
GROUND_COLOUR = {"grass": (98, 178, 74), "sand": (236, 206, 138), "snow": (238, 244, 252),
                 "dirt": (138, 98, 66)}
FOG = {"day": (226, 230, 234), "sunset": (232, 196, 172), "night": (104, 110, 132)}
OVERCAST = {"clear": 0.0, "cloudy": 0.45, "rainy": 0.85, "foggy": 0.5}  # share of grey in the sky
HORIZON, BASE = 0.62, 0.86  # where hills begin and things stand, in picture heights from the top
HEIGHT = {"small": 0.27, "medium": 0.31, "large": 0.35}  # the unit of u and v for a thing, in picture heights
OUTLINE = (52, 42, 50)


def paint(scene, pixels: int) -> Image.Image:
    """Paint a `Scene` as a square RGB picture, from back to front."""
    pen = Pen(pixels, scene.time, scene.weather)
    pen.image.paste(paint_landscape(pixels, scene.time, scene.weather, scene.ground, scene.landscape))
    for thing in scene.things:
        paint_thing(pen, thing)
    return paint_weather(pen, scene)


@lru_cache(maxsize=2)
def paint_landscape(pixels: int, time: str, weather: str, ground: str, landscape: int) -> Image.Image:
    """Paint sky, hills and ground. Cached, because most edits of a scene change only things."""
    pen = Pen(pixels, time, weather)
    paint_sky(pen, time, weather, landscape)
    paint_ground(pen, ground)
    return pen.image


def mix(a: tuple, b: tuple, share: float) -> tuple:
    """The colour `share` of the way from a to b."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


class Pen:
    """Fills shapes on a square canvas, in the light of time and weather. u points right, v up (see `at`)."""

    def __init__(self, pixels: int, time: str, weather: str):
        self.pixels, self.time = pixels, time
        self.image = Image.new("RGB", (pixels, pixels))
        self.draw = ImageDraw.Draw(self.image)
        self.light = tuple(part * (0.86 if weather == "rainy" else 1.0) for part in LIGHT[time])
        self.at(0.0, 1.0, 1.0)

    def at(self, x: float, y: float, unit: float) -> None:
        """Set the origin of u and v (x right, y down) and their unit, as fractions of the picture."""
        self.x, self.y, self.unit = x, y, unit

    def points(self, uv) -> list[tuple[float, float]]:
        """Convert points (u, v) to pixels."""
        return [((self.x + u * self.unit) * self.pixels, (self.y - v * self.unit) * self.pixels)
                for u, v in uv]

    def lit(self, colour: tuple, glow: bool) -> tuple:
        """The colour under the scene's light. glow: keep the colour, as for a lamp."""
        return colour if glow else tuple(round(c * part) for c, part in zip(colour, self.light))

    def polygon(self, colour: tuple, *uv: tuple[float, float], glow: bool = False) -> None:
        """Fill a polygon with these corners."""
        self.draw.polygon(self.points(uv), fill=self.lit(colour, glow))

    def box(self, colour: tuple, u0: float, v0: float, u1: float, v1: float, glow: bool = False) -> None:
        """Fill the rectangle between two opposite corners."""
        self.polygon(colour, (u0, v0), (u1, v0), (u1, v1), (u0, v1), glow=glow)

    def disc(self, colour: tuple, u: float, v: float, ru: float, rv: float = 0.0, glow: bool = False) -> None:
        """Fill an ellipse with centre (u, v) and radii (ru, rv). If rv is 0: a circle."""
        (x0, y1), (x1, y0) = self.points([(u - ru, v - (rv or ru)), (u + ru, v + (rv or ru))])
        self.draw.ellipse((x0, y0, x1, y1), fill=self.lit(colour, glow))


def paint_sky(pen: Pen, time: str, weather: str, landscape: int) -> None:
    """Paint a vertical gradient, the sun or the moon and stars, clouds, and two rows of hills."""
    (top, horizon), grey, overcast = SKY[time], GREY_SKY[time], OVERCAST[weather]
    rows = int(pen.pixels * (HORIZON + 0.06))
    for row in range(0, rows, 2):
        colour = mix(mix(top, horizon, row / rows), grey, overcast)
        pen.draw.rectangle((0, row, pen.pixels, row + 2), fill=colour)
    if time == "night" and weather == "clear":
        for i in range(26):
            u, v = (i * 0.754878 + 0.05) % 1.0, 0.52 + 0.46 * ((i * 0.569840 + 0.3) % 1.0)
            pen.disc((250, 250, 220), u, v, 0.007, glow=True)
    if weather in ("clear", "cloudy"):
        shade = mix(mix(top, horizon, 0.22), grey, overcast)  # hides a part of the moon
        for disc in {"day": (((255, 238, 150), 0.16, 0.84, 0.095), ((255, 216, 60), 0.16, 0.84, 0.075)),
                     "sunset": (((255, 190, 96), 0.5, 0.45, 0.15), ((255, 226, 150), 0.5, 0.45, 0.115)),
                     "night": (((244, 240, 208), 0.80, 0.84, 0.07), (shade, 0.83, 0.86, 0.06))}[time]:
            pen.disc(*disc, glow=True)
    if weather in ("cloudy", "rainy"):
        cloud = (246, 248, 252) if weather == "cloudy" else (136, 142, 154)
        for u, v, s in ((0.22, 0.80, 0.9), (0.60, 0.90, 1.1), (0.93, 0.76, 0.8)):
            for du, dv, r in ((-0.09, 0.0, 0.05), (-0.03, 0.03, 0.065), (0.05, 0.02, 0.055),
                              (0.10, -0.005, 0.045)):
                pen.disc(cloud, u + du * s, v + dv * s, r * s)
    phase = landscape * 0.0137
    for height, swing, step, share in ((0.075, 0.05, 5.0, 0.62), (0.02, 0.04, 7.5, 0.35)):
        colour = mix((92, 128, 128), (196, 214, 230), share)
        phase = phase * 1.7 + 1.1
        ridge = [(i / 32, 1 - HORIZON + height + swing * math.sin(phase + i * step / 32)) for i in range(33)]
        pen.polygon(colour, (0.0, 0.25), *ridge, (1.0, 0.25))


def paint_ground(pen: Pen, ground: str) -> None:
    """Paint a curved field that darkens towards the viewer, with sparse marks for grass, dirt and sand."""
    colour = GROUND_COLOUR[ground]
    for band in range(5):
        edge = 1 - HORIZON - 0.085 * band
        arch = [(i / 16, edge + 0.025 * math.sin(math.pi * i / 16)) for i in range(17)]
        pen.polygon(mix(colour, (20, 24, 40), 0.045 * band), (0.0, 0.0), *arch, (1.0, 0.0))
    mark = mix(colour, (30, 40, 30), 0.24)
    for i in range(22):
        u, v = (i * 0.618034) % 1.0, 0.02 + 0.34 * ((i * 0.324718) % 1.0)
        if ground == "grass":
            pen.polygon(mark, (u - 0.008, v), (u, v + 0.035), (u + 0.008, v))
        elif ground == "dirt":
            pen.disc(mark, u, v, 0.016, 0.009)
        elif ground == "sand":
            pen.box(mark, u - 0.02, v, u + 0.02, v + 0.006)


def paint_weather(pen: Pen, scene) -> Image.Image:
    """Paint rain or fog over the whole picture. Returns the picture."""
    if scene.weather == "rainy":
        pen.at(0.0, 1.0, 1.0)
        for i in range(44):
            u, v = (i * 0.618034 + 0.03) % 1.0, (i * 0.754878) % 1.0
            streak = ((u, v), (u + 0.008, v), (u - 0.014, v - 0.085), (u - 0.022, v - 0.085))
            pen.polygon((206, 222, 244), *streak)
    if scene.weather == "foggy":
        return Image.blend(pen.image, Image.new("RGB", pen.image.size, FOG[scene.time]), 0.38)
    return pen.image


def paint_thing(pen: Pen, thing) -> None:
    """Draw a thing and its shadow. A balloon hangs in the air; other things stand on the ground."""
    x, size = 0.19 + 0.31 * thing.slot + thing.dx, HEIGHT[thing.size]
    pen.at(x, BASE + thing.dy, size)
    pen.disc((44, 50, 52), 0.0, 0.0, 0.36, 0.06)
    if thing.kind == "balloon":
        pen.at(x, BASE - 0.22 + thing.dy, size)
    colour = COLOURS[thing.colour]
    dark, light = mix(colour, OUTLINE, 0.45), mix(colour, (255, 255, 255), 0.45)
    window = (255, 226, 120) if pen.time == "night" else (206, 232, 246)
    PAINTERS[thing.kind](pen, colour, dark, light, window)


def _house(pen, colour, dark, light, window):
    pen.box(OUTLINE, -0.40, -0.01, 0.40, 0.56)
    pen.box(colour, -0.37, 0.0, 0.37, 0.55)
    pen.polygon(OUTLINE, (-0.52, 0.50), (0.0, 1.0), (0.52, 0.50))
    pen.polygon(dark, (-0.45, 0.53), (0.0, 0.95), (0.45, 0.53))
    pen.box((104, 66, 44), -0.26, 0.0, -0.06, 0.36)
    pen.box(window, 0.06, 0.18, 0.28, 0.40, glow=pen.time == "night")


def _tree(pen, colour, dark, light, window):
    pen.box((112, 76, 48), -0.08, 0.0, 0.08, 0.45)
    for part, grow in ((OUTLINE, 0.035), (colour, 0.0)):
        for u, v, r in ((-0.20, 0.52, 0.21), (0.20, 0.52, 0.21), (0.0, 0.76, 0.24)):
            pen.disc(part, u, v, r + grow)
    pen.disc(light, -0.08, 0.80, 0.09)


def _car(pen, colour, dark, light, window):
    pen.polygon(OUTLINE, (-0.34, 0.30), (-0.20, 0.60), (0.20, 0.60), (0.36, 0.30))
    pen.polygon(window, (-0.26, 0.32), (-0.16, 0.55), (0.16, 0.55), (0.28, 0.32), glow=pen.time == "night")
    pen.box(colour, -0.03, 0.30, 0.03, 0.58)
    pen.box(OUTLINE, -0.53, 0.08, 0.53, 0.36)
    pen.box(colour, -0.50, 0.10, 0.50, 0.34)
    for u in (-0.28, 0.28):
        pen.disc((34, 34, 40), u, 0.09, 0.13)
        pen.disc((186, 190, 196), u, 0.09, 0.06)


def _tent(pen, colour, dark, light, window):
    pen.polygon(OUTLINE, (-0.54, -0.02), (0.0, 0.86), (0.54, -0.02))
    pen.polygon(colour, (-0.48, 0.01), (0.0, 0.80), (0.48, 0.01))
    pen.polygon(light, (-0.28, 0.01), (0.0, 0.80), (-0.10, 0.01))
    pen.polygon((60, 44, 44), (-0.14, 0.01), (0.0, 0.50), (0.14, 0.01))


def _mushroom(pen, colour, dark, light, window):
    pen.polygon(OUTLINE, (-0.19, 0.0), (-0.14, 0.5), (0.14, 0.5), (0.19, 0.0))
    pen.polygon((246, 236, 214), (-0.15, 0.02), (-0.11, 0.5), (0.11, 0.5), (0.15, 0.02))
    for part, grow in ((OUTLINE, 0.03), (colour, 0.0)):
        wide, high, angles = 0.46 + grow, 0.44 + 2 * grow, [i * math.pi / 16 for i in range(17)]
        pen.polygon(part, *((wide * math.cos(a), 0.40 - grow + high * math.sin(a)) for a in angles))
    spot = (250, 246, 236) if light[2] < 236 or light[0] < 236 else (206, 90, 90)
    for u, v, r in ((-0.22, 0.54, 0.07), (0.03, 0.68, 0.08), (0.24, 0.52, 0.06)):
        pen.disc(spot, u, v, r)


def _flower(pen, colour, dark, light, window):
    pen.box((42, 122, 56), -0.035, 0.0, 0.035, 0.55)
    pen.disc((58, 150, 70), 0.13, 0.20, 0.12, 0.06)
    pen.disc((58, 150, 70), -0.13, 0.28, 0.12, 0.06)
    for part, grow in ((OUTLINE, 0.03), (colour, 0.0)):
        for i in range(6):
            a = i * math.pi / 3
            pen.disc(part, 0.21 * math.cos(a), 0.66 + 0.21 * math.sin(a), 0.135 + grow)
    pen.disc((122, 78, 40), 0.0, 0.66, 0.12)


def _rocket(pen, colour, dark, light, window):
    pen.polygon((255, 170, 50), (-0.10, 0.16), (0.0, -0.06), (0.10, 0.16), glow=True)
    for part, u, v in ((OUTLINE, 0.36, 0.06), (dark, 0.31, 0.10)):
        top = v + 0.40
        pen.polygon(part, (-u, v), (-0.14, top), (0.14, top), (u, v), (0.12, v + 0.10), (-0.12, v + 0.10))
    pen.polygon(OUTLINE, (-0.19, 0.13), (-0.19, 0.70), (0.0, 1.04), (0.19, 0.70), (0.19, 0.13))
    pen.polygon(colour, (-0.155, 0.16), (-0.155, 0.69), (0.0, 0.97), (0.155, 0.69), (0.155, 0.16))
    pen.disc(OUTLINE, 0.0, 0.58, 0.11)
    pen.disc(window, 0.0, 0.58, 0.08, glow=pen.time == "night")


def _balloon(pen, colour, dark, light, window):
    pen.polygon(OUTLINE, (-0.24, 0.40), (-0.09, 0.12), (0.09, 0.12), (0.24, 0.40))
    pen.disc(OUTLINE, 0.0, 0.66, 0.37)
    pen.polygon(colour, (-0.22, 0.42), (-0.08, 0.18), (0.08, 0.18), (0.22, 0.42))
    pen.disc(colour, 0.0, 0.66, 0.34)
    pen.disc(light, 0.0, 0.66, 0.12, 0.34)
    pen.box((150, 100, 56), -0.10, 0.0, 0.10, 0.14)


PAINTERS = {"house": _house, "tree": _tree, "car": _car, "tent": _tent, "mushroom": _mushroom,
            "flower": _flower, "rocket": _rocket, "balloon": _balloon}
