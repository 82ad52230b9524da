"""Test ``trainer.index``: which shards are scanned, what is rejected, and how ranks share the work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.helpers import text_shards, write_shard
from trainer import index
from trainer.data.errors import ShardError
from trainer.data.shards import manifest_builder
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.reader import ShardReader


def run(folder: Path, *arguments: str) -> int:
    return index.main(["--output", str(folder / "manifest.npz"), *arguments])


def test_manifest_of_shards_in_parallel_and_in_order(tmp_path: Path) -> None:
    counts = [3, 1, 4, 1, 5, 9, 2, 6]
    text_shards(tmp_path, counts)
    one = load_manifest(tmp_path / "manifest.npz")
    for sidecar in tmp_path.glob("*.index"):
        sidecar.unlink()
    assert run(tmp_path, "--processes", "2", str(tmp_path / "{0000..0007}.tar")) == 0
    two = load_manifest(tmp_path / "manifest.npz")
    assert two.samples.tolist() == counts
    assert [two.url(i) for i in range(len(two))] == [f"{i:04d}.tar" for i in range(8)]
    assert two.shard_bytes.tolist() == [(tmp_path / two.url(i)).stat().st_size for i in range(8)]
    assert two.sha256 == one.sha256


def test_manifest_and_shards_move_together(tmp_path: Path) -> None:
    text_shards(tmp_path / "here", [2, 2])
    before = load_manifest(tmp_path / "here" / "manifest.npz").sha256
    (tmp_path / "here").rename(tmp_path / "there")
    moved = load_manifest(tmp_path / "there" / "manifest.npz")
    assert moved.sha256 == before
    assert moved.shard_path(1).exists()


def test_shards_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_shards(tmp_path / "data", [2])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    assert run(Path("lists"), "data/0000.tar") == 0
    assert load_manifest(tmp_path / "lists/manifest.npz").url(0) == "../data/0000.tar"
    assert run(tmp_path / "lists", f"file://{tmp_path}/data/0000.tar") == 0
    manifest = load_manifest(tmp_path / "lists/manifest.npz")
    assert manifest.url(0) == str(tmp_path / "data/0000.tar")
    assert manifest.shard_path(0).exists()


def test_rejected_samples_stop_the_manifest_unless_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a.tar", [("one", {"jpg": b"j", "txt": b"t"}), ("two", {"txt": b"t"})])
    (tmp_path / "b.tar").write_bytes(b"")
    arguments = ["--require", "jpg", "txt", "--processes", "1", "--", str(tmp_path / "*.tar"), str(tmp_path / "c.tar")]
    assert run(tmp_path, *arguments) == 1
    assert not (tmp_path / "manifest.npz").exists()
    report = json.loads((tmp_path / "manifest.npz.rejected.json").read_text())
    assert [(Path(one["shard"]).name, one["reason"], one["key"]) for one in report] == [
        ("a.tar", "missing_member", "two"),
        ("b.tar", "empty", None),
        ("c.tar", "unreadable", None),
    ]
    assert report[0]["offset"] == 2048
    assert "--allow-rejected" in capsys.readouterr().err
    assert run(tmp_path, "--allow-rejected", *arguments) == 0
    assert load_manifest(tmp_path / "manifest.npz").samples.tolist() == [1]


def test_unchanged_sidecars_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_shards(tmp_path, [2, 3])
    scanned: list[str] = []
    scan = manifest_builder.scan_shard

    def counted(path: Path, required: tuple[str, ...]) -> object:
        scanned.append(path.name)
        return scan(path, required)

    monkeypatch.setattr(manifest_builder, "scan_shard", counted)
    arguments = ["--processes", "1", str(tmp_path / "*.tar")]
    assert run(tmp_path, *arguments) == 0
    assert scanned == []
    write_shard(tmp_path / "0001.tar", [("k", {"txt": b"another"})])
    assert run(tmp_path, *arguments) == 0
    assert scanned == ["0001.tar"]
    assert load_manifest(tmp_path / "manifest.npz").samples.tolist() == [2, 1]
    assert run(tmp_path, *arguments, "--require", "txt") == 0  # the sidecars were made without --require
    assert scanned == ["0001.tar", "0000.tar", "0001.tar"]


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {folder}/ran",
        "ftp://host/a.tar",
        "s3://bucket/a.tar::s3://other/b.tar",
        "{folder}/nothing-*.tar",
    ],
)
def test_refused_urls(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = url.replace("{folder}", str(tmp_path))
    assert run(tmp_path, url) == 2
    assert repr(url) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_shard_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_shards(tmp_path, [2])
    assert run(tmp_path, str(tmp_path / "0000.tar"), str(tmp_path / "*.tar")) == 2
    assert f"{tmp_path / '0000.tar'} is named more than once" in capsys.readouterr().err


class Rank:
    """A communicator of two ranks that run one after the other, rank 1 first.

    Attributes:
        shards: What rank 0 will broadcast to rank 1.
        gathered: What rank 1 sends, for rank 0 to gather.
    """

    size = 2

    def __init__(self, rank: int, shards: list[str], gathered: list[object]) -> None:
        self.rank, self.shards, self.gathered = rank, shards, gathered

    def bcast(self, value: object) -> object:
        return self.shards if value is None else value

    def gather(self, value: list[object]) -> list[list[object]] | None:
        if self.rank == 0:
            return [value, self.gathered]
        self.gathered += value
        return None


def test_ranks_of_mpi_make_the_same_manifest(tmp_path: Path) -> None:
    text_shards(tmp_path, [1, 2, 3, 4, 5])
    expected = load_manifest(tmp_path / "manifest.npz").sha256
    (tmp_path / "manifest.npz").unlink()
    shards, gathered = sorted(map(str, tmp_path.glob("*.tar"))), []
    arguments = ["--output", str(tmp_path / "manifest.npz"), str(tmp_path / "*.tar")]
    assert index.main(arguments, communicator=Rank(1, shards, gathered)) == 0
    assert len(gathered) == 2
    assert not (tmp_path / "manifest.npz").exists()
    assert index.main(arguments, communicator=Rank(0, shards, gathered)) == 0
    assert load_manifest(tmp_path / "manifest.npz").sha256 == expected


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun")
def test_mpirun_makes_the_same_manifest(tmp_path: Path) -> None:
    # In another process: an import starts an MPI job in this one, and mpirun would fail with the job's environment.
    if subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, check=False).returncode:
        pytest.skip("no mpi4py, or no MPI library")
    text_shards(tmp_path, [1, 2, 3, 4, 5])
    expected = load_manifest(tmp_path / "manifest.npz").sha256
    (tmp_path / "manifest.npz").unlink()
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "trainer.index"]
    arguments = ["--output", str(tmp_path / "manifest.npz"), str(tmp_path / "*.tar")]
    subprocess.run([*command, *arguments], check=True, timeout=120)
    assert load_manifest(tmp_path / "manifest.npz").sha256 == expected


def test_a_launcher_without_mpi4py_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(SystemExit, match=r"OMPI_COMM_WORLD_SIZE=2.*\n.*flamingo-trainer\[mpi\]"):
        run(tmp_path, "a.tar")


def texts(folder: Path, name: str = "manifest.npz") -> list[bytes]:
    manifest = load_manifest(folder / name)
    reader = ShardReader(manifest)
    return [reader.read(s, i)[1]["txt"] for s, count in enumerate(manifest.samples.tolist()) for i in range(count)]


def test_the_readmes_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell expands the braces of README's command, so ``--require`` comes before several shards."""
    readme = Path(__file__).parents[3] / "README.md"
    line = next(one for one in readme.read_text().splitlines() if "trainer.index --output data/laion" in one)
    shards = [f"data/laion/{number:05d}.tar" for number in range(3)]
    for number, shard in enumerate(shards):
        write_shard(tmp_path / shard, [(f"k{number}", {"txt": b"%d" % number})])
    monkeypatch.chdir(tmp_path)
    arguments = line.split("trainer.index ")[1].replace("data/laion/{00000..00999}.tar", " ".join(shards))
    assert index.main(arguments.split()) == 0
    assert texts(tmp_path / "data/laion") == [b"0", b"1", b"2"]
    assert load_manifest(tmp_path / "data/laion/manifest.npz").required == ("txt",)


