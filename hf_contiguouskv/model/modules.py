"""The modules of a model, without their names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of `model` once, itself included.

    `nn.Module.modules` also makes the name of each, which takes four times as long: every request asks several times.
    """
    stack, seen = [model], {id(model)}
    while stack:
        module = stack.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
