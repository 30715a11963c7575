"""Tests of the step of training, by times and sizes that are had by hand."""

import dataclasses

from absl.testing import absltest, parameterized
import hypothesis
from hypothesis import strategies as st

from tests.tools.plan import round_chip
from tools.plan import chips, mesh, model, refusal, training

PROPERTY = hypothesis.settings(
  derandomize=True, deadline=None, max_examples=100
)

# A layer: attention 4 x 10 x 10, perceptron 3 x 10 x 20, two norms of 10.
SIZES = model.Model(4, 10, 5, 5, 2, 20, 50)
ATTENTION, EXPERT, TABLE = 400, 600, 500


def parts(plan):
  return {part.name: part for part in plan.parts}


def make(axes="", chip=round_chip.CHIP, sizes=SIZES, **options):
  job = {"batch": 8, "length": 6} | options
  return training.plan(sizes, chip, mesh.parse(axes), training.Job(**job))


class OneDeviceTest(parameterized.TestCase):
  @parameterized.parameters(
    ("elementwise", 0),
    ("mlp", 400),  # the two products into the perceptron
    ("full", 400 + ATTENTION),
  )
  def test_products(self, recompute, again):
    chip = round_chip.change(weights=round_chip.rate(1e30))
    found = parts(make(recompute=recompute, chip=chip))["products"]
    flops = 4 * 2 * 48 * (3 * (ATTENTION + EXPERT) + again)
    self.assertAlmostEqual(found.seconds * 1e14, flops)
    self.assertEqual(found.bound, "arithmetic")

  def test_products_of_few_tokens_wait_for_weights(self):
    chip = round_chip.change(products={"bfloat16": round_chip.rate(1e30)})
    found = parts(make(batch=1, length=1, recompute="elementwise", chip=chip))[
      "products"
    ]
    # Into: 10, 10, 10; out of: 10 with 10; into 10 x 2, out 20 x 2; 20, 10.
    activations = 4 * 10 + 2 * (10 + 10) + 3 * 20
    held = ATTENTION + EXPERT + 20
    self.assertAlmostEqual(
      found.seconds * 1e12, 4 * 3 * (activations + held) * 2
    )
    self.assertEqual(found.bound, "memory")

  def test_attention(self):
    chip = round_chip.change(copy=round_chip.rate(1e30))
    found = parts(make(recompute="elementwise", chip=chip))["attention"]
    # Of 6 x 6 pairs half, two operations for the logits and two for the values,
    # 10 features, 8 sequences, 4 layers; 5 products of the gradient to 2.
    self.assertAlmostEqual(
      found.seconds * 50e12, 18 * 4 * 10 * 8 * 4 * (1 + 2.5)
    )

  def test_head_and_loss(self):
    chip = round_chip.change(copy=round_chip.rate(1e30))
    found = parts(make(chip=chip))["head and loss"]
    self.assertAlmostEqual(found.seconds * 1e14, 6 * 48 * TABLE)

  def test_optimizer_reads_and_writes_all_parameters(self):
    found = parts(make())["optimizer"]
    # Weights and two moments both ways, gradients one way, float32.
    self.assertAlmostEqual(found.seconds * 1e12, SIZES.parameters * 28)

  def test_memory(self):
    memory = make(recompute="full").memory
    count = SIZES.parameters
    self.assertEqual(memory["gradients"], 4 * count)
    self.assertEqual(memory["optimizer"], 8 * count)
    # A layer's copy in bfloat16.
    self.assertEqual(memory["weights"], 4 * count + 2 * count / 4)
    # 4 inputs of layers, and the logits with their gradients.
    self.assertEqual(memory["activations"], 48 * (4 * 10 * 2 + 50 * (2 + 4)))

  def test_tokens_and_flops(self):
    plan = make()
    self.assertEqual(plan.tokens, 48)
    self.assertEqual(plan.flops, 3 * 48 * SIZES.forward_flops(6))
    self.assertAlmostEqual(plan.seconds, sum(p.seconds for p in plan.parts))
    self.assertEqual(
      plan.bound.seconds, max(part.seconds for part in plan.parts)
    )

  def test_host_shows_where_it_is_longer_than_the_device(self):
    slow = round_chip.change(training_host=1.0)
    plan = make(chip=slow)
    # 9 Variables a layer, 3 more, each with two moments.
    self.assertAlmostEqual(parts(plan)["host"].busy, 3 * (9 * 4 + 3))
    self.assertAlmostEqual(plan.seconds, 3 * (9 * 4 + 3))
    waiting = make(chip=dataclasses.replace(slow, queued=False))
    self.assertGreater(waiting.seconds, plan.seconds)


