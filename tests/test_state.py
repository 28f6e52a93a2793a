"""The file format: plain values in, the same values out, nothing else."""

from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import transform_to

from pyro_sinkhorn import state


def complete(**content):
    """A state with every key that a file must have."""
    return dict.fromkeys(state.KEYS) | {"format": state.FORMAT, "version": state.VERSION} | content


def round_trip(value, path):
    state.write(complete(params=value), path)
    return state.read(path)["params"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        float("inf"),
        "text",
        b"bytes",
        (1, (2.0, "x")),
        [1, [2, {}]],
        {"a": {"b": (1, None)}, 3: 4},
        Counter([1, 1, 2]),
        {"constraint": 1, "attributes": 2},
        {"__constraint__": 1},
    ],
    ids=repr,
)
def test_plain_values_come_back_as_they_were(tmp_path, value):
    found = round_trip(value, tmp_path / "a.pt")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.float64(0.5), 0.5), (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), True)],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_numpy_become_pythons(tmp_path, value, expected):
    found = round_trip({"a": [value]}, tmp_path / "a.pt")["a"][0]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
)
def test_tensors_come_back_with_dtype_and_shape(tmp_path, dtype):
    value = {"full": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.zeros(0, 2, dtype=dtype)}
    value["scalar"] = value["full"][1, 1].clone()
    found = round_trip(value, tmp_path / "a.pt")
    assert all(
        found[k].equal(v) and found[k].dtype == dtype and found[k].shape == v.shape for k, v in value.items()
    )


def test_an_ordered_dictionary_keeps_its_order(tmp_path):
    value = OrderedDict([("b", 1), ("a", 2)])
    assert list(round_trip(value, tmp_path / "a.pt").items()) == list(value.items())


ALL = {
    name: value
    for name, value in vars(constraints).items()
    if isinstance(value, constraints.Constraint) and not constraints.is_dependent(value)
}


@pytest.mark.parametrize("name", ALL)
def test_every_constraint_of_pyro_is_found_again_by_name(tmp_path, name):
    assert round_trip(ALL[name], tmp_path / "a.pt") is ALL[name]


@pytest.mark.parametrize(
    "constraint",
    [
        constraints.greater_than(2.0),
        constraints.interval(-1.0, 2.0),
        constraints.interval(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 3.0])),
        constraints.independent(constraints.independent(constraints.greater_than(1.0), 1), 1),
        constraints.cat([constraints.positive, constraints.interval(0.0, 2.0)], -1, [1, 1]),
        constraints.stack([constraints.positive, constraints.less_than(2.0)], -1),
    ],
    ids=str,
)
def test_constraints_with_arguments_map_as_before(tmp_path, constraint):
    found = round_trip({"value": torch.zeros(2, 2), "constraint": constraint}, tmp_path / "a.pt")[
        "constraint"
    ]
    raw = torch.randn(2, 2)
    assert type(found) is type(constraint)
    torch.testing.assert_close(transform_to(found)(raw), transform_to(constraint)(raw))


def test_an_integer_constraint_that_has_no_name(tmp_path):
    found = round_trip(type(constraints.positive_integer)(5), tmp_path / "a.pt")
    assert found.lower_bound == 5 and not bool(found.check(torch.tensor(4)))


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, lambda: 0, torch.nn.Linear(1, 1), np.zeros(3)],
    ids=["object", "set", "function", "module", "array"],
)
def test_other_values_are_refused_and_leave_no_file(tmp_path, value):
    with pytest.raises(ValueError, match=r"the state\['params'\]\['a'\]\[1\] cannot be saved: it is a "):
        round_trip({"a": [0, value]}, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_constraint_is_refused(tmp_path):
    packed = {"__constraint__": "Tensor", "attributes": {}}
    torch.save(complete(params=packed), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="'Tensor' is not a constraint"):
        state.read(tmp_path / "a.pt")


def test_writing_changes_nothing_in_memory(tmp_path):
    value = {"constraint": constraints.greater_than(2.0), "number": np.float64(1.0)}
    state.write(complete(params=value), tmp_path / "a.pt")
    assert isinstance(value["constraint"], constraints.Constraint) and isinstance(value["number"], np.float64)


def test_detached_copies_have_no_graph_and_no_storage_in_common():
    leaf = torch.ones(2, requires_grad=True)
    value = {"a": [leaf * 2, (leaf,)], "b": 3}
    copied = state.detached(value)
    assert not copied["a"][0].requires_grad and not copied["a"][1][0].requires_grad
    assert copied["a"][1][0].equal(leaf) and copied["a"][1][0].data_ptr() != leaf.data_ptr()
    assert isinstance(copied["a"][1], tuple) and copied["b"] == 3
