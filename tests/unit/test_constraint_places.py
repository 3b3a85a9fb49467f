"""Where a constraint is wrong, or takes too much: each refusal names a keyword or a position."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import select
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.model_location import bundled_model
from engine.errors import InvalidRequest
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.errors import GrammarError
from engine.grammar.gbnf_source import GbnfSource
from engine.grammar.largest import largest_in
from engine.sampling.constraint import MAX_CONSTRAINT_CHARS, Constraint
from helpers.grammars import Grammars, bundled_vocabulary


@pytest.fixture(scope="module")
def grammars():
    return Grammars(bundled_vocabulary())


# --- positions in an expression


@pytest.mark.parametrize(
    ("regex", "position"),
    [
        ("(a", 2),
        ("a$b", 1),
        ("..a$b", 3),  # the dots are given to the compiler as something longer
        ("é日😀.(", 5),
        (r"[\^a].)", 6),
        (r"[\^a][z-a]", 5),
        ("ab)c", 2),
        (r"x[\^-a]", 1),
        ("x[^]a]", 1),
        (r"x[^\]][^]*", 6),
        (r"x\\\ud800", 3),
        (r"[a\uDFFF-\ue000]", 2),
        (r"x\u{0d800}", 1),
        (r"x\ud83d\ude00", 1),
        ("x{3,2}", 1),
        (r"abc\1", 3),
        ("a{1000000}", 1),
        ("((a{100}){100}){100}", 15),
    ],
)
def test_positions_are_those_in_the_expression_as_it_was_given(grammars, regex, position):
    """Counted from 0, whoever finds what is wrong."""
    with pytest.raises(GrammarError, match=rf"position {position}\b"):
        grammars.compile("regex", regex)
    schema = {"properties": {"a": {"type": "string", "pattern": regex}}}
    with pytest.raises(GrammarError, match=rf"position {position}\b.*at #/properties/a"):
        grammars.compile("json_schema", schema)
    tag = {"type": "structural_tag", "format": {"type": "regex", "pattern": regex}}
    with pytest.raises(GrammarError, match=rf"position {position}\b.*at #/format"):
        grammars.compile("structural_tag", tag)


# --- half of a character

HALVES = {
    "choice": r'["whole: \ud83d\ude00", "\\ud800 \uD800"]',
    "json_schema": r'{"enum": ["whole: \ud83d\ude00", "\\ud800 \uD800"]}',
    "structural_tag": r'{"type": "structural_tag", "format": {"type": "const_string", "value": "\udfff"}}',
    "ebnf": r'root ::= "\U0001f600 \\ud800 \ud800"',
    "regex": r"\\ud800 \ud800",
}


@pytest.mark.parametrize("kind", HALVES)
def test_half_of_a_character_is_told_by_its_position(grammars, kind):
    text = HALVES[kind]
    position = max(text.lower().rfind(r"\ud800"), text.rfind(r"\udfff"))
    with pytest.raises(GrammarError, match=f"half of a character: .* at position {position}$"):
        grammars.compile(kind, text)


@pytest.mark.parametrize("kind", ["regex", "ebnf", "json_schema", "choice"])
def test_half_of_a_character_as_it_is(kind):
    """No JSON text holds one, but a Python string may."""
    with pytest.raises(InvalidRequest, match="half of a character at position 3") as caught:
        Constraint(kind, "['é\ud800']", param="regex")
    assert caught.value.param == "regex"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("ebnf", "root ::= [^a]"),
        ("ebnf", r"root ::= [\u0000-\U0010ffff]"),
        ("ebnf", 'root ::= x{1} # [a\nx ::= "y" | [^a"]'),
        ("regex", "[^a]"),
        ("regex", r"[\s\S]"),
        (
            "structural_tag",
            '{"type": "structural_tag", "format": {"type": "grammar", "grammar": "root ::= [^a]"}}',
        ),
    ],
)
def test_what_is_left_out_of_a_class_is_characters(grammars, kind, text):
    """And no half of one, which a model with tokens of single bytes would write."""
    grammar = grammars.compile(kind, text)
    for whole in ("b", "é", "\ud7ff", "\ue000", "😀", "\U0010ffff"):
        assert grammars.accepts(grammar, whole)
    for half in (b"\xed\xa0\x80", b"\xed\xaf\xbf", b"\xed\xb0\x80", b"\xed\xbf\xbf", b"\xc0\x80", b"\xff"):
        assert not grammars.accepts(grammar, half)


# --- grammars that never end


@pytest.mark.parametrize(
    ("grammar", "rule"),
    [
        ('root ::= "a" root', "root at line 1, column 1"),
        ('root ::= a\n  a ::= a "x"', "a at line 2, column 3"),
        (
            '# root ::= "x"\nroot ::= ("a" | b) (b | "x") b\nb ::= "[" (c)+ | c\nc ::= b',
            "b at line 3, column 1",
        ),
        ('root ::= "a" | b\nb ::= ("x" b){2,3}', "b at line 2, column 1"),
    ],
)
def test_a_rule_that_never_ends_is_named(grammars, grammar, rule):
    with pytest.raises(GrammarError, match=f"never ends: rule {rule} leads to itself"):
        grammars.compile("ebnf", grammar)
    tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": [
        {"type": "grammar", "grammar": grammar}]}}  # fmt: skip
    with pytest.raises(GrammarError, match=f"never ends: rule {rule} .*at #/format/elements/0"):
        grammars.compile("structural_tag", tag)


@pytest.mark.parametrize(
    ("grammar", "answer"),
    [
        ('root ::= "a" root?', "aaa"),
        ('root ::= "a"\nx ::= "b" x', "a"),  # nothing leads to x
        ('root ::= "a" (root | "b")', "aab"),
        ('root ::= "a" root{0,2} "(" # ) root\n', "aa(("),
        ('root ::= "::= root" root* [b ::=]', "::= root:"),
        ('x ::= "\\"" root\nroot ::= [^"\\]] | x', '""a'),
        ("root ::= Regex(\"a(b)*\") | root \"x\"", "abbx"),
        ('a.b-c ::= "1"\nroot ::= a.b-c root | a.b-c', "11"),
    ],
)  # fmt: skip
def test_what_ends_is_taken(grammars, grammar, answer):
    assert grammars.accepts(grammars.compile("ebnf", grammar), answer)


def drawn_grammar(draw: random.Random) -> tuple[str, dict[str, list]]:
    """A grammar as text, and as lists of alternatives of (name or inner alternatives, is needed)."""
    names = ["root", "a", "b", "c-d", "e_1"]

    def alternatives(depth: int) -> tuple[str, list]:
        texts, found = [], []
        for _ in range(draw.randint(1, 3)):
            items, needs = [], []
            for _ in range(draw.randint(1, 3)):
                kind = draw.randrange(4 if depth else 3)
                if kind == 0:
                    text, need = draw.choice(['"a"', "[b-d]", '"(|"', '[")]']), None
                elif kind == 3:
                    inner, need = alternatives(depth - 1)
                    text = f"({inner})"
                else:
                    text = need = draw.choice(names)
                suffix = draw.choice(["", "", "", "+", "{2}", "?", "*", "{0,3}", "{1,}"])
                items.append(text + suffix)
                needs.append((need, suffix not in ("?", "*", "{0,3}")))
            texts.append(" ".join(items))
            found.append(needs)
        return " | ".join(texts), found

    rules = {name: alternatives(2) for name in names}
    return "\n".join(f"{name} ::= {text}" for name, (text, _) in rules.items()), {
        name: found for name, (_, found) in rules.items()
    }


def test_grammars_drawn_by_chance_end_or_do_not():
    """Against a plain search in what the grammar was drawn as."""
    both = set()
    for seed in range(300):
        text, rules = drawn_grammar(random.Random(seed))
        ending: set[str] = set()

        def ends(alternatives, ending=ending) -> bool:
            return any(
                all(
                    not is_needed or need is None or (need in ending if isinstance(need, str) else ends(need))
                    for need, is_needed in needs
                )
                for needs in alternatives
            )

        for _ in rules:
            ending |= {name for name, found in rules.items() if ends(found)}
        reached: set[str] = set()

        def reach(name, alternatives, rules=rules, reached=reached) -> None:
            reached.add(name)
            for need, _ in (each for needs in alternatives for each in needs):
                if isinstance(need, list):
                    reach(name, need)
                elif need is not None and need not in reached:
                    reach(need, rules[need])

        reach("root", rules["root"])
        named = GbnfSource(text).endless()
        assert (named is None) == (reached <= ending), text
        assert named is None or named.split()[1] not in ending, text
        both.add(named is None)
    assert both == {True, False}


# --- what takes too much


MANY = "|".join(["a*"] * 2000)


@pytest.mark.parametrize(
    ("kind", "text", "what"),
    [
        ("regex", "x(x+x+)+y", "+ at position 7"),
        ("regex", "(a{3}b){4}c{11}", "{4} at position 7"),
        ("regex", "(a{3}b){4}c{1,30}", "{1,30} at position 11"),
        ("regex", r"(?:\(\*)[*+]{9}\++?", "{9} at position 12"),
        ("regex", "ab", "the whole of 2 characters from position 0"),
        ("regex", "(a|aa)*" * 30, "the whole of 210 characters from position 0"),
        ("regex", "((((", "the whole of 4 characters from position 0"),
        ("ebnf", 'root ::= a\na ::= "x" b{3}\nb ::= [a-z]{1,4} "y"', "{3} at line 2, column 12"),
        ("ebnf", 'root ::= r1\nr1 ::= r2 r2\nr2 ::= r3 r3\nr3 ::= [a]', "rule root at line 1, column 1"),
        ("ebnf", "nonsense", "line 1, column 1"),
        ("choice", ["a"] * 9, "the number of texts, 9"),
        ("choice", ["a", "b" * 99], "text 1, of 99 characters"),
        ("json_schema", {"properties": {"a": {"enum": [1, "x" * 50]}}},
         '"enum" at #/properties/a, 57 characters'),
        ("json_schema", {"properties": {"a": {"type": "string", "maxLength": 500}}},
         '"maxLength" at #/properties/a, 500'),
        ("json_schema", {"properties": {f"p{i}": {"type": "null"} for i in range(30)}},
         '"properties" at #, 30 of them'),
        ("json_schema", {"items": {"type": "string", "pattern": "^(ab){40}$"}},
         '"pattern" at #/items: {40} at position 5'),
        ("json_schema", {"anyOf": [{"const": {"maxLength": 10**9}}, *[{"type": "null"}] * 30],
                         "default": "x" * 99}, '"anyOf" at #, 31 of them'),
        ("structural_tag", {"format": {"type": "grammar", "grammar": 'root ::= "a"{60}'}},
         '"grammar" at #/format: {60} at line 1, column 13'),
    ],
)  # fmt: skip
def test_the_largest_part(kind, text, what):
    text = text if isinstance(text, str) else json.dumps(text)
    assert largest_in(kind, text) == f"largest in it is {what}"


def test_what_is_deep_is_deepest():
    text = '{"items":' * 60 + "true" + "}" * 60
    assert largest_in("json_schema", text) == "it is deepest with 60 levels at character 531"
    assert "3000 levels" in largest_in("json_schema", '{"items":' * 3000)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["regex", "ebnf", "choice", "json_schema", "structural_tag", "json_object"]),
    st.text(alphabet='ab01(){},|*+?[]^$\\"#:= \n.-', max_size=60),
)
def test_any_text_has_a_largest_part(kind, text):
    assert len(largest_in(kind, text)) > 10


@pytest.mark.parametrize("kind", ["regex", "ebnf", "json_schema"])
@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "(",
        "a|",
        "a{9}",
        '"',
        "[",
        "a ::= b\n",
        "a::=(",
        "{",
        '{"a":',
        "[{},",
        "\n",
        " ",
        "a ",
        "#",
        "\\",
    ],
)
def test_the_largest_constraints_are_looked_through_in_time(kind, piece):
    text = piece * (MAX_CONSTRAINT_CHARS // len(piece))
    gc.freeze()  # else collections go through all that the tests before have left
    try:
        began_s = time.thread_time()
        assert largest_in(kind, text)
        if kind == "ebnf":
            GbnfSource(text).endless()
        assert time.thread_time() - began_s < 5
    finally:
        gc.unfreeze()


def test_a_long_chain_of_rules_is_looked_through_in_time():
    rules = [f"r{i} ::= r{i + 1} r{i + 1}" for i in range(10_000)]
    for order in (rules, rules[::-1]):
        source = GbnfSource("\n".join([*order, 'r10000 ::= "a"']))
        began_s = time.thread_time()
        assert source.endless() is None and source.largest().what.startswith("rule r")
        assert time.thread_time() - began_s < 2


@pytest.mark.parametrize(
    ("kind", "text", "what"),
    [
        ("regex", f"({MANY})*b", r"takes longer than 0.5 s to compile; largest in it is \* at position 6001"),
        ("regex", "(" * 499 + "a" + "*)" * 499, r"takes .* than .*; largest in it is \* at position 1496"),
        ("json_schema", {"properties": {f"p{i}": {"type": "string", "minLength": 1, "maxLength": 128}
                                        for i in range(3000)}}, '"properties" at #, 3000 of them'),
        ("ebnf", "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(60)) + '\nr60 ::= "a"\nroot ::= r0',
         "(longer|nested|memory).*; largest in it is rule r0 at line 1, column 1"),
        ("ebnf", 'root ::= "a"{100000}', r"16384 bytes .*; largest in it is \{100000\} at line 1, column 13"),
        ("choice", ["a" * 20_000], "; largest in it is text 0, of 20000 characters"),
        ("json_schema", {"properties": {"a": {"const": "a" * 20_000}}, "required": ["a"]},
         '; largest in it is "const" at #/properties/a, 20002 characters'),
    ],
)  # fmt: skip
def test_what_runs_out_of_time_memory_or_stack_says_where_it_is_largest(kind, text, what):
    # Where the limit is not that of time, time must not run out first on a busy machine.
    compiler = GrammarCompiler(str(bundled_model()), 4096, timeout_s=60 if "16384 bytes" in what else 0.5)
    constraint = Constraint(kind, text if isinstance(text, str) else json.dumps(text))
    with contextlib.closing(compiler):
        compiler.start(constraint)
        results = {}
        while not results:
            assert select.select([compiler.wake_fd], [], [], 60)[0]
            results = compiler.take_results()
    with pytest.raises(GrammarError, match=what):
        raise results[constraint.key]
