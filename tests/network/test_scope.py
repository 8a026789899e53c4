"""Which parameters match, and what is said of the others."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weightpatch.errors import InvalidInput, NonFinite, NotEditable, NothingToEdit
from weightpatch.network import Network, check_finite, explain, select


@pytest.fixture(autouse=True)
def _no_warning_unless_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_globs_in_the_models_order():
    model = zoo.TinyResNet()
    names = [name for name, _ in model.named_parameters()]
    assert select(model) == tuple(names)
    assert select(model, ["fc.*", "conv1.weight", "fc.bias"]) == ("conv1.weight", "fc.weight", "fc.bias")
    assert select(model, "layer?.1.bn[12].weight") == tuple(n for n in names if ".1.bn" in n and n.endswith("weight"))


@given(chosen=st.sets(st.sampled_from([name for name, _ in zoo.TinyResNet().named_parameters()]), min_size=1))
def test_exact_names_select_themselves(chosen: set[str]):
    assert set(select(zoo.TinyResNet(), sorted(chosen))) == chosen


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("layer2", r"layer2\.\*"), ("layr2.*", r"layer2\.\*"), ("fc.weigth", "fc.weight"), ("zzz", "the model has conv1")],
)
def test_no_match_lists_what_is_near(pattern: str, near: str):
    with pytest.raises(NothingToEdit, match=near):
        select(zoo.TinyResNet(), pattern)


def test_the_blocks_are_listed_and_models_without_parameters_say_so():
    with pytest.raises(NothingToEdit, match=r"conv1\.\*, bn1\.\*, layer1\.\*, layer2\.\*, fc\.\*"):
        select(zoo.TinyResNet(), "zzz")
    with pytest.raises(NothingToEdit, match="ReLU has no parameters"):
        select(nn.ReLU())


@pytest.mark.parametrize("patterns", [[], "", [3]])
def test_patterns_of_another_kind(patterns: object):
    with pytest.raises(InvalidInput):
        select(zoo.TinyResNet(), patterns)  # type: ignore[arg-type]


def test_tied_parameters_go_by_their_first_name():
    model = zoo.Tied()
    for pattern in ("head.*", "embed.weight"):
        with pytest.warns(UserWarning, match=r"embed\.weight and head\.weight.* both places change"):
            assert select(model, pattern) == ("embed.weight",)
    assert select(model) == ("embed.weight", "hidden.weight", "hidden.bias")
    assert next(row for row in explain(model) if row.name == "embed.weight").reason == "tied with head.weight"


def test_frozen_parameters():
    model = zoo.mlp()
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"2 parameters stay as they are: 0\.weight is frozen"):
        assert select(model) == ("3.weight", "3.bias")
    with pytest.raises(NotEditable, match=r"0\.bias is frozen"):
        select(model, "0.*")
    deployed = zoo.mlp().requires_grad_(False)
    assert select(deployed, "0.*") == ("0.weight", "0.bias")


def test_dtypes_that_are_not_edited():
    model = nn.Module()
    model.counts = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    model.waves = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.weight = nn.Parameter(torch.ones(2))
    for name, reason in (("counts", "int64"), ("waves", "complex")):
        with pytest.raises(NotEditable, match=reason):
            select(model, name)
    with pytest.warns(UserWarning, match="2 parameters stay as they are"):
        assert select(model) == ("weight",)
    assert [row.editable for row in explain(model)] == [False, False, True]


def test_quantised_modules():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(NotEditable, match="packed in a quantised Linear"):
        select(quantised, "1.*")
    assert [(row.name, row.editable) for row in explain(quantised)] == [("0.weight", True), ("1.weight", False)]


def test_parameters_that_share_memory_without_being_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(NotEditable, match=r"shares its memory with 0\.weight"):
        select(model, "1.weight")


def test_renormalised_embeddings():
    with pytest.raises(NotEditable, match="max_norm"):
        select(nn.Embedding(3, 3, max_norm=1.0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_that_are_not_finite(bad: float, dtype: torch.dtype):
    model = zoo.TinyResNet().to(dtype)
    check_finite(model)
    with torch.no_grad():
        model.layer1[1].conv2.weight[0, 0, 0, 0] = bad
    with pytest.raises(NonFinite, match=r"layer1\.1\.conv2\.weight of the model holds 1 value"):
        check_finite(model)


def test_large_half_precision_weights_are_finite():
    check_finite(nn.Linear(300, 300).half().apply(lambda m: m.weight.data.fill_(6e4)))


def test_buffers_may_mask_but_not_be_broken():
    model = zoo.TinyResNet()
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    check_finite(model)
    model.bn1.running_var[0] = torch.nan
    with pytest.raises(NonFinite, match=r"buffer bn1\.running_var"):
        check_finite(model)


def test_a_network_says_which_parameters_it_was_given():
    network = Network(zoo.mlp(), "3.*")
    assert repr(network) == "Network(2 free parameters: 3.weight, 3.bias)"
    assert network.device == torch.device("cpu")
    assert network.first_weight[0] == "0.weight"


def test_choosing_is_quick():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(500)))
    begun = time.perf_counter()
    select(model, "49?.*")
    assert time.perf_counter() - begun < 2.0
