"""Plans as text."""

from __future__ import annotations

from collections.abc import Sequence

from tools.plan import parts


def seconds(value: float) -> str:
  """Returns a time with its unit.

  >>> seconds(0.0123)
  '12.3 ms'
  """
  for unit, size in (("s", 1.0), ("ms", 1e-3)):
    if value >= size:
      return f"{value / size:.3g} {unit}"
  return f"{value * 1e6:.3g} us"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table of Markdown; columns but the first stand on the right.

  >>> print(table(("part", "ms"), [("norms", "3")]))
  | part | ms |
  | --- | ---: |
  | norms | 3 |
  """
  lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(plan: parts.Plan) -> str:
  """Returns in one line how fast a step is, and why not faster."""
  share = plan.bound.seconds / plan.seconds
  each = plan.tokens_per_second / plan.devices
  return (
    f"{seconds(plan.seconds)} a step, {plan.tokens_per_second:,.0f} tokens/s"
    f" ({each:,.1f} a device), {plan.utilisation:.1%} of the promised"
    f" arithmetic; {plan.bound.name} takes {share:.0%} of it"
    f" ({plan.bound.bound})"
  )


def text(plan: parts.Plan) -> str:
  """Returns all of a plan: its parts, its memory, its speed."""
  times = [
    (
      part.name,
      seconds(part.busy),
      seconds(part.seconds) if part.seconds else "hidden",
      f"{part.seconds / plan.seconds:.1%}",
      part.bound,
    )
    for part in plan.parts
    if part.busy
  ]
  sizes = [
    (name, f"{size / 1e9:.2f}") for name, size in plan.memory.items()
  ] + [("of", f"{plan.capacity / 1e9:.2f}")]
  return "\n\n".join(
    (
      table(("part", "busy", "in the step", "share", "waits for"), times),
      table(("memory of a device", "GB"), sizes),
      summary(plan),
    )
  )
