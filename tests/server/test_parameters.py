"""What each documented parameter does to the answers of the bundled model, its default, and both its ends.

The model's own log-probabilities are the reference: they are raw, so what a parameter must do to the choice
of tokens follows from them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.server_process import ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "Once upon a time"
UNSURE = "The"
"""Several tokens are likely to come next, and many are not."""

STORY = [{"role": "user", "content": "Tell me a story"}]
GREETING = [{"role": "user", "content": "Hello!"}]
TOLERANCE = 1e-4
"""Of sums of a log-probability, which is a float32 below 100, and a few multiples of penalties."""


@pytest.fixture
def ask(bundled: ServerProcess) -> Any:
    def ask(path: str, **fields: Any) -> Any:
        body = {
            "model": "default",
            **({"messages": STORY} if path == CHAT else {"prompt": PROMPT}),
            **fields,
        }
        response = bundled.http.post(path, json=body)
        assert response.status_code == 200, response.text
        assert "x-ignored-params" not in response.headers
        return response.json()

    return ask


@pytest.fixture(scope="module")
def logits_server() -> Iterator[ServerProcess]:
    with ServerProcess("--logprobs-mode", "raw_logits") as process:
        process.wait_ready()
        yield process


def texts(answer: Any) -> list[str]:
    return [c["text"] if "text" in c else c["message"]["content"] for c in answer["choices"]]


# --- defaults and ends


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("name", "default", "other"),
    [
        ("temperature", 1, 0),
        ("top_p", 1, 0.2),
        ("top_k", -1, 1),
        ("top_k", 0, 2),
        ("min_p", 0, 0.9),
        ("frequency_penalty", 0, 2),
        ("presence_penalty", 0, 2),
        ("repetition_penalty", 1, 2),
        ("logit_bias", {}, {"300": 100}),
        ("stop", [], ["e"]),
        ("stop_token_ids", [], list(range(300, 1300))),
        ("min_tokens", 0, 60),
        ("ignore_eos", False, True),
        ("n", 1, 2),
    ],
)
def test_a_parameter_left_out_has_its_default(
    ask: Any, path: str, name: str, default: Any, other: Any
) -> None:
    """And the default does nothing that another value would not change."""
    # Long enough for an end of its own, which min_tokens and ignore_eos put off.
    fields = {"seed": 3, "max_tokens": 400 if name in ("min_tokens", "ignore_eos") else 60}
    if fields["max_tokens"] == 400:
        fields = (
            {"seed": 3, "max_tokens": 60, "prompt": "Hi"}
            if path == COMPLETIONS
            else {**fields, "messages": GREETING}
        )
    left_out = ask(path, **fields)
    assert ask(path, **fields, **{name: default})["choices"] == left_out["choices"]
    assert ask(path, **fields, **{name: other})["choices"] != left_out["choices"]


@pytest.mark.parametrize(
    ("path", "name", "default"),
    [
        *(
            (CHAT, *rest)
            for rest in (("logprobs", False), ("top_logprobs", 0), ("add_generation_prompt", True))
        ),
        *((CHAT, *rest) for rest in (("continue_final_message", False), ("chat_template_kwargs", {}))),
        *((COMPLETIONS, *rest) for rest in (("echo", False), ("best_of", 1))),
        *(
            (path, *rest)
            for path in (CHAT, COMPLETIONS)
            for rest in (
                *(
                    ("max_tokens", 16),
                    ("stream", False),
                    ("skip_special_tokens", True),
                    ("no_stop_trim", False),
                ),
                *(("include_stop_str_in_output", False), ("return_token_ids", False), ("cache_salt", "")),
                *(("return_cached_tokens_details", False), ("priority", 0), ("return_timings", False)),
            )
        ),
    ],
)
def test_these_defaults_too(ask: Any, path: str, name: str, default: Any) -> None:
    def answer(**fields: Any) -> dict[str, Any]:
        content = ask(path, seed=4, stop=["zzz"], **fields)
        return {key: value for key, value in content.items() if key not in ("id", "created")}

    assert answer(**{name: default}) == answer()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (0, 1e-9, 1e-4, 2)),
        ("top_p", (1e-300, 1e-6, 1)),
        ("top_k", (-1, 0, 1, 4096, 10**9, 2**63 - 1)),
        ("min_p", (0, 1)),
        ("frequency_penalty", (-2, 2)),
        ("presence_penalty", (-2, 2)),
        ("repetition_penalty", (1e-6, 2)),
        ("n", (1, 128)),
        ("seed", (-(2**63), -1, 0, 2**63 - 1)),
        ("max_tokens", (1, 2.0)),
        ("min_tokens", (0, 4)),
        ("stop", ("x", ["x"], ["x" * i for i in range(1, 33)], ["x" * 8192])),
        ("stop_token_ids", ([], [0, 4095], list(range(1024)))),
        ("logit_bias", ({"0": -100, "4095": 100}, {str(i): 0.5 for i in range(4096)})),
        ("cache_salt", ("x" * 256,)),
    ],
)
def test_the_ends_of_a_range_are_served(ask: Any, path: str, name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        answer = ask(path, **{"max_tokens": 4, name: value})
        assert 1 <= answer["usage"]["completion_tokens"] <= 4 * len(answer["choices"])


# --- which tokens are taken


def first_tokens(ask: Any, **fields: Any) -> Counter[str]:
    """The first token of 1024 answers, by its text; seeds are fixed, so the counts are."""
    counts: Counter[str] = Counter()
    for seed in range(8):
        answer = ask(
            COMPLETIONS, prompt=UNSURE, n=128, max_tokens=1, seed=seed, logprobs=0, ignore_eos=True, **fields
        )
        counts.update(choice["logprobs"]["tokens"][0] for choice in answer["choices"])
    return counts


def probabilities(ask: Any) -> dict[str, float]:
    """The most likely first tokens, best first."""
    (choice,) = ask(COMPLETIONS, prompt=UNSURE, max_tokens=1, temperature=0, logprobs=20)["choices"]
    found = {token: math.exp(value) for token, value in choice["logprobs"]["top_logprobs"][0].items()}
    assert sum(found.values()) <= 1 + TOLERANCE
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@pytest.mark.parametrize("temperature", [0.3, 1, 2])
def test_temperature_sharpens_or_flattens_the_distribution(ask: Any, temperature: float) -> None:
    expected = {token: p ** (1 / temperature) for token, p in list(probabilities(ask).items())[:6]}
    counts = first_tokens(ask, temperature=temperature)
    total, num = sum(expected.values()), sum(counts[token] for token in expected)
    assert num > 100
    for token, weight in expected.items():
        share = weight / total
        # Of a binomial count: six standard deviations, and one for counts that are nearly none.
        assert abs(counts[token] - num * share) <= 6 * math.sqrt(num * share * (1 - share)) + 1, token


def test_top_k_takes_the_k_most_likely(ask: Any) -> None:
    best = list(probabilities(ask))
    for k in (1, 2, 3, 5):
        assert set(first_tokens(ask, top_k=k, temperature=2)) == set(best[:k])


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.8, 0.9])
def test_top_p_takes_the_fewest_that_reach_it(ask: Any, top_p: float) -> None:
    nucleus, reached = set(), 0.0
    for token, p in probabilities(ask).items():
        if reached >= top_p:
            break
        nucleus.add(token)
        reached += p
    assert reached >= top_p, "the nucleus is among the alternatives shown"
    found = first_tokens(ask, top_p=top_p)
    assert set(found) <= nucleus
    assert sum(found[token] > 0 for token in nucleus) >= 0.8 * len(nucleus)


@pytest.mark.parametrize("min_p", [0.02, 0.2, 0.7, 1])
def test_min_p_takes_what_is_near_the_most_likely(ask: Any, min_p: float) -> None:
    known = probabilities(ask)
    best = max(known.values())
    allowed = {token for token, p in known.items() if p >= min_p * best * (1 - TOLERANCE)}
    assert len(allowed) < len(known)
    found = first_tokens(ask, min_p=min_p)
    assert set(found) <= allowed
    assert sum(found[token] > 0 for token in allowed) >= 0.8 * len(allowed)


def test_four_ways_to_be_greedy(ask: Any) -> None:
    fields = {"max_tokens": 40, "logprobs": 1}
    (greedy,) = ask(COMPLETIONS, temperature=0, **fields)["choices"]
    for logprob, top in zip(
        greedy["logprobs"]["token_logprobs"], greedy["logprobs"]["top_logprobs"], strict=True
    ):
        assert logprob == max(top.values())
    for other in (
        {"temperature": 0, "seed": 5},
        {"top_k": 1, "seed": 1},
        {"top_k": 1, "temperature": 2, "seed": 2},
        {"top_p": 1e-9, "seed": 3},
        {"min_p": 1, "seed": 4},
        {"temperature": 1e-3, "seed": 6},
    ):
        assert ask(COMPLETIONS, **other, **fields)["choices"] == [greedy]
    three = ask(COMPLETIONS, temperature=0, n=3, **fields)["choices"]
    assert [{**choice, "index": 0} for choice in three] == [greedy] * 3


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 2},
        {"frequency_penalty": 0.7, "presence_penalty": 0.4},
        {"presence_penalty": 2},
        {"frequency_penalty": -2},
        {"presence_penalty": -2},
        {"frequency_penalty": 1.5, "presence_penalty": -1},
    ],
    ids=str,
)
def test_penalties_are_taken_off_the_scores_of_tokens_already_written(
    ask: Any, fields: dict[str, float]
) -> None:
    """Greedily, the token with the most left after both penalties is taken, at each of 80 positions."""
    asked = {"prompt": "Japan", "temperature": 0, "max_tokens": 80, "logprobs": 20, "ignore_eos": True}
    answer = ask(COMPLETIONS, **asked, **fields)
    scores = answer["choices"][0]["logprobs"]
    written: Counter[str] = Counter()
    num_changed = 0
    for token, top in zip(scores["tokens"], scores["top_logprobs"], strict=True):

        def left(candidate: str, top: dict[str, float] = top) -> float:
            off = fields.get("frequency_penalty", 0) * written[candidate]
            return top[candidate] - off - fields.get("presence_penalty", 0) * (written[candidate] > 0)

        assert left(token) >= max(map(left, top)) - TOLERANCE
        num_changed += top[token] < max(top.values())
        written[token] += 1
    assert num_changed > 0


@pytest.mark.parametrize("penalty", [0.7, 1.1, 2])
def test_the_repetition_penalty_divides_the_logits_of_what_was_said(
    logits_server: ServerProcess, penalty: float
) -> None:
    """As in Hugging Face's generate: positive logits are divided by it, negative ones multiplied."""
    body = {"model": "default", "prompt": PROMPT, "temperature": 0, "logprobs": 20, "ignore_eos": True}
    asked = {**body, "max_tokens": 150, "repetition_penalty": penalty, "echo": True}
    scores = logits_server.http.post(COMPLETIONS, json=asked).json()["choices"][0]["logprobs"]
    num_prompt = len(scores["tokens"]) - 150
    said, num_changed = set(scores["tokens"][:num_prompt]), 0
    for token, top in list(zip(scores["tokens"], scores["top_logprobs"], strict=True))[num_prompt:]:
        left = {t: (v / penalty if v > 0 else v * penalty) if t in said else v for t, v in top.items()}
        assert left[token] >= max(left.values()) - TOLERANCE
        num_changed += top[token] < max(top.values())
        said.add(token)
    assert num_changed > 0


