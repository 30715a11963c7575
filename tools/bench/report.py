"""Turns records into a table, a JSON file, a plot and Markdown."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import itertools
import json
import math
import pathlib
from typing import Any

from tools.bench import schema

Record = dict[str, Any]


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


def format_minutes(seconds: float) -> str:
  """Formats seconds as a clock does.

  >>> format_minutes(83.4)
  '1:23'
  """
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _format_range(record: Record, side: str) -> str:
  low, high = (format_ms(record[f"{side}_{end}_ms"]) for end in ("min", "max"))
  return f"{low}..{high}"


def _format_fraction(value: float | None) -> str:
  return "-" if value is None else f"{value:.2f}"


@dataclasses.dataclass(frozen=True)
class _Column:
  """A column of a table of records.

  Attributes:
    title: its head.
    cell: what it shows of a record.
    is_text: whether it is aligned as words are, to the left.
  """

  title: str
  cell: Callable[[Record], str]
  is_text: bool = False


_COLUMNS = (
  _Column("suite", lambda record: record["suite"], True),
  _Column("op", lambda record: record["op"], True),
  _Column("case", lambda record: record["case"], True),
  _Column("dtype", lambda record: record["dtype"] or "-", True),
  _Column("ours ms", lambda record: format_ms(record["ours_ms"])),
  _Column("min..max", lambda record: _format_range(record, "ours")),
  _Column("baseline", lambda record: record["baseline"], True),
  _Column("baseline ms", lambda record: format_ms(record["baseline_ms"])),
  _Column("min..max", lambda record: _format_range(record, "baseline")),
  _Column("ratio", lambda record: format_ratio(record["ratio"])),
  _Column("floor ms", lambda record: format_ms(record["floor_ms"])),
  _Column(
    "of floor", lambda record: _format_fraction(record["fraction_of_floor"])
  ),
)
_TOUR_COLUMNS = tuple(
  column for column in _COLUMNS if column.title not in ("min..max", "floor ms")
)


def geometric_mean(values: Iterable[float]) -> float:
  """Returns the geometric mean of positive numbers.

  >>> round(geometric_mean([1.0, 4.0]), 6)
  2.0
  """
  logarithms = [math.log(value) for value in values]
  return math.exp(sum(logarithms) / len(logarithms))


def summary_lines(
  records: Sequence[Record],
  group: Callable[[Record], str] = lambda record: (
    f"{record['suite']}/{record['op']} against {record['baseline']}"
  ),
) -> list[str]:
  """Returns one line for each group of records: mean and worst ratio.

  Args:
    records: the records.
    group: names the group of a record; by default op and baseline.
  """
  groups: dict[str, list[float]] = {}
  for record in records:
    groups.setdefault(group(record), []).append(record["ratio"])
  return [
    f"{name}: geometric mean {format_ratio(geometric_mean(ratios))}, worst "
    f"{format_ratio(min(ratios))}, {len(ratios)} rows"
    for name, ratios in groups.items()
  ]


def text_table(
  records: Sequence[Record], columns: Sequence[_Column] = _COLUMNS
) -> str:
  """Returns the records as an aligned table, a blank line between suites.

  Args:
    records: the records, those of a suite together.
    columns: what to show of each.
  """
  if not records:
    return "no rows"
  rows = [[column.cell(record) for column in columns] for record in records]
  titles = [column.title for column in columns]
  widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]

  def line(cells: Sequence[str]) -> str:
    return "  ".join(
      cell.ljust(width) if column.is_text else cell.rjust(width)
      for column, cell, width in zip(columns, cells, widths, strict=True)
    ).rstrip()

  lines = [line(titles), "  ".join("-" * width for width in widths)]
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


def _text(
  records: Sequence[Record], columns: Sequence[_Column], summary: Sequence[str]
) -> str:
  if not records:
    return text_table(records)
  return "\n".join(
    [
      text_table(records, columns),
      "",
      *summary,
      "",
      "ratio = baseline / ours, above 1 ours is faster; of floor = floor / "
      "ours, 1 is at the floor",
      _environment_line(records[0]),
    ]
  )


def full_text(records: Sequence[Record]) -> str:
  """Returns table, summary and environment, as the program prints them."""
  return _text(records, _COLUMNS, summary_lines(records))


def tour_text(records: Sequence[Record]) -> str:
  """Returns what fits a screen: fewer columns, a summary line a suite."""
  return _text(
    records,
    _TOUR_COLUMNS,
    summary_lines(records, lambda record: record["suite"]),
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


def _markdown_table(
  titles: Sequence[str], are_text: Sequence[bool], rows: Iterable[Sequence[str]]
) -> list[str]:
  """Returns the lines of a table."""
  marks = ["---" if is_text else "---:" for is_text in are_text]
  return [f"| {' | '.join(cells)} |" for cells in (titles, marks, *rows)]


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
    lines.append("")
    lines += _markdown_table(
      [column.title for column in _COLUMNS],
      [column.is_text for column in _COLUMNS],
      [[column.cell(record) for column in _COLUMNS] for record in records],
    )
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
    ]
    rows = []
    for row in result["bench"]:
      ms = row["ms"]
      ratios = [
        format_ratio(ms[side] / ms[ours] if {side, ours} <= ms.keys() else None)
        for side, ours in _GPU_RATIOS.values()
      ]
      copy = _format_fraction(row["fraction_of_copy"])
      rows.append([row["row"], format_ms(ms["ours"]), *ratios, copy])
    lines += _markdown_table(
      ["row", "ours ms", *_GPU_RATIOS, "of copy"],
      [True] + [False] * (len(_GPU_RATIOS) + 2),
      rows,
    )
  return "\n".join(lines) + "\n"
