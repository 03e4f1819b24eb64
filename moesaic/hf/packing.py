"""Rows that hold several sequences, as packing collators send them: what their position_ids say."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError


@dataclass(frozen=True)
class Packing:
    """Several sequences in a row. Of the T tokens that are no padding: documents (T,) from 0, and positions (T,).

    begins (B, S): True where a sequence does. places (T,): of these tokens among all, None if there is no padding.
    """

    begins: Tensor
    places: Tensor | None
    documents: Tensor
    positions: Tensor
    longest: int


def take_packing(input_ids: Tensor | None, attention_mask: Tensor | None, others: dict[str, Any]) -> Packing | None:
    """Return what position_ids say, and take them from the other arguments; None if each row is one sequence.

    Raises: ConfigError for position_ids that do not count from 0 in each sequence, and where other arguments of a
    packing collator say something else.
    """
    if input_ids is None or others.get("position_ids") is None:
        return None
    given: Tensor = others.pop("position_ids")
    columns = None if attention_mask is None else attention_mask.bool()
    positions = given.expand_as(input_ids) if given.shape == (1, *input_ids.shape[1:]) else given
    if positions.shape != input_ids.shape or (columns is not None and columns.shape != input_ids.shape):
        raise ConfigError(
            f"position_ids of shape {tuple(given.shape)} were given for input_ids {tuple(input_ids.shape)}; one for "
            f"each token is required, and an attention_mask of the same shape; leave them out, or give the tokens' own."
        )
    places = None if columns is None or bool(columns.all()) else columns.flatten().nonzero()[:, 0]
    rows = torch.arange(len(input_ids), device=given.device)[:, None].expand_as(input_ids).flatten()
    flat = positions.flatten()
    if places is not None:
        rows, flat = rows[places], flat[places]
    if not len(flat):
        return None
    starts = flat == 0
    is_first = torch.ones_like(starts)  # of its row
    is_first[1:] = rows[1:] != rows[:-1]
    goes_on = torch.zeros_like(starts)
    goes_on[1:] = flat[1:] == flat[:-1] + 1
    if not bool((starts | (goes_on & ~is_first)).all()):
        raise ConfigError(
            "position_ids were given that do not count from 0, one by one, in each sequence; others mean nothing here; "
            "leave them out, or take those of a packing collator."
        )
    documents = starts.cumsum(0) - 1
    bounds = torch.cat([starts.nonzero()[:, 0], documents.new_tensor([len(flat)])])
    longest = int(bounds.diff().max())
    said: dict[str, Tensor | int] = {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
        "seq_idx": documents,
    }  # fmt: skip
    for name, value in said.items():
        other = others.pop(name, None)
        if other is None:
            continue
        wanted = torch.as_tensor(value, device=flat.device)
        got = torch.as_tensor(other, device=flat.device).reshape(-1 if wanted.dim() else ())
        if name == "seq_idx" and places is not None:
            got = got[places]
        if got.shape != wanted.shape or bool((got != wanted).any()):
            raise ConfigError(
                f"{name} was given and says something else than position_ids, in which {int(starts.sum())} sequences "
                f"begin; the same sequences are required; leave {name} out, which position_ids make needless."
            )
    if bool(torch.equal(starts, is_first)):
        return None
    begins = starts
    if places is not None:
        begins = torch.zeros(input_ids.numel(), dtype=torch.bool, device=flat.device)
        begins[places] = starts
    return Packing(begins.view(input_ids.shape), places, documents, flat, longest)
