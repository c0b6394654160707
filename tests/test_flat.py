"""Flat tensors: the parameters and gradients are views of them and keep their values."""

import math

import pytest
import torch
from helpers import random_model, random_tokens
from torch import nn

from flat import ALIGNMENT, _views, allocate, flatten, gather_gradient, norm, zero_gradient
from qwen2_model import Transformer

SHAPES = [(7, 11), (13,), (64,), (3, 5, 2)]
SIZE = 128 + 64 + 64 + 64


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flatten_keeps_the_values_and_shares_one_tensor(dtype):
    # Catches: `.copy_(parameter.detach())` dropped; offsets that do not grow.
    ours, wanted = parameters(dtype), parameters(dtype)
    flat = flatten(ours)
    assert flat.shape == (SIZE,)
    for p, w in zip(ours, wanted, strict=True):
        assert torch.equal(p, w)
        assert p.data_ptr() % (ALIGNMENT * p.itemsize) == flat.data_ptr() % (ALIGNMENT * p.itemsize)
    assert norm(flat) == pytest.approx(
        math.sqrt(sum(w.detach().double().square().sum().item() for w in wanted)), rel=1e-5
    )
    flat.zero_()
    assert not any(p.any() for p in ours)
    assert not flat.requires_grad


def test_flattening_twice_moves_nothing():
    # Catches: _shared_tensor that always returns None, so that every call copies the model.
    ours = parameters()
    first = flatten(ours)
    assert flatten(ours).data_ptr() == first.data_ptr() == ours[0].data_ptr()


@pytest.mark.parametrize("change", ["order", "other storage", "not contiguous"])
def test_parameters_that_only_look_flat_are_flattened_again(change):
    # Catches: any comparison in _shared_tensor dropped.
    ours = parameters()
    old = flatten(ours)
    if change == "order":
        ours[1], ours[2] = ours[2], ours[1]
    elif change == "other storage":
        ours[2].data = ours[2].detach().clone()
    else:
        ours[0].data = ours[0].detach().t()
    wanted = [p.detach().clone() for p in ours]
    assert flatten(ours).data_ptr() != old.data_ptr()
    for p, w in zip(ours, wanted, strict=True):
        assert torch.equal(p, w)


def test_autograd_adds_to_the_flat_gradient_and_other_gradients_are_copied():
    # Catches: autograd replacing the views by new tensors; a missing gradient read from a
    # neighbour.
    ours = parameters()
    flat = zero_gradient(ours)
    for _ in range(2):
        sum((i + 1) * p.sum() for i, p in enumerate(ours)).backward()
    assert gather_gradient(ours).data_ptr() == flat.data_ptr()
    assert [v.unique().tolist() for v in _views(flat, ours)] == [[2.0], [4.0], [6.0], [8.0]]
    ours[0].grad, ours[1].grad = torch.full((11, 7), 3.0).t(), None
    gathered = gather_gradient(ours)
    assert gathered.data_ptr() != flat.data_ptr()
    assert [v.unique().tolist() for v in _views(gathered, ours)] == [[3.0], [0.0], [6.0], [8.0]]


def test_a_model_built_on_meta_computes_the_same_with_flat_weights():
    # Catches: a view at the offset of another parameter.
    wanted = random_model()
    with torch.device("meta"):
        model = Transformer(wanted.config)
    allocate(model, device="cpu", dtype=torch.float32)
    model.load_state_dict(wanted.state_dict())
    assert (
        model.head_weight_VE.untyped_storage().data_ptr()
        == model.model.norm.weight.untyped_storage().data_ptr()
    )
    tokens_BT = random_tokens(2, 7)
    assert torch.equal(model(tokens_BT), wanted(tokens_BT))


def test_the_norm_is_accumulated_in_float64_over_all_pieces():
    # Catches: accumulation in bf16 or float32; the last piece left out.
    flat = torch.randn(2**22 + 77, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert norm(flat) == pytest.approx(math.sqrt(flat.double().square().sum().item()), rel=1e-9)
    flat[-1] = math.nan
    assert math.isnan(norm(flat))
