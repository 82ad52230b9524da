"""Write the page of an evaluation: one HTML file with table, plots and example prompts, which needs no network.

The page has no script, and its content security policy forbids every request. All texts are escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.evaluation.page_plot import score_plot
from trainer.runtime.files import write_atomically

_MOST_EXAMPLES = 50
_SIDE = 128  # pixels of the longer side of an image
_SHORT_SIDE = 48  # least pixels of the shorter side as it is shown
_QUALITY = 70
_MOST_TOKENS = 24  # of an answer whose attention is shown
_LEAST_SHARE = 0.02  # of a medium whose map is shown
_UNITS = {"vqa_accuracy": 100.0, "cider": 100.0}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#1b1b1b;background:#fff}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}small,.dim{color:#666}
.plots{display:flex;flex-wrap:wrap;gap:1.5em}.example{border:1px solid #ddd;border-left:6px solid #999;
border-radius:6px;padding:.6em 1em;margin:1em 0}.right{border-left-color:#3ca951}.wrong{border-left-color:#d6453d}
.prompt{display:flex;flex-wrap:wrap;align-items:flex-end;gap:.3em;white-space:pre-wrap}
.medium{display:inline-block;background-size:100% 100%;border-radius:3px;position:relative}
.none{border:1px dashed #999;padding:.6em;color:#666;font-size:12px}
.token{display:inline-block;vertical-align:top;margin:.3em;text-align:center;font-size:12px}
.medium svg{position:absolute;left:0;top:0;width:100%;height:100%}
"""


