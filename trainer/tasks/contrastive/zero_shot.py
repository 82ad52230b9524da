"""Test towers on data that they were not trained on: classification by captions, and retrieval in both directions.

All ranks take part. Each image and caption is encoded once; every rank makes equally many forward passes, as ZeRO-3
needs, and throws away what it encoded twice for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.config.contrastive_config import ClassificationConfig, RetrievalConfig, ZeroShotConfig
from trainer.data.errors import SampleError
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.runtime.distributed import World, failing_together, sum_over_ranks
from trainer.tasks.contrastive.captions import Tokenize
from trainer.tasks.contrastive.zero_shot_data import read_classification, read_retrieval

_RECALLS = (1, 5, 10)
_ROWS = 1024  # of similarities in memory at a time

Item = TypeVar("Item")
# Returns the normalized features of uint8 images [B, 1, 3, height, width] (the first argument) or of tokens.
Encode = Callable[[Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class ZeroShot:
    """Run the zero-shot tests of a configuration.

    Attributes:
        config: Settings of the tests.
        tokenize: Caption -> int64 [context length].
        decoder: Decoder of the images, without augmentation.
        world: Processes that share the work.
    """

    config: ZeroShotConfig
    tokenize: Tokenize
    decoder: ImageDecoder
    world: World

    def scores(self, encode: Encode) -> dict[str, float]:
        """Return the score of each test, the same on every rank; a collective.

        Args:
            encode: Encodes images or captions; called equally often on every rank, without gradients.

        Raises:
            ValueError: Data cannot be read.
        """
        scores: dict[str, float] = {}
        for test in self.config.classification:
            scores |= {f"{test.name}/{key}": value for key, value in self._classify(test, encode).items()}
        for retrieval in self.config.retrieval:
            scores |= {f"{retrieval.name}/{key}": value for key, value in self._retrieve(retrieval, encode).items()}
        return scores

    def _classify(self, test: ClassificationConfig, encode: Encode) -> dict[str, float]:
        with failing_together(self.world):
            data = read_classification(test)
        texts = [template.replace("{}", name) for name in data.class_names for template in test.templates]
        text_KTD = self._gathered(self._text_features(texts, encode), len(texts)).unflatten(
            0, (len(data.class_names), -1)
        )
        # open_clip's classifier: the normalized mean of the captions' normalized features.
        mean_KD = text_KTD.mean(1)
        classes_KD = mean_KD / mean_KD.norm(dim=1, keepdim=True)
        image_ND = self._image_features(data.files, encode)
        labels_N = torch.tensor(self._own(data.labels), dtype=torch.int64, device=image_ND.device)
        logits_NK = image_ND @ classes_KD.T
        best_NT = logits_NK.topk(min(5, len(data.class_names)), dim=1).indices
        hits_NT = best_NT == labels_N[:, None]
        top_1, top_5 = sum_over_ranks([float(hits_NT[:, :1].sum()), float(hits_NT.sum())], self.world)
        return {"top_1": top_1 / len(data.files), "top_5": top_5 / len(data.files)}

    def _retrieve(self, test: RetrievalConfig, encode: Encode) -> dict[str, float]:
        with failing_together(self.world):
            data = read_retrieval(test)
        own_image_ND = self._image_features(data.files, encode)
        own_text_CD = self._text_features(data.captions, encode)
        image_ID = self._gathered(own_image_ND, len(data.files))
        text_TD = self._gathered(own_text_CD, len(data.captions))
        device = image_ID.device
        image_of_T = torch.tensor(data.image_of, device=device)
        own_images_N = torch.tensor(self._own(range(len(data.files))), device=device)
        own_texts_C = torch.tensor(self._own(range(len(data.captions))), device=device)
        image_hits = _hits(own_image_ND, text_TD, own_images_N, image_of_T)
        text_hits = _hits(own_text_CD, image_ID, image_of_T[own_texts_C], torch.arange(len(data.files), device=device))
        sums = sum_over_ranks([*image_hits, *text_hits], self.world)
        scores = {}
        for number, recall in enumerate(_RECALLS):
            scores[f"image_to_text_recall_{recall}"] = sums[number] / len(data.files)
            scores[f"text_to_image_recall_{recall}"] = sums[len(_RECALLS) + number] / len(data.captions)
        return scores

    def _own(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.world.rank :: self.world.size]

    def _text_features(self, texts: Sequence[str], encode: Encode) -> Tensor:
        return self._encoded(texts, self.tokenize, lambda tokens: encode(None, tokens))

    def _image_features(self, files: Sequence[Path], encode: Encode) -> Tensor:
        return self._encoded(files, self._decode, lambda media: encode(media, None))

    def _decode(self, file: Path) -> Tensor:
        try:
            return self.decoder(file.read_bytes())[None]
        except (OSError, SampleError) as error:
            raise ValueError(f"zero_shot: {file} cannot be read: {error}") from error

    def _encoded(
        self, items: Sequence[Item], load: Callable[[Item], Tensor], encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the features of this rank's items, float32 [n, dim]."""
        own, size = self._own(items), self.config.batch_size
        features = []
        passes = math.ceil(math.ceil(len(items) / self.world.size) / size)
        for number in range(passes):
            with failing_together(self.world):
                # A rank whose items have ended encodes the first item again.
                chosen = own[number * size : (number + 1) * size] or items[:1]
                inputs = torch.stack([load(item) for item in chosen])
            features.append(encode(inputs.to(self.world.device)).float())
        return torch.cat(features)[: len(own)]

    def _gathered(self, own_ND: Tensor, total: int) -> Tensor:
        """Return the features of all ranks' items in their order."""
        world = self.world
        if world.size == 1:
            return own_ND
        padded = F.pad(own_ND, (0, 0, 0, -(-total // world.size) - len(own_ND)))
        parts = [torch.empty_like(padded) for _ in range(world.size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def _hits(query_QD: Tensor, key_KD: Tensor, group_Q: Tensor, group_K: Tensor) -> list[float]:
    """Return how many queries have a key of their own group among the best 1, 5 and 10 keys."""
    hits = torch.zeros(len(_RECALLS), device=query_QD.device)
    for start in range(0, len(query_QD), _ROWS):
        rows = slice(start, start + _ROWS)
        similarity_QK = query_QD[rows] @ key_KD.T
        own_QK = group_Q[rows, None] == group_K[None]
        best_Q = similarity_QK.masked_fill(~own_QK, -torch.inf).amax(1)
        better_Q = (similarity_QK > best_Q[:, None]).sum(1)
        hits += torch.stack([(better_Q < recall).sum() for recall in _RECALLS])
    return [float(count) for count in hits]
