"""Writes `results/RESULTS.md` from the JSON files in the same folder and `gpu`.

Run it after adding or replacing a results file:
`bazel run //tools/bench:render_results`.
"""

import argparse
import json
import pathlib

from tools.bench import environment, report


def render(folder: pathlib.Path) -> str:
  """Returns the text of RESULTS.md for the JSON files in `folder`."""
  files = sorted(folder.glob("*.json"))
  text = report.markdown(
    [(path.name, report.read_json(path)) for path in files]
  )
  gpus = sorted(folder.glob("gpu/*.json"))
  if gpus:
    text += report.gpu_markdown(
      [(f"gpu/{path.name}", json.loads(path.read_text())) for path in gpus]
    )
  return text


def default_folder() -> pathlib.Path:
  """Returns `results` in the source tree, under `bazel run` too."""
  workspace = environment.workspace_directory()
  if workspace is not None:
    return pathlib.Path(workspace, "tools", "bench", "results")
  return pathlib.Path(__file__).with_name("results")


def main(arguments: list[str] | None = None) -> None:
  """Parses the flags and writes the file."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--folder",
    type=pathlib.Path,
    default=default_folder(),
    help="folder with the JSON files",
  )
  folder = parser.parse_args(arguments).folder
  target = folder / "RESULTS.md"
  target.write_text(render(folder))
  print(f"wrote {target}")


if __name__ == "__main__":
  main()
