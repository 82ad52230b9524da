"""Lay out the page with gradio's components, and connect them to the handlers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr

from trainer.demo_page.conversation import Conversation
from trainer.demo_page.gates import gates_of
from trainer.demo_page.handlers import WAITING, Handlers
from trainer.demo_page.limits import Limits, UserError
from trainer.demo_page.markup import ON_LOAD, examples_markup, gates_markup, pieces_markup
from trainer.prompting.exported_model import ExportedModel

_WARNING_SECONDS = 10.0  # that a warning stays on the page
_STATE_SECONDS = 3600.0  # that what a user put together is kept after the page was closed
_CACHE_SECONDS = (600, 3600)  # between two looks for old uploads, and their age when they are deleted
_EVENTS_AT_ONCE = 8  # apart from answers


class _Page:
    """Hold the components that the events need."""

    def __init__(self, exported: ExportedModel, limits: Limits, title: str) -> None:
        gr.Markdown(f"# Flamingo\n{_facts(exported, limits, title)}")
        self.state = gr.State(Conversation(), time_to_live=_STATE_SECONDS)
        with gr.Row():
            with gr.Column(scale=3):
                self._add_prompt(limits)
                self._add_answer()
            with gr.Column(scale=2, min_width=320):
                gr.Markdown("### Few-shot examples\nThe model reads them before the prompt.")
                self.examples = gr.HTML(examples_markup(Conversation()), js_on_load=ON_LOAD, elem_id="examples")
                gr.Markdown(
                    "### Gates\nHow far each layer lets images into the text: tanh of the gates of its "
                    "<span style='color:#e8730c'>cross-attention</span> and its "
                    "<span style='color:#4269d0'>feed-forward layer</span>. 0 is shut, ±1 is wide open."
                )
                gr.HTML(gates_markup(gates_of(exported.model)), elem_id="gates")
        gr.Markdown("### Where the model looked\nChoose a word to enlarge its picture.")
        self.words = gr.HTML(WAITING, elem_id="words")

    def _add_prompt(self, limits: Limits) -> None:
        gr.Markdown("### Prompt")
        self.pieces = gr.HTML(pieces_markup(Conversation()), js_on_load=ON_LOAD, elem_id="pieces")
        with gr.Row(equal_height=True):
            self.text = gr.Textbox(
                placeholder="Type a text", show_label=False, container=False, scale=4, elem_id="text"
            )
            self.add_text = gr.Button("Add text", size="md", scale=1, min_width=100, elem_id="add_text")
            self.upload = gr.UploadButton(
                "Add images or videos",
                file_count="multiple",
                file_types=["image", "video"],
                size="md",
                scale=1,
                min_width=210,
                elem_id="upload",
            )
            _take_files_only(self.upload)
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
            self.stop = gr.Button("Stop", elem_id="stop")
            self.clear = gr.Button("Clear prompt", elem_id="clear")
        with gr.Accordion("Settings", open=False):
            most = limits.new_tokens
            self.new_tokens = gr.Slider(1, most, min(32, most), step=1, label="New tokens at most")
            self.sample = gr.Checkbox(False, label="Draw each token at random, instead of taking the most likely one")
            self.temperature = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature of random tokens")
            self.top_p = gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Probability mass that they are drawn from")

    def _add_answer(self) -> None:
        gr.Markdown("### Answer")
        hint = "The answer appears here. You may correct it before you keep it."
        self.answer = gr.Textbox(lines=2, placeholder=hint, show_label=False, container=False, elem_id="answer")
        with gr.Row():
            self.keep = gr.Button("Keep as example", elem_id="keep")
            self.go_on = gr.Button("Go on from the answer", elem_id="go_on")

    def connect(self, do: Handlers) -> None:
        """Let every event call its handler."""
        state, pieces, text, answer, words = self.state, self.pieces, self.text, self.answer, self.words
        typed = ([state, text], [state, pieces, text])
        self.add_text.click(_shown(do.add_text), *typed, api_name="add_text")
        text.submit(_shown(do.add_text), *typed, api_visibility="private")
        uploaded = ([state, self.upload], [state, pieces])
        self.upload.upload(_shown(do.add_files), *uploaded, api_name="add_files")
        pieces.click(_pressed(do.change_pieces), state, [state, pieces], api_visibility="private")
        changed = [state, self.examples, pieces]
        self.examples.click(_pressed(do.change_examples), state, changed, api_visibility="private")
        running = self.generate.click(
            _streamed(do.answer),
            [state, self.new_tokens, self.sample, self.temperature, self.top_p],
            [answer, words],
            api_name="answer",
            concurrency_limit=do.limits.concurrency,
        )
        self.stop.click(do.stop, None, words, cancels=[running], api_visibility="private")
        kept = [state, pieces, self.examples, answer, words]
        self.keep.click(_shown(do.keep_as_example), [state, answer], kept, api_name="keep_as_example")
        appended = [state, pieces, answer, words]
        self.go_on.click(_shown(do.append_answer), [state, answer], appended, api_name="append_answer")
        self.clear.click(_shown(do.clear_prompt), state, appended, api_name="clear_prompt")


def build_page(exported: ExportedModel, limits: Limits, title: str) -> gr.Blocks:
    """Return the page.

    Args:
        exported: Model that answers.
        limits: Limits of the page.
        title: Name of the model.
    """
    warn = partial(gr.Warning, duration=_WARNING_SECONDS, title="Left out")
    with gr.Blocks(title=f"Flamingo: {title}", analytics_enabled=False, delete_cache=_CACHE_SECONDS) as page:
        _Page(exported, limits, title).connect(Handlers(exported, limits, warn))
    page.queue(max_size=limits.queue, default_concurrency_limit=_EVENTS_AT_ONCE)
    return page


def _take_files_only(button: gr.UploadButton) -> None:
    """Refuse addresses in place of a file, which gradio would fetch for whoever sends a request.

    A subclass would do the same, but for each one gradio writes a stub file beside its source.
    """
    move = button.async_move_resource_to_block_cache

    async def move_file(path: Any) -> Any:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("This page fetches no addresses: upload the file.", print_exception=False)
        return await move(path)

    button.async_move_resource_to_block_cache = move_file


def _facts(exported: ExportedModel, limits: Limits, title: str) -> str:
    video = exported.processor.video
    assert video is not None, "load the model with_videos"
    frames = "1 frame" if video.num_frames == 1 else f"{video.num_frames} frames, {video.frames_per_second:g} a second"
    return (
        f"`{title}` on {exported.model.device}. Put images, videos and texts together in any order, and let the model "
        f"continue them. A video becomes {frames}. A file may have up to {limits.upload_mib:g} MiB."
    )


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its ``UserError`` as a message on the page, without a traceback in the console."""

    def call(*arguments: Any) -> Any:
        with _Messages():
            return function(*arguments)

    return call


class _Messages:
    """Turn a ``UserError`` into gradio's error, which stays on the page until it is closed."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UserError):
            raise gr.Error(str(error), duration=None, title="Not possible", print_exception=False) from error


def _pressed(change: Callable[..., Any]) -> Callable[..., Any]:
    """Return the listener of the buttons in a list, which takes the pressed one from the event."""

    def call(conversation: Conversation, event: gr.EventData) -> Any:
        with _Messages():
            try:
                pressed = (event.action, event.place)
            except AttributeError:  # a click beside the buttons
                raise gr.Error("The page has no such button.", print_exception=False) from None
            return change(conversation, *pressed)

    return call


def _streamed(answer: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Return the iterator function with its ``UserError`` as a message on the page."""

    def call(*arguments: Any) -> Iterator[Any]:
        with _Messages():
            yield from answer(*arguments)

    return call
