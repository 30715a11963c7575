"""Tests of the check of records against `schema.json`."""

from unittest import mock

from absl.testing import absltest, parameterized

from tools.bench import schema


def make_record(**changes):
  """Returns a valid record with some fields changed."""
  return {
    "suite": "kv_cache",
    "op": "update",
    "case": "B8",
    "dtype": "bfloat16",
    "ours_ms": 0.05,
    "ours_min_ms": 0.04,
    "ours_max_ms": 0.06,
    "baseline": "scatter, jit",
    "baseline_ms": 5.0,
    "baseline_min_ms": 4.0,
    "baseline_max_ms": 6.0,
    "ratio": 100.0,
    "floor": "copy of the new rows",
    "floor_ms": 0.04,
    "fraction_of_floor": 0.8,
    "clock": "wall",
    "repeats": 9,
    "quick": False,
    "details": {},
    "device": "cpu: test",
    "versions": {"python": "3", "jax": "0", "jaxlib": "0", "commit": "c"},
  } | changes


class SchemaTest(parameterized.TestCase):
  def test_valid_record(self):
    schema.validate([make_record()])

  def test_row_without_floor(self):
    schema.validate([make_record(floor_ms=None, fraction_of_floor=None)])

  def test_has_the_promised_keys(self):
    required = schema.load()["items"]["required"]
    promised = (
      "suite op case dtype ours_ms baseline baseline_ms ratio floor_ms "
      "fraction_of_floor device versions"
    ).split()
    self.assertContainsSubset(promised, required)
    self.assertCountEqual(required, schema.load()["items"]["properties"])

  @parameterized.parameters(
    ({"ratio": "2"}, r"`records\[0\].ratio` must be of type number"),
    ({"ours_ms": 0.0}, r"`records\[0\].ours_ms` must be greater than 0"),
    ({"ours_ms": float("nan")}, r"must be greater than 0, but got nan"),
    ({"repeats": True}, r"`records\[0\].repeats` must be of type integer"),
    ({"repeats": 0}, r"`records\[0\].repeats` must be at least 1"),
    ({"suite": ""}, r"`records\[0\].suite` must have at least 1 characters"),
    ({"clock": "sundial"}, r"`records\[0\].clock` must be one of \['wall'"),
    ({"speed": 1}, r"must not have the keys \['speed'\]"),
    ({"versions": {}}, r"`records\[0\].versions` must have the keys"),
    (
      {"versions": make_record()["versions"] | {"flax": 1}},
      r"`records\[0\].versions.flax` must be of type string",
    ),
  )
  def test_says_where_a_record_is_wrong(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      schema.validate([make_record(**changes)])

  def test_missing_key(self):
    record = make_record()
    del record["floor_ms"]
    with self.assertRaisesRegex(ValueError, r"keys \['floor_ms'\]"):
      schema.validate([record])

  def test_unknown_keyword_is_refused(self):
    with mock.patch.object(schema, "load", return_value={"pattern": "x"}):
      with self.assertRaisesRegex(ValueError, "Keyword `pattern`"):
        schema.validate([])


if __name__ == "__main__":
  absltest.main()
