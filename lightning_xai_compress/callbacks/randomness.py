"""Random numbers beside the training: drawn by a seed of their own, and every generator put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["Generator", "generators_in", "seeded"]

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState

_MOST_OBJECTS = 1000  # a dataset of a million samples in a list is not searched
_MOST_MEMBERS = 64
_DEPTH = 4


@contextmanager
def seeded(seed: int, generators: Iterable[Generator] = ()) -> Iterator[None]:
    """Seed all global generators and some others inside, and give the training their states back afterwards."""
    restore = [_remember(generator) for generator in generators]
    try:
        with isolate_rng():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            for generator in generators:
                _reseed(generator, seed)
            yield
    finally:
        for put_back in restore:
            put_back()


def generators_in(*owners: Any) -> list[Generator]:
    """Generators that objects (datasets, say, their transforms and collate functions) hold, a few levels deep."""
    found: list[Generator] = []
    seen: set[int] = set()
    level = list(owners)
    for _ in range(_DEPTH):
        below: list[Any] = []
        for each in level:
            if id(each) in seen or len(seen) > _MOST_OBJECTS:
                continue
            seen.add(id(each))
            if isinstance(each, Generator):
                found.append(each)
            else:
                below += _members(each)
        level = below
    return found


def _members(owner: Any) -> list[Any]:
    if isinstance(owner, torch.Tensor | np.ndarray | str | bytes | type):
        return []
    if isinstance(owner, Mapping | list | tuple):
        members = owner.values() if isinstance(owner, Mapping) else owner
        return list(members) if len(owner) <= _MOST_MEMBERS else []
    bound = [getattr(owner, name, None) for name in ("__self__", "func", "args", "keywords")]  # methods, partials
    return [*getattr(owner, "__dict__", {}).values(), *(each for each in bound if each is not None)]


def _remember(generator: Generator) -> Callable[[], object]:
    """What puts the present state back."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        position = generator.getstate()
        return lambda: generator.setstate(position)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    bits = generator.bit_generator
    words = bits.state
    return lambda: setattr(bits, "state", words)


def _reseed(generator: Generator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    else:
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
