"""The plan that is shown before anything happens: rule, layer, shape, action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan.

    Args:
        rule: What decided: the name of a rule, ``"select"``, or the reason's kind.
        layer: Path of the tensor or module.
        shape: Its shape, as text.
        action: What will happen to it, or why nothing will.
    """

    rule: str
    layer: str
    shape: str
    action: str


def render_plan(title: str, rows: Sequence[PlanRow]) -> str:
    """Return the plan as an aligned text table.

    >>> print(render_plan("Prune", [PlanRow("select", "fc.weight", "4x2", "prune to 0.9")]))
    Prune
      rule    layer      shape  action
      select  fc.weight  4x2    prune to 0.9
    """
    table = [("rule", "layer", "shape", "action"), *((row.rule, row.layer, row.shape, row.action) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([title, *(line.rstrip() for line in lines)])