class SeveralDevicesTest(parameterized.TestCase):
  def test_data_halves_the_arithmetic(self):
    chip = round_chip.change(weights=round_chip.rate(1e30))
    one, two = make(chip=chip), make("data=2", chip=chip)
    self.assertAlmostEqual(
      parts(two)["products"].seconds, parts(one)["products"].seconds / 2
    )

  def test_data_all_reduce(self):
    found = parts(make("data=4", overlap=0.0))["data all-reduce"]
    size = SIZES.parameters * 4
    self.assertAlmostEqual(found.seconds * 1e11, 2 * size * 3 / 4)

  def test_fsdp_gathers_twice_and_scatters_once(self):
    found = parts(make("fsdp=4", overlap=0.0))
    moved = SIZES.parameters * 3 / 4
    self.assertAlmostEqual(found["fsdp gather"].seconds * 1e11, 2 * 2 * moved)
    self.assertAlmostEqual(
      found["fsdp reduce-scatter"].seconds * 1e11, 4 * moved
    )

  def test_kept_parameters_are_gathered_once_for_all_microbatches(self):
    each = parts(make("fsdp=4", microbatches=2, overlap=0.0))["fsdp gather"]
    once = parts(
      make("fsdp=4", microbatches=2, overlap=0.0, keep_gathered=True)
    )["fsdp gather"]
    self.assertAlmostEqual(each.busy, 4 * once.busy)

  def test_fsdp_divides_the_states(self):
    one, four = make().memory, make("fsdp=4").memory
    for name in ("gradients", "optimizer"):
      self.assertEqual(four[name], one[name] / 4)

  def test_collectives_hide_but_for_one_layer(self):
    slow = round_chip.change(products={"bfloat16": round_chip.rate(1.0)})
    found = parts(make("fsdp=4", chip=slow))["fsdp gather"]
    self.assertAlmostEqual(found.seconds, found.busy / 5)

  def test_what_hides_does_so_behind_the_arithmetic_that_is_left(self):
    slow = round_chip.change(
      fabric=dataclasses.replace(
        round_chip.CHIP.fabric, inner=round_chip.link(1.0)
      )
    )
    found = make("fsdp=2,data=2", chip=slow)
    names = ("fsdp gather", "fsdp reduce-scatter", "data all-reduce")
    hidden = sum(
      parts(found)[name].busy - parts(found)[name].seconds for name in names
    )
    behind = sum(
      parts(found)[name].busy
      for name in ("products", "attention", "norms", "head and loss")
    )
    self.assertAlmostEqual(hidden, behind)

  def test_tensor_all_reduces_of_a_layer(self):
    sizes = dataclasses.replace(SIZES, heads=4, kv_heads=4)
    found = parts(make("tensor=2", sizes=sizes, recompute="elementwise"))[
      "tensor all-reduce"
    ]
    # Two forward, two for the gradient, two at the ends; tokens of bfloat16.
    one = 2 * (48 * 10 * 2) / 2 / 1e11
    self.assertAlmostEqual(found.seconds, (4 * 4 + 2) * one)

  def test_gradients_of_each_projection_are_summed(self):
    sizes = dataclasses.replace(SIZES, heads=4, kv_heads=4)
    one, three = (
      parts(make("tensor=2", sizes=sizes, projections=count))[
        "tensor all-reduce"
      ]
      for count in (1, 3)
    )
    layer = 2 * (48 * 10 * 2) / 2 / 1e11
    self.assertAlmostEqual((three.seconds - one.seconds) / layer, 4 * 2)

  def test_sequence_sends_keys_and_values_around(self):
    found = parts(make("sequence=2", recompute="elementwise", overlap=0.0))[
      "sequence ring"
    ]
    # Once forward and twice as much for the gradient.
    self.assertAlmostEqual(found.seconds, 4 * 3 * (2 * 24 * 10 * 2) / 1e11)

  def test_expert_all_to_all(self):
    sizes = dataclasses.replace(SIZES, experts=4, used=2)
    found = parts(make("expert=2", sizes=sizes, recompute="elementwise"))[
      "expert all-to-all"
    ]
    # There and back, forward and backward; half of the tokens stay.
    self.assertAlmostEqual(found.seconds, 4 * 4 * (24 * 2 * 10 * 2) / 2 / 1e11)

  @parameterized.parameters(
    (2, 2, 1, 1 / 2), (4, 4, 1, 3 / 4), (2, 4, 2, 1 / 8)
  )
  def test_bubble(self, stages, micro, interleave, share):
    found = parts(
      make(f"pipeline={stages}", microbatches=micro, interleave=interleave)
    )
    work = sum(
      found[name].seconds
      for name in (
        "products",
        "attention",
        "norms",
        "head and loss",
        "pipeline shift",
      )
    )
    self.assertAlmostEqual(found["pipeline bubble"].seconds, work * share)

  def test_gpipe_keeps_all_microbatches(self):
    options = {"microbatches": 8, "recompute": "full"}
    few = make("pipeline=2", **options).memory["activations"]
    all_ = make("pipeline=2", schedule="gpipe", **options).memory["activations"]
    # Two layers' inputs of 6 tokens; 6 microbatches more.
    self.assertEqual(all_ - few, 6 * 2 * 6 * 10 * 2)

  def test_ends_count_as_layers_where_that_makes_stages_equal(self):
    sizes = dataclasses.replace(SIZES, layers=6)
    found = parts(make("pipeline=4", sizes=sizes, microbatches=4))
    self.assertEqual(found["head and loss"].seconds, 0)


