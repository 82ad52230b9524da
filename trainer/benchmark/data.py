"""``python -m trainer.benchmark data``: what the stream costs, against open_clip, webdataset and the limits of issue C.

Times are processor time of one thread, so that other processes matter less; baselines take turns with ours on the same
bytes. A limit that is no baseline's figure stands as baseline "limit", with the ratio limit / value.
"""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
import webdataset
from open_clip.transform import image_transform
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader

from trainer.benchmark.measurements import Measurement
from trainer.config.data_config import DataConfig, ImageTextSource
from trainer.data.batch import Row, SampleId
from trainer.data.samples.decode import ImageDecoder
from trainer.data.samples.row_builder import make_row
from trainer.data.samples.text_encoding import PlainTextEncoder
from trainer.data.shards.manifest import Manifest, load_manifest
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.remote import RemoteStore
from trainer.data.shards.shard_scan import build_manifest, index_shard
from trainer.data.stream.loader import StepLoader
from trainer.data.stream.order import SourceOrder, lanes_of
from trainer.data.stream.shared_arrays import SharedArrays

BENCHMARK = "data"
SIZE = 224
WORDS = "a photo of the red dog on green grass near old stone wall with two small birds under blue sky at night".split()
SHARDS, SAMPLES_PER_SHARD = 2_000_000, 1000
LANES = 2048
NODE_WORKERS = 2


def run(device: str, repeats: int = 5) -> list[Measurement]:
    """All measurements; ``device`` is not used, for all of this happens on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_decoding(repeats), *_iteration(repeats), *_hand_over(repeats), *_scale()]
    finally:
        torch.set_num_threads(threads)


def _against(
    case: str, measure: str, unit: str, value: float, baseline: str, other: float, target: float | None
) -> Measurement:
    return Measurement(BENCHMARK, case, measure, unit, value, baseline, other, other / value, target)


def _take_turns(jobs: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Milliseconds of processor time an item, the median of the repeats. A job returns how many items it did."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeats + 1):
        for name, job in jobs.items():
            start = time.process_time()
            items = job()
            if number:  # the first round warms up
                times[name].append(1e3 * (time.process_time() - start) / items)
    return {name: statistics.median(found) for name, found in times.items()}


def _jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    """Content with edges and noise, about 25 kB at 330 x 330."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (smooth + rng.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _captions(rng: np.random.Generator, number: int) -> list[str]:
    return [" ".join(rng.choice(WORDS, int(rng.integers(6, 20)))) for _ in range(number)]


