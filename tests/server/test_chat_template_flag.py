"""--chat-template: a file instead of the checkpoint's own template, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.server_config import ServerConfig
from engine.errors import ConfigError
from engine.server.model_files import ModelFiles
from helpers.http_server import Server, write_model
from helpers.server_process import run

FILE = "{% for m in messages %}<{{ m.role }}|{{ m.content }}>{% endfor %}{{ eos_token }}"
WITH_CALLS = (
    "{% for t in tools or [] %}<tools>{{ t | tojson }}</tools>{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
)


def write(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "chat.jinja"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_it_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    with Server(directory, config=ServerConfig(chat_template=write(tmp_path, FILE))) as server:
        assert server.chat().status_code == 200
        assert server.prompt_text(server.engine.submitted[0]) == "<user|Hi>"  # the end token is hidden
        assert server.engine.submitted[0].prompt_ids[-1] == 0


def test_it_gives_a_base_model_conversations(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with Server(directory) as server:
        refusal = server.chat()
        assert refusal.status_code == 400
        assert "start with --chat-template" in refusal.json()["message"]
    with Server(directory, config=ServerConfig(chat_template=write(tmp_path, FILE))) as server:
        assert server.chat().status_code == 200


def test_how_calls_are_written_is_read_from_it(tmp_path: Path) -> None:
    files = ModelFiles.load(
        str(write_model(tmp_path / "model")),
        sampling_defaults="model",
        chat_template_file=write(tmp_path, WITH_CALLS),
    )
    assert files.formats.tools is not None and files.formats.tools.name == "hermes"
    assert files.chat_template.shows_tools


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{% if %}", "line 1: "),
        ("{{ 1 / 0 }}{% nonsense %}", "line 1: "),
        (" \n", "the file is empty"),
        (b"\xff\xfe", "it is not UTF-8 text (invalid start byte at byte 0)"),
    ],
)
def test_what_is_no_template(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as raised:
        ModelFiles.load(
            str(write_model(tmp_path / "model")), sampling_defaults="model", chat_template_file=path
        )
    assert raised.value.message.startswith(f"--chat-template {path}: ")
    assert reason in raised.value.message and "\n" not in raised.value.message


def test_no_such_file_is_one_line(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        process = run("--chat-template", str(path), "--port", "0")
        assert process.returncode == 1
        assert "Traceback" not in process.stderr
        errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
        assert errors == [f"error: --chat-template {path}: {reason}"]
