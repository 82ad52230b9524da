"""Test the conversion of folders, MMC4 and OBELICS into shards."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.helpers import SAMPLE, document_builder, image_bytes, pair_builder, text_of
from trainer import convert
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader

RED, GREEN, BLUE = (image_bytes(color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))


def run(output: Path, *arguments: object) -> int:
    return convert.main([str(arguments[0]), "--output", str(output), *map(str, arguments[1:])])


def samples(output: Path) -> list[tuple[str, dict[str, bytes]]]:
    manifest = load_manifest(output / "manifest.npz")
    reader = ShardReader(manifest)
    return [reader.read(s, i) for s, count in enumerate(manifest.samples.tolist()) for i in range(count)]


def refused(output: Path) -> list[tuple[str, str]]:
    return [(Path(one["where"]).name, one["reason"]) for one in json.loads((output / "refused.json").read_text())]


def test_a_folder_with_captions_beside_the_images(tmp_path: Path) -> None:
    images = tmp_path / "in"
    (images / "deep").mkdir(parents=True)
    for name, data in {
        "b.PNG": RED,
        "b.txt": " a red square \n".encode("utf-8-sig"),
        "deep/c.png": GREEN,
        "deep/c.txt": "grün".encode(),
        "d.png": BLUE,
        "e.png": BLUE,
        "e.txt": b"caf\xe9",
        "f.png": BLUE,
        "f.txt": b" \n",
        "notes.md": b"",
    }.items():
        (images / name).write_bytes(data)
    assert run(tmp_path / "out", "folder", images) == 0
    assert samples(tmp_path / "out") == [
        ("000000000", {"png": RED, "txt": b"a red square"}),
        ("000000001", {"png": GREEN, "txt": "grün".encode()}),
    ]
    assert refused(tmp_path / "out") == [("d.png", "missing_text"), ("e.txt", "invalid_utf8"), ("f.txt", "empty_text")]
    members = samples(tmp_path / "out")[0][1]
    row = pair_builder()(members, SAMPLE, np.random.default_rng(0))
    assert text_of(row.input_ids) == "B#a red square|"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_captions(tmp_path: Path, kind: str) -> None:
    images, table = tmp_path / "in", tmp_path / f"table.{kind}"
    (images / "x").mkdir(parents=True)
    (images / "x/a.png").write_bytes(RED)
    (tmp_path / "secret.png").write_bytes(BLUE)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [
        {"file": "x/a.png", "text": 'a "red", square', "lang": "en"},
        {"file": "../secret.png", "text": "s", "lang": ""},
        {"file": str(tmp_path / "secret.png"), "text": "s", "lang": ""},
        {"file": "link.png", "text": "s", "lang": ""},
        {"file": "gone.png", "text": "s", "lang": ""},
        {"file": "a\0.png", "text": "s", "lang": ""},
        {"file": "x/a.png", "text": " ", "lang": ""},
        {"file": "x/a.exe", "text": "s", "lang": ""},
    ]
    if kind == "csv":
        rows = [row for row in rows if "\0" not in row["file"]]
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows] + [
            "{broken",
            '{"file": NaN, "text": "s"}',
            '{"file": 3, "text": "s"}',
        ]
        table.write_text("\n".join(lines))
    columns = ("--image-column", "file", "--caption-column", "text")
    assert run(tmp_path / "out", "folder", images, "--captions", table, *columns) == 0
    assert samples(tmp_path / "out") == [
        ("000000000", {"png": RED, "txt": b'a "red", square', "json": b'{"lang": "en"}'})
    ]
    reasons = [reason for _, reason in refused(tmp_path / "out")]
    assert reasons[:4] == ["outside", "outside", "outside", "missing_image"]
    assert reasons[-2 if kind == "csv" else -5 :] == (
        ["empty_text", "missing_image"]
        if kind == "csv"
        else ["empty_text", "missing_image", "invalid_json", "invalid_json", "missing_text"]
    )


def test_a_missing_column_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("picture,caption\na.png,b\n")
    assert run(tmp_path / "out", "folder", tmp_path, "--captions", tmp_path / "t.csv") == 2
    assert "no column 'image', but 'picture', 'caption'" in capsys.readouterr().err


def test_mmc4(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "r.jpg").write_bytes(RED)  # a PNG in spite of its name
    (images / "g.png").write_bytes(GREEN)
    documents: list[Any] = [
        {
            "text_list": ["one", "two"],
            "image_info": [
                {"image_name": "g.png", "matched_text_index": 1, "matched_sim": 0.5},
                {"image_name": "gone.png", "matched_text_index": 0, "matched_sim": 0.9},
                {"image_name": "r.jpg", "matched_text_index": 0, "matched_sim": 0.4},
            ],
            "similarity_matrix": [[0, 1], [2, 3], [4, 5]],
            "url": "http://x",
        },
        {
            "text_list": ["three"],
            "image_info": [{"image_base64": base64.b64encode(BLUE).decode(), "matched_text_index": 0}],
        },
        {"text_list": ["four"], "image_info": [{"image_name": "../manifest.npz"}]},
        {"text_list": ["five"], "image_info": []},
        {"text_list": ["six"]},
        ["seven"],
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n\n{cut")
    assert run(tmp_path / "out", "mmc4", tmp_path / "a.jsonl", "--images", images) == 0
    first, second = samples(tmp_path / "out")
    assert {name: data for name, data in first[1].items() if name != "json"} == {"0.png": GREEN, "1.png": RED}
    document = json.loads(first[1]["json"])
    assert document["similarity_matrix"] == [[0, 1], [4, 5]]
    assert [info["image_name"] for info in document["image_info"]] == ["0.png", "1.png"]
    assert document["url"] == "http://x"
    build = document_builder(max_tokens=64)
    row = build(first[1], SAMPLE, np.random.default_rng(0))
    assert text_of(row.input_ids) == "B#one|#two|"
    assert [medium[0, :, 0, 0].tolist() for medium in row.media] == [[255, 0, 0], [0, 255, 0]]
    assert text_of(build(second[1], SAMPLE, np.random.default_rng(0)).input_ids) == "B#three|"
    assert [reason for _, reason in refused(tmp_path / "out")] == [
        "no_images",
        "no_images",
        "invalid_document",
        "invalid_document",
        "invalid_json",
    ]


def test_obelics(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = tmp_path / "images"
    images.mkdir()
    url = "https://example.org/g.png"
    (images / hashlib.sha256(url.encode()).hexdigest()).write_bytes(GREEN)
    (images / "b.png").write_bytes(BLUE)
    rows = [
        {"texts": [None, "one", None, "two", "three", None], "images": [url, None, "b.png", None, None, url]},
        {"texts": ["alone", None], "images": [None, "gone.png"]},
        {"texts": ["both"], "images": ["b.png"]},
        {"texts": [None], "images": ["b.png"]},
        {"texts": ["a", "b"], "images": [None]},
        {"texts": ["out", None], "images": [None, "../out/manifest.npz"]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert run(tmp_path / "out", "obelics", tmp_path / "a.parquet", "--images", images) == 0
    ((_, members),) = samples(tmp_path / "out")
    row = document_builder(max_tokens=64)(members, SAMPLE, np.random.default_rng(0))
    assert text_of(row.input_ids) == "B#one|#two three|#|"
    assert [medium[0, :, 0, 0].tolist() for medium in row.media] == [[0, 255, 0], [0, 0, 255], [0, 255, 0]]
    assert [reason for _, reason in refused(tmp_path / "out")] == [
        "no_images",
        "invalid_document",
        "empty_text",
        "invalid_document",
        "no_images",
    ]
    embedded = [{"texts": ["x", None], "images": [None, {"bytes": RED, "path": None}]}]
    parquet.write_table(pyarrow.Table.from_pylist(embedded), tmp_path / "b.parquet")
    assert run(tmp_path / "out2", "obelics", tmp_path / "b.parquet") == 0
    assert samples(tmp_path / "out2")[0][1]["0.png"] == RED
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}]), tmp_path / "c.parquet")
    assert run(tmp_path / "out3", "obelics", tmp_path / "c.parquet") == 2


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(tmp_path / "out", "obelics", tmp_path / "a.parquet") == 2
    assert "flamingo-trainer[parquet]" in capsys.readouterr().err


def test_an_empty_folder_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert run(tmp_path / "out", "folder", tmp_path / "in") == 1
    assert not (tmp_path / "out/manifest.npz").exists()
    assert run(tmp_path / "out", "folder", tmp_path / "gone") == 2
