"""Pairs from scenes and every layout on disk: contents, splits, the same crop and flip for a pair."""

import io
import itertools
import json
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from nanoip2p.dataset import tables
from nanoip2p.dataset.layouts import Pair, load_picture, read_data, stamp
from nanoip2p.dataset.rendered import captioned_scenes, scene_pairs
from nanoip2p.dataset.tables import COLUMNS, Cell
from nanoip2p.images import to_tensor
from nanoip2p.world.scenes import EDIT_KINDS, held_out, random_scene, training_edits


def jpeg(seed: int) -> bytes:
    """A blurred noise of an odd size. The same bytes go into every layout, whatever the name of the file."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((40 + seed % 7, 31), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


ROWS = [(jpeg(2 * number), f"edit {number}", jpeg(2 * number + 1)) for number in range(20)]


def write_original(root, rows=ROWS, empty=()):
    """The original's layout, one pair a prompt; prompts numbered in `empty` have no survivors."""
    listed = []
    for number, (before, edit, after) in enumerate(rows):
        folder = root / f"{number:07d}"
        folder.mkdir(parents=True)
        (folder / "prompt.json").write_text(json.dumps({"input": "a", "edit": edit, "output": "b"}))
        listed.append([folder.name, [] if number in empty else ["11"]])
        for seed in listed[-1][1]:
            (folder / f"{seed}_0.jpg").write_bytes(before)
            (folder / f"{seed}_1.jpg").write_bytes(after)
    (root / "seeds.json").write_text(json.dumps(listed))
    return root


def write_jsonl(root, rows=ROWS):
    (root / "pictures").mkdir(parents=True)
    lines = []
    for number, (before, edit, after) in enumerate(rows):
        (root / "pictures" / f"{number}a.png").write_bytes(before)
        (root / f"{number}b.png").write_bytes(after)
        output = f"{number}b.png" if number % 2 else str(root / f"{number}b.png")
        lines.append(json.dumps({"input": f"pictures/{number}a.png", "edit": edit, "output": output}))
    (root / "pairs.jsonl").write_text("\n\n".join(lines))
    return root


def write_magicbrush(root, rows=ROWS):
    turns = []
    for number, (before, edit, after) in enumerate(rows):
        folder = root / "images" / f"24{number}"
        folder.mkdir(parents=True)
        turn = {"input": f"24{number}-input.png", "mask": f"24{number}-mask1.png",
                "output": f"24{number}-output1.png", "instruction": edit}
        (folder / turn["input"]).write_bytes(before)
        (folder / turn["output"]).write_bytes(after)
        turns.append(turn)
    (root / "edit_turns.json").write_text(json.dumps(turns))
    return root


def write_parquet(path, rows=ROWS, columns=COLUMNS[1], plain=False, compression="snappy"):
    """Row groups of 3, 1, 2, 3, 1, 2 ... rows."""
    def image(content):
        return content if plain else {"bytes": content, "path": None}

    path.parent.mkdir(parents=True, exist_ok=True)
    befores, edits, afters = zip(*rows)
    columns = dict(zip(columns, (list(map(image, befores)), list(edits), list(map(image, afters)))))
    table = pyarrow.table({"img_id": [str(i) for i in range(len(rows))], **columns})
    with pyarrow.parquet.ParquetWriter(path, table.schema, compression=compression) as writer:
        begin, sizes = 0, itertools.cycle((3, 1, 2))
        while begin < len(rows):
            group = table.slice(begin, next(sizes))
            writer.write_table(group)
            begin += len(group)
    return path


def write_parquets(root, columns, **options):
    for i, (begin, end) in enumerate(((0, 8), (8, 9), (9, 20))):
        write_parquet(root / f"data/train-{i:05d}-of-00003.parquet", ROWS[begin:end], columns, **options)
    return root


