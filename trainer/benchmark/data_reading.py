"""Measure decoding against open_clip, and reading samples against webdataset."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import open_clip
import webdataset
from open_clip.transform import image_transform
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.processor import PlainTextEncoder
from trainer.benchmark.result_file import Measurement
from trainer.data.samples.image_decoder import ImageDecoder
from trainer.data.shards.manifest import load_manifest
from trainer.data.shards.manifest_builder import build_manifest, index_shard
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.remote_store import RemoteStore
from trainer.data.stream.order import SourceOrder

BENCHMARK = "data"
IMAGE_SIZE = 224
_WORDS = (
    "a photo of the red dog on green grass near old stone wall with two small birds under blue sky at night".split()
)


def decoding_rows(repeats: int) -> Iterator[Measurement]:
    """Yield the time of decoding, resizing and tokenizing one image and caption."""
    rng = np.random.default_rng(0)
    preprocess, clip_tokenizer = image_transform(IMAGE_SIZE, is_train=False), open_clip.get_tokenizer("ViT-B-32")
    encode, decode = PlainTextEncoder(_tokenizer(_captions(rng, 500))), ImageDecoder(IMAGE_SIZE, "crop")
    cases = {
        "JPEG of 256 to 400 pixels": [_jpeg(rng, *rng.integers(256, 401, 2).tolist()) for _ in range(60)],
        "JPEG of 1600 x 1200": [_jpeg(rng, 1200, 1600) for _ in range(3)],
    }
    for case, images in cases.items():
        captions = _captions(rng, len(images))

        def ours(images: Sequence[bytes] = images, captions: Sequence[str] = captions) -> int:
            for image, caption in zip(images, captions, strict=True):
                decode(image)
                encode(caption)
            return len(images)

        def theirs(images: Sequence[bytes] = images, captions: Sequence[str] = captions) -> int:
            for image, caption in zip(images, captions, strict=True):
                preprocess(Image.open(io.BytesIO(image)))
                clip_tokenizer(caption)
            return len(images)

        found = take_turns({"ours": ours, "theirs": theirs}, repeats)
        measure = "decode, resize, tokenize"
        yield Measurement.compared(
            BENCHMARK, case, measure, "ms", found["ours"], "open_clip", found["theirs"], target=4.0
        )


def iteration_rows(repeats: int) -> Iterator[Measurement]:
    """Yield the time of reading one sample of local shards."""
    with tempfile.TemporaryDirectory() as name:
        urls, output = write_shards(Path(name), 4, 500)
        manifest = load_manifest(output)
        lanes = SourceOrder("all", manifest.samples, seed=0, num_lanes=8, samples_per_step=8)
        order = [place for step in range(250) for lane in lanes.samples_of(step) for place in lane]
        reader = ShardReader(manifest)

        def shuffled() -> int:
            for place in order:
                reader.read(place.shard, place.index)
            return len(order)

        def in_order() -> int:
            for shard in range(4):
                for index in range(500):
                    reader.read(shard, index)
            return 2000

        def theirs() -> int:
            return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))

        found = take_turns({"shuffled": shuffled, "in order": in_order, "theirs": theirs}, repeats)
        for case, key in (("the trainer's shuffled order", "shuffled"), ("shard after shard", "in order")):
            measure, baseline = "raw iteration, 25 kB samples", "webdataset, in order"
            yield Measurement.compared(
                BENCHMARK, case, measure, "ms", found[key], baseline, found["theirs"], target=8.0
            )


def write_shards(folder: Path, shards: int, samples: int) -> tuple[list[str], Path]:
    """Let webdataset write samples of 25 kB with a caption; return the URLs of the shards and their manifest."""
    rng = np.random.default_rng(0)
    urls = []
    for shard in range(shards):
        urls.append(str(folder / f"{shard:04d}.tar"))
        with webdataset.TarWriter(urls[-1], encoder=False) as writer:
            for number, caption in enumerate(_captions(rng, samples)):
                writer.write({"__key__": f"{number:06d}", "jpg": rng.bytes(24_800), "txt": caption.encode()})
    output = folder / "manifest.npz"
    build_manifest(output, [index_shard(url, output, (), RemoteStore()) for url in urls]).save()
    return urls, output


def take_turns(jobs: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Return the milliseconds of processor time per item, as the median over the repeats.

    Args:
        jobs: Jobs by name; each returns the number of its items.
        repeats: Repetitions, beside one to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            start = time.process_time()
            items = job()
            if number:
                times[name].append(1e3 * (time.process_time() - start) / items)
    return {name: statistics.median(found) for name, found in times.items()}


def _jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    """Return a JPEG with edges and noise, of about 25 kB at 330 x 330."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (smooth + rng.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _captions(rng: np.random.Generator, number: int) -> list[str]:
    return [" ".join(rng.choice(_WORDS, int(rng.integers(6, 20)))) for _ in range(number)]


def _tokenizer(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    return tokenizer
