"""Uses all of `nnx` where `kernels`, `bridge` and `tools` are not ours."""

import importlib
import pkgutil

import flax.linen as nn
import jax
import jax.numpy as jnp

import nnx

for package in (nnx, nnx.kernels, nnx.bridge):
  names = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
  for module in names:
    if not module.name.rpartition(".")[2].startswith("_"):
      importlib.import_module(module.name)

x = jnp.ones((8, 4))
norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
nnx.grad(lambda norm, x: norm(x).sum())(norm, x)

attention = nnx.MultiHeadAttention(
  2, 8, decode=True, deterministic=True, rngs=nnx.Rngs(0)
)
attention.init_cache((1, 16, 8))
step = nnx.jit(lambda attention, x: attention(x))
assert step(attention, jnp.ones((1, 1, 8))).shape == (1, 1, 8)

cache = jnp.zeros((1, 16, 2, 8))
row = jnp.ones((1, 1, 2, 8))
nnx.kernels.decode_attention(
  cache, cache, row, row, row, 0, implementation="cpu"
)
assert nnx.kernels.explain(lambda x: nnx.clone(norm)(x), x)
nnx.tabulate(norm, x)

dense = nnx.bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(0))
dense = nnx.bridge.lazy_init(dense, x)
linen = nnx.bridge.to_linen(nnx.Linear, 4, 2)
linen.apply(linen.init(jax.random.key(0), x), x)
