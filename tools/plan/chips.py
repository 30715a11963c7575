"""Devices: what is promised, what is reached, and who says so.

What a device reaches is a fraction of what is promised. The fractions come from
the kept results of the benchmark where they exist, else from published
measurements of single kernels, else they are assumed, and say so. None was
chosen by looking at the times of whole steps in `published.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from tools.plan import fabric as fabric_lib
from tools.plan import measured, refusal


@dataclasses.dataclass(frozen=True)
class Rate:
  """Something a second.

  Example:
    >>> Rate(100.0, 0.5, "a guess").reached
    50.0

  Attributes:
    promised: by who made the device.
    fraction: of it that is reached.
    source: of both.
  """

  promised: float
  fraction: float
  source: str

  @property
  def reached(self) -> float:
    """What is reached."""
    return self.promised * self.fraction


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device.

  Attributes:
    name: what it is called.
    memory: bytes.
    products: operations a second of products of matrices, by dtype.
    attention: operations a second of attention over whole sequences.
    copy: bytes a second of elementwise work, such as the optimizer's.
    weights: bytes a second of a product of few rows, which reads its matrix.
    cache: bytes a second at which attention reads a cache, by dtype.
    norms: bytes a second of norms and of what is fused with them.
    kernel: seconds that a kernel takes at least.
    training_host: seconds of the host for each Variable of a training step.
    calling_host: the same of a step that updates none.
    queued: whether the host works while the device does.
    fabric: what connects such devices.
  """

  name: str
  memory: float
  products: Mapping[str, Rate]
  attention: Rate
  copy: Rate
  weights: Rate
  cache: Mapping[str, Rate]
  norms: Rate
  kernel: float
  training_host: float
  calling_host: float
  queued: bool
  fabric: fabric_lib.Fabric

  def product_rate(self, dtype: str) -> Rate:
    """Returns the operations a second of products in a dtype."""
    if dtype not in self.products:
      raise refusal.Refused(
        f"{self.name} multiplies in {', '.join(self.products)}, but not in"
        f" `{dtype}`."
      )
    return self.products[dtype]

  def cache_rate(self, dtype: str) -> Rate:
    """Returns the bytes a second of reading a cache of a dtype."""
    if dtype not in self.cache:
      raise refusal.Refused(
        f"A cache on {self.name} is of {', '.join(self.cache)}, but not of"
        f" `{dtype}`."
      )
    return self.cache[dtype]


_KEPT = "tools/bench/results/gpu/h200.json"
_BOOK = "Austin et al., How to Scale Your Model, 2025"
_NVLINK = (
  "450 GB/s promised, 370 measured by all-reduce on 8 H100 (" + _BOOK + ","
  " GPUs); latencies: NCCL's own model (src/graph/tuning.cc, protocol LL)"
)
_INFINIBAND = (
  "400 Gb/s a GPU promised; the fraction that NVLink reaches assumed;"
  " latencies as there"
)
_MATMUL = (
  "largest product measured in Bekman, Machine Learning Engineering, 2025"
)
_FLASH = (
  "Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608): forward 0.62 to 0.75"
  " on H100; with the gradient 0.55 assumed"
)

# What our kernels reach on an H200 of its promised bandwidth.
_H200_BANDWIDTH = 4.8e12
_DECODE = "decode/B8_S32768_N8_G4_H128/"


def _kept(row: str) -> float:
  return measured.kernel_bandwidth(row) / _H200_BANDWIDTH


def _moving(bandwidth: float, source: str) -> dict:
  """Returns the rates that are all fractions of a device's bandwidth.

  Args:
    bandwidth: bytes a second that are promised.
    source: who promises, and whether the fractions are this device's own.
  """
  copy = measured.copy_bandwidth() / _H200_BANDWIDTH
  wide = Rate(bandwidth, _kept(_DECODE + "bfloat16"), source)
  return {
    "copy": Rate(bandwidth, copy, source),
    "weights": Rate(bandwidth, copy, source),
    "cache": {
      "bfloat16": wide,
      "float16": wide,
      "float32": Rate(
        bandwidth, _kept("decode/B4_S32768_N8_G4_H128/float32"), source
      ),
      "int8": Rate(bandwidth, _kept(_DECODE + "int8"), source),
      "float8": Rate(bandwidth, _kept(_DECODE + "float8_e4m3fn"), source),
    },
    "norms": Rate(bandwidth, _kept("batch_norm/65536x1024/float32"), source),
  }


def _host() -> dict:
  return {
    "training_host": measured.host_seconds(training=True),
    "calling_host": measured.host_seconds(training=False),
    "queued": True,
  }


def _hopper(
  name: str, memory: float, bandwidth: float, float8: float, moving: str
) -> Chip:
  sheet = f"NVIDIA {name} datasheet"
  promised = 989.4e12
  wide = Rate(promised, 0.803, f"{sheet}; {_MATMUL}")
  narrow = Rate(2 * promised, float8, f"{sheet}; {_MATMUL}")
  return Chip(
    name=name,
    memory=memory,
    products={
      "bfloat16": wide,
      "float16": wide,
      "float8": narrow,
      "int8": narrow,
    },
    attention=Rate(promised, 0.55, _FLASH),
    **_moving(bandwidth, f"{sheet}; {moving}"),
    kernel=measured.kernel_seconds(),
    **_host(),
    fabric=fabric_lib.Switched(
      group=8,
      inner=fabric_lib.Link(370e9, 0.6e-6, 3.3e-6, _NVLINK),
      outer=fabric_lib.Link(50e9 * 370 / 450, 2.7e-6, 3.3e-6, _INFINIBAND),
    ),
  )


