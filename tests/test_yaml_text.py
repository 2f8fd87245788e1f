"""Tests of YAML 1.2's core schema with lines: values, keys, refused texts, and no exception but SpecError."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from batchinfer.errors import SpecError
from batchinfer.yaml_text import MAX_BYTES, NotYaml, read_yaml

CORE = {
    "1e-3": 0.001,
    "1E5": 1e5,
    ".5": 0.5,
    "5.": 5.0,
    "-.5e+1": -5.0,
    "+1": 1,
    "012": 12,
    "0o17": 15,
    "0x1F": 31,
    "-.inf": -math.inf,
    ".INF": math.inf,
    "true": True,
    "FALSE": False,
    "~": None,
    "Null": None,
    "": None,
    "!!str 5": "5",
    "!!float 5": 5.0,
    "'5'": "5",
}
TEXTS = ["yes", "No", "on", "OFF", "y", "n", "1_000", "12:30:45", "2024-01-01", "0b11", "1e", ".", "tRUE", "-0x1", "="]


@pytest.mark.parametrize(("written", "value"), CORE.items())
def test_scalar_resolves_by_the_core_schema(written, value):
    for text in (f"a: {written}", f"a: {{b: [{written}]}}"):
        if not (written == "" and "{" in text):
            got = read_yaml(text, "j").value["a"]
            got = got["b"][0] if isinstance(got, dict) else got
            assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", TEXTS)
def test_yaml_1_1_scalar_stays_text(text):
    assert read_yaml(f"{text}: [{text}, '{text}']", "j").value == {text: [text, text]}


def test_nan_scalar_is_nan():
    assert math.isnan(read_yaml("a: .nan", "j").value["a"])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=20), inner),
    )
)
@settings(max_examples=150, deadline=None)
@example({"😀": "\u2028"})
@example({"a": "\ud83d"})
def test_json_parses_to_equal_values(value):
    """JSON parses to equal values, also with tabs and with characters beyond 16 bits as two escapes."""
    text = json.dumps(value, indent="\t")
    try:
        expected = json.loads(text.encode().decode())
        json.dumps(expected, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character
        with pytest.raises(SpecError):
            read_yaml(text, "j")
        return
    assume("NaN" not in text and "Infinity" not in text)  # JSON's own texts of these are text in YAML
    got = read_yaml(text, "j").value
    assert got == expected and repr(got) == repr(expected)


def test_key_stays_text_as_written():
    assert list(read_yaml("1: a\non: b\n~: c\n'': d\n1.50: e", "j").value) == ["1", "on", "~", "", "1.50"]


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3", "a", (3, 1)),
        ("a:\n  b: 1\n\n  b: 2", "a.b", (4, 2)),
        ("a:\n- {x: 1}\n- {x: 1, 'x': 2}", "a.1.x", (3, 3)),
        ('1: 1\n"1": 2', "1", (2, 1)),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a", "c.'<<'", (4, 3)),
        ("a: {b: {c: {d: 1,\n d: 2}}}", "a.b.c.d", (2, 1)),
    ],
)
def test_duplicate_key_is_refused_with_both_lines(text, key, lines):
    with pytest.raises(SpecError) as caught:
        read_yaml(text, "job.yaml")
    assert str(caught.value) == f"job.yaml:{lines[0]}: {key}: given twice; the first is on line {lines[1]}"


def test_merge_keys_combine_mappings_without_sharing():
    text = "x-a: &a {k: 1, j: [2]}\nb: {<<: *a, k: 5}\nc:\n  <<: [{z: 1, k: 9}, *a]\nd: *a"
    document = read_yaml(text, "j")
    assert document.value["b"] == {"k": 5, "j": [2]}
    assert document.value["c"] == {"z": 1, "k": 9, "j": [2]}
    assert document.value["d"] == document.value["x-a"] and document.value["d"] is not document.value["x-a"]
    assert [document.line(path) for path in (("b", "k"), ("b", "j"), ("c", "z"), ("c", "q"), ())] == [2, 1, 4, 3, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "a.0: an alias refers to a value that contains"),
        ("a: &a {b: {<<: *a}}", "an alias refers to a value that contains"),
        ("a: *b", "no anchor"),
        ("a:\n- <<: 5", ":2: a.0: << must be"),
        ("a:\n  b: !!python/object:os.system x", ":2: a.b: the tag !!python/object:os.system"),
        ("a: !!binary aGk=", "the tag !!binary"),
        ("a: !!set {b}", "the tag !!set"),
        ("a: !!int x", "does not fit the value"),
        ("a: !env HOME", "the tag !env"),
        ("a: 1\n---\nb: 1", ":2: not YAML: but found another document"),
        ("a:\n\t- 1", ":2: .*indent with spaces"),
        ("\ta: 1", ":1: .*indent with spaces"),
        ("a: x\ty", ":1: .*or a tab in a text without them"),
        ("a: 1\n? [a, b]\n: 1", ":2: a key must be text, and \\[a, b\\] is a list"),
        ("a: {b: 1}\n? {c: d}\n: 1", ":2: a key must be text"),
        ("a: 1\nb: " + "9" * 5000, ":2: b: a number of 5,000 digits"),
        ('a: "\\ud800"', "half of a character"),
        ('a: "\\U99999999"', "not YAML"),
        ("a: 'x\nb: 2", ":1: .*quotation mark that opens here is not closed"),
        ("a: 1\nb: x: y", ":2: .*a colon and a space must be in quotes"),
        ("a: 1\n  b: 2", ":2: .*have the same indentation"),
        ("a:\n  b: 1\n c: 2", ":3: .*have the same indentation"),
        ("  a: 1\nb: 2", ":2: .*have the same indentation"),
        ("a: [", ":1: .*opens here is not closed"),
        ("a: [1, 2\nb: 3", "opens with \\[ is closed with \\]"),
        ("a: {b: 1\nc: 2", "opens with { is closed with }"),
        ("a: 'it's'", ":1: .*a ' is written ''"),
        ("a: - b", ":1: .*begins with - must be in quotes"),
        ('a: "C:\\data"', "begins an escape"),
        ("a: \x07", ":1: .*U\\+0007"),
        ("[" * 3000, "nested too deeply"),
        ("a: " + "[" * 150 + "]" * 150, "nested more than 100 deep"),
    ],
)
def test_invalid_yaml_is_refused_with_line_and_advice(text, message):
    with pytest.raises(SpecError, match=message):
        read_yaml(text, "j")


@pytest.mark.parametrize(
    "line",
    [
        "{{ text }}",
        "{{text}} and more",
        "Question: {{ text }}",
        "{% if a %}b{% endif %}",
        "{# note #} x",
        "[{{ a }}, b]",
        "'it's {{ text }}'",
        "{user: Hi {{ text }}}",
        "{{ row['a b'] }}",
    ],
)
def test_unquoted_template_is_refused_with_advice_to_quote(line):
    with pytest.raises(NotYaml, match=r"^j:3: .*text with \{\{ … \}\} must be in quotes"):
        read_yaml(f"a: 1\nprompt:\n  user: {line}\n  system: x\nb: 2", "j")


@pytest.mark.parametrize("path", ["*.jsonl", "**/*.parquet", "[*.jsonl]", "@x", "`x`", "%x", "&.x"])
def test_unquoted_glob_is_refused_with_advice_to_quote(path):
    with pytest.raises(NotYaml, match=r"^j:2: .*must be in quotes"):
        read_yaml(f"input:\n  path: {path}\n", "j")


def test_comment_after_unquoted_text_is_recorded():
    document = read_yaml("a: be brief # really\nb: 'x' # y\nc: [p # q\n]\nd: # e\n  5", "j")
    assert document.comments == {("a",): "# really", ("c", "0"): "# q"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xef\xbb\xbfa: 1\nb: \xff", ":2: not UTF-8: byte 0xff"),
        ("a: 1".encode("utf-16"), "UTF-16"),
        ("a: 1\n".encode("utf-16-le"), ":1: .*zero bytes"),
        (b"PAR1\n\x00\x01", ":2: .*zero bytes"),
        (b"a: " + b"x" * MAX_BYTES, "bytes"),
    ],
)
def test_binary_or_utf16_file_is_refused(data, message):
    with pytest.raises(NotYaml, match=f"^j.*{message}"):
        read_yaml(data, "j")


def test_byte_order_mark_and_crlf_are_accepted():
    document = read_yaml(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: 2\r\n", "j")
    assert document.value == {"a": 1, "b": {"c": 2}} and document.line(("b", "c")) == 3


@pytest.mark.parametrize(
    "text",
    [
        "a:\t1\nb: {c:\t2,\td: [3,\t4]}",
        "a:\t1\t# so\nb:\t\n  c: 2\t\n  d:\t[3, 4]",
        "a : 1\n\t\nb:\n  c: 2\n\t# so\n  d:\n  \t\n  - 3\n  - 4\n\t",
        '{\n\t"a"\t: 1,\n\t"b": {"c": 2,\n\t\t"d": [3,\n\t4]}}',
    ],
)
def test_tab_that_does_not_indent_is_white_space(text):
    assert read_yaml(text, "job").value == {"a": 1, "b": {"c": 2, "d": [3, 4]}}


@pytest.mark.parametrize("kind", ["lists", "merges"])
def test_alias_expansion_is_limited(kind):
    lines = ["a0: &a0 {k: 1}"]
    for level in range(1, 30):
        many = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"[{many}]" if kind == "lists" else f"{{<<: [{many}]}}"))
    with pytest.raises(SpecError, match="more than 100,000 values"):
        read_yaml("\n".join(lines), "j")


PIECES = st.sampled_from(
    (
        *(
            "a",
            "b: ",
            ": ",
            "- ",
            "\n",
            "  ",
            "{",
            "}",
            "[",
            "]",
            ", ",
            "{{ x }}",
            "*a",
            "&a ",
            "<<: *a",
            "!!int ",
            "'",
        ),
        *(
            '"',
            "# c",
            "|\n",
            "? ",
            "---\n",
            "...",
            "\t",
            "1e3",
            "~",
            "%",
            "@",
            "\\u12",
            "é",
            "\r",
            "\x85",
            "\ud800",
            "\0",
        ),
    )
)


@given(st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_parses_or_raises_spec_error(text):
    try:
        document = read_yaml(text, "j")
    except SpecError as error:
        assert str(error).startswith("j:")
    else:
        json.dumps(document.value, ensure_ascii=False).encode()


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_bytes_parse_or_raise_spec_error(data):
    try:
        read_yaml(data, "j")
    except SpecError as error:
        assert str(error).startswith("j:")
