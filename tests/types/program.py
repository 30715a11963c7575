"""What the type checkers must know of a user's program; never run.

`types_test.py` has mypy check it, and tools/check.sh has pyright.
"""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

import kernels
import nnx


class Block(nnx.Module):
  def __init__(self, size: int, *, rngs: nnx.Rngs):
    self.linear = nnx.Linear(size, size, rngs=rngs)
    self.scale = nnx.Param(jnp.ones(size))
    self.calls = nnx.Variable(0)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.linear(x) * self.scale[...]

  @nnx.jit
  def double(self, x: jax.Array) -> jax.Array:
    return 2 * self(x)


block = Block(4, rngs=nnx.Rngs(0))
x = jnp.ones((2, 4))

# Variables.
assert_type(block.scale, nnx.Param[jax.Array])
assert_type(block.scale.value, jax.Array)
assert_type(block.scale[...], jax.Array)
assert_type(block.scale[0], jax.Array)
assert_type(block.scale.raw_value, jax.Array)
assert_type(block.scale.get_value(), jax.Array)
assert_type(block.scale.copy(), nnx.Param[jax.Array])
assert_type(block.calls, nnx.Variable[int])
assert_type(block.calls.value, int)
assert_type(nnx.BatchStat(x).value, jax.Array)
assert_type(block.linear.kernel, nnx.Param[jax.Array])
assert_type(block.linear.bias, nnx.Param[jax.Array] | None)
assert_type(nnx.LoRA(4, 2, 4, rngs=nnx.Rngs(0)).lora_a.value, jax.Array)
block.scale.value = x
block.scale[...] = x
block.scale[0] = 1.0
block.scale += 1.0
shape: tuple[int, ...] = block.scale.shape
scaled: jax.Array = block.scale * x
scaled = x * block.scale


# Transforms keep what they transform.
def loss(model: Block, x: jax.Array, power: int = 2) -> jax.Array:
  return jnp.mean(model(x) ** power)


def check_signature(f: Callable[[Block, jax.Array], jax.Array]) -> None: ...


assert_type(nnx.jit(loss)(block, x), jax.Array)
assert_type(nnx.jit(static_argnames="power")(loss)(block, x), jax.Array)
assert_type(nnx.jit(loss).lower(block, x).compile()(block, x), jax.Array)
assert_type(nnx.jit(loss).eval_shape(block, x), jax.Array)
assert_type(nnx.jit_partial(loss, block)(x), jax.Array)
assert_type(nnx.vmap(loss, in_axes=(None, 0))(block, x), jax.Array)
assert_type(nnx.vmap(in_axes=(None, 0))(loss)(block, x), jax.Array)
assert_type(nnx.remat(loss)(block, x), jax.Array)
assert_type(nnx.remat(prevent_cse=False)(loss)(block, x), jax.Array)
assert_type(nnx.value_and_grad(loss)(block, x), tuple[jax.Array, Any])
assert_type(nnx.value_and_grad(argnums=1)(loss)(block, x)[0], jax.Array)
assert_type(nnx.grad(loss)(block, x), Any)
assert_type(nnx.grad(has_aux=True)(loss)(block, x), Any)
assert_type(block.double(x), jax.Array)
check_signature(nnx.jit(loss))
check_signature(nnx.jit(donate_argnums=1)(loss))
check_signature(nnx.vmap(loss))
check_signature(nnx.remat(loss))


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def stack(rngs: nnx.Rngs) -> Block:
  return Block(4, rngs=rngs)


assert_type(stack(nnx.Rngs(0)), Block)


def step(carry: jax.Array, block: Block) -> tuple[jax.Array, jax.Array]:
  return block(carry), carry


assert_type(nnx.scan(step)(x, block), tuple[jax.Array, jax.Array])
assert_type(
  nnx.scan(in_axes=(nnx.Carry, 0))(step)(x, block), tuple[jax.Array, jax.Array]
)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(
  model: Block, optimizer: nnx.Optimizer[Block], x: jax.Array
) -> jax.Array:
  value, grads = nnx.value_and_grad(loss)(model, x)
  optimizer.update(model, grads)
  return value


mesh = jax.sharding.Mesh(jax.devices(), ("data",))
sharded = nnx.shard_map(loss, mesh=mesh, in_specs=None, out_specs=None)
assert_type(sharded(block, x), jax.Array)
check_signature(sharded)


