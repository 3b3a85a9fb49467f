"""Wrong and hostile requests: each is refused at once, in the one body, and the next good one is answered.

A table: what is sent, and the status, code and parameter that come back. What breaks the protocol below
JSON is in test_hostile_input.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from helpers.errors import check_error
from helpers.http_server import DEADLINE_S
from helpers.server_process import ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OTHERS = ("/generate", "/v1/embeddings", "/tokenize", "/detokenize", "/abort_request")
JSON = {"content-type": "application/json"}
MESSAGES = [{"role": "user", "content": "Hi"}]
GOOD = {CHAT: {"model": "default", "messages": MESSAGES}, COMPLETIONS: {"model": "default", "prompt": "Hi"}}
VOCAB_SIZE = 4096
ANSWER_S = 1.0
INVALID, MISSING, JUNK = "invalid_value", "missing_required_parameter", "invalid_json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A request, its body as JSON or as bytes, and the refusal that it deserves."""

    what: str
    path: str
    body: Any = b""
    method: str = "POST"
    headers: dict[str, str] = dataclasses.field(default_factory=lambda: JSON)
    status: int = 400
    code: str = INVALID
    param: str | None = None

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def send(self, http: httpx.Client) -> httpx.Response:
        # As a URL the path would be tidied up; tricks are to arrive as they are.
        target = {"target": self.path.encode("latin-1")}
        return http.request(self.method, "/", content=self.content, headers=self.headers, extensions=target)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def fields(path: str, name: str, *values: Any, param: str | None = None, **more: Any) -> Iterator[Case]:
    """A good request but for one field."""
    for value in values:
        body = {**GOOD[path], name: value}
        what = f"{path.split('/')[2]}-{name}={short(value)}"
        yield Case(what=what, path=path, body=body, param=param or name, **more)


def both(name: str, *values: Any, **more: Any) -> Iterator[Case]:
    for path in GOOD:
        yield from fields(path, name, *values, **more)


def values() -> Iterator[Case]:
    """Wrong types, and numbers outside of their ranges."""
    yield from both("temperature", -1, -1e-9, 2.01, 1e308, "0.7", True, [1], {}, 10**400)
    yield from both("top_p", 0, -0.1, 1.0001, "1", False, [])
    yield from both("top_k", -2, 1.5, "40", True, 2**63, [1])
    yield from both("min_p", -0.1, 1.5, "0", {})
    yield from both("frequency_penalty", -2.1, 2.1, "1", True, 10**400)
    yield from both("presence_penalty", -2.1, 2.1, [0], 1e300)
    yield from both("repetition_penalty", 0, -1, 2.1, "1")
    yield from both("max_tokens", -1, 1.5, "5", True, [5], 2**63, -(2**70), 1e30)
    yield from both("min_tokens", -1, 2**62, "1", 0.5)
    yield from both("n", 0, -1, 129, 10**9, 2**70, "1", 1.5, True)
    yield from both("seed", 2**63, -(2**63) - 1, "x", 0.5, [])
    yield from both("stream", "true", 1, 0, [], "")
    yield from both("stop", 5, True, {"a": 1}, ["a", 5], [""], "", [None], [["a"]], ["x"] * 33, "x" * 10_000)
    yield from both("stop_token_ids", 5, "5", [-1], [VOCAB_SIZE], [2**40], [2**70], [1.5], ["5"], [5] * 1025)
    yield from both("logit_bias", [1], "x", {"a": 1}, {"-1": 1}, {"1_0": 1}, {" 1": 1}, {"٣": 1}, {"": 1})
    yield from both("logit_bias", {str(VOCAB_SIZE): 1}, {"9" * 30: 1}, {"1": 101}, {"1": -100.5}, {"1": "5"})
    yield from both("logit_bias", {"1": None}, {str(i): 1 for i in range(100_000)})
    yield from both("ignore_eos", "yes", 1)
    yield from both("skip_special_tokens", "no", 0)
    yield from both("no_stop_trim", 1)
    yield from both("include_stop_str_in_output", [])
    yield from both("return_token_ids", "1")
    yield from both("return_cached_tokens_details", 1)
    yield from both("cache_salt", 5, ["a"], "x" * 257)
    yield from both("extra_key", True, "x" * 257)
    yield from both("rid", 5, "", "x" * 257, ["a"])
    yield from both("stream_options", [], "x", True)
    yield from both("stream_options", {"include_usage": 1}, param="stream_options.include_usage")
    yield from fields(CHAT, "max_completion_tokens", -1, 1.5, "5", 2**63)
    body = {**GOOD[CHAT], "max_tokens": -1, "max_completion_tokens": 5}
    yield Case(what="max_tokens-that-does-not-count", path=CHAT, body=body, param="max_tokens")
    yield from fields(CHAT, "logprobs", 1, 0, "true", 5)
    yield from fields(CHAT, "top_logprobs", 1, 21, -1, 1.5, "5", True, 10**9)
    yield from fields(CHAT, "chat_template_kwargs", [1], "x", {"messages": []}, {"tools": []})
    yield from fields(CHAT, "continue_final_message", "yes")
    yield from fields(CHAT, "add_generation_prompt", 1)
    yield from fields(COMPLETIONS, "logprobs", -1, 21, 1.5, True, "5", 10**9)
    yield from fields(COMPLETIONS, "max_tokens", 0)
    yield from fields(COMPLETIONS, "echo", "yes", 1)
    unsupported = {"code": "unsupported_parameter"}
    yield from fields(COMPLETIONS, "best_of", 2, 10**9, **unsupported)
    yield from fields(COMPLETIONS, "suffix", "x", **unsupported)


