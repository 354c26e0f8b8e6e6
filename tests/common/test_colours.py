"""The colours and the transparency of picture files, against values computed here from the bytes."""

import io
import struct
import zlib
from itertools import starmap

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from nanoip2p.common.colours import _transform, to_rgb
from nanoip2p.images import open_image

WHITE = 255
KEYS = {1: [0, 1], 2: [0, 1, 3], 4: [0, 1, 15], 8: [0, 7, 255], 16: [0, 0x1234, 65535]}  # by depth


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels, depth, kind, *chunks):
    """A PNG file of one row of pixels, each a list of samples. kind: the colour type of IHDR."""
    bits = "".join(f"{sample:0{depth}b}" for pixel in pixels for sample in pixel)
    bits += "0" * (-len(bits) % 8)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    return b"".join([
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", len(pixels), 1, depth, kind, 0, 0, 0)),
        *starmap(chunk, chunks), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")])


def opened(content):
    return np.asarray(open_image("a picture", io.BytesIO(content))).astype(int)


def over_white(colours, depth, alphas):
    """Samples of `depth` bits and alphas from 0 to 1 -> levels of 8 bits over white."""
    levels = np.array(colours) / (2**depth - 1) * 255
    return levels * np.array(alphas)[:, None] + WHITE * (1 - np.array(alphas)[:, None])


def assert_levels(content, expected, allowed=1):
    row = opened(content)[0]
    assert row.shape == (len(expected), 3)
    assert np.abs(row - np.broadcast_to(expected, row.shape)).max() <= allowed, (row.tolist(), expected)


@pytest.mark.parametrize("depth, key", [(depth, key) for depth in KEYS for key in (None, *KEYS[depth])])
def test_grey_of_every_depth_with_a_transparent_grey(depth, key):
    top = 2**depth - 1
    greys = sorted({0, 1, top // 2, top, *KEYS[depth], *([0x1235, 0x1134] if depth == 16 else [])})
    trns = [] if key is None else [(b"tRNS", struct.pack(">H", key))]
    expected = over_white([[grey] for grey in greys], depth, [grey != key for grey in greys])
    assert_levels(png([[grey] for grey in greys], depth, 0, *trns), expected)
    if key is not None and depth < 8:  # the higher bits of the key do not count
        wide = [(b"tRNS", struct.pack(">H", key + 2**depth))]
        assert depth == 1 or opened(png([[grey] for grey in greys], depth, 0, *wide)).tolist() == opened(
            png([[grey] for grey in greys], depth, 0, *trns)).tolist()


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_of_every_depth_with_a_transparent_colour(depth):
    top = 2**depth - 1
    key = [1, 2, top // 3]
    colours = [key, [2, 2, top // 3], [1, 2, top // 3 + 1], [0, top, 0], [top, top, top]]
    assert_levels(png(colours, depth, 2), over_white(colours, depth, [1] * 5))
    for key in colours:
        expected = over_white(colours, depth, [colour != key for colour in colours])
        assert_levels(png(colours, depth, 2, (b"tRNS", struct.pack(">HHH", *key))), expected)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [None, [51], [255, 0], [0, 255], [0, 0], [128, 51]])
def test_palettes_of_every_depth_with_alphas(depth, alphas):
    colours = [[10, 20, 30], [200, 100, 0], [0, 0, 0], [255, 255, 255]][: 2**depth]
    chunks = [(b"PLTE", bytes(sum(colours, [])))] + ([(b"tRNS", bytes(alphas))] if alphas else [])
    covered = [alpha / 255 for alpha in alphas or []] + [1] * len(colours)
    assert_levels(png([[i] for i in range(len(colours))], depth, 3, *chunks),
                  over_white(colours, 8, covered[: len(colours)]))


@pytest.mark.parametrize("depth", [8, 16])
def test_alpha_channels_of_every_depth(depth):
    top = 2**depth - 1
    alphas = [0, top // 5, top // 2, top]
    covered = [alpha / top for alpha in alphas]
    assert_levels(png([[top // 3, alpha] for alpha in alphas], depth, 4),
                  over_white([[top // 3]] * 4, depth, covered))
    assert_levels(png([[0, top // 3, top, alpha] for alpha in alphas], depth, 6),
                  over_white([[0, top // 3, top]] * 4, depth, covered))
    palette = Image.new("P", (1, 1))
    palette.putpalette([0, 51, 255])
    palette = palette.convert("PA")
    palette.putalpha(51)
    assert np.abs(np.asarray(to_rgb(palette))[0, 0] - [204.0, 214.2, 255]).max() <= 1


def encoded(light):
    """Light from 0 to 1 -> sRGB from 0 to 255."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_the_gamma_of_a_png_is_applied():
    colours = [[0, 0, 0], [1, 64, 128], [200, 255, 30]]
    light = np.array(colours) / 255

    def gama(value, *more):
        return png(colours, 8, 2, (b"gAMA", struct.pack(">I", value)), *more)

    for value in (100_000, 55_556, 50_000, 30_000):
        assert_levels(gama(value), encoded(light ** (100_000 / value)))
    grey = png([[0], [100], [255]], 8, 0, (b"gAMA", struct.pack(">I", 100_000)))
    assert_levels(grey, encoded(np.array([[0], [100], [255]]) / 255))
    for same in (gama(45_455), gama(45_000), gama(0), gama(100_000, (b"sRGB", b"\0")),
                 gama(100_000, (b"iCCP", b"x\0\0" + zlib.compress(SRGB))),
                 png(colours, 8, 2, (b"tEXt", b"gamma\0one"), (b"tEXt", b"icc_profile\0one"))):
        assert opened(same)[0].tolist() == colours


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(space, connection=b"XYZ ", **tags):
    """An ICC profile, version 4 without the parts that readers do not need."""
    names, contents, begin = list(tags), list(tags.values()), 132 + 12 * len(tags)
    table = b""
    for name, content in zip(names, contents):
        table += name.encode() + struct.pack(">II", begin, len(content))
        begin += len(content)
    header = struct.pack(">I4sI4s4s4s12s4s28s", begin, b"", 0x04200000, b"mntr", space, connection, b"",
                         b"acsp", b"")
    header += fixed(0.9642, 1, 0.8249) + b"\0" * 48
    return header + struct.pack(">I", len(tags)) + table + b"".join(contents)


# Red, green and blue in XYZ under D50, from the ICC profiles of these spaces
PRIMARIES = {
    "srgb": [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)],
    "display p3": [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)],
    "adobe rgb": [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)],
}
SRGB_CURVE = b"para\0\0\0\0\0\x03\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
CURVES = {"display p3": SRGB_CURVE, "adobe rgb": curve(563 / 256)}


def rgb_profile(name):
    points = {f"{letter}XYZ": b"XYZ \0\0\0\0" + fixed(*xyz) for letter, xyz in zip("rgb", PRIMARIES[name])}
    return profile(b"RGB ", **points, **{f"{letter}TRC": CURVES[name] for letter in "rgb"})


def to_srgb(levels, name):
    """Levels (..., 3) of a space -> levels of sRGB."""
    share = np.asarray(levels) / 255
    srgb = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    light = srgb if CURVES[name] == SRGB_CURVE else share ** (563 / 256)
    return encoded(light @ np.array(PRIMARIES[name]) @ np.linalg.inv(np.array(PRIMARIES["srgb"])))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
KINDS = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "TIFF": {}}
KINDS |= {"AVIF": {"quality": 95}} if features.check("avif") else {}


def saved(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CURVES)
def test_profiles_are_applied_in_every_format(name, kind):
    plain = opened(saved(Image.fromarray(COLOURS), kind, **KINDS[kind]))
    found = opened(saved(Image.fromarray(COLOURS), kind, **KINDS[kind], icc_profile=rgb_profile(name)))
    assert np.abs(found - to_srgb(plain, name)).max() <= 2
    assert np.abs(found - plain).max() > 20, "the colours differ visibly"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16"])
def test_a_converted_picture_names_its_profile(mode):
    text = "Display\nP3 \x1b[2J ".encode("utf-16-be")
    named = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    points = {f"{letter}XYZ": b"XYZ \0\0\0\0" + fixed(*xyz) for letter, xyz in zip(
        "rgb", PRIMARIES["adobe rgb"])}
    other = profile(b"RGB ", **points, **{f"{letter}TRC": curve(563 / 256) for letter in "rgb"}, desc=named)
    picture = Image.fromarray(COLOURS).convert("L" if mode == "I;16" else mode).convert(mode)
    turned = Image.Exif()
    turned[0x0112] = 6
    for icc, name in ((other, "Display P3 \x1b[2J"), (rgb_profile("adobe rgb"), "an unnamed profile"),
                      (SRGB, None), (None, None)):
        image = open_image("a picture", io.BytesIO(saved(picture, "PNG", icc_profile=icc, exif=turned)))
        assert image.info.get("converted") == name


def test_profiles_of_transparent_pictures_and_palettes():
    name = "display p3"
    clear = Image.fromarray(COLOURS)
    clear.putalpha(51)
    found = opened(saved(clear, "PNG", icc_profile=rgb_profile(name)))
    assert np.abs(found - (to_srgb(COLOURS, name) * 0.2 + WHITE * 0.8)).max() <= 2
    palette = Image.fromarray(COLOURS).quantize(64)
    found = opened(saved(palette, "PNG", icc_profile=rgb_profile(name)))
    assert np.abs(found - to_srgb(np.asarray(palette.convert("RGB")), name)).max() <= 2


def test_a_second_conversion_changes_nothing():
    """The editor converts each PIL image that it gets, even if open_image has already converted it."""
    colours = png([[1, 64, 128]], 8, 2, (b"gAMA", struct.pack(">I", 100_000)))
    adobe = rgb_profile("adobe rgb")
    cmyk = saved(Image.fromarray(COLOURS).convert("CMYK"), "TIFF", icc_profile=adobe)
    for content in (colours, cmyk, saved(Image.fromarray(COLOURS), "PNG", icc_profile=adobe),
                    png([[0], [1]], 2, 0, (b"tRNS", b"\0\1"), (b"gAMA", struct.pack(">I", 100_000)))):
        once = open_image("a picture", io.BytesIO(content))
        assert np.array_equal(to_rgb(once), once)


def test_profiles_of_grey_pictures():
    gamma = profile(b"GRAY", wtpt=b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), kTRC=curve(1.75))
    levels = np.arange(256, dtype=np.uint8)[None]
    expected = encoded((levels / 255) ** 1.75)[..., None].repeat(3, -1)
    grey = Image.fromarray(levels)
    assert np.abs(opened(saved(grey, "PNG", icc_profile=gamma)) - expected).max() <= 2
    wide = Image.fromarray(levels.astype(np.uint16) * 257)
    assert np.abs(opened(saved(wide, "PNG", icc_profile=gamma)) - expected).max() <= 2
    half = grey.convert("LA")
    half.putalpha(51)
    assert np.abs(opened(saved(half, "PNG", icc_profile=gamma)) - (expected / 5 + WHITE * 0.8)).max() <= 2
    # An RGB profile fits grey pixels as well; Adobe RGB has another curve than sRGB
    found = opened(saved(grey, "PNG", icc_profile=rgb_profile("adobe rgb")))
    assert np.abs(found - to_srgb(levels[..., None].repeat(3, -1), "adobe rgb")).max() <= 2


def lab_to_srgb(lightness, a, b):
    y = (lightness + 16) / 116
    xyz = [white * (f**3 if f > 6 / 29 else (f - 4 / 29) * 3 * (6 / 29) ** 2)
           for white, f in zip((0.9642, 1, 0.8249), (y + a / 500, y, y - b / 200))]
    return encoded(np.array(xyz) @ np.linalg.inv(np.array(PRIMARIES["srgb"])))


def test_the_profile_of_a_cmyk_picture():
    """The corners of its table are inks of our own choice, so that no usual conversion finds them."""
    inks = np.indices((2, 2, 2, 2)).reshape(4, 16).T                                    # (16, CMYK)
    labs = np.array([[100 - 15 * c - 10 * m - 8 * y - 67 * k, 12 * m - 10 * c, 14 * y - 12 * c]
                     for c, m, y, k in inks])
    table = np.stack([labs[:, 0] * 2.55, labs[:, 1] + 128, labs[:, 2] + 128], 1).round().astype(np.uint8)
    ramp = bytes(range(256))
    content = (b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4
               + table.tobytes() + ramp * 3)
    printer = profile(b"CMYK", b"Lab ", A2B0=content)
    picture = Image.fromarray((inks * 255).astype(np.uint8)[None].repeat(16, 0).repeat(16, 1), "CMYK")
    light = inks[:, 3] == 0  # littlecms spreads the dark colours down to black
    exact = [lab_to_srgb(row[0] / 2.55, row[1] - 128.0, row[2] - 128.0) for row in table.astype(float)]
    for kind, allowed in (("TIFF", 2), ("JPEG", 6)):
        settings = {"quality": 100} if kind == "JPEG" else {}
        found = opened(saved(picture, kind, icc_profile=printer, **settings))[8, 8::16]
        assert np.abs(found - exact)[light].max() <= allowed and np.abs(found - exact).max() <= 12, kind
    assert np.abs(found - opened(saved(picture, "TIFF"))[8, 8::16]).max() > 30, "as without a profile"


def test_a_profile_never_refuses_a_picture():
    grey = profile(b"GRAY", wtpt=b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), kTRC=curve(1))
    sound = rgb_profile("display p3")
    for bad in (b"", b"no profile", sound[:200], sound[:128], b"\xff" * 3000, bytes(128), grey,
                profile(b"CMYK", b"Lab "), profile(b"Lab ", b"Lab "), profile(b"RGB ")):
        for kind in ("PNG", "TIFF"):
            found = opened(saved(Image.fromarray(COLOURS), kind, icc_profile=bad))
            assert np.array_equal(found, COLOURS)


def test_srgb_pictures_keep_their_bits_and_a_profile_is_read_once(monkeypatch):
    _transform.cache_clear()
    built, build = [], ImageCms.buildTransform
    monkeypatch.setattr(ImageCms, "buildTransform", lambda *args: (built.append(args), build(*args))[1])
    for _ in range(3):
        assert np.array_equal(opened(saved(Image.fromarray(COLOURS), "PNG", icc_profile=SRGB)), COLOURS)
        opened(saved(Image.fromarray(COLOURS), "PNG", icc_profile=rgb_profile("adobe rgb")))
    assert len(built) == 2


def test_profiles_that_round_srgb_otherwise_change_nothing():
    """Most cameras and programs write a profile of sRGB with rounded numbers."""
    near = {f"{letter}XYZ": b"XYZ \0\0\0\0" + fixed(*(np.array(xyz) + 0.0002))
            for letter, xyz in zip("rgb", PRIMARIES["srgb"])}
    near = profile(b"RGB ", **near, **{f"{letter}TRC": SRGB_CURVE for letter in "rgb"})
    target, source = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(near))
    converted = ImageCms.profileToProfile(Image.fromarray(COLOURS), source, target)
    assert not np.array_equal(converted, COLOURS), "by a level or two"
    assert np.array_equal(opened(saved(Image.fromarray(COLOURS), "PNG", icc_profile=near)), COLOURS)


def test_a_pillow_without_profiles_reads_the_pixels(monkeypatch):
    def absent(*_):
        raise ImportError("the _imagingcms C module is not installed")

    _transform.cache_clear()
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", absent)
    content = saved(Image.fromarray(COLOURS), "PNG", icc_profile=rgb_profile("adobe rgb"))
    assert np.array_equal(opened(content), COLOURS)
    _transform.cache_clear()


# EXIF tags beside Orientation that cameras and programs write in other types than Pillow expects
ODD = {"none": None, "a NaN": (0x011D, 11, 1, struct.pack("<f", np.nan)),
       "width as text": (0x0100, 2, 4, b"wide"), "compression": (0x0103, 4, 1, struct.pack("<I", 70_000)),
       "unit": (0x0128, 11, 1, struct.pack("<f", 1.5))}


def odd_exif(tag):
    tags = sorted([(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *([tag] if tag else [])])
    return (b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
            + b"".join(struct.pack("<HHI4s", *one) for one in tags) + bytes(4))


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_whatever_else_its_exif_says(kind, name):
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))
    content = saved(picture, kind, exif=odd_exif(ODD[name]))
    if name != "none":
        with pytest.raises(Exception), Image.open(io.BytesIO(content)) as image:  # noqa: B017
            ImageOps.exif_transpose(image)
    found = opened(content)
    assert found.shape == (40, 20, 3)
    assert found[5, 5, 2] > 200 and found[35, 5, 0] > 200, "the left side is now above"


def test_exif_that_cannot_be_read_is_left_out():
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"x" * 50, odd_exif(None)[:-10]):
        content = saved(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
        assert opened(content).shape in ((20, 40, 3), (40, 20, 3))
