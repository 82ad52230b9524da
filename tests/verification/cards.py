"""Build the verification card of a configuration, and read and write the cards of docs/verification/.

A card says only what a command of the project has printed: the configuration loads, its model builds on the meta
device, how many parameters it has, what the planner predicts, and the losses of its golden run. Predictions are never
measurements, and the card says so.
"""

from __future__ import annotations

import math
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from tests.golden import records
from tests.golden.recipes import RECIPES, STEPS
from trainer.config.loader import load_config, schema_of
from trainer.config.run_config import ContrastiveRunConfig, FlamingoRunConfig, RunConfig
from trainer.config.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FOLDER = ROOT / "docs" / "verification"
Card = dict[str, Any]

_HEAD = "# Written by `python -m tests.verification.renew`. tests/verification/README.md explains the fields.\n"
_CLUSTER = re.compile(r"# Cluster: (\d+) x (\d+) H100 \((\d+) processes\)")


def names() -> list[str]:
    """Return the paths of all shipped configurations, below configs/."""
    return sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


def path_of(name: str) -> Path:
    """Return the file of a configuration's card."""
    return FOLDER / name.replace("/", "-")


def cheap_card(name: str) -> Card:
    """Return the part of a card that takes no model: it loads the configuration and reads the golden file."""
    path = CONFIGS / name
    schema: type[Any] = schema_of(read_yaml(path).values)
    load_config(path, [], schema, check_files=False)
    card: Card = {
        "config": f"configs/{name}",
        "config_sha256": sha256(path.read_bytes()).hexdigest(),
        "kind": schema.__name__,
        "loads": True,
    }
    if name in RECIPES:
        header, lines = records.read(name)
        card |= {"parameters": header["parameters"], "parameters_counted_in": "the golden run"}
        losses = {size: [line["loss"] for line in lines if line["processes"] == size] for size in (1, 2)}
        card["golden_run"] = {
            "file": str(records.path_of(name).relative_to(ROOT)),
            "steps": STEPS,
            "machine": header["machine"]["processor"],
            "first_and_last_loss": {f"{size} processes": [row[0], row[-1]] for size, row in losses.items()},
        }
    if issubclass(schema, RunConfig):
        card["gpu"] = "not yet"
    return card


def full_card(name: str) -> Card:
    """Return the whole card; a model of a configuration with a cluster is built and planned, which takes seconds."""
    card = cheap_card(name)
    path = CONFIGS / name
    cluster = _CLUSTER.search(path.read_text(encoding="utf-8"))
    if cluster is not None:
        schema: type[Any] = schema_of(read_yaml(path).values)
        config = load_config(path, [], schema, check_files=False)
        try:
            card |= _planned(config, nodes=int(cluster[1]), devices_per_node=int(cluster[2]))
        except ValueError as error:
            card["not_planned"] = str(error)
    return card


def _planned(config: Any, nodes: int, devices_per_node: int) -> Card:
    """Build the model on the meta device; return its parameters and the planner's prediction."""
    from trainer.planning.devices import DEVICES
    from trainer.planning.prediction import Cluster

    found = _predictor(config)(config, Cluster(DEVICES["h100"], nodes, devices_per_node))
    return {
        "parameters": {"all": found.parameters, "trained": found.trainable},
        "parameters_counted_in": "the model on the meta device",
        "predicted_not_measured": {
            "cluster": f"{nodes} x {devices_per_node} h100",
            "fits": found.fits,
            "gib_of_a_device": _rounded(found.device_memory / 2**30),
            "seconds_of_a_step": _rounded(found.step_seconds),
        },
    }


def _predictor(config: Any) -> Any:
    from trainer.planning.predictor import Predictor
    from trainer.planning.random_weights import build_on_meta_device
    from trainer.tasks.contrastive.prediction import ContrastivePredictor, random_towers

    if isinstance(config, ContrastiveRunConfig):
        return ContrastivePredictor(config, random_towers(config, "meta"))
    assert isinstance(config, FlamingoRunConfig)
    return Predictor(build_on_meta_device(config.model, config.training.dtype))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def equal(card: Card, other: Card) -> bool:
    """Return whether two cards say the same; a prediction may move by 3 % before its card has to be written again."""

    def plain(one: Card) -> Card:
        return {key: value for key, value in one.items() if key != "predicted_not_measured"}

    first, second = (one.get("predicted_not_measured", {}) for one in (card, other))
    return (
        plain(card) == plain(other)
        and first.keys() == second.keys()
        and all(map(_near, first.values(), second.values()))
    )


def _near(value: Any, other: Any) -> bool:
    if isinstance(value, float):
        return math.isclose(value, other, rel_tol=0.03)
    return bool(value == other)


def read(name: str) -> Card:
    """Return a card as it is in the clone."""
    return dict(yaml.safe_load(path_of(name).read_text(encoding="utf-8")))


def write(name: str, card: Card) -> None:
    """Write a card."""
    text = yaml.safe_dump(card, sort_keys=False, width=120)
    path_of(name).write_text(_HEAD + text, encoding="utf-8")