def write_page(path: Path, report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> None:
    """Write the page.

    Args:
        path: File to write.
        report: Content of ``report.json``.
        examples: Lines of ``predictions.jsonl`` with two or three more keys; the first 50 are shown. ``images`` are
            encoded files, ``prompt`` is a list of texts and of ``{"image": PLACE}`` for an entry of ``images``.
            ``attention`` (optional) has ``tokens``, the texts of the generated tokens, and ``patches``, for each image
            a map [tokens][rows][columns] (``model.attention_maps``).
    """
    write_atomically(path, page(report, examples))


def page(report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML; ``write_page`` explains the arguments."""
    shown = list(examples[:_MOST_EXAMPLES])
    styles: list[str] = []
    cards = "".join(_card(number, example, styles) for number, example in enumerate(shown))
    plots = "".join(_plot(name, task) for name, task in report["tasks"].items())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<style>{_STYLE}{''.join(styles)}</style><h1>Evaluation</h1>",
        _facts("Model", report["model"]),
        f"<h2>Scores</h2>{_table(report)}<div class=plots>{plots}</div>",
        _bounds(report.get("bounds", ())),
        f"<h2>Examples</h2><p class=dim>{len(shown)} of {len(examples)} prompts with their answers.</p>"
        if shown
        else "",
        cards,
        _facts("Settings", report["settings"]),
        "</html>\n",
    ]
    return "".join(parts)


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(str(name))}<td>{escape(str(value))}" for name, value in facts.items())
    return f"<details><summary>{escape(title)}</summary><table>{rows}</table></details>"


def _scaled(metric: str, value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    unit = _UNITS.get(metric, 1.0)
    digits = 1 if unit > 1 else 3
    return f"{unit * value:{'+' if signed else ''}.{digits}f}"


def _range(metric: str, cell: Mapping[str, Any], *, signed: bool = False) -> str:
    low, high = (_scaled(metric, cell.get(name), signed=signed) for name in ("low", "high"))
    return f"{low} to {high}" if low and high else ""


def _table(report: Mapping[str, Any]) -> str:
    level = report["settings"].get("confidence")
    interval = "interval" if level is None else f"{100 * level:g} % interval"
    head = ("task", "metric", "shots", "images", "score", interval, "difference", "queries")
    rows = "".join(_rows(name, task) for name, task in report["tasks"].items())
    return f"<table><tr>{''.join(f'<th>{escape(title)}' for title in head)}{rows}</table>"


def _rows(name: str, task: Mapping[str, Any]) -> str:
    metric = task["metric"]
    return "".join(
        "<tr>"
        + "".join(f"<td>{escape(text)}" for text in (name, metric, shots, _control(control)))
        + "".join(f"<td class=n>{escape(text)}" for text in _numbers(metric, cell))
        for shots, real in task["shots"].items()
        for control, cell in (("none", real), *real["controls"].items())
    )


def _control(name: str) -> str:
    return "as they are" if name == "none" else name.replace("_", " ")


def _numbers(metric: str, cell: Mapping[str, Any]) -> tuple[str, ...]:
    difference = cell.get("difference")
    to_real = ""
    if difference is not None:
        to_real = f"{_scaled(metric, difference['score'], signed=True)} ({_range(metric, difference, signed=True)})"
    return _scaled(metric, cell["score"]), _range(metric, cell), to_real, str(cell.get("queries", ""))


def _plot(name: str, task: Mapping[str, Any]) -> str:
    unit = _UNITS.get(task["metric"], 1.0)
    series: dict[str, list[tuple[int, float, float | None, float | None]]] = {}
    for shots, real in task["shots"].items():
        for control, cell in (("none", real), *real["controls"].items()):
            if cell["score"] is not None:
                low, high = (None if cell[key] is None else unit * cell[key] for key in ("low", "high"))
                series.setdefault(_control(control), []).append((int(shots), unit * cell["score"], low, high))
    if not series:
        return ""
    return f"<figure><figcaption>{escape(name)}</figcaption>{score_plot(series, task['metric'])}</figure>"


def _bounds(bounds: Sequence[Mapping[str, Any]]) -> str:
    if not bounds:
        return ""
    names = ("task", "shots", "control", "score", "group", "value", "minimum", "maximum", "met")
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape('' if row.get(name) is None else str(row.get(name)))}" for name in names)
        for row in bounds
    )
    return f"<h2>Bounds</h2><table><tr>{''.join(f'<th>{name}' for name in names)}{rows}</table>"


def _card(number: int, example: Mapping[str, Any], styles: list[str]) -> str:
    sizes = [_thumbnail(f"e{number}i{place}", data, styles) for place, data in enumerate(example["images"])]
    prompt = "".join(
        f"<span>{escape(part)}</span>" if isinstance(part, str) else _medium(number, part["image"], sizes)
        for part in example["prompt"]
    )
    score = example.get("score")
    verdict = "" if score is None else " right" if score > 0 else " wrong"
    place = f"{example['task']}, {example['shots']} shots, {_control(example['control'])}, {example['id']}"
    truth = ", ".join(dict.fromkeys(map(str, example["answers"]))) or "not known"
    candidates = example.get("candidates") or {}
    ranked = "".join(
        f"<tr><td>{escape(str(text))}<td class=n>{value:.3f}"
        for text, value in sorted(candidates.items(), key=lambda item: -item[1])[:5]
    )
    return (
        f'<div class="example{verdict}"><small>{escape(place)}</small><div class=prompt>{prompt}</div>'
        f"<p><b>{escape(str(example['answer']))}</b> <span class=dim>truth: {escape(truth)}"
        f"{'' if score is None else f', score {score:.3g}'}</span></p>"
        + (f"<table><tr><th>candidate<th>log-likelihood{ranked}</table>" if ranked else "")
        + _attention(number, example.get("attention"), sizes)
        + "</div>"
    )


def _thumbnail(name: str, data: bytes, styles: list[str]) -> tuple[int, int] | None:
    """Add a style that shows a small copy of an image, and return its size; None where it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            small = image.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=_QUALITY)
    uri = base64.b64encode(encoded.getvalue()).decode()
    scale = max(1.0, _SHORT_SIDE / min(small.size))  # tiny images are shown larger
    width, height = (round(scale * size) for size in small.size)
    styles.append(f".{name}{{width:{width}px;height:{height}px;background-image:url(data:image/jpeg;base64,{uri})}}")
    return small.size


def _medium(number: int, place: int, sizes: Sequence[tuple[int, int] | None], inside: str = "") -> str:
    if sizes[place] is None:
        return "<span class=none>no preview</span>"
    return f'<span class="medium e{number}i{place}" role=img>{inside}</span>'


def _attention(number: int, attention: Mapping[str, Any] | None, sizes: Sequence[tuple[int, int] | None]) -> str:
    """Show for each token the images that it attends to, darker where it does not look."""
    if attention is None:
        return ""
    tokens = "".join(
        f"<span class=token>{_maps_of_token(number, token, attention['patches'], sizes)}<br>{escape(text)}</span>"
        for token, text in enumerate(attention["tokens"][:_MOST_TOKENS])
    )
    return f"<details><summary>attention of each token</summary>{tokens}</details>"


def _maps_of_token(number: int, token: int, patches: Sequence[Any], sizes: Sequence[tuple[int, int] | None]) -> str:
    parts = []
    for place, maps in enumerate(patches):
        rows = maps[token]
        share = sum(map(sum, rows))
        if share < _LEAST_SHARE:
            continue
        most = max(map(max, rows))
        cells = "".join(
            f'<rect x="{x}" y="{y}" width="1.02" height="1.02" opacity="{0.85 * (1 - value / most):.2f}"/>'
            for y, row in enumerate(rows)
            for x, value in enumerate(row)
        )
        box = f'<svg viewBox="0 0 {len(rows[0])} {len(rows)}" preserveAspectRatio="none">{cells}</svg>'
        parts.append(f"{_medium(number, place, sizes, box)}<br>{100 * share:.0f} %")
    return "<br>".join(parts) or "no image"
