"""Export a model that transformers loads alone, in a process that cannot import this project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from model import ops
from model.config import LanguageModelConfig, VisionEncoderConfig
from model.factory import build_flamingo, build_language_model, build_tokenizer
from model.flamingo import Flamingo
from model.generation import generate
from model.imports.hub import local_parts, write_hub_export
from model.imports.hub_code import ops as stand_in
from model.imports.hub_code.modeling_flamingo import FlamingoForConditionalGeneration
from model.imports.hub_code.processing_flamingo import FlamingoProcessor
from model.pretrained import describe_export, from_pretrained, load_exported_tokenizer, save_flamingo
from model.processor import ProcessorConfig, VideoSampling, encode_prompt, load_processor_config
from tests.data.helpers import noise, saved
from tests.data.videos import video_bytes
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer, wake, write_tower
from trainer import export as export_command
from trainer.data.samples.prompt_media import read_media

pytestmark = pytest.mark.slow  # another process has to import transformers

END = "<|endofchunk|>"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Texts of a batch, and the files of their media. The last one has media of two shapes, which become patches.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "interleaved": ([f"<image>w1 w2{END}<image>w3", "w5 <image>w3 w4 w6"], ["a.png", "b.png", "c.png"]),
    "video": (["<video>w3"], ["v.mp4"]),
    "text": (["w1 w2 w3", "w4"], []),
    "image_and_video": (["w2 <video>w3 <image>w2"], ["v.mp4", "a.png"]),
}
# What a user writes, after packages of this project were hidden.
SCRIPT = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("model", "trainer", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}: it is hidden")

sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

cases, results = json.loads(sys.argv[1]), {}
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for name, (text, files) in cases.items():
        images = [file for file in files if file.endswith("png")]
        videos = [file for file in files if file.endswith("mp4")]
        inputs = processor(text=text, images=images or None, videos=videos or None, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        labels = inputs["input_ids"].clone()
        tokens = model.generate(**inputs, num_beams=3, max_new_tokens=8)[:, labels.shape[1]:]
        results[f"{folder}/{name}"] = {
            "logits": logits, "tokens": tokens, "loss": model(**inputs, labels=labels).loss.detach()
        }
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    plain = pipe(images=cases["interleaved"][1][0], text="<image>w1 w2", max_new_tokens=5, return_full_text=False)
    chat = [{"role": "user", "content": [{"type": "image", "path": cases["interleaved"][1][0]},
                                         {"type": "text", "text": "w1 w2"}]}]
    answered = pipe(text=chat, max_new_tokens=5, return_full_text=False)
    results[f"{folder}/pipeline"] = [plain[0]["generated_text"], answered[0]["generated_text"]]
torch.save(results, "results.pt")
"""


