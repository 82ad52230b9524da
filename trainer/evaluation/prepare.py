"""Read all tasks of an evaluation and check that their prompts can be made, before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from model.processor import TextError, TextLayout
from trainer.config.evaluation_tasks import Bound, Control
from trainer.config.scoring_config import ScoringConfig
from trainer.data.randomness import stable_key
from trainer.errors import ConfigError, Problem
from trainer.evaluation.controls import OF_DEMONSTRATIONS
from trainer.evaluation.demonstrations import most_available, random_selector
from trainer.evaluation.prepared_task import Cell, PreparedTask, answer_ids
from trainer.evaluation.prompts import prompt_texts
from trainer.evaluation.query import Query
from trainer.evaluation.readers import read_task
from trainer.evaluation.tasks.findings import Findings


def prepare(config: ScoringConfig, *, prefix: str = "") -> list[PreparedTask]:
    """Read all tasks and check them against the settings.

    Args:
        config: Settings of the evaluation.
        prefix: Section of the settings, with a dot ("evaluation.").

    Raises:
        ConfigError: Files or settings are wrong; the error names every problem, with files and ids.
    """
    problems: list[Problem] = []
    tasks = []
    for number, settings in enumerate(config.tasks):
        path = f"{prefix}tasks.{number}"
        findings = Findings(path)
        data = read_task(settings, findings)
        problems += findings.problems
        if not data.queries:
            if not findings:
                problems.append(Problem(path, f"task {settings.name!r} has no queries"))
            continue
        try:
            texts = prompt_texts(data.kind, config.prompt_style, settings.prompt)
        except ValueError as error:
            problems.append(Problem(f"{path}.prompt", str(error)))
            continue
        all_ids = tuple(query.id for query in data.queries)
        data = replace(data, queries=_subset(data.queries, settings.num_queries, config.seed), all_ids=all_ids)
        task = PreparedTask(settings, data, texts, config)
        task.select = random_selector(data.support, config.seed, balanced=data.balanced) if data.support else None
        # A file with faults would have consequences that hide them.
        found = [] if findings else list(_task_problems(task, path))
        problems += found
        tasks.append(task)
    if problems:
        raise ConfigError(problems, title="the evaluation")
    return tasks


def _subset(queries: Sequence[Query], count: int | None, seed: int) -> tuple[Query, ...]:
    """Return ``count`` queries that a hash of their ids chooses, in the order of the files."""
    if count is None or count >= len(queries):
        return tuple(queries)
    chosen = sorted(queries, key=lambda query: stable_key(seed, "subset", query.id))[:count]
    kept = {query.id for query in chosen}
    return tuple(query for query in queries if query.id in kept)


def _task_problems(task: PreparedTask, path: str) -> Iterator[Problem]:
    data, settings = task.data, task.settings
    if task.brings_demonstrations:
        fewest = min(len(query.demonstrations or ()) for query in task.queries)
        if max(task.shots) > fewest:
            query = min(task.queries, key=lambda one: len(one.demonstrations or ()))
            message = f"{max(task.shots)} is more than the {fewest} demonstrations of {query.id!r}"
            yield Problem(f"{path}.shots", message)
    elif task.most_drawn and not data.support:
        what = f"shots {max(task.shots)}" if max(task.shots) else f"zero_shot_examples {task.num_examples}"
        message = (
            f"{what} of task {task.name!r} needs a training set: name its support files, or set zero_shot_examples"
        )
        yield Problem(f"{path}.shots", f"{message} and shots to 0")
    elif task.most_drawn > most_available(data.support, task.queries):
        available = most_available(data.support, task.queries)
        message = (
            f"{task.most_drawn} is more than the {available} demonstrations that the training set of {task.name!r}"
        )
        yield Problem(f"{path}.shots", f"{message} has for every query (those of the query's own image do not count)")
    for control in task.controls:
        reason = _unsuitable(task, control)
        if reason:
            yield Problem(f"{path}.controls", f"{control!r} does not suit task {task.name!r}: {reason}")
    if not any(query.answers for query in task.queries) and settings.bounds:
        yield Problem(f"{path}.bounds", f"task {task.name!r} has no right answers, so it has no score")
    elif any(query.answers for query in task.queries) and not all(query.answers for query in task.queries):
        lacking = [query.id for query in task.queries if not query.answers]
        yield Problem(path, f"task {task.name!r}: {len(lacking)} queries have no answers, such as {lacking[0]}")
    for number, bound in enumerate(settings.bounds):
        yield from _bound_problems(task, bound, f"{path}.bounds.{number}")


def _unsuitable(task: PreparedTask, control: Control) -> str:
    """Return why a control cannot be applied to a task; "" if it can."""
    if control in ("none", "language_model_alone"):
        return ""
    if all(query.medium is None for query in task.queries) and control not in OF_DEMONSTRATIONS:
        return "its queries have no images"
    if control == "exchanged_demonstrations" and any(query.exchange is None for query in task.queries):
        return "it takes episodes, each with an exchange"
    if control in OF_DEMONSTRATIONS and not any(task.shots):
        return "it has no demonstrations"
    if control in ("shuffled_query", "replaced_demonstrations"):
        try:
            task.donors  # noqa: B018  a cached property that checks the queries
        except ValueError as error:
            return str(error)
    return ""


def _bound_problems(task: PreparedTask, bound: Bound, path: str) -> Iterator[Problem]:
    if bound.minimum is None and bound.maximum is None:
        yield Problem(path, "sets neither minimum nor maximum")
    elif bound.minimum is not None and bound.maximum is not None and bound.minimum > bound.maximum:
        yield Problem(f"{path}.minimum", f"{bound.minimum} is more than maximum {bound.maximum}")
    if bound.shots is not None and bound.shots not in task.shots:
        yield Problem(f"{path}.shots", f"{bound.shots} is not among the shots {list(task.shots)} of {task.name!r}")
    if bound.control not in task.controls:
        message = f"{bound.control!r} is not among the controls of {task.name!r}; add it there"
        yield Problem(f"{path}.control", message)
    groups = sorted({group for query in task.queries for group in query.groups})
    if bound.group is not None and bound.group not in groups:
        known = ", ".join(groups) or "no groups"
        yield Problem(f"{path}.group", f"{bound.group!r} is no group of {task.name!r}; it has {known}")


def check_lengths(
    tasks: Sequence[PreparedTask], layout: TextLayout, positions: int | None, *, prefix: str = ""
) -> None:
    """Check that every prompt of the most shots can be encoded and has room in the language model.

    Args:
        tasks: Prepared tasks.
        layout: Encodes prompts.
        positions: Positions of the language model; None where it says none.
        prefix: Section of the settings, with a dot.

    Raises:
        ConfigError: A text cannot be encoded, or prompts are too long; the error names every task.
    """
    problems = []
    for number, task in enumerate(tasks):
        longest, worst = 0, ""
        lengths: dict[str, int] = {}
        cell = Cell(task.name, max(task.shots))
        for query in task.queries:
            try:
                length = len(layout.encode_parts(task.prompts(cell, query)[0].parts))
                for text in query.candidates or ():
                    if text not in lengths:
                        lengths[text] = len(answer_ids(layout, task.texts, text))
            except TextError as error:
                message = f"query {query.id!r} of {task.name!r} cannot be encoded: {error}"
                problems.append(Problem(f"{prefix}tasks.{number}", message))
                continue
            if length > longest:
                longest, worst = length, query.id
        longest += max(lengths.values()) if lengths else task.max_new_tokens
        if positions is not None and longest > positions:
            message = (
                f"{max(task.shots)} shots of {task.name!r} need {longest} tokens with the answer (query {worst!r}), "
                f"but the language model has {positions} positions; set fewer shots or max_new_tokens"
            )
            problems.append(Problem(f"{prefix}tasks.{number}.shots", message))
    if problems:
        raise ConfigError(problems, title="the evaluation")
