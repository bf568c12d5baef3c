"""From a model and its plan to what a packed file holds: keys, integer codes, and the numbers that stay numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_xai_compress.errors import ArtifactError
from lightning_xai_compress.formats import entropy
from lightning_xai_compress.formats.codes import integer_codes
from lightning_xai_compress.formats.container import Bytes
from lightning_xai_compress.formats.layout import (
    BITMAP,
    CODE_DTYPES,
    CODES,
    DTYPES,
    HALF_DTYPES,
    RAW,
    Entry,
    fit_name,
    is_plain,
    raw_bytes,
    sharing,
)
from lightning_xai_compress.formats.registry import check_plan
from lightning_xai_compress.plan import CompressionPlan

__all__ = ["Parts", "split"]


@dataclass(frozen=True)
class Parts:
    """What goes into a file.

    Args:
        entries: The keys of the state dict, in its order.
        blocks: What goes into the stream, in the order of the entries that are coded.
        numbers: What goes into the rest by name, uint8 of shape [numbers, bytes of a number].
    """

    entries: list[Entry]
    blocks: list[entropy.Block]
    numbers: dict[str, Bytes]

    @property
    def coded(self) -> list[Entry]:
        """The entries of the blocks."""
        return [entry for entry in self.entries if entry.alias is None and entry.kind != RAW]


def split(model: nn.Module, plan: CompressionPlan) -> Parts:
    """Split a model into what a packed file holds; tied tensors once.

    Raises:
        ArtifactError: Model and plan do not fit each other, or the state dict holds what no packed file can.
    """
    state = model.state_dict()
    quantized = plan.allocation.bits if plan.allocation else {}
    check_plan(model, plan)
    _check_names(state)
    parts = Parts([], [], {})
    position: dict[str, int] = {}
    for key, names in zip(state, sharing(state), strict=True):
        if names[0] in position:
            parts.entries.append(Entry(key, alias=position[names[0]]))
            continue
        position[key] = len(parts.entries)
        weight = _dense(key, state[key])
        for name in names:
            if name in plan.mask.keep:
                _check_mask(name, weight, plan.mask[name])
        planned = next((name for name in names if name in quantized), None)
        shape = tuple(weight.shape)
        if planned is not None and weight.numel():
            codebook = plan.codebooks.get(planned)
            parts.blocks.append(_codes(planned, weight, quantized[planned], plan.scales[planned], codebook))
            groups = len(quantized[planned]) // len(weight)
            shared = () if codebook is None else tuple(map(tuple, codebook.tolist()))
            parts.entries.append(Entry(key, weight.dtype, shape, CODES, groups=groups, codebooks=shared))
            continue
        kind, numbers = RAW, weight.reshape(-1)
        if any(name in plan.mask.keep for name in names) and weight.dim():
            marked = weight != 0
            if 8 * weight.element_size() * int((~marked).sum()) > weight.numel():
                kind, numbers = BITMAP, numbers[marked.reshape(-1)]
                rows = np.full(len(weight), entropy.BITMAP, np.uint8)
                parts.blocks.append(entropy.Block(marked.reshape(len(weight), -1).to(torch.int8).numpy(), rows))
        half = _as_half(numbers)
        parts.entries.append(Entry(key, weight.dtype, shape, kind, half=half is not None))
        parts.numbers[key] = raw_bytes(numbers if half is None else half)
    return parts


def _check_names(state: dict[str, Tensor]) -> None:
    wrong = next((name for name in state if not fit_name(name)), None)
    if wrong is not None:
        raise ArtifactError(
            f"expected names of at most 1024 characters, no part between dots empty, without /, \\ and control "
            f"characters, got {wrong[:60]!r}; rename that module, parameter or buffer"
        )


def _as_half(numbers: Tensor) -> Tensor | None:
    """Give numbers as float16 if that takes less room and holds every one bit for bit.

    NaN stays as it is: machines differ in what they make of its payload.
    """
    if numbers.dtype not in HALF_DTYPES or not numbers.numel():
        return None
    half = numbers.to(torch.float16)
    # NaN equals nothing, and both formats have signed zeros.
    return half if torch.equal(half.to(numbers.dtype), numbers) else None


def _codes(name: str, weight: Tensor, bits: Tensor, scale: Tensor, codebook: Tensor | None) -> entropy.Block:
    """Recover the integers of a quantized weight, and prove that they give it back."""
    if weight.dtype not in CODE_DTYPES:
        raise ArtifactError(f"{name}: expected a floating-point weight for the plan's bit widths, got {weight.dtype}")
    step = scale.detach().cpu().float() + 0.0  # no negative zero
    coarse = step.to(torch.bfloat16)
    if not (torch.equal(coarse.float(), step) and bool(torch.isfinite(step).all()) and bool((step >= 0).all())):
        raise ArtifactError(
            f"{name}: expected scales >= 0 that bfloat16 holds exactly; round them with "
            "scale.to(torch.bfloat16).float() before the weights are quantized"
        )
    if codebook is not None and not torch.equal(codebook.to(torch.bfloat16).float(), codebook.float()):
        raise ArtifactError(f"{name}: expected a codebook of values that bfloat16 holds exactly; round them to it")
    codes = integer_codes(name, weight, step, bits, codebook).reshape(len(bits), -1)
    pattern = coarse.view(torch.int16).numpy().view(np.uint16)
    return entropy.Block(codes.numpy(), bits.detach().cpu().to(torch.uint8).numpy(), pattern)


def _check_mask(name: str, weight: Tensor, keep: Tensor) -> None:
    if keep.shape != weight.shape:
        raise ArtifactError(
            f"{name}: expected a mask of shape {tuple(weight.shape)}, got {tuple(keep.shape)}; "
            "save the model that the plan is of"
        )
    wrong = int((weight[~keep.cpu()] != 0).sum())
    if wrong:
        raise ArtifactError(
            f"{name}: expected zeros where the mask prunes, got {wrong} other weights; "
            "write the masked values into the model, then save it"
        )


def _dense(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ArtifactError(
            f"{name}: expected a tensor in the state dict, got {type(tensor).__name__}; "
            "a packed file holds tensors alone: keep extra state elsewhere and return none from get_extra_state"
        )
    if not is_plain(tensor):
        raise ArtifactError(
            f"{name}: expected a plain tensor, got a {type(tensor.data).__name__}; load the model without "
            "integers=True, and save that"
        )
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES.values():
        raise ArtifactError(
            f"{name}: expected a dense tensor with values, got {tensor.dtype}, {tensor.layout} on {tensor.device}; "
            "convert it before saving"
        )
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
