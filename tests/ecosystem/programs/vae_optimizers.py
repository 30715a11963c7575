"""Trains a VAE with an optimizer for each half, and a loss that it sows."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Loss(nnx.Variable):
  pass


class Encoder(nnx.Module):
  def __init__(self, *, rngs: nnx.Rngs):
    # No bias: what the norm takes away has a gradient of rounding errors.
    self.conv = nnx.Conv(1, 8, (3, 3), strides=2, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
    self.mean = nnx.Linear(4 * 4 * 8, 4, rngs=rngs)
    self.std = nnx.Linear(4 * 4 * 8, 4, rngs=rngs)
    self.rngs = rngs

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1)
    mean, std = self.mean(x), jnp.exp(self.std(x))
    self.kl = Loss(0.5 * jnp.mean(-jnp.log(std**2) - 1.0 + std**2 + mean**2))
    self.sow(nnx.Intermediate, "latent", mean)
    return mean + std * jax.random.normal(self.rngs.noise(), mean.shape)


class Decoder(nnx.Module):
  def __init__(self, *, rngs: nnx.Rngs):
    self.dense = nnx.Linear(4, 4 * 4 * 8, rngs=rngs)
    self.group = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
    self.up = nnx.ConvTranspose(8, 1, (3, 3), strides=(2, 2), rngs=rngs)
    self.head = nnx.Sequential(
      nnx.Dropout(0.1, rngs=rngs), nnx.PReLU(), lambda x: x * 2.0
    )

  def __call__(self, z):
    x = nnx.silu(self.dense(z)).reshape(-1, 4, 4, 8)
    return self.head(self.up(self.group(x)))


class VAE(nnx.Module):
  def __init__(self, *, rngs: nnx.Rngs):
    self.encoder = Encoder(rngs=rngs)
    self.decoder = Decoder(rngs=rngs)

  def __call__(self, x):
    return self.decoder(self.encoder(x))


OF_ENCODER = nnx.All(nnx.Param, nnx.PathContains("encoder"))
OF_DECODER = nnx.All(nnx.Param, nnx.PathContains("decoder"))
model = VAE(rngs=nnx.Rngs(0, noise=1))
optimizers = {
  "encoder": nnx.Optimizer(model.encoder, optax.adam(1e-2), wrt=nnx.Param),
  "decoder": nnx.Optimizer(model.decoder, optax.rmsprop(1e-3), wrt=nnx.Param),
}
X = jax.random.bernoulli(jax.random.key(0), 0.3, (16, 8, 8, 1)).astype(float)


@nnx.jit
def step(model, optimizers, x):
  def loss(model):
    logits = model(x)
    kl = sum(jax.tree.leaves(nnx.pop(model, Loss)), 0.0)
    means = nnx.pop(model, nnx.Intermediate)
    fit = optax.sigmoid_binary_cross_entropy(logits, x).mean()
    return fit + 0.1 * kl, {"fit": fit, "kl": kl, "means": means}

  (value, aux), grads = nnx.value_and_grad(loss, has_aux=True)(model)
  for name, optimizer in optimizers.items():
    optimizer.update(getattr(model, name), grads[name])
  return value, aux


losses = []
for _ in range(8):
  value, aux = step(model, optimizers, X)
  losses.append([float(value), float(aux["fit"]), float(aux["kl"])])

# Once more with half of it frozen, by a filter in place of a part.
frozen = nnx.Optimizer(model, optax.sgd(0.1), wrt=OF_DECODER)


@nnx.jit
def tune(model, optimizer, x):
  grads = nnx.grad(
    lambda m: jnp.mean((m(x) - x) ** 2), argnums=nnx.DiffState(0, OF_DECODER)
  )(model)
  optimizer.update(model, grads)
  nnx.pop(model, (Loss, nnx.Intermediate))
  return optax.global_norm(grads)


before = jax.tree.leaves(nnx.state(model, OF_ENCODER))
norms = [float(tune(model, frozen, X)) for _ in range(3)]
after = jax.tree.leaves(nnx.state(model, OF_ENCODER))
model.eval()
nnx.reseed(model, noise=5)
print(
  json.dumps(
    {
      "losses": losses,
      "norms": norms,
      "encoder kept": all((a == b).all() for a, b in zip(before, after)),
      "sown": np.asarray(aux["means"]["encoder"]["latent"][0]).tolist(),
      "averages": np.asarray(model.encoder.norm.mean[...]).tolist(),
      "output": np.asarray(nnx.jit(lambda m: m(X))(model)).ravel().tolist(),
    }
  )
)
