"""Tables as other programs write them: names of columns, image folders, .tar files, and what is left out."""

import csv
import gzip
import io
import json
import re
import tarfile
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from nanoip2p.dataset import tables
from nanoip2p.dataset.layouts import SPLITS, Pair, broken_pictures, load_picture, read_data, stamp
from nanoip2p.dataset.tables import COLUMNS, Cell, Member

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])  # of `datasets`
OTHER = ("mine.before", "mine.said", "mine.after")


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def shade(picture) -> int:
    return load_picture(picture, 8).getpixel((0, 0))[0]


def shades(items) -> list[tuple]:
    return [(shade(pair.before), pair.edit, shade(pair.after)) for item in items for pair in item]


WANTED = [(i, f"edit {i}", 100 + i) for i in range(10)]


def write_cells(path, names, edits, paths=False, **columns):
    """The parquet file of `datasets`: pictures as bytes, or as paths in the file's folder."""
    def cells(first):
        found = []
        for i in range(len(edits)):
            (path.parent / f"{first + i}.png").write_bytes(png(first + i))
            found.append({"bytes": None, "path": f"{first + i}.png"} if paths else
                         {"bytes": png(first + i), "path": None})
        return pyarrow.array(found, IMAGE)

    table = {names[0]: cells(0), names[1]: edits, names[2]: cells(100), **columns}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=4)
    return path


def write_folder(root, kind, names=("original_image", "edit_prompt", "edited_image"), suffix="_file_name"):
    """An image folder of `datasets`."""
    before, edit, after = names
    rows = []
    for first, text, last in WANTED:
        for number in (first, last):
            root.mkdir(parents=True, exist_ok=True)
            (root / f"{number}.png").write_bytes(png(number))
        rows.append({f"{before}{suffix}": f"{first}.png", edit: text, f"{after}{suffix}": f"{last}.png"})
    path = root / f"metadata.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(content), 1.5  # a fraction takes an extended header
            file.addfile(about, io.BytesIO(content))
    return path


def complaint(*args, **options) -> str:
    with pytest.raises(ValueError) as error:
        read_data(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_columns_of_every_known_dataset_and_of_ones_own(tmp_path):
    for names in (*COLUMNS, OTHER):
        path = write_cells(tmp_path / "x.parquet", names, [text for _, text, _ in WANTED])
        columns = OTHER if names == OTHER else None
        items = read_data(path, columns=columns)
        assert shades(items) == WANTED[:9] and isinstance(items[0][0].before, Cell)
    told = complaint(path)
    assert "--columns" in told and all(name in told for names in (*COLUMNS, OTHER) for name in names)
    told = complaint(path, columns=("before", "said", "after"))
    assert "before, said" in told and "--columns" not in told


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("suffix", ["_file_name", ""])
def test_image_folders(tmp_path, kind, suffix):
    assert shades(read_data(write_folder(tmp_path / "whole", kind, suffix=suffix))) == WANTED[:9]
    for part in ("train", "test"):
        write_folder(tmp_path / "hub" / part, kind, suffix=suffix)
    for split, wanted in (("train", WANTED), ("test", WANTED), ("validation", [])):
        assert shades(read_data(tmp_path / "hub", split)) == wanted
    own = write_folder(tmp_path / "own", kind, OTHER, suffix)
    assert shades(read_data(own, columns=OTHER)) == WANTED[:9]
    (own / f"metadata.{kind}").rename(own / f"list.{kind}")
    assert shades(read_data(own / f"list.{kind}", columns=OTHER)) == WANTED[:9]


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a//b.png", ""])
def test_a_downloaded_table_names_pictures_in_its_folder_only(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "x.png").write_bytes(png(1))
    row = {"original_image": name, "edit_prompt": "x", "edited_image": name}
    for file in ("metadata.jsonl", "any.jsonl"):
        (tmp_path / "in" / file).write_text(json.dumps(row) + "\n")
        told = complaint(tmp_path / "in" / file)
        assert f"data names {name!r}, which is not a file inside" in told and f"{file}, line 1: " in told
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps(dict(zip(COLUMNS[-1], row.values()))))
    assert "is not a file inside" in complaint(tmp_path / "in")
    cells = pyarrow.array([{"bytes": None, "path": name}] * 2, IMAGE)
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(COLUMNS[0], (cells, ["x", "y"], cells)))),
                                tmp_path / "in" / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet row 0.* is not a file inside" if name else "be used"):
        load_picture(read_data(tmp_path / "in" / "x.parquet")[0][0].before, 8)


