"""Check what the language model's architecture and files tell before anything loads: positions, vocabulary, weights.

Only JSON files of local folders are read. A model on the hub is checked when it is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.checks.missing_libraries import quantization_obstacle
from trainer.config.run_config import FlamingoRunConfig, LanguageModelRunConfig, RunConfig
from trainer.errors import Problem

# Positions of families with a table of positions, where an architecture does not say them. Rotary families have none.
_TABLES_OF_POSITIONS = {
    "biogpt": 1024,
    "codegen": 2048,
    "ctrl": 256,
    "gpt2": 1024,
    "gpt_bigcode": 1024,
    "gpt_neo": 2048,
    "gptj": 2048,
    "openai-gpt": 512,
    "opt": 2048,
}
_POSITIONS = ("n_positions", "max_position_embeddings")
# Files from which transformers builds a fast tokenizer where tokenizer.json is missing.
_VOCABULARIES = ("*.model", "vocab.*", "merges.txt", "tekken.json", "*.tiktoken")


@dataclass(frozen=True)
class _LanguageModel:
    """Hold what is known of a language model before it loads.

    Attributes:
        setting: Setting that names the model.
        values: Its Hugging Face config; empty if it is not known.
        source: Where ``values`` come from.
    """

    setting: str
    values: dict[str, Any]
    source: str


def architecture_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of a language model that the YAML describes (``architecture``)."""
    if isinstance(config, LanguageModelRunConfig):
        yield from _position_problems(config, _LanguageModel("architecture", config.architecture, "architecture"))
    if isinstance(config, FlamingoRunConfig):
        architecture = config.model.language_model.architecture
        if architecture is not None:
            setting = "model.language_model.architecture"
            yield from _position_problems(config, _LanguageModel(setting, architecture, setting))


def language_model_file_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems that the files of a local language model and its tokenizer show."""
    if not isinstance(config, FlamingoRunConfig):
        return
    language = config.model.language_model
    setting = "model.language_model.architecture"
    model = _LanguageModel(setting, language.architecture or {}, setting)
    if language.name is not None and language.architecture is None and Path(language.name).is_dir():
        folder = Path(language.name)
        values, problem = _read_json(folder / "config.json")
        if problem is not None:
            yield Problem("model.language_model.name", problem)
        model = _LanguageModel("model.language_model.name", values, str(folder / "config.json"))
        yield from _position_problems(config, model)
        yield from _weight_problems(folder)
    yield from _quantization_problems(model)
    name = language.tokenizer or language.name
    if name is not None and Path(name).is_dir():
        path = f"model.language_model.{'tokenizer' if language.tokenizer else 'name'}"
        yield from _tokenizer_problems(path, Path(name), model, config)


def _text_config(values: dict[str, Any]) -> dict[str, Any]:
    below = values.get("text_config")
    return below if isinstance(below, dict) else values


def _position_problems(config: RunConfig, model: _LanguageModel) -> Iterator[Problem]:
    values = _text_config(model.values)
    known = _TABLES_OF_POSITIONS.get(str(values.get("model_type")))
    if known is None:
        return
    name, positions = next(((key, values[key]) for key in _POSITIONS if key in values), (_POSITIONS[0], known))
    if not isinstance(positions, int):
        return
    for index, source in enumerate(config.data.sources):
        if source.max_tokens > positions:
            message = (
                f"{source.max_tokens} is more than the {positions} positions of the language model ({name} of "
                f"{model.source}); set at most {positions}"
            )
            yield Problem(f"data.sources.{index}.max_tokens", message, related=(model.setting,))


def _weight_problems(folder: Path) -> Iterator[Problem]:
    if any(folder.glob("*.safetensors")):
        return
    message = f"{folder} has no *.safetensors; other formats of weights are not read"
    if any(folder.glob("*.bin")):
        message += ": load its *.bin with transformers and call save_pretrained once"
    yield Problem("model.language_model.name", message)


def _quantization_problems(model: _LanguageModel) -> Iterator[Problem]:
    quantization = model.values.get("quantization_config")
    if isinstance(quantization, dict):
        reason = quantization_obstacle(str(quantization.get("quant_method")))
        if reason is not None:
            yield Problem(model.setting, f"{model.source}: {reason}")


def _tokenizer_problems(path: str, folder: Path, model: _LanguageModel, config: FlamingoRunConfig) -> Iterator[Problem]:
    if not (folder / "tokenizer.json").is_file():
        if not any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern)):
            message = (
                f"{folder} has no tokenizer.json, and no vocabulary to make it from: the trainer needs a fast "
                "tokenizer, not one that is pure Python; take another language model"
            )
            yield Problem(path, message)
        return
    values, problem = _read_json(folder / "tokenizer.json")
    if problem is not None:
        yield Problem(path, problem)
        return
    table = _text_config(model.values).get("vocab_size")
    if not isinstance(table, int):
        return
    settings, _ = _read_json(folder / "tokenizer_config.json")
    added = {config.model.tokens.image, config.model.tokens.end_of_chunk}
    beyond = {token: number for token, number in _used_ids(values, settings).items() if number >= table}
    beyond = {token: number for token, number in beyond.items() if token not in added}
    if beyond:
        token, number = max(beyond.items(), key=lambda item: item[1])
        message = (
            f"{folder} has {len(beyond)} tokens beyond the language model's table of {table} (vocab_size of "
            f"{model.source}), such as {token!r} with id {number}; take the tokenizer that belongs to the model"
        )
        yield Problem(path, message, related=(model.setting,))


def _used_ids(tokenizer: dict[str, Any], settings: dict[str, Any]) -> dict[str, int]:
    """Return the ids that a row may hold; special tokens never come from text, but begin, end and fill rows."""
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):  # Unigram: [token, score] in the order of the ids
        vocab = {str(entry[0]): number for number, entry in enumerate(vocab)}
    entries = [entry for entry in tokenizer.get("added_tokens") or [] if isinstance(entry, dict)]
    row_tokens = {_content(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    added = {
        str(entry.get("content")): int(entry.get("id", -1))
        for entry in entries
        if not entry.get("special") or entry.get("content") in row_tokens
    }
    specials = {str(entry.get("content")) for entry in entries if entry.get("special")} - row_tokens
    return {token: number for token, number in {**vocab, **added}.items() if token not in specials}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the object in a JSON file, or what is wrong with the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path.parent} has no {path.name}"
    except (ValueError, OSError) as error:
        return {}, f"{path} is not a readable JSON file: {error}"
    return (values, None) if isinstance(values, dict) else ({}, f"{path} must hold a JSON object")
