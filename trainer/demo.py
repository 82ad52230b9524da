"""Serve a page on which people can talk to an exported model and see where it looks.

    python -m trainer.demo EXPORT

EXPORT is an export folder (``run_dir/export``). The page runs on this machine alone unless --host says otherwise; it
has no password. It sends nothing anywhere, and loads nothing from other hosts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from trainer.demo_page.limits import Limits
from trainer.prompting.exported_model import load_exported_model, load_layout
from trainer.prompting.flags import add_device_flags, add_pixel_flags, number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Limits()
    add("model", type=Path, metavar="EXPORT", help="export folder")
    everybody = "address to serve on; 0.0.0.0 lets every machine of the network in (default: %(default)s)"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=everybody)
    add("--port", type=number(int, 1, 65535), default=7860, metavar="N", help="TCP port (default: %(default)s)")
    size = "largest uploaded file, in MiB (default: %(default)g)"
    add("--max-upload-mib", type=number(float, 0, open_low=True), default=default.upload_mib, metavar="N", help=size)
    most = "most new tokens of an answer (default: %(default)s)"
    add("--max-new-tokens", type=number(int, 1), default=default.new_tokens, metavar="N", help=most)
    tokens = "most tokens of a prompt with its examples (default: %(default)s)"
    add("--max-prompt-tokens", type=number(int, 1), default=default.prompt_tokens, metavar="N", help=tokens)
    media = "most images and videos of a prompt with its examples (default: %(default)s)"
    add("--max-media", type=number(int, 1), default=default.media, metavar="N", help=media)
    at_once = "answers that are computed at the same time (default: %(default)s)"
    add("--concurrency", type=number(int, 1), default=default.concurrency, metavar="N", help=at_once)
    waiting = "requests that wait at the same time; a further one is refused (default: %(default)s)"
    add("--max-queue", type=number(int, 1), default=default.queue, metavar="N", help=waiting)
    add_pixel_flags(parser)
    add_device_flags(parser)
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    """Serve the page until the process is told to end.

    Raises:
        OSError: A file cannot be read, or the address cannot be used.
        ValueError: The folder is no export, the address is in use, or gradio is missing.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs gradio: launch_scripts/setup.sh --dev installs it, or pip install gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    from trainer.demo_page.page import build_page
    from trainer.demo_page.server import check_address, start

    limits = Limits(
        upload_mib=arguments.max_upload_mib,
        new_tokens=arguments.max_new_tokens,
        prompt_tokens=arguments.max_prompt_tokens,
        media=arguments.max_media,
        concurrency=arguments.concurrency,
        queue=arguments.max_queue,
    )
    check_address(arguments.host, arguments.port)
    exported = load_exported_model(arguments.model, load_layout(arguments.model), arguments, with_videos=True)
    page = build_page(exported, limits, str(arguments.model))
    address = start(page, arguments.host, arguments.port, limits)
    print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page, and return the exit code."""
    arguments = _parser().parse_args(argv)
    disable_progress_bar()
    try:
        _serve(arguments)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"trainer.demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
