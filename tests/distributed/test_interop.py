"""docs/interop.md is true: a tiny import trains under ZeRO-3 on two processes, and goes back to transformers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.processes import run_distributed
from tests.distributed.small_run import read_metrics
from tests.project.commands import ROOT, shell_commands
from trainer import convert, export, import_model
from trainer.config.loader import load_config
from trainer.config.run_config import FlamingoRunConfig
from trainer.loop import train
from trainer.runtime.distributed import World
from trainer.tasks.flamingo import build_flamingo_task

pytestmark = pytest.mark.distributed

PAGE = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def train_configuration(world: World, folder: Path, configuration: Path) -> None:
    """Train a YAML as the launcher would in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = load_config(configuration, [], FlamingoRunConfig)
        train(build_flamingo_task(config, world), config, world)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the page's first block: two tiny models and images with captions."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(BLOCKS[0], "docs/interop.md", "exec"), {})
    return folder


@pytest.mark.parametrize("family", ["idefics", "mllama"])
def test_the_page(sources: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sources)
    for folder in ("imported", "run", "back", "alone", "data"):
        if (sources / "tiny" / folder).exists():
            (sources / "tiny" / folder).rename(sources / "tiny" / f"{folder}-of-the-other")
    mains: dict[str, Callable[[list[str]], int]] = {
        "trainer.convert": convert.main,
        "trainer.import_model": import_model.main,
        "trainer.export": export.main,
    }
    commands = [command.replace("idefics", family) for command in shell_commands(PAGE)]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command)
        if words[0] == "deepspeed":
            assert words[1:4] == ["--num_gpus", "2", "--module"]
            run_distributed(train_configuration, 2, sources, ROOT / words[-1])
        else:
            assert mains[words[2]](words[3:]) == 0, command
    assert len(read_metrics(sources / "tiny/run")) == 4
    exec(compile(BLOCKS[1], "docs/interop.md", "exec"), {})
    exec(compile(BLOCKS[2], "docs/interop.md", "exec"), {})
    before, after = (load_file(sources / "tiny" / name / "model.safetensors") for name in (family, "back"))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any("cross_attn" in name for name in changed)
    assert max(float((before[name] - after[name]).abs().max()) for name in changed) < 0.01, "4 steps from the import"
    assert not [name for name in changed if "vision_model" in name or "self_attn" in name]
