"""Pictures of many kinds, and files that are not the pictures they seem to be."""

import hashlib
import html
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from nanoip2p.common import grids, recipes, web_ui
from nanoip2p.common.files import replacing
from nanoip2p.common.grids import grid, wrap
from nanoip2p.common.names import slug, unused
from nanoip2p.common.saving import save_image, save_png
from nanoip2p.editing.pictures import find_images
from nanoip2p.editing.recipes import read_recipe
from nanoip2p.images import FORMATS, fit, fit_size, open_image, to_pil, to_tensor
from nanoip2p.samplers import SAMPLERS


def gradient(width=6, height=4, channels=3):
    """A picture in which all pixels differ."""
    count = width * height * channels
    pixels = np.linspace(0, 255, count).round().astype(np.uint8).reshape(height, width, channels)
    return Image.fromarray(pixels.squeeze())


def pixels_of(image):
    return np.asarray(image).astype(int)


def reopened(image, tmp_path, suffix="png", **settings):
    image.save(tmp_path / f"picture.{suffix}", **settings)
    return open_image(tmp_path / f"picture.{suffix}")


def test_rgb_is_left_alone(tmp_path):
    image = gradient()
    assert (pixels_of(reopened(image, tmp_path)) == pixels_of(image)).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 1, 257, 1000, 128 * 257, 65534, 65535]], dtype=np.uint16)
    for suffix in ("png", "tiff"):
        opened = pixels_of(reopened(Image.fromarray(levels), tmp_path, suffix))
        assert opened.shape == (1, 7, 3)
        assert (opened[0, :, 0] == (levels[0] / 257).round()).all(), suffix


def test_pixels_without_an_agreed_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="floating-point"):
        reopened(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), tmp_path, "tiff")
    with pytest.raises(ValueError, match="32-bit"):
        reopened(Image.fromarray(np.full((2, 2), 100_000, dtype=np.int32)), tmp_path, "tiff")


def test_cmyk_becomes_rgb(tmp_path):
    opened = reopened(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), tmp_path, "jpg", quality=100)
    red, green, blue = pixels_of(opened)[4, 4]
    assert opened.mode == "RGB" and green > 100 and red < 40 and blue < 100, (red, green, blue)