@dataclass(frozen=True)
class Made:
    """Hold the folders that the tests share.

    Attributes:
        root: Folder of all files.
        native: Export of this project.
        results: What the process without this project computed, by folder and case.
    """

    root: Path
    native: Path
    results: dict[str, Any]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_native(root: Path) -> Path:
    """Write an export whose language model and tower are in sibling folders."""
    lm = build_language_model(LanguageModelConfig(architecture=FAMILIES["llama"]), torch.float32)
    lm.save_pretrained(root / "lm")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(root / "lm")
    (root / "tower").mkdir()
    write_tower(root / "tower")
    with working_in(root):
        config = tiny_config(
            language_model=LanguageModelConfig(name="lm"), vision=VisionEncoderConfig(name="local-dir:tower")
        )
        tokenizer = build_tokenizer(config)
        model = build_flamingo(config, tokenizer)
        wake(model, 0.5)
        processor = replace(ProcessorConfig.of(model.vision_encoder), video=VideoSampling(2, 2.0))
        save_flamingo("native", model, processor=processor, tokenizer=tokenizer.tokenizer)
    return root / "native"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An export, both forms of it for transformers, and what plain transformers computes with them."""
    root = tmp_path_factory.mktemp("hub")
    native = write_native(root)
    for name in "abc":
        (root / f"{name}.png").write_bytes(saved(noise(20, 30, seed=ord(name)), "PNG"))
    (root / "v.mp4").write_bytes(video_bytes())
    (root / "named").mkdir()
    write_hub_export(native, root / "named")
    (root / "whole").mkdir()
    write_hub_export(native, root / "whole", include_frozen=True, shard_bytes=20_000)
    shutil.move(root / "whole", root / "elsewhere" / "whole")  # nothing outside is needed
    cached = root / "hub" / "models--owner--name"  # as if it had been downloaded
    shutil.copytree(root / "elsewhere" / "whole", cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    cases = {name: (texts, [str(root / file) for file in files]) for name, (texts, files) in CASES.items()}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, json.dumps(cases), "named", "elsewhere/whole", "owner/name"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Made(root, native, torch.load(root / "results.pt", weights_only=True))


def expected(made: Made, model: Flamingo, case: str) -> dict[str, Any]:
    """Compute a case with the modules of this project, from files to tokens."""
    texts, files = CASES[case]
    tokenizer = load_exported_tokenizer(made.native)
    prompts = [encode_prompt(tokenizer, text.replace("<video>", "<image>")) for text in texts]
    kinds = [("video" if name.endswith("mp4") else "image", made.root / name) for name in files]
    media, grids = read_media(kinds, load_processor_config(made.native, model.vision_encoder))
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        logits = model(ids, mask, media=media, media_grids=grids).logits
    counts = [prompt.count(tokenizer.image_id) for prompt in prompts]
    tokens = generate(model, prompts, media, counts, media_grids=grids, num_beams=3, max_new_tokens=8)
    return {"logits": logits, "tokens": tokens}


@pytest.mark.parametrize("folder", ["named", "elsewhere/whole", "owner/name"])
@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_computes_the_same(made: Made, folder: str, case: str) -> None:
    ops.set_backend("reference")
    try:
        wanted = expected(made, from_pretrained(made.native), case)
    finally:
        ops.set_backend("auto")
    found = made.results[f"{folder}/{case}"]
    assert torch.equal(found["logits"], wanted["logits"]), "difference 0"
    pad = load_exported_tokenizer(made.native).pad_id
    longest = max(map(len, wanted["tokens"]))
    assert found["tokens"].tolist() == [text + [pad] * (longest - len(text)) for text in wanted["tokens"]]
    assert any(wanted["tokens"]) and found["loss"].isfinite()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_the_stand_in_computes_what_the_op_does(num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, 4, 16, generator=generator)
    k, v = torch.randn(2, 3, 3, num_kv_heads, 16, generator=generator)
    index, first = torch.tensor([-1, 0, 1, 1, 2]), torch.tensor([-1, 0, 0, 1, 0])
    for first_media in (None, first):
        settings = {"gate": torch.tensor([0.3]), "first_media": first_media}
        wanted = ops.masked_cross_attention(q, k, v, index, backend="reference", **settings)
        assert torch.equal(stand_in.masked_cross_attention(q, k, v, index, **settings), wanted)


def test_pipelines_take_texts_and_chats(made: Made) -> None:
    plain, chat = made.results["named/pipeline"]
    assert plain.split() and plain == chat
    assert made.results["elsewhere/whole/pipeline"] == [plain, chat]


def test_large_weights_are_sharded(made: Made) -> None:
    whole = made.root / "elsewhere" / "whole"
    for folder in (whole, whole / "language_model"):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) > 2 and all((folder / name).stat().st_size < 30_000 for name in files)


def test_an_export_for_transformers_is_an_export(made: Made) -> None:
    model, again = from_pretrained(made.native), from_pretrained(made.root / "elsewhere" / "whole")
    for (name, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_code_imports_nothing_of_this_project(made: Made) -> None:
    files = list((made.root / "named").glob("*.py"))
    assert {path.stem for path in files} >= {"modeling_flamingo", "flamingo", "reference", "ops"}
    for path in files:
        lines = [line.split() for line in path.read_text().splitlines()]
        assert not [line for line in lines if line[:1] in (["from"], ["import"]) and line[1].split(".")[0] == "model"]


def test_a_changed_frozen_part_is_named(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.root / "elsewhere" / "whole", tmp_path / "changed")
    path = tmp_path / "changed" / "vision" / "model.safetensors"
    tensors = load_file(path)
    tensors["ln_pre.weight"] += 0.01
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 different: vision_encoder\.tower\.ln_pre\.weight"):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path / "changed")
    model = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "changed", verify_frozen=False)
    assert not model.training


def test_a_folder_that_is_no_export_is_refused(made: Made, tmp_path: Path) -> None:
    for load in (FlamingoForConditionalGeneration.from_pretrained, FlamingoProcessor.from_pretrained):
        with pytest.raises(ValueError, match=r"lm is not an exported Flamingo"):
            load(made.root / "lm")
    with pytest.raises(ValueError, match=r"lm is not an exported Flamingo"):
        write_hub_export(made.root / "lm", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": {"lm": 0, "vision": 1}}, "device_map .* one device"),
        ({"quantization_config": {"load_in_4bit": True}}, "does not take quantization_config"),
        ({"dtype": "int9"}, "dtype 'int9'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(made: Made, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlamingoForConditionalGeneration.from_pretrained(made.native, **settings)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "w1", "images": ["a.png"]}, r"0 <image>, but 1 images"),
        ({"text": "<image><video>w1", "images": ["a.png"]}, r"1 <video>, but 0 videos"),
        ({"images": ["a.png"]}, "text is missing"),
        ({"text": "w1", "truncation": True}, "does not take truncation"),
        ({"text": "<image>", "images": [torch.zeros(3, 8, 8)]}, r"type Tensor and shape \[3, 8, 8\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(made: Made, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlamingoProcessor.from_pretrained(made.native)(**inputs)


def timm_tower(folder: Path) -> VisionEncoderConfig:
    save_file(timm.create_model("test_vit", num_classes=0, img_size=64).state_dict(), folder / "trunk.safetensors")
    trunk = str(folder / "trunk.safetensors")
    return VisionEncoderConfig(name="timm:test_vit", pretrained=trunk, image_size=64)


def transformers_tower(folder: Path) -> VisionEncoderConfig:
    settings = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPVisionModel(settings).save_pretrained(folder / "clip")
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(statistics))
    return VisionEncoderConfig(name=f"transformers:{folder}/clip", feature_norm=False)


def random_tower(folder: Path) -> VisionEncoderConfig:
    return VisionEncoderConfig(name="timm:test_vit", image_size=64)


@pytest.mark.parametrize("tower", [timm_tower, transformers_tower, random_tower])
def test_towers_of_any_library_go_into_the_export(tmp_path: Path, tower: Callable[[Path], VisionEncoderConfig]) -> None:
    (tmp_path / "given").mkdir()
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["llama"], tokenizer=str(tmp_path / "tokenizer"))
    config = tiny_config(vision=tower(tmp_path / "given"), language_model=language_model)
    tokenizer = build_tokenizer(config)
    model = build_flamingo(config, tokenizer)
    save_flamingo(tmp_path / "native", model, tokenizer=tokenizer.tokenizer)
    (tmp_path / "out").mkdir()
    write_hub_export(tmp_path / "native", tmp_path / "out", include_frozen=True)
    shutil.rmtree(tmp_path / "given")
    shutil.rmtree(tmp_path / "tokenizer")
    found = from_pretrained(tmp_path / "out")  # checks the digests of all frozen tensors
    assert (tmp_path / "out" / "vision").is_dir() is (tower is not random_tower)
    assert not local_parts(describe_export(tmp_path / "out").config, tmp_path / "out")
    assert found.vision_encoder.num_features == model.vision_encoder.num_features


def run(*arguments: str | Path) -> int:
    return export_command.main([*map(str, arguments)])


def test_the_command_writes_a_card(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "tasks": {
            "digits": {
                "metric": "exact",
                "shots": {"0": {"score": 0.93, "low": 0.9, "high": 0.95, "queries": 150, "controls": {}}},
            }
        }
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    hub = ("--format", "huggingface")
    assert run(made.native, *hub, "--output", tmp_path / "without") == 0
    assert run(made.native, *hub, "--output", tmp_path / "with", "--report", tmp_path / "report.json") == 0
    cards = [(tmp_path / name / "README.md").read_text() for name in ("without", "with")]
    assert "No evaluation results are known" in cards[0] and "license" in cards[0]
    assert "| digits | exact | 0 | 0.93 | 0.9 to 0.95 | 150 |" in cards[1] and "No evaluation" not in cards[1]
    assert local_parts(describe_export(tmp_path / "with").config, tmp_path / "with")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format huggingface --push name", "--push name: name it as OWNER/NAME"),
        ("--format huggingface --push a/b/c", "--push a/b/c"),
        ("--format huggingface --push owner/name", "--push owner/name: there is no token"),
        ("--format idefics --include-frozen", "--include-frozen: only a Flamingo with --format huggingface"),
        ("--format huggingface --report nowhere.json", "--report nowhere.json is no report.json"),
    ],
)
def test_a_failed_export_leaves_nothing(
    made: Made,
    tmp_path: Path,
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("trainer.hub.publish.get_token", lambda: None)
    monkeypatch.setattr("trainer.hub.publish.HF_HUB_OFFLINE", False)
    assert run(made.native, *arguments.split(), "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_export_is_not_written_over_itself(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(made.native, "--format", "huggingface", "--output", made.native) == 1
    assert "is the folder to export: name another one" in capsys.readouterr().err
    assert (made.native / "model.safetensors").is_file()


def test_a_push_needs_the_hub(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (made.native, "--format", "huggingface", "--push", "owner/name", "--output", tmp_path / "out")
    monkeypatch.setattr("trainer.hub.publish.HF_HUB_OFFLINE", True)
    assert run(*arguments) == 1
    assert "the hub is offline (HF_HUB_OFFLINE)" in capsys.readouterr().err
    monkeypatch.setattr("trainer.hub.publish.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("trainer.hub.publish.get_token", lambda: "token")
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert "nobody else has language_model.name" in error and "add --include-frozen" in error
