"""Write small data sets for the recipes, with the project's own commands, as their comments and pages say.

Every function writes below a work folder, in which the recipes' relative paths are valid.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path

from launch_scripts import prepare_digits, prepare_easy_vqa, prepare_in_context, prepare_zero_shot
from trainer import convert, import_model

ROOT = Path(__file__).parents[2]
# One epoch is shorter than twenty steps of most recipes, so the order of a second epoch is recorded too.
DIGITS = prepare_digits.Settings(pairs=600, documents=200, sentences=600, evaluation=20)
SHAPES = prepare_easy_vqa.Settings(texts=600, questions=1500)
EPISODES = prepare_in_context.Settings(text=400, pictures=300, captions=150, episodes=150, evaluation=5)


def prepare(name: str, folder: Path) -> None:
    """Write a data set of ``DATA_SETS`` and those that it needs, each once.

    Raises:
        RuntimeError: A command failed.
    """
    finished = folder / f".{name}"
    if finished.exists():
        return
    for other in _NEEDS.get(name, ()):
        prepare(other, folder)
    with _inside(folder):
        code = DATA_SETS[name]()
    if code:
        raise RuntimeError(f"the data set {name} could not be written: exit code {code}")
    finished.touch()


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with chdir(folder):
        yield


def _own() -> int:
    """Unpack pictures of the quickstart into a folder, and convert the folder as docs/own_data.md does."""
    with tarfile.open("data/quickstart/train/pairs/00000.tar") as archive:
        archive.extractall("own", filter="data")
    return convert.main(["folder", "own", "--output", "data/own/train"])


def _zero_shot() -> int:
    """Unpack images for zero-shot classification, as launch_scripts/combine_vision.sh does."""
    write, digits = partial(_zero_shot_folder), "data/quickstart/test/held_out/00000.tar"
    return write("digits", digits) or write("shapes", "data/easy_vqa/validation")


def _zero_shot_folder(name: str, source: str) -> int:
    return prepare_zero_shot.main(["--output", f"data/zero_shot/{name}", source])


def _squares() -> int:
    """Write and import the tiny IDEFICS of docs/interop.md, and convert its images."""
    page = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    block = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[0]
    exec(compile(block, "docs/interop.md", "exec"), {})
    imported = import_model.main(["tiny/idefics", "--output", "tiny/imported"])
    return imported or convert.main(["folder", "tiny/images", "--output", "tiny/data"])


DATA_SETS = {
    "quickstart": lambda: prepare_digits.prepare(Path("data/quickstart"), DIGITS),
    "easy_vqa": lambda: prepare_easy_vqa.prepare(Path("data/easy_vqa"), SHAPES),
    "in_context": lambda: prepare_in_context.prepare(Path("data/in_context"), EPISODES),
    "own": _own,
    "zero_shot": _zero_shot,
    "squares": _squares,
}
_NEEDS = {"own": ("quickstart",), "zero_shot": ("quickstart", "easy_vqa")}
