"""docs/notebooks: each notebook runs, and its committed outputs are those of the quickstart's model."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from launch_scripts import prepare_digits
from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_tokenizer
from model.pretrained import save_flamingo
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer, wake
from tests.project.commands import ROOT

NOTEBOOK = ROOT / "docs/notebooks/first_steps.ipynb"
EXPORT = Path("runs/quickstart/flamingo/export")
MOST_BYTES = 300_000

pytestmark = pytest.mark.skipif(find_spec("nbclient") is None, reason="nbclient is missing: setup.sh --dev")


def read() -> Any:
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def execute(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the notebook as it runs in a folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    return runpy.run_path(str(ROOT / "docs/run_notebooks.py"))["execute"](NOTEBOOK, folder)


def printed(notebook: Any) -> list[str]:
    """Return what the cells print, apart from warnings."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.text for output in outputs if output.get("name") == "stdout"]


def test_the_committed_notebook_has_outputs_and_is_small() -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output.output_type, output.get("name")) for cell in cells for output in cell.outputs}
    assert kinds == {("stream", "stdout"), ("execute_result", None)}, "no errors, and no warnings"
    assert [text for text in printed(read()) if "right" in text]
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")


def test_it_names_the_missing_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = next(cell.source for cell in read().cells if cell.cell_type == "code")
    with pytest.raises(FileNotFoundError, match=r"launch_scripts/quickstart\.sh"):
        exec(first, {})


@pytest.mark.slow
def test_it_runs_on_a_small_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare_digits.Settings(pairs=2, documents=2, sentences=2, evaluation=5)
    assert prepare_digits.prepare(tmp_path / "data/quickstart", settings) == 0
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["gpt2"], tokenizer=str(tmp_path / "tokenizer"))
    config = tiny_config(language_model=language_model)
    tokenizer = build_tokenizer(config)
    model = build_flamingo(config, tokenizer)
    wake(model, 0.8)
    save_flamingo(tmp_path / EXPORT, model, tokenizer=tokenizer.tokenizer)
    texts = "".join(printed(execute(tmp_path, tmp_path, monkeypatch)))
    assert "resampler" in texts
    assert "0 of 5 right" in texts


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / EXPORT).is_dir(), reason="needs launch_scripts/quickstart.sh")
def test_the_committed_answers_are_those_of_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(execute(NOTEBOOK.parent, tmp_path, monkeypatch)) == printed(read())
