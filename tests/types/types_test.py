"""mypy agrees with `program.py` about the types that users' programs see."""

from mypy import api


def test_mypy_finds_the_types_of_a_program(monkeypatch, tmp_path):
  # What is ours is here; the packages are found on this process's own path.
  monkeypatch.setenv("MYPYPATH", ".")
  found, trouble, status = api.run(
    [
      "--config-file=",
      "--explicit-package-bases",
      "--follow-imports=silent",
      "--warn-unused-ignores",
      f"--cache-dir={tmp_path}",
      "tests/types/program.py",
    ]
  )
  assert status == 0, found + trouble
