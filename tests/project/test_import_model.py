"""``trainer.import_model`` and ``trainer.export --format``: commands of a user, and what is wrong with them."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import LanguageModelConfig
from model.factory import build_language_model
from model.pretrained import from_pretrained
from tests.model.builders import FAMILIES, VOCAB_SIZE, random_media, text_with_media, tiny_tokenizer, tower_folder
from tests.model.imports.sources import tiny_idefics, write_source
from trainer import export, import_model


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    lm = build_language_model(LanguageModelConfig(architecture=FAMILIES["gpt_neox"]), torch.float32)
    lm.save_pretrained(folder)
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder


def openflamingo_state(prefix: str, *, blocks: tuple[int, ...] = (1,), frames: int = 0) -> dict[str, Tensor]:
    """Return random tensors under OpenFlamingo's names; cross-attentions stand under ``prefix``."""
    inner, layers = 64, 2
    shapes: dict[str, tuple[int, ...]] = {"perceiver.latents": (5, 24)}
    norms = ["perceiver.norm"]
    for n in range(layers):
        layer = f"perceiver.layers.{n}"
        norms += [f"{layer}.0.norm_media", f"{layer}.0.norm_latents", f"{layer}.1.0"]
        shapes |= {f"{layer}.0.to_q.weight": (inner, 24), f"{layer}.0.to_kv.weight": (2 * inner, 24)}
        shapes |= {f"{layer}.0.to_out.weight": (24, inner)}
        shapes |= {f"{layer}.1.1.weight": (96, 24), f"{layer}.1.3.weight": (24, 96)}
    shapes |= {f"{norm}.{part}": (24,) for norm in norms for part in ("weight", "bias")}
    for n in blocks:
        cross = prefix.format(n)
        shapes |= {f"{cross}.{gate}": (1,) for gate in ("attn_gate", "ff_gate")}
        shapes |= {f"{cross}.{norm}.{part}": (32,) for norm in ("attn.norm", "ff.0") for part in ("weight", "bias")}
        shapes |= {f"{cross}.attn.to_q.weight": (512, 32), f"{cross}.attn.to_kv.weight": (1024, 24)}
        shapes |= {f"{cross}.attn.to_out.weight": (32, 512)}
        shapes |= {f"{cross}.ff.1.weight": (128, 32), f"{cross}.ff.3.weight": (32, 128)}
    shapes["lang_encoder.gpt_neox.embed_in.weight"] = (VOCAB_SIZE + 2, 32)
    shapes["lang_encoder.embed_out.weight"] = (VOCAB_SIZE + 2, 32)
    if frames:
        shapes["perceiver.frame_embs"] = (frames, 24)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


RELEASED = "lang_encoder.gated_cross_attn_layers.{}"
TRAINED = "module.lang_encoder.gpt_neox.layers.{}.gated_cross_attn_layer"


@pytest.mark.parametrize(("prefix", "frames"), [(RELEASED, 0), (TRAINED, 3)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_openflamingo_of_every_generation(
    tmp_path: Path, language_model: Path, prefix: str, frames: int, suffix: str
) -> None:
    state = openflamingo_state(prefix, frames=frames)
    source = tmp_path / f"checkpoint{suffix}"
    if suffix == ".pt":
        torch.save({"model_state_dict": state}, source)
    else:
        save_file(state, source)
    arguments = [str(source), "--output", str(tmp_path / "export"), "--language-model", str(language_model)]
    assert import_model.main([*arguments, "--vision", f"local-dir:{tower_folder()}"]) == 0
    model = from_pretrained(tmp_path / "export")
    resampler, cross = model.config.resampler, model.config.cross_attention
    assert (resampler.num_layers, resampler.num_heads, resampler.num_latents) == (2, 1, 5)
    assert resampler.num_frames == frames
    assert (cross.every_n_layers, cross.offset) == (2, 1)
    assert torch.equal(model.get_parameter("resampler.latents"), state["perceiver.latents"])
    gate = state[f"{prefix.format(1)}.attn_gate"]
    assert torch.equal(model.blocks_with_cross_attention()[1].attention_gate, gate)
    if frames:
        assert torch.equal(model.get_parameter("resampler.time_embeddings"), state["perceiver.frame_embs"])
    assert model(text_with_media()[0], media=random_media(3)).logits.isfinite().all()


class Malicious:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


def test_mistakes_are_messages(
    tmp_path: Path, language_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Handlers of earlier tests may hold streams that are closed; their complaints are none of the command's lines.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model_state_dict": Malicious()}))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(openflamingo_state(RELEASED, blocks=(1, 2)), tmp_path / "uneven.pt")
    torch.save(openflamingo_state(RELEASED) | {"perceiver.media_time_embs": torch.zeros(2, 1, 24)}, "media.pt")
    whole = openflamingo_state(RELEASED)
    torch.save({name: tensor for name, tensor in whole.items() if "ff.3" not in name}, "missing.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors")
    (tmp_path / "folder").mkdir()
    lm, tower = ["--language-model", str(language_model)], ["--vision", f"local-dir:{tower_folder()}"]
    for arguments, message in (
        (["nowhere"], "SOURCE: no such file or folder: nowhere"),
        (["folder"], "folder is no folder of a transformers model: it has no config.json"),
        (["folder", "--vision-pretrained", "x"], "--vision-pretrained: only OpenFlamingo's tower takes it"),
        (["other.pt"], "--language-model is required"),
        (["other.pt", *lm], r"other.pt is no checkpoint of OpenFlamingo: .* has \['weight'\]"),
        (["list.pt", *lm], "list.pt holds a list instead of OpenFlamingo's state dict"),
        (["evil.pt", *lm], "evil.pt cannot be read without running code from it"),
        (["broken.safetensors", *lm], "broken.safetensors cannot be read"),
        (["uneven.pt", *lm], r"cross-attentions before the blocks \[1, 2\], which are not evenly spaced"),
        (["media.pt", *lm], "media_time_embs"),
        (["missing.pt", *lm, *tower], r"1 missing \['cross_attention.0.feed_forward.down.weight'\]"),
        (["other.pt", *lm, "--without-media", "all_media"], "OpenFlamingo does not leak"),
    ):
        assert import_model.main([*arguments, "--output", "out"]) == 1, arguments
        printed = capsys.readouterr()
        assert re.search(message, printed.err), printed.err
        assert printed.err.count("\n") == 1
        assert "unpickled" not in printed.out
        assert not (tmp_path / "out").exists()


def test_export_of_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tiny_idefics(), tmp_path / "source")
    assert import_model.main([str(tmp_path / "source"), "--output", str(tmp_path / "imported")]) == 0
    assert export.main([str(tmp_path / "imported"), "--format", "idefics"]) == 0
    written = load_file(tmp_path / "imported/idefics/model.safetensors")
    assert written.keys() == load_file(tmp_path / "source/model.safetensors").keys()
    capsys.readouterr()
    for arguments, message in (
        (["imported", "--format", "mllama"], "cannot be written as Llama 3.2 Vision"),
        (["imported"], "is no run folder: it has no config.yaml. Name a run folder, or an export"),
        (["source", "--format", "idefics"], "is not an exported Flamingo"),
        (["nowhere", "--format", "idefics"], "is not an exported Flamingo"),
    ):
        assert export.main([str(tmp_path / arguments[0]), *arguments[1:], "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_run_has_the_formats_of_its_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("task: contrastive\n")
    assert export.main([str(tmp_path), "--format", "idefics"]) == 1
    assert (
        "--format idefics: a run of the task contrastive is exported as native or open_clip" in capsys.readouterr().err
    )
