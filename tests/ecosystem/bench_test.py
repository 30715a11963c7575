"""The suite `ecosystem` of the bench runs, and both sides train alike."""

import json

from tools.bench import main, schema


def test_rows(tmp_path, monkeypatch):
  # Those of the libraries and of Flax are no errors.
  monkeypatch.setenv("PYTHONWARNINGS", "ignore")
  path = tmp_path / "run.json"
  flags = ["--quick", "--repeats=1", "--suite=ecosystem", f"--json={path}"]
  assert main.main(flags) == 0, "see the row's error above"
  records = json.loads(path.read_text())
  schema.validate(records)
  assert [(r["case"], r["baseline"]) for r in records] == [
    ("keras_sequential", "flax.nnx"),
    ("tunix_lora", "flax.nnx"),
  ]
