"""The fuzzers' oracle of attention against the one of a query at a time."""

from absl.testing import absltest
import numpy as np

from tests.fuzz import kernels_attention, kernels_oracle
from tests.kernels.decode_attention import oracle


class OracleTest(absltest.TestCase):
  def test_two_oracles_agree(self):
    for seed in range(60):
      rng = np.random.default_rng(seed)
      problem = kernels_attention.draw_problem(rng)
      size = problem.b * problem.n * problem.g * problem.t * problem.capacity
      if size > 8000:
        continue
      args, index, kwargs = kernels_attention.draw_arrays(rng, problem)
      counts = kwargs.pop("lengths", np.full(problem.b, problem.t))
      static = {k: v for k, v in problem.static.items() if k != "out_dtype"}
      if "rope_cos" in kwargs:
        # Rows of the tables for all positions: the other one does not clip.
        rows = 10 * problem.capacity + 50
        angles = rng.normal(size=(rows, kwargs["rope_cos"].shape[1]))
        kwargs["rope_cos"], kwargs["rope_sin"] = np.cos(angles), np.sin(angles)
        kwargs["rope_positions"] = rng.integers(0, rows, (problem.b, problem.t))
      args = [np.asarray(x).astype(np.float32) for x in args[:3]]
      want, want_lse = oracle.attend(*args, index, counts, **static, **kwargs)
      got = kernels_oracle.attend(*args, index, counts, **static, **kwargs)
      with self.subTest(seed=seed):
        scale = np.abs(want).max(initial=1e-300)
        np.testing.assert_allclose(
          got.out / scale, want / scale, rtol=1e-9, atol=1e-11
        )
        np.testing.assert_allclose(got.lse, want_lse, rtol=1e-9, atol=1e-9)


if __name__ == "__main__":
  absltest.main()
