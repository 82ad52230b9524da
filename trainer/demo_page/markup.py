"""Write the parts of the page that gradio has no component for, as HTML in which every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from trainer.demo_page.answers import Word
from trainer.demo_page.conversation import Conversation, Piece
from trainer.demo_page.gates import LayerGates
from trainer.demo_page.pictures import data_uri, heat_map, preview

_SIDE = 96  # height of a piece in pixels
_SMALL_SIDE = 56  # of a piece in an example
_MAP_SIDE = 256  # of a heat map; the style shows it smaller until it is chosen
_LEAST_SHARE = 0.02  # of a medium whose map is shown
_MOST_WORDS = 80  # whose maps are drawn
_ACTIONS = {"earlier": ("◀", "move earlier"), "later": ("▶", "move later"), "delete": ("✕", "delete")}

STYLE = """
.html-container{padding:2px 0!important}
.pieces,.words{display:flex;flex-wrap:wrap;gap:10px;align-items:flex-start}
.piece{border:1px solid var(--border-color-primary);border-radius:8px;padding:6px;
background:var(--block-background-fill)}
.piece .text{display:block;min-width:96px;max-width:340px;min-height:24px;white-space:pre-wrap;overflow-wrap:anywhere}
.piece img,.example img{display:block;border-radius:4px;max-width:100%}
.piece .name{display:block;max-width:180px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;font-size:12px}
.piece .name,.example small,.word small,.hint{color:var(--body-text-color);opacity:.72}
.actions{display:flex;gap:3px;margin-top:4px}
.actions button{width:28px;height:24px;line-height:24px;padding:0;border-radius:4px;font-size:12px;cursor:pointer;
background:var(--button-secondary-background-fill);color:var(--button-secondary-text-color)}
.actions button:hover{background:var(--button-secondary-background-fill-hover)}
.example{border:1px solid var(--border-color-primary);border-radius:8px;padding:8px;margin-bottom:8px}
.example .line{display:flex;flex-wrap:wrap;gap:8px;align-items:flex-start;white-space:pre-wrap;overflow-wrap:anywhere}
.example small{font-size:12px}
.word{display:block;text-align:center;cursor:pointer;max-width:100%}
.word input{position:absolute;opacity:0}
.word b{display:block;padding:2px 8px;border-radius:6px;white-space:pre-wrap;font-size:16px}
.word input:focus-visible~b{outline:2px solid var(--color-accent)}
.word input:checked~b{background:var(--color-accent-soft)}
.word img{display:block;height:112px;max-width:100%;border-radius:6px;margin:4px auto 0}
.word input:checked~.map img{height:256px}
.gates{width:100%;font-size:13px}
.gates .layer{display:grid;grid-template-columns:72px 1fr 52px;gap:8px;align-items:center;padding:3px 0}
.gates .layer i{display:block;height:9px;border-radius:3px;margin:3px 0;min-width:1px}
.gates .number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;line-height:1.2}
.attention{background:#e8730c}.feed_forward{background:#4269d0}
"""
# Tells the handler which button of which piece was pressed.
ON_LOAD = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-action]');
  if (button) trigger('click', {action: button.dataset.action, place: Number(button.dataset.place)});
});
"""


def pieces_markup(conversation: Conversation) -> str:
    """Return the pieces of the prompt, each with buttons."""
    if not conversation.pieces:
        return "<p class=hint>Empty. Add images, videos and texts in the order in which the model shall read them.</p>"
    numbers = _numbers(conversation)
    cards = (_piece(place, piece, numbers) for place, piece in enumerate(conversation.pieces))
    return f"<div class=pieces>{''.join(cards)}</div>"


def examples_markup(conversation: Conversation) -> str:
    """Return the few-shot examples, each with buttons."""
    if not conversation.examples:
        hint = "None. Put an example together as a prompt, write its answer, and choose “Keep as example”."
        return f"<p class=hint>{hint}</p>"
    numbers = _numbers(conversation)
    return "".join(
        f"<div class=example><div class=line>{''.join(_small_piece(piece, numbers) for piece in example)}</div>"
        f"{_buttons(place)}</div>"
        for place, example in enumerate(conversation.examples)
    )


def words_markup(words: Sequence[Word], media: Sequence[Piece]) -> str:
    """Return each generated word with heat maps of the media that it attended to."""
    cards = "".join(
        f"<label class=word><input type=checkbox><b>{escape(word.text.strip() or '␣')}</b>{_maps(word, media)}</label>"
        for word in words[:_MOST_WORDS]
    )
    more = "" if len(words) <= _MOST_WORDS else f"<p class=hint>and {len(words) - _MOST_WORDS} more words</p>"
    return f"<div class=words>{cards}</div>{more}"


def gates_markup(gates: Sequence[LayerGates]) -> str:
    """Return the gates of all layers as bars."""
    return f"<div class=gates>{''.join(map(_gates_of_layer, gates))}</div>"


def message_markup(message: str) -> str:
    """Return a plain message."""
    return f"<p class=hint>{escape(message)}</p>"


def _numbers(conversation: Conversation) -> dict[Piece, int]:
    """Return the number of each image and video, counted from 1 over the examples and the prompt."""
    return {piece: number for number, piece in enumerate(conversation.media(), 1)}


def _piece(place: int, piece: Piece, numbers: Mapping[Piece, int]) -> str:
    if piece.pixels is None:
        inside = f"<span class=text>{escape(piece.text)}</span>"
    else:
        name = escape(f"{piece.kind} {numbers[piece]}: {piece.text}")
        image = data_uri(preview(piece.pixels, _SIDE))
        inside = f'<img src="{image}" alt="{name}"><span class=name title="{name}">{name}</span>'
    return f'<div class=piece data-kind="{piece.kind}">{inside}{_buttons(place)}</div>'


def _small_piece(piece: Piece, numbers: Mapping[Piece, int]) -> str:
    if piece.pixels is None:
        return f"<span>{escape(piece.text)}</span>"
    name = f"{piece.kind} {numbers[piece]}"
    return f'<span><img src="{data_uri(preview(piece.pixels, _SMALL_SIDE))}" alt="{name}"><small>{name}</small></span>'


def _buttons(place: int) -> str:
    buttons = "".join(
        f'<button type=button data-action={action} data-place={place} title="{title}" aria-label="{title}">'
        f"{sign}</button>"
        for action, (sign, title) in _ACTIONS.items()
    )
    return f"<div class=actions>{buttons}</div>"


def _maps(word: Word, media: Sequence[Piece]) -> str:
    parts = []
    for number, (piece, own) in enumerate(zip(media, word.maps, strict=True), 1):
        share = float(own.sum())
        if share >= _LEAST_SHARE and piece.pixels is not None:
            picture = data_uri(heat_map(piece.pixels, own, _MAP_SIDE))
            label = f"{piece.kind} {number}, {100 * share:.0f} %"
            parts.append(f'<span class=map><img src="{picture}" alt="{label}"><small>{label}</small></span>')
    return "".join(parts) or "<small>no image</small>"


def _gates_of_layer(layer: LayerGates) -> str:
    bars, numbers = "", []
    for name, value in (("attention", layer.attention), ("feed_forward", layer.feed_forward)):
        if value is not None:
            bars += f'<i class={name} style="width:{min(100.0, 100 * abs(value)):.1f}%"></i>'
            numbers.append(f"{value:+.2f}")
    title = f"<span>block {layer.block}</span>"
    number = f"<span class=number>{'<br>'.join(numbers)}</span>"
    return f"<div class=layer>{title}<span>{bars or 'no gates'}</span>{number}</div>"
