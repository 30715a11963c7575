"""Every parameter of flax.nnx's signatures, in its order."""

import importlib

from flax import nnx as flax_nnx
import pytest

import nnx
from tests.nnx.nn import comparison

LAYERS = {
  "Bidirectional": ("__init__", "__call__"),
  "BatchNorm": ("__init__", "__call__", "set_view"),
  "Conv": ("__init__", "__call__"),
  "ConvTranspose": ("__init__", "__call__"),
  "Dropout": ("__init__", "__call__", "set_view"),
  "Einsum": ("__init__", "__call__"),
  "Embed": ("__init__", "__call__", "attend"),
  "GRUCell": ("__init__", "__call__", "initialize_carry"),
  "GroupNorm": ("__init__", "__call__"),
  "InstanceNorm": ("__init__", "__call__"),
  "LSTMCell": ("__init__", "__call__", "initialize_carry"),
  "LayerNorm": ("__init__", "__call__"),
  "Linear": ("__init__", "__call__"),
  "LinearGeneral": ("__init__", "__call__"),
  "LoRA": ("__init__", "__call__"),
  "LoRALinear": ("__init__", "__call__"),
  "MultiHeadAttention": ("__init__", "__call__", "init_cache", "set_view"),
  "OptimizedLSTMCell": ("__init__", "__call__", "initialize_carry"),
  "PReLU": ("__init__", "__call__"),
  "RoPE": ("__init__", "__call__"),
  "RNN": ("__init__", "__call__"),
  "RNNCellBase": ("__call__", "initialize_carry"),
  "RMSNorm": ("__init__", "__call__"),
  "SimpleCell": ("__init__", "__call__", "initialize_carry"),
  "SpectralNorm": ("__init__", "__call__"),
  "WeightNorm": ("__init__", "__call__"),
}

# What ours take after Flax's parameters, spellings of Flax 0.10 among them; of
# those, what newer releases of Flax than the oldest have come first.
OWN = {
  "LoRA.__init__": ("kernel_init",),
  "LoRALinear.__init__": ("lora_kernel_init",),
  "MultiHeadAttention.__init__": (
    "window",
    "softcap",
    "rope_base",
    "rope_scale",
    "head_dim",
    "qk_norm",
    "rope_dim",
    "rope_interleaved",
    "rope_scaling",
    "is_causal",
  ),
  "MultiHeadAttention.__call__": (
    "input_positions",
    "lengths",
    "block_table",
    "step",
  ),
  "MultiHeadAttention.init_cache": (
    "per_sequence",
    "block_size",
    "blocks",
    "sharding",
  ),
  "dot_product_attention": ("window", "softcap"),
}

# Defaults that differ. A cache of ours has the dtype of its layer.
DEFAULTS = {"MultiHeadAttention.init_cache": {"dtype": None}}

FUNCTIONS = (
  "avg_pool",
  "combine_masks",
  "dot_product_attention",
  "dot_product_attention_with_rope",
  "make_attention_mask",
  "make_causal_mask",
  "max_pool",
  "min_pool",
  "pool",
)

# Where Flax's users import names from that `nnx` has as well.
MODULES = {
  "attention": (
    "MultiHeadAttention",
    "combine_masks",
    "dot_product_attention",
    "dot_product_attention_weights",
    "make_attention_mask",
    "make_causal_mask",
  ),
  "linear": ("Einsum", "Linear", "LinearGeneral", "default_kernel_init"),
  "normalization": (
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
  ),
  "recurrent": (
    "RNN",
    "Bidirectional",
    "GRUCell",
    "LSTMCell",
    "OptimizedLSTMCell",
    "RNNCellBase",
    "SimpleCell",
    "flip_sequences",
    "modified_orthogonal",
  ),
}

# Since Flax 0.12.12.
NEW = {"RoPE", "dot_product_attention_with_rope"}

ACTIVATIONS = (
  "celu",
  "elu",
  "gelu",
  "glu",
  "hard_sigmoid",
  "hard_silu",
  "hard_swish",
  "hard_tanh",
  "identity",
  "leaky_relu",
  "log_sigmoid",
  "log_softmax",
  "logsumexp",
  "one_hot",
  "relu",
  "relu6",
  "selu",
  "sigmoid",
  "silu",
  "soft_sign",
  "softmax",
  "softplus",
  "standardize",
  "swish",
  "tanh",
)


def skip_if_new(name):
  if name in NEW and not hasattr(flax_nnx, name):
    pytest.skip("this Flax does not have it yet")


@pytest.mark.parametrize(
  ("name", "method"),
  [(name, method) for name, methods in LAYERS.items() for method in methods],
)
def test_layers_take_the_parameters_of_flax(name, method):
  skip_if_new(name)
  comparison.assert_same_signature(
    getattr(getattr(nnx, name), method),
    getattr(getattr(flax_nnx, name), method),
    OWN.get(f"{name}.{method}", ()),
    DEFAULTS.get(f"{name}.{method}", {}),
  )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_the_parameters_of_flax(name):
  skip_if_new(name)
  comparison.assert_same_signature(
    getattr(nnx, name), getattr(flax_nnx, name), OWN.get(name, ())
  )


@pytest.mark.parametrize(
  ("module", "name"),
  [(module, name) for module, names in MODULES.items() for name in names],
)
def test_modules_have_the_names_of_flax(module, name):
  ours, theirs = (
    getattr(importlib.import_module(f"{library}.nn.{module}"), name)
    for library in ("nnx", "flax.nnx")
  )
  assert callable(ours) and callable(theirs)
  assert ours is getattr(nnx, name, ours)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_jax(name):
  assert getattr(nnx, name) is getattr(flax_nnx, name)


def test_initializers_are_those_of_jax():
  for name, value in vars(flax_nnx.initializers).items():
    if callable(value) and getattr(value, "__module__", "").startswith("jax."):
      assert getattr(nnx.initializers, name) is value, name
  assert nnx.initializers.zeros_init() is nnx.initializers.zeros
  assert nnx.initializers.ones_init() is nnx.initializers.ones
