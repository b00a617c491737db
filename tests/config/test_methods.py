"""The table of methods: two words, in any case, choose one row, and nobody else needs a list of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fs_fwdllm.config import parse_config
from fs_fwdllm.config.methods import METHODS, MethodFacts, default_trainer, examples_of, is_ours, register_method
from fs_fwdllm.core.direction import Distribution
from fs_fwdllm.core.registry import Registry
from fs_fwdllm.errors import ConfigError
from fs_fwdllm.method import Recipe, recipe_of

SPELLINGS = [(name, *words) for name in METHODS for words in METHODS[name].spellings]


def facts(**changes: object) -> MethodFacts:
    given = {"name": "throwaway", "title": "Throwaway", "spellings": (("throwaway", ""),), "recipe": "nowhere:RECIPE"}
    return MethodFacts(**{**given, **changes})  # type: ignore[arg-type]


@pytest.fixture
def throwaway() -> Iterator[MethodFacts]:
    """A method that is there for the length of a test."""
    added = facts()
    register_method(added)
    yield added
    METHODS.unregister(added.name)


@pytest.mark.parametrize(("name", "protocol", "trainer"), SPELLINGS)
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_case_does_not_matter(name: str, protocol: str, trainer: str, case: object) -> None:
    assert callable(case)
    tree = {"federate": {"method": case(protocol)}, "trainer": {"type": case(trainer)}}
    assert parse_config(tree).method is METHODS[name]


@pytest.mark.parametrize("name", METHODS.names())
def test_every_row_has_a_recipe_and_a_title(name: str) -> None:
    protocol, trainer = METHODS[name].spellings[0]
    config = parse_config({"federate": {"method": protocol}, "trainer": {"type": trainer}})
    assert isinstance(recipe_of(config), Recipe)
    assert METHODS[name].name == name and METHODS[name].title


@pytest.mark.parametrize(("name", "protocol", "trainer"), SPELLINGS)
def test_an_empty_trainer_means_the_protocols_own(name: str, protocol: str, trainer: str) -> None:
    if (protocol, "") in METHODS[name].spellings:
        assert (protocol, default_trainer(protocol.upper())) in METHODS[name].spellings


def test_a_run_is_ours_if_either_word_is_ours_alone() -> None:
    hosts = {"fedavg", "fedsgd", "", "general", "llmtrainer"}
    words = {word for _, *pair in SPELLINGS for word in pair}
    for protocol, trainer in itertools.product(words, words):
        assert is_ours(protocol.upper(), trainer) == (not {protocol, trainer} <= hosts)
    assert not is_ours("fedprox", "cvtrainer")


def test_a_method_of_a_program_is_chosen_like_any_other(throwaway: MethodFacts) -> None:
    assert parse_config({"federate": {"method": "ThrowAway"}}).method is throwaway
    assert is_ours("throwaway", "") and "throwaway" in examples_of(lambda row: not row.measures_slopes)


def test_a_row_may_be_written_in_any_case() -> None:
    assert facts(spellings=(("ThrowAway", "OwnTrainer"),)).spellings == (("throwaway", "owntrainer"),)


def test_a_name_or_a_spelling_is_taken_once(throwaway: MethodFacts) -> None:
    for clash in (facts(), facts(name="other"), facts(name="other", spellings=(("fedavg", "mezotrainer"),))):
        with pytest.raises(ValueError, match="registered already"):
            register_method(clash)
    assert sorted(METHODS) == sorted([*METHODS.names()])


def test_a_recipe_that_is_not_there_is_an_error_that_names_it(throwaway: MethodFacts) -> None:
    with pytest.raises(ConfigError, match=r"federate.method 'throwaway'.*'nowhere:RECIPE'.*install"):
        recipe_of(parse_config({"federate": {"method": "throwaway"}}))


def test_a_recipe_of_another_type_is_refused() -> None:
    register_method(facts(recipe="fs_fwdllm.errors:nearest"))
    try:
        with pytest.raises(ConfigError, match=r"is a function.*Recipe"):
            recipe_of(parse_config({"federate": {"method": "throwaway"}}))
    finally:
        METHODS.unregister("throwaway")


@pytest.mark.parametrize(
    ("tree", "fragments"),
    [
        ({"federate": {"method": "fedfvd"}}, ("federate.method 'fedfvd'", "did you mean 'fedfwd'")),
        (
            {"federate": {"method": "fedfwd"}, "trainer": {"type": "mezotrainer"}},
            ("trainer.type 'mezotrainer'", "federate.method 'fedfwd'", "'fwdtrainer'"),
        ),
    ],
)
def test_an_unknown_word_is_answered_with_those_that_are(tree: dict[str, object], fragments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        _ = parse_config(tree).method
    assert all(fragment in str(caught.value) for fragment in fragments)


@pytest.fixture
def announce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``announce(group, name=value)`` installs a distribution ``stranger`` with entry points, and its module."""

    def put(group: str, source: str, **points: str) -> None:
        about = tmp_path / "stranger-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
        module = f"stranger_{tmp_path.name.replace('-', '_')}"  # another for every test: modules are kept
        (tmp_path / f"{module}.py").write_text(source)
        lines = [f"{name} = {value.replace('MODULE', module)}" for name, value in points.items()]
        (about / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return put


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise RuntimeError('broken')", "cannot be imported (RuntimeError: broken)"),
        ("import no_such_module", "cannot be imported (ModuleNotFoundError"),
        ("", "cannot be imported (AttributeError"),
        ("THING = 7", "is no Distribution (it is of type int)"),
        (
            "from fs_fwdllm.core.direction import Distribution\nclass THING(Distribution): name = 'x'",
            "that lacks spread, values",
        ),
    ],
)
def test_a_strangers_member_that_is_none_is_a_typed_error(
    announce: Callable[..., None], source: str, words: str
) -> None:
    announce("fs_fwdllm.strangers", source, thing="MODULE:THING")
    registry: Registry[object] = Registry("some.key", "fs_fwdllm.strangers", {"ours": 1}, kind=Distribution)
    assert registry.names() == ["ours", "thing"] and registry["ours"] == 1
    with pytest.raises(ConfigError) as caught:
        registry["thing"]
    assert "some.key 'thing': stranger announces it" in str(caught.value) and words in str(caught.value)


def test_a_name_of_ours_is_not_taken_over_in_silence(announce: Callable[..., None]) -> None:
    announce("fs_fwdllm.strangers", "THING = 7", ours="MODULE:THING")
    registry: Registry[object] = Registry("some.key", "fs_fwdllm.strangers", {"ours": 1})
    with pytest.raises(ConfigError, match=r"some.key 'ours': stranger announces it .* it is fs_fwdllm's already"):
        registry.names()


def test_a_registry_says_what_it_has_and_loads_on_demand() -> None:
    registry: Registry[object] = Registry("some.key", "fs_fwdllm.nothing", {"here": 1, "there": "json:dumps"})
    assert registry.names() == ["here", "there"] and registry["here"] == 1
    assert callable(registry["there"])
    with pytest.raises(ConfigError, match=r"some.key 'hear': allowed are \['here', 'there'\]; did you mean 'here'"):
        registry["hear"]
    with pytest.raises(ValueError, match="registered already"):
        registry.register("here", 2)
