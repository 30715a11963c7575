"""The rows of a run without options: what one would ask of each suite first."""

from collections.abc import Sequence
import itertools

from tools.bench import harness, suites

SECONDS = 240.0
# Of these, what rows may take: a table and a plot come after.
ROWS_SECONDS = SECONDS - 15.0

# By suite, what matters most first: a slow machine does not come to the last.
_ROWS = {
  "batch_stat": (
    "batch_norm_fwd_bwd/16x28x28x128/float32",
    "batch_norm_fwd/16x56x56x64/bfloat16",
    "batch_norm_fwd_bwd_residual/16x7x7x2048/bfloat16",
    "update/16x56x56x128/bfloat16",
    "batch_norm_fwd_bwd_small_16/32x1x1x512/float32",
  ),
  "kv_cache": (
    "update/llama_3_2_1b_B8_S4096_H8_D64_per_sequence/bfloat16",
    "update_16/llama_3_1_8b_B4_S512_H8_D128_per_sequence/bfloat16",
    "update_int8/llama_3_2_1b_B8_S4096_H8_D64_per_sequence/int8",
    "update_layer/llama_3_2_1b_stacked_L16_B4_S2048_H8_D64_per_sequence"
    "/bfloat16",
  ),
  "decode": (
    "step/B8_S2048_H16_D64_full/bfloat16",
    "step/B8_S2048_H16_D64_first/float32",
    "step/B8_S2048_H16_D64_full/int8",
    "step/llama_3_1_8b_speculative/bfloat16",
  ),
  "matmul": (
    "product/1x2048x8192/bfloat16",
    "product/1x2048x8192/int8",
    "product/8x2048x8192/bfloat16",
    "product/1x2048x8192/float32",
  ),
  "graph": (
    "jit_noop/real_layers",
    "split/real_layers",
    "jit_write_all/100",
    "var_write/100",
    "import_time/process",
    "jit_round_robin/60_models",
  ),
  "train_step": (
    "step/5_blocks",
    "compile_scan/24_layers",
  ),
  "bridge": (
    "to_nnx_call/jitted_batch_norm_train",
    "to_linen_apply/jitted_dense",
  ),
  "layers": (
    "eager_linear/32x64/float32",
    "eager_attention/1x16x64/float32",
    "eager_batch_norm/32x64/float32",
    "build_transformer/24 layers",
  ),
  "generate": (
    "token_by_token/example, 32 tokens after 1024/float32",
    "one_program/example, 32 tokens after 1024/float32",
  ),
  # The quickest, as no row starts that may take as long as the longest has.
  "train": ("gpt_1m/12x64/float32",),
}


def settings(repeats: int | None = None) -> harness.Settings:
  """Returns settings of a short run at full sizes.

  Args:
    repeats: samples of each side; None for a few.
  """
  return harness.Settings(
    repeats=repeats or 5, sample_seconds=0.03, row_seconds=3.0
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: the first of every suite, then the second, and so on.

  Args:
    settings: decides on the shapes.

  Raises:
    KeyError: if a suite has no row of a name.
  """
  by_suite = []
  for name, rows in _ROWS.items():
    table = {case.label: case for case in suites.cases(name, settings)}
    by_suite.append([table[f"{name}/{row}"] for row in rows])
  return [
    case
    for turn in itertools.zip_longest(*by_suite)
    for case in turn
    if case is not None
  ]
