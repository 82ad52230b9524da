"""Draw the pictures of the documentation: ``python docs/draw.py`` writes docs/images/*.svg.

A test compares the committed files with what this script draws. Each picture brings its own background, and colors for
light and dark screens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "images"
_LINE_HEIGHT = 17
# Light colors, then dark ones: text, quiet text, lines, and the fillings of boxes.
_COLORS = {
    "ink": ("#1f2328", "#e6edf3"),
    "quiet": ("#59636e", "#b1bac4"),
    "line": ("#6e7781", "#8b949e"),
    "paper": ("#ffffff", "#15191f"),
    "plain": ("#f3f5f7", "#22272e"),
    "frozen": ("#dbe9f9", "#1d3350"),
    "trained": ("#fbe3c6", "#54371a"),
    "group0": ("#cfe3fa", "#1f4a7a"),
    "group1": ("#d3efd6", "#215c33"),
    "group2": ("#fbe0bd", "#6d4312"),
    "group3": ("#ecd9f7", "#563072"),
}


@dataclass
class Drawing:
    """Collect the shapes of a picture.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        title: Text for readers who do not see the picture.
        shapes: Elements of SVG so far.
    """

    width: int
    height: int
    title: str
    shapes: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "middle") -> None:
        """Write a line whose baseline is at ``y``; ``style`` names classes such as "bold", "small" and "quiet"."""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{style}">{escape(words)}</text>')

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, radius: float = 6) -> None:
        """Draw a rectangle with rounded corners."""
        size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
        self.shapes.append(f'<rect {size} class="edge {fill}"/>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        title: str,
        lines: Sequence[str] = (),
        fill: str = "plain",
    ) -> None:
        """Draw a rectangle with a title and smaller lines below it, centered."""
        self.rectangle(x, y, width, height, fill)
        top = y + height / 2 - _LINE_HEIGHT * (len(lines) + 1) / 2 + 12.5
        self.text(x + width / 2, top, title, "bold")
        for number, line in enumerate(lines, 1):
            self.text(x + width / 2, top + _LINE_HEIGHT * number, line, "small quiet")

    def arrow(self, *points: tuple[float, float], head: bool = True) -> None:
        """Draw a line through points, with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        marker = ' marker-end="url(#head)"' if head else ""
        self.shapes.append(f'<polyline points="{path}" class="flow"{marker}/>')

    def svg(self) -> str:
        """Return the file."""
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.title)}">',
                f"<title>{escape(self.title)}</title>",
                f"<style>\n{_style()}\n</style>",
                f'<defs>{head}<path d="M0,0 L8,4 L0,8 z" class="head"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" rx="10" class="paper"/>',
                *self.shapes,
                "</svg>\n",
            ]
        )


def _style() -> str:
    rules = [
        'text { font-family: "Helvetica Neue", Arial, "Liberation Sans", sans-serif; font-size: 14px; }',
        ".bold { font-weight: 600; } .small { font-size: 12px; }",
        '.code { font-family: Menlo, Consolas, "Liberation Mono", monospace; font-size: 12px; }',
        ".flow { fill: none; stroke-width: 1.5; } .edge { stroke-width: 1; }",
    ]
    return "\n".join(
        [*rules, *_color_rules(0), "@media (prefers-color-scheme: dark) {", *_color_rules(1), "}"],
    )


def _color_rules(which: int) -> list[str]:
    color = {name: pair[which] for name, pair in _COLORS.items()}
    fills = [name for name in color if name not in ("ink", "quiet", "line")]
    return [
        f"text {{ fill: {color['ink']}; }} text.quiet {{ fill: {color['quiet']}; }}",
        f".flow, .edge {{ stroke: {color['line']}; }} .head {{ fill: {color['line']}; }}",
        " ".join(f".{name} {{ fill: {color[name]}; }}" for name in fills),
    ]