def prompts() -> Iterator[Case]:
    yield from fields(COMPLETIONS, "prompt", "", [], [[]], ["a", ""], 5, 1.5, {}, True, {"a": "b"})
    yield from fields(COMPLETIONS, "prompt", [1, "a"], ["a", 1], [[1], 5], [[[1]]], [["a"]], [None])
    yield from fields(COMPLETIONS, "prompt", [-1], [VOCAB_SIZE], [[1], [VOCAB_SIZE]], [2**31], [2**70], [1.5])
    yield from fields(COMPLETIONS, "prompt", [True], ["a"] * 1025, [[1]] * 1025)
    too_long = {"code": "context_length_exceeded", "param": None}
    long_prompts = ("x" * 3_000_000, [7] * 2048, [[7], [7] * 5000], [7] * 1_000_000)
    for case in fields(COMPLETIONS, "prompt", *long_prompts):
        yield dataclasses.replace(case, **too_long)
    messages = [{"role": "user", "content": "word " * 100_000}]
    yield Case(what="chat-long", path=CHAT, body={**GOOD[CHAT], "messages": messages}, **too_long)
    body = {**GOOD[COMPLETIONS], "prompt": [7] * 2000, "max_tokens": 49}
    yield Case(what="no-room", path=COMPLETIONS, body=body, code=too_long["code"], param="max_tokens")
    body = {**GOOD[COMPLETIONS], "prompt": ["a"] * 1024, "n": 3}
    yield Case(what="too-many-choices", path=COMPLETIONS, body=body, param="n")
    body = {**GOOD[COMPLETIONS], "prompt": ["a"] * 1024, "n": 2, "max_tokens": 1}
    yield Case(what="more-than-there-are-places", path=COMPLETIONS, body=body, param="n")
    body = {"model": "default", "prompt": [[7] * 2000] * 20, "echo": True, "logprobs": 20, "max_tokens": 1}
    yield Case(what="scores-without-end", path=COMPLETIONS, body=body, param="logprobs")


