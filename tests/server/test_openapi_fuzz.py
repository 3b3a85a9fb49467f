"""Requests made from /openapi.json: what it allows is answered as it says, what it does not is refused.

Seed and number of examples are fixed, so that two runs send the same requests.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case, GenerationMode
from schemathesis.config import (
    ChecksConfig,
    GenerationConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.specs.openapi.checks import positive_data_acceptance

from engine.server.openapi import OPERATIONS, document
from engine.server.openapi_requests import CONSTRAINTS
from helpers.http_server import DEADLINE_S
from helpers.server_process import ServerProcess, write_llama

CONTEXT_LENGTH, VOCAB_SIZE, VECTOR_SIZE = 128, 257, 64
FEW = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=100)

# What a schema does not say: how one field depends on another or on the length of the prompt, and which
# fields of other servers are refused; examples may have any field besides those that are described.
BEYOND_SCHEMAS = ("context_length_exceeded", "unsupported_parameter")
BEYOND_FIELDS = (
    *("min_tokens", "n", "sampling_params.min_new_tokens", "top_logprobs_num", "logprob_start_len"),
    *("lora_name", "lora_path"),
)


REFUSALS = ["400", "404", "405", "413", "415", "422"]
"""Of what is not described; a list with more items than are allowed may be too large a body, too."""


def described(description: dict[str, Any], mode: GenerationMode) -> Any:
    checks = ChecksConfig.from_dict({"negative_data_rejection": {"expected-statuses": REFUSALS}})
    project = ProjectConfig(generation=GenerationConfig(modes=[mode]), checks=checks)
    config = SchemathesisConfig(projects=ProjectsConfig(default=project))
    return schemathesis.openapi.from_dict(description, config=config)


def fitted() -> dict[str, Any]:
    """The description, narrowed to what fits the model under test: else most requests would not."""
    description = copy.deepcopy(document())
    schemas = description["components"]["schemas"]
    schemas["TokenId"]["maximum"] = VOCAB_SIZE - 1
    for name in ("ChatRequest", "CompletionRequest"):
        fit(schemas[name]["properties"])
        schemas[name]["properties"]["response_format"] = {"enum": [None, {"type": "json_object"}]}
    native = schemas["GenerateRequest"]["properties"]
    for name, schema in native.items():
        if len(schema["anyOf"][0].get("anyOf", ())) == 2:  # lists have to be of one length: alone will do
            native[name] = schema["anyOf"][0]["anyOf"][0]
    fit(native["sampling_params"]["properties"])
    schemas["EmbeddingRequest"]["properties"]["dimensions"]["anyOf"][0]["maximum"] = VECTOR_SIZE
    schemas["EmbeddingRequest"]["properties"]["prompt_name"] = {"type": "null"}  # the model has no prompts
    for name in ("text_1", "text_2"):  # as many of one as of the other
        schemas["ScoreRequest"]["properties"][name]["anyOf"][1]["maxItems"] = 1
    return description


def fit(fields: dict[str, Any]) -> None:
    """Let no answer be longer than there is room; no text is likely to be a grammar, and one may be set."""
    for name, schema in fields.items():
        if name in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
            schema["anyOf"][0]["maximum"] = 16
        elif name == "logit_bias":
            schema["anyOf"][0]["propertyNames"] = {"pattern": "^[0-9]{1,2}$"}
        elif name in CONSTRAINTS:
            fields[name] = {"type": "null"}
        elif name == "tool_choice":
            fields[name] = {"enum": [None, "none", "auto"]}  # a demand needs tools
        elif name == "tools":
            schema["anyOf"][0]["maxItems"] = 1  # their names have to differ


SECOND_NAMES = [
    *("/v1/tokenize", "/v1/detokenize", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    *("/model_info", "/get_server_info"),
]
# Routes to which nothing wrong can be sent: without parameters, or with any text for one.
TAKE_ANYTHING = [o.path for o in OPERATIONS if not o.request and not o.parameters] + ["/v1/models/{model_id}"]
GOOD = described(fitted(), GenerationMode.POSITIVE).exclude(path=SECOND_NAMES)
BAD = described(document(), GenerationMode.NEGATIVE).exclude(path=SECOND_NAMES + TAKE_ANYTHING)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = write_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=CONTEXT_LENGTH)
    flags = "--load-format dummy --max-total-tokens 4096 --allow-any-model-name --pooling mean"
    flags += " --matryoshka-dimensions any"
    with ServerProcess("--model-path", str(directory), *flags.split()) as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log
        # Nothing that a client sends is an error of the server.
        assert " ERROR " not in process.log


def check_good(case: Case, server: ServerProcess) -> None:
    response = case.call_and_validate(
        server.url, excluded_checks=[positive_data_acceptance], timeout=DEADLINE_S
    )
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["param"] != "model", "the model under test does what the route is for"
        assert error["code"] in BEYOND_SCHEMAS or error["param"] in BEYOND_FIELDS, error["message"]


@GOOD.parametrize()
@FEW
def test_what_is_described_is_answered_as_described(case: Case, server: ServerProcess) -> None:
    check_good(case, server)


@BAD.parametrize()
@FEW
def test_what_is_not_described_is_refused(case: Case, server: ServerProcess) -> None:
    case.call_and_validate(server.url, timeout=DEADLINE_S)


@pytest.mark.slow
@GOOD.parametrize()
@MANY
def test_much_that_is_described(case: Case, server: ServerProcess) -> None:
    check_good(case, server)


@pytest.mark.slow
@BAD.parametrize()
@MANY
def test_much_that_is_not_described(case: Case, server: ServerProcess) -> None:
    case.call_and_validate(server.url, timeout=DEADLINE_S)