class RefusedTest(parameterized.TestCase):
  @parameterized.parameters(
    ("data=3", {}, "`batch`=8 must be a multiple of `data x fsdp x expert"),
    ("tensor=2", {}, "`heads`=5 must be a multiple of `tensor`=2"),
    ("sequence=4", {}, "`length`=6 must be a multiple of `sequence"),
    ("expert=2", {}, "`experts`=1 must be a multiple of `expert`=2"),
    ("pipeline=5", {}, "`pipeline` x `interleave`=5, but is not."),
    ("", {"interleave": 2}, "`interleave`=2 needs a pipeline"),
    ("", {"batch": 0}, "`batch` must be at least 1, but got 0."),
    ("", {"recompute": "all"}, "elementwise, mlp, full, but got `all`"),
    ("", {"schedule": "late"}, "1f1b, gpipe, but got `late`"),
    ("", {"overlap": 2.0}, "`overlap` must lie in [0, 1], but got 2.0."),
    ("", {"compute": "int8"}, "round multiplies in bfloat16, float32, but"),
  )
  def test_says_why(self, axes, options, message):
    with self.assertRaises(refusal.Refused) as raised:
      make(axes, **options)
    self.assertIn(message, str(raised.exception))

  def test_heads_of_keys_that_neither_divide_nor_are_divided(self):
    sizes = model.Model(4, 12, 6, 3, 2, 20, 50)
    with self.assertRaisesRegex(refusal.Refused, "but does neither"):
      make("tensor=2", sizes=sizes)

  def test_what_does_not_fit(self):
    with self.assertRaises(refusal.Refused) as raised:
      make(chip=round_chip.change(memory=1e4))
    self.assertStartsWith(
      str(raised.exception), "A device has 0.0 GB, but 0.0 GB are needed: "
    )

  def test_70b_does_not_fit_on_one(self):
    with self.assertRaises(refusal.Refused) as raised:
      make(chip=chips.CHIPS["h200"], sizes=model.MODELS["llama2-70b"])
    self.assertIn("optimizer 551.8", str(raised.exception))

  def assertStartsWith(self, text, start):
    self.assertEqual(text[: len(start)], start)