@nnx.shard_map(mesh=mesh, in_specs=None, out_specs=None)
def on_shards(model: Block, x: jax.Array) -> jax.Array:
  return model(x)


@nnx.custom_vjp
def clipped(model: Block, x: jax.Array) -> jax.Array:
  return model(x)


@nnx.custom_vjp(nondiff_argnums=(1,))
def scaled_by(model: Block, factor: float) -> jax.Array:
  return model.scale[...] * factor


assert_type(on_shards(block, x), jax.Array)
assert_type(clipped(block, x), jax.Array)
assert_type(scaled_by(block, 2.0), jax.Array)
clipped.defvjp(lambda model, x: (model(x), None), lambda _, g: (g, g))
assert_type(nnx.quantize(block, bits=4), Block)
# The layer itself is replaced, by one of another class.
assert_type(nnx.quantize(block.linear), Any)

optimizer = nnx.Optimizer(block, optax.adam(0.1), wrt=nnx.Param)
assert_type(train_step(block, optimizer, x), jax.Array)
assert_type(optimizer.step.value, jax.Array)

# What is wrong is seen.
nnx.jit(loss)(block, "x")  # type: ignore[arg-type]
nnx.jit(static_argnums="power")  # type: ignore[arg-type]
nnx.remat(loss)(x)  # type: ignore[call-arg, arg-type]
print(nnx.no_such_name)  # type: ignore[attr-defined]

clipped(block)  # type: ignore[call-arg]
on_shards(x, x)  # type: ignore[arg-type]
# At run time jax takes a Variable, but `jax.typing.ArrayLike` names classes and
# has no protocol, so the checkers ask for the value.
jnp.sum(block.scale)  # type: ignore[arg-type]
assert_type(jnp.sum(block.scale[...]), jax.Array)
jnp.dot(block.scale.value, x)

# The graph functions.
graphdef, state = nnx.split(block)
assert_type(graphdef, nnx.GraphDef[Block])
assert_type(state, nnx.State)
assert_type(nnx.merge(graphdef, state), Block)
graphdef, params, rest = nnx.split(block, nnx.Param, ...)
assert_type(params, nnx.State)
assert_type(nnx.merge(graphdef, params, rest), Block)
graphdef, params, stats, rest = nnx.split(block, nnx.Param, nnx.BatchStat, ...)
assert_type(stats, nnx.State)
graphdef, params, stats, keys, rest = nnx.split(
  block, nnx.Param, nnx.BatchStat, nnx.RngState, ...
)
assert_type(nnx.split_state(state, ...), nnx.State)
params, rest = nnx.split_state(state, nnx.Param, ...)
assert_type(rest, nnx.State)
assert_type(nnx.filter_state(state, nnx.Param), nnx.State)
assert_type(state.filter(nnx.Param), nnx.State)
params, rest = state.split(nnx.Param, ...)
assert_type(nnx.state(block), nnx.State)
assert_type(nnx.state(block, nnx.Param), nnx.State)
params, rest = nnx.state(block, nnx.Param, nnx.BatchStat)
assert_type(nnx.graphdef(block), nnx.GraphDef[Block])
assert_type(nnx.clone(block), Block)
assert_type(nnx.eval_shape(lambda: Block(4, rngs=nnx.Rngs(0))), Block)

# Containers.
blocks = nnx.List([block, block])
assert_type(blocks, nnx.List[Block])
assert_type(blocks[0], Block)
assert_type(blocks[:1], list[Block])
assert_type(nnx.Dict(a=block)["a"], Block)
for each in blocks:
  assert_type(each, Block)

# Layers and streams.
assert_type(block.linear(x), jax.Array)
assert_type(nnx.Rngs(0).params(), jax.Array)

# Packages that are called, or imported when they are asked for.
cache_k, cache_v, out = kernels.decode_attention(x, x, x, x, x, 0)
assert_type(out, jax.Array)
assert_type(nnx.kernels.decode_attention(x, x, x, x, x, 0)[0], jax.Array)
print(nnx.kernels.kv_cache.no_such_name)  # type: ignore[attr-defined]
merge: Callable[..., Any] = kernels.decode_attention.merge
kernels.decode_attention(x, x, x, x, x, 0, typo=1)  # type: ignore[call-arg]
linen = nnx.bridge.to_linen(nnx.Linear, 4, 4)
print(nnx.bridge.no_such_name)  # type: ignore[attr-defined]
