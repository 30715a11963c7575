"""Traces name the Modules in which operations are, and their arguments."""

import functools
import re
import threading

import jax
import jax.numpy as jnp
import pytest

import nnx

X = jnp.ones((4, 4))
linear = functools.partial(nnx.Linear, 4, 4)


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.query = linear(rngs=rngs)

  def __call__(self, x):
    return self.query(x)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.attn = Attention(rngs)
    self.mlp = {"down": linear(rngs=rngs)}

  def __call__(self, x):
    return self.mlp["down"](self.attn(x))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.blocks = nnx.List([Block(rngs) for _ in range(2)])
    self.head = nnx.Sequential(linear(rngs=rngs), jax.nn.relu)

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return self.head(x)

  def encode(self, x):
    return self.blocks[1].attn(x)


def dots(function, *args) -> list[str]:
  """Returns where the matrix products of a compiled program say they are."""
  text = function.lower(*args).compile().as_text()
  names = re.findall(r'op_name="jit\([^)]*\)/([^"]*)/dot_general"', text)
  return list(dict.fromkeys(names))


EVERY = [
  "Net/blocks_0/attn/query",
  "Net/blocks_0/mlp/down",
  "Net/blocks_1/attn/query",
  "Net/blocks_1/mlp/down",
  "Net/head/layers_0",
]


@pytest.fixture
def net():
  return Net(nnx.Rngs(0))


def test_under_nnx_jit(net):
  assert sorted(dots(nnx.jit(lambda model, x: model(x)), net, X)) == EVERY


def test_a_module_that_is_jitted_itself(net):
  assert sorted(dots(nnx.jit(net), X)) == EVERY


def test_under_plain_jit(net):
  graphdef, state = nnx.split(net)
  pure = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
  assert sorted(dots(pure, state, X)) == EVERY
  assert sorted(dots(jax.jit(lambda x: net(x)), X)) == EVERY


def test_what_no_module_calls_is_named_by_the_arguments(net):
  by_method = nnx.jit(lambda model, x: model.encode(x))
  assert dots(by_method, net, X) == ["Net/blocks_1/attn/query"]
  by_hand = nnx.jit(lambda pair, x: pair["model"].blocks[0].mlp["down"](x))
  assert dots(by_hand, {"model": net}, X) == ["Net/blocks_0/mlp/down"]


def test_a_training_step(net):
  def loss(model, x):
    return jnp.sum(model(x) ** 2)

  text = nnx.jit(nnx.grad(loss)).lower(net, X).as_text(debug_info=True)
  for name in EVERY:
    path = name.removeprefix("Net")
    assert f"/jvp(Net){path}/dot_general" in text
    assert f"/transpose(jvp(Net)){path}/dot_general" in text


def test_transforms_inside_know_which_module_a_copy_is_of(net):
  def remat(model, x):
    return nnx.remat(Block.__call__)(model.blocks[1], x)

  class Outer(nnx.Module):
    def __init__(self, net):
      self.net = net

    def __call__(self, x):
      return nnx.remat(lambda block, x: block(x))(self.net.blocks[1], x)

  assert dots(nnx.jit(remat), net, X)[0].endswith("Net/blocks_1/attn/query")
  name = dots(nnx.jit(lambda model, x: model(x)), Outer(net), X)[0]
  assert name == "Outer/checkpoint/net/blocks_1/attn/query"


def test_scanned_layers():
  @nnx.vmap
  def make(rngs):
    return Attention(rngs)

  class Stack(nnx.Module):
    def __init__(self, rngs):
      self.layers = make(rngs.fork(split=3))

    def __call__(self, x):
      @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
      def run(layer, x):
        return layer(x)

      return run(self.layers, x)

  model = Stack(nnx.Rngs(0))
  (name,) = dots(nnx.jit(lambda model, x: model(x)), model, X)
  assert name.startswith("Stack/while/body/")
  assert name.endswith("/layers/query")


