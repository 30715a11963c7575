"""What the README says is so."""

import pathlib

README = pathlib.Path("README.md").read_text(encoding="utf-8")
EXAMPLE = (
  README.split("## An example")[1].split("```python\n")[1].split("```")[0]
)


def test_the_example_runs_and_is_short(capsys):
  exec(compile(EXAMPLE, "README.md", "exec"), {"__name__": "__main__"})
  assert capsys.readouterr().out, "the example should print what it did"
  assert len([line for line in EXAMPLE.splitlines() if line]) <= 20
