"""What is counted and scored agrees with what is said, whatever ended the answer, streamed or whole."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.http_server import events_of
from helpers.server_process import ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS = {
    CHAT: {"messages": [{"role": "user", "content": "Tell me a story"}], "logprobs": True},
    COMPLETIONS: {"prompt": "Once upon a time", "logprobs": 0},
}
COMMON = {"model": "default", "return_token_ids": True, "temperature": 0, "max_tokens": 60}


def tokens_of(path: str, choice: dict[str, Any]) -> list[str]:
    scores = choice["logprobs"] or {}
    return [t["token"] for t in scores.get("content", ())] if path == CHAT else list(scores.get("tokens", ()))


def whole(bundled: ServerProcess, path: str, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(text, token ids, texts of scored tokens, why it ended) of each choice, and usage."""
    answer = bundled.http.post(path, json={**COMMON, **PROMPTS[path], **fields}).json()
    return [
        {
            "text": choice["message"]["content"] if path == CHAT else choice["text"],
            "ids": choice["token_ids"],
            "tokens": tokens_of(path, choice),
            "end": (choice["finish_reason"], choice["matched_stop"]),
        }
        for choice in answer["choices"]
    ], answer["usage"]


def streamed(bundled: ServerProcess, path: str, n: int, **fields: Any) -> tuple[list[dict[str, Any]], Any]:
    """The same, put together from a stream that counts as it goes."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**COMMON, **PROMPTS[path], **fields, "n": n, "stream": True, "stream_options": options}
    *events, last = events_of(bundled.http.post(path, json=body))
    choices = [{"text": "", "ids": [], "tokens": [], "end": None} for _ in range(n)]
    for event in events:
        (part,) = event["choices"]
        choice = choices[part["index"]]
        choice["text"] += (part["delta"].get("content") or "") if path == CHAT else part["text"]
        choice["ids"] += part.get("token_ids", [])
        choice["tokens"] += tokens_of(path, part)
        if part["finish_reason"]:
            choice["end"] = (part["finish_reason"], part["matched_stop"])
        if event["usage"]:
            # What was counted so far has been told so far, but for choices that share a step.
            assert event["usage"]["completion_tokens"] >= sum(len(c["ids"]) for c in choices)
    return choices, last["usage"]


def spell(bundled: ServerProcess, ids: list[int]) -> str:
    body = {"model": "default", "tokens": ids, "skip_special_tokens": True}
    return bundled.http.post("/detokenize", json=body).json()["text"] if ids else ""


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("n", [1, 3])
def test_tokens_scores_and_usage_agree_with_the_text(bundled: ServerProcess, path: str, n: int) -> None:
    (free,), _ = whole(bundled, path)
    text = free["text"]
    stops = [text[at : at + length] for at in (0, 1, 9, 30, 47) for length in (1, 3, 8)]
    fields: list[dict[str, Any]] = [{"stop": stop} for stop in stops]
    fields += [{"stop": stop, "include_stop_str_in_output": True} for stop in stops[4:9]]
    fields += [{}, {"max_tokens": 1}, {"stop_token_ids": [free["ids"][20]]}, {"seed": 1, "temperature": 1}]
    for more in fields:
        choices, usage = whole(bundled, path, n=n, **more)
        again, counted = streamed(bundled, path, n, **more)
        assert (choices, usage) == (again, counted), more
        assert usage["completion_tokens"] == sum(len(choice["ids"]) for choice in choices)
        for choice in choices:
            spelled = spell(bundled, choice["ids"])
            stop = more.get("stop")
            if stop is None:
                kept = choice["ids"][: len(choice["ids"]) - (choice["end"][1] is not None)]
                assert choice["text"] == spell(bundled, kept) == "".join(choice["tokens"][: len(kept)])
                continue
            # The last token completes the stop string; without it the stop string is not there.
            end = text.index(stop)
            assert choice["end"] == ("stop", stop)
            assert stop in spelled and stop not in spell(bundled, choice["ids"][:-1])
            assert choice["text"] == text[: end + len(stop) * ("include_stop_str_in_output" in more)]
            scored = "".join(choice["tokens"])
            assert scored.startswith(choice["text"]) and spelled.startswith(scored)
            assert len("".join(choice["tokens"][:-1])) < len(choice["text"]) or not choice["tokens"]
