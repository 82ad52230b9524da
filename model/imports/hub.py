"""Turn an export of this project into one that transformers loads alone (``trust_remote_code=True``).

It is still an export of this project, which every command here takes. It also has the code of the model: the files of
``model/imports/hub_code`` and the modules of ``model`` that they import, with relative imports. transformers copies
only files that lie beside each other, so the names leave out the folders of ``model``.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from model.config import FlamingoConfig, LanguageModelConfig, SpecialTokensConfig, VisionEncoderConfig
from model.imports.tensor_map import write_shards
from model.loading_errors import explain_loading
from model.pretrained import describe_export, load_exported_tokenizer, moved_config, trained_files
from model.processor import PROCESSOR_FILE
from model.tower_statistics import TIMM
from model.transformers_tower import TRANSFORMERS, tensor_places
from model.vision_encoder import build_tower

_Changes = dict[str, Any]  # of a frozen part's settings

SHARD_BYTES = 5_000_000_000
_ROOT = Path(__file__).parents[2]
_CODE = "model.imports.hub_code"
_ENTRIES = ("configuration_flamingo", "modeling_flamingo", "processing_flamingo")
_STAND_INS = {"model.ops": f"{_CODE}.ops"}  # plain torch, without the kernels and what loads them
_IMPORT = re.compile(r"^(\s*from )(model[\w.]*)( import )(.*)$", re.MULTILINE)
_AUTO_MAP = {
    "AutoConfig": "configuration_flamingo.FlamingoHubConfig",
    "AutoModelForImageTextToText": "modeling_flamingo.FlamingoForConditionalGeneration",
    "AutoProcessor": "processing_flamingo.FlamingoProcessor",
}
_LANGUAGE_MODEL, _VISION = "language_model", "vision"  # folders of the frozen parts
_LM_FILES = ["*.json", "*.safetensors"]
_OWN_CONFIG = ("local-dir:", "hf-hub:")  # of open_clip: folders with an open_clip_config.json
_SETTINGS = ("config.json", "generation_config.json", PROCESSOR_FILE)


def write_hub_export(
    export: Path, output: Path, *, include_frozen: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write an export that transformers loads alone. Weights pass through memory one file of them at a time.

    Args:
        export: Export of this project.
        output: Folder to write, which exists.
        include_frozen: Whether the frozen parts are copied too. Otherwise config.json names them, with the revision
            that this machine has; their digests are in either case checked when the export is loaded.
        shard_bytes: Most bytes of a file with weights.

    Raises:
        ValueError: ``export`` is none, or a frozen part cannot be read.
    """
    config = describe_export(export).config
    description = json.loads((export / "config.json").read_text(encoding="utf-8"))
    write_shards(output, _stream(trained_files(export)), shard_bytes)
    for name in ("frozen.json", PROCESSOR_FILE):
        shutil.copy(export / name, output / name)
    if (export / "adapter").is_dir():
        shutil.copytree(export / "adapter", output / "adapter")
    tokens = load_exported_tokenizer(export)
    tokens.tokenizer.save_pretrained(output)
    (output / "chat_template.jinja").write_text(chat_template(config.tokens))
    GenerationConfig(
        max_new_tokens=64,
        eos_token_id=[tokens.end_of_chunk_id, tokens.eos_id],
        pad_token_id=tokens.pad_id,
        bos_token_id=tokens.bos_id,
    ).save_pretrained(output)
    revision = pinned_revision(config.language_model)
    language_model, vision = _Changes() if revision is None else {"revision": revision}, _Changes()
    if include_frozen:
        language_model = _include_language_model(config.language_model, output, shard_bytes)
        vision = _include_vision(config.vision, output, shard_bytes)
    moved = moved_config(export, output)
    moved = replace(
        moved,
        language_model=replace(moved.language_model, tokenizer=".", **language_model),
        vision=replace(moved.vision, **vision),
    )
    description |= {
        "model": moved.to_dict(),
        "model_type": "flamingo",
        "architectures": ["FlamingoForConditionalGeneration"],
        "auto_map": _AUTO_MAP,
        "transformers_version": transformers.__version__,
    }
    (output / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    processor = {"processor_class": "FlamingoProcessor", "auto_map": {"AutoProcessor": _AUTO_MAP["AutoProcessor"]}}
    (output / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    write_code(output)


def chat_template(tokens: SpecialTokensConfig) -> str:
    """Return the jinja template of a conversation: media where they stand, and an end after each answer."""
    end = f"{{% if message['role'] == 'assistant' %}}{{{{ {tokens.end_of_chunk!r} }}}}{{% endif %}}"
    return (
        "{% for message in messages %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {tokens.image!r} }}}}"
        "{% elif part['type'] == 'video' %}{{ '<video>' }}"
        "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        f"{end}"
        "{% endfor %}"
    )


def local_parts(config: FlamingoConfig, folder: Path) -> list[str]:
    """Return the settings that name a folder outside ``folder``, which another machine does not have."""
    vision = config.vision.name.removeprefix("local-dir:").removeprefix(TRANSFORMERS)
    named = {
        "language_model.name": config.language_model.name,
        "vision.name": vision,
        "vision.pretrained": config.vision.pretrained,
    }
    return [
        f"{setting} {name}"
        for setting, name in named.items()
        if name is not None
        and (folder / name).exists()
        and not (folder / name).resolve().is_relative_to(folder.resolve())
    ]


def pinned_revision(config: LanguageModelConfig) -> str | None:
    """Return the commit of the language model that this machine has; None for a local folder or an unknown commit."""
    if config.name is None or Path(config.name).exists():
        return None
    path = try_to_load_from_cache(config.name, "config.json", revision=config.revision or "main")
    return Path(path).parent.name if isinstance(path, str) else None


def write_code(folder: Path) -> None:
    """Write the modules that ``_ENTRIES`` import, directly or not, with relative imports, into one folder."""
    for module in _closure(f"{_CODE}.{name}" for name in _ENTRIES):
        text = _IMPORT.sub(_relative_import, _source(module).read_text(encoding="utf-8"))
        (folder / f"{_file_name(module)}.py").write_text(text)


def _closure(modules: Iterable[str]) -> list[str]:
    """Return modules and all modules of ``model`` that they import."""
    found: dict[str, None] = {}
    pending = list(modules)
    while pending:
        module = pending.pop()
        if module not in found:
            found[module] = None
            pending += _imports(module)
    names = [_file_name(module) for module in found]
    assert len(set(names)) == len(names), "two modules would be written to one file"
    return list(found)


def _imports(module: str) -> Iterator[str]:
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "model":
            if node.module == "model":
                yield from (f"model.{alias.name}" for alias in node.names)
            else:
                yield _STAND_INS.get(node.module, node.module)


def _relative_import(found: re.Match[str]) -> str:
    before, module, between, names = found.groups()
    return f"{before}.{'' if module == 'model' else _file_name(_STAND_INS.get(module, module))}{between}{names}"


def _file_name(module: str) -> str:
    return module.rpartition(".")[2]


def _source(module: str) -> Path:
    path = _ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _stream(files: Iterable[Path], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of files whose names begin with ``prefix``, one after the other."""
    for path in files:
        with explain_loading(str(path)), safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                if name.startswith(prefix):
                    yield name, opened.get_tensor(name)


def _include_language_model(config: LanguageModelConfig, output: Path, shard_bytes: int) -> _Changes:
    """Copy the language model, and return its new name. One without a name is drawn again from its seed."""
    if config.name is None:
        return {}
    with explain_loading(f"language_model.name {config.name!r}"):
        folder = _folder(config.name, config.revision)
    target = output / _LANGUAGE_MODEL
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"language_model.name {config.name!r} has no .safetensors file; pickled weights are not read")
    write_shards(target, _stream(files), shard_bytes)
    _copy_settings(folder, target)
    return {"name": _LANGUAGE_MODEL, "revision": None}


def _include_vision(config: VisionEncoderConfig, output: Path, shard_bytes: int) -> _Changes:
    """Copy the image tower, without its CLIP's text tower, and return its new name. A random one is drawn again."""
    target = output / _VISION
    if config.name.startswith(TRANSFORMERS):
        if config.architecture is not None:
            return {}
        return _include_transformers_tower(config, target, shard_bytes)
    has_own_config = config.name.startswith(_OWN_CONFIG)
    if config.pretrained is None and not has_own_config:
        return {}
    tower: Any = build_tower(config)
    tower = tower.trunk if config.name.startswith(TIMM) else tower
    write_shards(target, tower.state_dict().items(), 2**62)  # one file, as vision.pretrained names one
    changes: _Changes = {"pretrained": f"{_VISION}/model.safetensors"}
    if has_own_config:
        (target / "open_clip_config.json").write_text(json.dumps(_open_clip_config(config.name), indent=2) + "\n")
        changes["name"] = f"local-dir:{_VISION}"
    return changes


def _open_clip_config(name: str) -> dict[str, Any]:
    kind, _, place = name.partition(":")
    folder = Path(place) if kind == "local-dir" else Path(snapshot_download(place, allow_patterns=["*.json"]))
    found: dict[str, Any] = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    return found


def _include_transformers_tower(config: VisionEncoderConfig, target: Path, shard_bytes: int) -> _Changes:
    with explain_loading(f"vision.name {config.name!r}"):
        folder = _folder(config.name.removeprefix(TRANSFORMERS), None)
    places = tensor_places(folder.glob("*.safetensors"))
    prefixes = ("vision_model.", "model.vision_model.", "model.vision_tower.", "vision_tower.")
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in places)), "")
    write_shards(target, _stream(sorted(set(places.values())), prefix), shard_bytes)
    _copy_settings(folder, target)
    return {"name": f"{TRANSFORMERS}{_VISION}"}


def _folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=_LM_FILES))


def _copy_settings(folder: Path, target: Path) -> None:
    for name in _SETTINGS:
        if (folder / name).is_file():
            shutil.copy(folder / name, target / name)
