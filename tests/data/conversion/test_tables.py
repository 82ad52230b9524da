"""Test the tables of captions that are read, and what is said of those that are not."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.conversion.test_convert import RED, refused, run, samples

ROWS = [{"image": f"{n}.png", "caption": f"cat {n}"} for n in range(3)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(RED)
    return folder


def captions(images: Path, name: str, content: str | bytes, *options: str) -> list[str]:
    """Convert a table and return its captions."""
    table = images.parent / name
    table.write_bytes(content.encode() if isinstance(content, str) else content)
    output = images.parent / f"out-{len(list(images.parent.iterdir()))}"
    assert run(output, "folder", images, "--captions", table, *options) == 0
    return [members["txt"].decode() for _, members in samples(output)]


def delimited(delimiter: str, columns: tuple[str, str] = ("image", "caption")) -> str:
    return "".join(f"{delimiter.join(row)}\r\n" for row in [columns, *(tuple(row.values()) for row in ROWS)])


LAYOUTS: dict[str, Any] = {
    "a.csv": delimited(","),
    "semicolon.csv": delimited(";"),
    "tabs.csv": delimited("\t"),
    "a.tsv": delimited("\t"),
    "a.txt": delimited("\t", ("filepath", "title")),
    "bom.csv": delimited(",").encode("utf-8-sig"),
    "excel.txt": delimited("\t").encode("utf-16"),
    "case.csv": delimited(",", ("Image", "Caption")),
    "a.jsonl": "\n".join(map(json.dumps, ROWS)),
    "a.ndjson": "\n".join(map(json.dumps, ROWS)),
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "metadata.jsonl": "\n".join(json.dumps({"file_name": r["image"], "text": r["caption"]}) for r in ROWS),
    "by-name.json": json.dumps({row["image"]: row["caption"] for row in ROWS}),
    "coco.json": json.dumps(
        {
            "info": {},
            "images": [{"id": 7 + n, "file_name": row["image"]} for n, row in enumerate(ROWS)],
            "annotations": [{"id": n, "image_id": 7 + n, "caption": row["caption"]} for n, row in enumerate(ROWS)],
        }
    ),
    "karpathy.json": json.dumps(
        {"images": [{"filename": r["image"], "split": "train", "sentences": [{"raw": r["caption"]}]} for r in ROWS]}
    ),
    "lists.json": json.dumps([{"image": r["image"], "caption": [r["caption"]]} for r in ROWS]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(images: Path, name: str) -> None:
    assert captions(images, name, LAYOUTS[name]) == ["cat 0", "cat 1", "cat 2"]


def test_compressed_tables(images: Path) -> None:
    lines = "\n".join(map(json.dumps, ROWS))
    with zipfile.ZipFile(images.parent / "made.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/a.jsonl", "x")
        archive.writestr("a.jsonl", lines)
    assert captions(images, "a.jsonl.zip", (images.parent / "made.zip").read_bytes()) == ["cat 0", "cat 1", "cat 2"]
    assert captions(images, "a.csv.gz", gzip.compress(delimited(",").encode())) == ["cat 0", "cat 1", "cat 2"]


def test_several_captions_of_an_image(images: Path) -> None:
    rows = [{"image": "0.png", "caption": ["one", "two", " "]}, {"image": "1.png", "caption": "three"}]
    assert captions(images, "a.json", json.dumps(rows)) == ["one", "two", "three"]
    pictures = [{"id": 1, "file_name": "0.png"}]
    notes = [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "two"}, {"image_id": 2, "caption": "x"}]
    assert captions(images, "c.json", json.dumps({"images": pictures, "annotations": notes})) == ["one", "two"]


def test_a_cell_of_any_size(images: Path) -> None:
    long = "word " * 60_000
    text = f"image,caption\n0.png,a\n1.png,{long}\n2.png,b\n"
    assert captions(images, "a.csv", text) == ["a", long.strip(), "b"]
    assert captions(images, "a.tsv", text.replace(",", "\t")) == ["a", long.strip(), "b"]


@pytest.mark.parametrize(
    ("name", "content", "kept", "reasons"),
    [
        ("extra.csv", "image,caption\n0.png,a, b\n1.png,c\n", ["c"], ["invalid_row"]),
        ("short.csv", "image,caption\n0.png\n1.png,c\n", ["c"], ["missing_text"]),
        ("quote.csv", 'image,caption\n0.png,a\n1.png,"b\n2.png,c\n', ["a", "c"], ["invalid_row"]),
        (
            "quotes.csv",
            'image,caption\n0.png,"a\nb"\n1.png,5" tall\n2.png,"x ""y"""\n',
            ["a\nb", '5" tall', 'x "y"'],
            [],
        ),
        ("latin.csv", b"image,caption\n0.png,caf\xe9\n1.png,c\n", ["c"], ["invalid_utf8"]),
        ("blank.csv", "\nimage,caption\n\n0.png,a\n\n1.png,c\n", ["a", "c"], []),
        (
            "bad.jsonl",
            '{"image": "0.png", "caption": "a"}\n{broken\n[1]\n3\n',
            ["a"],
            ["invalid_json", "invalid_row"] * 1,
        ),
        (
            "bad.json",
            '[{"image": "0.png", "caption": "a"}, 3, {"image": "1.png"',
            ["a"],
            ["invalid_row", "invalid_json"],
        ),
        ("first.jsonl", '{"x": 1}\n{"image": "0.png", "caption": "a"}\n', ["a"], ["missing_text"]),
    ],
)
def test_a_bad_row_is_a_counted_row(
    images: Path, name: str, content: str | bytes, kept: list[str], reasons: list[str]
) -> None:
    table, output = images.parent / name, images.parent / "out"
    table.write_bytes(content.encode() if isinstance(content, str) else content)
    assert run(output, "folder", images, "--captions", table) == 0
    assert [members["txt"].decode() for _, members in samples(output)] == kept
    found = [reason for _, reason in refused(output)] if (output / "refused.json").exists() else []
    assert sorted(set(found)) == sorted(set(reasons))