def test_parquet_with_paths_in_place_of_bytes(tmp_path):
    """As Dataset.to_parquet of an image folder writes it: absolute paths, which have to be below the file."""
    path = write_cells(tmp_path / "x.parquet", COLUMNS[0], [text for _, text, _ in WANTED], paths=True)
    assert shades(read_data(path)) == WANTED[:9]
    cells = [pyarrow.array([{"bytes": None, "path": str(tmp_path / f"{first + i}.png")} for i in range(10)],
                           IMAGE) for first in (0, 100)]
    edits = [text for _, text, _ in WANTED]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(COLUMNS[0], (cells[0], edits, cells[1])))), path)
    assert shades(read_data(path)) == WANTED[:9]
    (tmp_path / "0.png").unlink()
    _, pairs, counts, problems, _ = broken_pictures(path, 8)
    assert pairs == 9 and counts["pairs that lack a picture"] == 1
    assert problems == [f"there is no picture {tmp_path / '0.png'}"]
    assert problems[0] in complaint(path)


@pytest.mark.parametrize("statistics", [True, False])
def test_parquet_with_bytes_and_paths_keeps_both_in_order(tmp_path, monkeypatch, statistics):
    """The stamp of a picture behind a path, for the cache, changes with that picture."""
    path = write_cells(tmp_path / "x.parquet", COLUMNS[0], ["x"] * 10)
    table = pyarrow.parquet.read_table(path)
    cells = [{"bytes": None, "path": f"{i}.png"} if i % 5 == 0 else {"bytes": png(i), "path": "no.png"}
             for i in range(10)]
    table = table.set_column(0, "original_image", pyarrow.array(cells, IMAGE))
    pyarrow.parquet.write_table(table, path, row_group_size=3, write_statistics=statistics)
    reads, column = [], tables._read_group
    monkeypatch.setattr(tables, "_read_group", lambda *args: reads.append(args[2:]) or column(*args))
    items = read_data(path)
    both = ["original_image", "edit_prompt"] + ["edited_image"] * (not statistics)
    assert reads == [(i, both if i < 2 or not statistics else ["edit_prompt"]) for i in range(4)]
    assert shades(items) == [(i, "x", 100 + i) for i in range(9)]
    assert [isinstance(pair.before, Path) for [pair] in items] == [i % 5 == 0 for i in range(9)]
    first = stamp(items[5][0].before)
    (tmp_path / "5.png").write_bytes(png(77) + b"x")
    assert stamp(items[5][0].before) != first and shade(items[5][0].before) == 77


def test_several_wordings_and_inverse_edits_are_pairs_of_one_item(tmp_path):
    edits = pyarrow.array([["a", "b"], ["c"]])
    items = read_data(write_cells(tmp_path / "omni.parquet", COLUMNS[5], edits))
    assert shades(items) == [(0, "a", 100), (0, "b", 100)]
    path = write_cells(tmp_path / "hq.parquet", COLUMNS[4], ["make", "it"], inverse_edit=["undo", None],
                       input=["caption"] * 2, output=["caption"] * 2, input_caption=["one"] * 2,
                       output_caption=["two"] * 2)
    assert shades(read_data(path)) == [(0, "make", 100), (100, "undo", 0)]
    assert [pair.captions for pair in read_data(path)[0]] == [("one", "two"), ("two", "one")]
    for bad in ([[], ["c"]], [[None], ["c"]], [["x" * 10_001], ["c"]]):
        edits = pyarrow.array(bad, pyarrow.list_(pyarrow.string()))
        write_cells(tmp_path / "omni.parquet", COLUMNS[5], edits)
        assert "omni.parquet row 0" in complaint(tmp_path / "omni.parquet")


MEMBERS = [member for i, text, last in WANTED for member in (
    (f"a.b/{i:03d}.input.PNG", png(i)), (f"a.b/{i:03d}.output.png", png(last)),
    *([(f"a.b/{i:03d}.edit.txt", text.encode() + b"\n")] if i % 2 else [
        (f"a.b/{i:03d}.json", json.dumps({"edit": text, "input": "/etc/passwd"}).encode())]))]


