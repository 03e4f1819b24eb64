"""Gradients written by hand, and what autograd cannot do with them."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make backward, of a torch.autograd.Function, refuse create_graph=True: it would be taken for a constant.

    torch's decorator of this name refuses only where the incoming gradient has a graph, which that of a loss has not,
    and only if the refusal lies on a path to what is differentiated for.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # in a backward pass: create_graph=True
            raise RuntimeError(
                f"create_graph=True was given, but {backward.__qualname__} is once_differentiable; gradients without a "
                "graph are required; leave create_graph=True out, or use torch's operations for what a gradient's "
                "gradient goes through."
            )
        return backward(ctx, *grads)

    return refusing
