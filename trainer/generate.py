"""Text from images and text: ``python -m trainer.generate MODEL --prompt "<image>A photo of" --image cat.jpg``.

MODEL is an export folder (``run_dir/export``). Each ``<image>`` in a prompt takes the next ``--image``, in order, and
``<|endofchunk|>`` ends the text of an example before it (few-shot prompts).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from model.generation import generate
from model.pretrained import from_pretrained, tokenizer_of
from model.tokens import FlamingoTokenizer
from trainer.data.samples.prompt_images import decoder_of, model_media, read_images


def encode_prompt(tokenizer: FlamingoTokenizer, prompt: str) -> list[int]:
    """The ids of a prompt of the user's own, in which ``<image>`` and ``<|endofchunk|>`` are what they say."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints the continuation and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="trainer.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an export folder")
    parser.add_argument("--prompt", default="<image>", help="text with an <image> for each --image (default: <image>)")
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image file; may be repeated")
    parser.add_argument("--image-fit", choices=("pad", "crop", "stretch"), default="pad", help="as data.image_fit")
    parser.add_argument("--image-tokens", type=_positive, help="as the source's image_tokens (default: squares)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num_beams", type=int, default=1, help="beam search with that many num_beams (the paper: 3)")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="default: as it was trained")
    arguments = parser.parse_args(argv)
    disable_progress_bar()
    try:
        model = from_pretrained(arguments.model, dtype=arguments.dtype, device=arguments.device)
        tokenizer = tokenizer_of(arguments.model)
        decoder = decoder_of(model.vision_encoder, arguments.image_fit, arguments.image_tokens)
        media, media_grids = model_media(read_images(arguments.image, decoder), decoder)
        prompt = encode_prompt(tokenizer, arguments.prompt)
        torch.manual_seed(arguments.seed)
        [new] = generate(
            model,
            [prompt],
            media,
            [len(arguments.image)],
            max_new_tokens=arguments.max_new_tokens,
            media_grids=media_grids,
            num_beams=arguments.num_beams,
            do_sample=arguments.sample,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
        )
    except (OSError, ValueError) as error:
        print(f"trainer.generate: {error}", file=sys.stderr)
        return 1
    print(tokenizer.decode(new).strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
