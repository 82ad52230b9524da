"""Choose the reader of each kind of task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.config import evaluation_tasks as settings
from trainer.evaluation.query import TaskData
from trainer.evaluation.tasks import captions, choices, own_layouts, questions
from trainer.evaluation.tasks.findings import Findings

Reader = Callable[[Any, Findings], TaskData]

READERS: dict[type[settings.BaseTask], Reader] = {
    settings.CocoTask: captions.read_coco,
    settings.KarpathyTask: captions.read_karpathy,
    settings.VqaTask: questions.read_vqa,
    settings.TextVqaTask: questions.read_textvqa,
    settings.VizWizTask: questions.read_vizwiz,
    settings.GqaTask: questions.read_gqa,
    settings.ImageFolderTask: choices.read_image_folder,
    settings.HatefulMemesTask: choices.read_hateful_memes,
    settings.VideoQaTask: choices.read_video_qa,
    settings.ShardsTask: own_layouts.read_shards,
    settings.EpisodesTask: own_layouts.read_episodes,
}


def read_task(task: settings.BaseTask, findings: Findings) -> TaskData:
    """Read the files of a task; what is wrong with them goes to the findings."""
    return READERS[type(task)](task, findings)