@pytest.mark.parametrize(
    "arguments",
    [
        "{o} --require jpg txt -- {t}",
        "{t} {o} --require jpg txt",
        "--require .JPG --require txt {o} {t}",
        "--require jpg txt {t} {o}",
        "{o} --require jpg txt {p}",
    ],
)
def test_where_require_may_stand(tmp_path: Path, arguments: str) -> None:
    write_shard(tmp_path / "a.tar", [("k", {"txt": b"t", "jpg": b"j"})])
    arguments = arguments.format(o=f"--output {tmp_path}/m.npz", t=tmp_path / "a.tar", p=tmp_path / "{a..a}.tar")
    assert index.main(arguments.split()) == 0
    assert load_manifest(tmp_path / "m.npz").required == ("jpg", "txt")


def test_require_alone_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--require", "txt")
    assert caught.value.code == 2
    assert "no shards" in capsys.readouterr().err


def test_manifests_with_other_requirements_do_not_change_each_other(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("one", {"jpg": b"j", "txt": b"1"}), ("two", {"txt": b"2"})])
    shard = str(tmp_path / "a.tar")
    for name, options in (
        ("all", ()),
        ("pairs", ("--require", "jpg", "--allow-rejected")),
        ("text", ("--require=txt",)),
    ):
        assert index.main(["--output", str(tmp_path / f"{name}.npz"), *options, "--", shard]) == 0
    assert texts(tmp_path, "all.npz") == [b"1", b"2"]
    assert texts(tmp_path, "pairs.npz") == [b"1"]
    assert texts(tmp_path, "text.npz") == [b"1", b"2"]


def test_a_refused_index_leaves_the_old_manifest_usable(tmp_path: Path) -> None:
    text_shards(tmp_path, [2])
    assert run(tmp_path, "--require", "jpg", "--", str(tmp_path / "0000.tar")) == 1
    assert texts(tmp_path) == [b"0/0", b"0/1"]


