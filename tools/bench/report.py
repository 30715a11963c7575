"""Turns records into a table, a JSON file, a plot and Markdown."""

from collections.abc import Iterable, Sequence
import itertools
import json
import math
import pathlib
from typing import Any

from tools.bench import schema

Record = dict[str, Any]

_HEADER = (
  "suite",
  "op",
  "case",
  "dtype",
  "ours ms",
  "min..max",
  "baseline",
  "baseline ms",
  "min..max",
  "ratio",
  "floor ms",
  "of floor",
)
_TEXT_COLUMNS = {0, 1, 2, 3, 6}


def format_ms(value: float | None) -> str:
  """Formats milliseconds with three significant digits.

  >>> [format_ms(x) for x in (None, 0.000123, 0.0512, 1.5, 529.4)]
  ['-', '0.000123', '0.0512', '1.50', '529']
  """
  if value is None:
    return "-"
  if value >= 100:
    return f"{value:.0f}"
  if value <= 0:
    return "0"
  digits = max(0, 2 - math.floor(math.log10(value)))
  return f"{value:.{digits}f}"


def format_ratio(value: float | None) -> str:
  """Formats a ratio: two decimals below 10, none from 100 on.

  >>> [format_ratio(x) for x in (None, 0.953, 12.34, 512.3)]
  ['-', '0.95x', '12.3x', '512x']
  """
  if value is None:
    return "-"
  digits = 2 if value < 10 else 1 if value < 100 else 0
  return f"{value:.{digits}f}x"


def _cells(record: Record) -> tuple[str, ...]:
  fraction = record["fraction_of_floor"]
  return (
    record["suite"],
    record["op"],
    record["case"],
    record["dtype"] or "-",
    format_ms(record["ours_ms"]),
    f"{format_ms(record['ours_min_ms'])}..{format_ms(record['ours_max_ms'])}",
    record["baseline"],
    format_ms(record["baseline_ms"]),
    f"{format_ms(record['baseline_min_ms'])}.."
    f"{format_ms(record['baseline_max_ms'])}",
    format_ratio(record["ratio"]),
    format_ms(record["floor_ms"]),
    "-" if fraction is None else f"{fraction:.2f}",
  )


def geometric_mean(values: Iterable[float]) -> float:
  """Returns the geometric mean of positive numbers.

  >>> round(geometric_mean([1.0, 4.0]), 6)
  2.0
  """
  logarithms = [math.log(value) for value in values]
  return math.exp(sum(logarithms) / len(logarithms))


def summary_lines(records: Sequence[Record]) -> list[str]:
  """Returns one line for each op and baseline: mean and worst ratio."""
  groups: dict[tuple[str, str, str], list[float]] = {}
  for record in records:
    key = (record["suite"], record["op"], record["baseline"])
    groups.setdefault(key, []).append(record["ratio"])
  return [
    f"{suite}/{op} against {baseline}: geometric mean "
    f"{format_ratio(geometric_mean(ratios))}, worst "
    f"{format_ratio(min(ratios))}, {len(ratios)} rows"
    for (suite, op, baseline), ratios in groups.items()
  ]