def messages() -> Iterator[Case]:
    def case(value: Any, param: str, code: str = INVALID) -> Case:
        body = {"model": "default", "messages": value}
        return Case(what=f"messages={short(value)}", path=CHAT, body=body, param=param, code=code)

    def said(content: Any, param: str, code: str = INVALID) -> Case:
        return case([{"role": "user", "content": content}], f"messages[0].content{param}", code)

    yield case([], "messages")
    yield case("hello", "messages")
    yield case({"role": "user"}, "messages")
    yield case(["hello"], "messages")
    yield case([None], "messages")
    yield case([[]], "messages")
    yield case([*MESSAGES, 5], "messages")
    yield case([{}], "messages[0].role", MISSING)
    yield case([{"content": "x"}], "messages[0].role", MISSING)
    yield case([{"role": None, "content": "x"}], "messages[0].role", MISSING)
    yield case([*MESSAGES, {"role": "user"}], "messages[1].content", MISSING)
    for role in ("root", "", "User", "user ", 5, True, ["user"], {"a": 1}, "x" * 100_000):
        yield case([{"role": role, "content": "x"}], "messages[0].role")
    yield case([{"role": "user", "content": "x", "name": 5}], "messages[0].name")
    yield case([{"role": "tool", "content": "x", "tool_call_id": []}], "messages[0].tool_call_id")
    for content in (5, True, {}, {"type": "text", "text": "x"}, ["x"], [5], [[]]):
        yield said(content, "")
    yield said([{}], "[0].type", MISSING)
    yield said([{"type": "text"}], "[0].text", MISSING)
    yield said([{"type": "text", "text": 5}], "[0].text")
    yield said([{"type": "text", "text": ["x"]}], "[0].text")
    image = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    for part in (image, {"type": "input_audio"}, {"type": "file"}, {"type": "Text", "text": "x"}):
        yield said([{"type": "text", "text": "x"}, part], "[1].type", "unsupported_parameter")


def required() -> Iterator[Case]:
    for path, good in GOOD.items():
        for name in good:
            for what, body in (
                ("without", {k: v for k, v in good.items() if k != name}),
                ("null", {**good, name: None}),
            ):
                what = f"{path}-{what}-{name}"
                yield Case(what=what, path=path, body=body, code=MISSING, param=name)
        yield Case(what=f"{path}-empty", path=path, body={}, code=MISSING, param="model")
    yield Case(what="detokenize-nothing", path="/detokenize", body={}, code=MISSING, param="tokens")
    yield Case(what="tokenize-nothing", path="/tokenize", body={}, code=MISSING, param="prompt")
    yield Case(what="abort-nothing", path="/abort_request", body={}, code=MISSING, param="rid")
    yield Case(what="abort-empty", path="/abort_request", body={"rid": ""}, code=MISSING, param="rid")


def names() -> Iterator[Case]:
    """Models that are not there, named in a body or in a path."""
    missing = {"status": 404, "code": "model_not_found", "param": "model"}
    yield from both("model", "gpt-9", "", " default", "DEFAULT", "default\x00", "x" * 100_000, **missing)
    yield from both("model", "../../etc/passwd", "/etc/passwd", ":default", **missing)
    yield from both("model", "default:", "default:../../etc", **(missing | {"code": "adapter_not_found"}))
    yield from both("model", "'; drop table models", "\u202edefault", "😀", **missing)
    yield from both("model", 5, True, [], ["default"], {"a": 1})
    for name in (
        "nope", "../../../etc/passwd", "../../health", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%5c..%5cwindows",
        "%00", "%ff%fe", "%252e%252e", "default%0d%0aset-cookie:%20a=b", "%F0%9F%98%80", "%", "%zz", "{a}",
        "a" * 4000, "//", ".", "default/", "default%00", "default;a=b", "<script>alert(1)</script>", "*",
    ):  # fmt: skip
        yield Case(what=f"GET-model-{short(name)}", path=f"/v1/models/{name}", method="GET", **missing)


