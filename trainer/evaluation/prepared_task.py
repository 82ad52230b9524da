"""Make the prompts of a task whose files are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from model.processor import TextLayout
from trainer.config.evaluation_tasks import BaseTask, Control, PromptTexts
from trainer.config.scoring_config import ScoringConfig
from trainer.evaluation.controls import OF_DEMONSTRATIONS, control_query, donors, exchanged, replaced, shuffled
from trainer.evaluation.demonstrations import Selector, orders, own_demonstrations
from trainer.evaluation.prompts import Prompt, build_prompt
from trainer.evaluation.query import Query, TaskData


@dataclass(frozen=True)
class Cell:
    """Name what has one score: a task, a number of demonstrations and a control.

    Attributes:
        task: Name of the task.
        shots: Number of demonstrations.
        control: Control; "none" for the real prompts.
    """

    task: str
    shots: int
    control: Control = "none"


@dataclass
class PreparedTask:
    """Hold a task whose files are read, and make its prompts.

    Attributes:
        settings: Settings of the task.
        data: What its files say, with the chosen queries only.
        texts: Texts of the prompts.
        config: Settings of the evaluation.
        select: Draws demonstrations; None where queries bring theirs, or none are needed.
    """

    settings: BaseTask
    data: TaskData
    texts: PromptTexts
    config: ScoringConfig
    select: Selector | None = None
    _selected: dict[str, list[Query]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Key of the task in the report."""
        return self.settings.name

    @property
    def queries(self) -> Sequence[Query]:
        """Queries in the order of the files."""
        return self.data.queries

    @property
    def is_ranked(self) -> bool:
        """Whether answers are ranked; otherwise they are generated."""
        return self.data.queries[0].candidates is not None

    @property
    def brings_demonstrations(self) -> bool:
        """Whether queries bring their own demonstrations."""
        return self.data.queries[0].demonstrations is not None

    @property
    def has_videos(self) -> bool:
        """Whether queries show videos."""
        return any(query.medium is not None and query.medium.kind == "video" for query in self.data.queries)

    @property
    def max_new_tokens(self) -> int:
        """Longest generated answer in tokens."""
        return self.settings.max_new_tokens or self.config.max_new_tokens

    @property
    def shots(self) -> tuple[int, ...]:
        """Numbers of demonstrations, rising; documents have one number."""
        if self.data.kind != "episode" and self.brings_demonstrations:
            return (len(self.data.queries[0].demonstrations or ()),)
        given = self.config.shots if self.settings.shots is None else self.settings.shots
        return tuple(sorted(set(given)))

    @property
    def num_examples(self) -> int:
        """Text-only examples of a prompt without demonstrations; ranked answers need none (paper, section 4)."""
        if self.is_ranked or self.brings_demonstrations:
            return 0
        own = self.settings.zero_shot_examples
        return self.config.zero_shot_examples if own is None else own

    @property
    def most_drawn(self) -> int:
        """Most demonstrations that a prompt draws from the support set."""
        if self.brings_demonstrations:
            return 0
        return max((shots or self.num_examples for shots in self.shots), default=0)

    @property
    def controls(self) -> tuple[Control, ...]:
        """Real prompts first, then the controls."""
        given = self.config.controls if self.settings.controls is None else self.settings.controls
        return ("none", *dict.fromkeys(control for control in given if control != "none"))

    @property
    def cells(self) -> list[Cell]:
        """All cells; controls on demonstrations need demonstrations."""
        return [
            Cell(self.name, shots, control)
            for shots in self.shots
            for control in self.controls
            if shots or control not in OF_DEMONSTRATIONS
        ]

    @cached_property
    def donors(self) -> dict[str, Query]:
        """Another query for each query, by its id."""
        return donors(self.queries, self.config.seed)

    def use_selector(self, select: Selector) -> None:
        """Choose demonstrations with another function from now on."""
        self.select = select
        self._selected.clear()

    def demonstrations(self, query: Query, shots: int) -> list[Query]:
        """Return the demonstrations of a query in the order of the prompt."""
        if query.demonstrations is not None:
            return own_demonstrations(query, shots)
        if not shots:
            return []
        if query.id not in self._selected:
            assert self.select is not None, "the support set is checked"
            self._selected[query.id] = self.select(query, self.most_drawn)
        selected = self._selected[query.id]
        return selected[len(selected) - shots :]

    def prompts(self, cell: Cell, query: Query) -> list[Prompt]:
        """Return the prompt of a query; one for each order of the demonstrations where answers are ranked."""
        shown = self.demonstrations(query, cell.shots)
        match cell.control:
            case "shuffled_demonstrations":
                shown = shuffled(shown, self.config.seed, query.id)
            case "exchanged_demonstrations":
                shown = exchanged(query, shown)
            case "replaced_demonstrations":
                shown = replaced(shown, self.demonstrations(self.donors[query.id], cell.shots))
        asked = query
        if cell.control in ("shuffled_query", "blank"):
            asked = control_query(query, cell.control, self.donors if cell.control == "shuffled_query" else {})
        examples = [] if cell.shots else self.demonstrations(query, self.num_examples)
        count = self.config.orders if self.is_ranked else 1
        return [
            build_prompt(self.texts, self.data.kind, asked, order, examples)
            for order in orders(shown, count, self.config.seed, query.id)
        ]


def answer_ids(layout: TextLayout, texts: PromptTexts, answer: str) -> list[int]:
    """Return the ids of an answer as a demonstration shows it.

    Raises:
        TextError: The answer cannot be encoded.
    """
    return layout.encode_parts([texts.answer.format(answer=answer)])[1:]
