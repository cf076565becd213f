"""The strict core: rules, transforms, and everything that can be wrong, in one error."""

from __future__ import annotations

import numpy as np
import pytest

from porting.rules import Exempt, PortingError, Rule, RuleTable, flax_to_torch, torch_to_flax
from porting.transforms import CONV, COUNTER, IDENTITY, LINEAR

TABLE = RuleTable(
    (
        Rule("stem.weight", "stem.kernel", CONV),
        Rule("layer{i}.fc{n:1|2}.weight", "blocks.{i}.fc{n}.kernel", LINEAR),
        Rule("layer{i}.fc{n:1|2}.bias", "blocks.{i}.fc{n}.bias"),
        Rule("steps", "steps", COUNTER),
    ),
    (Exempt(r"head\..+", "no classifier here"),),
)
SHAPES = {
    "stem.kernel": (3, 5, 2, 4),
    "blocks.0.fc1.kernel": (4, 6),
    "blocks.0.fc1.bias": (6,),
    "blocks.10.fc2.kernel": (6, 4),
    "blocks.10.fc2.bias": (4,),
    "steps": (),
}


def state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "stem.weight": (4, 2, 3, 5),
        "layer0.fc1.weight": (6, 4),
        "layer0.fc1.bias": (6,),
        "layer10.fc2.weight": (4, 6),
        "layer10.fc2.bias": (4,),
        "head.weight": (7, 4),
    }
    arrays = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return {**arrays, "steps": np.array(7, np.int64)}


def problems_of(given: dict[str, np.ndarray], table: RuleTable = TABLE, shapes=SHAPES) -> list[str]:
    with pytest.raises(PortingError) as caught:
        torch_to_flax(table, given, shapes)
    return caught.value.problems


def test_every_tensor_arrives_in_its_place_and_layout():
    given = state()
    leaves = torch_to_flax(TABLE, given, SHAPES)
    assert {name: leaf.shape for name, leaf in leaves.items()} == SHAPES
    assert leaves["stem.kernel"][2, 4, 1, 3] == given["stem.weight"][3, 1, 2, 4]
    assert leaves["blocks.0.fc1.kernel"][3, 5] == given["layer0.fc1.weight"][5, 3]
    np.testing.assert_array_equal(leaves["blocks.10.fc2.bias"], given["layer10.fc2.bias"])
    assert leaves["steps"].dtype == np.int32


def test_the_way_back_is_exact_to_the_bit():
    given = state()
    back = flax_to_torch(TABLE, torch_to_flax(TABLE, given, SHAPES))
    assert back.keys() == given.keys() - {"head.weight"}
    for key, value in back.items():
        assert value.dtype == given[key].dtype
        assert value.flags.c_contiguous
        assert value.tobytes() == given[key].tobytes()


@pytest.mark.parametrize("transform", [IDENTITY, LINEAR, CONV, COUNTER])
def test_every_transform_has_an_exact_inverse(transform):
    x = np.arange(120).reshape({LINEAR: (4, 30), CONV: (2, 3, 4, 5)}.get(transform, (120,)))
    back = transform.inverse(transform.forward(x))
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)


def test_a_missing_key_is_named_with_its_leaf():
    given = state()
    del given["layer10.fc2.weight"]
    assert problems_of(given) == ["missing key: layer10.fc2.weight, for blocks.10.fc2.kernel"]


def test_an_unexpected_key_is_named():
    assert problems_of(state() | {"layer0.fc3.bias": np.zeros(2)}) == [
        "unexpected key: layer0.fc3.bias [2]"
    ]


def test_a_key_without_a_leaf_is_named():
    assert problems_of(state() | {"layer1.fc1.bias": np.zeros(6)}) == [
        "no such leaf in the model: blocks.1.fc1.bias, from layer1.fc1.bias"
    ]


def test_a_wrong_shape_is_named_as_torch_has_it():
    given = state() | {"layer0.fc1.weight": np.zeros((4, 6), np.float32)}
    assert problems_of(given) == ["wrong shape: layer0.fc1.weight [4, 6], expected [6, 4]"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    given = state()
    given["layer0.fc1.bias"][3] = value
    assert problems_of(given) == ["not finite: layer0.fc1.bias holds NaN or infinity"]


def test_two_keys_for_one_leaf_are_refused():
    table = RuleTable((*TABLE.rules, Rule("old_steps", "steps", COUNTER)), TABLE.exempt)
    given = state() | {"old_steps": np.array(1)}
    assert problems_of(given, table) == ["written twice: steps, by steps and old_steps"]


def test_a_key_that_meets_two_rules_is_refused():
    table = RuleTable((*TABLE.rules, Rule("layer{i}.fc1.bias", "other.{i}")), TABLE.exempt)
    assert "key meets 2 rules: layer0.fc1.bias [6]" in problems_of(state(), table)


def test_a_key_both_ruled_and_exempt_is_refused():
    table = RuleTable(TABLE.rules, (*TABLE.exempt, Exempt("steps", "a mistake")))
    assert "both exempt and ruled: steps" in problems_of(state(), table)


def test_all_problems_come_in_one_error():
    given = state() | {"new.weight": np.zeros(3), "stem.weight": np.zeros((1, 2, 3, 5))}
    del given["steps"]
    given["layer0.fc1.bias"][0] = np.nan
    problems = problems_of(given)
    assert [problem.split(":")[0] for problem in problems] == [
        "missing key",
        "not finite",
        "unexpected key",
        "wrong shape",
    ]
    with pytest.raises(PortingError, match=r"the file does not fit \(4 problems\)") as caught:
        torch_to_flax(TABLE, given, SHAPES, source="the file")
    assert all(problem in str(caught.value) for problem in problems)


def test_names_are_matched_whole_and_dots_are_dots():
    rule = Rule("layer{i}.fc{n:1|2}.weight", "blocks.{i}.fc{n}.kernel")
    assert rule.to_flax("layer12.fc2.weight") == "blocks.12.fc2.kernel"
    assert rule.to_torch("blocks.12.fc2.kernel") == "layer12.fc2.weight"
    for key in (
        "xlayer1.fc2.weight",
        "layer1.fc2.weights",
        "layer1xfc2.weight",
        "layer1.fc3.weight",
    ):
        assert rule.to_flax(key) is None


def test_a_leaf_without_a_rule_cannot_go_back():
    with pytest.raises(PortingError, match=r"leaf meets 0 rules: blocks\.0\.gamma"):
        flax_to_torch(TABLE, {"blocks.0.gamma": np.zeros(1)})
