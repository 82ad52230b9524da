"""Score exact answers and ranked candidates."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence


def exact(answer: str, answers: Collection[str]) -> float:
    """Return 1.0 where an answer equals one of the right ones, apart from white space around it."""
    return float(answer.strip() in {one.strip() for one in answers})


def top_k(likelihoods: Mapping[str, float], answers: Collection[str], k: int) -> float:
    """Return 1.0 where a right answer is among the ``k`` most likely candidates.

    Candidates of one likelihood keep their order, so that a tie is decided by the data set and not by chance.

    Args:
        likelihoods: Log-likelihood of each candidate.
        answers: Right answers.
        k: Number of candidates that count.

    Raises:
        ValueError: A log-likelihood is not a number.
    """
    _refuse_nan(likelihoods.values(), "log-likelihood")
    best = sorted(likelihoods, key=likelihoods.__getitem__, reverse=True)[:k]
    return float(any(answer in best for answer in answers))


def roc_auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the area under the ROC curve; equal scores count half.

    Args:
        scores: Score of each example, higher for True.
        labels: Label of each example.

    Raises:
        ValueError: All labels are equal, or a score is not a number.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    _refuse_nan(scores, "score")
    if len(set(map(bool, labels))) < 2:
        raise ValueError(
            f"ROC-AUC of {len(labels)} labels: it needs examples of both labels; raise num_queries, or set balanced"
        )
    try:
        from sklearn.metrics import roc_auc_score
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'ROC-AUC needs scikit-learn, which is not installed: pip install "flamingo-trainer[evaluation]"'
        ) from error
    return float(roc_auc_score(labels, scores))


def _refuse_nan(values: Collection[float], name: str) -> None:
    found = sum(math.isnan(value) for value in values)
    if found:
        raise ValueError(
            f"{found} of {len(values)} values are nan ({name}): the model's logits overflow; set dtype float32"
        )
