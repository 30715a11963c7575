"""Tests of the step of decoding, by times and sizes that are had by hand."""

import dataclasses

from absl.testing import absltest, parameterized
import hypothesis
from hypothesis import strategies as st

from tests.tools.plan import round_chip
from tools.plan import chips, decoding, mesh, model, refusal

PROPERTY = hypothesis.settings(
  derandomize=True, deadline=None, max_examples=100
)

# A layer: attention 4 x 8 x 8 with all heads of keys, perceptron 3 x 8 x 16,
# two norms of 8.
SIZES = model.Model(4, 8, 4, 4, 2, 16, 32)
LAYER = 4 * 64 + 3 * 8 * 16 + 16


def parts(plan):
  return {part.name: part for part in plan.parts}


def make(axes="", chip=round_chip.CHIP, sizes=SIZES, **options):
  job = {"batch": 8, "context": 16} | options
  return decoding.plan(sizes, chip, mesh.parse(axes), decoding.Job(**job))


class HandTest(parameterized.TestCase):
  def test_weights_are_read_once(self):
    found = parts(make())
    self.assertAlmostEqual(found["products"].seconds * 1e12, 4 * LAYER * 2)
    self.assertEqual(found["products"].bound, "memory")
    self.assertAlmostEqual(found["head"].seconds * 1e12, 8 * 32 * 2)

  @parameterized.parameters(("bfloat16", 2, 0.5e12), ("int8", 1, 0.25e12))
  def test_cache_is_read_once(self, dtype, size, bandwidth):
    found = parts(make(cache=dtype))["cache read"]
    read = 8 * 16 * 2 * 8 * 4 * size
    self.assertAlmostEqual(found.seconds * bandwidth, read)

  def test_few_heads_of_keys_are_read_less(self):
    sizes = dataclasses.replace(SIZES, kv_heads=1)
    self.assertAlmostEqual(
      4 * parts(make(sizes=sizes))["cache read"].seconds,
      parts(make())["cache read"].seconds,
    )

  def test_a_large_batch_waits_for_arithmetic(self):
    found = parts(make(batch=100_000, context=1))["products"]
    multiplied = 4 * 64 + 3 * 8 * 16
    self.assertAlmostEqual(found.seconds * 1e14, 2 * 100_000 * 4 * multiplied)
    self.assertEqual(found.bound, "arithmetic")

  def test_kernels_take_time_to_start(self):
    found = parts(make(chip=round_chip.change(kernel=1.0)))
    self.assertAlmostEqual(found["starting kernels"].seconds, 4 * 9)

  def test_memory(self):
    memory = make(slots=64).memory
    self.assertEqual(memory["weights"], 2 * (4 * LAYER + 2 * 8 * 32))
    self.assertEqual(memory["cache"], 8 * 64 * 2 * 8 * 4 * 2)

  def test_tensor(self):
    found = parts(make("tensor=4"))
    self.assertAlmostEqual(
      found["cache read"].seconds, parts(make())["cache read"].seconds / 4
    )
    # Two sums of a layer and that of the embedding, of 8 rows; then the logits.
    one = 2 * 8 * 8 * 2 * 3 / 4
    logits = 8 * 32 * 2 * 3 / 4
    self.assertAlmostEqual(
      found["tensor all-reduce"].seconds * 1e11, 9 * one + logits
    )

  def test_heads_of_keys_are_repeated_over_more_devices(self):
    sizes = dataclasses.replace(SIZES, kv_heads=2)
    self.assertEqual(
      make("tensor=4", sizes=sizes).memory["cache"],
      make("tensor=2", sizes=sizes).memory["cache"],
    )

  def test_sequence_divides_the_cache_alone(self):
    one, two = make(), make("sequence=2")
    self.assertEqual(two.memory["cache"], one.memory["cache"] / 2)
    self.assertEqual(two.memory["weights"], one.memory["weights"])
    # A sum of two features, a maximum and a normaliser, of 4 heads.
    self.assertAlmostEqual(
      parts(two)["sequence all-reduce"].seconds * 1e11,
      4 * 2 * (8 * 4 * 4 * 4) / 2,
    )

  def test_a_pipeline_reads_its_weights_for_each_part_of_the_batch(self):
    one, two = make(), make("pipeline=2")
    self.assertAlmostEqual(
      parts(two)["products"].seconds, parts(one)["products"].seconds
    )
    self.assertEqual(two.memory["cache"], one.memory["cache"] / 2)

  def test_experts_that_no_token_goes_to_are_not_read(self):
    sizes = dataclasses.replace(SIZES, experts=4, used=1)
    found = parts(make(sizes=sizes, batch=1))["products"]
    shared = 4 * 64 + 16 + 8 * 4
    self.assertAlmostEqual(found.seconds * 1e12, 2 * 4 * (shared + 3 * 8 * 16))

  def test_reads_7b_at_the_kept_bandwidth(self):
    # 13.2 GB in bfloat16 but for the embeddings, at 4.21 TB/s.
    plan = make(
      chip=chips.CHIPS["h200"],
      sizes=model.MODELS["llama2-7b"],
      batch=1,
      context=1,
    )
    read = sum(parts(plan)[name].seconds for name in ("products", "head"))
    self.assertAlmostEqual(read, 13.215e9 / 4.2114e12, places=5)


