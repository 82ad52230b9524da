"""Batches as one HTML page: what the model is fed, as a person can check it. It needs no other file and runs no script.

Whatever comes from data is escaped, and images are made anew as PNG from the pixels in the batch.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

from PIL import Image
from torch import Tensor

from trainer.data.batch import IGNORED_LABEL, Batch, SampleId

_STYLE = """
body { font: 14px/1.6 system-ui, sans-serif; margin: 2em; background: #fff; color: #111 }
h2 { margin: 1.5em 0 .3em } section { border-top: 1px solid #ccc; padding: .6em 0 }
.samples { color: #555; font-size: 12px } .media img { height: 112px; margin: 2px; border: 4px solid }
.tokens { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens span { border-radius: 3px; padding: 1px; margin-right: 1px; border-bottom: 3px solid transparent }
.tokens .trained { border-bottom-color: #111 } .document { color: #b00; font-weight: bold } .padding { color: #999 }
"""
_LEGEND = (
    "A token's color is the medium that it sees (white: none), the same as the frame of the medium. Underlined tokens "
    "are trained on. § begins a document of a packed row; documents do not see one another."
)


def contact_sheet(
    batches: SequenceOf[Batch], token_text: Callable[[int], str], image_id: int, *, title: str, rows: int
) -> str:
    """The page.

    token_text: id -> what it stands for. image_id: each row's media belong to these tokens. rows: of each source, at
    most so many are shown.
    """
    shown: dict[str, int] = {}
    body: list[str] = []
    for batch in batches:
        first = shown.get(batch.source, 0)
        if first == 0:
            body.append(f"<h2>{_escaped(batch.source)}</h2>")
        sections = _rows(batch, token_text, image_id, first)
        body += [section for _, section in zip(range(rows - first), sections, strict=False)]
        shown[batch.source] = first + len(batch.input_ids)
    body += [
        f"<p>{_escaped(name)}: {rows} of {count} rows are shown.</p>" for name, count in shown.items() if count > rows
    ]
    head = f'<meta charset="utf-8"><title>{_escaped(title)}</title><style>{_STYLE}</style>'
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{_escaped(title)}</h1><p>{_LEGEND}</p>\n'
        f"{content}\n</body></html>\n"
    )


def _rows(batch: Batch, token_text: Callable[[int], str], image_id: int, first: int) -> Iterator[str]:
    samples, media = list(batch.samples), 0
    for row in range(len(batch.input_ids)):
        length = int(batch.attention_mask[row].sum())
        ids = batch.input_ids[row, :length]
        of_row = _samples_of_row(batch, row, samples)
        images = int((ids == image_id).sum())
        pictures = "".join(_medium(batch.medium(index), index) for index in range(media, media + images))
        media += images
        names = "<br>".join(_sample(sample) for sample in of_row)
        padding = batch.input_ids.shape[1] - length
        yield (
            f'<section><b>row {first + row}</b> <span class="samples">{names}</span>'
            f'<div class="media">{pictures}</div><div class="tokens">{_tokens(batch, row, length, token_text)}'
            f'<span class="padding"> {length} tokens + {padding} padding</span></div></section>'
        )


def _samples_of_row(batch: Batch, row: int, waiting: list[SampleId]) -> list[SampleId]:
    """Takes the row's samples off the front of ``waiting``: one a document, or equally many a row."""
    if batch.position_ids is None:
        count = len(batch.samples) // len(batch.input_ids)
    else:
        count = int(((batch.position_ids[row] == 0) & (batch.attention_mask[row] == 1)).sum())
    taken = waiting[:count]
    del waiting[:count]
    return taken


def _sample(sample: SampleId) -> str:
    return _escaped(f"{sample.shard}[{sample.index}] {sample.key!a} epoch {sample.epoch}")


def _tokens(batch: Batch, row: int, length: int, token_text: Callable[[int], str]) -> str:
    positions = batch.position_ids
    parts = []
    for place in range(length):
        if positions is not None and int(positions[row, place]) == 0:
            parts.append('<span class="document">§</span>')
        token, medium = int(batch.input_ids[row, place]), int(batch.media_index[row, place])
        trained = int(batch.labels[row, place]) != IGNORED_LABEL
        title = f"token {token} at {place}, medium {medium}" + (", trained" if trained else "")
        color = "" if medium < 0 else f' style="background:{_color(medium, 85)}"'
        kind = ' class="trained"' if trained else ""
        text = token_text(token).replace("\n", "⏎")
        parts.append(f'<span{kind}{color} title="{title}">{_escaped(text)}</span>')
    return "".join(parts)


def _medium(frames: Tensor, index: int) -> str:
    """uint8 [frames, 3, height, width]"""
    return "".join(
        f'<img style="border-color:{_color(index, 70)}" title="medium {index}, frame {number}" alt="medium {index}" '
        f'src="data:image/png;base64,{_png(frame)}">'
        for number, frame in enumerate(frames)
    )


def _png(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _color(index: int, lightness: int) -> str:
    """Neighbouring numbers far apart on the color circle (the golden angle)."""
    return f"hsl({index * 137.508 % 360:.0f} 80% {lightness}%)"


def _escaped(text: str) -> str:
    """Also without control characters, which HTML forbids."""
    return html.escape("".join(character if character.isprintable() else "�" for character in text))
