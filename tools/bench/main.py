"""Measures this repository against what its users would otherwise run.

Every row computes one thing several ways, checks that all agree, and times
them interleaved in one process. Rows where ours is slower are printed like any
other. Without options it makes a tour of at most four minutes: some rows of
every suite, a table and a plot. The exit status is 1 if a row failed or its
sides disagreed.
"""

import argparse
from collections.abc import Sequence
import gc
import importlib.util
import math
import pathlib
import re
import sys
import tempfile
import time
import traceback
from typing import Any

import tqdm

from tools.bench import (
  compare,
  environment,
  harness,
  report,
  suites,
  tour,
)

_SUITES = suites.NAMES + suites.CONFIGURED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="bench", description=__doc__)
  parser.add_argument(
    "--suite",
    metavar="NAME,NAME",
    help=f"all rows of these suites, of {','.join(_SUITES)}",
  )
  sizes = parser.add_mutually_exclusive_group()
  sizes.add_argument(
    "--full", action="store_true", help="all rows of all suites"
  )
  sizes.add_argument(
    "--quick",
    action="store_true",
    help="small shapes and short samples, about a minute in total",
  )
  parser.add_argument(
    "--filter",
    metavar="REGEX",
    help="only rows whose suite/op/case/dtype it matches somewhere",
  )
  parser.add_argument(
    "--repeats",
    type=int,
    help="samples of each side (9; 3 if quick; 5 in a tour)",
  )
  parser.add_argument(
    "--json", metavar="FILE", help="write the records here (see schema.json)"
  )
  parser.add_argument(
    "--plot", metavar="FILE.png", help="draw the ratios into this file"
  )
  options = parser.parse_args(arguments)
  options.tour = not (
    options.full or options.quick or options.suite or options.filter
  )
  if options.suite is None:
    options.suite = ",".join(suites.NAMES)
  options.suite = [name for name in options.suite.split(",") if name]
  unknown = sorted(set(options.suite) - set(_SUITES))
  if unknown or not options.suite:
    parser.error(
      f"--suite must name some of {', '.join(_SUITES)}, but got "
      f"{', '.join(unknown) or 'none'}"
    )
  for name in set(options.suite) & set(suites.CONFIGURED):
    if importlib.util.find_spec(f"tools.bench.{name}") is None:
      parser.error(
        f"--suite={name} needs packages of its own: `bazel run"
        f" --config={name} //tools:bench_{name}`"
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
  cases: Sequence[harness.Case],
  settings: harness.Settings,
  seconds: float = math.inf,
) -> tuple[list[dict[str, Any]], list[str], Sequence[harness.Case]]:
  """Runs the rows one after the other, behind a progress bar.

  Args:
    cases: the rows.
    settings: how long to measure.
    seconds: a row is begun if it ends within these when it takes as long as the
      longest before it.

  Returns:
    The records, one text for each row that failed, and the rows that were not
    begun.
  """
  records: list[dict[str, Any]] = []
  failures: list[str] = []
  left: Sequence[harness.Case] = ()
  done, longest = 0, 0.0
  device, versions = environment.device_description(), environment.versions()
  start = time.monotonic()
  bar = tqdm.tqdm(
    total=len(cases),
    file=sys.stderr,
    bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} rows{postfix}",
  )
  with bar:
    for case in cases:
      elapsed = time.monotonic() - start
      if elapsed + longest > seconds:
        left = cases[done:]
        break
      words = case.label
      if done:
        to_go = min(elapsed / done * (len(cases) - done), seconds - elapsed)
        words = f"about {report.format_minutes(to_go)} left: {words}"
      bar.set_postfix_str(words)
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
      longest = max(longest, time.monotonic() - start - elapsed)
      done += 1
      bar.update()
    bar.set_postfix_str(
      f"{report.format_minutes(time.monotonic() - start)} in all"
    )
  return records, failures, left


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the benchmark and returns the exit status."""
  start = time.monotonic()
  options = _parse(arguments)
  seconds = math.inf
  if options.tour:
    settings = tour.settings(options.repeats)
    cases = tour.cases(settings)
    seconds = tour.ROWS_SECONDS - (time.monotonic() - start)
    options.plot = options.plot or pathlib.Path(
      tempfile.mkdtemp(prefix="bench."), "tour.png"
    )
  else:
    settings = harness.Settings.for_run(
      quick=options.quick, repeats=options.repeats
    )
    cases = []
    for name in options.suite:
      try:
        of_suite = suites.cases(name, settings)
      except ModuleNotFoundError as error:
        print(f"--suite={name}: {error}", file=sys.stderr)
        return 2
      cases += [
        case
        for case in of_suite
        if options.filter is None or options.filter.search(case.label)
      ]
  if not cases:
    print("no row matches --suite and --filter", file=sys.stderr)
    return 2
  records, failures, left = run_cases(cases, settings, seconds)
  records.sort(key=lambda record: _SUITES.index(record["suite"]))
  print((report.tour_text if options.tour else report.full_text)(records))
  if options.json is not None:
    report.write_json(records, options.json)
    print(f"wrote {options.json}")
  if options.plot is not None and records:
    report.write_plot(records, options.plot)
    print(f"wrote {options.plot}")
  if left:
    labels = ", ".join(case.label for case in left)
    print(f"Left out, to end within {tour.SECONDS / 60:g} minutes: {labels}")
  if options.tour:
    print("All rows: --full; those of a suite: --suite=graph")
  for failure in failures:
    print(f"\nFAILED {failure}", file=sys.stderr)
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())
