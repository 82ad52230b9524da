"""Do what the events of the page ask for, without gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trainer.demo_page.answers import Prompt, encode, look_up_attention, stream_tokens
from trainer.demo_page.conversation import Action, Conversation
from trainer.demo_page.limits import Limits, UserError
from trainer.demo_page.markup import examples_markup, message_markup, pieces_markup, words_markup
from trainer.demo_page.uploads import read_uploads
from trainer.prompting.exported_model import ExportedModel

WAITING = message_markup("Each generated word appears here, with the image that the model looked at.")


@dataclass(frozen=True)
class Handlers:
    """Hold the model; each method takes the values of components, and returns the new values of others.

    Attributes:
        exported: Model that answers.
        limits: Limits of the page.
        warn: Shows a message to the user.
    """

    exported: ExportedModel
    limits: Limits
    warn: Callable[[str], object]

    def add_text(self, conversation: Conversation, text: str) -> tuple[Conversation, str, str]:
        """Add a text to the prompt, and empty the field in which it was typed."""
        changed = conversation.add_text(text)
        return changed, pieces_markup(changed), ""

    def add_files(self, conversation: Conversation, files: Sequence[str] | None) -> tuple[Conversation, str]:
        """Add uploaded files to the prompt, and warn of those that cannot be used.

        Raises:
            UserError: No file can be used, or there are too many.
        """
        pieces, messages = read_uploads(files or (), self.exported.processor, self.limits.upload_mib)
        if messages and not pieces:
            raise UserError(" ".join(messages))
        if len(conversation.media()) + len(pieces) > self.limits.media:
            raise UserError(f"At most {self.limits.media} images and videos are taken here: delete some first.")
        for message in messages:
            self.warn(message)
        changed = conversation.add(pieces)
        return changed, pieces_markup(changed)

    def change_pieces(self, conversation: Conversation, action: object, place: object) -> tuple[Conversation, str]:
        """Move or delete a piece of the prompt."""
        changed = conversation.change_pieces(*_button(action, place))
        return changed, pieces_markup(changed)

    def change_examples(
        self, conversation: Conversation, action: object, place: object
    ) -> tuple[Conversation, str, str]:
        """Move or delete an example, which also changes the numbers of the prompt's images."""
        changed = conversation.change_examples(*_button(action, place))
        return changed, examples_markup(changed), pieces_markup(changed)

    def answer(
        self, conversation: Conversation, new_tokens: float, sample: bool, temperature: float, top_p: float
    ) -> Iterator[tuple[str, str]]:
        """Yield the answer as it grows, and at last its words with their attention.

        Raises:
            UserError: The prompt cannot be answered.
        """
        prompt = encode(self.exported, conversation, self.limits)
        if not 1 <= new_tokens <= self.limits.new_tokens:
            raise UserError(f"New tokens: choose a number from 1 to {self.limits.new_tokens}.")
        sampling = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p)} if sample else {}
        tokens: list[int] = []
        yield "", message_markup("The model reads the prompt …")
        for token in stream_tokens(self.exported, prompt, int(new_tokens), sampling):
            tokens.append(token)
            yield self._text(tokens), message_markup("The model writes …")
        if not tokens:
            yield "", message_markup("The model ended the text at once: it wrote no word.")
            return
        yield self._text(tokens), message_markup("The attention is looked up …")
        yield self._text(tokens), self._words(prompt, tokens)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.exported.layout.tokenizer.decode(list(tokens)).strip()

    def _words(self, prompt: Prompt, tokens: Sequence[int]) -> str:
        try:
            return words_markup(look_up_attention(self.exported, prompt, tokens), prompt.pieces)
        except UserError as error:  # the answer stands without it
            return message_markup(str(error))

    def keep_as_example(self, conversation: Conversation, answer: str) -> tuple[Conversation, str, str, str, str]:
        """Move prompt and answer to the examples."""
        changed = conversation.keep_as_example(answer)
        return changed, pieces_markup(changed), examples_markup(changed), "", WAITING

    def append_answer(self, conversation: Conversation, answer: str) -> tuple[Conversation, str, str, str]:
        """Put the answer at the end of the prompt, so that the user can go on.

        Raises:
            UserError: There is no answer.
        """
        if not answer.strip():
            raise UserError("There is no answer to go on from.")
        changed = Conversation(conversation.with_answer(answer), conversation.examples)
        return changed, pieces_markup(changed), "", WAITING

    def clear_prompt(self, conversation: Conversation) -> tuple[Conversation, str, str, str]:
        """Empty prompt and answer; the examples stay."""
        changed = Conversation((), conversation.examples)
        return changed, pieces_markup(changed), "", WAITING

    def stop(self) -> str:
        """Say that the answer was stopped; closing the iterator of ``answer`` stops it."""
        return message_markup("Stopped. A whole answer shows where the model looked.")


def _button(action: object, place: object) -> tuple[Action, int]:
    """Return action and place of a pressed button.

    Raises:
        UserError: A request names a button that the page does not have.
    """
    if action not in ("earlier", "later", "delete") or not isinstance(place, int):
        raise UserError("The page has no such button.")
    return action, place
