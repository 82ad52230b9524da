"""Compare the first steps of the recipes with the recorded ones, bit for bit on the machine that recorded them."""

from __future__ import annotations

import math
from itertools import groupby

import pytest

from tests.golden import renew
from tests.golden.recipes import RECIPES, STEPS, WORLD_SIZES, train_recipes
from tests.golden.records import FOLDER, differences, path_of, read, this_machine
from tests.project.commands import ROOT
from trainer.config.loader import schema_of
from trainer.config.run_config import RunConfig
from trainer.config.yaml_file import read_yaml


def check(names: list[str], world_size: int) -> None:
    """Train these recipes and those that they need; compare all with their files."""
    for name, found in train_recipes(names, world_size).items():
        header, recorded = read(name)
        exact = header["machine"] == this_machine()
        recorded = [line for line in recorded if line["processes"] == world_size]
        assert found.parameters == header["parameters"]
        assert differences(recorded, found.lines, exact=exact) == [], (
            f"{name}; renew it if that is intended: {renew.__doc__}"
        )


def test_every_recipe_that_a_cpu_trains_has_a_file() -> None:
    """The others name their cluster, or measure synthetic batches."""
    on_cpu = set()
    for path in (ROOT / "configs").rglob("*.yaml"):
        name = path.relative_to(ROOT / "configs")
        trains = issubclass(schema_of(read_yaml(path).values), RunConfig)
        if trains and "# Cluster:" not in path.read_text() and name.parts[0] != "benchmark":
            on_cpu.add(str(name))
    assert on_cpu == set(RECIPES)
    assert {path_of(name) for name in RECIPES} == set(FOLDER.glob("*.jsonl"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_has_all_steps_and_one_and_two_processes_agree(name: str) -> None:
    header, lines = read(name)
    assert header["config"] == f"configs/{name}"
    one, two = (list(group) for _, group in groupby(lines, key=lambda line: line["processes"]))
    for size, group in zip(WORLD_SIZES, (one, two), strict=True):
        assert [(line["processes"], line["step"]) for line in group] == [(size, step + 1) for step in range(STEPS)]
        assert all(math.isfinite(line[key]) for line in group for key in ("loss", "grad_norm"))
    assert differences(one, [{**line, "processes": 1} for line in two], exact=False) == []


def test_a_difference_is_named() -> None:
    line = {"processes": 2, "step": 3, "loss": 1.0, "grad_norm": 2.0, "samples": 8, "samples_sha256": "ab"}
    near, far = line | {"loss": 1.000001}, line | {"samples_sha256": "cd"}
    assert differences([line], [near], exact=False) == []
    (rounded,), (moved,) = differences([line], [near], exact=True), differences([line], [far], exact=False)
    assert "2 processes, step 3: loss is 1.000001" in rounded
    assert "samples_sha256 is 'cd'" in moved
    assert differences([line], [], exact=True) == ["1 steps are recorded, 0 were found"]


def test_an_unknown_recipe_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert renew.main(["quickstart/falmingo.yaml"]) == 2
    assert "quickstart/falmingo.yaml: no such recipe" in capsys.readouterr().err


@pytest.mark.distributed
def test_a_language_model_and_a_flamingo_take_the_recorded_steps() -> None:
    check(["debug.yaml"], 2)


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_recipes_take_the_recorded_steps(world_size: int) -> None:
    check(list(RECIPES), world_size)
