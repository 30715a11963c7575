"""How ops are defined, chosen, batched, split, differentiated and explained."""

from concurrent import futures
import sysconfig
from unittest import mock

from absl.testing import absltest
import jax
from jax import export, lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import kernels
from kernels.common import arrays, dispatch, libraries
from tests.testing import devices, hlo

devices.use_cpu_devices(8)


def _reference(x, *, k):
  return x * k, jnp.sum(x, 0)


def _cpu(x, *, k):
  # Tells itself apart by a constant that changes nothing.
  return lax.max(x, -1234.5) * k, jnp.sum(x, 0)


def _batch(op, args, dims, *, k):
  (x,), size = arrays.move_batch_to_front(args, dims)
  rows = [op(x[i], k=k) for i in range(size)]
  return [jnp.stack(out) for out in zip(*rows)], (0, 0)


def _partition(mesh, infos, results, call, *, k):
  del mesh, results
  spec = (*infos[0].sharding.spec, None, None)[:2]

  def local(x):
    y, total = call(x, k=k)
    return y, total if spec[0] is None else lax.psum(total, spec[0])

  return local, (P(*spec), P(spec[1])), (P(*spec),)


TOY = dispatch.Op(
  "dispatch_test_toy",
  abstract_eval=lambda x, *, k: (
    arrays.out_aval(x.shape, x.dtype, x),
    arrays.out_aval(x.shape[1:], x.dtype, x),
  ),
  reference=_reference,
  implementations=(
    dispatch.Implementation(
      name="cpu",
      platforms=("cpu",),
      fn=_cpu,
      unsupported=lambda avals, k: "`k` is 13" if k == 13 else None,
      slower=lambda avals, k: (
        "`x` is small"
        if (arrays.static_size(avals[0].shape) or 99) < 9
        else None
      ),
    ),
    dispatch.Implementation(
      name="missing",
      platforms=("cuda",),
      fn=_cpu,
      library=libraries.Library("kernels.common.no_such_extension", {}),
    ),
  ),
  batching=_batch,
  partitioning=dispatch.Partitioning(
    rule=lambda avals, k: ("n c -> n c, c", ()), partition=_partition
  ),
)

REFUSING = dispatch.Op(
  "dispatch_test_refusing",
  abstract_eval=lambda x: (arrays.out_aval(x.shape, x.dtype, x),),
  reference=lambda x: (x + 1,),
  not_differentiable="`x` must be constant: this op has no gradient.",
)

X = jnp.arange(64.0).reshape(16, 4)


def _ran_cpu(*args, **options):
  text = jax.jit(lambda x: TOY(x, **options)).lower(*args).as_text()
  return "1234.5" in text or "-1.2345" in text


