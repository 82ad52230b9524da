"""Prompts are those of the paper and of OpenFlamingo; demonstrations and controls depend on seed and id alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.processor import Special
from tests.evaluation import layouts
from trainer.config.evaluation_tasks import PromptTexts
from trainer.evaluation.controls import donors
from trainer.evaluation.demonstrations import orders, random_selector
from trainer.evaluation.prepare import prepare
from trainer.evaluation.prepared_task import Cell, PreparedTask
from trainer.evaluation.prompts import build_prompt, cut_answer, prompt_texts
from trainer.evaluation.query import BlankMedium, FileMedium, Query

IMAGE, EOC = Special.IMAGE, Special.END_OF_CHUNK


def query(name: str, **values: Any) -> Query:
    """Return a query about an image of its own."""
    return Query(name, name, FileMedium(Path(f"{name}.png")), ("dog",), **{"shown_answer": f"answer {name}", **values})


def prepared(folder: Path, *tasks: dict[str, Any], **settings: Any) -> list[PreparedTask]:
    """Return prepared tasks; no model is loaded."""
    (folder / "export").mkdir(exist_ok=True)
    return prepare(layouts.evaluation(folder, folder / "export", tasks, **settings))


@pytest.mark.parametrize(
    ("style", "kind", "fields", "parts"),
    [
        ("paper", "caption", {}, [IMAGE, "Output:", " answer a", EOC, IMAGE, "Output:"]),
        ("openflamingo", "caption", {}, [IMAGE, "Output:", "answer a", EOC, "\n", IMAGE, "Output:"]),
        ("plain", "caption", {}, [IMAGE, "answer a", EOC, IMAGE]),
        (
            "paper",
            "question",
            {"question": "What?"},
            [IMAGE, "Question: What? Answer:", " answer a", EOC, IMAGE, "Question: What? Answer:"],
        ),
        (
            "openflamingo",
            "question",
            {"question": "What?"},
            [IMAGE, "Question:What? Short answer:", "answer a", EOC, "\n", IMAGE, "Question:What? Short answer:"],
        ),
        (
            "openflamingo",
            "meme",
            {"text": "T"},
            [
                *(IMAGE, "is an image with: 'T' written on it. Is it hateful? Answer:", "answer a", EOC),
                *(IMAGE, "is an image with: 'T' written on it. Is it hateful? Answer:"),
            ],
        ),
    ],
)
def test_texts_of_the_prompts(style: str, kind: Any, fields: dict[str, str], parts: list[object]) -> None:
    texts = prompt_texts(kind, style, None)
    prompt = build_prompt(texts, kind, query("b", fields=fields), [query("a", fields=fields)])
    assert prompt.parts == parts
    assert [medium.name for medium in prompt.media] == ["a.png", "b.png"]
    assert prompt.demonstrations == ["a"]


def test_zero_shot_examples_have_text_alone() -> None:
    prompt = build_prompt(prompt_texts("caption", "paper", None), "caption", query("c"), [], [query("a"), query("b")])
    assert prompt.parts == ["Output:", " answer a", EOC, "Output:", " answer b", EOC, IMAGE, "Output:"]
    assert len(prompt.media) == 1


def test_own_texts_replace_those_of_the_style() -> None:
    texts = prompt_texts("question", "paper", PromptTexts("Q {question}", "[{answer}]", " ", ("Q",)))
    one = query("a", fields={"question": "why"})
    assert build_prompt(texts, "question", one, [one]).parts == [IMAGE, "Q why", "[answer a]", EOC, " ", IMAGE, "Q why"]


def test_texts_of_an_episode_are_joined() -> None:
    shown = Query("d", "e", None, (), "dako\n", before="35")
    asked = Query("e", "e", None, ("mifu",), before="22", demonstrations=(shown, shown))
    prompt = build_prompt(prompt_texts("episode", "paper", None), "episode", asked, [shown, shown])
    assert prompt.parts == ["35dako\n35dako\n22"]


def test_an_answer_is_cut_where_the_prompt_returns() -> None:
    cuts = prompt_texts("question", "openflamingo", None).cut
    assert cut_answer(" a dog Question: what", cuts) == "a dog"
    assert cut_answer("no Short answer: yes Question:", cuts) == "no"
    assert (
        cut_answer("the Output of a printer", prompt_texts("caption", "paper", None).cut) == "the Output of a printer"
    )


def test_demonstrations_depend_on_seed_and_id_alone_and_nest() -> None:
    support = [query(f"s{number}") for number in range(40)]
    select = random_selector(support, 3, balanced=False)
    chosen = [one.id for one in select(query("q"), 8)]
    assert len(set(chosen)) == 8
    assert [one.id for one in select(query("q"), 4)] == chosen[4:]
    assert [one.id for one in random_selector(support, 4, balanced=False)(query("q"), 8)] != chosen
    assert [one.id for one in select(query("p"), 8)] != chosen
    assert chosen == ["s0", "s21", "s10", "s15", "s2", "s13", "s1", "s8"], "the same in every version"


def test_no_query_is_shown_its_own_image() -> None:
    support = [replace(query(f"s{number}"), cluster=f"c{number % 2}") for number in range(10)]
    shown = random_selector(support, 0, balanced=False)(replace(query("q"), cluster="c0"), 5)
    assert {one.cluster for one in shown} == {"c1"}


def test_balanced_demonstrations_take_turns() -> None:
    support = [query(f"s{number}", shown_answer="yes" if number < 30 else "no") for number in range(34)]
    for count in (2, 4, 8):
        shown = [one.shown_answer for one in random_selector(support, 0, balanced=True)(query("q"), count)]
        assert shown.count("yes") == count / 2
    shown = [one.shown_answer for one in random_selector(support, 0, balanced=True)(query("q"), 12)]
    assert shown.count("no") == 4, "all there are"


def test_orders_are_different_and_begin_with_the_given_one() -> None:
    shown = [query(f"s{number}") for number in range(8)]
    for size, count in ((0, 1), (1, 1), (2, 2), (3, 6), (8, 6)):
        found = [[one.id for one in order] for order in orders(shown[:size], 6, 0, "q")]
        assert found[0] == [one.id for one in shown[:size]]
        assert len({tuple(order) for order in found}) == len(found) == count


def test_each_query_takes_the_image_of_another_one() -> None:
    queries = [replace(query(f"q{number}"), cluster=f"c{number % 3}") for number in range(9)]
    found = donors(queries, 0)
    assert all(found[one.id].cluster != one.cluster for one in queries)
    assert found == donors(queries[::-1], 0)
    with pytest.raises(ValueError, match="about one image"):
        donors(queries[::3], 0)


def test_controls_change_images_only(tmp_path: Path) -> None:
    controls = ["shuffled_demonstrations", "exchanged_demonstrations", "replaced_demonstrations", "shuffled_query"]
    values = layouts.write_episodes(tmp_path)
    task = {"name": "e", "type": "episodes", **values, "controls": [*controls, "blank", "no_images"]}
    (episodes,) = prepared(tmp_path, task, shots=[0, 1, 2])
    assert Cell("e", 0, "exchanged_demonstrations") not in episodes.cells
    assert len(episodes.cells) == 4 + 7 + 7
    asked = episodes.queries[0]
    images = {
        cell.control: [Path(medium.name).name for medium in episodes.prompts(cell, asked)[0].media]
        for cell in episodes.cells
        if cell.shots == 2
    }
    assert images["none"] == images["no_images"] == ["0_0.png", "0_1.png", "0_2.png"]
    assert images["exchanged_demonstrations"] == ["0_1.png", "0_0.png", "0_2.png"]
    assert sorted(images["shuffled_demonstrations"]) == images["none"]
    replaced, shuffled = images["replaced_demonstrations"], images["shuffled_query"]
    assert [name[1:] for name in replaced] == ["_0.png", "_1.png", "_2.png"]
    assert replaced[0][0] == replaced[1][0] != "0"
    assert replaced[2] == "0_2.png"
    assert shuffled[:2] == images["none"][:2]
    assert shuffled[2] != "0_2.png"
    blank = episodes.prompts(Cell("e", 2, "blank"), asked)[0].media
    assert blank[2] == BlankMedium()
    parts = {tuple(map(str, episodes.prompts(cell, asked)[0].parts)) for cell in episodes.cells if cell.shots == 2}
    assert len(parts) == 1
    one = episodes.prompts(Cell("e", 1, "exchanged_demonstrations"), asked)[0]
    assert [Path(medium.name).name for medium in one.media] == ["0_0.png", "0_2.png"]


def test_a_subset_depends_on_seed_and_ids(tmp_path: Path) -> None:
    task = {"name": "a", "type": "coco", **layouts.write_coco(tmp_path), "num_queries": 3}
    (first,) = prepared(tmp_path, task, zero_shot_examples=0)
    (again,) = prepared(tmp_path, task, zero_shot_examples=0)
    (other,) = prepared(tmp_path, task, zero_shot_examples=0, seed=1)
    assert [one.id for one in first.queries] == [one.id for one in again.queries]
    assert len(first.queries) == 3
    assert len(first.data.all_ids) == 6
    assert {one.id for one in first.queries} != {one.id for one in other.queries}


def test_ranked_answers_need_no_zero_shot_examples(tmp_path: Path) -> None:
    memes = layouts.write_memes(tmp_path)
    (task,) = prepared(tmp_path, {"name": "m", "type": "hateful_memes", **memes})
    assert task.num_examples == 0