class RefusedTest(parameterized.TestCase):
  @parameterized.parameters(
    ("data=3", {}, "`batch`=8 must be a multiple of `data x fsdp x expert x"),
    ("tensor=3", {}, "`heads`=4 must be a multiple of `tensor`=3"),
    ("sequence=3", {}, "`slots`=16 must be a multiple of `sequence`=3"),
    ("", {"slots": 8}, "`slots` must be at least `context`=16, but got 8."),
    ("", {"context": 0}, "`context` must be at least 1, but got 0."),
    ("", {"reserve": 2.0}, "`reserve` must lie in [0, 1], but got 2.0."),
    ("", {"cache": "float32"}, "A cache on round is of bfloat16, int8, but"),
  )
  def test_says_why(self, axes, options, message):
    with self.assertRaises(refusal.Refused) as raised:
      make(axes, **options)
    self.assertIn(message, str(raised.exception))

  def test_what_does_not_fit(self):
    with self.assertRaisesRegex(
      refusal.Refused, r"16\.3 GB, but 19\.9 GB are needed: weights 17\.2"
    ):
      make(
        "tensor=8,data=8",
        chip=chips.CHIPS["v5e"],
        sizes=model.MODELS["llama2-70b"],
        batch=64,
        context=8192,
      )


CHIPS = st.sampled_from(sorted(chips.CHIPS))
MESHES = st.builds(
  mesh.Mesh,
  tensor=st.sampled_from([1, 2, 8]),
  sequence=st.sampled_from([1, 2]),
  pipeline=st.sampled_from([1, 2]),
  data=st.sampled_from([1, 2, 4]),
)
JOBS = st.builds(
  decoding.Job,
  batch=st.sampled_from([8, 16, 64, 256]),
  context=st.sampled_from([16, 1024, 32768]),
  cache=st.sampled_from(["bfloat16", "int8"]),
)
MODELS = st.sampled_from(
  [
    model.Model(8, 1024, 16, 4, 64, 4096, 32000),
    model.Model(8, 1024, 16, 4, 64, 1024, 32000, experts=8, used=2),
  ]
)


def planned(sizes, chip, axes, job):
  roomy = dataclasses.replace(chip, memory=1e15)
  return decoding.plan(sizes, roomy, axes, job)


class PropertiesTest(parameterized.TestCase):
  @PROPERTY
  @hypothesis.given(MODELS, CHIPS, MESHES, JOBS)
  def test_a_larger_batch_takes_longer_and_makes_more_a_second(
    self, sizes, name, axes, job
  ):
    chip = chips.CHIPS[name]
    one = planned(sizes, chip, axes, job)
    two = planned(
      sizes, chip, axes, dataclasses.replace(job, batch=2 * job.batch)
    )
    self.assertGreaterEqual(two.seconds, one.seconds * (1 - 1e-9))
    self.assertGreaterEqual(
      two.tokens_per_second, one.tokens_per_second * (1 - 1e-9)
    )

  @PROPERTY
  @hypothesis.given(MODELS, CHIPS, MESHES, JOBS)
  def test_a_longer_context_never_helps(self, sizes, name, axes, job):
    chip = chips.CHIPS[name]
    one = planned(sizes, chip, axes, job)
    two = planned(
      sizes, chip, axes, dataclasses.replace(job, context=2 * job.context)
    )
    self.assertGreaterEqual(two.seconds, one.seconds)
    self.assertGreater(two.used, one.used)

  @PROPERTY
  @hypothesis.given(MODELS, MESHES, JOBS)
  def test_more_devices_for_the_same_batch_never_hurt_along_data(
    self, sizes, axes, job
  ):
    chip = chips.CHIPS["h200"]
    one = planned(sizes, chip, axes, job)
    wide = dataclasses.replace(axes, data=2 * axes.data)
    hypothesis.assume(job.batch % (wide.batch * wide.pipeline) == 0)
    self.assertLessEqual(
      planned(sizes, chip, wide, job).seconds, one.seconds * (1 + 1e-9)
    )

  @PROPERTY
  @hypothesis.given(MODELS, CHIPS, MESHES, JOBS, st.floats(1.0, 8.0))
  def test_faster_memory_never_hurts(self, sizes, name, axes, job, factor):
    chip = chips.CHIPS[name]

    def faster(rate):
      return dataclasses.replace(rate, promised=rate.promised * factor)

    quick = dataclasses.replace(
      chip,
      weights=faster(chip.weights),
      cache={dtype: faster(rate) for dtype, rate in chip.cache.items()},
      norms=faster(chip.norms),
    )
    self.assertLessEqual(
      planned(sizes, quick, axes, job).seconds,
      planned(sizes, chip, axes, job).seconds * (1 + 1e-9),
    )


if __name__ == "__main__":
  absltest.main()
