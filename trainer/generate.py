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
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from model.generation import generate
from model.processor import Special, TextLayout
from trainer.data.samples.prompt_media import read_media
from trainer.prompting.exported_model import load_exported_model, load_layout
from trainer.prompting.flags import add_device_flags, add_pixel_flags, file, number

_log = logging.getLogger("trainer.generate")
_SAMPLING = ("temperature", "top_p", "seed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="export folder")
    add("--prompt", help="text with one <image> for each file (default: <image> for each file, and no text)")
    for kind in ("image", "video"):
        text = f"{kind} file; repeat it for several, in the order of their <image> (default: none)"
        add(f"--{kind}", type=file(kind), dest="files", metavar="FILE", action="append", default=[], help=text)
    add_pixel_flags(parser)
    most = "most tokens to generate (default: %(default)s)"
    add("--max-new-tokens", type=number(int, 1), default=64, metavar="N", help=most)
    beams = "beams; 1 is greedy, the paper: 3 (default: %(default)s)"
    add("--num-beams", type=number(int, 1), default=1, metavar="N", help=beams)
    add("--sample", action="store_true", help="draw each token at random instead of taking the most likely one")
    above_zero = number(float, 0, open_low=True)
    add("--temperature", type=above_zero, metavar="T", help="temperature of --sample (default: 1)")
    mass = "probability mass that --sample draws from (default: 1)"
    add("--top-p", type=number(float, 0, 1, open_low=True), metavar="P", help=mass)
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", help="seed of --sample (default: 0)")
    add_device_flags(parser)
    return parser


def _encode(arguments: argparse.Namespace, layout: TextLayout) -> list[int]:
    """Return the ids of the prompt, with one image token for each file.

    Raises:
        ValueError: Image tokens and files differ in number, or the text cannot be encoded.
    """
    number_of_files, tokenizer = len(arguments.files), layout.tokenizer
    if arguments.prompt is None:
        return layout.encode_parts([Special.IMAGE] * number_of_files)
    ids = layout.encode_prompt(arguments.prompt)
    found, image = ids.count(tokenizer.image_id), tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.image_id)
    if found > number_of_files:
        raise ValueError(
            f"--prompt has {found} {image}, but {_count(number_of_files)} given: give a file for each with "
            "--image or --video"
        )
    if found < number_of_files:
        raise ValueError(
            f"--prompt has {found or 'no'} {image}, but {_count(number_of_files)} given with --image or "
            f"--video: write {image} in --prompt where each belongs"
        )
    return ids


def _count(files: int) -> str:
    return f"{files or 'no'} file{'s are' if files > 1 else ' is'}"


def _continue_prompt(arguments: argparse.Namespace) -> str:
    """Return the text that follows the prompt."""
    layout = load_layout(arguments.model)
    prompt = _encode(arguments, layout)
    with_videos = any(kind == "video" for kind, _ in arguments.files)
    exported = load_exported_model(arguments.model, layout, arguments, with_videos=with_videos)
    media, media_grids = read_media(arguments.files, exported.processor)
    sampling = {name: getattr(arguments, name) for name in _SAMPLING if getattr(arguments, name) is not None}
    if sampling and not arguments.sample:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sampling)
        _log.warning("%s: no effect without --sample", flags)
    torch.manual_seed(sampling.pop("seed", 0))
    [continuation] = generate(
        exported.model,
        [prompt],
        media,
        [len(arguments.files)],
        max_new_tokens=arguments.max_new_tokens,
        media_grids=media_grids,
        num_beams=arguments.num_beams,
        do_sample=arguments.sample,
        **sampling,
    )
    return layout.tokenizer.decode(continuation).strip()


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
