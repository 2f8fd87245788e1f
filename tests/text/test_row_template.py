"""Tests of templates over a row: names, printing, errors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import InvalidInput, SpecError, TemplateError
from batchinfer.text.row_template import RowFilter, RowTemplate
from batchinfer.values.cell import Struct, Unrepresentable
from batchinfer.values.number import Number
from batchinfer.values.times import date, duration, timestamp, zone_of

ORDER = {
    "id": 7,
    "items": ["tea", "mug"],
    "values": {"a": 1},
    "copy": "Hello",
    "update": "2024-05-01",
    "get": "x",
    "keys": ["k1"],
    "pop": 1,
    "null": None,
    "_id": "m",
}
NOT_UTF8 = Unrepresentable("2 bytes that are not UTF-8 text")


def render(source: str, **row: Any) -> str:
    return RowTemplate(source, "prompt.user").render(row)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ order.items }}", "['tea', 'mug']"),
        ("{{ order['items'] }}", "['tea', 'mug']"),
        (
            "{{ order.copy }} {{ order.update }} {{ order.get }} {{ order.pop }} {{ order._id }}",
            "Hello 2024-05-01 x 1 m",
        ),
        ("{{ order.items | length }} {{ order.items[0].upper() }}", "2 TEA"),
        ("{% for i in order.items %}{{ i }} {% endfor %}", "tea mug "),
        ("{% set i = order.items %}{{ i | join('+') }}", "tea+mug"),
        ("{{ order.keys | join(',') }} {{ order.values | tojson }} {{ order.values.a }}", 'k1 {"a": 1} 1'),
        ("{{ order | attr('items') }}", "['tea', 'mug']"),
        ("{{ order.get('id') }} {{ order.items() | list | length }} {{ order.keys() | first }}", "7 10 id"),
        ("{{ rows | map(attribute='items') | join('-') }} {{ rows | sum(attribute='items') }}", "2-1 3"),
        ("{{ rows | sort(attribute='items') | map(attribute='keys') | list }}", "['b', 'a']"),
        ("{{ rows | selectattr('items', 'equalto', 2) | map(attribute='keys') | first }}", "a"),
        ("{% for g in rows | groupby('items') %}{{ g.grouper }}={{ g.list | length }} {% endfor %}", "1=1 2=1 "),
        (
            "{{ plain.items is defined }} {{ plain.items | default('none') }} {{ plain.items() | list }}",
            "False none [('a', 1)]",
        ),
        ("{% for k, v in plain | items %}{{ k }}{{ v }}{% endfor %}{{ plain | dictsort }}", "a1[('a', 1)]"),
    ],
)
def test_key_wins_over_method(source: str, expected: str) -> None:
    rows = [{"items": 2, "keys": "a"}, {"items": 1, "keys": "b"}]
    assert render(source, order=ORDER, rows=rows, plain={"a": 1}) == expected


def test_key_wins_over_method_in_filters() -> None:
    for expression in ("order.items", "'tea' in order.items", "order['items'] | length == 2", "not order.copy == 'x'"):
        assert RowFilter(expression).matches({"order": ORDER})
    with pytest.raises(TemplateError, match="no attribute 'items': its method is called as items"):
        RowFilter("order.items").matches({"order": {}})


def test_every_column_name_can_be_used() -> None:
    row = {"user-id": 5, "Review Text": "ok", "meta.lang": "en", "class": "C", "größe": 3, "true": "T", "not": "N"}
    source = (
        "{{ row['user-id'] }} {{ row['Review Text'] }} {{ row['meta.lang'] }} {{ class }} {{ größe }} {{ row.größe }}"
    )
    assert render(source, **row) == "5 ok en C 3 3"
    assert RowTemplate(source, "t").columns(row) == row.keys() - {"true", "not"}
    assert render("{{ true }} {{ row['true'] }} {{ row['not'] }}", **row) == "True T N"
    own = {name: name.upper() for name in ("self", "range", "dict", "loop", "namespace", "caller", "varargs", "lipsum")}
    source = "".join(f"{{{{ {name} }}}} {{{{ row['{name}'] }}}} " for name in own)
    assert render(source, **own) == "".join(f"{value} {value} " for value in own.values())
    assert RowTemplate(source, "t").columns(()) == own.keys()
    assert render("{{ range }} {{ range(2) | list }} {{ dict(a=1) }} {{ dict }}", **own) == "RANGE [0, 1] {'a': 1} DICT"
    assert render("{% for x in [1] %}{{ loop.index }}{{ row.loop }}{% endfor %}", **own) == "1LOOP"
    assert RowFilter("self == 'SELF' and row['range'] == range").matches(own)
    assert render("{% block b %}x{% endblock %}{{ self.b() }}") == "xx"  # only of blocks it is Jinja's


@pytest.mark.parametrize(
    ("source", "unknown", "known", "own"),
    [
        ("{{ row['a'] }} {{ row.b }} {{ x }}", "a b x", "a b x", "a row x"),
        ("{{ row | tojson }} {{ row['zz'] }}", "", "a b q", "row"),
        ("{% for k, v in row.items() %}{% endfor %}", "", "a b q", "row"),
        ("{{ row[x] }}", "x", "a b q x", "row x"),
        ("{% if 'a' in row %}{{ row['a'] }}{% endif %}", "", "a b q", "row a"),
        ("{% for row in rows %}{{ row['x'] }}{% endfor %}", "rows", "rows", "rows"),
        ("{% for row in row.things %}{{ row['x'] }}{% endfor %}", "", "a b q", "row"),
        ("{% macro f(row) %}{{ row.x }}{% endmacro %}", "", "", ""),
        ("{{ row }}", "", "a b q", "row"),
    ],
)
def test_columns_needed_by_uses_of_row(source: str, unknown: str, known: str, own: str) -> None:
    """`own`: where the input has a column of that name."""
    template = RowTemplate(source, "t")
    assert template.columns(()) == {*unknown.split()}
    assert template.columns(["a", "b", "q"]) == {*known.split()}
    assert template.columns(["row", "a"]) == {*own.split()}


def test_row_is_the_mapping_of_all_columns() -> None:
    row = {"b": 1, "a-b": None, "items": 2}
    assert render("{% for k in row %}{{ k }} {% endfor %}{{ row | length }}", **row) == "b a-b items 3"
    assert render("{{ row | tojson }} {{ row.items }} {{ row['a-b'] is none }}", **row).startswith(
        '{"b": 1, "a-b": null'
    )
    assert render("{% set r = row %}{{ r['b'] }}{{ row['i' ~ 'tems'] }}", **row) == "12"
    with pytest.raises(InvalidInput, match="column 'a-b' is null"):
        render("{{ row['a-b'] }}", **row)


def test_column_named_row_shadows_the_mapping() -> None:
    source = "{{ row }} {{ row['user-id'] }}"
    assert render(source, **{"row": 3, "user-id": 5}) == "3 5"
    assert RowTemplate(source, "t").columns(["row", "user-id", "x"]) == {"row", "user-id"}
    nested = {"row": {"name": "n", "items": 1}, "user-id": 5}
    assert render("{{ row.name }} {{ row['items'] }} {{ row['user-id'] }} {{ row | length }}", **nested) == "n 1 5 2"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ ts }} {{ ts.year }} {{ ts.strftime('%Y') }}", "2001-09-09T01:46:40.000000007+00:00 2001 2001"),
        ("{{ 'at ' ~ ts.date() ~ day ~ span ~ price }}", "at 2001-09-091970-01-06PT1M30S9.99"),
        ("{{ [day, span, price] }} {{ {'a': day} }}", "['1970-01-06', 'PT1M30S', 9.99] {'a': '1970-01-06'}"),
        ("{{ '%s %s' % (day, price) }} {{ '{}'.format(ts.year) }} {{ '{0[a]}'.format(st) }}", "1970-01-06 9.99 2001 1"),
        ("{{ [ts, day] | map('string') | join(' ') }}", "2001-09-09T01:46:40.000000007+00:00 1970-01-06"),
        ("{{ {'t': day, 'p': price, 'd': span} | tojson }}", '{"t": "1970-01-06", "p": 9.99, "d": "PT1M30S"}'),
        ("{{ price * 1.2 }} {{ price + 1 }} {{ price | round(1) }} {{ '%.1f' % price }}", "11.988 10.99 10.0 10.0"),
        ("{{ price | int }} {{ price | float }} {{ price | abs }} {{ [price, 1] | sum }}", "9 9.99 9.99 10.99"),
        ("{{ price == 9.99 }} {{ price > 9 }} {{ ts - ts }} {{ (ts - ts).days }}", "True True PT0S 0"),
        (
            "{{ st.a }} {{ st.b is none }} {{ st }} {{ st | tojson }} {{ st['b'] | default('-') }}",
            "1 True {'a': 1} {\"a\": 1} -",
        ),
        ("{{ [true, none, 1.5, 'x'] }} {{ true }}", "[True, None, 1.5, 'x'] True"),
        ("{{ nan == nan }} {{ inf > 3 }} {{ nan is none }}", "False True False"),
    ],
)
def test_printed_text_of_values(source: str, expected: str) -> None:
    row = {
        "ts": timestamp(10**18 + 7, zone_of("UTC")),
        "day": date(5),
        "span": duration(90 * 10**9),
        "price": Number("9.99"),
        "st": Struct({"a": 1}, ("b",)),
        "nan": float("nan"),
        "inf": float("inf"),
    }
    assert render(source, **row) == expected


UNPRINTABLE = [
    ("text.upper", "'upper' is a method, not a value"),
    ("order | attr('clear')", "no attribute 'clear'"),
    ("rows | map('string')", "a generator, without | list after it,"),
    ("rows | batch(1)", "a generator, without | list after it,"),
    ("order.keys()", "a dict_keys, without | list after it,"),
    ("range(3)", "a range, without | list after it,"),
    ("namespace(a=1)", "a namespace cannot"),
    ("cycler('a')", "a value of type Cycler cannot"),
    ("text.encode()", "a value of type bytes cannot"),
    ("ts.tzinfo", "a value of type timezone cannot"),
    ("nowhere", "'nowhere' is undefined"),
    ("order.nowhere", "no attribute 'nowhere'"),
    ("none", "an expression of the template is null"),
    ("order.get('nowhere')", "an expression of the template is null"),
    ("order.null", "'null' is null"),
    ("nan", "column 'nan' is NaN"),
    ("nan + 1", "an expression of the template is NaN"),
    ("inf", "column 'inf' is infinite"),
    ("bad", "column 'bad': 2 bytes that are not UTF-8"),
    ("rows[0]['bad']", "'bad': 2 bytes that are not UTF-8"),
]
USES = ["{{ %s }}", "{{ (%s) ~ '' }}", "{{ (%s) | string }}", "{{ 'x' | replace('x', (%s)) }}", "{{ '{}'.format(%s) }}"]
USES += [
    "{{ '%%s' %% (%s) }}",
    "{{ '%%s' | format(%s) }}",
    "{{ ['x', (%s)] | join }}",
    "{%% set x %%}{{ %s }}{%% endset %%}{{ x }}",
]


@pytest.mark.parametrize("use", USES)
def test_printing_an_object_that_is_not_a_value_is_refused(use: str) -> None:
    row = {"text": "x", "order": ORDER, "rows": [{"bad": NOT_UTF8}], "ts": timestamp(0, zone_of("UTC"))}
    row |= {"nan": float("nan"), "inf": float("inf"), "bad": NOT_UTF8}
    for expression, message in UNPRINTABLE:
        with pytest.raises((InvalidInput, TemplateError), match=f"^prompt.user: .*{message}"):
            render(use % expression, **row)
    macro = "{% macro f() %}x{% endmacro %}"
    with pytest.raises(TemplateError, match="the macro f, which must be called,"):
        render(macro + use % "f", **row)
    with pytest.raises(TemplateError, match="the loop cannot"):
        render("{% for x in [1] %}" + use % "loop" + "{% endfor %}", **row)


@pytest.mark.parametrize(
    "expression", ["[nan]", "{'a': [inf]}", "[bad]", "rows", "[text.upper]", "[range(2)]", "{'a': nan}"]
)
def test_printing_a_nested_non_value_is_refused(expression: str) -> None:
    row = {"text": "x", "rows": [{"bad": NOT_UTF8}], "nan": float("nan"), "inf": float("inf"), "bad": NOT_UTF8}
    for use in (*USES, "{{ (%s) | tojson }}"):
        with pytest.raises((InvalidInput, TemplateError), match=r"NaN|infinite|UTF-8|method|range"):
            render(use % expression, **row)


@pytest.mark.parametrize(
    ("names", "source"),
    [
        ("ﬁ fi", "{{ ﬁ }} {{ fi }} {{ row['ﬁ'] }}"),
        ("\u00b5 \u03bc", "{{ \u00b5 }} {{ \u03bc }} {{ row['\u00b5'] }}"),
        ("gro\u0308ße größe", "{% set gro\u0308ss = 1 %}{{ gro\u0308ße }} {{ größe }} {{ row['gro\u0308ße'] }}"),
        ("a fi", "{% for ﬁ in [1] %}{{ a }} {{ fi }} {{ a }}{% endfor %}"),
    ],
)
def test_columns_with_equal_nfkc_names_stay_distinct(names: str, source: str) -> None:
    first, second = names.split()
    assert render(source, **{first: "1", second: "2"}) == "1 2 1"
    assert RowTemplate(source, "t").columns([first, second]) == {first, second}
    assert RowFilter(f"{first} == 1 and {second} == 2").matches({first: 1, second: 2})


def test_format_uses_exact_decimal_digits() -> None:
    row = {"p": Number("2.675"), "large": Number("1234567890123456789012345678901234567890.125"), "o": {"a": Number(3)}}
    for source, expected in {
        "{{ '%.2f' % p }} {{ '%.2f' | format(p) }} {{ '{:.2f}'.format(p) }} {{ p | round(2) }}": "2.68 2.68 2.68 2.68",
        "{{ '%.1f' | format(large) }}": "1234567890123456789012345678901234567890.1",
        "{{ '%+09.2f|%-7.1f|%s|%d|%%' % (p, p, p, p) }}": "+00002.68|2.7    |2.675|2|%",
        "{{ '%(a)5.1f' % o }} {{ '%(x)f' | format(x=p) }} {{ '%.*f' % (1, p) }}": "  3.0 2.675000 2.7",
        "{{ large | round(1, 'floor') }} {{ p | round(2, 'ceil') }}": f"{str(row['large'])[:-2]} 2.68",
    }.items():
        assert render(source, **row) == expected
    with pytest.raises(TemplateError, match="not all arguments converted"):
        render("{{ '%.2f' % (p, p) }}", **row)
    with pytest.raises(TemplateError, match="not enough arguments"):
        render("{{ '%.2f %.2f' % p }}", **row)


def test_named_tuples_are_not_values() -> None:
    row = {"day": date(19_723), "price": Number("9.99")}
    for expression in ("day.timetuple()", "day.isocalendar()", "price.as_tuple()"):
        with pytest.raises(TemplateError, match=r"a value of type .* cannot be printed"):
            render(f"{{{{ {expression} }}}}", **row)
    assert render("{{ day.isocalendar()[1] }} {{ (1, 'x') }}", **row) == "1 (1, 'x')"


def test_escape_filter_returns_plain_text() -> None:
    row = {"xs": ["<a>", "b & c"], "x": "<a>"}
    assert render("{{ xs | map('escape') | list }} {{ [x | e] }}", **row) == "['&lt;a&gt;', 'b &amp; c'] ['&lt;a&gt;']"
    assert render("{{ x | e }} {{ (x | e) + x }} {{ x | urlize }} {{ [x | safe] }}", **row) == (
        "&lt;a&gt; &lt;a&gt;<a> &lt;a&gt; ['<a>']"
    )


def test_unrepresentable_cell_cannot_be_used() -> None:
    bad = Unrepresentable("not JSON", "{")
    for expression in ("bad.text", "bad.why", "bad | attr('text')", "bad['text']", "bad.text is defined"):
        with pytest.raises(InvalidInput, match="column 'bad': not JSON"):
            render(f"{{{{ {expression} }}}}", bad=bad)
    for source in ("{{ row | tojson }}", "{% for value in row.values() %}{{ value }}{% endfor %}", "{{ rows[0] }}"):
        with pytest.raises(InvalidInput, match=r"prompt.user: column 'rows': .*not JSON"):
            render(source, rows=[[bad]])


def test_nested_null_is_not_a_number() -> None:
    for filter_ in ("int", "float", "round", "abs", "int(5)"):
        for expression in (f"x | {filter_}", f"xs | map('{filter_.partition('(')[0]}') | list", f"xs[0] | {filter_}"):
            with pytest.raises(InvalidInput, match="is null"):
                render(f"{{{{ {expression} }}}}", x=None, xs=[None])


def test_nan_cannot_be_ordered_but_infinity_can() -> None:
    for expression in ("x > 3", "x <= 3", "3 < x", "x and true", "nested.x > 3", "rows[0] > 1"):
        row = {"x": float("nan"), "nested": {"x": float("nan")}, "rows": [float("nan")]}
        with pytest.raises(InvalidInput, match="is NaN"):
            RowFilter(expression).matches(row)
    assert RowFilter("x != x and not x == x").matches({"x": float("nan")})
    assert RowFilter("x > 3 and x").matches({"x": float("inf")})
    with pytest.raises(InvalidInput, match="where: column 'x': 2 bytes"):
        RowFilter("x == 'a'").matches({"x": NOT_UTF8})
    with pytest.raises(TemplateError, match="'upper' is a method"):
        RowFilter("x.upper").matches({"x": "a"})


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        ("{{ question }} {{ a.b }} {{ c['d'] }}", {"question", "a", "c"}),
        ("{% for i in range(3) %}{{ i }}{{ items[i] }}{% endfor %}", {"items"}),
        ("{% set x = y %}{{ x }}", {"y"}),
        ("{{ range }}", {"range"}),
        ("{{ dict }} {{ namespace }} {{ lipsum }} {{ cycler }}", {"dict", "namespace", "lipsum", "cycler"}),
        ("{{ range }} {{ range(3) }}", {"range"}),
        ("{% if loop is defined %}{{ z }}{% endif %}", {"loop", "z"}),
        ("no columns", set()),
    ],
)
def test_columns_used_by_a_template(source: str, columns: set[str]) -> None:
    assert RowTemplate(source, "prompt.template").columns(()) == columns


def test_columns_may_have_names_of_jinja_functions() -> None:
    template = RowTemplate("{{ range }}, {{ dict }}, {{ cycler.next }}, {{ item }}", "prompt.template")
    row = {"range": 1, "dict": {"a": 1}, "cycler": {"next": 2}, "item": "x", "unused": None}
    assert template.render(row) == "1, {'a': 1}, 2, x"
    called = RowTemplate("{% for i in range(2) %}{{ i }}{% endfor %}", "prompt.template")
    assert called.render({"range": "a column that the template does not name"}) == "01"


def test_block_lines_are_removed_and_text_is_not_escaped() -> None:
    template = RowTemplate("Q: {{ q }}\n{% if c %}\n  C: {{ c }}\n{% endif %}\nA:\n", "prompt.template")
    assert template.render({"q": "<b> & 'x'", "c": "日本\n"}) == "Q: <b> & 'x'\n  C: 日本\n\nA:"
    assert template.render({"q": "{{ c }}", "c": ""}) == "Q: {{ c }}\nA:"  # a cell is never a template


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ a or 'none given' }}", "none given"),
        ("{{ a | default('none given') }}", "none given"),
        ("{% if a %}{{ a }}{% else %}-{% endif %}", "-"),
        ("{{ 'null' if a is none else a }}", "null"),
        ("{{ 'null' if a == none else a }}", "null"),
        ("{{ a is not none }}", "False"),
        ("{{ a | tojson }}", "null"),
        ("{{ {'a': a, 'b': b} | tojson }}", '{"a": null, "b": 1}'),
    ],
)
def test_null_cell_can_be_tested(source: str, expected: str) -> None:
    assert RowTemplate(source, "prompt.user").render({"a": None, "b": 1}) == expected


@pytest.mark.parametrize(
    "source",
    [
        *("{{ a }}", "{{ a | trim }}", "{{ a | upper }}", "{{ 'x' ~ a }}", "{{ '%s' % a }}", "{{ '{}'.format(a) }}"),
        *("{{ a.b }}", "{{ a[0] }}", "{{ a + 1 }}", "{{ a > 1 }}", "{{ a | length }}", "{{ [a, 'x'] | join }}"),
        *("{% for x in a %}{{ x }}{% endfor %}", "{{ 'x' in a }}", "{{ a | string }}", "{{ a | replace('x', 'y') }}"),
    ],
)
def test_use_of_a_null_cell_is_a_row_error(source: str) -> None:
    with pytest.raises(InvalidInput, match=r"^prompt\.user: column 'a' is null$"):
        RowTemplate(source, "prompt.user").render({"a": None})


def test_nested_null_is_a_row_error() -> None:
    template = RowTemplate("{{ meta.author }}", "prompt.user")
    assert template.render({"meta": {"author": "x"}}) == "x"
    with pytest.raises(InvalidInput, match="'author' is null"):
        template.render({"meta": {"author": None}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ meta.missing }}", "has no attribute 'missing'"),
        ("{{ 1 // n }}", "ZeroDivisionError"),
        ("{{ raise_exception('too short') }}", "prompt.user: too short$"),
        ("{{ meta | tojson }}", "a value of type object cannot be printed"),
        ("{{ n | nonexistent }}", None),
    ],
)
def test_template_failure_is_a_row_error(source: str, message: str | None) -> None:
    if message is None:
        with pytest.raises(SpecError, match=r"prompt\.user: line 1: No filter named 'nonexistent'"):
            RowTemplate(source, "prompt.user")
        return
    with pytest.raises(TemplateError, match=message):
        RowTemplate(source, "prompt.user").render({"n": 0, "meta": {"x": object()}})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ a", r"line 1: unexpected end of template"),
        ("a\nb\n{% if x %}\nc", r"line 4: Unexpected end of template"),
        ("a\n{% endif %}", r"line 2: .*endif"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", r"cannot be compiled"),
    ],
)
def test_invalid_syntax_names_template_and_line(source: str, message: str) -> None:
    with pytest.raises(SpecError, match=rf"^prompt\.user: {message}"):
        RowTemplate(source, "prompt.user")


@pytest.mark.parametrize(
    ("expression", "row", "expected"),
    [
        ("lang == 'en' and score > 0.5", {"lang": "en", "score": 0.7}, True),
        ("lang == 'en' and score > 0.5", {"lang": "de", "score": None}, False),
        ("text | length > 3", {"text": "four"}, True),
        ("'x' in tags", {"tags": ["x"]}, True),
        ("meta.ok", {"meta": {"ok": 0}}, False),
        ("flag", {"flag": None}, False),
        ("score is not none and score > 3", {"score": None}, False),
        ("range == 5", {"range": 5}, True),
    ],
)
def test_filter_matches_expected_rows(expression: str, row: dict[str, Any], expected: bool) -> None:
    found = RowFilter(expression)
    assert found.matches(row) is expected
    assert found.columns(()) == row.keys()


def test_filter_failure_is_a_row_error() -> None:
    with pytest.raises(InvalidInput, match="where: column 'score' is null"):
        RowFilter("score > 3").matches({"score": None})
    with pytest.raises(TemplateError, match="where: TypeError"):
        RowFilter("score > 3").matches({"score": "high"})
    with pytest.raises(SpecError, match=r"^where: line 1: "):
        RowFilter("score >")
    with pytest.raises(SpecError, match=r"^where: line 1: "):
        RowFilter("a }} {{ b")


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=50))
def test_cell_text_is_unchanged(text: str) -> None:
    assert RowTemplate("[{{ a }}]", "t").render({"a": text}) == f"[{text}]"


@pytest.mark.parametrize(
    ("expression", "hint"),
    [
        ("{{ id > 0 }}", "written without {{ }}"),
        ("id = 1", "use == to compare"),
        ("id > 1 && id < 5", "use the words and, or, not"),
        ("!id", "use the words and, or, not"),
        ("id >", "unexpected 'end of template'$"),
    ],
)
def test_invalid_expression_error_has_advice(expression, hint):
    with pytest.raises(SpecError, match=rf"^where: line 1: .*{hint}"):
        RowFilter(expression)
