"""Score a tiny export with lmms_eval, or with stand-ins for its documented classes where it is not installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_tokenizer
from model.pretrained import save_flamingo
from tests.data.helpers import noise
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer, wake

IS_INSTALLED = importlib.util.find_spec("lmms_eval") is not None
TASK = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function functions.visuals
doc_to_text: w1 w2
{rest}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
GENERATED = """
doc_to_target: answer
process_results: !function functions.results
generation_kwargs: {max_new_tokens: 4, until: ["."]}
"""
FUNCTIONS = """
from PIL import Image

def visuals(document):
    return [Image.open(document["image"])]

def results(document, answers):
    return {"same": float(answers[0] == document["answer"])}
"""


@dataclass
class StandInInstance:
    """Request as lmms_eval makes it (``lmms_eval.api.instance``)."""

    args: tuple[Any, ...]


@dataclass
class StandInResult:
    """What a model may return in place of a text."""

    text: Any
    token_counts: Any = None


class StandInHook:
    """Cache of answers that does nothing."""

    def add_partial(self, *_: Any) -> None:
        """Do nothing."""


class StandInModel:
    """Base class of all models (``lmms_eval.api.model``)."""

    def __init__(self) -> None:
        self.cache_hook = StandInHook()
        self.task_dict: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lmms_eval, or stand-ins for the classes that the model needs."""
    if not IS_INSTALLED:
        modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api")}
        instance, base = ModuleType("lmms_eval.api.instance"), ModuleType("lmms_eval.api.model")
        vars(instance).update(Instance=StandInInstance, GenerationResult=StandInResult)
        vars(base).update(lmms=StandInModel)
        modules |= {module.__name__: module for module in (instance, base)}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    yield
    sys.modules.pop("trainer.hub.lmms_eval_model", None)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export of a tiny model."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["llama"], tokenizer=str(folder / "tokenizer"))
    tokenizer = build_tokenizer(tiny_config(language_model=language_model))
    model = build_flamingo(tiny_config(language_model=language_model), tokenizer)
    wake(model, 0.5)
    save_flamingo(folder / "export", model, tokenizer=tokenizer.tokenizer)
    return folder / "export"


def load(export: Path, **arguments: Any) -> Any:
    from trainer.hub.lmms_eval_model import FlamingoForLmmsEval

    return FlamingoForLmmsEval(str(export), device="cpu", **arguments)


def request(*arguments: Any) -> Any:
    """Return a request of the harness with these arguments."""
    if not IS_INSTALLED:
        return StandInInstance(arguments)
    from lmms_eval.api.instance import Instance

    return Instance("generate_until", arguments, 0, {"task": "words", "doc_id": 0, "repeats": 1})


def documents(model: Any, images: list[Image.Image]) -> Any:
    """Give a model the documents of a task, and return the function that finds their images."""
    model.task_dict = {"words": {"test": [{"image": image} for image in images]}}
    return lambda document: [document["image"]]


def test_answers_do_not_depend_on_the_batch_and_end_at_stop_strings(export: Path) -> None:
    settings = {"max_new_tokens": 6, "until": ["\n"], "temperature": 0, "do_sample": False}
    answers = []
    for batch_size in (1, 2):
        model = load(export, batch_size=batch_size)
        visuals = documents(model, [noise(20, 30, seed) for seed in range(3)])
        requests = [
            request(text, settings, visuals, i, "words", "test") for i, text in enumerate(("w1", "w2 w3", "w4"))
        ]
        answers.append(model.generate_until(requests))
    assert answers[0] == answers[1] and all(answers[0])
    first = answers[0][0].split()[1]
    stopped = request("w1", {**settings, "until": [first]}, visuals, 0, "words", "test")
    assert model.generate_until([stopped])[0] == answers[0][0].partition(first)[0].strip()


def test_places_in_a_context_are_kept(export: Path) -> None:
    model = load(export)
    visuals = documents(model, [noise(20, 30)])
    settings = {"max_new_tokens": 4}
    first, same = (
        model.generate_until([request(text, settings, visuals, 0, "words", "test")]) for text in ("w1", "<image>w1")
    )
    assert first == same


def test_the_loss_of_a_choice_is_that_of_its_tokens(export: Path) -> None:
    model = load(export)
    visuals = documents(model, [noise(20, 30)])
    (found,) = model.loglikelihood([request("w1 w2", "w3 w4", visuals, 0, "words", "test")])
    loss, is_greedy = found.text
    inputs = model.processor(text="<image>w1 w2 w3 w4", images=[noise(20, 30)])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with torch.no_grad():
        mean = model.model(**inputs, labels=labels).loss
    assert loss == pytest.approx(2 * float(mean), rel=1e-5)
    assert not is_greedy


def test_unknown_arguments_are_refused(export: Path) -> None:
    with pytest.raises(ValueError, match="--model_args tensor_parallel"):
        load(export, tensor_parallel=2)
    with pytest.raises(ValueError, match="is not an exported Flamingo"):
        load(export.parent / "tokenizer")


def test_pyproject_names_the_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"flamingo": "trainer.hub.lmms_eval_entry:manifest"}


@pytest.mark.slow
@pytest.mark.skipif(not IS_INSTALLED, reason="lmms_eval is not installed")
@pytest.mark.parametrize(
    ("kind", "metric", "rest"),
    [
        ("generate_until", "same", GENERATED),
        ("multiple_choice", "acc", "doc_to_choice: [w3, w4]\ndoc_to_target: 1"),
    ],
)
def test_lmms_eval_scores_a_local_task(export: Path, tmp_path: Path, kind: str, metric: str, rest: str) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    if not [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "flamingo"]:
        from trainer.hub.lmms_eval_entry import manifest  # this project is not installed

        MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    for number in range(2):
        noise(20, 30, number).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": str(tmp_path / f"{number}.png"), "answer": "w1"}) for number in range(2)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "local_words.yaml").write_text(TASK.format(folder=tmp_path, kind=kind, metric=metric, rest=rest))
    report = simple_evaluate(
        model="flamingo",
        model_args=f"pretrained={export}",
        tasks=["local_words"],
        device="cpu",
        batch_size=2,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    assert 0 <= report["results"]["local_words"][f"{metric},none"] <= 1
