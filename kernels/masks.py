"""What the mask of a call says about a store: which column is which position, and columns that nobody has written.

Column j of a call's mask is position ``orders.first + j``. Columns beyond the call's own tokens belong to the unwritten
end of a preallocated cache: keys and values of zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mikv_compile.kernels.formats import Orders

HIDDEN = -1e4
"""What is at least this negative in an additive mask hides a column."""

NOTHING = 150.0
"""The exponential of minus this number is 0 in float32, however many columns there are."""


def four_dims(x: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor that broadcasts to [B, H_q, R, columns] with four dimensions; what only repeats along B, H_q or R has
    size 1 there, which saves work on copies."""
    if x is None:
        return None
    while x.dim() < 4:
        x = x[None]
    for dim in range(3):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def seen_columns(mask: torch.Tensor | None, columns: int) -> torch.Tensor | None:
    """The first ``columns`` columns of a mask: [B or 1, H_q or 1, R or 1, columns].

    Raises:
        ValueError: if the mask has fewer, but more than the one that broadcasts.
    """
    mask = four_dims(mask)
    if mask is None:
        return None
    if mask.shape[3] == 1:
        return mask.expand(-1, -1, -1, columns)
    if mask.shape[3] < columns:
        raise ValueError(f"the mask has {mask.shape[3]} columns for {columns} tokens")
    return mask[..., :columns]


def by_position(mask: torch.Tensor | None, orders: Orders, own: int, device: torch.device) -> torch.Tensor | None:
    """A call's mask with a column for each position, 0 to ``orders.length + own``; None if all are seen.

    Positions below ``orders.first`` are not. ``own``: tokens that the call brings.
    """
    columns = orders.length - orders.first + own
    seen = seen_columns(mask, columns)
    if not orders.first:
        return seen
    if seen is None:
        seen = torch.ones(1, 1, 1, columns, dtype=torch.bool, device=device)
    return F.pad(seen, (orders.first, 0), value=False if seen.dtype == torch.bool else float("-inf"))


class StaleColumnsError(RuntimeError):
    """A call sees columns of a preallocated cache whose tokens the store has dropped, as a ring buffer's does."""


def check_stale(mask: torch.Tensor | None, orders: Orders, own: int) -> None:
    """Make sure that a call does not see the ``orders.stale`` columns behind its own tokens.

    Raises:
        StaleColumnsError: if it does.
    """
    if not orders.stale:
        return
    mask = four_dims(mask)
    columns = orders.length - orders.first + own
    if mask is not None and mask.shape[3] > 1:
        rest = mask[..., columns : columns + orders.stale]
        if not (rest.any() if rest.dtype == torch.bool else (rest > HIDDEN).any()):
            return
    raise StaleColumnsError


def _matter(columns: torch.Tensor, lse: torch.Tensor) -> bool:
    """Whether columns of a mask with score 0 change any row's log-sum-exp in float32."""
    return bool(columns.any() if columns.dtype == torch.bool else columns.amax() >= lse.amin() - NOTHING)


def add_unwritten(
    out: torch.Tensor, lse: torch.Tensor, mask: torch.Tensor | None, orders: Orders, own: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the softmax of a call also count the columns of its mask beyond the call's own tokens.

    They have score 0 (plus an additive mask) and value 0, so they only enlarge the denominator. A row whose scores are
    all masked with the lowest finite number is left as it is: its log-sum-exp does not tell how many they are.

    Args:
        out: [B, H_q, R, D_v], lse: [B, H_q, R] float32, without those columns. Other arguments as in
            :func:`by_position`.
    """
    columns = orders.length - orders.first + own
    mask = four_dims(mask)
    if mask is None or mask.shape[3] == 1 or mask.shape[3] <= columns:
        return out, lse
    rest = mask[..., columns:]
    # A look at the values saves a CPU nearly all of the work, but would make a GPU wait.
    if rest.device.type == "cpu" and not _matter(rest, lse):
        return out, lse
    extra = rest.sum(dim=-1).log() if rest.dtype == torch.bool else rest.float().logsumexp(dim=-1)
    total = torch.logaddexp(lse, extra)
    # A row that sees nothing has -inf twice, and an output of 0.
    share = torch.where(total == float("-inf"), 0.0, (lse - total).exp())
    return (out.float() * share[..., None]).to(out.dtype), total