def test_the_repetition_penalty_sees_the_prompt_too(ask: Any) -> None:
    """What the prompt says is said less often, from the first token on."""

    def num_repeated(**fields: Any) -> int:
        prompt = "The capital of France is Paris. The capital of France is"
        answer = ask(COMPLETIONS, prompt=prompt, n=128, seed=1, max_tokens=1, return_token_ids=True, **fields)
        prompt_ids = answer["choices"][0]["prompt_token_ids"]
        return sum(choice["token_ids"][0] in prompt_ids for choice in answer["choices"])

    assert num_repeated(repetition_penalty=2) < num_repeated() / 2
    assert num_repeated(frequency_penalty=2) == num_repeated(), "this one sees the output only"


def test_logit_bias_is_added_to_the_scores(ask: Any, bundled: ServerProcess) -> None:
    best = list(probabilities(ask))
    first, second = (
        bundled.http.post("/tokenize", json={"prompt": token, "add_special_tokens": False}).json()["tokens"]
        for token in best[:2]
    )
    assert len(first) == len(second) == 1
    assert best[0] not in first_tokens(ask, logit_bias={str(first[0]): -100})
    gap = math.log(probabilities(ask)[best[0]] / probabilities(ask)[best[1]])
    for bias, expected in ((gap + 0.01, best[1]), (gap - 0.01, best[0]), (100, best[1])):
        answer = ask(
            COMPLETIONS, prompt=UNSURE, max_tokens=1, temperature=0, logit_bias={str(second[0]): bias}
        )
        assert texts(answer) == [expected]