def _tokenizer(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    return tokenizer


def _decoding(repeats: int) -> Iterator[Measurement]:
    rng = np.random.default_rng(0)
    preprocess, clip_tokenizer = image_transform(SIZE, is_train=False), open_clip.get_tokenizer("ViT-B-32")
    encode, decode = PlainTextEncoder(_tokenizer(_captions(rng, 500))), ImageDecoder(SIZE, "crop")
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

        found = _take_turns({"ours": ours, "theirs": theirs}, repeats)
        yield _against(case, "decode, resize, tokenize", "ms", found["ours"], "open_clip", found["theirs"], 4.0)


def _shards(folder: Path, shards: int, samples: int) -> tuple[list[str], Path]:
    """Samples of 25 kB and a caption, written by webdataset; their urls and manifest."""
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


def _iteration(repeats: int) -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as name:
        urls, output = _shards(Path(name), 4, 500)
        manifest = load_manifest(output)
        lanes = SourceOrder("all", manifest.samples, seed=0, num_lanes=8, samples_per_step=8)
        order = [place for update in range(250) for lane in lanes.samples_of(update) for place in lane]
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

        found = _take_turns({"shuffled": shuffled, "in order": in_order, "theirs": theirs}, repeats)
        for case, key in (("the trainer's shuffled order", "shuffled"), ("shard after shard", "in order")):
            row = "raw iteration, 25 kB samples"
            yield _against(case, row, "ms", found[key], "webdataset, in order", found["theirs"], 8.0)


class _Ready:
    """A builder that costs nothing, so that what is left is the way from process to process."""

    def __init__(self) -> None:
        self._image = torch.zeros((1, 3, SIZE, SIZE), dtype=torch.uint8)

    def __call__(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> Row:
        return make_row([1, 4, *range(10, 30), 5], [False] * 23, (self._image,), sample, image_id=4)

    def length(self, members: Mapping[str, bytes], sample: SampleId, rng: np.random.Generator) -> int:
        """Of every row."""
        return 23


def _hand_over(repeats: int) -> Iterator[Measurement]:
    batch = 32
    with tempfile.TemporaryDirectory() as name:
        _, output = _shards(Path(name), 2, 500)
        data = DataConfig((ImageTextSource("pairs", output, batch),))

        def stream(workers: int, updates: int) -> None:
            config = replace(data, num_workers=workers)
            loader = StepLoader(
                config,
                {"pairs": _Ready()},
                pad_id=0,
                media_shape=(1, 3, SIZE, SIZE),
                rank=0,
                world_size=1,
                start_step=0,
                stop_step=updates,
            )
            for update in loader:
                update.micro_batches[0].media.flatten()[::4096].sum()

        floats = torch.zeros(batch, 3, SIZE, SIZE)

        def float_stream(workers: int, updates: int) -> None:
            for one in DataLoader(_Same(floats, updates), batch_size=None, num_workers=workers):
                one.flatten()[::4096].sum()

        uint8 = statistics.median(_extra_cost(stream, batch) for _ in range(repeats))
        float32 = statistics.median(_extra_cost(float_stream, batch) for _ in range(repeats))
    measure = "hand-over to the training process"
    yield _against("uint8 224 x 224 and tokens", measure, "ms", uint8, "limit", 0.45, 1.0)
    yield _against("uint8 224 x 224 and tokens", measure, "ms", uint8, "float32 batches, torch", float32, None)


class _Same(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, batch: torch.Tensor, number: int) -> None:
        self._batch, self._number = batch, number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= self._number:
            raise IndexError(index)
        return self._batch.clone()


def _extra_cost(stream: Callable[[int, int], None], batch: int) -> float:
    """Milliseconds a sample, of all processes together, that a loader process adds; starting it is left out."""

    def cost(workers: int, updates: int) -> float:
        before = _cpu_seconds()
        stream(workers, updates)
        return _cpu_seconds() - before

    short, long = 5, 65
    with_process, without = (cost(workers, long) - cost(workers, short) for workers in (1, 0))
    return 1e3 * (with_process - without) / ((long - short) * batch)


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _scale() -> Iterator[Measurement]:
    """2 billion samples in 2 million shards, in fresh processes; the better of two counts."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "manifest.npz"
        urls = [f"s3://bucket/some/dataset/part-{shard:07d}.tar" for shard in range(SHARDS)]
        counts = [SAMPLES_PER_SHARD] * SHARDS
        Manifest.create(path, urls, counts, [25_000_000] * SHARDS, list(range(SHARDS)), [False] * SHARDS).save()
        del urls, counts
        context = multiprocessing.get_context("spawn")
        found: dict[str, dict[str, float]] = {}
        for position in ("start", "far") * 2:
            once = _in_fresh_process(context, _measure_scale, path, position)
            found[position] = {name: min(value, found.get(position, once)[name]) for name, value in once.items()}
        few = Path(name) / "few.npz"
        Manifest.create(few, ["s3://bucket/0.tar"], [10 * LANES], [1], [0], [False]).save()
        node = {ranks: _in_fresh_process(context, _measure_node, path, ranks) for ranks in (4, 8)}
        small = {ranks: _in_fresh_process(context, _measure_node, few, ranks) for ranks in (4, 8)}
    case = f"{SHARDS * SAMPLES_PER_SHARD:,} samples in {SHARDS:,} shards"
    start, far = found["start"], found["far"]
    yield _against(case, "ready for the first batch", "s", start["ready"], "limit", 10.0, 1.0)
    yield _against(case, "memory, rank and 4 workers", "MB", start["memory"], "limit", 400.0, 1.0)
    for ranks, once in node.items():
        what = f"a node of {ranks} ranks with {NODE_WORKERS} workers each"
        yield _against(case, f"memory, {what}", "MB", once["memory"], "limit", 400.0, 1.0)
        # The rest is what forked processes with hardly any data cost: torch's and Python's.
        of_data = once["memory"] - small[ranks]["memory"]
        yield _against(case, f"memory of that for the data, {what}", "MB", of_data, "limit", 400.0, None)
        yield _against(case, f"ready, {what}", "s", once["ready"], "limit", 10.0, 1.0)
    yield _against(case, "ids of a step, same epoch", "s", start["ids"], "limit", 1.0, 1.0)
    yield _against(case, "ids of a step, other epoch", "s", start["other"], "limit", 1.0, 1.0)
    yield _against(case, "ready at step 10^9", "s", far["ready"], "ready at step 0", start["ready"], 0.8)
    yield _against(case, "state of a source", "B", start["state"], "limit", 1024.0, 1.0)


def _in_fresh_process(context: Any, measure: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """What ``measure(*arguments, connection)`` sends."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=partial(measure, *arguments, send))
    process.start()
    found: dict[str, float] = receive.recv()
    process.join()
    return found


def _measure_node(path: Path, ranks: int, send: Any) -> None:
    """Memory of all ranks of a node and their loader processes together, shared pages counted once, and the seconds
    until all of them have their first samples. Runs in its own process, and starts without anything cached."""
    gc.disable()  # or each fork's collector would copy the interpreter's heap
    context = multiprocessing.get_context("fork")
    started, ready = context.Semaphore(0), context.Semaphore(0)
    begin, leave = context.Event(), context.Event()

    def work(order: SourceOrder, lanes: range) -> None:
        order.samples_of(1, lanes)
        ready.release()
        leave.wait()

    def rank_main(rank: int, cache_dir: Path) -> None:
        started.release()
        begin.wait()
        manifest, lanes = load_manifest(path), lanes_of(rank, ranks, LANES)
        order = SourceOrder(
            "pairs", manifest.samples, seed=0, num_lanes=LANES, samples_per_step=LANES, shared=SharedArrays(cache_dir)
        )
        order.prepare(0)
        workers = [context.Process(target=work, args=(order, lanes)) for _ in range(NODE_WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    with tempfile.TemporaryDirectory() as name:
        processes = [context.Process(target=rank_main, args=(rank, Path(name))) for rank in range(ranks)]
        for process in processes:
            process.start()
        for _ in processes:
            started.acquire()
        before, start = _pss_of(processes), time.monotonic()
        begin.set()
        for _ in range(ranks * NODE_WORKERS):
            ready.acquire()
        seconds = time.monotonic() - start
        memory = _pss_of(processes) - before
        leave.set()
        for process in processes:
            process.join()
    send.send({"memory": memory / 1e6, "ready": seconds})


def _pss_of(processes: Sequence[Any]) -> int:
    """Bytes of the processes and of their children."""
    known = [psutil.Process(process.pid) for process in processes]
    return sum(one.memory_full_info().pss for each in known for one in (each, *each.children(recursive=True)))


def _measure_scale(path: Path, position: str, send: Any) -> None:
    """Runs in its own process: what a rank does before its first batch, but for the reading."""
    from trainer.data.stream.stream_state import data_state

    process = psutil.Process()
    before = process.memory_full_info().pss
    step = 10**9 if position == "far" else 0
    start = time.process_time()
    manifest = load_manifest(path)
    data = DataConfig((ImageTextSource("pairs", path, LANES),))
    state = len(json.dumps(data_state(data, [manifest], step)["sources"]["pairs"]))
    order = SourceOrder("pairs", manifest.samples, seed=0, num_lanes=LANES, samples_per_step=LANES)
    order.prepare(step)
    order.samples_of(step)
    ready = time.process_time() - start
    memory = _memory_with_workers(order, process) - before
    start = time.process_time()
    order.samples_of(step + 400_000)
    ids = time.process_time() - start
    start = time.process_time()
    order.samples_of(step + 5_000_000)
    other = time.process_time() - start
    send.send({"ready": ready, "memory": memory / 1e6, "ids": ids, "other": other, "state": state})


def _memory_with_workers(order: SourceOrder, process: psutil.Process, workers: int = 4) -> int:
    """Bytes of this process and its loader processes, shared pages counted once."""
    context = multiprocessing.get_context("fork")
    ready, leave = context.Semaphore(0), context.Event()

    def work(worker: int) -> None:
        order.samples_of(worker + 1)
        ready.release()
        leave.wait()

    children = [context.Process(target=work, args=(worker,)) for worker in range(workers)]
    for child in children:
        child.start()
    for _ in children:
        ready.acquire()
    total = sum(psutil.Process(child.pid).memory_full_info().pss for child in children)
    total += process.memory_full_info().pss
    leave.set()
    for child in children:
        child.join()
    return int(total)
