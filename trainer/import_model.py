"""Turn weights of another project into an export that every command here takes.

    python -m trainer.import_model SOURCE --output EXPORT

SOURCE is a transformers folder of IDEFICS or Llama 3.2 Vision (safetensors), or a file of OpenFlamingo's weights, which
needs ``--language-model``, because such a file lacks the frozen parts. ``trainer.train`` continues from the export with
``model.start_from: EXPORT``, and ``trainer.export EXPORT --format idefics`` (or ``mllama``) goes back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.entry import quiet_libraries
from trainer.export import whole_or_not

_CLIP = ("ViT-L-14-quickgelu", "openai")  # of OpenFlamingo's released models


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="trainer.import_model", description=description)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of IDEFICS or Llama 3.2 Vision, or OpenFlamingo's file")
    add("--output", type=Path, required=True, metavar="EXPORT", help="folder to write")
    add("--language-model", metavar="NAME", help="repository or folder (default: the weights in SOURCE are copied)")
    add(
        "--vision",
        metavar="NAME",
        help="tower: open_clip's name for OpenFlamingo (default: ViT-L-14-quickgelu), else a repository or folder of "
        "transformers (default: the weights in SOURCE are copied)",
    )
    add("--vision-pretrained", metavar="TAG", help="tag or safetensors file of OpenFlamingo's tower (default: openai)")
    add(
        "--tokenizer",
        metavar="NAME",
        help="repository or folder (default: the one of SOURCE, or of the language model)",
    )
    add(
        "--without-media",
        choices=("nothing", "all_media"),
        default="nothing",
        help="what text before all images gets in Llama 3.2 Vision: nothing, or attention to all images of its row, "
        "later ones too, which is exactly what transformers computes (default: %(default)s)",
    )
    return parser


def _import(arguments: argparse.Namespace, output: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    from model.imports.convert import Choices, import_transformers

    disable_progress_bar()
    source: Path = arguments.source
    if not source.exists():
        raise ValueError(f"SOURCE: no such file or folder: {source}")
    if source.is_file():
        _import_openflamingo(arguments, output)
        return
    if arguments.vision_pretrained is not None:
        raise ValueError("--vision-pretrained: only OpenFlamingo's tower takes it; name the tower with --vision")
    choices = Choices(arguments.language_model, arguments.vision, arguments.tokenizer, arguments.without_media)
    import_transformers(source, output, choices)


def _import_openflamingo(arguments: argparse.Namespace, output: Path) -> None:
    from model.config import LanguageModelConfig
    from model.factory import build_flamingo, build_tokenizer
    from model.imports.openflamingo import load_openflamingo, read_openflamingo, read_openflamingo_settings
    from model.pretrained import save_flamingo
    from model.processor import ProcessorConfig

    if arguments.language_model is None:
        raise ValueError(
            "--language-model is required: OpenFlamingo's file lacks the frozen language model, for example "
            "anas-awadalla/mpt-1b-redpajama-200b for OpenFlamingo-3B"
        )
    if arguments.without_media != "nothing":
        raise ValueError(f"--without-media {arguments.without_media}: OpenFlamingo does not leak; leave it out")
    state = read_openflamingo(arguments.source)
    language_model = LanguageModelConfig(name=arguments.language_model, tokenizer=arguments.tokenizer)
    config = read_openflamingo_settings(state, language_model)
    name, tag = arguments.vision or _CLIP[0], arguments.vision_pretrained
    tag = _CLIP[1] if arguments.vision is None and tag is None else tag
    config = replace(config, vision=replace(config.vision, name=name, pretrained=tag))
    tokenizer = build_tokenizer(config)
    model = build_flamingo(config, tokenizer.ids)
    load_openflamingo(model, state)
    processor = ProcessorConfig.of(model.vision_encoder, image_fit="crop")
    save_flamingo(output, model, processor=processor, tokenizer=tokenizer.tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    """Import a model and return the exit code."""
    arguments = _parser().parse_args(argv)
    quiet_libraries()
    try:
        with whole_or_not(arguments.output) as folder:
            _import(arguments, folder)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"trainer.import_model: {error}", file=sys.stderr)
        return 1
    print(f"imported {arguments.source} to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