def _tpu(
  name: str,
  memory: float,
  bandwidth: float,
  promised: float,
  int8: float,
  array: int,
  shape: tuple[int, ...],
  wraps: int,
  link: float,
  chips_of_host: int,
) -> Chip:
  page = f"Google Cloud, TPU {name}, 2025"
  products = {
    "bfloat16": Rate(promised, 0.9, f"{page}; 0.9 assumed"),
  }
  if int8 > promised:
    products["int8"] = Rate(int8, 0.9, f"{page}; 0.9 assumed")
  return Chip(
    name=name,
    memory=memory,
    products=products,
    # Heads of 128 fill one side of the array that multiplies.
    attention=Rate(
      promised,
      0.5 * 128 / array,
      f"0.5 assumed, of what heads of 128 fill of an array of {array}",
    ),
    **_moving(
      bandwidth,
      f"{page}; the fractions are those of an H200 ({_KEPT}), assumed",
    ),
    kernel=1e-6,
    **_host(),
    fabric=fabric_lib.Torus(
      shape=shape,
      wraps=wraps,
      link=fabric_lib.Link(link, 1e-6, 1e-6, f"{_BOOK}, TPUs"),
      outer=fabric_lib.Link(
        25e9 / chips_of_host,
        10e-6,
        10e-6,
        f"25 GB/s a host, {_BOOK}; latencies assumed",
      ),
    ),
  )


CHIPS = {
  "h100": _hopper(
    "H100", 80e9, 3.35e12, 0.709, f"fractions of an H200 ({_KEPT})"
  ),
  "h200": _hopper("H200", 141e9, _H200_BANDWIDTH, 0.734, _KEPT),
  "v4": _tpu(
    "v4", 32 * 2**30, 1.2e12, 275e12, 275e12, 128, (16, 16, 16), 4, 45e9, 4
  ),
  "v5e": _tpu(
    "v5e", 16 * 2**30, 0.819e12, 197e12, 394e12, 128, (16, 16), 16, 45e9, 8
  ),
  "v5p": _tpu(
    "v5p", 95 * 2**30, 2.765e12, 459e12, 918e12, 128, (16, 20, 28), 4, 90e9, 4
  ),
  "v6e": _tpu(
    "v6e", 32 * 2**30, 1.64e12, 918e12, 1836e12, 256, (16, 16), 16, 90e9, 8
  ),
}


def change(chip: Chip, text: str) -> Chip:
  """Returns a chip with some of its numbers replaced.

  Args:
    chip: whose.
    text: NAME=NUMBER,...; of a rate the fraction that is reached, of a link
      LINK.FIELD, of anything else its value.

  Example:
    >>> change(CHIPS["h200"], "attention=0.3,inner.hop=1e-6").attention.fraction
    0.3
  """
  new: Any
  for item in filter(None, text.split(",")):
    fabric: Any = chip.fabric
    name, _, number = item.partition("=")
    try:
      value = float(number)
      if "." in name:
        link, field = name.split(".")
        links = {
          link: dataclasses.replace(getattr(fabric, link), **{field: value})
        }
        chip = dataclasses.replace(
          chip, fabric=dataclasses.replace(fabric, **links)
        )
        continue
      old = getattr(chip, name)
      if isinstance(old, Rate):
        new = dataclasses.replace(old, fraction=value)
      elif isinstance(old, Mapping):
        new = {
          dtype: dataclasses.replace(rate, fraction=value)
          for dtype, rate in old.items()
        }
      elif isinstance(old, float):
        new = value
      else:
        raise TypeError
    except (AttributeError, TypeError, ValueError):
      names = [
        field.name
        for field in dataclasses.fields(chip)
        if field.name not in ("name", "queued", "fabric")
      ]
      raise refusal.Refused(
        f"Numbers of {chip.name} are written as NAME=NUMBER,... with names of"
        f" {', '.join(names)}, or as {_links(chip)[0]}.bandwidth, .hop or"
        f" .start, but got `{item}`."
      ) from None
    chip = dataclasses.replace(chip, **{name: new})
  return chip


def _links(chip: Chip) -> list[str]:
  return [
    name for name in ("inner", "link", "outer") if hasattr(chip.fabric, name)
  ]


def sources(chip: Chip) -> list[tuple[str, str, str]]:
  """Returns of each number of a chip its name, its value and its source."""
  rates = {
    **{f"products, {dtype}": rate for dtype, rate in chip.products.items()},
    "attention": chip.attention,
    "copy": chip.copy,
    "weights": chip.weights,
    **{f"cache, {dtype}": rate for dtype, rate in chip.cache.items()},
    "norms": chip.norms,
  }
  found = [
    (name, f"{rate.promised / 1e12:.4g} T/s x {rate.fraction:.3f}", rate.source)
    for name, rate in rates.items()
  ]
  for name in _links(chip):
    link = getattr(chip.fabric, name)
    words = f"{link.bandwidth / 1e9:.4g} GB/s, {link.hop * 1e6:.3g} us a hop"
    found.append((f"network, {name}", words, link.source))
  return found
