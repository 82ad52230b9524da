"""Show batches as one HTML page, so that a person can check the model's input.

The page needs no other file and runs no script. Text from the data is escaped, and images are encoded anew from the
pixels in the batch.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterator, Sequence

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
    "A token has the color of the medium that it sees, the same as the frame of that medium; a white token sees none. "
    "The model is trained on the underlined tokens. § begins a document of a packed row; documents do not see one "
    "another."
)


def contact_sheet(
    batches: Sequence[Batch], token_text: Callable[[int], str], image_id: int, *, title: str, rows: int
) -> str:
    """Return the page.

    Args:
        batches: Batches of any sources.
        token_text: Token id -> text.
        image_id: Id of ``<image>``, which stands once in a row for each medium.
        title: Title of the page.
        rows: Most rows to show of each source.
    """
    num_rows: dict[str, int] = {}
    body: list[str] = []
    for batch in batches:
        first = num_rows.get(batch.source, 0)
        if first == 0:
            body.append(f"<h2>{_escape(batch.source)}</h2>")
        sections = _row_sections(batch, token_text, image_id, first)
        body += [section for _, section in zip(range(rows - first), sections, strict=False)]
        num_rows[batch.source] = first + len(batch.input_ids)
    body += [
        f"<p>{_escape(name)}: {rows} of {count} rows are shown.</p>" for name, count in num_rows.items() if count > rows
    ]
    head = f'<meta charset="utf-8"><title>{_escape(title)}</title><style>{_STYLE}</style>'
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n<h1>{_escape(title)}</h1><p>{_LEGEND}</p>\n'
        f"{content}\n</body></html>\n"
    )


def _row_sections(batch: Batch, token_text: Callable[[int], str], image_id: int, first: int) -> Iterator[str]:
    """Yield the HTML of each row; the batch's first row has the number ``first`` in its source."""
    remaining, num_media = list(batch.samples), 0
    for row in range(len(batch.input_ids)):
        length = int(batch.attention_mask[row].sum())
        row_media = int((batch.input_ids[row, :length] == image_id).sum())
        media = "".join(_medium(batch.medium(index), index) for index in range(num_media, num_media + row_media))
        num_media += row_media
        samples = "<br>".join(_sample(sample) for sample in _take_samples(batch, row, remaining))
        padding = batch.input_ids.shape[1] - length
        yield (
            f'<section><b>row {first + row}</b> <span class="samples">{samples}</span>'
            f'<div class="media">{media}</div><div class="tokens">{_tokens(batch, row, length, token_text)}'
            f'<span class="padding"> {length} tokens + {padding} padding</span></div></section>'
        )


def _take_samples(batch: Batch, row: int, remaining: list[SampleId]) -> list[SampleId]:
    """Remove the row's samples from the front of ``remaining``, and return them."""
    if batch.position_ids is None:
        count = len(batch.samples) // len(batch.input_ids)
    else:  # one sample for each document
        count = int(((batch.position_ids[row] == 0) & (batch.attention_mask[row] == 1)).sum())
    samples = remaining[:count]
    del remaining[:count]
    return samples


def _sample(sample: SampleId) -> str:
    return _escape(f"{sample.shard}[{sample.index}] {sample.key!a} epoch {sample.epoch}")


def _tokens(batch: Batch, row: int, length: int, token_text: Callable[[int], str]) -> str:
    parts = []
    for position in range(length):
        if batch.position_ids is not None and int(batch.position_ids[row, position]) == 0:
            parts.append('<span class="document">§</span>')
        token, medium = int(batch.input_ids[row, position]), int(batch.media_index[row, position])
        trained = int(batch.labels[row, position]) != IGNORED_LABEL
        title = f"token {token} at {position}, medium {medium}" + (", trained" if trained else "")
        color = "" if medium < 0 else f' style="background:{_color(medium, 85)}"'
        kind = ' class="trained"' if trained else ""
        text = token_text(token).replace("\n", "⏎")
        parts.append(f'<span{kind}{color} title="{title}">{_escape(text)}</span>')
    return "".join(parts)


def _medium(frames: Tensor, index: int) -> str:
    """Return the HTML of a medium, uint8 [frames, 3, height, width]."""
    return "".join(
        f'<img style="border-color:{_color(index, 70)}" title="medium {index}, frame {number}" alt="medium {index}" '
        f'src="data:image/png;base64,{_png_base64(frame)}">'
        for number, frame in enumerate(frames)
    )


def _png_base64(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _color(index: int, lightness: int) -> str:
    """Return the color of a number; neighbors lie far apart on the color circle (the golden angle)."""
    return f"hsl({index * 137.508 % 360:.0f} 80% {lightness}%)"


def _escape(text: str) -> str:
    """Escape HTML, and replace control characters, which HTML forbids."""
    return html.escape("".join(character if character.isprintable() else "�" for character in text))
