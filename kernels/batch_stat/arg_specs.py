"""Shapes of real models' batch-norm layers, for tests and benchmarks alike."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """One batch-norm layer.

  Attributes:
    name: `<batch>x<height>x<width>x<channels>`.
    shape: Of its input, features last.
    count: How often it occurs in the model.
  """

  name: str
  shape: tuple[int, int, int, int]
  count: int


# ResNet-50 v1.5 (He et al. 2015, table 1, with the stride on the 3x3
# convolution) at 224 x 224: (height = width, channels, how many such layers).
_RESNET50 = (
  (112, 64, 1),
  (56, 64, 6),
  (56, 128, 1),
  (56, 256, 4),
  (28, 128, 7),
  (28, 256, 1),
  (28, 512, 5),
  (14, 256, 11),
  (14, 512, 1),
  (14, 1024, 7),
  (7, 512, 5),
  (7, 2048, 4),
)


def resnet50(batch: int) -> tuple[LayerSpec, ...]:
  """Returns ResNet-50's batch-norm layers for a batch size.

  Args:
    batch: Number of images.

  Example:
    >>> from kernels.batch_stat import arg_specs
    >>> layers = arg_specs.resnet50(8)
    >>> layers[0].name, sum(layer.count for layer in layers)
    ('8x112x112x64', 53)
  """
  return tuple(
    LayerSpec(f"{batch}x{size}x{size}x{c}", (batch, size, size, c), count)
    for size, c, count in _RESNET50
  )


# What the bench measures: a batch that keeps forward and backward of the
# largest layer within a few hundred megabytes.
BENCH_LAYERS = resnet50(16)

# The same channels with a batch and images that tests can afford.
TEST_LAYERS = tuple(
  LayerSpec(f"2x{size}x{size}x{c}", (2, size, size, c), 1)
  for size, c in ((14, 64), (7, 256), (7, 512), (3, 2048))
)
