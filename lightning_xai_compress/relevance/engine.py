"""Per-weight Layer-wise Relevance Propagation (LRP-epsilon) in the gradient domain.

LRP passes relevance R back from an output. Written as c = R / activation, LRP-epsilon of a linear map
z = w x + b (Bach et al. 2015, eq. 58; Montavon et al. 2019, sec. 10.2.2) becomes c_z <- c_z |z| / (|z| + epsilon)
followed by the ordinary backward pass: R_x = x c_x, and the share of one weight is R_w = w times the weight gradient.
ReLU-like functions, pooling, sums, concatenation and BatchNorm in evaluation mode need nothing at all; GELU, SiLU,
Mish, ELU, Hardswish, ReLU6 and tanh pass the secant f(z) / z instead of the slope. All else (sigmoid gates, LayerNorm,
softmax) passes its ordinary gradient. A `TorchFunctionMode` puts this into an ordinary
`torch.autograd.grad` over detached parameters, so that nothing of the model is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.overrides import TorchFunctionMode

from lightning_xai_compress.errors import NonFiniteError, RelevanceError
from lightning_xai_compress.layers import find_layers, tensor_places
from lightning_xai_compress.plan import ScoreMap
from lightning_xai_compress.relevance.explain import Explain, explained_tensor

__all__ = ["evaluation", "score"]

_CONVOLUTIONS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    F.conv1d: conv1d_weight,
    F.conv2d: conv2d_weight,
    F.conv3d: conv3d_weight,
}
_SECANT = (F.gelu, F.silu, F.mish, F.elu, F.hardswish, F.hardtanh, F.relu6, torch.tanh, Tensor.tanh, F.tanh)
_INPLACE_ONLY = (F.silu, F.mish, F.hardswish, F.relu6)


def score(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    explain: Explain = "margin",
    epsilon: float = 1e-6,
    on_batch: Callable[[], None] | None = None,
) -> ScoreMap:
    """Score every weight by its relevance for the model's decisions.

    Runs in evaluation mode and float32 with autocast off, whatever the caller's context, and leaves parameters,
    gradients, buffers, training flags and random state as they were.

    Relevance is summed over positions and averaged over samples. The ranking score is Q |w'| where Q is the root of
    the mean over samples of the sum of r^2 over positions, and w' the weight with a directly following BatchNorm
    folded in (rescaling a weight in front of a BatchNorm changes nothing, and so must not change its rank).

    Args:
        model: Any module; its `relevance_step(batch, batch_idx)`, where it has one, says what is explained.
        batches: Batches on the model's device, `(input, target)` or what `explain.split_batch` understands.
        layers: Parameter names to score; all compressible ones by default.
        explain: "margin" (true class against the others) or "logit" (true class).
        epsilon: Stabiliser of LRP-epsilon, >= 0.
        on_batch: Called after each batch, for a progress bar.

    Returns:
        Scores in float32. A layer that the explained tensor does not depend on through an ordinary Linear or
        convolution call is unknown: all its values are NaN.

    Raises:
        ValueError: `epsilon` is negative, or `explain` is no such choice.
        RelevanceError: No batches, a batch that is not understood, or an explained tensor that depends on no layer.
        NonFiniteError: Values that are not finite; names layer and batch.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon}")
    if explain not in ("margin", "logit"):
        raise ValueError(f"explain must be 'margin' or 'logit', got {explain!r}")
    names = tuple(layers) if layers is not None else find_layers(model).names
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),  # the mode below would be compiled, too, again and again
        torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type),
        evaluation(model),
    ):
        leaves = {
            name: parameter.detach().clone() if parameter.is_inference() else parameter.detach()
            for name, parameter in model.named_parameters()
        }
        leaves = {name: _to_float(leaf).requires_grad_(leaf.is_floating_point()) for name, leaf in leaves.items()}
        # clones, so that a forward pass that writes to its buffers writes to ours
        buffers = {name: _to_float(buffer.detach()).clone() for name, buffer in model.named_buffers()}
        sums = _Sums({name: leaves[name] for name in names}, epsilon)
        explainable = _Explainable(model)
        replaced = leaves | buffers
        tensors = {f"model.{place}": replaced[name] for place, name in tensor_places(model).items()}
        for index, batch in enumerate(batches):
            sums.batch = index
            with sums:
                explained, samples = torch.func.functional_call(
                    explainable, tensors, (_to_autograd(batch), index, explain), tie_weights=False
                )
                sums.add(explained, samples)
            if on_batch is not None:
                on_batch()
    return sums.score_map()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules; afterwards each has its own flag back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class _Explainable(nn.Module):
    """Makes `explained_tensor` a forward, which is what `functional_call` can call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = False
        self.model = model

    def forward(self, batch: Any, batch_idx: int, explain: Explain) -> tuple[Tensor, int]:
        return explained_tensor(self.model, batch, batch_idx, explain)


class _Secant(torch.autograd.Function):
    """y = f(z) whose backward passes f(z) / z: the share of a neuron that has one input."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        y = function(z)
        ctx.save_for_backward(z, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        z, y = ctx.saved_tensors
        return gradients[0] * torch.where(z == 0, 0.5, y / torch.where(z == 0, 1.0, z)), None


class _Sums(TorchFunctionMode):
    """Intercepts the layers of one pass and streams the statistics of their weights over batches."""

    def __init__(self, weights: Mapping[str, Tensor], epsilon: float) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.epsilon = epsilon
        self.samples = 0
        self.batch = 0
        self._name = {id(weight): name for name, weight in weights.items()}
        self._gradient = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        self._square = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
        self._folded: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._outputs: dict[int, tuple[Tensor, str]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func in _CONVOLUTIONS:
            return self._layer(func, *args, **kwargs)
        if func in _SECANT:
            return self._secant(func, *args, **kwargs)
        if func is F.batch_norm:
            self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _layer(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        z: Tensor = func(input, weight, bias, *args, **kwargs)
        name = self._name.get(id(weight))
        if not z.requires_grad:
            return z
        # what the hook holds must not lead back to the graph that holds the hook: that would never be freed
        kept, plain = input.detach(), z.detach()

        def backward(gradient: Tensor) -> Tensor:
            if self.epsilon:
                magnitude = plain.abs()
                gradient = gradient * magnitude.div_(magnitude + self.epsilon)
            if name is not None:
                self._seen.add(name)
                self._square[name].add_(_squares(func, kept, weight, gradient, *args, **kwargs))
            return gradient

        z.register_hook(backward)
        # what follows may write in place (nn.ReLU(inplace=True)); the rule needs z as it was
        output = z.clone() if self.epsilon else z
        if name is not None and (func is not F.linear or z.dim() == 2):  # channels of z are the rows of the weight
            self._outputs[id(output)] = (output, name)
        return output

    def _secant(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("inplace", None)
        if func in _INPLACE_ONLY:  # their only further argument
            args = ()
        elif func is F.elu:
            args = args[:1]
        elif func is F.hardtanh:
            args = args[:2]
        passed: Tensor = _Secant.apply(input, lambda z: func(z, *args, **kwargs))
        return passed

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        output, name = self._outputs.get(id(input), (None, ""))
        if output is input and running_var is not None and not training:
            factor = (running_var.detach() + eps).rsqrt()
            self._folded[name] = factor if weight is None else factor * weight.detach().abs()

    def add(self, explained: Tensor, samples: int) -> None:
        """Pass the relevance of one batch back and add it up."""
        if not explained.requires_grad:
            raise RelevanceError(
                f"batch {self.batch}: the explained tensor does not depend on any weight "
                "(is it detached, or computed under no_grad?)"
            )
        total = explained.sum()
        if not torch.isfinite(total):
            raise NonFiniteError(f"batch {self.batch}: what is explained is not finite ({total.item()})")
        gradients = torch.autograd.grad(total, list(self.weights.values()), allow_unused=True)
        for accumulated, gradient in zip(self._gradient.values(), gradients, strict=True):
            if gradient is not None:
                accumulated.add_(gradient)
        self._outputs.clear()
        self.samples += samples

    def score_map(self) -> ScoreMap:
        if not self.samples:
            raise RelevanceError("there was no sample to score: expected at least one batch")
        scores, relevance, sensitivity = {}, {}, {}
        for name, leaf in self.weights.items():
            weight = leaf.detach()
            if name not in self._seen:
                scores[name] = relevance[name] = sensitivity[name] = torch.full_like(weight, torch.nan)
                continue
            relevance[name] = weight * self._gradient[name] / self.samples
            sensitivity[name] = self._square[name] / self.samples
            folded = weight.abs()
            if name in self._folded:
                folded = folded * self._folded[name].reshape(-1, *[1] * (weight.dim() - 1))
            scores[name] = weight.abs() * sensitivity[name].sqrt() * folded
            for label, tensor in (("relevance", relevance[name]), ("score", scores[name])):
                if not torch.isfinite(tensor).all():
                    raise NonFiniteError(f"{label} of {name} is not finite after {self.batch + 1} batches")
        if not self._seen:
            raise RelevanceError(
                "the explained tensor depends on none of the layers to score: expected it to be computed from "
                f"{', '.join(list(self.weights)[:4])}"
            )
        return ScoreMap(scores, relevance, sensitivity, self.samples)


def _squares(func: Any, input: Tensor, weight: Tensor, gradient: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Sum over samples and positions of (x c)^2: the weight gradient of the squared parts."""
    if func is F.linear:
        return gradient.reshape(-1, gradient.shape[-1]).square().T @ input.reshape(-1, input.shape[-1]).square()
    spatial = weight.dim() - 2
    if input.dim() == spatial + 1:
        input, gradient = input.unsqueeze(0), gradient.unsqueeze(0)
    settings = dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
    padding = settings.get("padding", 0)
    if isinstance(padding, str):
        dilation = settings.get("dilation", 1)
        dilation = (dilation,) * spatial if isinstance(dilation, int) else tuple(dilation)
        if padding == "same":
            pads: list[int] = []
            for size, step in zip(reversed(weight.shape[2:]), reversed(dilation), strict=True):
                pads += [step * (size - 1) // 2, step * (size - 1) - step * (size - 1) // 2]
            input = F.pad(input, pads)
        settings["padding"] = 0
    return _CONVOLUTIONS[func](input.square(), weight.shape, gradient.square(), **settings)


def _to_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _to_autograd(value: Any) -> Any:
    """Give a batch that may come from inference mode, or in half precision, to autograd in float32."""
    if isinstance(value, Tensor):
        return _to_float(value.clone() if value.is_inference() else value.detach())
    if isinstance(value, Mapping):
        return {key: _to_autograd(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        members = [_to_autograd(member) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    return value
