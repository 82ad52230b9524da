"""Generate text from images, videos and text.

    python -m trainer.generate MODEL --prompt "<image>A photo of" --image cat.jpg

MODEL is an export folder (``run_dir/export``). Each ``<image>`` in the prompt stands for the next ``--image`` or
``--video``. In a few-shot prompt, ``<|endofchunk|>`` ends the text of each example. Text is encoded as it is typed. The
size of images and the frames of videos are those of the training run; options change them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from model.generation import generate
from model.pretrained import from_pretrained, load_exported_tokenizer
from model.processor import Special, TextLayout, encode_prompt, load_processor_config, read_processor_config
from model.tokens import FlamingoTokenizer
from trainer.data.samples.prompt_media import override, read_media, with_video_settings

_log = logging.getLogger("trainer.generate")
_SAMPLING = ("temperature", "top_p", "seed")


def _number(kind: Callable[[str], float], low: float, high: float = float("inf"), *, open_low: bool = False) -> Any:
    """Return a type of argparse: a number from ``low`` (or above it) to ``high``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not (low < value if open_low else low <= value) or not value <= high or value == float("inf"):
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            bounds += f" and at most {high:g}" if high != float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


def _device(text: str) -> str:
    """Check that torch can compute on a device; for argparse."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        message = f"torch cannot compute on {text!r} here ({reason}); cpu always works"
        raise argparse.ArgumentTypeError(message) from None
    return text


def _file(kind: str) -> Callable[[str], tuple[str, Path]]:
    """Return a type of argparse: an existing file, with its kind."""

    def parse(text: str) -> tuple[str, Path]:
        if not Path(text).is_file():
            raise argparse.ArgumentTypeError(f"{text}: {'a folder' if Path(text).is_dir() else 'no such file'}")
        return kind, Path(text)

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="export folder")
    add("--prompt", help="text with one <image> for each file (default: <image> for each file, and no text)")
    for kind in ("image", "video"):
        text = f"{kind} file; repeat it for several, in the order of their <image> (default: none)"
        add(f"--{kind}", type=_file(kind), dest="files", metavar="FILE", action="append", default=[], help=text)
    fits = ("pad", "crop", "stretch")
    add("--image-fit", choices=fits, help="data.image_fit, instead of that of the training run")
    budget = "image_tokens of the source, instead of that of the training run; 0 makes squares"
    add("--image-tokens", type=_number(int, 0), metavar="N", help=budget)
    frames = "frames of a video, instead of num_frames of the training run"
    add("--num-frames", type=_number(int, 1), metavar="N", help=frames)
    rate = "frames taken per second of video, instead of those of the training run"
    add("--frames-per-second", type=_number(float, 0, open_low=True), metavar="N", help=rate)
    most = "most tokens to generate (default: %(default)s)"
    add("--max-new-tokens", type=_number(int, 1), default=64, metavar="N", help=most)
    beams = "beams; 1 is greedy, the paper: 3 (default: %(default)s)"
    add("--num-beams", type=_number(int, 1), default=1, metavar="N", help=beams)
    add("--sample", action="store_true", help="draw each token at random instead of taking the most likely one")
    above_zero = _number(float, 0, open_low=True)
    add("--temperature", type=above_zero, metavar="T", help="temperature of --sample (default: 1)")
    mass = "probability mass that --sample draws from (default: 1)"
    add("--top-p", type=_number(float, 0, 1, open_low=True), metavar="P", help=mass)
    add("--seed", type=_number(int, 0, 2**63 - 1), metavar="N", help="seed of --sample (default: 0)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=_device, default=device, help="device of torch (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="type of the weights (default: as trained)")
    return parser


def _encode(arguments: argparse.Namespace, tokenizer: FlamingoTokenizer) -> list[int]:
    """Return the ids of the prompt, with one image token for each file.

    Raises:
        ValueError: Image tokens and files differ in number, or the text cannot be encoded.
    """
    processor = read_processor_config(arguments.model)
    space = processor is not None and processor.space_after_image
    number = len(arguments.files)
    if arguments.prompt is None:
        return TextLayout(tokenizer, space).encode_parts([Special.IMAGE] * number)
    ids = encode_prompt(tokenizer, arguments.prompt, space_after_image=space)
    found, image = ids.count(tokenizer.image_id), tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.image_id)
    if found > number:
        raise ValueError(
            f"--prompt has {found} {image}, but {_count(number)} given: give a file for each with --image or --video"
        )
    if found < number:
        raise ValueError(
            f"--prompt has {found or 'no'} {image}, but {_count(number)} given with --image or --video: write {image} "
            "in --prompt where each belongs"
        )
    return ids


def _count(files: int) -> str:
    return f"{files or 'no'} file{'s are' if files > 1 else ' is'}"


def _continue_prompt(arguments: argparse.Namespace) -> str:
    """Return the text that follows the prompt."""
    tokenizer = load_exported_tokenizer(arguments.model)
    prompt = _encode(arguments, tokenizer)
    model = from_pretrained(arguments.model, dtype=arguments.dtype, device=arguments.device)
    processor = override(
        load_processor_config(arguments.model, model.vision_encoder),
        arguments.model,
        image_fit=("--image-fit", arguments.image_fit),
        image_tokens=("--image-tokens", arguments.image_tokens),
    )
    if any(kind == "video" for kind, _ in arguments.files):
        frames = (arguments.num_frames, arguments.frames_per_second)
        processor = with_video_settings(processor, *frames, default_frames=model.config.resampler.num_frames or 1)
    media, media_grids = read_media(arguments.files, processor)
    sampling = {name: getattr(arguments, name) for name in _SAMPLING if getattr(arguments, name) is not None}
    if sampling and not arguments.sample:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sampling)
        _log.warning("%s: no effect without --sample", flags)
    torch.manual_seed(sampling.pop("seed", 0))
    [continuation] = generate(
        model,
        [prompt],
        media,
        [len(arguments.files)],
        max_new_tokens=arguments.max_new_tokens,
        media_grids=media_grids,
        num_beams=arguments.num_beams,
        do_sample=arguments.sample,
        **sampling,
    )
    return tokenizer.decode(continuation).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the continuation of the prompt, and return the exit code."""
    arguments = _parser().parse_args(argv)
    disable_progress_bar()
    try:
        print(_continue_prompt(arguments))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"trainer.generate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
