"""Rounding what is not quantized to float16, in the model: the file is smaller then, and still exact."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_xai_compress.formats.layout import has_memory, sharing
from lightning_xai_compress.plan import Skipped

__all__ = ["round_to_float16"]

_RELATIVE = 2.0**-11  # the largest error of a normal float16


@torch.no_grad()
def round_to_float16(model: nn.Module, names_to_leave: Collection[str]) -> list[Skipped]:
    """Round the floating-point parameters and buffers of a state dict to values that float16 holds exactly.

    They keep their dtypes, and no value moves by more than 2^-11 of itself: a tensor in which one would (it becomes
    infinite, zero, or subnormal with too few digits) stays as it is. Biases are added to something, so that what counts
    is their size together: no value of one moves by more than 2^-11 of its largest.

    Args:
        model: Changed in place.
        names_to_leave: Keys of the state dict that stay as they are, with all that shares their tensors.

    Returns:
        The tensors that stayed although they were not to be left, and why.
    """
    state = model.state_dict()
    own: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    skipped = []
    done: set[str] = set()
    for names in sharing(state):
        name = names[0]
        if name in done or not set(names).isdisjoint(names_to_leave) or not _is_float(state[name]):
            continue
        done.add(name)
        if name not in own or not has_memory(own[name]):
            skipped.append(Skipped(name, "no dense tensor with memory of its own: not rounded to float16"))
            continue
        values = own[name].detach()
        rounded = values.to(torch.float16).to(values.dtype)
        if torch.equal(rounded, values):
            continue
        finite = values.isfinite()
        error = (rounded.double() - values.double())[finite].abs()
        sizes = values.double()[finite].abs()
        if name.endswith("bias") and len(sizes):
            sizes = sizes.max()
        wrong = error > _RELATIVE * sizes
        if wrong.any():
            skipped.append(
                Skipped(
                    name,
                    f"{int(wrong.sum())} of {values.numel()} values are too large or too small for float16: not "
                    "rounded to it",
                )
            )
            continue
        own[name].detach().copy_(torch.where(finite, rounded, values))
    return skipped


def _is_float(tensor: object) -> bool:
    """Of a dtype that holds what float16 does not."""
    return isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64, torch.bfloat16)
