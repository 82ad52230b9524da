"""Text from images and text: ``python -m trainer.generate MODEL --prompt "<image>A photo of" --image cat.jpg``.

MODEL is an export folder (``run_dir/export``). Each ``<image>`` in a prompt takes the next ``--image``, in order, and
``<|endofchunk|>`` ends the text of an example before it (few-shot prompts).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from model.flamingo import Flamingo
from model.generation import generate
from model.pretrained import from_pretrained, tokenizer_of
from model.tokens import FlamingoTokenizer
from trainer.data.decode import ImageDecoder
from trainer.data.errors import SampleError


def decoder_of(model: Flamingo, fit: Literal["pad", "crop", "stretch"] = "pad") -> ImageDecoder:
    """Image bytes to the model's square input, as in training."""
    encoder = model.vision_encoder
    red, green, blue = (round(255 * value) for value in encoder.mean)
    return ImageDecoder(encoder.image_size, fit, (red, green, blue))


def read_images(paths: Sequence[Path], decoder: ImageDecoder) -> Tensor | None:
    """uint8 [images, 1, 3, size, size]; None for no images.

    Raises: OSError; ValueError naming a file that is no image.
    """
    images = []
    for path in paths:
        try:
            images.append(decoder(path.read_bytes())[None])
        except SampleError as error:
            raise ValueError(f"{path}: {error}") from error
    return torch.stack(images) if images else None


def encode_prompt(tokenizer: FlamingoTokenizer, prompt: str) -> list[int]:
    """The ids of a prompt of the user's own, in which ``<image>`` and ``<|endofchunk|>`` are what they say."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints the continuation and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="trainer.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an export folder")
    parser.add_argument("--prompt", default="<image>", help="text with an <image> for each --image (default: <image>)")
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image file; may be repeated")
    parser.add_argument("--image-fit", choices=("pad", "crop", "stretch"), default="pad", help="as data.image_fit")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--beams", type=int, default=1, help="beam search with that many beams (the paper: 3)")
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
        media = read_images(arguments.image, decoder_of(model, arguments.image_fit))
        prompt = encode_prompt(tokenizer, arguments.prompt)
        torch.manual_seed(arguments.seed)
        [new] = generate(
            model,
            [prompt],
            media,
            [len(arguments.image)],
            max_new_tokens=arguments.max_new_tokens,
            num_beams=arguments.beams,
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