# Chips of every fabric, and meshes and jobs that divide.
CHIPS = st.sampled_from(sorted(chips.CHIPS))
MESHES = st.builds(
  mesh.Mesh,
  tensor=st.sampled_from([1, 2, 4]),
  sequence=st.sampled_from([1, 2]),
  pipeline=st.sampled_from([1, 2]),
  fsdp=st.sampled_from([1, 4, 8]),
  data=st.sampled_from([1, 2]),
)
JOBS = st.builds(
  training.Job,
  batch=st.sampled_from([64, 128, 256]),
  length=st.just(1024),
  microbatches=st.sampled_from([1, 2, 4]),
  recompute=st.sampled_from(training.RECOMPUTED),
  keep_gathered=st.booleans(),
  split_residual=st.booleans(),
  overlap=st.sampled_from([0.0, 0.5, 1.0]),
)
SMALL = model.Model(8, 1024, 16, 4, 64, 4096, 32000)


def planned(chip, axes, job):
  roomy = dataclasses.replace(chip, memory=1e15)
  return training.plan(SMALL, roomy, axes, job)


class PropertiesTest(parameterized.TestCase):
  @PROPERTY
  @hypothesis.given(CHIPS, MESHES, JOBS)
  def test_a_larger_batch_takes_longer_and_is_no_less_efficient(
    self, name, axes, job
  ):
    chip = chips.CHIPS[name]
    one = planned(chip, axes, job)
    two = planned(chip, axes, dataclasses.replace(job, batch=2 * job.batch))
    self.assertGreaterEqual(two.seconds, one.seconds)
    self.assertGreaterEqual(
      two.tokens_per_second, one.tokens_per_second * (1 - 1e-9)
    )
    self.assertGreaterEqual(two.used, one.used)

  @PROPERTY
  @hypothesis.given(CHIPS, MESHES, JOBS, st.floats(1.0, 8.0))
  def test_faster_memory_and_links_never_hurt(self, name, axes, job, factor):
    chip = chips.CHIPS[name]

    def faster(rate):
      return dataclasses.replace(rate, promised=rate.promised * factor)

    links = {
      field: dataclasses.replace(link, bandwidth=link.bandwidth * factor)
      for field in ("inner", "outer", "link")
      if (link := getattr(chip.fabric, field, None)) is not None
    }
    quick = dataclasses.replace(
      chip,
      copy=faster(chip.copy),
      weights=faster(chip.weights),
      norms=faster(chip.norms),
      fabric=dataclasses.replace(chip.fabric, **links),
    )
    self.assertLessEqual(
      planned(quick, axes, job).seconds,
      planned(chip, axes, job).seconds * (1 + 1e-9),
    )

  @PROPERTY
  @hypothesis.given(MESHES, JOBS)
  def test_more_devices_make_more_tokens_of_a_batch_that_grows_along(
    self, axes, job
  ):
    chip = chips.CHIPS["h200"]
    one = planned(chip, axes, job)
    two = planned(
      chip,
      dataclasses.replace(axes, data=2 * axes.data),
      dataclasses.replace(job, batch=2 * job.batch),
    )
    # Never better than in proportion, and no fewer where sums can hide.
    self.assertLessEqual(
      two.tokens_per_second, 2 * one.tokens_per_second * (1 + 1e-9)
    )
    self.assertLessEqual(two.used, one.used * (1 + 1e-9))

  @PROPERTY
  @hypothesis.given(CHIPS, MESHES, JOBS)
  def test_parts_add_up_and_none_is_more_than_it_takes(self, name, axes, job):
    plan = planned(chips.CHIPS[name], axes, job)
    self.assertAlmostEqual(
      plan.seconds, sum(part.seconds for part in plan.parts)
    )
    for part in plan.parts:
      self.assertGreaterEqual(part.seconds, 0)
      self.assertLessEqual(part.seconds, part.busy * (1 + 1e-9))
    self.assertLess(plan.utilisation, 1)

  @PROPERTY
  @hypothesis.given(CHIPS, MESHES, JOBS)
  def test_what_is_computed_again_saves_memory_and_costs_time(
    self, name, axes, job
  ):
    least, some, most = (
      planned(chips.CHIPS[name], axes, dataclasses.replace(job, recompute=kind))
      for kind in ("full", "mlp", "elementwise")
    )
    self.assertLessEqual(least.used, some.used)
    self.assertLessEqual(some.used, most.used)
    self.assertGreaterEqual(
      parts(least)["products"].busy, parts(some)["products"].busy
    )
    self.assertGreaterEqual(
      parts(some)["products"].busy, parts(most)["products"].busy
    )


if __name__ == "__main__":
  absltest.main()