@pytest.mark.parametrize("name", ["export-2026-01-02T10:00:00.tar", "run:1/0.tar", "a b/[1] {x}.tar", "s3:/x.tar"])
@pytest.mark.parametrize("how", ["absolute", "relative", "pattern"])
def test_names_with_special_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str) -> None:
    write_shard(tmp_path / "data" / name, [("k", {"txt": b"t"})])
    monkeypatch.chdir(tmp_path / "data")
    if how == "relative" and name.startswith("s3:"):
        name = f"./{name}"  # otherwise it is a url
    argument = {"absolute": str(tmp_path / "data" / name), "relative": name, "pattern": "**/*.tar"}[how]
    for output in ("m.npz", "../m.npz"):
        assert index.main(["--output", output, argument]) == 0
        assert texts(tmp_path / "data", output) == [b"t"]


def test_a_colon_does_not_open_a_way_to_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "pipe:touch ran", [("k", {"txt": b"t"})])
    assert run(tmp_path, "pipe:touch ran") == 2
    assert run(tmp_path, "./pipe:touch ran") == 0
    assert texts(tmp_path) == [b"t"]
    assert not (tmp_path / "ran").exists()


def test_a_manifest_in_a_linked_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_shards(tmp_path / "project/shards", [2])
    (tmp_path / "disk/big").mkdir(parents=True)
    (tmp_path / "project/data").symlink_to(tmp_path / "disk/big")
    monkeypatch.chdir(tmp_path / "project")
    assert run(Path("data"), "shards/0000.tar") == 0
    for folder in (Path("data"), tmp_path / "disk/big", tmp_path / "project/data"):
        assert texts(folder) == [b"0/0", b"0/1"]


def test_linked_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_shards(tmp_path / "disk", [2])
    (tmp_path / "project").mkdir()
    (tmp_path / "project/shards").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "project")
    for shard in ("shards/0000.tar", "shards/*.tar", "../project/shards/0000.tar"):
        assert run(Path("."), shard) == 0
        assert texts(Path(".")) == [b"0/0", b"0/1"]


def test_a_shard_under_two_names_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_shards(tmp_path, [2])
    (tmp_path / "link.tar").symlink_to(tmp_path / "0000.tar")
    (tmp_path / "folder").symlink_to(tmp_path)
    for other in ("link.tar", "folder/0000.tar", "../" + tmp_path.name + "/0000.tar"):
        assert run(tmp_path, str(tmp_path / "0000.tar"), str(tmp_path / other)) == 2
        assert "more than once" in capsys.readouterr().err


def test_a_copy_of_a_shard_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_shards(tmp_path, [2, 3])
    capsys.readouterr()
    shutil.copy(tmp_path / "0000.tar", tmp_path / "copy.tar")
    assert run(tmp_path, str(tmp_path / "*.tar")) == 0
    assert "copy.tar those of 0000.tar" in capsys.readouterr().err


def test_its_own_files_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_shards(tmp_path, [2])
    assert run(tmp_path, str(tmp_path / "*")) == 0
    assert "passed over 2 files" in capsys.readouterr().err
    assert texts(tmp_path) == [b"0/0", b"0/1"]


def test_what_was_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_shards(tmp_path, [2, 1])
    text = capsys.readouterr().out
    assert f"{tmp_path / 'manifest.npz'}: 2 shards (0 unchanged), 3 samples" in text
    assert "2 beside their shards" in text


def test_an_output_that_cannot_be_written_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_shards(tmp_path, [2])
    shard = str(tmp_path / "0000.tar")
    assert index.main(["--output", str(tmp_path), shard]) == 2
    assert f"{tmp_path} is a folder" in capsys.readouterr().err
    assert index.main(["--output", str(tmp_path / "0000.tar/m.npz"), shard]) == 1
    assert "0000.tar" in capsys.readouterr().err
    assert index.main(["--output", str(tmp_path / "new/folder/m.npz"), shard]) == 0


def test_moved_shards_keep_their_content_digest(tmp_path: Path) -> None:
    text_shards(tmp_path / "disk1", [2, 3])
    (tmp_path / "lists").mkdir()
    assert run(tmp_path / "lists", str(tmp_path / "disk1/*.tar")) == 0
    before = load_manifest(tmp_path / "lists/manifest.npz")
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    with pytest.raises(ShardError, match="run .*trainer.index again, on the shards' new place"):
        ShardReader(before).read(0, 0)
    assert run(tmp_path / "lists", str(tmp_path / "disk2/*.tar")) == 0
    after = load_manifest(tmp_path / "lists/manifest.npz")
    assert after.content_sha256 == before.content_sha256
    assert after.sha256 != before.sha256


def test_every_reason_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a.tar", ((f"k{n}", {"txt": b"t"}) for n in range(20)))
    (tmp_path / "b.tar").write_bytes(b"PAR1" + bytes(600))
    assert run(tmp_path, "--require", "jpg", "--", str(tmp_path / "a.tar"), str(tmp_path / "b.tar")) == 1
    text = capsys.readouterr().err
    assert "a parquet file" in text
    assert text.count("missing_member") <= 6
