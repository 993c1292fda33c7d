import json
import math
import random
import struct
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from headway.resilience.state import flatten, unflatten


def through_json(state):
    flat = flatten(state)
    return unflatten(json.loads(json.dumps(flat.skeleton, allow_nan=False)), flat.tensors.__getitem__)


def test_tensors_get_their_dotted_path_as_name():
    optimizer = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": torch.ones(())}]}
    flat = flatten({"model": {"layers.0.weight": torch.ones(1)}, "optimizer": optimizer})
    assert list(flat.tensors) == [
        "model.layers.0.weight",
        "optimizer.state.0.exp_avg",
        "optimizer.param_groups.0.lr",
    ]


def test_two_paths_with_one_dotted_name_stay_two_tensors():
    first, second, third = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    restored = through_json({"a.b": first, "a": {"b": second, "b~": third}})
    assert restored["a.b"] is not restored["a"]["b"]
    assert (restored["a.b"], restored["a"]["b"], restored["a"]["b~"]) == (first, second, third)


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 5e-324, 0.1, 1.7976931348623157e308])
def test_floats_keep_every_bit(value):
    assert struct.pack(">d", through_json(value)) == struct.pack(">d", value)


def test_nan_keeps_its_payload():
    value = struct.unpack(">d", bytes.fromhex("fff8000000abcdef"))[0]
    assert struct.pack(">d", through_json(value)).hex() == "fff8000000abcdef"


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63), 2**63, -(2**64), True, False, None, ""])
def test_whole_numbers_of_any_size_bools_none_and_text_are_themselves(value):
    restored = through_json(value)
    assert restored == value
    assert type(restored) is type(value)


def test_a_whole_number_beyond_the_limit_on_decimal_digits_is_itself():
    assert through_json(1 << 20_000) == 1 << 20_000


def test_int_keys_stay_apart_from_the_same_digits_as_text():
    assert through_json({0: "int", "0": "str", "items": {}}) == {0: "int", "0": "str", "items": {}}


def test_a_dict_that_looks_like_a_tag_is_a_dict():
    state = {"tensor": "model.w", "x": {"tuple": [1]}, "y": {"float": "7ff0000000000000"}, "z": {"dict": {"int": "1"}}}
    assert through_json(state) == state


def test_order_of_keys_is_kept():
    assert list(through_json({"b": 1, "a": 2, 3: 3})) == ["b", "a", 3]


def test_other_mappings_come_back_as_dicts():
    restored = through_json(OrderedDict(a=OrderedDict(b=1)))
    assert type(restored) is dict
    assert type(restored["a"]) is dict


Pair = namedtuple("Pair", "a b")


def draw():
    return 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"optimizer": {"param_groups": [{"alpha": lambda: 0}]}},
            r"^optimizer\.param_groups\[0\]\.alpha is a function; ",
        ),
        ({"schedule": {"lr": np.float64(0.1)}}, r"^schedule\.lr is a numpy\.float64; "),
        ({"a": (1, {2, 3})}, r"^a\[1\] is a set; "),
        ({"a": [b"raw"]}, r"^a\[0\] is a bytes; "),
        ({"a": Pair(1, 2)}, r"^a is a (tests\.resilience\.)?test_state\.Pair; "),
        ({"a": {3: {(1, 2): 0}}}, r"^a\.3 has the key \(1, 2\); keys must be str or int"),
        ({"a": {True: 0}}, r"^a has the key True; "),
        ({"a": torch.eye(2).to_sparse()}, r"^a is a sparse_coo tensor; "),
        ({"a": torch.empty(2, device="meta")}, r"^a is a meta tensor; "),
        (random.Random, r"^the state is a type; "),
    ],
)
def test_anything_else_is_refused_by_its_path(state, message):
    with pytest.raises(TypeError, match=message):
        flatten(state)


@pytest.mark.parametrize("skeleton", [{"pickle": "x"}, {}, {"tuple": [], "dict": {}}])
def test_an_unknown_tag_in_a_skeleton_is_refused(skeleton):
    with pytest.raises(ValueError, match="not a part of a skeleton"):
        unflatten(skeleton, lambda name: torch.ones(1))
