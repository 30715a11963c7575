"""Tests of the check of records against `schema.json`."""

from absl.testing import absltest, parameterized
import jsonschema

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
    ({"ratio": "2"}, r"`records\[0\].ratio` .*'2' is not of type 'number'"),
    ({"ours_ms": 0.0}, r"`records\[0\].ours_ms` .*less than or equal to .* 0"),
    ({"ours_ms": float("nan")}, r"\.ours_ms` .*nan is not of type 'number'"),
    ({"floor_ms": float("inf")}, r"\.floor_ms` .*inf is not of type 'number'"),
    ({"repeats": True}, r"\.repeats` .*True is not of type 'integer'"),
    ({"repeats": 0}, r"`records\[0\].repeats` .*0 is less than the minimum of"),
    ({"suite": ""}, r"`records\[0\].suite` .*'' should be non-empty"),
    ({"clock": "sundial"}, r"\.clock` .*'sundial' is not one of \['wall'"),
    ({"speed": 1}, r"`records\[0\]` .*\('speed' was unexpected\)"),
    ({"versions": {}}, r"`records\[0\].versions` .*is a required property"),
    (
      {"versions": make_record()["versions"] | {"flax": 1}},
      r"`records\[0\].versions.flax` .*1 is not of type 'string'",
    ),
  )
  def test_says_where_a_record_is_wrong(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      schema.validate([make_record(**changes)])

  def test_missing_key(self):
    record = make_record()
    del record["floor_ms"]
    with self.assertRaisesRegex(ValueError, "'floor_ms' is a required"):
      schema.validate([record])

  def test_every_key_of_the_schema_is_one_that_jsonschema_knows(self):
    # It ignores what it does not know: a misspelt keyword would check nothing.
    jsonschema.Draft202012Validator.check_schema(schema.load())
    known = {"$schema", "title", "description"} | set(
      jsonschema.Draft202012Validator.VALIDATORS
    )

    def check(part):
      self.assertContainsSubset(part, known)
      for inner in part.get("properties", {}).values():
        check(inner)
      for key in ("items", "additionalProperties"):
        if isinstance(part.get(key), dict):
          check(part[key])

    check(schema.load())


if __name__ == "__main__":
  absltest.main()
