"""Weights and gradient are one flat tensor each; parameters and their .grad are views of them.

With flat tensors, a norm is one call, the optimizer works on slices and never looks at single
parameters, ranks shard by slicing, and a checkpoint holds one tensor for each kind of state.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # in elements: each parameter starts at a multiple of it; the gaps stay 0


def allocate(model: nn.Module, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Allocate the weights of a model built on the meta device: zeros in one flat tensor."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    flat = torch.zeros(_offsets(parameters)[-1], device=device, dtype=dtype)
    views = _views(flat, parameters)
    model.load_state_dict(dict(zip(names, views, strict=True)), assign=True)


def flatten(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Make the parameters views of one flat tensor, unless they are already, and return it."""
    parameters = list(parameters)
    flat = _shared_tensor(parameters, parameters)
    if flat is None:
        flat = parameters[0].new_zeros(_offsets(parameters)[-1], requires_grad=False)
        for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
            parameter.data = view.copy_(parameter.detach())
    return flat


def are_views(parameters: Iterable[nn.Parameter], flat: Tensor) -> bool:
    """Whether the parameters are still views of this flat tensor, as flatten() left them."""
    parameters = list(parameters)
    shared = _shared_tensor(parameters, parameters)
    return shared is not None and shared.data_ptr() == flat.data_ptr()


def zero_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Set every .grad to zeros, all of them views of one flat tensor, and return that tensor."""
    parameters = list(parameters)
    flat = parameters[0].new_zeros(_offsets(parameters)[-1], requires_grad=False)
    for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
        parameter.grad = view
    return flat


def gather_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the flat tensor that every .grad is a view of; if there is none, copy them into one.

    A missing .grad counts as 0.
    """
    parameters = list(parameters)
    flat = _shared_tensor([p.grad for p in parameters], parameters)
    if flat is None:
        flat = parameters[0].new_zeros(_offsets(parameters)[-1], requires_grad=False)
        for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
    return flat


def norm(flat: Tensor) -> float:
    """Euclidean norm, accumulated in float64: in float32, a million squares lose the fifth digit.

    It works in pieces, because on a CPU vector_norm makes a float64 copy of its argument.
    """
    pieces = flat.split(2**20)
    norms = torch.empty(len(pieces), device=flat.device, dtype=torch.float64)
    for i, piece in enumerate(pieces):
        torch.linalg.vector_norm(piece, dtype=norms.dtype, out=norms[i])
    return float(torch.linalg.vector_norm(norms))


def _offsets(parameters: Sequence[nn.Parameter]) -> list[int]:
    """Where each parameter starts, and where the flat tensor ends."""
    sizes = (-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters)
    return list(accumulate(sizes, initial=0))


def _views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    starts = _offsets(parameters)[:-1]
    pairs = zip(starts, parameters, strict=True)
    return [flat[start : start + p.numel()].view(p.shape) for start, p in pairs]


def _shared_tensor(
    tensors: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]
) -> Tensor | None:
    """The flat tensor that all of `tensors` are views of, at the parameters' offsets, or None."""
    *starts, end = _offsets(parameters)
    first = tensors[0]
    if first is None or first.untyped_storage().nbytes() < end * first.itemsize:
        return None
    for tensor, start in zip(tensors, starts, strict=True):
        if tensor is None or not tensor.is_contiguous() or tensor.storage_offset() != start:
            return None
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
    return first.detach().as_strided((end,), (1,), 0)