# --- where an answer ends


def test_lengths(ask: Any) -> None:
    for path in (CHAT, COMPLETIONS):
        assert ask(path, ignore_eos=True)["usage"]["completion_tokens"] == 16
        for num in (1, 2, 33):
            answer = ask(path, max_tokens=num, ignore_eos=True)
            assert answer["usage"]["completion_tokens"] == num
            assert answer["choices"][0]["finish_reason"] == "length"
    assert ask(CHAT, max_tokens=3, max_completion_tokens=20)["usage"]["completion_tokens"] == 20
    empty = ask(CHAT, max_tokens=0)
    assert (texts(empty), empty["usage"]["completion_tokens"]) == ([""], 0)


def test_the_end_of_an_answer(ask: Any) -> None:
    fields = {"messages": GREETING, "temperature": 0, "max_tokens": 100, "return_token_ids": True}
    answer = ask(CHAT, **fields)
    (choice,) = answer["choices"]
    num, end = answer["usage"]["completion_tokens"], choice["token_ids"][-1]
    assert (choice["finish_reason"], choice["matched_stop"], num < 100) == ("stop", end, True)
    (longer,) = ask(CHAT, **fields, min_tokens=num + 5)["choices"]
    assert len(longer["token_ids"]) >= num + 5
    assert longer["token_ids"][: num - 1] == choice["token_ids"][:-1]
    assert end not in longer["token_ids"][: num + 5 - 1]
    (endless,) = ask(CHAT, **fields, ignore_eos=True)["choices"]
    assert (len(endless["token_ids"]), endless["finish_reason"]) == (100, "length")
    (spelled,) = ask(CHAT, **fields, skip_special_tokens=False)["choices"]
    assert spelled["token_ids"] == choice["token_ids"]
    stop = choice["token_ids"][num // 2]
    (stopped,) = ask(CHAT, **fields, stop_token_ids=[stop], ignore_eos=True)["choices"]
    assert stopped["token_ids"] == choice["token_ids"][: choice["token_ids"].index(stop) + 1]
    assert (stopped["finish_reason"], stopped["matched_stop"]) == ("stop", stop)


def test_stop_strings_and_min_tokens(ask: Any) -> None:
    fields = {"temperature": 0, "max_tokens": 40}
    (free,) = texts(ask(COMPLETIONS, **fields))
    stop = free[len(free) // 2 :][:4]
    for given in (stop, [stop], ["zzz", stop], [*map(str, range(10_000, 10_031)), stop]):
        (choice,) = ask(COMPLETIONS, stop=given, **fields)["choices"]
        assert (choice["text"], choice["matched_stop"]) == (free[: free.index(stop)], stop)
    for name in ("include_stop_str_in_output", "no_stop_trim"):
        kept = ask(COMPLETIONS, stop=stop, **{name: True}, **fields)
        assert texts(kept) == [free[: free.index(stop)] + stop]


# --- what is reported


def test_usage_adds_up(ask: Any, bundled: ServerProcess) -> None:
    for prompt in ("Hi", ["Hi", "Once upon a time", "日本語"]):
        counts = bundled.http.post("/tokenize", json={"prompt": prompt}).json()["count"]
        for n in (1, 3):
            answer = ask(COMPLETIONS, prompt=prompt, n=n, max_tokens=9, return_token_ids=True, seed=1)
            usage = answer["usage"]
            assert usage["prompt_tokens"] == (sum(counts) if isinstance(counts, list) else counts)
            assert usage["completion_tokens"] == sum(len(c["token_ids"]) for c in answer["choices"])
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    body = {"messages": STORY, "model": "default"}
    rendered = bundled.http.post("/tokenize", json=body).json()
    answer = ask(CHAT, return_token_ids=True)
    assert answer["prompt_token_ids"] == rendered["tokens"]
    assert answer["usage"]["prompt_tokens"] == rendered["count"]


def test_logprobs_do_not_move_with_sampling(ask: Any) -> None:
    """At the first position all answers see the same, whatever picks the token."""
    shown = {"prompt": UNSURE, "max_tokens": 1, "logprobs": 5, "seed": 2}
    (plain,) = ask(COMPLETIONS, **shown)["choices"]
    best = sorted(plain["logprobs"]["top_logprobs"][0].values(), reverse=True)[:5]
    for fields in (
        {"temperature": 0},
        {"temperature": 2},
        {"top_k": 1},
        {"top_p": 0.1},
        {"logit_bias": {"300": 100}},
        {"repetition_penalty": 2},
    ):
        scores = ask(COMPLETIONS, **shown, **fields)["choices"][0]["logprobs"]
        found = scores["top_logprobs"][0]
        assert sorted(found.values(), reverse=True)[:5] == best
        assert found[scores["tokens"][0]] == scores["token_logprobs"][0] <= 0
        assert len(found) in (5, 6), "the token itself besides, when it is none of the best"


def test_log_probabilities_of_an_answer_are_those_of_the_same_text_as_a_prompt(ask: Any) -> None:
    (choice,) = ask(
        COMPLETIONS,
        prompt=[700, 701, 702],
        seed=1,
        max_tokens=30,
        logprobs=0,
        ignore_eos=True,
        return_token_ids=True,
    )["choices"]
    whole = [700, 701, 702, *choice["token_ids"]]
    (scored,) = ask(COMPLETIONS, prompt=whole, echo=True, max_tokens=0, logprobs=0)["choices"]
    assert scored["logprobs"]["token_logprobs"][3:] == choice["logprobs"]["token_logprobs"]
    assert sum(choice["logprobs"]["token_logprobs"]) < 0


def test_echo_puts_the_prompt_in_front(ask: Any) -> None:
    for prompt in ("Once upon a time", "日本語 😀", "  spaces\n\n"):
        (plain,) = texts(ask(COMPLETIONS, prompt=prompt, seed=1))
        assert texts(ask(COMPLETIONS, prompt=prompt, seed=1, echo=True)) == [prompt + plain]


def test_a_prompt_cut_on_the_left_is_the_rest_of_it(ask: Any) -> None:
    ids = [500 + 3 * i for i in range(40)]
    cut = ask(COMPLETIONS, prompt=ids, truncate_prompt_tokens=10, temperature=0, logprobs=2)
    alone = ask(COMPLETIONS, prompt=ids[-10:], temperature=0, logprobs=2)
    assert cut["choices"] == alone["choices"]
    assert (cut["truncated_prompt_tokens"], cut["usage"]["prompt_tokens"]) == (30, 10)


# --- conversations


def prompt_of(ask: Any, messages: list[dict[str, Any]], **fields: Any) -> list[int]:
    return ask(CHAT, messages=messages, max_tokens=1, return_token_ids=True, **fields)["prompt_token_ids"]


def test_ways_to_say_the_same(ask: Any) -> None:
    plain = prompt_of(ask, [{"role": "system", "content": "Be brief."}, *GREETING])
    parts = [{"type": "text", "text": "Hello!"}]
    for messages in (
        [{"role": "developer", "content": "Be brief."}, *GREETING],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}],
        [{"role": "system", "content": "Be brief.", "name": None}, *GREETING],
    ):
        assert prompt_of(ask, messages) == plain
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [*GREETING, {"role": "assistant", "tool_calls": [called]}]
    told = [*asked, {"role": "tool", "content": "4", "tool_call_id": "1"}]
    assert prompt_of(ask, [*asked, {"role": "function", "content": "4", "name": "f"}]) == prompt_of(ask, told)
    silent = [*GREETING, {"role": "assistant", "content": ""}, *GREETING]
    for said in ({"content": None}, {}):
        assert prompt_of(ask, [*GREETING, {"role": "assistant", **said}, *GREETING]) == prompt_of(ask, silent)


def test_the_last_turn_is_left_open_on_request(ask: Any, bundled: ServerProcess) -> None:
    begun = [*STORY, {"role": "assistant", "content": "Once upon"}]
    opened, closed = prompt_of(ask, begun, continue_final_message=True), prompt_of(ask, begun)
    assert closed[: len(opened)] == opened and len(closed) > len(opened)
    bare = prompt_of(ask, begun, add_generation_prompt=False)
    assert closed[: len(bare)] == bare and opened == bare[: len(opened)]
    end = bundled.http.post("/detokenize", json={"tokens": opened, "skip_special_tokens": False}).json()[
        "text"
    ]
    assert end.endswith("Once upon")
