"""Measures this repository against what its users would otherwise run.

Every row computes one thing several ways, checks that all agree, and times
them interleaved in one process. Rows where ours is slower are printed like any
other. The exit status is 1 if a row failed or its sides disagreed.
"""

import argparse
from collections.abc import Sequence
import gc
import pathlib
import re
import sys
import traceback
from typing import Any

import tqdm

from tools.bench import (
  compare,
  environment,
  harness,
  report,
  suites,
)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="bench", description=__doc__)
  parser.add_argument(
    "--suite",
    default=",".join(suites.NAMES),
    help="comma-separated suites (default: all: %(default)s)",
  )
  parser.add_argument(
    "--quick",
    action="store_true",
    help="small shapes and short samples, under a minute in total",
  )
  parser.add_argument(
    "--filter",
    metavar="REGEX",
    help="only rows whose suite/op/case/dtype it matches somewhere",
  )
  parser.add_argument(
    "--repeats", type=int, help="samples of each side (9, or 3 if quick)"
  )
  parser.add_argument(
    "--json", metavar="FILE", help="write the records here (see schema.json)"
  )
  parser.add_argument(
    "--plot", metavar="FILE.png", help="draw the ratios into this file"
  )
  options = parser.parse_args(arguments)
  options.suite = [name for name in options.suite.split(",") if name]
  unknown = sorted(set(options.suite) - set(suites.NAMES))
  if unknown or not options.suite:
    parser.error(
      f"--suite must name some of {', '.join(suites.NAMES)}, but got "
      f"{', '.join(unknown) or 'none'}"
    )
  if options.filter is not None:
    try:
      options.filter = re.compile(options.filter)
    except re.error as error:
      parser.error(f"--filter must be a regular expression: {error}")
  if options.repeats is not None and options.repeats < 1:
    parser.error(f"--repeats must be at least 1, but got {options.repeats}")
  for name in ("json", "plot"):
    given = getattr(options, name)
    if given is None:
      continue
    # Refused now rather than after minutes of measuring.
    path = (environment.invocation_directory() / given).resolve()
    if not path.parent.is_dir():
      parser.error(f"--{name}: folder {path.parent} does not exist")
    if name == "plot" and path.suffix != ".png":
      parser.error(f"--plot must end in .png, but got {given}")
    setattr(options, name, path)
  return options


def run_cases(
  cases: Sequence[harness.Case], settings: harness.Settings
) -> tuple[list[dict[str, Any]], list[str]]:
  """Runs the rows one after the other, behind a progress bar.

  Args:
    cases: the rows.
    settings: how long to measure.

  Returns:
    The records, and one text for each row that failed.
  """
  records: list[dict[str, Any]] = []
  failures: list[str] = []
  device, versions = environment.device_description(), environment.versions()
  bar = tqdm.tqdm(total=len(cases), unit="row", file=sys.stderr)
  with bar:
    for case in cases:
      bar.set_description(case.label)
      try:
        records += harness.run_case(
          case,
          settings,
          device=device,
          versions=versions,
        )
      except KeyboardInterrupt:
        failures.append(f"{case.label}: interrupted, later rows not run")
        break
      except compare.MismatchError as error:
        failures.append(str(error))
      except Exception:
        # One broken row must not cost the others; the exit status tells.
        failures.append(f"{case.label}: {traceback.format_exc()}")
      gc.collect()
      bar.update()
    bar.set_description("done")
  return records, failures


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the benchmark and returns the exit status."""
  options = _parse(arguments)
  settings = harness.Settings.for_run(
    quick=options.quick, repeats=options.repeats
  )
  cases = [
    case
    for name in options.suite
    for case in suites.cases(name, settings)
    if options.filter is None or options.filter.search(case.label)
  ]
  if not cases:
    print("no row matches --suite and --filter", file=sys.stderr)
    return 2
  records, failures = run_cases(cases, settings)
  print(report.full_text(records))
  if options.json is not None:
    report.write_json(records, pathlib.Path(options.json))
    print(f"wrote {options.json}")
  if options.plot is not None and records:
    report.write_plot(records, pathlib.Path(options.plot))
    print(f"wrote {options.plot}")
  for failure in failures:
    print(f"\nFAILED {failure}", file=sys.stderr)
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())