LAYOUTS = {
    "original": write_original,
    "jsonl folder": write_jsonl,
    "jsonl file": lambda root: write_jsonl(root) / "pairs.jsonl",
    "magicbrush": write_magicbrush,
    "parquet file": lambda root: write_parquet(root / "pairs.parquet", plain=True, compression="none"),
    "clip-filtered": lambda root: write_parquets(root, COLUMNS[0]),
    "1000-samples": lambda root: write_parquets(root, COLUMNS[1], compression="none"),
    "magicbrush parquet": lambda root: write_parquets(root, COLUMNS[2]),
}
every_layout = pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS)


def edits(items) -> list[str]:
    return [pair.edit for item in items for pair in item]


def numbered(*numbers) -> list[str]:
    return [f"edit {number}" for number in numbers]


def complaint(source, **options) -> str:
    with pytest.raises(ValueError) as error:
        read_data(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_scene_pairs_are_true_edits_in_phrasings_and_combinations_that_training_may_see():
    pairs = scene_pairs(39, "train")
    assert len(pairs) == 39 and pairs == scene_pairs(40, "train")[:39] != scene_pairs(39, "validation")
    scenes = [scene for scene in (random_scene("train", i) for i in range(40)) if training_edits(scene)]
    for i, pair in enumerate(pairs):
        assert pair.before == scenes[i // 4]
        edit = next(edit for edit in pair.before.edits() if edit.scene == pair.after)
        assert pair.edit in edit.instructions[:-1] and not held_out(pair.before, edit)


def test_scene_pairs_of_an_edit_that_few_scenes_allow():
    only_add = tuple(float(kind == "add") for kind in EDIT_KINDS)
    pairs = scene_pairs(20, weights=only_add)
    assert len(pairs) == 20 and all(len(pair.after.things) > len(pair.before.things) for pair in pairs)


def test_scene_pairs_follow_the_odds():
    odds = tuple(float(kind == "ground") for kind in EDIT_KINDS)
    for pair in scene_pairs(12, weights=odds):
        assert pair.before.ground != pair.after.ground


def test_captioned_scenes_show_what_edits_lead_to_and_never_repeat_themselves():
    pairs = captioned_scenes(200)
    assert [pair.after for pair in pairs[::2]] == [random_scene("train", 2 * i) for i in range(100)]
    assert all(pair.before == pair.after and pair.edit == pair.after.caption() for pair in pairs)
    assert any(not pair.after.things for pair in pairs)  # an empty place, to which only removing leads
    assert captioned_scenes(50) == pairs[:50] and len(set(pairs)) == 200
    assert not {pair.after for pair in captioned_scenes(50, "validation")} & {pair.after for pair in pairs}


@every_layout
def test_every_layout_gives_the_same_pictures_and_texts_in_contiguous_splits(tmp_path, write):
    source = write(tmp_path)
    splits = [read_data(str(source), split) for split in ("train", "validation", "test")]
    assert [len(items) for items in splits] == [18, 1, 1]
    items = sum(splits, [])
    assert edits(items) == numbered(*range(20)) and {len(item) for item in items} == {1}
    for (before, _, after), (pair,) in zip(ROWS, items):
        for content, picture in ((before, pair.before), (after, pair.after)):
            (tmp_path / "one.jpg").write_bytes(content)
            ours, expected = load_picture(picture, 16), load_picture(tmp_path / "one.jpg", 16)
            assert torch.equal(to_tensor(ours), to_tensor(expected))


def test_the_pairs_of_a_prompt_stay_together_and_prompts_without_pictures_are_skipped(tmp_path):
    root = write_original(tmp_path, empty=(1, 18))
    for part in "01":
        (root / "0000002" / f"22_{part}.jpg").write_bytes(jpeg(0))
    seeds = json.loads((root / "seeds.json").read_text())
    seeds[2][1] = ["11", "22"]
    (root / "seeds.json").write_text(json.dumps(seeds))
    train = read_data(root)
    folder = root / "0000002"
    assert train[1] == (Pair(folder / "11_0.jpg", "edit 2", folder / "11_1.jpg", ("a", "b")),
                        Pair(folder / "22_0.jpg", "edit 2", folder / "22_1.jpg", ("a", "b")))
    assert edits(train) == numbered(0, 2, 2, *range(3, 18))
    assert read_data(root, "validation") == [] and edits(read_data(root, "test")) == numbered(19)


def test_captions_of_both_pictures_come_along_where_the_data_has_them(tmp_path):
    def captions(source):
        return [pair.captions for item in read_data(source) for pair in item]

    wanted = [(f"before {i}", f"after {i}") for i in range(18)]
    assert captions(write_jsonl(tmp_path / "jsonl")) == [None] * 18
    rows = [json.loads(line) for line in (tmp_path / "jsonl/pairs.jsonl").read_text().split("\n\n")]
    rows = [row | {"input_caption": f"before {i}", "output_caption": f"after {i}"}
            for i, row in enumerate(rows)]
    (tmp_path / "jsonl/pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(tmp_path / "jsonl") == wanted

    assert captions(write_magicbrush(tmp_path / "brush")) == [None] * 18
    told = {f"24{i}": {f"24{i}-input.png": f"before {i}", f"24{i}-output1.png": f"after {i}"}
            for i in range(20)}
    (tmp_path / "brush/global_descriptions.json").write_text(json.dumps(told))
    assert captions(tmp_path / "brush") == wanted
    (tmp_path / "brush/global_descriptions.json").write_text(json.dumps(told | {"240": "before 0"}))
    assert captions(tmp_path / "brush") == [None, *wanted[1:]]

    path = write_parquet(tmp_path / "data.parquet", columns=COLUMNS[0])
    assert captions(path) == [None] * 18
    table = pyarrow.parquet.read_table(path)
    for name, when in (("original_prompt", "before"), ("edited_prompt", "after")):
        table = table.append_column(name, pyarrow.array([f"{when} {i}" for i in range(20)]))
    pyarrow.parquet.write_table(table, path)
    assert captions(path) == wanted


@pytest.mark.parametrize("dev", ["dev", "validation", "val"])
def test_a_dataset_that_is_split_already_keeps_its_splits(tmp_path, dev):
    parts = {"train": ROWS[:10], dev: ROWS[10:13], "test": ROWS[13:15]}
    for name, rows in parts.items():
        write_magicbrush(tmp_path / "brush" / name, rows)
        for i, half in enumerate((rows[:1], rows[1:])):
            write_parquet(tmp_path / "hub" / "data" / f"{name}-{i:05d}-of-00002.parquet", half)
    for root in (tmp_path / "brush", tmp_path / "hub"):
        assert edits(read_data(root)) == numbered(*range(10))
        assert edits(read_data(root, "validation")) == numbered(10, 11, 12)
        assert edits(read_data(root, "test")) == numbered(13, 14)
    for part in (tmp_path / "brush" / "train", tmp_path / "hub" / "data" / "train-00001-of-00002.parquet"):
        count = 10 if part.is_dir() else 9  # named by itself, it is cut as anything else
        sizes = [len(read_data(part, split)) for split in ("train", "validation", "test")]
        assert sizes[0] == int(0.9 * count) and sum(sizes) == count


@pytest.mark.parametrize("name", ["latest-set", "my-test", "tested", "train-test"])
def test_a_name_that_only_contains_the_word_test_is_no_split(tmp_path, name):
    write_parquet(tmp_path / f"{name}.parquet", ROWS)
    assert len(read_data(tmp_path)) == 18


def test_a_split_may_be_empty_but_for_train(tmp_path):
    root = write_jsonl(tmp_path, ROWS[:2])
    assert edits(read_data(root)) == numbered(0) and read_data(root, "validation") == []
    told = complaint(write_jsonl(tmp_path / "one", ROWS[:1]))
    assert "no pairs in its train split" in told and "at least 2 pairs" in told
    write_magicbrush(tmp_path / "brush" / "test", ROWS)
    assert "no pairs in its train split" in complaint(tmp_path / "brush")


@pytest.mark.parametrize("write, file, content, named", [
    (write_original, "seeds.json", "{", "seeds.json cannot be read as JSON"),
    (write_original, "seeds.json", "{}", "seeds.json holds a JSON dict, not a list"),
    (write_original, "seeds.json", "[]", "no pairs in its train split"),
    (write_original, "seeds.json", '[["a"], []]', """seeds.json: ['a'] is not ["0000000", """),
    (write_original, "0000003/prompt.json", None, "0000003/prompt.json is missing"),
    (write_original, "0000003/prompt.json", '{"output": "b"}', 'no text under "edit"; it has output'),
    (write_original, "0000003/11_1.jpg", None, "no picture {root}/0000003/11_1.jpg"),
    (write_jsonl, "3b.png", None, "no picture {root}/3b.png"),
    (write_jsonl, "pairs.jsonl", "{}", 'pairs.jsonl, line 1: no text under "input"; it has nothing'),
    (write_jsonl, "pairs.jsonl", '\n{"input": "a", "prompt": "b", "output": "c"}',
     'pairs.jsonl, line 2: no text under "edit"; it has input, prompt, output'),
    (write_jsonl, "pairs.jsonl", '\n\n{"input": ', "pairs.jsonl, line 3 is not a JSON object"),
    (write_original, "seeds.json", '[["../x", ["11"]], []]', "its data names '../x'"),
    (write_original, "seeds.json", '[["/etc", ["11"]], []]', "its data names '/etc'"),
    (write_original, "seeds.json", '[["0000003", ["../../x"]], []]', "data names '0000003/../../x_0.jpg'"),
    (write_original, "seeds.json", '[["0000003", [null]], []]', "seeds = [None] should be a list"),
    (write_magicbrush, "edit_turns.json", '[{"input": "../../x/y", "instruction": "a", "output": "b"}]',
     "its data names 'images/../../x/y/../../x/y'"),
    (write_magicbrush, "edit_turns.json", '[{"input": "24-x", "instruction": "a", "output": "/etc/x"}]',
     "its data names 'images/24//etc/x'"),
    (write_magicbrush, "images/243/243-input.png", None, "no picture {root}/images/243/243-input.png"),
    (write_magicbrush, "edit_turns.json", "[7]", 'edit_turns.json, entry 0: no text under "input"; it has'),
    (write_magicbrush, "edit_turns.json", None, "{root} is no training data"),
])
def test_what_is_broken_is_named_in_one_line(tmp_path, write, file, content, named):
    root = write(tmp_path)
    (root / file).unlink()
    if content is not None:
        (root / file).write_text(content)
    assert named.replace("{root}", str(root)) in complaint(root)


def test_only_ones_own_list_names_pictures_elsewhere(tmp_path):
    """Absolute paths and ../ in pairs.jsonl are useful; a link out of a downloaded folder is refused."""
    here = write_jsonl(tmp_path / "mine")
    picture = here / "pictures" / "0a.png"
    for path in ("../mine/pictures/0a.png", str(picture)):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / "pairs.jsonl").write_text(
            2 * (json.dumps({"input": path, "edit": "a", "output": path}) + "\n"))
        assert read_data(tmp_path / "own")[0][0].before.samefile(picture)
    for write, name in ((write_original, "0000003/11_1.jpg"), (write_magicbrush, "images/243/243-input.png")):
        root = write(tmp_path / name[:1])
        (root / name).unlink()
        (root / name).symlink_to(picture)
        assert f"{root / name} is a link that leads out" in complaint(root)


@pytest.mark.parametrize("text", ["a" * 10_001, "a" * 10**6])
@pytest.mark.parametrize("write", [write_original, write_jsonl, write_magicbrush, lambda root, rows: (
    write_parquet(root / "x.parquet", rows))])
def test_a_text_has_a_limit(tmp_path, write, text):
    assert "long; at most 10,000 are read" in complaint(write(tmp_path, [(ROWS[0][0], text, ROWS[0][2])] * 2))


def test_parquet_has_limits(tmp_path, monkeypatch):
    """Of rows, and of what a row group takes when it is read; a picture that repeats takes no memory."""
    path, black = tmp_path / "x.parquet", io.BytesIO()
    Image.new("RGB", (400, 400)).save(black, "BMP")
    table = pyarrow.table(dict(zip(COLUMNS[1], ([black.getvalue()] * 100, ["x"] * 100,
                                                [{"bytes": black.getvalue()}] * 100))))
    pyarrow.parquet.write_table(table, path)
    before = pyarrow.total_allocated_bytes()
    pair, = read_data(path)[0]
    for picture in (pair.before, pair.after):
        assert load_picture(picture, 8).getcolors() == [(64, (0, 0, 0))]
    assert pyarrow.total_allocated_bytes() - before < 4e6  # of 96 MB
    monkeypatch.setattr(tables, "GROUP_BYTES", 2**19)
    told = complaint(path)
    assert "bytes in a row group; at most 5000000 rows and 524288 bytes" in told and "x.parquet" in told
    monkeypatch.undo()
    monkeypatch.setattr(tables, "MOST_ROWS", 99)
    assert "has 100 rows" in complaint(path)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_parquet_without_dictionaries_is_read(tmp_path, encoding):
    path = tmp_path / "x.parquet"
    table = pyarrow.table(dict(zip(COLUMNS[1], zip(*ROWS))))
    pyarrow.parquet.write_table(table, path, 3, use_dictionary=False,
                                column_encoding=dict.fromkeys(COLUMNS[1], encoding))
    pair, = read_data(path)[4]
    assert pair.edit == "edit 4" and load_picture(pair.before, 16).size == (16, 16)


@pytest.mark.parametrize("cell", [None, [b"x"], {"bytes": 7, "x": b""}, {"path": b"x"}, {"bytes": [b"x"]},
                                  b""])
def test_a_cell_without_bytes_is_a_broken_picture(tmp_path, cell):
    path = tmp_path / "x.parquet"
    cells = pyarrow.array([cell, cell], None if cell is not None else pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(COLUMNS[1], (cells, ["x", "y"], cells)))), path)
    pair, = read_data(path)[0]
    with pytest.raises(ValueError, match="x.parquet row 0, column input_image cannot be used"):
        load_picture(pair.before, 8)