def junk() -> Iterator[Case]:
    """Bodies that are no JSON object, and JSON that Unicode or the standard does not allow."""
    good = json.dumps(GOOD[CHAT]).encode()
    for content in (
        b"", b" ", b"{", b"}", b"nonsense", b"[]", b'"text"', b"5", b"null", b"true", b"{}{}", b"{},",
        b"{'model': 'x'}", b'{"model": NaN}', b'{"model": Infinity}', b'{"temperature": -Infinity}',
        b'{"model": undefined}', b'{"a": 01}', b'{"a": +1}', b'{"a": .5}', b'{"a": 0x10}', b'{"a": 1e999}',
        b'{"n": ' + b"9" * 10_000 + b"}", b'{"a": "\xff\xfe"}', b'{"a": "\xc0\x80"}',
        b'{"a": "\xed\xa0\x80"}', b'{"a": "\xf4\x90\x80\x80"}', b'{"a": "\\ud800"}', b'{"\\ud800": 1}',
        b'{"a": "\\udc00\\ud800"}', b'{"a": "\\u12"}', b'{"a": "\\x41"}',
        b'{"a": "tab\there"}', b'{"a": "line\nend"}', b'{"a": "\x00"}',
        b'{"a": 1,}', b'{"a" 1}', b"{a: 1}", b'{"a": [1, 2}', b"\xef\xbb\xbf" + good, good[:-1], good + b"x",
        good.decode().encode("utf-16"), good.decode().encode("utf-32"), b"/* why */" + good, b"\x00" * 100,
        b"[" * 200_000, b'{"a":' * 200_000, b"[" * 2000 + b"]" * 2000, b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b'{"model": "' + b"x" * 1_000_000, b"<xml/>", b"model=default&messages=x",
    ):  # fmt: skip
        yield Case(what=f"junk-{short(content)}", path=CHAT, body=content, code=JUNK)
    yield Case(what="junk-completions", path=COMPLETIONS, body=b"{", code=JUNK)
    for path in (*OTHERS, "/v1/tokenize", "/v1/detokenize"):
        yield Case(what=f"junk-{path}", path=path, body=b"[]", code=JUNK)
    # Of a repeated key the last one counts, as with most readers of JSON.
    twice = good[:-1] + b', "temperature": 1, "temperature": -1}'
    yield Case(what="key-twice", path=CHAT, body=twice, param="temperature")
    twice = b'{"model": "default", "prompt": "x", "model": "other"}'
    found = {"status": 404, "code": "model_not_found", "param": "model"}
    yield Case(what="model-twice", path=COMPLETIONS, body=twice, **found)
    twice = b'{"model": "default", "prompt": "x", "prompt": []}'
    yield Case(what="prompt-twice", path=COMPLETIONS, body=twice, param="prompt")
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    for name in ("stop", "logit_bias", "messages", "temperature", "stream"):
        body = good[:-1] + b', "%s": %s}' % (name.encode(), deep)
        yield Case(what=f"deep-{name}", path=CHAT, body=body, param=name)


def transport() -> Iterator[Case]:
    """Bodies that are too large, of another type, or sent to the wrong place in the wrong way."""
    large = {"status": 413, "code": "body_too_large"}
    huge = b'{"model": "' + b"x" * 20_000_000 + b'"}'
    for path in (CHAT, COMPLETIONS, *OTHERS):
        yield Case(what=f"20MB-{path}", path=path, body=huge, **large)
    yield Case(what="20MB-of-nothing", path=CHAT, body=b" " * 20_000_000, **large)
    for kind in (
        "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
        "*/*", "application/xml", "application/json5", "application/jsonx", "json", "", ";", "application",
    ):  # fmt: skip
        other = {"status": 415, "code": "unsupported_media_type", "headers": {"content-type": kind}}
        yield Case(what=f"type-{kind!r}", path=CHAT, body=GOOD[CHAT], **other)
    for coding in ("gzip", "br", "deflate", "zstd", "gzip, identity", "x"):
        headers = {**JSON, "content-encoding": coding}
        other = {"status": 415, "code": "unsupported_media_type", "headers": headers}
        yield Case(what=f"coding-{coding}", path=CHAT, body=GOOD[CHAT], **other)
    wrong = {"status": 405, "code": "method_not_allowed"}
    for path in (CHAT, COMPLETIONS, *OTHERS):
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            yield Case(what=f"{method}-{path}", path=path, method=method, **wrong)
    for path in ("/", "/v1/models", "/v1/models/default", "/health", "/metrics", "/model_info", "/v1/loads"):
        for method in ("POST", "PUT", "DELETE"):
            yield Case(what=f"{method}-{path}", path=path, method=method, body=GOOD[CHAT], **wrong)
    nowhere = {"status": 404, "code": "route_not_found"}
    for path in (
        "/nope", "/v1", "/v1/", "/v2/chat/completions", "/v1/chat", "/V1/models", "/v1/chat/completions/x",
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//v1/models", "/.git/config", "/static/../app.py",
        "/openapi.json/x", "/%00", "/" + "x" * 4000, "/v1%2Fmodels",
    ):  # fmt: skip
        yield Case(what=f"GET-{short(path)}", path=path, method="GET", **nowhere)
    yield Case(what="POST-nowhere", path="/v1/chat/completion", body=GOOD[CHAT], **nowhere)


