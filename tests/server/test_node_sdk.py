"""The openai package for Node against the bundled model. Needs node and npm, which fetches the package.

pytest -m slow tests/server/test_node_sdk.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.server_process import ServerProcess

SCRIPT = Path(__file__).with_name("node_sdk.mjs")
PACKAGE = "openai@6.49.0"
ANSWER = "The capital of France is Paris."

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers(bundled: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text("{}")
    install = ["npm", "install", "--no-audit", "--no-fund", PACKAGE]
    subprocess.run(install, cwd=folder, check=True, timeout=300, capture_output=True)
    script = shutil.copy(SCRIPT, folder)
    command = ["node", str(script), f"{bundled.url}/v1"]
    done = subprocess.run(command, cwd=folder, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_answers(answers: dict[str, Any]) -> None:
    chat = answers["chat"]
    assert chat["choices"][0]["message"]["content"] == ANSWER
    assert chat["choices"][0]["finish_reason"] == "stop"
    assert answers["requestId"].startswith("req-")
    assert answers["streamed"]["text"] == ANSWER
    usage = {name: chat["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert answers["streamed"]["usage"].items() >= usage.items()
    assert answers["model"]["object"] == "model"


def test_what_the_package_puts_together_from_a_stream(answers: dict[str, Any]) -> None:
    for choice in answers["accumulated"]["choices"]:
        assert choice["message"]["content"] == ANSWER
        tokens = choice["logprobs"]["content"]
        assert "".join(token["token"] for token in tokens) == ANSWER
        assert {len(token["top_logprobs"]) for token in tokens} == {2}
    assert [choice["index"] for choice in answers["accumulated"]["choices"]] == [0, 1]


def test_scores_of_a_prompt(answers: dict[str, Any]) -> None:
    (choice,) = answers["scored"]["choices"]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == "One two three"
    assert choice["logprobs"]["token_logprobs"][0] is None


@pytest.mark.parametrize(
    ("name", "kind", "status", "code", "param", "words"),
    [
        ("badValue", "BadRequestError", 400, "invalid_value", "temperature", "must be non-negative"),
        ("badStream", "BadRequestError", 400, "invalid_value", "n", "must be in [1, 128]"),
        ("noModel", "NotFoundError", 404, "model_not_found", "model", "does not exist"),
        ("tooLong", "BadRequestError", 400, "context_length_exceeded", None, "context length"),
    ],
)
def test_refusals(
    answers: dict[str, Any], name: str, kind: str, status: int, code: str, param: str | None, words: str
) -> None:
    error = answers[name]
    assert (error["kind"], error["status"], error["code"], error["param"]) == (kind, status, code, param)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert error["requestID"].startswith("req-")
