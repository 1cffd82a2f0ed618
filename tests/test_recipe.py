"""Recipes: the built-in ones, overrides, who gets which tensor, and every problem at once."""

from __future__ import annotations

import pytest

from anybit.errors import RecipeError
from anybit.methods.any_precision import AnyPrecision
from anybit.methods.anybcq import AnyBCQ
from anybit.methods.awq import AWQ
from anybit.methods.base import Method
from anybit.methods.flexq import FlexQInputs
from anybit.methods.gptq import GPTQ
from anybit.methods.rtn import RTN
from anybit.methods.tune_tables import TuneTables
from anybit.recipe import (
    COMPENSATIONS,
    METHODS,
    TRANSFORMS,
    Entry,
    Recipe,
    assign,
    list_recipes,
    load_recipe,
    show_recipe,
)
from anybit.transforms.awq_scale import AWQScale
from anybit.transforms.base import Transform

LINEARS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "o_proj", "down_proj")]
NAMES = [recipe["name"] for recipe in list_recipes()]
NESTED = {  # several widths in one checkpoint, and what else has to change for a checkpoint of two and three bits
    "any-precision": ["weights.precisions=[2, 3]"],
    "anybcq": ["weights.precisions=[2, 3]"],
    "pmpd": ["weights.precisions=[2, 3]", "weights.tables=[2, 3]", "weights.weights={2: 1, 3: 1}", "weights.stream=3"],
}

WEIGHTS = {  # forms of weights other than grouped affine: what `recipes` says, and bits
    "bipolar-w4a4": ("4-bit bipolar, group 128", 4),
    "flexq-w6a6": ("6-bit affine, group 128, symmetric", 6),
    "flexq-w6a8": ("6-bit affine, group 128, symmetric", 6),
    "fp8-w8a8": ("E4M3, one scale a row", 8),
    "tender-w4a4": ("4-bit affine, one scale a row, symmetric", 4),
    "tender-w8a8": ("8-bit affine, one scale a row, symmetric", 8),
}


def assigned(recipe: Recipe, tied: bool = False):
    return assign(recipe, LINEARS, "embed", "head", tied)


def recipe_of(weights, embeddings=(), transform=()):
    stages = {"transform": list(transform), "weights": list(weights), "embeddings": list(embeddings)}
    return Recipe(name="mine", paper="-", summary="-", weights="-", stages=stages)


def entry(name, *targets, **options):
    return {"name": name, "targets": list(targets) or ["linears"], "options": options}


def test_names_are_sorted_and_complete():
    assert (
        sorted(NAMES) == NAMES == sorted(["any-precision", "anybcq", "awq-w4", "gptq-w4", "pmpd", "rtn-w4", *WEIGHTS])
    )


@pytest.mark.parametrize("name", NAMES)
def test_builtin_recipes_describe_themselves(name):
    shown = show_recipe(name)
    listed = next(recipe for recipe in list_recipes() if recipe["name"] == name)
    assert {key: value for key, value in shown.items() if key != "stages"} == listed
    assert listed["name"] == name
    assert listed["paper"]
    assert listed["summary"]
    recipe = load_recipe(name)
    weights = recipe.stages["weights"][0].options
    if name in NESTED:
        assert listed["weights"].startswith(f"{weights['precisions'][0]}- to {weights['bits']}-bit nested ")
    elif name in WEIGHTS:
        assert listed["weights"] == WEIGHTS[name][0]
    else:
        assert listed["weights"] == f"{weights['bits']}-bit affine, group {weights['group_size']}"
    found = assigned(recipe)
    readers = [*(m for m in found.methods.values() if m), *found.activations.values()]
    needs = set().union(*(m.needs for m in readers)) or bool(found.transforms)
    needs = needs or any(isinstance(m, FlexQInputs) for m in readers)
    assert listed["needs"] == (["calibration"] if needs else [])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_builtin_recipes_cover_a_model_and_take_other_bits(name, tied):
    bits = 8 if name in NESTED else WEIGHTS.get(name, ("", 4))[1]
    assert assigned(load_recipe(name)).methods["layers.0.q_proj"].plan((8, 64))["terms"][0]["bits"] == bits
    other = ["weights.type=e1m1"] if name == "fp8-w8a8" else ["weights.bits=3", *NESTED.get(name, [])]
    found = assigned(load_recipe(name, other), tied)
    assert list(found.methods) == [*LINEARS, "embed"] + ([] if tied else ["head"])
    for linear in LINEARS:
        assert found.methods[linear].plan((8, 64))["terms"][0]["bits"] == 3
    for table in ("embed",) if tied else ("embed", "head"):
        assert found.methods[table].bits == 8
        assert not found.methods[table].needs
    assert load_recipe(name).stages["weights"][0].options.get("bits") != 3  # an override is for one call


