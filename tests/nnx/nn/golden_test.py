"""Layouts of each layer's State, so that no checkpoint changes silently.

Regenerate with

    NNX_REGENERATE=1 python -m pytest tests/nnx/nn/golden_test.py
"""

import json
import os
import pathlib

from flax import nnx as flax_nnx
import jax.numpy as jnp
import pytest

import nnx
from tests.nnx.nn import comparison

GOLDEN = pathlib.Path("tests/golden/layers.json")
COMMAND = "NNX_REGENERATE=1 python -m pytest tests/nnx/nn/golden_test.py"


def decoder(library):
  layer = library.MultiHeadAttention(
    4,
    8,
    num_kv_heads=2,
    normalize_qk=True,
    dropout_rate=0.1,
    decode=True,
    rngs=library.Rngs(0),
  )
  layer.init_cache((2, 5, 8), jnp.bfloat16)
  return layer


def linear(library):
  return library.Linear(3, 4, rngs=library.Rngs(0))


def own_decoder(library):
  layer = library.MultiHeadAttention(
    4,
    8,
    num_kv_heads=2,
    window=3,
    softcap=50.0,
    rope_base=10000.0,
    decode=True,
    rngs=library.Rngs(0),
  )
  layer.init_cache((2, 5, 8), jnp.int8, per_sequence=True)
  return layer


LAYERS = {
  "BatchNorm": lambda lib: lib.BatchNorm(3, rngs=lib.Rngs(0)),
  "Conv": lambda lib: lib.Conv(
    3, 4, (2, 5), mask=jnp.ones((2, 5, 3, 4)), rngs=lib.Rngs(0)
  ),
  "ConvTranspose": lambda lib: lib.ConvTranspose(
    3, 4, 2, transpose_kernel=True, rngs=lib.Rngs(0)
  ),
  "Dropout": lambda lib: lib.Dropout(0.5, rngs=lib.Rngs(0)),
  "Einsum": lambda lib: lib.Einsum(
    "na,ab->nb", (3, 4), (4,), param_dtype=jnp.bfloat16, rngs=lib.Rngs(0)
  ),
  "Embed": lambda lib: lib.Embed(5, 3, rngs=lib.Rngs(0)),
  "GroupNorm": lambda lib: lib.GroupNorm(6, 2, rngs=lib.Rngs(0)),
  "GRUCell": lambda lib: lib.GRUCell(3, 4, rngs=lib.Rngs(0)),
  "InstanceNorm": lambda lib: lib.InstanceNorm(3, rngs=lib.Rngs(0)),
  "LSTMCell": lambda lib: lib.LSTMCell(3, 4, rngs=lib.Rngs(0)),
  "LayerNorm": lambda lib: lib.LayerNorm(3, rngs=lib.Rngs(0)),
  "Linear": linear,
  "LinearGeneral": lambda lib: lib.LinearGeneral(
    (2, 3), (4, 5), axis=(1, -1), rngs=lib.Rngs(0)
  ),
  "LoRA": lambda lib: lib.LoRA(
    3, 2, 4, base_module=linear(lib), rngs=lib.Rngs(0)
  ),
  "LoRALinear": lambda lib: lib.LoRALinear(3, 4, lora_rank=2, rngs=lib.Rngs(0)),
  "MultiHeadAttention": decoder,
  "OptimizedLSTMCell": lambda lib: lib.OptimizedLSTMCell(
    3, 4, rngs=lib.Rngs(0)
  ),
  "PReLU": lambda lib: lib.PReLU(),
  "RNN": lambda lib: lib.RNN(lib.SimpleCell(3, 4, rngs=lib.Rngs(0))),
  "RMSNorm": lambda lib: lib.RMSNorm(3, rngs=lib.Rngs(0)),
  "Sequential": lambda lib: lib.Sequential(linear(lib), lib.relu, linear(lib)),
  "SpectralNorm": lambda lib: lib.SpectralNorm(linear(lib), rngs=lib.Rngs(0)),
  "WeightNorm": lambda lib: lib.WeightNorm(linear(lib), rngs=lib.Rngs(0)),
}


# With options that Flax does not have.
OWN = {"MultiHeadAttention, own options": own_decoder}


def layout_of(name):
  make = (LAYERS | OWN)[name]
  return comparison.layout(nnx.state(make(nnx)), nnx)


@pytest.fixture(scope="module")
def golden():
  if os.environ.get("NNX_REGENERATE"):
    layouts = {name: layout_of(name) for name in sorted(LAYERS | OWN)}
    lines = json.dumps(layouts, indent=2, sort_keys=True)
    GOLDEN.write_text(lines + "\n", encoding="utf-8")
  return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LAYERS | OWN)
def test_state_is_as_it_was(name, golden):
  assert layout_of(name) == golden.get(name), (
    f"The State of `{name}` is not what tests/golden/layers.json holds, so that"
    " older checkpoints no longer load. If that is meant, say so in"
    f" CHANGELOG.md and run: {COMMAND}"
  )


@pytest.mark.parametrize("name", LAYERS)
def test_state_is_that_of_flax(name, golden):
  theirs = LAYERS[name](flax_nnx)
  if name == "WeightNorm":
    theirs = comparison.with_param_scales(theirs)
  assert comparison.layout(flax_nnx.state(theirs), flax_nnx) == golden[name]


def test_all_of_the_file_is_tested(golden):
  assert sorted(golden) == sorted(LAYERS | OWN)