def model() -> Drawing:
    """Draw the Flamingo: media on the left, text in the middle, a cross-attention in detail on the right."""
    title = (
        "A frozen vision encoder and a trained perceiver resampler turn each medium into latents. Trained gated "
        "cross-attentions between the frozen blocks of the language model let each token see the latents of its medium."
    )
    drawing = Drawing(1000, 590, title)
    _media_column(drawing)
    _text_column(drawing)
    _cross_attention(drawing)
    for x, fill, words in ((40, "frozen", "frozen"), (130, "trained", "trained")):
        drawing.rectangle(x, 24, 18, 18, fill, 4)
        drawing.text(x + 26, 38, words, "small", "start")
    return drawing


def _media_column(drawing: Drawing) -> None:
    for number in (0, 1):
        x = 66 + 98 * number
        drawing.rectangle(x, 472, 72, 54, f"group{number}")
        drawing.text(x + 36, 504, f"medium {number}", "small")
        drawing.arrow((x + 36, 472), (x + 36, 428))
    drawing.text(151, 548, "images, or videos of several frames", "small quiet")
    drawing.box(40, 364, 222, 64, "vision encoder", ["one frame at a time"], "frozen")
    drawing.arrow((151, 364), (151, 304))
    drawing.text(162, 338, "features of each medium", "small quiet", "start")
    drawing.box(
        40, 220, 222, 84, "perceiver resampler", ["64 learned queries attend", "to all features of a medium"], "trained"
    )
    for number in (0, 1):
        x = 66 + 98 * number
        drawing.arrow((x + 36, 220), (x + 36, 182))
        for row in range(4):
            drawing.rectangle(x, 140 + 10 * row, 72, 7, f"group{number}", 2)
    drawing.text(151, 126, "64 latents a medium", "small quiet")


def _text_column(drawing: Drawing) -> None:
    words = ("<BOS>", "<image>", "a", "cat", "<EOC>", "<image>", "a", "dog", "<EOC>")
    seen = (-1, 0, 0, 0, 0, 1, 1, 1, 1)
    widths = [62 if word.startswith("<") else 40 for word in words]
    # Two lines of tokens would hide their order, so the tokens are narrow.
    x = 318.0
    scale = 350 / sum(widths)
    for word, medium, width in zip(words, seen, widths, strict=True):
        fill = "plain" if medium < 0 else f"group{medium}"
        drawing.rectangle(x, 472, width * scale - 3, 26, fill, 4)
        short = {"<image>": "<img>", "<BOS>": "<B>", "<EOC>": "<E>"}.get(word, word)
        drawing.text(x + width * scale / 2 - 1.5, 489, short, "code")
        drawing.text(x + width * scale / 2 - 1.5, 518, str(medium), "code quiet")
        x += width * scale
    drawing.text(493, 548, "tokens, and below them media_index: the medium that each sees", "small quiet")
    drawing.arrow((493, 472), (493, 428))
    drawing.box(378, 380, 230, 48, "embeddings", ["two added tokens train"], "frozen")
    drawing.arrow((493, 380), (493, 336))
    drawing.box(378, 288, 230, 48, "gated cross-attention", ["before every n-th block"], "trained")
    drawing.arrow((493, 288), (493, 252))
    drawing.box(378, 204, 230, 48, "language model's block", fill="frozen")
    drawing.arrow((493, 204), (493, 152))
    drawing.arrow((620, 204), (630, 204), (630, 336), (620, 336), head=False)
    drawing.text(638, 266, "for all", "small quiet", "start")
    drawing.text(638, 282, "blocks", "small quiet", "start")
    drawing.box(378, 104, 230, 48, "output embeddings", ["two added tokens train"], "frozen")
    drawing.arrow((493, 104), (493, 72))
    drawing.text(493, 62, "next token, and the loss of labeled ones", "small quiet")
    # The latents go to the cross-attention as keys and values.
    drawing.arrow((236, 158), (316, 158), (316, 312), (378, 312))
    drawing.text(322, 176, "keys,", "small quiet", "start")
    drawing.text(322, 192, "values", "small quiet", "start")