def text_table(records: Sequence[Record]) -> str:
  """Returns the records as an aligned table, a blank line between suites."""
  if not records:
    return "no rows"
  rows = [_cells(record) for record in records]
  widths = [
    max(len(row[column]) for row in (_HEADER, *rows))
    for column in range(len(_HEADER))
  ]

  def line(cells: Sequence[str]) -> str:
    return "  ".join(
      cell.ljust(width) if column in _TEXT_COLUMNS else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()

  lines = [line(_HEADER), "  ".join("-" * width for width in widths)]
  for suite, group in itertools.groupby(rows, key=lambda row: row[0]):
    if suite != rows[0][0]:
      lines.append("")
    lines.extend(line(row) for row in group)
  return "\n".join(lines)


def _environment_line(record: Record) -> str:
  versions = ", ".join(
    f"{name} {version}" for name, version in sorted(record["versions"].items())
  )
  return f"{record['device']}; {versions}"


def full_text(records: Sequence[Record]) -> str:
  """Returns table, summary and environment, as the program prints them."""
  if not records:
    return text_table(records)
  return "\n".join(
    [
      text_table(records),
      "",
      *summary_lines(records),
      "",
      "ratio = baseline / ours, above 1 ours is faster; of floor = floor / "
      "ours, 1 is at the floor",
      _environment_line(records[0]),
    ]
  )


def write_json(records: Sequence[Record], path: pathlib.Path) -> None:
  """Writes the records as a JSON array, checked against `schema.json`.

  Raises:
    ValueError: if a record does not follow the schema.
  """
  schema.validate(list(records))
  path.write_text(json.dumps(list(records), indent=1, sort_keys=True) + "\n")


def read_json(path: pathlib.Path) -> list[Record]:
  """Reads and checks what `write_json` wrote.

  Raises:
    ValueError: if the file does not follow `schema.json`.
  """
  records = json.loads(path.read_text())
  schema.validate(records)
  return records


def write_plot(records: Sequence[Record], path: pathlib.Path) -> None:
  """Draws every row's ratio as a bar on a logarithmic axis, a panel a suite.

  Args:
    records: at least one record.
    path: PNG file to write.

  Raises:
    ValueError: if there is no record.
  """
  if not records:
    raise ValueError(
      "`records` must hold at least one row to plot, but got none: widen "
      "--suite or --filter."
    )
  # Imported here: a run without --plot does not pay for it.
  from matplotlib import figure as figure_lib

  suites = list(dict.fromkeys(record["suite"] for record in records))
  by_suite = [
    [record for record in records if record["suite"] == suite]
    for suite in suites
  ]
  heights = [len(group) for group in by_suite]
  figure = figure_lib.Figure(
    figsize=(11, 1.5 + 0.24 * sum(heights) + 0.7 * len(suites)),
    layout="constrained",
  )
  panels = figure.subplots(
    len(suites),
    1,
    squeeze=False,
    gridspec_kw={"height_ratios": [height + 2 for height in heights]},
  )[:, 0]
  for panel, suite, group in zip(panels, suites, by_suite, strict=True):
    ratios = [record["ratio"] for record in group]
    labels = [
      " ".join(
        part
        for part in (
          record["op"],
          record["case"],
          record["dtype"],
          f"vs {record['baseline']}",
        )
        if part
      )
      for record in group
    ]
    places = range(len(group))
    # Bars start at 1, so that a row where ours is slower points left.
    panel.barh(
      places,
      [ratio - 1 for ratio in ratios],
      left=1,
      color=["#2a7f62" if ratio >= 1 else "#b5482a" for ratio in ratios],
    )
    for place, ratio in zip(places, ratios, strict=True):
      panel.annotate(
        format_ratio(ratio),
        (ratio, place),
        xytext=(4 if ratio >= 1 else -4, 0),
        textcoords="offset points",
        ha="left" if ratio >= 1 else "right",
        va="center",
        fontsize=7,
      )
    panel.set_xscale("log")
    # Room for the labels, and never so close that 5% looks like a landslide.
    panel.set_xlim(min(0.5, min(ratios) / 2), max(2.0, max(ratios) * 2))
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_yticks(list(places), labels, fontsize=7)
    panel.invert_yaxis()
    panel.set_title(f"suite {suite}", fontsize=10, loc="left")
    panel.set_xlabel("baseline time / our time (log scale)", fontsize=8)
  figure.suptitle(_environment_line(records[0]), fontsize=7)
  figure.savefig(path, dpi=130, format="png")


def markdown(named_records: Sequence[tuple[str, Sequence[Record]]]) -> str:
  """Returns RESULTS.md for some result files.

  Args:
    named_records: file names and their records.
  """
  lines = [
    "# Benchmark results",
    "",
    "Generated from the JSON files beside it by",
    "`bazel run //tools/bench:render_results`; do not edit. `ratio` is the",
    "baseline's time over ours: above 1 ours is faster. `of floor` is the",
    "floor's time over ours: 1 is at the floor. `README.md` one folder up",
    "says how every column is measured.",
  ]
  for name, records in named_records:
    lines += ["", f"## {name}", ""]
    if not records:
      lines.append("No rows.")
      continue
    lines += [_environment_line(records[0]), ""]
    lines += [f"- {line}" for line in summary_lines(records)]
    lines += ["", "| " + " | ".join(_HEADER) + " |"]
    lines.append(
      "|"
      + "|".join(
        " --- " if column in _TEXT_COLUMNS else " ---: "
        for column in range(len(_HEADER))
      )
      + "|"
    )
    lines += ["| " + " | ".join(_cells(record)) + " |" for record in records]
  return "\n".join(lines) + "\n"


# Columns, and whose milliseconds over whose they show.
_GPU_RATIOS = {
  "XLA": ("xla", "ours"),
  "cuDNN": ("cudnn", "ours"),
  "PyTorch": ("torch", "ours"),
  "its flash": ("torch_flash", "ours"),
  "alone": ("torch_alone", "attend"),
}


def gpu_markdown(named_results: Sequence[tuple[str, Record]]) -> str:
  """Returns the part of RESULTS.md about GPUs.

  Args:
    named_results: names of files that tools/gpu_check.py has written, and what
      they hold.
  """
  lines = [
    "",
    "## GPUs",
    "",
    "Written by `python3 tools/gpu_check.py`, which builds, tests and",
    "measures. Ratios are the other side's time over ours: XLA's own lowering",
    "of the same op; attention by cuDNN (after an update of the cache by us)",
    "and by PyTorch (`scaled_dot_product_attention` after copies of the new",
    "row into the cache, in a CUDA graph: with the backend that it chooses,",
    "and with its own flash attention); and, `alone`, PyTorch's choice beside",
    "ours where neither updates the cache.",
    "`of copy` is what part of a plain copy's bandwidth, measured beside it,",
    "ours has.",
  ]
  for name, result in named_results:
    tests = result["tests"]
    versions = ", ".join(
      f"{key} {value}" for key, value in sorted(result["versions"].items())
    )
    lines += [
      "",
      f"### {name}",
      "",
      f"{result['device']}; {versions}. "
      + (
        f"Of the op tests {sum(row['passed'] for row in tests)} passed and"
        f" {sum(row['failed'] for row in tests)} failed."
        if tests
        else "Measured only: no tests ran."
      ),
      "",
      f"| row | ours ms | {' | '.join(_GPU_RATIOS)} | of copy |",
      f"| --- |{' ---: |' * (len(_GPU_RATIOS) + 2)}",
    ]
    for row in result["bench"]:
      ms = row["ms"]
      ratios = [
        format_ratio(ms[side] / ms[ours] if {side, ours} <= ms.keys() else None)
        for side, ours in _GPU_RATIOS.values()
      ]
      cells = [
        row["row"],
        format_ms(ms["ours"]),
        *ratios,
        f"{row['fraction_of_copy']:.2f}",
      ]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"
