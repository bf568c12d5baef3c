"""What modules say about the sizes of their tensors, for models that are made smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["Attention", "attention_of", "restoring", "sizes_fitted"]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_WIDTHS = ("all_head_size", "inner_dim", "attn_dim")  # heads times their size
_SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_parameters"),
    *(*_HEADS, *_WIDTHS),
)
_SEPARATE = (
    *(("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v")),
    *(("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin"), ("linear_q", "linear_k", "linear_v")),
)
_FUSED = ("qkv", "qkv_proj", "to_qkv", "in_proj", "query_key_value")


@dataclass(frozen=True)
class Attention:
    """Attention that is written out in Linear layers, which its module holds.

    Args:
        makers: Their names: of queries, keys and values, or one of all three, in this order.
        reader: Of the one that reads what all heads give.
        heads: Their number.
        size: Of a head.
    """

    makers: tuple[str, ...]
    reader: str
    heads: int
    size: int


def attention_of(module: nn.Module) -> Attention | None:
    """The parts of an attention module that says how many heads it has, and whose layers have the usual names.

    `nn.MultiheadAttention` is none: its heads always fill the width of the model.
    """
    heads = next((module.__dict__[name] for name in _HEADS if isinstance(module.__dict__.get(name), int)), 0)
    if heads < 1:
        return None
    linear = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for names in (*_SEPARATE, *((each,) for each in _FUSED)):
        if not set(names) <= linear.keys():
            continue
        width = linear[names[0]].out_features // (3 if len(names) == 1 else 1)
        alike = all(linear[name].out_features == linear[names[0]].out_features for name in names)
        readers = [name for name, each in linear.items() if name not in names and each.in_features == width]
        if alike and width % heads == 0 and len(readers) == 1:
            return Attention(names, readers[0], heads, width // heads)
    return None


@contextmanager
def restoring(model: nn.Module, *, always: bool) -> Iterator[None]:
    """Give a model its tensors and sizes back: always, or where an error is raised inside."""
    held = [(module, dict(module._parameters), dict(module._buffers), _sizes_of(module)) for module in model.modules()]
    done = False
    try:
        yield
        done = True
    finally:
        for module, parameters, buffers, sizes in held if always or not done else ():
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            for name, size in sizes.items():
                setattr(module, name, size)


@contextmanager
def sizes_fitted(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Let layers of which tensors are made smaller inside say their sizes afterwards, and attention its heads.

    Yields:
        A set for those layers: Linear, convolutions, BatchNorm, PReLU.
    """
    changed: set[nn.Module] = set()
    attention = [(module, found) for module in model.modules() if (found := attention_of(module)) is not None]
    yield changed
    for module in changed:
        _fit(module)
    for module, found in attention:
        maker = module.get_submodule(found.makers[0])
        assert isinstance(maker, nn.Linear)
        heads = maker.out_features // (found.size * (3 if len(found.makers) == 1 else 1))
        for name in (*_HEADS, *_WIDTHS):
            if isinstance(module.__dict__.get(name), int):
                setattr(module, name, module.__dict__[name] * heads // found.heads)


def _sizes_of(module: nn.Module) -> dict[str, int]:
    return {name: module.__dict__[name] for name in _SIZES if isinstance(module.__dict__.get(name), int)}


def _fit(module: nn.Module) -> None:
    """A convolution keeps its number of groups, unless each channel is one."""
    weight = getattr(module, "weight", None)
    if isinstance(module, _ConvNd):
        assert isinstance(weight, Tensor)
        transposed = isinstance(module, _ConvTransposeNd)
        if module.groups > 1 and module.groups == module.in_channels:
            inputs = weight.shape[0] if transposed else weight.shape[0] * module.in_channels // module.out_channels
            module.groups = inputs
        module.in_channels = weight.shape[0] if transposed else weight.shape[1] * module.groups
        module.out_channels = weight.shape[1] * module.groups if transposed else weight.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        module.num_features = len(next(each for each in (weight, module.running_mean) if isinstance(each, Tensor)))
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
