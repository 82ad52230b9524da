"""Ask the page's server as a browser does, and start the command with what cannot work."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio_client import Client, exceptions, handle_file

from trainer import demo
from trainer.demo_page.limits import MOST_BODY_BYTES, Limits
from trainer.demo_page.page import build_page
from trainer.demo_page.server import check_address, start
from trainer.prompting.exported_model import ExportedModel

LIMITS = Limits(upload_mib=0.01, new_tokens=40, media=3, queue=2)


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


@pytest.fixture(scope="module")
def address(exported: ExportedModel) -> Iterator[str]:
    """Address of a page with the tiny model."""
    page = build_page(exported, LIMITS, "tiny")
    yield start(page, "127.0.0.1", free_port(), LIMITS)
    page.close(verbose=False)


@pytest.fixture
def client(address: str) -> Client:
    """A new visitor of the page."""
    return Client(address, verbose=False, analytics_enabled=False)


def ask(client: Client, api_name: str, *values: object) -> object:
    return client.predict(*values, api_name=f"/{api_name}")


def answer(client: Client, new_tokens: int = 8) -> list[tuple[str, str]]:
    job = client.submit(new_tokens, False, 1.0, 1.0, api_name="/answer")
    job.result(timeout=60)
    return job.outputs()


def test_a_conversation(client: Client, folder: Path) -> None:
    pieces = ask(client, "add_files", [handle_file(folder / "0.png")])
    assert "image 1: 0.png" in pieces
    ask(client, "add_text", "w3 w4")
    kept = ask(client, "keep_as_example", "w5")
    assert "Empty" in kept[0] and "w3 w4 w5" in kept[1]
    pieces = ask(client, "add_files", [handle_file(folder / "1.png"), handle_file(folder / "clip.mp4")])
    assert "image 2: 1.png" in pieces and "video 3: clip.mp4" in pieces
    steps = answer(client)
    texts = [text for text, _ in steps]
    assert len(texts) > 4 and texts[0] == ""
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(re.findall("class=word>", steps[-1][1])) == len(texts[-1].split())
    assert "video 3, 100 %" in steps[-1][1]
    again = ask(client, "append_answer", texts[-1])
    assert texts[-1] in again[0]
    assert "Empty" in ask(client, "clear_prompt")[0]


def test_visitors_do_not_see_each_other(address: str, folder: Path) -> None:
    first, second = (Client(address, verbose=False, analytics_enabled=False) for _ in range(2))
    ask(first, "add_text", "w3")
    assert "w3" not in ask(second, "add_text", "w4")[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["text.png"], "text.png cannot be used: it is not an image"),
        (["cut.mp4"], "cut.mp4 cannot be used: the video is cut off"),
        (["0.png", "1.png", "2.png", "clip.mp4"], "At most 3 images and videos"),
    ],
)
def test_a_bad_upload_is_a_message(client: Client, folder: Path, names: list[str], message: str) -> None:
    with pytest.raises(exceptions.AppError, match=message):
        ask(client, "add_files", [handle_file(folder / name) for name in names])


def test_good_files_beside_a_bad_one_are_taken(client: Client, folder: Path) -> None:
    assert "0.png" in ask(client, "add_files", [handle_file(folder / name) for name in ("0.png", "text.png")])


def test_a_large_upload_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(bytes(20_000))
    with pytest.raises(Exception, match=r"(?i)size|413"):
        ask(client, "add_files", [handle_file(tmp_path / "big.png")])


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [("Content-Length", str(MOST_BODY_BYTES + 1), 413), ("Transfer-Encoding", "chunked", 411)],
)
def test_a_large_request_is_refused_before_it_is_read(address: str, name: str, value: str, code: int) -> None:
    place = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(place.netloc, timeout=20)
    connection.putrequest("POST", f"{place.path}gradio_api/call/add_text")
    connection.putheader(name, value)
    connection.endheaders()  # the body is never sent
    assert connection.getresponse().status == code


def test_other_mistakes_are_messages(client: Client) -> None:
    with pytest.raises(exceptions.AppError, match="The prompt is empty"):
        answer(client)
    with pytest.raises(exceptions.AppError, match="There is no text to add"):
        ask(client, "add_text", " ")
    with pytest.raises(exceptions.AppError, match="There is nothing to keep"):
        ask(client, "keep_as_example", "w5")
    with pytest.raises(exceptions.AppError, match="There is no answer"):
        ask(client, "append_answer", "")
    ask(client, "add_text", "w3")
    with pytest.raises(exceptions.AppError, match=r"(?i)maximum value|number from 1 to 40"):
        answer(client, 41)


def test_files_of_the_server_and_addresses_cannot_be_named(client: Client, address: str, folder: Path) -> None:
    """Send what a browser never sends: a path outside of the uploads, and an address to fetch."""
    for path in (str(folder / "0.png"), f"{address}theme.css"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "0.png"}
        body = json.dumps({"data": [[file]], "session_hash": "other"}).encode()
        request = urllib.request.Request(f"{address}gradio_api/call/add_files", body)
        request.add_header("Content-Type", "application/json")
        event = json.load(urllib.request.urlopen(request))["event_id"]
        told = urllib.request.urlopen(f"{address}gradio_api/call/add_files/{event}").read().decode()
        assert "event: error" in told and "0.png:" not in told
        assert ("fetches no addresses" in told) == path.startswith("http")


def test_a_stopped_answer_ends_its_thread(client: Client) -> None:
    ask(client, "add_text", "w3")
    job = client.submit(40, False, 1.0, 1.0, api_name="/answer")
    while not job.outputs():
        time.sleep(0.01)
    job.cancel()
    deadline = time.monotonic() + 30
    while any(thread.name == "answer" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_page_names_no_other_host(address: str) -> None:
    with urllib.request.urlopen(address) as response:
        policy, html = response.headers["Content-Security-Policy"], response.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    assert "fonts.googleapis" not in html
    assert not any(name in html for name in ("cdnjs", "huggingface.co"))


def run(*arguments: str) -> int:
    try:
        return demo.main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_folder_that_is_no_export_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path), "--port", str(free_port())) == 1
    assert f"trainer.demo: {tmp_path} is not an exported Flamingo" in capsys.readouterr().err


def test_a_missing_gradio_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("export") == 1
    assert "trainer.demo: the page needs gradio: launch_scripts/setup.sh --dev" in capsys.readouterr().err


def test_a_busy_port_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run(str(folder / "export"), "--port", str(port)) == 1
    message = capsys.readouterr().err
    assert f"--port {port} cannot be used" in message and "Choose another port" in message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host"])
def test_an_address_of_another_machine_is_named(host: str) -> None:
    with pytest.raises(ValueError, match=f"--host {host} --port"):
        check_address(host, free_port())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "70000"),
        ("--max-upload-mib", "0"),
        ("--max-new-tokens", "0"),
        ("--max-prompt-tokens", "x"),
        ("--max-media", "-1"),
        ("--concurrency", "0"),
        ("--max-queue", "1.5"),
    ],
)
def test_an_impossible_flag_is_named(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    assert run("export", flag, value) == 2
    assert flag in capsys.readouterr().err


def test_every_limit_reaches_the_page(exported: ExportedModel) -> None:
    page = build_page(exported, Limits(new_tokens=7, concurrency=3, queue=5), "tiny")
    answering = next(one for one in page.fns.values() if one.api_name == "answer")
    assert answering.concurrency_limit == 3 and page._queue.max_size == 5
    assert next(one.maximum for one in page.blocks.values() if isinstance(one, gr.Slider)) == 7
    assert page.analytics_enabled is False
