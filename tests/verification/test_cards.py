"""The verification cards describe the configurations of the clone."""

from __future__ import annotations

import re

import pytest

from tests.project.commands import ROOT
from tests.verification import renew
from tests.verification.cards import FOLDER, cheap_card, equal, full_card, names, path_of, read


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_configuration_has_a_card_and_every_card_a_configuration() -> None:
    assert {path_of(name) for name in names()} == set(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", names())
def test_a_card_is_current_as_far_as_that_is_cheap(name: str) -> None:
    card, now = read(name), cheap_card(name)
    assert {key: card.get(key) for key in now} == now, renew.__doc__


@pytest.mark.long
@pytest.mark.parametrize("name", names())
def test_all_cards_are_current(name: str) -> None:
    assert equal(read(name), full_card(name)), renew.__doc__


def test_configurations_with_a_cluster_fit_it() -> None:
    plans = {name: read(name)["predicted_not_measured"] for name in names() if "predicted_not_measured" in read(name)}
    assert len(plans) > 10
    assert [name for name, plan in plans.items() if not plan["fits"]] == []


def test_a_prediction_may_move_a_little() -> None:
    card = read("flamingo-3b.yaml")
    plan = card["predicted_not_measured"]
    near, far = (
        card | {"predicted_not_measured": plan | {"seconds_of_a_step": factor * plan["seconds_of_a_step"]}}
        for factor in (1.01, 1.1)
    )
    assert equal(card, near)
    assert not equal(card, far)
    assert not equal(card, card | {"gpu": "yes"})


def test_the_page_explains_every_field() -> None:
    page = (ROOT / "tests" / "verification" / "README.md").read_text()
    explained = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) | {"config"}
    assert set().union(*map(read, names())) == explained


def test_an_unknown_configuration_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert renew.main(["flamingo-4b.yaml"]) == 2
    assert "flamingo-4b.yaml: no such configuration" in capsys.readouterr().err
