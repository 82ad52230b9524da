"""Generate text from images and text.

    python -m trainer.generate MODEL --prompt "<image>A photo of" --image cat.jpg

MODEL is an export folder (``run_dir/export``). Each ``<image>`` in the prompt stands for the next ``--image``. In a
few-shot prompt, ``<|endofchunk|>`` ends the text of each example.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from model.generation import generate
from model.pretrained import from_pretrained, load_exported_tokenizer
from model.tokens import FlamingoTokenizer
from trainer.config.data_config import DataConfig
from trainer.data.samples.prompt_images import model_media, read_images
from trainer.data.samples.tower_decoder import tower_decoder


def encode_prompt(tokenizer: FlamingoTokenizer, prompt: str) -> list[int]:
    """Return the ids of a user's prompt, in which ``<image>`` and ``<|endofchunk|>`` are special tokens."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="export folder")
    parser.add_argument("--prompt", default="<image>", help="text with one <image> per --image (default: %(default)s)")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="image file; repeat it for several (default: none)"
    )
    parser.add_argument(
        "--image-fit",
        choices=("pad", "crop", "stretch"),
        default=DataConfig.image_fit,
        help="data.image_fit of the training run (default: %(default)s)",
    )
    parser.add_argument(
        "--image-tokens", type=_positive, help="image_tokens of the source in training (default: squares)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most tokens to generate (default: %(default)s)")
    parser.add_argument(
        "--num-beams", type=int, default=1, help="beams; 1 is greedy, the paper: 3 (default: %(default)s)"
    )
    parser.add_argument(
        "--sample", action="store_true", help="draw each token at random instead of taking the most likely one"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of --sample (default: %(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass that --sample draws from (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --sample (default: %(default)s)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of torch (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=None, help="type of the weights (default: as trained)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the continuation of the prompt, and return the exit code."""
    arguments = _parser().parse_args(argv)
    disable_progress_bar()
    try:
        model = from_pretrained(arguments.model, dtype=arguments.dtype, device=arguments.device)
        tokenizer = load_exported_tokenizer(arguments.model)
        decoder = tower_decoder(model.vision_encoder, arguments.image_fit, arguments.image_tokens)
        media, media_grids = model_media(read_images(arguments.image, decoder), decoder)
        prompt = encode_prompt(tokenizer, arguments.prompt)
        torch.manual_seed(arguments.seed)
        [continuation] = generate(
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
    print(tokenizer.decode(continuation).strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
