"""Tests of sampling parameters: number types, bounds and their messages."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import BadParameters, InvalidInput
from batchinfer.openai.parse import parse_body
from batchinfer.request import _RANGES, SamplingParams

INTEGER_FIELDS = [name for name, limits in _RANGES.items() if limits.whole]
FIVE = [5.0, Decimal(5), Decimal("5.00"), Decimal("5E0"), np.int64(5), np.float64(5), np.uint8(5), np.float32(5)]


@pytest.mark.parametrize("name", INTEGER_FIELDS)
@pytest.mark.parametrize("five", FIVE, ids=repr)
def test_integer_field_accepts_integral_values_of_any_type(name, five):
    value = getattr(SamplingParams(**{name: five}), name)
    assert value == 5 and type(value) is int


@pytest.mark.parametrize("name", INTEGER_FIELDS)
@pytest.mark.parametrize(
    "value", [5.5, True, False, "5", math.inf, math.nan, Decimal("5.5"), Decimal("NaN"), Decimal("1E+900000"), [5]]
)
def test_integer_field_refuses_other_values(name, value):
    with pytest.raises(BadParameters, match=f"^{name} must be an integer, got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("half", [Decimal("0.5"), np.float32(0.5), Fraction(1, 2)], ids=repr)
def test_float_field_accepts_any_real_type(half):
    params = SamplingParams(temperature=half, top_p=half, logit_bias={"5": half})
    assert type(params.temperature) is float and params.top_p == 0.5 and params.logit_bias == {5: 0.5}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_p", 0, "in (0, 1], got 0"),
        ("top_p", 1.5, "in (0, 1], got 1.5"),
        ("min_p", -0.1, "in [0, 1], got -0.1"),
        ("temperature", -1, "at least 0, got -1"),
        ("temperature", math.inf, "finite, got inf"),
        ("temperature", 10**400, "finite, got 1"),
        ("temperature", math.nan, "at least 0, got nan"),
        ("temperature", "0.7", "a number, got '0.7'"),
        ("temperature", True, "a number, got true"),
        ("temperature", Decimal("sNaN"), "at least 0, got"),
        ("repetition_penalty", 0, "above 0, got 0"),
        ("presence_penalty", 2.5, "in [-2, 2], got 2.5"),
        ("n", 0, "in [1, 1024], got 0"),
        ("top_k", -2, "at least -1, got -2"),
        ("logprobs", 21, "in [0, 20], got 21"),
        ("max_tokens", -1, "at least 0, got -1"),
        ("max_tokens", 1e300, "at most 9223372036854775807, got 1e+300"),
        ("seed", 1 << 63, "at most 9223372036854775807, got 9223372036854775808"),
        ("seed", -1 << 64, "at least -9223372036854775808, got -18446744073709551616"),
    ],
)
def test_value_out_of_range_is_refused_with_the_bound(name, value, message):
    with pytest.raises(BadParameters) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{name} must be {message}")


@given(st.sampled_from(sorted(_RANGES)), st.floats() | st.integers() | st.decimals() | st.fractions() | st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_number_is_accepted_unchanged_or_refused_by_name(name, value):
    try:
        params = SamplingParams(**{name: value, "max_tokens": 1 << 62} if name == "min_tokens" else {name: value})
    except BadParameters as error:
        assert name in str(error)
    else:
        got = getattr(params, name)
        assert type(got) in (int, float) and math.isclose(got, value, abs_tol=1e-300)


def test_token_id_fields_accept_integers_and_refuse_others():
    params = SamplingParams(
        stop_token_ids=[5.0, Decimal(6)], allowed_token_ids=[np.int32(7)], logit_bias={5.0: 1, "6": 2}
    )
    assert (params.stop_token_ids, params.allowed_token_ids, params.logit_bias) == ((5, 6), (7,), {5: 1.0, 6: 2.0})
    for name, value in (
        ("stop_token_ids", [5.5]),
        ("stop_token_ids", [True]),
        ("allowed_token_ids", ["5"]),
        ("logit_bias", {5.5: 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": math.nan}),
        ("logit_bias", {" 5": 1}),
        ("logit_bias", [5]),
    ):
        with pytest.raises(BadParameters, match=name):
            SamplingParams(**{name: value})


def test_unknown_parameter_is_refused_with_a_suggestion():
    for name, near in (("maxTokens", "max_tokens"), ("top-p", "top_p"), ("Temperature", "temperature"), (5, None)):
        with pytest.raises(BadParameters) as caught:
            SamplingParams.from_mapping({name: 1})
        assert near is None or f"did you mean {near!r}?" in str(caught.value)


@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "n", "best_of", "top_k", "seed", "max_completion_tokens"])
def test_request_body_integer_accepts_5_0_and_refuses_5_5(name):
    def body(value):
        return parse_body("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], name: value})

    assert getattr(body(5.0), name) == 5 and type(getattr(body(5.0), name)) is int
    for value in (5.5, True, "5"):
        with pytest.raises(InvalidInput, match=f"^{name}: "):
            body(value)
    lists = parse_body(
        "/v1/completions", {"prompt": "x", "logprobs": 2.0, "stop_token_ids": [5.0], "allowed_token_ids": [6]}
    )
    assert (lists.logprobs, lists.stop_token_ids) == (2, [5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 5.5}, "max_tokens: must be an integer, got 5.5"),
        ({"max_tokens": "5"}, 'max_tokens: must be an integer, got "5"'),
        ({"seed": True}, "seed: must be an integer, got true"),
        ({"top_p": "1"}, 'top_p: must be a number, got "1"'),
        ({"echo": 1}, "echo: must be true or false, got 1"),
        ({"stop": 5}, "stop: must be a string or a list, got 5"),
        ({"stop": ["a", 5]}, "stop[1]: must be a string, got 5"),
        ({"prompt": None}, "prompt: must be a string or a list, got null"),
        ({"prompt": [1, -1]}, "prompt[1]: must be at least 0, got -1"),
        ({"logit_bias": []}, "logit_bias: must be an object, got []"),
        ({"stream_options": "x" * 99}, 'stream_options: must be an object, got "' + "x" * 59 + "…"),
    ],
)
def test_request_body_error_names_the_expected_type(fields, message):
    with pytest.raises(InvalidInput) as caught:
        parse_body("/v1/completions", {"prompt": "x", **fields})
    assert str(caught.value) == message
    with pytest.raises(InvalidInput, match=r"^messages: is required$"):
        parse_body("/v1/chat/completions", {})
    with pytest.raises(InvalidInput, match=r"^encoding_format: must be 'float' or 'base64', got 5$"):
        parse_body("/v1/embeddings", {"input": "x", "encoding_format": 5})