def test_tars_of_webdataset(tmp_path):
    extra = [("noext", b"x"), (".hidden.txt", b"x"), ("../../z.input.png", png(3))]
    path = write_tar(tmp_path / "x.tar", [*MEMBERS, *extra])
    with pytest.warns(UserWarning, match='cannot be read: 1.; the first: .*no picture "output"'):
        items = [item for split in SPLITS for item in read_data(path, split, skip_bad=True)]
    assert shades(items) == WANTED and isinstance(items[0][0].before, Member)
    write_tar(tmp_path / "x.tar", MEMBERS)
    assert shades(read_data(tmp_path)) == WANTED[:9]
    plain = [(name.replace("edit.txt", "txt").replace(".json", ".txt"),
              content if "json" not in name else json.loads(content)["edit"].encode())
             for name, content in MEMBERS]
    path = write_tar(tmp_path / "x.tar", plain)
    assert "no text under \"edit\"" in complaint(path)
    assert shades(read_data(path, columns=("input.png", "txt", "output.png"))) == WANTED[:9]


def test_our_rows_are_those_of_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    extra = [("a.b/000.late.txt", b"x"), ("noext", b""), ("c.d/e.f.txt", b"")]
    path = write_tar(tmp_path / "x.tar", [*MEMBERS, *extra])
    theirs = [(row["__key__"], sorted(name for name in row if name[0] != "_"))
              for row in webdataset.WebDataset(str(path), shardshuffle=False)]
    ours = [(where.removeprefix(f"{path}: "), row) for where, row in tables.table_rows(path, None)]
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    assert all(set(names) <= row.keys() for (_, names), (_, row) in zip(theirs, ours))


@pytest.mark.parametrize("members, told", [
    ([("a.input.png", png(1)), ("a.edit.txt", b"x")], 'a: no picture "output"; it has'),
    ([("a.input.png", png(1)), ("a.input.png", png(1))], "a.input.png is there twice"),
    ([("house.1.input.png", png(1)), ("house.1.txt", b"x"), ("house.2.txt", b"y")],  # keys with a dot
     'house: no picture "input"; it has 1.input, 1.input.png, 1, 1.txt, 2, 2.txt'),
    ([("a.json", b"{")], "a.json cannot be read"),
    ([("a.txt", b"x" * (2**20 + 1))], "a.txt cannot be read: longer than 1,048,576 bytes"),
    ([("a.txt", b"\xff")], "a.txt cannot be read"),
    ([(f"a.{i}", b"x") for i in range(101)], "x.tar: a has more than 100 members"),
    ([("a.json", json.dumps({"input": "/etc/x.png", "edit": "x", "output": "y"}).encode())],
     'no picture "input"'),
])
def test_a_bad_row_of_a_tar_is_named(tmp_path, members, told):
    assert told in complaint(write_tar(tmp_path / "x.tar", members))