def other_routes() -> Iterator[Case]:
    for value in (5, [5], ["a", 5], {}, True, ["a"] * 1025, [["a"]]):
        yield Case(what=f"tokenize={short(value)}", path="/tokenize", body={"prompt": value}, param="prompt")
    body = {"prompt": "x", "messages": MESSAGES}
    yield Case(what="tokenize-both", path="/tokenize", body=body, param="prompt")
    body = {"prompt": "x", "add_special_tokens": "yes"}
    yield Case(what="tokenize-flag", path="/tokenize", body=body, param="add_special_tokens")
    body = {"prompt": "x" * 3_000_000}
    yield Case(what="tokenize-long", path="/tokenize", body=body, code="context_length_exceeded")
    found = {"status": 404, "code": "model_not_found", "param": "model"}
    yield Case(what="tokenize-model", path="/tokenize", body={"model": "x", "prompt": "x"}, **found)
    yield Case(what="detokenize-model", path="/detokenize", body={"model": "x", "tokens": []}, **found)
    no_ids = ([-1], [VOCAB_SIZE], [2**70], [1.5], ["1"], [True], [None], [[1], 2], [1, [2]], [[[1]]])
    for value in ("x", 5, {}, *no_ids):
        what = f"detokenize={short(value)}"
        yield Case(what=what, path="/detokenize", body={"tokens": value}, param="tokens")
    for value in (5, ["a"], {}, True):
        yield Case(what=f"abort={value!r}", path="/abort_request", body={"rid": value}, param="rid")
    body = {"abort_all": "yes"}
    yield Case(what="abort-all", path="/abort_request", body=body, param="abort_all")
    for value in ("-1", "61", "nan", "inf", "-inf", "abc", "1e9", "", "0x1", "1%00", "9" * 400):
        path = f"/flush_cache?timeout={value}"
        yield Case(what=f"flush-{short(value)}", path=path, param="timeout")
    for value in ("xml", "", "JSON", "json%00", "x" * 3000):
        path = f"/v1/loads?format={value}"
        yield Case(what=f"loads-{short(value)}", path=path, method="GET", param="format")


GROUPS = (values, prompts, messages, required, names, junk, transport, other_routes)
CASES = [case for group in GROUPS for case in group()]


def test_there_are_many_cases_and_all_differ() -> None:
    assert len(CASES) >= 500
    sent = {(case.method, case.path, *case.headers.values(), case.content) for case in CASES}
    assert len(sent) == len(CASES)


@pytest.fixture(scope="module")
def http(bundled: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=bundled.url, trust_env=False, timeout=DEADLINE_S) as client:
        yield client


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what.encode("unicode_escape").decode())
def test_refused_at_once_and_the_next_good_request_is_answered(http: httpx.Client, case: Case) -> None:
    elapsed_s = []
    while not elapsed_s or (min(elapsed_s) > ANSWER_S and len(elapsed_s) < 10):  # others may take the cores
        response = case.send(http)
        elapsed_s.append(response.elapsed.total_seconds())
    assert min(elapsed_s) < ANSWER_S
    message = check_error(response, case.status, case.code, case.param)["message"]
    if case.code == MISSING:
        assert message == f"Invalid request: {case.param} is required" or case.path == "/abort_request"
    elif case.code == INVALID and case.param is not None:
        assert message.startswith(f"Invalid request: {case.param} ")
        assert f"{case.param} {case.param} " not in message
    assert (case.status == 405) == ("allow" in response.headers)
    assert http.post(CHAT, json={**GOOD[CHAT], "max_tokens": 1}).status_code == 200
