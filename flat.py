"""Weights, gradient and optimizer state are one flat tensor each; a parameter and its .grad are views of two of them.

So a norm is one call, the optimizer walks pieces of three tensors and knows no parameters, a checkpoint of the state is one
tensor a kind, and memory is what the plan says, because nothing is scattered.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

ALIGNMENT = (
    64  # elements; every parameter begins at a multiple of it. What lies between is 0 and stays 0
)


def allocate(model: nn.Module, *, device, dtype: torch.dtype) -> None:
    """Give a model that was made on the meta device its weights: views of one tensor of zeros."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    flat = torch.zeros(_places(parameters)[-1], device=device, dtype=dtype)
    model.load_state_dict(dict(zip(names, views_of(flat, parameters), strict=True)), assign=True)


def flat_weights(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The flat tensor of which the parameters are views; they are moved into one if they are not."""
    parameters = list(parameters)
    flat = _common_tensor(parameters, parameters)
    if flat is None:
        flat = parameters[0].new_zeros(_places(parameters)[-1], requires_grad=False)
        for parameter, view in zip(parameters, views_of(flat, parameters), strict=True):
            parameter.data = view.copy_(parameter.detach())
    return flat


def flat_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The flat tensor of which every .grad is a view; gathered into one if they are not. A missing gradient counts as 0."""
    parameters = list(parameters)
    flat = _common_tensor([p.grad for p in parameters], parameters)
    if flat is None:
        flat = parameters[0].new_zeros(_places(parameters)[-1], requires_grad=False)
        for parameter, view in zip(parameters, views_of(flat, parameters), strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
    return flat


def zero_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A flat gradient of zeros, for backward passes to add to."""
    parameters = list(parameters)
    flat = parameters[0].new_zeros(_places(parameters)[-1], requires_grad=False)
    for parameter, view in zip(parameters, views_of(flat, parameters), strict=True):
        parameter.grad = view
    return flat


def views_of(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    places = _places(parameters)
    return [
        flat[start : start + p.numel()].view(p.shape)
        for start, p in zip(places, parameters, strict=False)
    ]


def norm(flat: Tensor) -> float:
    """Euclidean norm, in float64: a million squares summed in float32 are off in the fifth digit.

    A piece at a time, because a CPU casts by copying; in place, because results of their own would lie between the copies.
    """
    pieces = flat.split(2**20)
    norms = torch.empty(len(pieces), device=flat.device, dtype=torch.float64)
    for i, piece in enumerate(pieces):
        torch.linalg.vector_norm(piece, dtype=norms.dtype, out=norms[i])
    return float(torch.linalg.vector_norm(norms))


def _places(parameters: Sequence[nn.Parameter]) -> list[int]:
    """Where each parameter begins, and where all end."""
    return list(accumulate((-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters), initial=0))


def _common_tensor(tensors: list[Tensor | None], parameters: list[nn.Parameter]) -> Tensor | None:
    """The flat tensor behind `tensors`, if they are its views at the parameters' places."""
    *starts, end = _places(parameters)
    first = tensors[0]
    if first is None or first.untyped_storage().nbytes() < end * first.itemsize:
        return None
    for tensor, start in zip(tensors, starts, strict=True):
        if (
            tensor is None
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        if tensor.storage_offset() != start or not tensor.is_contiguous():
            return None
    return first.detach().as_strided((end,), (1,), 0)
