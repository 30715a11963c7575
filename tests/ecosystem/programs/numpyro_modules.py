"""Infers a network's weights, by a point and by a distribution, in numpyro."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpyro
from numpyro import distributions as dist
from numpyro.contrib.module import nnx_module, random_nnx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(3, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.second = nnx.Linear(8, 1, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.norm(self.first(x))))[..., 0]


X = jax.random.normal(jax.random.key(0), (64, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5])


def observe(net):
  with numpyro.plate("points", X.shape[0]):
    numpyro.sample("y", dist.Normal(net(X), 0.1), obs=Y)


def point():
  observe(nnx_module("net", Net(nnx.Rngs(0))))


def bayesian():
  prior = {"first.kernel": dist.Normal(), "second.bias": dist.Normal()}
  observe(random_nnx_module("net", Net(nnx.Rngs(0)), prior=prior))


def losses(model, guide):
  svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
  result = svi.run(jax.random.key(1), 20, progress_bar=False)
  return result.losses.tolist()


print(
  json.dumps(
    {
      "losses": losses(point, lambda: None),
      "losses, random weights": losses(bayesian, AutoNormal(bayesian)),
    }
  )
)