def _cross_attention(drawing: Drawing) -> None:
    x, width = 736, 216
    middle = x + width / 2
    drawing.rectangle(x - 22, 84, width + 44, 442, "plain", 10)
    drawing.text(middle, 548, "gated cross-attention in detail", "small quiet")
    drawing.arrow((middle, 510), (middle, 482))
    drawing.text(middle + 10, 512, "hidden states", "small quiet", "start")
    drawing.box(
        x,
        404,
        width,
        78,
        "masked cross-attention",
        ["queries: each token", "keys, values: its medium alone"],
        "trained",
    )
    drawing.arrow((middle, 404), (middle, 382))
    drawing.box(x + 30, 346, width - 60, 36, "× tanh(gate)", fill="trained")
    drawing.arrow((middle, 346), (middle, 314))
    _plus(drawing, middle, 303)
    drawing.arrow((middle, 497), (x - 10, 497), (x - 10, 303), (middle - 12, 303))
    drawing.arrow((middle, 292), (middle, 258))
    drawing.box(x, 216, width, 42, "feed-forward", fill="trained")
    drawing.arrow((middle, 216), (middle, 194))
    drawing.box(x + 30, 158, width - 60, 36, "× tanh(gate)", fill="trained")
    drawing.arrow((middle, 158), (middle, 136))
    _plus(drawing, middle, 125)
    drawing.arrow((middle, 276), (x - 10, 276), (x - 10, 125), (middle - 12, 125))
    drawing.arrow((middle, 114), (middle, 92))
    drawing.text(middle, 62, "gates start at 0: nothing changes at first", "small quiet")


def _plus(drawing: Drawing, x: float, y: float) -> None:
    drawing.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="11" class="edge paper"/>')
    drawing.text(x, y + 5, "+")


def data() -> Drawing:
    """Draw the way from shards to a step and what a run writes."""
    title = (
        "Shards are indexed to a manifest. From it follows which samples a step has. They are read, turned into rows, "
        "collated to micro-batches and go through the model; the gradients of all sources make one step."
    )
    drawing = Drawing(940, 470, title)
    rows = (
        (
            ("tar shards", ["images, texts, documents", "or videos"]),
            ("manifest", ["where each sample is", "trainer.index writes it"]),
            ("SourceOrder", ["step t → its samples,", "from manifest and seed"]),
            ("ShardReader", ["bytes from disk, http, s3", "through a cache"]),
        ),
        (
            ("RowBuilder", ["decode, filter, augment,", "tokens and media_index"]),
            ("collate", ["a micro-batch of one source,", "media in a flat list"]),
            ("Flamingo", ["loss, summed over the", "tokens that are trained on"]),
            ("Engine", ["gradients of all sources", "and ranks: one step"]),
        ),
    )
    fills = (("plain", "plain", "group0", "group0"), ("group1", "group1", "trained", "trained"))
    for row, boxes in enumerate(rows):
        y = 52 + 150 * row
        for column, (name, lines) in enumerate(boxes):
            x = 30 + 226 * column
            drawing.box(x, y, 198, 84, name, lines, fills[row][column])
            if column < 3:
                drawing.arrow((x + 198, y + 42), (x + 226, y + 42))
    drawing.arrow((807, 136), (807, 166), (129, 166), (129, 202))
    for column, (name, line) in enumerate(
        (("metrics.jsonl", "one line a step"), ("checkpoints", "resume"), ("export", "generate, evaluate"))
    ):
        drawing.box(256 + 226 * column, 376, 198, 60, name, [line])
        drawing.arrow((807, 340), (355 + 226 * column, 340), (355 + 226 * column, 376))
    drawing.arrow((807, 286), (807, 340), head=False)
    drawing.text(30, 36, "trainer/data: the same on any number of processes", "small quiet", "start")
    drawing.text(30, 412, "what a run writes", "small quiet", "start")
    return drawing