@pytest.mark.parametrize("change", [str.upper, str.title, str.lower], ids=lambda change: change.__name__)
@pytest.mark.parametrize("folder", [".", "data", None], ids=str)
@pytest.mark.parametrize("kind", [".parquet", ".tar", ".jsonl", ".csv"])
def test_a_suffix_in_any_case(tmp_path, kind, folder, change):
    """In its folder (only .parquet and .tar have no fixed name), or named itself (None)."""
    root = write_jsonl(tmp_path / "root")
    path = root / ("data" if folder == "data" else ".") / f"X{change(kind)}"
    path.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines() if line]
    if kind == ".parquet":
        write_parquet(path)
    elif kind == ".tar":
        with tarfile.open(path, "w") as file:
            for number, row in enumerate(ROWS):
                for name, content in zip(("input.jpg", "edit.txt", "output.jpg"), row):
                    content = content.encode() if isinstance(content, str) else content
                    member = tarfile.TarInfo(f"{number:02d}.{name}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    elif folder:
        pytest.skip("has a fixed name there")
    elif kind == ".jsonl":  # one's own list, whose pictures may lie elsewhere
        path = tmp_path / path.name
        path.write_text("\n".join(json.dumps(row | {
            key: str(root / row[key]) for key in ("input", "output")}) for row in rows))
    else:
        path.write_text("\n".join(["input,edit,output", *(
            ",".join((row["input"], row["edit"], f"{i}b.png")) for i, row in enumerate(rows))]))
    (root / "pairs.jsonl").unlink()
    assert edits(sum((read_data(root if folder else path, split)
                      for split in ("train", "validation", "test")), [])) == numbered(*range(20))


@pytest.mark.parametrize("name", ["metadata.jsonl", "METADATA.JSONL", "Metadata.Jsonl"])
def test_a_downloaded_list_stays_in_its_folder_in_any_case(tmp_path, name):
    outside = write_jsonl(tmp_path / "mine") / "0b.png"
    (tmp_path / "their").mkdir()
    (tmp_path / "their" / name).write_text(
        2 * (json.dumps({"input": f"../mine/{outside.name}", "edit": "a", "output": str(outside)}) + "\n"))
    assert "not a file inside the folder" in complaint(tmp_path / "their" / name)


def test_a_folder_that_is_empty_or_unknown_or_not_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for name in ("seeds.json", "pairs.jsonl", "*.parquet", "edit_turns.json", "holds notes.txt"):
        assert name in complaint(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds nothing" in complaint(tmp_path / "empty")
    assert "is no training data" in complaint(tmp_path / "notes.txt")
    for name in ("nowhere", "pairs.jsonl", "pairs.parquet"):
        assert f"there is no {tmp_path / name}" in complaint(tmp_path / name)


@pytest.mark.parametrize("write", [write_original, write_magicbrush])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_columns_are_refused_where_they_have_no_effect(tmp_path, write, skip_bad):
    told = complaint(write(tmp_path), columns=("input", "edit", "output"), skip_bad=skip_bad)
    assert told.startswith(f"{tmp_path}: --columns is for")


def test_what_is_wrong_with_parquet_is_named_in_one_line(tmp_path, monkeypatch):
    other = write_parquet(tmp_path / "a.parquet", columns=("before", "edit_prompt", "edited_image"))
    told = complaint(other)
    assert "a.parquet has the columns img_id, before, edit_prompt, edited_image; wanted" in told
    assert all(name in told for columns in COLUMNS for name in columns)
    numbers = write_parquet(tmp_path / "b.parquet", [(1, "edit", 2)] * 3, plain=True)  # no pictures
    assert "pictures as bytes or paths" in complaint(numbers)
    assert "c.parquet row 2: no text under" in complaint(
        write_parquet(tmp_path / "c.parquet", [(b"", "edit", b""), (b"", "edit", b""), (b"", None, b"")]))
    (tmp_path / "d.parquet").write_bytes(other.read_bytes()[:-9])
    assert "d.parquet cannot be read as parquet" in complaint(tmp_path / "d.parquet")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert "pip install pyarrow" in complaint(other)


def test_pictures_broken_inside_are_named_when_they_are_opened(tmp_path):
    rows = [*ROWS[:7], (None, "edit", jpeg(0)[:-400]), *ROWS[7:]]
    cells = read_data(write_parquet(tmp_path / "x.parquet", rows))[7][0]
    files = read_data(write_magicbrush(tmp_path / "brush", [(b"nothing", "edit", rows[7][2])] * 2))[0][0]
    for picture, named in (
        (cells.before, "x.parquet row 7, column input_image"), (files.before, "240-input.png"),
        (cells.after, "x.parquet row 7, column edited_image"), (files.after, "240-output1.png"),
    ):
        with pytest.raises(ValueError, match=named) as error:
            load_picture(picture, 16)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [write_original, write_jsonl, write_magicbrush])
def test_pairs_without_their_pictures_are_left_out_and_counted_on_request(tmp_path, write):
    root = write(tmp_path)
    items = read_data(root)
    tested = read_data(root, "test")[0][0]
    for picture in (items[3][0].after, items[5][0].before, items[5][0].after, tested.after):
        picture.unlink()
    assert "(pairs that lack a picture: 2)" in complaint(root)
    with pytest.warns(UserWarning, match="lack a picture: 2.; the first: there is no picture") as warned:
        assert read_data(root, skip_bad=True) == items[:3] + items[4:5] + items[6:]
    assert len(warned) == 1 and str(items[3][0].after) in str(warned[0].message)
    with pytest.warns(UserWarning, match="lack a picture: 1"):
        assert read_data(root, "test", skip_bad=True) == []
    for path in root.rglob("*.jpg" if write is write_original else "*.png"):
        path.unlink()
    with pytest.warns(UserWarning, match="lack a picture: 18"):
        assert "no pairs in its train split" in complaint(root, skip_bad=True)


def test_a_prompt_keeps_its_other_pairs(tmp_path):
    root = write_original(tmp_path)
    (root / "seeds.json").write_text(json.dumps([["0000000", ["11", "22"]], ["0000001", ["11"]]]))
    with pytest.warns(UserWarning, match="lack a picture: 1"):
        assert [len(item) for item in read_data(root, skip_bad=True)] == [1]


def test_a_pass_in_order_reads_every_row_group_once_and_one_column_at_a_time(tmp_path, monkeypatch):
    items, reads = read_data(write_parquets(tmp_path, COLUMNS[0])), []
    read_row_group = pyarrow.parquet.ParquetFile.read_row_group

    def counted(self, group, columns=None, **options):
        reads.append((self.metadata.num_rows, group, *columns))
        return read_row_group(self, group, columns, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    for pair, in items:
        load_picture(pair.before, 8)
        load_picture(pair.after, 8)
    groups = [(rows, group) for rows, count in ((8, 4), (1, 1), (11, 4)) for group in range(count)]
    assert reads == [(*group, column) for group in groups for column in COLUMNS[0][::2]]


class Pictures(torch.utils.data.Dataset):
    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return to_tensor(load_picture(self.pictures[index], 16))


def test_cells_are_read_alike_in_worker_processes_and_threads(tmp_path):
    items = read_data(write_parquets(tmp_path, COLUMNS[2]))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    pictures = Pictures([picture for i in order for picture in (items[i][0].before, items[i][0].after)])
    here = torch.stack([pictures[i] for i in range(len(pictures))])
    assert len({picture.numpy().tobytes() for picture in here}) == 36
    loader = DataLoader(pictures, batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), here)
    with ThreadPoolExecutor(4) as pool:
        assert torch.equal(torch.stack(list(pool.map(pictures.__getitem__, range(36)))), here)


@pytest.mark.parametrize("seed", range(8))
def test_crop_and_flip_are_the_same_for_both_pictures_of_a_pair(tmp_path, seed):
    """The second is the first in negative, and stays so; the first is what resizing and cropping give."""
    draw = np.random.default_rng(seed)
    width, height, resolution = (int(side) for side in draw.integers(9, 90, 3))
    before = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    before.save(tmp_path / "a.png")
    ImageOps.invert(before).save(tmp_path / "b.png")
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box, size = (left, top, left + side, top + side), (resolution, resolution)
    expected = np.asarray(before.resize(size, Image.Resampling.LANCZOS, box), int)
    for flip in (False, True):
        a, b = (np.asarray(load_picture(tmp_path / name, resolution, flip), int)
                for name in ("a.png", "b.png"))
        assert a.shape == (resolution, resolution, 3) and abs(a + b - 255).max() <= 1  # rounded twice
        assert abs(a[:, ::-1 if flip else 1] - expected).max() <= 1


def test_pictures_keep_their_aspect(tmp_path):
    wide = Image.new("RGB", (80, 40), "red")
    wide.paste("blue", (20, 0, 60, 40))  # the middle square
    wide.save(tmp_path / "wide.png")
    square = load_picture(tmp_path / "wide.png", 16)
    assert square.size == (16, 16)
    assert square.crop((4, 0, 12, 16)).getcolors() == [(128, (0, 0, 255))]  # Lanczos blurs the sides a little


def test_scenes_are_rendered_and_flipped():
    scene = random_scene("train", 3)
    assert load_picture(scene, 32) == scene.render(32) != load_picture(scene, 32, flip=True)
    assert load_picture(scene, 32, flip=True) == ImageOps.mirror(scene.render(32))


def test_a_stamp_changes_with_the_file_and_the_place(tmp_path):
    for path in (write_original(tmp_path) / "0000000" / "11_0.jpg", write_parquet(tmp_path / "a.parquet")):
        picture = path if path.suffix == ".jpg" else Cell(path, 0, 1, "input_image", 1)
        first = stamp(picture)
        assert first == stamp(picture) and first[0] == str(path) and hash(first)
        path.write_bytes(path.read_bytes() + b"x")
        assert stamp(picture) != first
    cells = [Cell(path, 0, row, column, row) for row in (1, 2) for column in COLUMNS[1][::2]]
    assert len({stamp(cell) for cell in cells}) == 4
    scene = random_scene("train", 3)
    assert stamp(scene) == (repr(scene),) != stamp(random_scene("train", 4))