def test_the_published_gptq_is_one_line_of_overrides():
    found = assigned(
        load_recipe("gptq-w4", ["weights.clip=none", "weights.damping=0.01", "weights.first_token_weight=1"])
    )
    assert found.methods["layers.0.q_proj"] == GPTQ(bits=4, group_size=32)
    assert assigned(load_recipe("gptq-w4")).methods["layers.0.q_proj"] == GPTQ(
        bits=4, group_size=32, clip="hessian", damping=0.05, first_token_weight=100
    )


def test_awq_scales_for_the_grid_it_rounds_to():
    found = assigned(load_recipe("awq-w4"))
    assert found.transforms == (AWQScale(bits=4, group_size=32),)
    assert found.methods["layers.0.q_proj"] == AWQ(bits=4, group_size=32)
    assert assigned(load_recipe("rtn-w4")).transforms == ()


def test_the_first_entry_that_matches_has_it():
    found = assigned(
        recipe_of(
            [entry("rtn", "*.down_proj", bits=8), entry("gptq", "layers.1.*", bits=5), entry("rtn", "linears", bits=3)],
            [entry("rtn", "head", bits=6), entry("rtn", "embedding", "head", bits=7)],
        )
    ).methods
    assert {name: method.bits for name, method in found.items()} == {
        "layers.0.q_proj": 3, "layers.0.o_proj": 3, "layers.0.down_proj": 8,
        "layers.1.q_proj": 5, "layers.1.o_proj": 5, "layers.1.down_proj": 8,
        "embed": 7, "head": 6,
    }  # fmt: skip
    assert isinstance(found["layers.1.q_proj"], GPTQ)
    assert isinstance(found["layers.0.q_proj"], RTN)


def test_targets_are_words_exact_names_and_patterns():
    weights = [entry("rtn", "layers.0.q_proj", bits=2), entry("rtn", "layers.?.o_proj", bits=3), entry("rtn", bits=4)]
    found = assigned(recipe_of(weights, [entry("rtn", "emb*", "head", bits=8)])).methods
    assert [found[name].bits for name in LINEARS] == [2, 3, 4, 4, 3, 4]
    assert (found["embed"].bits, found["head"].bits) == (8, 8)


def test_float_keeps_a_tensor_and_so_does_no_entry_for_a_table():
    found = assigned(recipe_of([entry("float", "*.down_proj"), entry("rtn")], [entry("float", "embedding")])).methods
    assert [found[name] is None for name in LINEARS] == [False, False, True] * 2
    assert found["embed"] is None
    assert found["head"] is None
    assert not any(assigned(recipe_of([entry("float")])).methods.values())


def test_a_tied_head_is_the_embedding():
    recipe = recipe_of([entry("rtn")], [entry("rtn", "head", bits=6)])
    assert assigned(recipe, tied=True).methods["embed"].bits == 6
    assert "head" not in assigned(recipe, tied=True).methods
    assert assigned(recipe, tied=False).methods["embed"] is None


def test_every_problem_is_told_at_once():
    bad = recipe_of(
        [entry("gtpq", "*.q_proj"), entry("rtn", "*.o_porj", bits=9, grup_size=3), entry("rtn", "*.o_proj")],
        [entry("rtn", "linears")],
        [entry("awq")],
    )
    with pytest.raises(RecipeError) as caught:
        assigned(bad)
    text = str(caught.value)
    for part in (
        "recipe 'mine'",
        "weights: unknown method 'gtpq'; did you mean 'gptq'?",
        "weights.bits: Input should be less than or equal to 8",
        "weights.grup_size: unknown option; did you mean 'group_size'?",
        "weights: target '*.o_porj' matches nothing",
        "embeddings: target 'linears' matches nothing",
        "transform: unknown method 'awq'; did you mean 'awq-scale'?",
        "no entry covers layers.0.down_proj (2 in all)",
    ):
        assert part in text
    assert "\n" not in text
    assert "o_proj" not in text.split("no entry covers")[1]


