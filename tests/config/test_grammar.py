"""What is typed arrives in Hydra's grammar: seeds, paths, and letters that the grammar refuses."""

import dataclasses
from pathlib import Path

import pytest

from recast_exp.config import grammar as overrides
from recast_exp.config.fields import build, option
from recast_exp.errors import UserError


def values(text: str, *, multirun: bool = False) -> list[object]:
    """The values that Hydra reads from what was typed."""
    [rewritten] = overrides.rewrite([text], multirun=multirun)
    override = overrides.parse(rewritten)
    assert override is not None, rewritten
    if not override.is_sweep_override():
        return [override.value()]
    return [overrides.parse(f"key={value}").value() for value in overrides.sweep_values(override)]


@pytest.mark.parametrize(
    ("typed", "rewritten"),
    [
        ("seed=42", 'seed="42"'),
        ("seed=7", 'seed="7"'),
        ("seed='7'", 'seed="7"'),
        ("seed=1_000", 'seed="1000"'),
        ("seed=+7", 'seed="7"'),
        ("seed=007", 'seed="7"'),
        ("seed=-1", 'seed="-1"'),
        ("seed=1.5", 'seed="1.5"'),
        ("seed=abc", 'seed="abc"'),
        ("dataset.classes=[10_000,1e3,abc,5]", 'dataset.classes=["10_000","1e3",abc,5]'),
        ("dataset.classes=[true,null,no]", 'dataset.classes=["true","null",no]'),
        ("dataset.classes=['10_000','a b']", "dataset.classes=['10_000','a b']"),
        ("dataset.part=1e3", 'dataset.part="1e3"'),
        ("dataset.part=null", "dataset.part=null"),
        ("label=007", "label=007"),
        ("optimizer.lr=1e-3", "optimizer.lr=1e-3"),
        ("seed=42,1998,3142592", 'seed="42","1998","3142592"'),
        ("seed=[1,2,3]", 'seed="1","2","3"'),
        ("seed=range(1,4)", 'seed="1","2","3"'),
        ("seed=range(0,10,5)", 'seed="0","5"'),
        ("seed=choice(1,2)", 'seed="1","2"'),
        ("seed=[]", "seed=[]"),
        ("seed=été", 'seed="été"'),
    ],
)
def test_seeds_become_quoted_choices(typed: str, rewritten: str) -> None:
    assert overrides.rewrite([typed], multirun=True) == [rewritten]


@pytest.mark.parametrize(
    "path",
    [
        "/a/b",
        "a b",
        "/data/x=1",
        "/data/x=1,y=2",
        "/data/[x]/(y)/{z}",
        "/données/naïve/数据",
        "it's",
        "l'été, l'hiver",
        'say "x"',
        "a:b#c!d&e;f<g>h",
        "back\\slash",
        "trailing\\",
        "range(1,2)",
        "/with\ttab",
        "$HOME",
    ],
)
@pytest.mark.parametrize(
    "key", ["data_dir", "model.weights", "dataset.path", "task", "bank", "resume", "hydra.run.dir"]
)
def test_paths_are_taken_literally(key: str, path: str) -> None:
    assert values(f"{key}={path}") == [path]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/a,/b", ["/a", "/b"]),
        ("/a b,/c=d", ["/a b", "/c=d"]),
        ("'/a,b',/c", ["/a,b", "/c"]),
        ("null,/a", [None, "/a"]),
        ("${oc.env:X,data},/b", ["${oc.env:X,data}", "/b"]),
        ("choice(/a,/b)", ["/a", "/b"]),
        ("l'été,l'hiver", ["l'été", "l'hiver"]),
    ],
)
def test_commas_separate_the_paths_of_a_sweep(typed: str, expected: list[object]) -> None:
    assert values(f"data_dir={typed}", multirun=True) == expected


def test_a_list_of_task_files_is_one_value_of_a_sweep() -> None:
    assert overrides.rewrite(["task=[a b/x.safetensors,c.safetensors]"], multirun=True) == [
        'task="[a b/x.safetensors,c.safetensors]"'
    ]
    assert values("task=[a],[b]", multirun=True) == ["[a]", "[b]"]


def test_null_interpolations_and_quotes_keep_their_meaning() -> None:
    assert values("model.weights=null") == [None]
    assert values("data_dir=${oc.env:HOME}/my data") == ["${oc.env:HOME}/my data"]
    assert values("data_dir='/a, b'") == ["/a, b"]
    assert values('data_dir="/a, b"') == ["/a, b"]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert values("data_dir=~/my data") == [f"{tmp_path}/my data"]
    assert values("data_dir=~/a,~/b", multirun=True) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert values("data_dir=/a/~") == ["/a/~"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("logger.project=été", ["été"]),
        ("logger.project=a=b", ["a=b"]),
        ("logger.project=plain", ["plain"]),
        ("optimizer.lr=1e-3", [0.001]),
        ("recast.targets=[layer?.[!0]*.conv1,b.*]", [["layer?.[!0]*.conv1", "b.*"]]),
        ("model.mean=[0.5,0.5,0.5]", [[0.5, 0.5, 0.5]]),
    ],
)
def test_other_values_are_quoted_only_where_the_grammar_refuses_them(typed: str, expected: list[object]) -> None:
    assert values(typed) == expected


def test_refused_letters_in_a_sweep() -> None:
    assert values("logger.project=é,b=c", multirun=True) == ["é", "b=c"]


@pytest.mark.parametrize("typed", ["vit_att", "~model", "model=", "=3", "mod el=3", "hydra.foo=1"])
def test_what_cannot_be_helped_stays(typed: str) -> None:
    assert overrides.rewrite([typed], multirun=False) == [typed]


def test_null_of_an_experiment_is_an_option() -> None:
    assert overrides.rewrite(["experiment=null"], multirun=False) == ['experiment="null"']
    assert overrides.rewrite(["experiment=a,null"], multirun=True) == ['experiment=a,"null"']


@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize(
    "typed",
    [
        "seed=1,2",
        "seed=range(3,5)",
        "data_dir=/a b,[c]",
        "task=l'été",
        "logger.project=é",
        "experiment=null",
        "model=a",
    ],
)
def test_rewriting_twice_changes_nothing(typed: str, multirun: bool) -> None:
    once = overrides.rewrite([typed], multirun=multirun)
    assert overrides.rewrite(once, multirun=multirun) == once


def test_a_seeds_range_is_cut_where_no_sweep_can_go() -> None:
    [text] = overrides.rewrite(["seed=range(0,1000000000)"], multirun=True)
    assert text.count(",") == overrides.MAX_JOBS


@dataclasses.dataclass
class Scaled:
    how: str = option("none", "how", choices=("none", "true"))
    often: bool = option(False, "often")


def test_true_is_a_word_where_an_option_is_a_string() -> None:
    """The command line and YAML read it as a truth value."""
    assert build(Scaled, {"how": True, "often": True}, "stage.", "stage=x") == Scaled("true", True)
    with pytest.raises(UserError, match=r"^stage\.how: expected one of none, true, got 'false'$"):
        build(Scaled, {"how": False}, "stage.", "stage=x")
