"""Draw what runs measured: ``python docs/draw_runs.py`` writes docs/images/{quickstart,in_context}_*.

Run ``launch_scripts/quickstart.sh`` and ``launch_scripts/in_context.sh`` first: the pictures show the losses, scores
and answers that they leave in runs/. Options name other folders.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from draw import FOLDER, Drawing  # noqa: E402  found through the path above
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from model.processor import Special  # noqa: E402
from trainer.config.evaluation_config import EvaluationConfig  # noqa: E402
from trainer.config.loader import load_config  # noqa: E402
from trainer.evaluation.prepare import prepare  # noqa: E402
from trainer.evaluation.prepared_task import Cell  # noqa: E402
from trainer.evaluation.prompts import Prompt  # noqa: E402
from trainer.evaluation.query import BlankMedium  # noqa: E402

# Colors of lines on light screens, then on dark ones. The first is for the real prompts.
_LINES = (
    ("#1f2328", "#e6edf3"),
    ("#0969da", "#58a6ff"),
    ("#bc4c00", "#f0883e"),
    ("#1a7f37", "#3fb950"),
    ("#8250df", "#bc8cff"),
)
_DASHES = ("none", "8 3", "2 3", "10 3 2 3", "5 5")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axes:
    """Place values in a rectangle of a drawing.

    Attributes:
        left: Left edge in pixels.
        top: Upper edge in pixels.
        width: Width in pixels.
        height: Height in pixels.
        most: Largest value on each axis; both begin at 0.
    """

    left: float
    top: float
    width: float
    height: float
    most: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a value in pixels."""
        return self.left + self.width * x / self.most[0], self.top + self.height * (1 - y / self.most[1])

    def draw(self, drawing: Drawing, marks: Sequence[float], heights: Sequence[float], label: str) -> None:
        """Draw the lower axis with marks and a label, and a pale line at each of some heights."""
        for height in heights:
            (left, y), (right, _) = self.at(0, height), self.at(self.most[0], height)
            drawing.shapes.append(f'<path d="M{left:g} {y:.1f}H{right:g}" class="flow" opacity="0.3"/>')
            drawing.text(left - 8, y + 4, f"{height:g}", "small quiet", "end")
        for mark in marks:
            x, y = self.at(mark, 0)
            drawing.text(x, y + 18, f"{mark:g}", "small quiet")
        drawing.text(self.left + self.width / 2, self.top + self.height + 38, label, "small quiet")

    def line(self, drawing: Drawing, points: Points, number: int, *, dots: bool = False) -> None:
        """Draw a line through values in the ``number``-th color; with dots it is also dashed in a way of its own."""
        places = [self.at(*point) for point in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        drawing.shapes.append(f'<path d="M{path}" class="line{number}{" dash" if dots else ""}"/>')
        if dots:
            drawing.shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="dot{number}"/>' for x, y in places]


def chart(width: int, height: int, title: str) -> Drawing:
    """Return an empty drawing that knows the colors of lines."""
    drawing = Drawing(width, height, title)
    rules = [f".line{number}.dash {{ stroke-dasharray: {dashes}; }}" for number, dashes in enumerate(_DASHES)]
    for screen, opening, closing in ((0, "", ""), (1, "@media (prefers-color-scheme: dark) {", "}")):
        colors = [
            f".line{number} {{ fill: none; stroke: {pair[screen]}; }} .dot{number} {{ fill: {pair[screen]}; }}"
            for number, pair in enumerate(_LINES)
        ]
        rules += [line for line in (opening, *colors, closing) if line]
    drawing.shapes.append("<style>\n" + "\n".join(rules) + "\n</style>")
    return drawing


def legend(drawing: Drawing, x: float, y: float, names: Mapping[int, str], *, dots: bool = False) -> None:
    """List the names of lines by their numbers, one below the other; ``dots`` as for the lines."""
    for place, (number, name) in enumerate(names.items()):
        middle = y + 24 * place
        drawing.shapes.append(f'<path d="M{x:g} {middle:g}h30" class="line{number}{" dash" if dots else ""}"/>')
        drawing.text(x + 40, middle + 4, name, "small", "start")


def loss_curve(metrics: Path) -> Drawing:
    """Draw the loss of each source over the steps of a run.

    Args:
        metrics: ``metrics.jsonl`` of the run.

    Raises:
        ValueError: The file has no losses.
    """
    steps: dict[int, dict[str, float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        # A step that was repeated after a kill counts as it ended.
        steps[record["step"]] = {name[5:]: value for name, value in record.items() if name.startswith("loss/")}
    names = sorted({name for losses in steps.values() for name in losses})
    if not names:
        raise ValueError(f"{metrics} has no loss of a source")
    last, top = max(steps), max(value for losses in steps.values() for value in losses.values())
    ends = " and ".join(f"{name} to {steps[last][name]:.3f}" for name in names if name in steps[last])
    drawing = chart(640, 296, f"Loss of each source over {last} steps. It falls for {ends}.")
    axes = Axes(56, 24, 420, 216, (last, math.ceil(top * 5) / 5))
    stride = max(1, round(last / 5))
    axes.draw(drawing, range(0, last + 1, stride), [axes.most[1] * part / 4 for part in range(5)], "step")
    for number, name in enumerate(names, 1):
        axes.line(drawing, [(step, steps[step][name]) for step in sorted(steps) if name in steps[step]], number)
    legend(drawing, 500, 48, {number: f"loss/{name}" for number, name in enumerate(names, 1)})
    return drawing


def few_shot_plot(report: Path, task: str) -> Drawing:
    """Draw the scores of a task and of its controls over the number of demonstrations.

    Args:
        report: ``report.json`` of an evaluation.
        task: Name of the task.

    Raises:
        ValueError: The report has no such task.
    """
    tasks = json.loads(report.read_text(encoding="utf-8"))["tasks"]
    if task not in tasks:
        raise ValueError(f"{report} has no task {task!r}; it has {', '.join(tasks)}")
    shots = {int(count): cell for count, cell in tasks[task]["shots"].items()}
    lines: dict[str, list[tuple[float, float]]] = {"real prompts": [(n, cell["score"]) for n, cell in shots.items()]}
    for count, cell in shots.items():
        for control, scores in cell["controls"].items():
            lines.setdefault(control.replace("_", " "), []).append((count, scores["score"]))
    most = max(1.0, *(score for points in lines.values() for _, score in points))
    spoken = "; ".join(f"{name} {', '.join(f'{score:.2f}' for _, score in line)}" for name, line in lines.items())
    counts = ", ".join(str(count) for count in shots)
    drawing = chart(680, 296, f"Share of right answers with {counts} demonstrations: {spoken}.")
    axes = Axes(56, 24, 380, 216, (max(1, *shots) * 1.04, most))
    axes.draw(drawing, sorted(shots), [most * part / 4 for part in range(5)], "demonstrations in the prompt")
    for number, points in enumerate(lines.values()):
        axes.line(drawing, sorted(points), number % len(_LINES), dots=True)
    legend(drawing, 462, 48, {number % len(_LINES): name for number, name in enumerate(lines)}, dots=True)
    return drawing


_CARD, _SIDE, _GAP = (232, 208), 64, 12
_MOST_LINES = 5  # of a demonstration's text
_INK, _QUIET, _RIGHT, _WRONG = "#1f2328", "#59636e", "#1a7f37", "#b3261e"
_PAPER, _EDGE = "#ffffff", "#d0d7de"


def contact_sheet(configuration: Path, output: Path | None, tasks: Sequence[str], shots: int, columns: int) -> bytes:
    """Return a PNG with examples of an evaluation: demonstrations, the image that is asked about, and the answer.

    The examples of a task are at equal distances in its files, so nobody has chosen them.

    Args:
        configuration: YAML of the evaluation.
        output: Folder with its ``predictions.jsonl``; None takes that of the YAML.
        tasks: Tasks to show, one row each.
        shots: Number of demonstrations, where a task has several.
        columns: Examples of a task.
    """
    config = load_config(configuration, [], EvaluationConfig, check_files=False)  # the model is not needed
    answered: dict[tuple[str, str], dict[str, Any]] = {}
    for line in ((output or config.output) / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["control"] == "none" and record["task"] in tasks:
            answered[record["task"], f"{record['id']} {record['shots']}"] = record
    prepared = {task.name: task for task in prepare(config) if task.name in tasks}
    width, height = _CARD
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, len(tasks) * (height + 32) + _GAP), _PAPER)
    for row, name in enumerate(tasks):
        task = prepared[name]
        count = shots if shots in task.shots else task.shots[-1]
        cell = Cell(name, count)
        lines = [record for (of, _), record in answered.items() if of == name and record["shots"] == count]
        share = sum(record["score"] for record in lines) / len(lines)
        top = row * (height + 32) + 8
        said = f"{name}: {share:.1%} of {len(lines)} right, {count} demonstration{'' if count == 1 else 's'}"
        ImageDraw.Draw(sheet).text((_GAP, top), said, _QUIET, _font(15))
        for column in range(columns):
            query = task.queries[column * len(task.queries) // columns]
            prompt = task.prompts(cell, query)[0]
            card = _card(prompt, answered[name, f"{query.id} {count}"])
            sheet.paste(card, (_GAP + column * (width + _GAP), top + 24))
    written = io.BytesIO()
    sheet.quantize(64).save(written, "PNG", optimize=True)
    return written.getvalue()


def _card(prompt: Prompt, record: Mapping[str, Any]) -> Image.Image:
    """Draw the images of a prompt beside each other, their texts below them, and the answer at the end."""
    card = Image.new("RGB", _CARD, _PAPER)
    pen = ImageDraw.Draw(card)
    pen.rounded_rectangle((0, 0, _CARD[0] - 1, _CARD[1] - 1), 8, outline=_EDGE)
    texts = _texts_after_images(prompt)
    side = min(_SIDE * 3 // 2 if len(texts) == 1 else _SIDE, (_CARD[0] - 20) // max(1, len(texts)) - 6)
    step = (_CARD[0] - 20) // max(1, len(texts))
    for place, (medium, text) in enumerate(zip(prompt.media, texts, strict=True)):
        left = 10 + place * step
        if not isinstance(medium, BlankMedium):
            picture = Image.open(io.BytesIO(medium.read())).convert("RGB")
            scale = side / max(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            card.paste(picture, (left, 12))
        for line, words in enumerate(_wrapped(text or "?", step - 6)[:_MOST_LINES]):
            pen.text((left, 18 + side + 15 * line), words, _QUIET, _font(12))
    right = record["score"] >= 1
    lines = [*((line, _RIGHT if right else _WRONG) for line in _wrapped(record["answer"], 205))]
    if not right:
        lines.append((f"right: {record['answers'][0]}", _QUIET))
    for number, (words, color) in enumerate(lines):
        pen.text((10, _CARD[1] - 8 - 16 * (len(lines) - number)), words, color, _font(13))
    return card


def _texts_after_images(prompt: Prompt) -> list[str]:
    """Return the text after each image of a prompt."""
    texts: list[str] = []
    for part in prompt.parts:
        if part is Special.IMAGE:
            texts.append("")
        elif not isinstance(part, Special) and texts:
            texts[-1] += part.strip()
    return texts


def _wrapped(text: str, width: int) -> list[str]:
    """Return a text in lines that are not wider than some pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font(13).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # part of Pillow, so that every machine has it


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures of the runs that are there; return 1 if none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="results of quickstart.sh")
    parser.add_argument("--in-context", type=Path, default=Path("runs/in_context"), help="results of in_context.sh")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the pictures")
    options = parser.parse_args(argv)
    configs = Path(__file__).parents[1] / "configs"
    options.output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, folder in (("quickstart", options.quickstart), ("in_context", options.in_context)):
        if not (folder / "report.json").is_file():
            print(f"{folder} has no report.json; run launch_scripts/{name}.sh first", file=sys.stderr)
            continue
        shown = {"quickstart": ("held_out", "second_image"), "in_context": ("binding", "styles")}[name]
        sheet = contact_sheet(configs / name / "evaluate.yaml", folder, shown, 2, 4)
        (options.output / f"{name}_examples.png").write_bytes(sheet)
        if name == "quickstart":
            drawing = loss_curve(folder / "flamingo" / "metrics.jsonl")
        else:
            drawing = few_shot_plot(folder / "report.json", "binding")
        picture = {"quickstart": "quickstart_loss.svg", "in_context": "in_context_shots.svg"}[name]
        (options.output / picture).write_text(drawing.svg(), encoding="utf-8")
        written.append(name)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