class DispatchTest(absltest.TestCase):
  def test_auto_takes_the_platforms_implementation(self):
    self.assertTrue(_ran_cpu(X, k=2))

  def test_auto_takes_the_reference_where_it_is_faster(self):
    self.assertFalse(_ran_cpu(X[:2], k=2))
    (choice,) = kernels.explain(TOY, X[:2], k=2, platform="cpu")
    self.assertEqual(choice.implementation, "xla")
    self.assertEqual(choice.reason, "cpu is not used because `x` is small.")

  def test_auto_takes_the_reference_where_nothing_else_fits(self):
    self.assertFalse(_ran_cpu(X, k=13))

  def test_a_named_implementation_is_taken_even_if_slower(self):
    self.assertTrue(_ran_cpu(X[:2], k=2, implementation="cpu"))
    self.assertFalse(_ran_cpu(X, k=2, implementation="xla"))

  def test_a_named_implementation_that_does_not_fit_is_refused(self):
    with self.assertRaisesRegex(ValueError, "cannot be used here: `k` is 13"):
      TOY(X, k=13, implementation="cpu")

  def test_unknown_implementation_is_refused(self):
    with self.assertRaisesRegex(ValueError, "auto, xla, cpu, missing, but got"):
      TOY(X, k=2, implementation="gpu")

  def test_implementation_of_another_platform_is_refused(self):
    run = jax.jit(lambda x: TOY(x, k=3, implementation="cpu"))
    with self.assertRaisesRegex(ValueError, "runs on cpu, but the program is"):
      export.export(run, platforms=("cpu", "tpu"))(X)

  def test_missing_extension_is_named(self):
    (choice,) = kernels.explain(TOY, X, k=2, platform="cuda")
    self.assertIn("no_such_extension could not be imported", choice.reason)
    table = kernels.implementations()["dispatch_test_toy"]
    self.assertEqual(table["xla"], "every platform")
    self.assertEqual(table["cpu"], "cpu")
    self.assertIn("could not be imported", table["missing"])

  def test_one_artifact_serves_all_platforms(self):
    (n,) = export.symbolic_shape("n")
    exported = export.export(
      jax.jit(lambda x: TOY(x, k=3)), platforms=("cpu", "cuda", "tpu")
    )(jax.ShapeDtypeStruct((n, 4), "float32"))
    y, total = export.deserialize(exported.serialize()).call(X)
    np.testing.assert_array_equal(y, X * 3)
    np.testing.assert_array_equal(total, X.sum(0))

  def test_vmap_goes_through_the_rule(self):
    got = jax.vmap(lambda x: TOY(x, k=2)[1])(X.reshape(2, 8, 4))
    np.testing.assert_array_equal(got, X.reshape(2, 8, 4).sum(1))

  def test_derivatives_come_from_the_reference(self):
    grad = jax.grad(lambda x: TOY(x, k=3)[0].sum() + TOY(x, k=3)[1][0])(X)
    np.testing.assert_array_equal(grad, np.full((16, 4), 3) + np.eye(4)[0])

  def test_refused_derivative_is_a_sentence(self):
    with self.assertRaisesRegex(TypeError, "`x` must be constant: this op"):
      jax.grad(lambda x: REFUSING(x)[0].sum())(X)

  def test_explain_sees_into_inner_functions(self):
    def step(carry, x):
      return carry, jax.jit(lambda x: TOY(x, k=2)[1])(x)

    choices = kernels.explain(lambda x: lax.scan(step, 0.0, x), X[None])
    self.assertEqual([c.op for c in choices], ["dispatch_test_toy"])

  def test_xla_only_is_for_what_is_lowered_inside(self):
    with kernels.xla_only():
      self.assertFalse(_ran_cpu(X, k=2))
      self.assertFalse(_ran_cpu(X, k=2, implementation="cpu"))
      with self.assertRaises(ZeroDivisionError), kernels.xla_only():
        raise ZeroDivisionError
      self.assertFalse(_ran_cpu(X, k=2))
      with futures.ThreadPoolExecutor(1) as pool:
        self.assertTrue(pool.submit(_ran_cpu, X, k=2).result())
    self.assertTrue(_ran_cpu(X, k=2))
    # Compiled inside without `jit`, and not found again.
    with self.assertRaisesRegex(ValueError, "cannot be used here: `k` is 13"):
      with kernels.xla_only():
        TOY(X, k=13, implementation="cpu")
      TOY(X, k=13, implementation="cpu")

  def test_threads_may_load_libraries_at_once(self):
    with futures.ThreadPoolExecutor(8) as pool:
      tables = list(pool.map(lambda _: kernels.implementations(), range(16)))
    for table in tables:
      self.assertEqual(table, tables[0])
    kernels.register()

  def test_free_threaded_python_gets_no_extension(self):
    library = libraries.Library("kernels.common.no_such_extension", {})
    variables = sysconfig.get_config_vars()
    with mock.patch.dict(variables, {"Py_GIL_DISABLED": 1}):
      self.assertIn("this one is free-threaded", library.missing())
    self.assertIn("No module named", library.missing())

  def test_targets_with_a_version_may_be_exported(self):
    libraries.Library("kernels.none", {"promised_1": "f", "not_promised": "g"})

    def call(target):
      return lambda x: jax.ffi.ffi_call(target, x)(x)

    export.export(jax.jit(call("promised_1")))(X)
    with self.assertRaisesRegex(ValueError, "no compatibility guarantees"):
      export.export(jax.jit(call("not_promised")))(X)


class ShardingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  def test_jit_splits_by_the_rule(self):
    mesh = devices.auto_mesh((8,), ("a",))
    x = jax.device_put(X, NamedSharding(mesh, P("a")))
    compiled = jax.jit(lambda x: TOY(x, k=3)).lower(x).compile()
    y, total = compiled(x)
    np.testing.assert_array_equal(total, X.sum(0))
    self.assertTrue(y.sharding.is_equivalent_to(x.sharding, 2))
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-gather"))

  def test_results_vary_like_their_inputs_in_shard_map(self):
    mesh = devices.auto_mesh((8,), ("a",))

    def run(x):
      y, total = TOY(x, k=3)
      self.assertEqual(arrays.varying_axes(jax.typeof(total)), {"a"})
      (one,) = arrays.vary_like(x, jnp.ones(()))
      self.assertEqual(arrays.varying_axes(jax.typeof(one)), {"a"})
      return y, lax.psum(total, "a")

    mapped = jax.shard_map(
      run, mesh=mesh, in_specs=P("a"), out_specs=(P("a"), P())
    )
    np.testing.assert_array_equal(mapped(X)[1], X.sum(0))


if __name__ == "__main__":
  absltest.main()