def test_palette_becomes_rgb(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for suffix in ("png", "gif"):
        assert pixels_of(reopened(image, tmp_path, suffix)).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 0, 51)):
        image.putpixel((x, 0), (0, 0, 0, alpha))
    over_white = [[[0] * 3, [255] * 3, [204] * 3]]
    assert pixels_of(reopened(image, tmp_path)).tolist() == over_white
    assert pixels_of(reopened(image.convert("LA"), tmp_path)).tolist() == over_white
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert pixels_of(reopened(palette, tmp_path, transparency=0)).tolist() == [[[255] * 3, [0, 0, 255]]]
    grey = reopened(Image.fromarray(np.array([[7, 8]], dtype=np.uint8)), tmp_path, transparency=7)
    assert pixels_of(grey).tolist() == [[[255] * 3, [8] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation, tmp_path):
    upright = gradient(6, 4)
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for operation in undo.get(orientation, []):
        stored = stored.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (pixels_of(reopened(stored, tmp_path, exif=exif)) == pixels_of(upright)).all()


def test_other_modes_become_rgb(tmp_path):
    assert pixels_of(reopened(Image.new("1", (2, 2), 1), tmp_path)).tolist() == [[[255] * 3] * 2] * 2
    assert reopened(gradient().convert("YCbCr"), tmp_path, "jpg").mode == "RGB"


def truncated(kind):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()[: len(file.getvalue()) // 2]


def huge_png(width, height):
    """A PNG of a few bytes whose header gives any size."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


BROKEN = {
    "empty": (b"", "cannot be used"),
    "text": (b"just some words\n" * 50, "cannot be used"),
    "truncated png": (truncated("PNG"), "truncated"),
    "truncated jpeg": (truncated("JPEG"), "truncated"),
    "truncated webp": (truncated("WEBP"), "cannot be used"),
    "no pixels": (huge_png(20, 20), "cannot be used"),
    "large": (huge_png(10_001, 10_000), "100 megapixels"),
    "bomb": (huge_png(60_000, 60_000), "exceeds limit"),
    "garbled": (truncated("PNG")[:60] + b"\xff" * 400, "cannot be used"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line(name, tmp_path):
    content, message = BROKEN[name]
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_files_never_raise_anything_else(tmp_path):
    chance = random.Random(0)
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        gradient(32, 24).save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG") else {}))
        for _ in range(40):
            content = bytearray(file.getvalue())
            for _ in range(chance.randint(1, 8)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            (tmp_path / "damaged").write_bytes(content)
            try:
                assert open_image(tmp_path / "damaged").mode == "RGB"
            except ValueError as error:
                assert "\n" not in str(error)


def test_absent_files_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        open_image(tmp_path / "absent.png")
    os.mkfifo(tmp_path / "fifo.png")  # without a writer, opening it would wait for ever
    for path in (tmp_path, tmp_path / "fifo.png", "/dev/zero"):
        for read in (open_image, read_recipe):
            with pytest.raises(ValueError, match="cannot be used: is not a regular file"):
                read(path)


def test_no_other_reader_of_pillow_is_asked(tmp_path, monkeypatch):
    """Some of Pillow's other readers start programs. The content of the file decides, not its name."""
    gradient().save(tmp_path / "x.png", "PCX")
    gradient().save(tmp_path / "jpeg.png", "JPEG")
    asked = []
    for name, (factory, accept) in Image.OPEN.items():
        monkeypatch.setitem(Image.OPEN, name, (factory, lambda prefix, name=name, accept=accept: (
            asked.append(name), accept(prefix) if accept else True)[1]))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    for read in (open_image, read_recipe):
        with pytest.raises(ValueError, match="x.png cannot be used: damaged, or none of PNG, JPEG, "):
            read(tmp_path / "x.png")
    assert asked and set(asked) <= set(FORMATS)
    assert open_image(tmp_path / "jpeg.png").size == (6, 4)
    with pytest.raises(ValueError, match="no recipe"):
        read_recipe(tmp_path / "jpeg.png")


def test_folders_take_every_suffix_of_the_formats_and_nothing_hidden(tmp_path):
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    assert known >= {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
    for suffix in known | {".avif", ".heic", ".heif", ".hif"}:
        gradient().save(tmp_path / f"lower{suffix}", "PNG")
        gradient().save(tmp_path / f"upper{suffix.upper()}", "PNG")
    taken = find_images([str(tmp_path)])
    for name in ("._lower.png", ".hidden.jpg", "notes.txt", "x.pdf", "x.ps", "x.pcx", "png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert find_images([str(tmp_path)]) == taken == sorted(str(path) for path in tmp_path.glob("[lu]*er.*"))
    assert find_images([str(tmp_path / "*.png")]) == [str(tmp_path / "lower.png")]
    assert find_images([str(tmp_path / ".hidden.jpg")]), "named by the person"


def test_heic_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(ValueError, match="x.heic cannot be used.*; HEIC needs: pip install pillow-heif$"):
        open_image(tmp_path / "x.heic")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.jpg", "HEIF", quality=90, exif=exif.tobytes())
    found = pixels_of(open_image(tmp_path / "x.jpg"))
    assert found.shape == (40, 20, 3) and found[5, 5, 2] > 200 and found[35, 5, 0] > 200, "turned once"
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.heic")
    assert pixels_of(open_image(tmp_path / "clear.heic")).min() >= 254
    content = (tmp_path / "x.jpg").read_bytes()
    for broken in (content[: len(content) // 2], content[:40], content[:12] + bytes(500)):
        (tmp_path / "broken.heic").write_bytes(broken)
        with pytest.raises(ValueError, match="broken.heic cannot be used"):
            open_image(tmp_path / "broken.heic")


@pytest.mark.parametrize("size, resolution, multiple, expected", [
    ((512, 512), 512, 64, (512, 512)),
    ((953, 711), 512, 64, (512, 384)),  # edit_cli.py makes it 512x320, by rounding
    ((711, 953), 512, 64, (384, 512)),
    ((1, 1), 512, 64, (512, 512)),
    ((4000, 3000), 512, 64, (512, 384)),
    ((30_000, 3000), 512, 64, (640, 64)),
    ((64, 64), 64, 16, (64, 64)),
    ((100, 67), 64, 16, (64, 48)),
    ((512, 512), 591, 64, (576, 576)),
])
def test_fit_size(size, resolution, multiple, expected):
    assert fit_size(*size, resolution, multiple) == expected


def test_fit_size_keeps_its_promises():
    chance = random.Random(0)
    for _ in range(5000):
        width, height = chance.randint(1, 3000), chance.randint(1, 3000)
        multiple = chance.choice([8, 16, 64])
        resolution = chance.randint(multiple, 1024)
        if max(width, height) * multiple > min(width, height) * resolution:
            continue  # too thin, as tested below
        fitted = fit_size(width, height, resolution, multiple)
        assert all(side % multiple == 0 and side > 0 for side in fitted)
        assert fit_size(height, width, resolution, multiple) == fitted[::-1]
        assert fit_size(*fitted, resolution, multiple) == fitted, "turns must not change the size"
        assert resolution - multiple < max(fitted) <= 2 * resolution, (width, height, resolution, fitted)
        short, long = sorted(fitted)
        exact = short * max(width, height) / min(width, height)
        assert exact - multiple < long <= exact + 1e-6, "less than one step is cut from the long side"


def test_fit_size_refuses_what_would_vanish():
    with pytest.raises(ValueError, match="30000x20 is too thin.* at most 16:1"):
        fit_size(30_000, 20, 512, 64)
    with pytest.raises(ValueError, match="at least 64"):
        fit_size(100, 100, 63, 64)
    assert fit_size(16, 1, 512, 64) == (1024, 64)


def test_fit_cuts_evenly_from_the_long_side():
    image = Image.new("RGB", (100, 40), "red")
    image.paste("blue", (10, 0, 90, 40))
    fitted = pixels_of(fit(image, (40, 20)))
    assert fitted.shape == (20, 40, 3)
    # The crop has the 80 middle columns of 100: blue, except that Lanczos mixes in red at the edges
    assert (fitted[:, 4:36] == [0, 0, 255]).all() and np.abs(fitted - [0, 0, 255]).max() < 20
    assert fit(image, (100, 40)) is image


def test_tensors_and_back():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    tensor = to_tensor(levels)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert to_pil(tensor) == levels
    assert to_pil(tensor.half()) == levels
    red = to_tensor(Image.new("RGB", (5, 2), "red"))
    assert red.shape == (3, 2, 5) and red[:, 0, 0].tolist() == [1, -1, -1]


def test_to_pil_rounds_and_clips():
    values = torch.tensor([-3.0, 3.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1]).expand(3, 1, 4)
    assert pixels_of(to_pil(values))[0, :, 0].tolist() == [0, 255, 1, 0]
    with pytest.raises(ValueError, match="NaN"):
        to_pil(torch.full((3, 2, 2), torch.nan))


def test_grid_holds_every_picture_and_label():
    colours = [["red", "green", "blue"], ["yellow", "purple"]]
    rows = [[Image.new("RGB", (64, 64), colour) for colour in row] for row in colours]
    labelled = grid(rows, [["input", "make it night", "word " * 60], ["input", "night"]])
    found = {colour for _, colour in labelled.getcolors(10**6)}
    wanted = {Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for row in colours for colour in row}
    assert wanted <= found
    bare = grid(rows, [[""] * 3, [""] * 2])
    assert (0, 0, 0) in found and (0, 0, 0) not in {colour for _, colour in bare.getcolors(10**6)}
    assert labelled.width == bare.width and labelled.height > bare.height, "a long label takes more lines"
    assert labelled.width < 1000 and labelled.height < 2000
    below = grid([[Image.new("RGB", (400, 20), "red")], [Image.new("RGB", (200, 20), "blue")]], [[""], [""]])
    blue = (np.asarray(below) == [0, 0, 255]).all(2).any(0).nonzero()[0]
    assert len(blue) == 200 and blue[0] + blue[-1] == below.width - 1, "a narrow picture is in the middle"
    assert grids._wrap("a" * 300, 10**4)[0] == ["a" * 199 + "…"]


RECIPE = {"edit": ["make it night"], "negative": "blurry, bad", "steps": 20, "sampler": "euler_ancestral",
          "cfg_text": 7.5, "cfg_image": 1.5, "seed": 0, "weights": "some/nano-ip2p"}
SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Image CFG scale: 1.5, Seed: 0, Size: 64x48"


def test_a_folder_stands_for_files_only(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    gradient().save(tmp_path / "a.png")
    assert find_images([str(tmp_path)]) == [str(tmp_path / "a.png")]


def test_the_text_of_the_web_uis(tmp_path):
    assert web_ui.web_text(RECIPE, (64, 48)) == (
        f"make it night\nNegative prompt: blurry, bad\n{SETTINGS}, Model: nano-ip2p")
    file = tmp_path / "my, odd: model-v1.5.safetensors"
    file.write_bytes(bytes(2**20) + b"w" * 2**16 + b"rest")
    digest = hashlib.sha256(b"w" * 2**16).hexdigest()[:8]
    changed = RECIPE | {"edit": ["a\nb", "Negative prompt: 夜 \udc80"], "negative": "", "weights": str(file)}
    assert web_ui.web_text(changed, (64, 48)) == (
        f"a b, then Negative prompt 夜 ?\n{SETTINGS}, Model hash: {digest}, Model: my odd model-v1.5")
    assert set(web_ui.SAMPLERS) == set(SAMPLERS)


ODD_TEXTS = [
    ("make it night", "blurry, bad"), ("make it night", ""), ("夜にする", "ä"),
    ('say "a, b: c"\nSteps: 3, Sampler: x, Seed: 4, CFG scale: 2', "no\nSteps: 7"),
    ("paint the words Negative prompt:: x", ""),
    ("Negative prompt: x Negative prompt: y", "Negative prompt: z"), ("x\nNegative prompt: y", ""),
]


WRITTEN = ["a.png", "a.jpg", "a.JPEG", "a.webp"]


@pytest.mark.parametrize("name", WRITTEN)
def test_recipe_round_trip(name, tmp_path):
    chance = random.Random(0)
    for _ in range(50):
        letters = "ab \n\t'\"&<>;=\\{}é夜😀\udc80\x00"
        texts = ["".join(chance.choices(letters, k=chance.randrange(40))) for _ in "ab"]
        recipe = RECIPE | {"edit": texts, "negative": texts[0], "mask": None, "&quot;": [{}, 7.5, True]}
        save_image(gradient(64, 48), tmp_path / "new folder" / name, recipe)
        assert read_recipe(tmp_path / "new folder" / name) == recipe
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == [name]
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)  # does not compress
    save_image(Image.fromarray(noise), tmp_path / "new folder" / name, recipe)
    difference = np.abs(pixels_of(open_image(tmp_path / "new folder" / name)) - noise)
    assert difference.max() <= (30 if "j" in name.lower() else 0), "colours have the full resolution"
    with Image.open(tmp_path / "new folder" / name) as image:
        assert image.format == {"g": "JPEG", "G": "JPEG", "p": "WEBP"}[name[-1]] or name == "a.png"


def written(tmp_path, name, edit, negative):
    recipe = RECIPE | {"edit": [edit], "negative": negative}
    save_image(gradient(64, 48), tmp_path / name, recipe)
    assert read_recipe(tmp_path / name) == recipe
    return tmp_path / name, [" ".join(re.sub("Negative prompt:+", "Negative prompt", text).split())
                             for text in (edit, negative)]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("edit, negative", ODD_TEXTS)
def test_sd_parsers_reads_the_text(edit, negative, name, tmp_path, monkeypatch):
    parsers = pytest.importorskip("sd_parsers")
    path, texts = written(tmp_path, name, edit, negative)
    # Version 0.6 caches the last comment by id(image), and the next picture may have the same id
    monkeypatch.setattr(sys.modules["sd_parsers.extractors._jpeg_usercomment"], "_image_id", None)
    found = parsers.ParserManager().parse(path)
    assert [found.full_prompt, found.full_negative_prompt] == texts
    [sampler] = found.samplers
    assert sampler.name == "Euler a" and sampler.model.name == "nano-ip2p"
    assert sampler.parameters == {"cfg_scale": "7.5", "seed": "0", "steps": "20"}
    assert found.metadata == {"Image CFG scale": "1.5", "Size": "64x48"}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("edit, negative", ODD_TEXTS)
def test_sd_prompt_reader_reads_the_text(edit, negative, name, tmp_path):
    reader = pytest.importorskip("sd_prompt_reader.image_data_reader")
    path, texts = written(tmp_path, name, edit, negative)
    found = reader.ImageDataReader(path)
    assert found.status.name == "READ_SUCCESS" and found.tool == "A1111 webUI"
    assert [found.positive, found.negative] == texts
    assert found.parameter == {"model": "nano-ip2p", "sampler": "Euler a", "seed": "0", "cfg": "7.5",
                               "steps": "20", "size": "64x48"}
    assert "Image CFG scale: 1.5" in found.setting


@pytest.mark.parametrize("name", WRITTEN)
def test_files_say_that_they_are_srgb(name, tmp_path):
    save_image(gradient(), tmp_path / name, RECIPE)
    content = (tmp_path / name).read_bytes()
    with Image.open(tmp_path / name) as image:
        if name == "a.png":
            assert image.info["srgb"] == 0 and content.index(b"sRGB") < content.index(b"IDAT")
        else:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            assert "sRGB" in profile.profile.profile_description
            assert image.info["icc_profile"][24:36] == bytes(12), "the date would make each file another"
            assert image.getexif().get_ifd(0x8769)[0xA001] == 1
    assert not open_image(tmp_path / name).info.get("converted")
    save_image(gradient(), tmp_path / name, RECIPE)
    assert (tmp_path / name).read_bytes() == content


def test_exiv2_and_exiftool_need_the_type_of_the_comment(tmp_path):
    """Both show a comment of type BYTE, as Pillow writes it, as a list of numbers."""
    save_image(gradient(), tmp_path / "a.jpg", RECIPE)
    assert struct.pack(">HH", 0x9286, 7) in Image.open(tmp_path / "a.jpg").info["exif"]


def test_what_a_jpeg_cannot_hold_is_left_out_with_a_warning(tmp_path):
    long = RECIPE | {"edit": ["é" * 20_000, "x" * 20_000]}  # 140 KB as JSON, 80 KB as UTF-16
    with pytest.warns(UserWarning, match="a.jpg: exif and xmp left out, .* .png and .webp hold all"):
        save_image(gradient(), tmp_path / "a.jpg", long)
    with pytest.raises(ValueError, match="no recipe"):
        read_recipe(tmp_path / "a.jpg")
    with pytest.warns(UserWarning, match="a.jpg: exif left out"):
        save_image(gradient(), tmp_path / "a.jpg", RECIPE | {"edit": ["x" * 40_000]})
    assert read_recipe(tmp_path / "a.jpg")["edit"] == ["x" * 40_000]
    for name in ("a.png", "a.webp"):
        save_image(gradient(), tmp_path / name, long)
        assert read_recipe(tmp_path / name) == long
    for size in range(65_450, 65_600, 7):  # around the size limit of a JPEG segment
        fill = size - len(recipes.to_xmp(RECIPE | {"input": [""]}))
        with warnings.catch_warnings(record=True) as caught:
            save_image(gradient(), tmp_path / "a.jpg", RECIPE | {"input": ["x" * fill]})
        assert bool(caught) == (size > 65_504)


def test_a_picture_too_large_for_its_format_is_shrunk_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="a.webp: shrunk to 16383 pixels, the most that WEBP holds"):
        save_image(Image.new("RGB", (20, 20_000)), tmp_path / "a.webp", RECIPE)
    assert open_image(tmp_path / "a.webp").size == (16, 16_383)
    with pytest.warns(UserWarning, match="shrunk to 65500"):
        save_image(Image.new("RGB", (70_000, 8)), tmp_path / "a.jpg", RECIPE)
    save_image(Image.new("RGB", (70_000, 8)), tmp_path / "a.png", RECIPE)
    assert open_image(tmp_path / "a.png").size == (70_000, 8)


@pytest.mark.parametrize("form", ['<rdf:Description nanoip2p:recipe="{}"/>', "<x nanoip2p:recipe = '{}'/>",
                                  "<nanoip2p:recipe>{}</nanoip2p:recipe>"])
def test_packets_that_other_programs_rewrote(form):
    """exiftool 12.57 turns the attribute into an element, and quotes in its own way."""
    recipe = {"edit": ["<a> & \"b\" 'c' &quot; é"]}
    for escape in (html.escape, lambda text: html.escape(text).replace("&#x27;", "&#39;")):
        packet = "<?xpacket?> xmlns:nanoip2p='urn:nanoip2p:' " + form.format(escape(json.dumps(recipe)))
        assert json.loads(recipes.from_xmp(packet.encode())) == recipe


def test_odd_packets_are_no_recipe(tmp_path):
    attribute = b'nanoip2p:recipe="'
    odd = [b"", attribute, attribute * 60_000, attribute + b"[" * 100_000 + b'"', attribute + b'\xff"',
           attribute + b"9" * 10_000 + b'"', attribute + b'null"', attribute + b'[]"', b"nanoip2p:recipe",
           attribute + b"x" * 2**21 + b'"', b"<!DOCTYPE x [<!ENTITY a 'b'>]>" + attribute + b'&a;"']
    for packet in odd:
        gradient().save(tmp_path / "a.webp", lossless=True, xmp=packet)
        segment = (recipes.HEADER + packet)[:65_000]
        gradient().save(tmp_path / "a.jpg", extra=b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment)
        for name in ("a.webp", "a.jpg"):
            with pytest.raises(ValueError, match="no recipe"):
                read_recipe(tmp_path / name)


def test_wide_grids_wrap():
    """Every picture and label occurs once, in order. The first of a row occurs once, on the left."""
    chance = random.Random(0)
    for _ in range(200):
        width, group = chance.choice([16, 64, 300, 512, 3000]), chance.choice([1, 2, 3, 5, 40])
        counts = [group * chance.randint(1, 30) for _ in range(chance.randint(1, 3))]
        rows = [[Image.new("L", (width, 2), k % 256) for k in range(count + 1)] for count in counts]
        labels = [[f"{i}: {k}" for k in range(count + 1)] for i, count in enumerate(counts)]
        broken, texts = wrap(rows, labels, (group, 1 + (group % 2 == 0)))
        shown = max(1, -(-192 // width)) * width
        longest = max(map(len, broken))
        assert longest <= 4 or longest * (shown + 8) + 8 <= 1300
        assert [list(map(len, part)) for part in (broken, texts)][0] == [len(row) for row in texts]
        assert [text for row in texts for text in row if text] == sum(labels, [])
        assert [image for row in broken for image in row[1:]] == [image for row in rows for image in row[1:]]
        for row, words in zip(broken, texts):
            assert words[0].endswith(": 0") or (words[0] == "" and row[0].getextrema() == ((255, 255),) * 3)
            assert row[0].size == (width, 2)
            if group <= 3:
                assert (len(row) - 1) % group == 0, "groups stay together"
    assert wrap(rows[:1], [labels[0]])[0][0][0] is rows[0][0]
    twelve = [[Image.new("RGB", (64, 64))] * 13] * 2
    assert grid(*wrap(twelve, [["word"] * 13] * 2)).width < 1300


def test_labels_have_a_font_with_their_letters(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(grids, "FONTS", ())
    grids._font.cache_clear(), grids._font_files.cache_clear()

    def label(text):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return np.asarray(grid([[Image.new("RGB", (200, 8))]], [[text]]))

    assert grids._font(frozenset("make it night"))[0].getname()[0] == "Aileron", "as before"
    for one, other in (("ночь", "день"), ("größer", "größte"), ("νύχτα", "νύχτω"), ("ليلا", "ليلب")):
        assert not np.array_equal(label(one), label(other)), one
        assert grids._font(frozenset(one))[0].getname()[0] == "DejaVu Sans"
    label("a\u0301 \u200b\ufe0fb")  # no warning for characters without a shape
    with pytest.warns(UserWarning, match="no installed font has the letters にる夜: boxes stand"):
        grid([[Image.new("RGB", (200, 8))] * 2], [["夜に", "make it 夜る"]])
    monkeypatch.setattr(grids, "_font_files", lambda: [__file__, "/nowhere/x.ttf"])
    grids._font.cache_clear()
    with pytest.warns(UserWarning, match="letters ночь"):
        grid([[Image.new("RGB", (200, 8))]], [["ночь"]])
    grids._font.cache_clear()


def test_names_are_safe():
    chance = random.Random(0)
    letters = "aZ9 -_./\\:*?\"<>|\n\x00\x1b\u202e\u200b／．夜ёé😀\udc80ัก"
    for _ in range(3000):
        name = slug("".join(chance.choices(letters, k=chance.choice([0, 1, 3, 30, 300]))), "edit")
        assert name and len(name.encode()) <= 80 and name[0] not in ".-" and name[-1] != "-"
        assert all(unicodedata.category(letter)[0] in "LMN" or letter == "-" for letter in name)
    assert slug("Make it ночь, 夜!", "edit") == "Make-it-ночь-夜" and slug("../..", "edit") == "edit"
    assert slug("ＡＢ／..／ﬁ", "") == "AB-fi" and slug("夜" * 99, "") == "夜" * 26


def test_unused_names_are_given_once(tmp_path):
    path = str(tmp_path / "a.png")
    (tmp_path / "a.png").write_text("old")
    (tmp_path / "a-3.png").symlink_to("gone")

    def write(i):
        with unused(path) as free, replacing(free) as temporary:
            temporary.write_text(str(i))
        return free

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(write, range(40)))
    assert len(set(names)) == 40 and [Path(name).read_text() for name in names] == list(map(str, range(40)))
    assert (tmp_path / "a.png").read_text() == "old" and str(tmp_path / "a-2.png") in names
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), unused(path):
        raise KeyboardInterrupt
    assert sorted(tmp_path.iterdir()) == before


def test_without_a_recipe(tmp_path):
    gradient().save(tmp_path / "plain.png")
    gradient().save(tmp_path / "plain.jpg")
    save_png(gradient(), tmp_path / "list.png", [1, 2])
    text = PngImagePlugin.PngInfo()
    text.add_text("nanoip2p", "[" * 100_000)
    gradient().save(tmp_path / "deep.png", pnginfo=text)
    for name in ("plain.png", "plain.jpg", "list.png", "deep.png"):
        with pytest.raises(ValueError, match="no recipe"):
            read_recipe(tmp_path / name)


def test_find_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.PNG", "notes.txt", "odd[1].png"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert find_images(["."]) == ["a.PNG", "b.jpg", "odd[1].png"]
    assert find_images(["*.jpg", "b.jpg", "odd[1].png"]) == ["b.jpg", "odd[1].png"]
    assert find_images(["notes.txt"]) == ["notes.txt"]  # open_image reports later that it is no picture
    for pattern in ("absent.png", "*.bmp", "empty"):
        with pytest.raises(ValueError, match="there is no picture"):
            find_images([pattern])


def test_only_the_first_mebibyte_of_xmp_is_read():
    packet = recipes.to_xmp(RECIPE)
    near = b" " * (2**20 - len(packet)) + packet
    assert json.loads(recipes.from_xmp(near)) == RECIPE
    with pytest.raises(ValueError, match="no recipe"):
        recipes.from_xmp(b" " * 2**20 + packet)
