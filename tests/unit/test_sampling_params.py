"""What a script or a request may ask of sampling, and how it is told that it may not."""

import re

import msgspec
import pytest

from engine.errors import InvalidRequest
from engine.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("stop", "abc"),
        ("stop", (5,)),
        ("stop", None),
        ("stop", ("",)),
        ("stop", ("\ud800",)),
        ("stop", ("x",) * 33),
        ("stop_token_ids", (2.5,)),
        ("max_tokens", 2.5),
        ("max_tokens", "5"),
        ("max_tokens", -1),
        ("min_tokens", 17),
        ("temperature", True),
        ("temperature", None),
        ("temperature", float("nan")),
        ("temperature", 2.1),
        ("top_p", 0.0),
        ("top_k", 2.5),
        ("top_k", -2),
        ("min_p", 1.5),
        ("frequency_penalty", -2.5),
        ("presence_penalty", float("inf")),
        ("repetition_penalty", 0.0),
        ("seed", 1.5),
        ("seed", 2**63),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {-5: 1.0}),
        ("ignore_eos", 1),
        ("logprobs", True),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 20.5),
        ("prompt_logprobs_start", -1),
        ("prompt_logprobs_start", 1.5),
    ],
)
def test_a_wrong_value_is_refused_by_name(param, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == ("top_logprobs" if value == 21 else param)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("param", "value", "shown"),
    [
        ("top_p", 1.0000001, "1.0000001"),
        ("top_p", 0.0, "0"),
        ("temperature", 2.1, "2.1"),
        ("min_p", 1e30, "1e+30"),
    ],
)
def test_the_wrong_value_is_shown_as_it_is(param, value, shown):
    with pytest.raises(InvalidRequest, match=f" got {re.escape(shown)}$"):
        SamplingParams(**{param: value})


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0, "top_p": 1, "top_k": 2**62, "repetition_penalty": 1e-300},
        {"stop": ("é", "\U0001f600"), "stop_token_ids": (1, 2), "logit_bias": {5: 1}},
        {"max_tokens": None, "min_tokens": 10**12, "seed": -(2**63)},
        {"prompt_logprobs": 20, "max_tokens": 0},
    ],
)
def test_whatever_is_accepted_reaches_the_engine(params):
    """An engine process takes a message that does not decode for the end of the connection."""
    asked = SamplingParams(**params)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(asked), type=SamplingParams) == asked


def test_a_value_is_looked_at_although_the_types_are_known():
    """What fields of these types have to be checked for is kept; what they hold is not."""
    assert SamplingParams(temperature=0.5, max_tokens=3).temperature == 0.5
    for value in (float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="temperature must be a finite number"):
            SamplingParams(temperature=value, max_tokens=3)
    with pytest.raises(InvalidRequest, match="max_tokens has the wrong type"):
        SamplingParams(temperature=0.5, max_tokens="3")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="temperature has the wrong type"):
        SamplingParams(temperature=None, max_tokens=3)  # type: ignore[arg-type]
