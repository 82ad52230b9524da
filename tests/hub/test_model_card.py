"""Write model cards: what is known stands in them, and they say what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import metadata_load

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_tokenizer
from model.pretrained import save_flamingo
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer
from trainer import export as export_command
from trainer.hub.model_card import frozen_parts
from trainer.hub.publish import write_with_card
from trainer.hub.weights_digest import weights_digest
from trainer.runtime.run_folder import RunFolder

SOURCES = [{"name": "pairs", "type": "image_text", "batch_size": 16, "weight": 0.5, "manifest": "data/pairs.npz"}]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export of a tiny model, inside of a run folder's parent."""
    folder = tmp_path_factory.mktemp("card")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["llama"], tokenizer=str(folder / "tokenizer"))
    config = tiny_config(language_model=language_model)
    tokenizer = build_tokenizer(config)
    save_flamingo(folder / "export", build_flamingo(config, tokenizer), tokenizer=tokenizer.tokenizer)
    return folder / "export"


def write_run(folder: Path, records: list[dict[str, Any]]) -> RunFolder:
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({"task": "flamingo", "data": {"sources": SOURCES}}))
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 3, "lo')
    return run


def card(export: Path, folder: Path, **settings: Any) -> str:
    folder.mkdir()
    write_with_card(export, folder, "name", **settings)
    return (folder / "README.md").read_text()


def test_a_card_tells_of_data_steps_losses_and_results(export: Path, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "runs" / "run",
        [{"step": i, "loss": float(i), "loss/pairs": 2.0 * i, "tokens": 1000} for i in (1, 2)],
    )
    scores = {"score": 0.5, "low": None, "high": None, "queries": 8, "controls": {}}
    report = {"tasks": {"digits": {"metric": "exact", "shots": {"4": scores}}}, "model": weights_digest(export)}
    (run.path.parent / "report.json").write_text(json.dumps(report))  # beside the run, as the quickstart's
    other = {**report, "model": {"trained": "other", "frozen": "other"}}
    (run.path / "report.json").write_text(json.dumps(other))
    text = card(export, tmp_path / "out", run=run)
    assert "| pairs | image_text | 16 | 0.5 | data/pairs.npz |" in text
    assert "2 steps on 2,000 tokens" in text
    assert "| loss | 1.5 |" in text and "| loss/pairs | 3 |" in text
    assert text.count("| digits |") == 1 and "| digits | exact | 4 | 0.5 |  | 8 |" in text
    assert metadata_load(tmp_path / "out" / "README.md")["pipeline_tag"] == "image-text-to-text"


def test_a_card_says_what_is_not_known(export: Path, tmp_path: Path) -> None:
    text = card(export, tmp_path / "alone")
    assert "Nothing is known about the training" in text
    assert "No evaluation results are known for these weights" in text
    assert "random llama, from a seed" in text and "not stated" in text
    run = write_run(tmp_path / "run", [])
    assert "The run folder has no metrics" in card(export, tmp_path / "out", run=run)


def test_licenses_are_those_of_the_frozen_parts_own_cards(tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A language model\n")
    config = tiny_config(language_model=LanguageModelConfig(name=str(tmp_path / "lm")))
    language_model, tower = frozen_parts(config, are_inside=True)
    assert (language_model.license, language_model.is_inside) == ("apache-2.0", True)
    assert tower.license.startswith("not stated") and tower.is_inside


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load(Path("configs/quickstart/flamingo.yaml").read_text())
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(yaml.safe_dump({**settings, "task": "flamingo", "run_dir": str(run.path)}))
    for extra in ([], ["--include-frozen"]):
        arguments = [str(run.path), "--format", "huggingface", "--output", str(tmp_path / "out"), *extra]
        assert export_command.main(arguments) == 1
        assert f"{run.path} has no complete checkpoint yet" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