def test_what_is_compiled_once_has_no_name_of_one_of_its_callers():
  inner = nnx.jit(lambda module, x: module(x))

  class Two(nnx.Module):
    def __init__(self, rngs):
      self.a, self.b = Attention(rngs), Attention(rngs)

    def __call__(self, x):
      return inner(self.b, inner(self.a, x))

  model = Two(nnx.Rngs(0))
  found = dots(nnx.jit(lambda model, x: model(x)), model, X)
  assert found == ["Two/jit(<lambda>)/Attention/query"]


def test_a_module_that_has_moved_is_named_by_its_new_place(net):
  @nnx.jit
  def swap(model, x):
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]
    first = model.blocks[0]
    model.other = first.attn
    return model.blocks[0].mlp["down"](x)

  # Arguments are named as they came in.
  assert dots(swap, net, X) == ["Net/blocks_1/mlp/down"]

  class Moves(nnx.Module):
    def __init__(self, rngs):
      self.a = linear(rngs=rngs)

    def __call__(self, x):
      self.b = self.a
      del self.a
      return self.b(x)

  model = Moves(nnx.Rngs(0))
  assert dots(nnx.jit(lambda model, x: model(x)), model, X) == ["Moves/b"]


def test_what_is_nowhere_has_the_name_of_its_class(net):
  class Lonely(nnx.Module):
    def __call__(self, x):
      return linear(rngs=nnx.Rngs(0))(x)

  assert dots(jax.jit(lambda x: Lonely()(x)), X) == ["Lonely/Linear"]


def test_other_threads_and_errors_leave_nothing_behind(net):
  def raises(x):
    with pytest.raises(ValueError):
      net(x[:, :3])
    return net.blocks[0](x)

  assert dots(jax.jit(raises), X)[0] == "Block/attn/query"
  seen = []

  def trace():
    seen.append(dots(jax.jit(lambda x: net.blocks[0](x)), X))

  def run(x):
    thread = threading.Thread(target=trace)
    thread.start()
    thread.join()
    return x

  class Holder(nnx.Module):
    def __call__(self, x):
      return run(x)

  jax.jit(lambda x: Holder()(x))(X)
  assert seen[0][0] == "Block/attn/query"


def test_can_be_switched_off(net):
  with nnx.set_named_scopes(False):
    text = nnx.jit(Net.__call__).lower(net, X).as_text(debug_info=True)
  assert "blocks_0" not in text
  assert nnx.set_named_scopes.current_value()


def test_nothing_is_named_outside_of_traces(net, monkeypatch):
  entered = []
  named_scope = jax.named_scope
  monkeypatch.setattr(
    jax, "named_scope", lambda name: entered.append(name) or named_scope(name)
  )
  net(X)
  assert not entered


def test_arguments_are_named_by_their_paths(net):
  lowered = nnx.jit(lambda model, x: model(x)).lower(net, X)
  text = lowered.as_text(debug_info=True)
  for name in ("model.blocks[0].attn.query.kernel", "x"):
    assert f'loc("{name}")' in text
  compiled = lowered.compile().as_text()
  assert 'op_name="model.blocks[1].attn.query.bias"' in compiled
  assert "leaves" not in text


def test_errors_say_where_outside_of_transforms_too(net):
  where = "Raised in `blocks[0].attn.query`, a Linear, of a `Net`."
  with pytest.raises(ValueError) as error:
    net(X[:, :3])
  assert where in error.value.__notes__
  with pytest.raises(ValueError) as error:
    jax.jit(lambda x: net(x))(X[:, :3])
  assert error.value.__notes__.count(where) == 1


def test_a_call_that_is_assigned_later_works(net):
  class Late(nnx.Module):
    pass

  Late.__call__ = lambda self, x: x + 1
  assert Late()(1) == 2
  assert jax.jit(lambda x: Late()(x))(1) == 2
