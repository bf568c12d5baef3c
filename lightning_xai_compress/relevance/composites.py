"""Which rule runs where: names and zennit composites, read into one rule a parameter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from zennit.composites import COMPOSITES, LayerMapComposite
from zennit.core import Composite
from zennit.rules import AlphaBeta, Gamma, Norm, Pass, ZPlus
from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

from lightning_xai_compress.errors import RelevanceError
from lightning_xai_compress.relevance.rules import Rule, make_rule

__all__ = ["COMPOSITE_NAMES", "check_composite", "read_composite"]

_LAYERS = (Convolution, Linear)
_EVERYWHERE = {"zplus": ZPlus, "gamma": Gamma, "alpha_beta": AlphaBeta}
_OF_ZENNIT = ("epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_alpha2_beta1_flat")
COMPOSITE_NAMES = ("epsilon", *_EVERYWHERE, *_OF_ZENNIT)


def check_composite(composite: str | Composite) -> None:
    """Refuse what is no composite.

    Raises:
        ValueError: With the names there are.
    """
    if isinstance(composite, Composite):
        return
    if composite == "epsilon_gamma_box":
        raise ValueError(
            "composite 'epsilon_gamma_box' needs the range of the input: "
            "pass zennit.composites.EpsilonGammaBox(low=..., high=...)"
        )
    if composite not in COMPOSITE_NAMES:
        raise ValueError(
            f"composite must be one of {', '.join(COMPOSITE_NAMES)} or a zennit Composite, got {composite!r}"
        )


def read_composite(composite: str | Composite, model: nn.Module) -> Mapping[str, Rule]:
    """The rule of each weight that has another one than plain epsilon.

    A composite names rules by module. Convolutions and Linear layers take theirs with a directly following BatchNorm
    merged in, as zennit's canonizers do; layers without one, and functional calls, take plain epsilon. Activations pass
    relevance on (zennit's Pass) and average pooling takes its ordinary gradient (Norm without stabiliser) whatever
    the composite says; of canonizers nothing is run.

    Args:
        composite: A name of `COMPOSITE_NAMES`, or a zennit Composite.
        model: Whose modules it maps.

    Raises:
        RelevanceError: A rule without a per-weight form, named with its layer.
    """
    check_composite(composite)
    if composite == "epsilon":
        return {}
    if isinstance(composite, str):
        if composite in _EVERYWHERE:
            composite = LayerMapComposite([(_LAYERS, _EVERYWHERE[composite]())])
        else:
            composite = COMPOSITES[composite]()
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    rules: dict[str, Rule] = {}
    context: dict[str, object] = {}
    for name, module in model.named_modules():
        hook = composite.module_map(context, name, module)
        if hook is None:
            continue
        weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
        if isinstance(module, _LAYERS) and weight is not None:
            rules.setdefault(first_name[id(weight)], make_rule(hook, name or type(module).__name__))
        elif not _is_default(hook, module):
            raise RelevanceError(
                f"rule {type(hook).__name__} at {name or type(module).__name__} ({type(module).__name__}) has no "
                "per-weight form: rules other than Pass and Norm are for Linear layers and convolutions"
            )
    return rules


def _is_default(hook: object, module: nn.Module) -> bool:
    """Whether a rule says what is done anyway at modules without weights, or at norms."""
    if isinstance(hook, Pass):
        return isinstance(module, Activation | BatchNorm)
    return isinstance(hook, Norm) and (isinstance(module, AvgPool) or type(module).__name__ == "Sum")
