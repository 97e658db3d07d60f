"""`${name}`: precedence, cycles, and that what went in is never looked at again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.files.script_names import clashes, environment_name, slug
from orchestrator.files.variables import FILLED_MAX, Definition, ElsewhereError, Scope, VariableError, layered, names_in

FACTS = {"machine.name": "web1", "machine.address": "10.0.0.1", "machine.tags.rack": "r1", "environment": "production"}

names = st.text(alphabet="abcdefg", min_size=1, max_size=2)
anything = st.text(alphabet="ab${}.\\ \n", max_size=12)
literal = st.text(alphabet="xyz $}{", max_size=8).filter(lambda text: "${" not in text)


def scope(**templates: str) -> Scope:
    return Scope({name: Definition(text) for name, text in templates.items()}, FACTS)


def test_names_are_replaced_through_other_variables() -> None:
    found = scope(port="8080", url="http://${machine.address}:${port}/${environment}")
    assert found.fill("<${url}> ${machine.tags.rack}") == "<http://10.0.0.1:8080/production> r1"


@given(literal)
def test_text_without_names_stays_as_it_is(text: str) -> None:
    assert scope().fill(text) == text


@given(anything)
def test_doubling_the_dollar_gives_back_any_text(text: str) -> None:
    assert scope().fill(text.replace("${", "$${")) == text


@given(st.lists(st.dictionaries(names, literal, max_size=4), max_size=5), names)
def test_the_last_layer_that_has_a_name_wins(layers: list[dict[str, str]], name: str) -> None:
    found = Scope(layered(*({n: Definition(text) for n, text in layer.items()} for layer in layers)), {})
    winners = [layer[name] for layer in layers if name in layer]
    if winners:
        assert found.value(name) == winners[-1]
    else:
        with pytest.raises(VariableError, match="is undefined"):
            found.value(name)


@given(st.dictionaries(names, literal, min_size=1, max_size=4))
def test_a_template_sees_the_layer_that_won_not_its_own(values: dict[str, str]) -> None:
    process = {name: Definition("old") for name in values} | {"all": Definition("".join(f"${{{n}}}" for n in values))}
    machine = {name: Definition(text) for name, text in values.items()}
    assert Scope(layered(process, machine), {}).value("all") == "".join(values.values())


@given(anything, anything)
def test_what_went_in_is_never_filled_again(answer: str, tag: str) -> None:
    found = Scope(
        {"asked": Definition(answer, literal=True), "through": Definition("<${asked}>"), "a": Definition("never")},
        {"machine.tags.x": tag},
    )
    assert found.fill("${through}${asked}${machine.tags.x}") == f"<{answer}>{answer}{tag}"


@given(st.integers(1, 8), st.integers(0, 7))
def test_a_circle_is_refused_from_wherever_one_enters(length: int, start: int) -> None:
    circle = {f"v{i}": Definition(f"${{v{(i + 1) % length}}}") for i in range(length)}
    found = Scope(circle | {"outside": Definition(f"${{v{start % length}}}")}, {})
    for name in (*circle, "outside"):
        with pytest.raises(VariableError, match="is defined by itself: "):
            found.value(name)


@given(st.dictionaries(names, anything, max_size=6), anything)
def test_any_definitions_give_a_text_or_a_refusal(templates: dict[str, str], text: str) -> None:
    try:
        filled = scope(**templates).fill(text)
    except VariableError:
        return
    assert len(filled) <= FILLED_MAX


def test_a_bomb_of_variables_is_refused_before_it_grows() -> None:
    templates = {f"v{i}": f"${{v{i + 1}}}" * 10 for i in range(20)} | {"v20": "x"}
    with pytest.raises(VariableError, match=f"longer than {FILLED_MAX} characters"):
        scope(**templates).value("v0")


def test_a_long_chain_is_refused_and_overflows_nothing() -> None:
    templates = {f"v{i}": f"${{v{i + 1}}}" for i in range(5000)} | {"v5000": "x"}
    with pytest.raises(VariableError, match="variables deep"):
        scope(**templates).value("v0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${prot}", "'prot' is undefined: did you mean 'port'?"),
        ("${quux}", "'quux' is undefined: define it under variables:"),
        ("${}", "'' is undefined"),
        ("${port", r"'\$\{port' is not closed"),
        ("${outputs.x}", "not built yet"),
        ("${old.version}", r"write \$\{package.version\}"),
        ("${machine.tags.row}", "machine web1 has no such tag"),
    ],
)
def test_a_name_that_nobody_knows_is_refused_with_the_next_step(text: str, expected: str) -> None:
    with pytest.raises(VariableError, match=expected) as caught:
        scope(port="1").fill(text)
    assert not isinstance(caught.value, ElsewhereError)


def test_what_needs_a_machine_is_left_out_where_there_is_none_and_mistakes_are_not() -> None:
    problems: list[VariableError] = []
    found = Scope(
        {"a": Definition("${machine.name}"), "b": Definition("${a}"), "c": Definition("x"), "d": Definition("${typo}")},
        {"environment": "production"},
    )
    assert found.values(problems.append) == {"c": "x"}
    assert [problem.text.split(":")[0] for problem in problems] == ["'typo' is undefined"]
    with pytest.raises(ElsewhereError, match="a machine stands only where a step has 'roles'"):
        found.fill("${b}")


def test_other_facts_make_other_values_and_leave_these_alone() -> None:
    here = Scope({"v": Definition("${package.version}")}, {"package.version": "2"})
    assert here.value("v") == "2"
    assert here.with_facts({"package.version": "1"}).fill("${v}${package.version}") == "11"
    assert here.fill("${v}") == "2"


def test_names_in_a_text_are_those_that_will_be_replaced() -> None:
    assert names_in("a ${b} $${c} ${d.e} $f ${") == ["b", "d.e", ""]


# --- names that scripts see


def test_scripts_see_names_in_upper_case_with_plain_characters() -> None:
    assert environment_name("VAR_", "log-level.x") == "VAR_LOG_LEVEL_X"
    assert environment_name("TAG_", "Rack") == "TAG_RACK"


def test_names_that_scripts_could_not_tell_apart_are_found() -> None:
    assert clashes(["port", "a-b", "Port", "a_b", "port", "A.B"]) == [("port", "Port"), ("a-b", "a_b"), ("a-b", "A.B")]


@given(st.text(max_size=100))
def test_a_slug_is_always_a_part_of_an_operation_id(text: str) -> None:
    import re

    assert re.fullmatch(r"[A-Za-z0-9._-]{1,63}", slug(text))