def test_a_broken_archive_keeps_the_rows_before(images: Path) -> None:
    whole = gzip.compress("\n".join(json.dumps(ROWS[0]) for _ in range(20_000)).encode())
    table, output = images.parent / "a.jsonl.gz", images.parent / "out"
    table.write_bytes(whole[: len(whole) // 2])
    assert run(output, "folder", images, "--captions", table) == 0
    assert len(samples(output)) > 1000
    assert refused(output)[-1][1] == "damaged_file"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", b"PAR1" + bytes(600), ["a.parquet", "a parquet file", ".csv"]),
        ("a.zip", b"PK\x03\x04" + bytes(600), ["a.zip", "zip"]),
        ("a.csv", b"\x89PNG\r\n" + bytes(600), ["a PNG image"]),
        ("a.csv", b"picture,words\n0.png,a\n", ["'picture', 'words'", "--image-column", "--caption-column"]),
        ("a.csv", b"0.png,a\n1.png,b\n", ["'0.png', 'a'", "looks like a row"]),
        ("a.csv", b"", ["a.csv", "empty"]),
        ("a.jsonl", b'{"x": 1, "y": 2}\n', ["'x', 'y'", "--image-column"]),
        ("a.json", b'{"images": [], "annotations": [{"bbox": []}]}', ["captions_*.json"]),
        ("a.json", b'{"info": {}, "data": 1}', ["a.json", "'info', 'data'"]),
        ("a.json", b'{"broken', ["a.json", "not JSON"]),
    ],
)
def test_a_table_that_is_not_read_is_named(
    images: Path, name: str, content: bytes, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (images.parent / name).write_bytes(content)
    assert run(images.parent / "out", "folder", images, "--captions", images.parent / name) == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words), text
    assert not list((images.parent / "out").glob("*.tar"))


def test_columns_by_name(images: Path) -> None:
    table = "image,caption,url,prose\nx,y,0.png,chosen\n"
    assert captions(images, "a.csv", table, "--image-column", "url", "--caption-column", "prose") == ["chosen"]


def test_the_columns_that_were_taken_are_printed(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions(images, "a.tsv", delimited("\t", ("filepath", "title")))
    assert "images from the column 'filepath', captions from 'title'" in capsys.readouterr().err


def test_links_are_not_followed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("9.png", "9.txt", "8.txt"):
        (outside / name).write_bytes(RED if name.endswith("png") else b"secret")
    (images / "0.txt").write_bytes(b"a cat")
    (images / "folder").symlink_to(outside)
    (images / "loop").symlink_to(images)
    (images / "9.png").symlink_to(outside / "9.png")
    (images / "9.txt").symlink_to(outside / "9.txt")
    (images / "1.txt").symlink_to(outside / "8.txt")
    (images / "2.txt").symlink_to(images / "0.txt")  # stays inside
    output = tmp_path / "out"
    assert run(output, "folder", images) == 0
    assert [members["txt"] for _, members in samples(output)] == [b"a cat", b"a cat"]
    assert sorted(refused(output)) == [("1.txt", "link"), ("9.png", "link"), ("folder", "link"), ("loop", "link")]
    assert "link" in capsys.readouterr().err


def test_mmc4_zipped_and_without_images(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = {"text_list": ["a"], "image_info": [{"image_name": "0.png", "matched_text_index": 0}]}
    lines = f"{json.dumps(document)}\n{{broken\n{json.dumps(document)}\n"
    with zipfile.ZipFile(tmp_path / "docs_shard_0_v2.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_shard_0_v2.jsonl", lines)
    output = tmp_path / "out"
    assert run(output, "mmc4", tmp_path / "docs_shard_0_v2.jsonl.zip", "--images", images) == 0
    assert len(samples(output)) == 2
    assert refused(output) == [("docs_shard_0_v2.jsonl:2", "invalid_json")]
    assert run(tmp_path / "out2", "mmc4", tmp_path / "docs_shard_0_v2.jsonl.zip") == 1
    assert "--images" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_bytes(b"PAR1" + bytes(600))
    assert run(tmp_path / "out3", "mmc4", tmp_path / "a.jsonl") == 2
    assert "a parquet file" in capsys.readouterr().err


def test_obelics_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text('{"texts": []}')
    assert run(tmp_path / "out", "obelics", tmp_path / "a.parquet") == 2
    assert "a JSON file, not a parquet file" in capsys.readouterr().err
    assert run(tmp_path / "out", "obelics", tmp_path / "gone.parquet") == 2
    assert "gone.parquet" in capsys.readouterr().err


def test_what_was_written_is_printed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "a.csv"
    table.write_text("image,caption\n0.png,a\ngone.png,b\n")
    assert run(tmp_path / "out", "folder", images, "--captions", table) == 0
    text = capsys.readouterr()
    assert f"{tmp_path / 'out/manifest.npz'}: 1 shards" in text.out
    assert str(tmp_path / "out/refused.json") in text.err
    assert "missing_image" in text.err and "gone.png" in text.err


def test_a_missing_table_is_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "folder", images, "--captions", tmp_path / "gone.csv") == 2
    assert f"{tmp_path / 'gone.csv'}: No such file" in capsys.readouterr().err


def test_the_size_limit_of_csv_stays_as_it_was(images: Path) -> None:
    import csv

    before = csv.field_size_limit()
    captions(images, "a.csv", delimited(","))
    assert csv.field_size_limit() == before < sys.maxsize
