"""Turn predictions into scores with intervals, in total, by group and beside each control."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.metrics import cider, exact, top_k, vqa_accuracy
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.prepared_task import PreparedTask
from trainer.evaluation.query import Query
from trainer.evaluation.statistics import (
    Interval,
    auc_interval,
    interval,
    paired_auc_difference,
    paired_difference,
)

_TOP = 5

Values = dict[str, float]


@dataclass(frozen=True)
class CellScores:
    """Hold the scores of each query of a cell.

    Attributes:
        main: Name of the main score.
        values: Value of each query by its id, by the name of the score; {} for the ROC-AUC, which no query has.
        margins: For the ROC-AUC, how much more likely "yes" is than "no".
    """

    main: str
    values: Mapping[str, Values]
    margins: Values


def score_cell(task: PreparedTask, predictions: Mapping[str, Prediction]) -> CellScores | None:
    """Score the predictions of a cell; None where the right answers are not known.

    Args:
        task: Task with the queries.
        predictions: Prediction of each query by its id.
    """
    queries = task.queries
    if not all(query.answers for query in queries):
        return None
    metric = task.data.metric
    if metric == "roc_auc":
        return CellScores(metric, {}, {query.id: _margin(task, predictions[query.id]) for query in queries})
    values: dict[str, Values] = {}
    if metric == "cider":
        references = {query.id: query.answers for query in queries}
        values[metric] = cider(references, {query.id: predictions[query.id].answer for query in queries})
    else:
        judge = vqa_accuracy if metric == "vqa_accuracy" else exact
        values[metric] = _by_query(queries, lambda query: judge(predictions[query.id].answer, query.answers))
    if metric == "top1" and len(queries[0].candidates or ()) > _TOP:
        values["top5"] = _by_query(
            queries, lambda query: top_k(_likelihoods(task, predictions[query.id]), query.answers, _TOP)
        )
    if task.is_ranked:
        values["total"] = _by_query(queries, lambda query: top_k(predictions[query.id].totals, query.answers, 1))
        values["per_token"] = _by_query(queries, lambda query: top_k(predictions[query.id].per_token, query.answers, 1))
    if all(query.other is not None for query in queries):
        values["other"] = _by_query(queries, lambda query: exact(predictions[query.id].answer, (str(query.other),)))
    return CellScores(metric, values, {})


def _by_query(queries: Sequence[Query], judge: Callable[[Query], float]) -> Values:
    return {query.id: float(judge(query)) for query in queries}


def _likelihoods(task: PreparedTask, prediction: Prediction) -> dict[str, float]:
    return prediction.totals if task.config.ranking == "total" else prediction.per_token


def _margin(task: PreparedTask, prediction: Prediction) -> float:
    likelihoods = _likelihoods(task, prediction)
    return round(likelihoods["yes"] - likelihoods["no"], 5)


def summarize(task: PreparedTask, scores: CellScores, real: CellScores | None = None) -> dict[str, Any]:
    """Return the fields of a cell in the report.

    Args:
        task: Task with the queries.
        scores: Scores of the cell.
        real: Scores of the real prompts, beside which a control is set.
    """
    queries = list(task.queries)
    cell: dict[str, Any] = {**_rounded(_main(task, scores, queries)), "queries": len(queries)}
    further = {name: _interval(task, values, queries) for name, values in scores.values.items() if name != scores.main}
    if further:
        cell["scores"] = {name: _rounded(found) for name, found in further.items()}
    groups = sorted({group for query in queries for group in query.groups})
    members = {group: [query for query in queries if group in query.groups] for group in groups}
    if groups:
        cell["groups"] = {
            group: {**_rounded(_main(task, scores, own)), "queries": len(own)}
            for group, own in members.items()
            if scores.values or len({query.answers for query in own}) > 1
        }
    if real is not None:
        cell["difference"] = _rounded(_difference(task, scores, real, queries))
    return cell


def _main(task: PreparedTask, scores: CellScores, queries: Sequence[Query]) -> Interval:
    if scores.values:
        return _interval(task, scores.values[scores.main], queries)
    labels = [query.shown_answer == "yes" for query in queries]
    margins = [scores.margins[query.id] for query in queries]
    return auc_interval(margins, labels, [query.cluster for query in queries], task.config.confidence)


def _difference(task: PreparedTask, scores: CellScores, real: CellScores, queries: Sequence[Query]) -> Interval:
    clusters = {query.id: query.cluster for query in queries}
    level = task.config.confidence
    if scores.values:
        return paired_difference(scores.values[scores.main], real.values[scores.main], clusters, level)
    labels = {query.id: query.shown_answer == "yes" for query in queries}
    return paired_auc_difference(scores.margins, real.margins, labels, clusters, level)


def _interval(task: PreparedTask, values: Values, queries: Sequence[Query]) -> Interval:
    clusters = [query.cluster for query in queries]
    return interval([values[query.id] for query in queries], clusters, task.config.confidence)


def _rounded(found: Interval) -> dict[str, float | None]:
    """Return an interval as JSON, which has no nan; 12 digits hide the rounding of sums."""
    named = {"score": found.mean, "low": found.low, "high": found.high}
    return {name: None if math.isnan(value) else round(value, 12) for name, value in named.items()}
