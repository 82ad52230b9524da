"""Imports keep every tensor, and refuse what they cannot read safely or express."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.imports.convert import FAMILIES, Choices, export_transformers, import_transformers
from model.imports.tensor_map import write_shards
from model.pretrained import from_pretrained, save_flamingo
from tests.model.builders import BEYOND, tiny_flamingo, tiny_tokenizer
from tests.model.imports.sources import tiny_idefics, tiny_mllama, write_source

BUILDERS: dict[str, Callable[..., Any]] = {"idefics": tiny_idefics, "mllama": tiny_mllama}


@pytest.fixture(scope="module", params=BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``source/`` and its import, ``export/``."""
    folder = tmp_path_factory.mktemp(family)
    write_source(BUILDERS[family](), folder / "source")
    import_transformers(folder / "source", folder / "export", Choices())
    return folder


def test_names_and_values_are_identical_there_and_back(folders: Path, family: str) -> None:
    export_transformers(folders / "export", FAMILIES[family], folders / "back")
    before, after = (load_file(folders / name / "model.safetensors") for name in ("source", "back"))
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    configs = [json.loads((folders / name / "config.json").read_text()) for name in ("source", "back")]
    assert configs[0] == configs[1]
    import_transformers(folders / "back", folders / "again", Choices())
    first, second = (load_file(folders / name / "model.safetensors") for name in ("export", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_an_export_moves_with_its_parts(folders: Path, tmp_path: Path) -> None:
    (folders / "export").rename(tmp_path / "moved")
    model = from_pretrained(tmp_path / "moved")
    assert str(tmp_path) in (model.config.language_model.name or "")
    (tmp_path / "moved").rename(folders / "export")


def test_parts_may_be_named_instead_of_copied(folders: Path, tmp_path: Path) -> None:
    parts = folders / "export"
    choices = Choices(language_model=str(parts / "language_model"), vision=str(parts / "vision"))
    model = import_transformers(folders / "source", tmp_path / "named", choices)
    assert not (tmp_path / "named/language_model").exists()
    assert not (tmp_path / "named/vision").exists()
    assert model.config.language_model.name == str(parts / "language_model")
    other = folders / "other"
    lm = load_file(parts / "language_model/model.safetensors")
    write_shards(other, ((name, tensor + 1) for name, tensor in lm.items()))
    (other / "config.json").write_text((parts / "language_model/config.json").read_text())
    with pytest.raises(ValueError, match=r"--language-model .* has other weights .* Leave it out"):
        import_transformers(folders / "source", tmp_path / "wrong", Choices(language_model=str(other)))


def test_without_the_source_the_config_is_built_from_ours(folders: Path, family: str, tmp_path: Path) -> None:
    """Configurations of a model that was never imported load the same tensors in transformers' class."""
    source = folders / "export/source"
    source.rename(tmp_path / "source")
    try:
        export_transformers(folders / "export", FAMILIES[family], tmp_path / "back")
    finally:
        (tmp_path / "source").rename(source)
    before = BUILDERS[family]()
    after, report = type(before).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    different = [
        name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])
    ]
    assert different == ([] if family == "idefics" else ["model.language_model.embed_tokens.weight"])  # unused rows


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((100,), float(number)) for number in range(5)}
    write_shards(tmp_path, tensors.items(), limit=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == 2000
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def damage(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a source with other tensors."""
    target.mkdir()
    for path in (folder / "source").iterdir():
        if path.suffix == ".json":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "source/model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_bad_tensors_are_named(folders: Path, tmp_path: Path) -> None:
    def missing(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if "k_proj" in name and "cross_attn" in name)]

    def extra(tensors: dict[str, Any]) -> None:
        tensors["extra.weight"] = torch.zeros(1)

    def narrow(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if "cross_attn.o_proj" in name)
        tensors[name] = tensors[name][:-1].contiguous()

    def another(tensors: dict[str, Any]) -> None:
        tensors.clear()
        tensors["transformer.h.0.weight"] = torch.zeros(1)

    for change, message in (
        (missing, r"1 tensors missing \['model\..*k_proj.weight'\], 0 unexpected"),
        (extra, r"0 tensors missing \[\], 1 unexpected \['extra.weight'\]"),
        (narrow, r"1 of another shape \['.*o_proj.weight \[31, 32\] instead of \[32, 32\]'\]"),
        (another, r"holds no tensor of .*transformer\.h\.0.*another family or generation"),
    ):
        source = damage(folders, tmp_path / change.__name__, change)
        with pytest.raises(ValueError, match=message):
            import_transformers(source, tmp_path / "out", Choices())


def test_another_size_is_named(tmp_path: Path) -> None:
    folder = write_source(tiny_idefics(), tmp_path / "source")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 6}))
    with pytest.raises(ValueError, match=r"does not fit its config.json as IDEFICS: \d+ tensors missing"):
        import_transformers(folder, tmp_path / "out", Choices())


def test_folders_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"it has no config.json"):
        import_transformers(tmp_path / "empty", tmp_path / "out", Choices())
    (tmp_path / "empty/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        import_transformers(tmp_path / "empty", tmp_path / "out", Choices())
    (tmp_path / "empty/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type 'llama'; models of idefics, mllama"):
        import_transformers(tmp_path / "empty", tmp_path / "out", Choices())


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write_source(tiny_idefics(), tmp_path / "source")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match=r"no .safetensors file; it has the pickled files \['pytorch_model.bin'\]"):
        import_transformers(folder, tmp_path / "out", Choices())
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be loaded"):
        import_transformers(folder, tmp_path / "out", Choices())


def test_a_tokenizer_without_the_tokens_is_named(tmp_path: Path) -> None:
    folder = write_source(tiny_mllama(), tmp_path / "source")
    tiny_tokenizer(eos_token="</s>").save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"lacks the tokens \['<\|image\|>'\] of mllama: .*--tokenizer"):
        import_transformers(folder, tmp_path / "out", Choices(tokenizer=str(tmp_path / "tokenizer")))


def test_only_llama_leaks(tmp_path: Path) -> None:
    folder = write_source(tiny_idefics(), tmp_path / "source")
    with pytest.raises(ValueError, match=r"--without-media all_media: only Llama 3.2 Vision"):
        import_transformers(folder, tmp_path / "out", Choices(without_media="all_media"))


def test_cross_attentions_must_be_evenly_spaced(tmp_path: Path) -> None:
    folder = write_source(tiny_mllama(cross_attention_layers=[1, 2, 5]), tmp_path / "source")
    with pytest.raises(ValueError, match=r"stand before the blocks \[1, 1, 3\] of 3"):
        import_transformers(folder, tmp_path / "out", Choices())


def test_models_that_a_family_cannot_express(folders: Path, family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    tokenizer.add_tokens(["<image>", "<|endofchunk|>"], special_tokens=True)
    save_flamingo(tmp_path / "own", tiny_flamingo(tokens=BEYOND), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=rf"cannot be written as {family}: its tower .* Use --format native"):
        export_transformers(tmp_path / "own", FAMILIES[family], tmp_path / "back")
    other = next(name for name in FAMILIES if name != family)
    with pytest.raises(
        ValueError, match=r"cannot be written as .*: the tower is '.*' instead of '.*'; resampler.kind is"
    ):
        export_transformers(folders / "export", FAMILIES[other], tmp_path / "back")
    shutil.copytree(folders / "export", tmp_path / "changed")
    description = json.loads((tmp_path / "changed/config.json").read_text())
    description["model"]["cross_attention"]["attend"] = "all"
    (tmp_path / "changed/config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"has no setting for: cross_attention.attend 'all' instead of 'one'\. Use"):
        export_transformers(tmp_path / "changed", FAMILIES[family], tmp_path / "back")
    with pytest.raises(ValueError, match=r"is not an exported Flamingo"):
        export_transformers(folders / "source", FAMILIES[family], tmp_path / "back")


def test_a_tower_of_another_kind_is_named(folders: Path) -> None:
    from model.config import VisionEncoderConfig
    from model.vision_encoder import build_tower

    config = VisionEncoderConfig(name=f"transformers:{folders / 'export/language_model'}")
    with pytest.raises(ValueError, match=r"is a llama; transformers' towers of CLIP, IDEFICS and Llama 3.2 Vision"):
        build_tower(config)
    with pytest.raises(ValueError, match=r"vision.class_feature True: only a tower named transformers:"):
        build_tower(replace(config, name="ViT-B-32", class_feature=True))
    with pytest.raises(ValueError, match=r"vision.pretrained 'openai'.*brings its own weights"):
        build_tower(replace(config, pretrained="openai"))