def order() -> Drawing:
    """Draw the real order of two shards of eight samples, and what two ranks take of it."""
    from trainer.data.stream.order import SourceOrder

    title = (
        "Two shards are cut into read blocks of two samples. The blocks are permuted and cut into four lanes. Each "
        "step takes one sample from every lane; rank 0 has lanes 0 and 1, rank 1 has lanes 2 and 3."
    )
    drawing = Drawing(860, 420, title)
    source = SourceOrder("pairs", [8, 8], seed=0, num_lanes=4, samples_per_step=4, read_block=2, shuffle_window=4)
    drawing.text(30, 40, "shards, in read blocks", "small quiet", "start")
    for shard in (0, 1):
        for index in range(8):
            x = 210 + 320 * shard + 36 * index + 6 * (index // 2)
            _sample(drawing, x, 20, shard, index)
    drawing.text(30, 120, "lanes of an epoch", "small quiet", "start")
    lanes = list(zip(*(source.samples_of(step) for step in range(4)), strict=True))
    for lane, steps in enumerate(lanes):
        x = 210 + 160 * lane
        drawing.text(x + 68, 92, f"lane {lane}", "small")
        for place, (sample,) in enumerate(steps):
            _sample(drawing, x + 36 * place, 102, sample.shard, sample.index)
    drawing.text(530, 72, "permuted by Philox(seed, source, epoch), then within windows of each lane", "small quiet")
    for rank in (0, 1):
        drawing.rectangle(204 + 320 * rank, 166, 308, 232, "plain", 10)
        drawing.text(358 + 320 * rank, 188, f"rank {rank} of 2", "bold")
    for step in range(4):
        y = 204 + 48 * step
        drawing.text(30, y + 19, f"step {step}: one sample a lane", "small quiet", "start")
        for lane in range(4):
            (sample,) = lanes[lane][step]
            _sample(drawing, 264 + 160 * lane, y, sample.shard, sample.index)
    return drawing


def _sample(drawing: Drawing, x: float, y: float, shard: int, index: int) -> None:
    drawing.rectangle(x, y, 32, 28, ("group0", "group2")[shard], 4)
    drawing.text(x + 16, y + 18.5, f"{'ab'[shard]}{index}", "code")


def media_index() -> Drawing:
    """Draw a packed row of two documents and the medium that each of its tokens sees."""
    title = (
        "A packed row holds two documents. Each token sees the last medium at or before it in its own document; tokens "
        "before the first image of a document see none."
    )
    drawing = Drawing(900, 258, title)
    words = "<BOS> <image> a cat <EOC> <image> a dog <EOC> <BOS> hi <image> blue <EOC>".split()
    media = (-1, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1, 2, 2, 2)
    x, lefts = 110.0, []
    for word in words:
        lefts.append(x)
        x += {"<image>": 76, "<BOS>": 56, "<EOC>": 56}.get(word, 44)
    lefts.append(x)
    names = ("tokens", "position_ids", "media_index")
    for name, y in zip(names, (137, 181, 209), strict=True):
        drawing.text(16, y, name, "small quiet", "start")
    position = 0
    for word, medium, left, right in zip(words, media, lefts[:-1], lefts[1:], strict=True):
        position = 0 if word == "<BOS>" else position + 1
        middle = (left + right - 4) / 2
        drawing.rectangle(left, 118, right - left - 4, 30, "plain" if medium < 0 else f"group{medium}", 4)
        drawing.text(middle, 137, word, "code")
        drawing.text(middle, 181, str(position), "code quiet")
        drawing.text(middle, 209, str(medium), "code")
        if word == "<image>":
            drawing.rectangle(middle - 36, 30, 72, 44, f"group{medium}")
            drawing.text(middle, 57, f"medium {medium}", "small")
            drawing.arrow((middle, 74), (middle, 116))
    for document, (first, last) in enumerate(((0, 9), (9, 14))):
        y = 228
        drawing.arrow((lefts[first], y), (lefts[last] - 4, y), head=False)
        drawing.text((lefts[first] + lefts[last] - 4) / 2, y + 15, f"document {document}", "small quiet")
    return drawing


PICTURES: dict[str, Callable[[], Drawing]] = {"model": model, "data": data, "order": order, "media_index": media_index}


def main() -> None:
    """Write all pictures."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
