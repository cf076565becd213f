"""The five rules of a BatchNorm layer, which every family's table needs several times."""

from __future__ import annotations

from porting.rules import Rule
from porting.transforms import COUNTER


def batch_norm(torch: str, flax: str) -> tuple[Rule, ...]:
    """Rules from the torch layer at the pattern `torch` to the Flax layer at `flax`."""
    return (
        Rule(f"{torch}.weight", f"{flax}.scale"),
        Rule(f"{torch}.bias", f"{flax}.bias"),
        Rule(f"{torch}.running_mean", f"{flax}.mean"),
        Rule(f"{torch}.running_var", f"{flax}.var"),
        Rule(f"{torch}.num_batches_tracked", f"{flax}.num_batches_tracked", COUNTER),
    )