def test_a_bad_tar_is_named(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", MEMBERS)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    assert "x.tar cannot be read as .tar" in complaint(path)
    path.write_bytes(gzip.compress(whole))
    assert "unpack .gz first" in complaint(path)
    path.write_bytes(whole)
    for size in (-512, -1, 2**60, 2**70):
        about = tarfile.TarInfo("a.input.png")
        about.size = size
        for kind in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                     tarfile.GNUTYPE_SPARSE):
            about.type = kind
            path.write_bytes(about.tobuf(tarfile.GNU_FORMAT) + whole)
            try:
                assert len(read_data(path)) == 9
            except ValueError as error:
                assert str(error).startswith(str(path))
    path.write_bytes(whole)
    monkeypatch.setattr(tables, "MOST_ROWS", 5)
    assert "there are over 5;" in complaint(path)
    monkeypatch.undo()
    for damage in (whole[:-512 * 20], whole[:512 * 8] + b"\xff" * 512 + whole[512 * 9:],
                   bytes(512) + whole, bytes(2**21) + whole):
        path.write_bytes(damage)
        assert "x.tar cannot be read as .tar, or is cut off or damaged after" in complaint(path)
    link = tarfile.TarInfo("a.input.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "w") as file:
        file.addfile(link)
    assert "no pairs in its train split" in complaint(path)


def write_prompts(root):
    """The original's dataset with the second half of its folders missing, and a prompt.json without text."""
    seeds = [[f"{i // 10}/{i:07d}", ["11"]] for i in range(20)]
    for name, _ in seeds[:10]:
        (root / name).mkdir(parents=True)
        (root / name / "prompt.json").write_text('{"edit": "x"}' if name != "0/0000003" else '{"edit": null}')
        for part in (0, 1):
            (root / name / f"11_{part}.jpg").write_bytes(png(9))
    (root / "seeds.json").write_text(json.dumps([*seeds, ["../x", ["1"]], 7]))
    return root


def write_lines(root):
    root.mkdir()
    (root / "a.png").write_bytes(png(9))
    good = json.dumps({"input": "a.png", "edit": "x", "output": "a.png"})
    bad = ["{", "[]", '{"input": "a.png", "edit": null, "output": "a.png"}', "x" * 2**21]
    lines = [good] * 9 + bad + ["\xff"] * 9
    (root / "pairs.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    return root


def write_rows(root):
    root.mkdir()
    return write_cells(root / "x.parquet", COLUMNS[0], ["x"] * 9 + [None] * 13).parent


def write_shards(root):
    """Of three parquet files one is cut off, and one is the pointer that git leaves without LFS."""
    root.mkdir()
    for name in "abc":
        write_cells(root / f"{name}.parquet", COLUMNS[0], ["x"] * (9 if name == "a" else 3))
    (root / "b.parquet").write_bytes((root / "b.parquet").read_bytes()[:-9])
    (root / "c.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    return root


@pytest.mark.parametrize("write, sound, bad, named", [
    (write_prompts, 9, 13, "0/0000003/prompt.json: no text under"),
    (write_lines, 9, 13, "line 10 is not a JSON object"),
    (write_rows, 9, 13, "row 9: no text under"),
    (write_shards, 9, 2, "b.parquet cannot be read as parquet"),
])
def test_rows_that_cannot_be_read_are_left_out_and_counted_on_request(tmp_path, write, sound, bad, named):
    root = write(tmp_path / "data")
    assert named in complaint(root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = [item for split in SPLITS for item in read_data(root, split, skip_bad=True)]
    assert len(items) == sound and all(isinstance(pair, Pair) for item in items for pair in item)
    assert "the first: " in str(caught[0].message) and named in str(caught[0].message)
    assert re.match(r"left out of the (train|validation) split \(", str(caught[0].message))
    assert sum(int(re.search(r"be read(?: to their end)?: (\d+)\)", str(one.message))[1]) for one in caught
               ) == bad
    _, pairs, counts, problems, _ = broken_pictures(root, 8)
    kind = "files that cannot be read to their end" if write is write_shards else "rows that cannot be read"
    assert (pairs, counts[kind], sum(counts.values())) == (sound, bad, bad) and named in problems[0]


@pytest.mark.parametrize("pax", [
    {"size": str(2**70)}, {"size": str(2**40)}, {"size": "-512"}, {"GNU.sparse.map": "0,x"},
    {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**50)}, {"GNU.sparse.size": str(2**50)},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}])
@pytest.mark.parametrize("name", ["a.input.png", "a.txt"])
def test_odd_members_of_a_tar_are_refused_in_one_line(tmp_path, pax, name):
    about = tarfile.TarInfo(name)
    about.pax_headers = pax
    path = tmp_path / "x.tar"
    path.write_bytes(about.tobuf(tarfile.PAX_FORMAT) + write_tar(path, MEMBERS).read_bytes())
    assert "x.tar cannot be read as .tar" in complaint(path)


def test_a_row_of_a_tar_has_at_most_a_hundred_members(tmp_path, monkeypatch):
    """So neither their number nor the work for a row grows without a limit."""
    parts = [(f"{i}.json", json.dumps({f"{i} {k}": k for k in range(9)}).encode()) for i in range(101)]
    _, row = tables._unpacked(tmp_path, "a", parts[1:])
    assert len(row) == 100 * 10 and row["7 8"] == row["7.json"]["7 8"] == 8
    assert "has more than 100 members" in str(tables._unpacked(tmp_path, "a", parts))
    sizes = []
    monkeypatch.setattr(tables, "_unpacked", lambda path, key, parts: sizes.append(len(parts)))
    list(tables.table_rows(write_tar(tmp_path / "x.tar", [(f"a.{i}", b"x") for i in range(300)]), None))
    assert sizes == [101]


def test_pictures_are_not_read_before_they_are_needed(tmp_path, monkeypatch):
    cells = write_cells(tmp_path / "x.parquet", COLUMNS[0], ["x"] * 10)
    monkeypatch.setattr(tables, "content", None)
    monkeypatch.setattr(tables, "_column", None)
    monkeypatch.setattr(Image, "open", None)
    assert len(read_data(cells)) == len(read_data(write_tar(Path(tmp_path / "x.tar"), MEMBERS))) == 9