def test_a_bad_combination_of_options_is_told():
    with pytest.raises(RecipeError, match="needs static_groups"):
        assigned(recipe_of([entry("gptq", order="activation", static_groups=False)]))


@pytest.mark.parametrize(
    ("override", "options"),
    [
        ("weights.bits=3", {"bits": 3, "group_size": 32}),
        ("weights.symmetric=true", {"bits": 4, "group_size": 32, "symmetric": True}),
        ("weights.clip=mse", {"bits": 4, "group_size": 32, "clip": "mse"}),
        ("weights.group_size=-1", {"bits": 4, "group_size": -1}),
        ("weights.clip=a=b", {"bits": 4, "group_size": 32, "clip": "a=b"}),
    ],
)
def test_overrides_are_yaml_values(override, options):
    assert load_recipe("rtn-w4", [override]).stages["weights"][0].options == options


def test_overrides_are_applied_in_order_and_a_new_method_forgets_the_options():
    recipe = load_recipe("gptq-w4", ["weights.bits=2", "weights.name=rtn", "weights.bits=5", "weights.bits=6"])
    assert assigned(recipe).methods["layers.0.q_proj"] == RTN(bits=6)
    kept = assigned(load_recipe("rtn-w4", ["weights.name=float"])).methods
    assert kept["layers.0.q_proj"] is None
    assert kept["embed"] == RTN(bits=8, group_size=32)


@pytest.mark.parametrize("override", ["weights.bits", "bits=3", "weights.=3", "=3", "embed.bits=3", "weights.bits=[3"])
def test_overrides_that_fit_nothing(override):
    with pytest.raises(RecipeError, match=r"--set .*" + override.split("=")[0]):
        load_recipe("rtn-w4", [override])


FILE = """
name: mine
paper: none
summary: two entries
weights: mixed
stages:
  weights:
    - {name: rtn, targets: ["*.q_proj"], options: {bits: 5}}
    - {name: gptq}
"""


def test_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    found = assigned(load_recipe(str(path), ["weights.bits=6"])).methods
    assert found["layers.0.q_proj"] == RTN(bits=6)  # an override goes to the first entry
    assert found["layers.0.o_proj"] == GPTQ()
    assert found["embed"] is None
    assert show_recipe(str(path))["name"] == "mine"
    path.write_text(FILE.replace("summary: two entries\n", "colour: red\n"))
    with pytest.raises(RecipeError, match=r"summary: Field required.*colour: Extra inputs"):
        load_recipe(str(path))
    path.write_text(FILE.replace("stages:\n  weights", "stages:\n  wieghts"))
    with pytest.raises(RecipeError, match="wieghts"):
        load_recipe(str(path))
    for text in ("a: [", "", "- 1"):
        path.write_text(text)
        with pytest.raises(RecipeError, match=r"mine\.yaml"):
            load_recipe(str(path))


def test_nested_recipes_are_the_published_methods():
    """Any-precision as it is but for the seed, AnyBCQ as it is but for how long its scales are trained."""
    found = assigned(load_recipe("any-precision"))
    tables = (2, 3, 4, 6, 8)
    assert found.methods["layers.0.q_proj"] == AnyPrecision(bits=8, seed_bits=2, precisions=tables)
    assert found.compensations == ()
    found = assigned(load_recipe("anybcq"))
    assert found.methods["layers.0.q_proj"] == AnyBCQ(bits=8, base_bits=2, precisions=tables, group_size=128)
    assert found.compensations == (TuneTables(),)


def test_compensations_are_checked_like_everything_else():
    bad = recipe_of([entry("rtn")])
    bad.stages["compensate"] = [Entry(name="tune-tables", options={"epoch": 3}), Entry(name="tune-table")]
    with pytest.raises(
        RecipeError, match=r"compensate.epoch: unknown option; did you mean 'epochs'.*did you mean 'tune-tables'"
    ):
        assigned(bad)


@pytest.mark.parametrize("name", sorted(METHODS | TRANSFORMS | COMPENSATIONS))
def test_methods_go_by_their_own_name(name):
    method = (METHODS | TRANSFORMS | COMPENSATIONS)[name]
    assert issubclass(method, Method | Transform)
    assert method.name == name
    assert issubclass(method, Transform) or method.needs <= {"hessian", "inputs", "mean_abs"}
