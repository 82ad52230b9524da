"""Give a Flamingo the interface of transformers: ``from_pretrained``, ``forward`` and ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from model.config import FlamingoConfig
from model.factory import build_flamingo
from model.flamingo import Flamingo
from model.generation import generate
from model.imports.hub_code.configuration_flamingo import FlamingoHubConfig
from model.loss import find_target_positions
from model.pretrained import from_pretrained
from model.tokens import SpecialTokenIds

# Of from_pretrained in transformers, without meaning here.
_UNUSED = {
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "code_revision",
    "force_download",
    "low_cpu_mem_usage",
    "proxies",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
}
_NEW_TOKENS = 64  # where nothing says how many
# What generate of the model decides itself, or what other models return.
_NOT_PASSED = {"transformers_version", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "max_length"}


class FlamingoForConditionalGeneration(PreTrainedModel):
    """Continue text with interleaved images and videos.

    Attributes:
        flamingo: Model without transformers' interface.
    """

    config_class = FlamingoHubConfig
    main_input_name = "input_ids"

    def __init__(self, config: FlamingoHubConfig, flamingo: Flamingo | None = None) -> None:
        """Wrap a model; None builds one whose trained parts are at their start."""
        super().__init__(config)
        if flamingo is None:
            settings = FlamingoConfig.from_dict(config.model)
            flamingo = build_flamingo(
                settings, SpecialTokenIds(**config.tokens), dtype=config.dtype or "float32", seed=config.seed
            )
        self.flamingo = flamingo

    @classmethod
    def can_generate(cls) -> bool:
        """Tell transformers' pipelines that there is a ``generate``."""
        return True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        config: FlamingoHubConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        verify_frozen: bool = True,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **others: Any,
    ) -> FlamingoForConditionalGeneration:
        """Load an export, in evaluation mode.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the hub.
            config: Config of the export; None reads it.
            dtype: Type of the parameters; None or "auto" takes the type of the training.
            device_map: One device: "cuda", "cuda:1", "cpu", ``{"": 0}``; "auto" takes a GPU if there is one.
            verify_frozen: Whether frozen weights that differ from those of the training are an error.
            revision: Branch, tag or commit of the repository.
            cache_dir: Folder of the hub's cache.
            token: Token of the hub.
            local_files_only: Whether nothing is downloaded.
            **others: Settings that ``from_pretrained`` of transformers passes on; those that change the model are
                refused.

        Raises:
            ValueError: The folder is no export, the frozen weights differ, or a setting is not supported.
        """
        if unknown := sorted(name for name, value in others.items() if name not in _UNUSED and value is not None):
            raise ValueError(f"from_pretrained: a Flamingo does not take {', '.join(unknown)}; leave it out")
        wanted = dtype if dtype is not None else others.get("torch_dtype")
        folder = find_export(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        flamingo = from_pretrained(
            folder,
            dtype=None if wanted in (None, "auto") else _dtype(wanted),
            device=_single_device(device_map),
            verify_frozen=verify_frozen,
        )
        model = cls(config or FlamingoHubConfig.from_pretrained(folder), flamingo)
        model.config.dtype = next(flamingo.parameters()).dtype
        has_own = (folder / "generation_config.json").is_file()
        model.generation_config = GenerationConfig.from_pretrained(folder) if has_own else GenerationConfig()
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Refuse to save, because the frozen weights and the code stay in the export.

        Raises:
            ValueError: Always; the message says what to do.
        """
        raise ValueError(
            f"save_pretrained({str(save_directory)!r}): copy the export's folder instead, or train with "
            "flamingo-trainer, whose trainer.export writes a new one"
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        media_grids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Return logits, or the mean cross-entropy where there are labels.

        Args:
            input_ids: int64 [B, L]. Each ``<image>`` token is one medium.
            attention_mask: [B, L], 1 for real tokens.
            pixel_values: uint8 [M, F, 3, Y, X], the media of the first row, then those of the second, and so on; with
                ``media_grids`` patches [P, 3, y, x].
            media_grids: int64 [M, 3], frames, rows and columns of patches of each medium.
            labels: int64 [B, L] at their token's own position, -100 where nothing is trained.
        """
        output = self.flamingo(
            input_ids, attention_mask, labels, media=pixel_values, media_grids=_as_grids(media_grids)
        )
        if labels is None:
            return ModelOutput(logits=output.logits)
        return ModelOutput(loss=output.loss / max(1, len(find_target_positions(labels))))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        media_grids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue prompts, greedily unless a setting says otherwise.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 1 for real tokens; padding may lie on either side.
            pixel_values: As for ``forward``.
            media_grids: As for ``forward``.
            generation_config: Settings of the generation; None takes those of the export.
            **settings: Settings of ``transformers.GenerationConfig``, which win.

        Returns:
            Prompts and new tokens, up to the stop token, which is left out; int64 [B * texts, L + new tokens], padded
            at the right.

        Raises:
            ValueError: A setting is unknown or impossible, or prompts and media do not fit each other.
        """
        chosen = {**(generation_config or self.generation_config).to_diff_dict(), **settings}
        chosen = {name: value for name, value in chosen.items() if value is not None and value is not False}
        tokens, length = self.flamingo.tokens, input_ids.shape[1]
        if "max_new_tokens" not in chosen:
            chosen["max_new_tokens"] = chosen["max_length"] - length if "max_length" in chosen else _NEW_TOKENS
        stops = chosen.get("eos_token_id", [tokens.end_of_chunk_id, tokens.eos_id])
        if chosen.pop("return_dict_in_generate", False) is not False:
            raise ValueError("return_dict_in_generate: generate of a Flamingo returns tokens only; leave it out")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[keep].tolist() for row, keep in zip(input_ids.cpu(), mask.cpu().bool(), strict=True)]
        texts = generate(
            self.flamingo,
            prompts,
            pixel_values,
            [prompt.count(tokens.image_id) for prompt in prompts],
            media_grids=_as_grids(media_grids),
            stop_ids=[stops] if isinstance(stops, int) else stops,
            **{name: value for name, value in chosen.items() if name not in _NOT_PASSED},
        )
        longest = max(map(len, texts))
        padded = torch.tensor([text + [tokens.pad_id] * (longest - len(text)) for text in texts], dtype=torch.int64)
        repeated = input_ids.repeat_interleave(len(texts) // len(prompts), 0)
        return torch.cat([repeated, padded.view(len(texts), longest).to(input_ids.device)], 1)


def find_export(name: str | Path, **hub_settings: Any) -> Path:
    """Return the folder of an export: the folder itself, or that of a repository in the hub's cache.

    Args:
        name: Folder or repository.
        **hub_settings: Settings of ``huggingface_hub.snapshot_download``.
    """
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), **hub_settings))


def _as_grids(media_grids: Tensor | None) -> tuple[tuple[int, int, int], ...] | None:
    if media_grids is None:
        return None
    return tuple((int(frames), int(rows), int(columns)) for frames, rows, columns in media_grids.tolist())


def _dtype(value: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {value!r}: set one of torch's floating types, such as 'bfloat16'")
    return found


def _single_device(device_map: Any) -> torch.device:
    """Return the device that a map names.

    Raises:
        ValueError: It names several devices, or parts of the model.
    """
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device_map {device_map!r}: a Flamingo lies on one device; set 'auto', 'cpu', 'cuda' or 'cuda:N'"
        ) from None
