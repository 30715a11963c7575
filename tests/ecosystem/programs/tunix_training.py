"""Adapts a small Llama with LoRA, then aligns it by DPO, with tunix."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer, utils
from tunix.sft.dpo import dpo_trainer

CONFIG = llama3.ModelConfig(
  num_layers=2,
  vocab_size=64,
  embed_dim=32,
  hidden_dim=64,
  num_heads=4,
  head_dim=8,
  num_kv_heads=2,
  rope_theta=10_000,
  norm_eps=1e-5,
)
TOKENS = np.asarray(jax.random.randint(jax.random.key(0), (4, 16), 1, 64))
ONES = np.ones((4, 8), np.int32)


def make():
  model = llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))
  positions = jnp.arange(16)[None].repeat(4, 0)
  mask = jnp.tril(jnp.ones((16, 16), bool))[None].repeat(4, 0)
  return qwix.apply_lora_to_model(
    model,
    qwix.LoraProvider(module_path=".*q_proj|.*kv_proj", rank=4, alpha=8.0),
    input_tokens=jnp.asarray(TOKENS),
    positions=positions,
    cache=None,
    attention_mask=mask,
    rngs=nnx.Rngs(1),
  )


def inputs(given):
  mask = given.input_tokens != 0
  return {
    "input_tokens": given.input_tokens,
    "input_mask": mask,
    "positions": utils.build_positions_from_mask(mask),
    "attention_mask": utils.make_causal_attn_mask(mask),
  }


def params(model):
  return {
    "/".join(map(str, path)): np.asarray(param[...], np.float32).tolist()
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
  }


model = make()
before = params(model)
given = peft_trainer.TrainingInput(
  input_tokens=TOKENS, input_mask=np.ones_like(TOKENS)
)
peft_trainer.PeftTrainer(
  model,
  optax.sgd(0.1),
  peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=3),
).with_gen_model_input_fn(inputs).train([given] * 3)

policy = make()
preference = dpo_trainer.TrainingInput(
  prompt_ids=TOKENS[:, :8],
  prompt_mask=ONES,
  chosen_ids=TOKENS[:, 8:],
  chosen_mask=ONES,
  rejected_ids=TOKENS[::-1, 8:].copy(),
  rejected_mask=ONES,
)
dpo_trainer.DPOTrainer(
  policy,
  make(),
  optax.sgd(0.1),
  dpo_trainer.DPOTrainingConfig(eval_every_n_steps=100, max_steps=2),
).train([preference] * 2)
after = params(model)
assert before.keys() == after.keys() and before != after
print(json.dumps({"LoRA": after, "DPO": params(policy)}))
