"""The openai package for Node against the bundled model. Needs node and npm, which fetches it, and zod.

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

PACKAGES = ("openai@6.49.0", "zod@4.1.12")
ANSWER = "The capital of France is Paris."

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text("{}")
    install = ["npm", "install", "--no-audit", "--no-fund", *PACKAGES]
    subprocess.run(install, cwd=folder, check=True, timeout=300, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def answers(bundled: ServerProcess, folder: Path) -> dict[str, Any]:
    return run("node_sdk.mjs", bundled, folder)


def run(name: str, bundled: ServerProcess, folder: Path) -> dict[str, Any]:
    script = shutil.copy(Path(__file__).with_name(name), folder)
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


def test_tools_and_structured_answers(bundled: ServerProcess, folder: Path) -> None:
    found = run("node_tools.mjs", bundled, folder)
    for name in ("called", "demanded"):
        assert found[name]["finish_reason"] == "tool_calls"
        (call,) = found[name]["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather" and call["id"]
        assert call["function"]["parsed_arguments"] == {"city": "Paris"}
    assert found["report"] == found["streamedReport"]
    assert found["report"]["mood"] in ("good", "bad") and 0 <= found["report"]["count"] <= 9
    assert found["roles"] == ["user", "assistant", "tool", "assistant"]
    assert "21" in found["answer"] and "Paris" in found["answer"]
