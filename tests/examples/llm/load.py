"""A load of requests that come and go, for a server on any devices."""

import random
from typing import Any

import jax

from examples.llm import generate, sampling, serving, weights
from tests.examples.llm import tiny

POSITIONS = 64
BLOCKS, BLOCK_SIZE = 24, 4
TEXTS, CHUNK = 4, 16
# Beginnings that requests share.
_PREFIXES = ([7] * 3 + list(range(20)), list(range(30, 45)), [])


def model(values):
  """A model of a made checkpoint."""
  return weights.load(tiny.Checkpoint(values), POSITIONS)


def server(model: Any, **options: Any) -> serving.Server:
  """A server whose pool is too small for all texts at once.

  Args:
    model: that writes.
    **options: of `serving.Server`, in place of those here.
  """
  options = {
    "blocks": BLOCKS,
    "block_size": BLOCK_SIZE,
    "texts": TEXTS,
    "chunk": CHUNK,
  } | options
  return serving.Server(model, tiny.Letters(), **options)


def requests(count: int, seed: int) -> list[serving.Request]:
  """Draws requests of many lengths, some with a common beginning.

  Args:
    count: how many.
    seed: of the numbers.
  """
  numbers = random.Random(seed)
  result = []
  for _ in range(count):
    prefix = numbers.choice(_PREFIXES)
    own = [numbers.randrange(63) for _ in range(numbers.randint(1, 20))]
    most = numbers.randint(1, 20)
    result.append(serving.Request([*prefix, *own], most))
  return result


def expected(writer: generate.Writer, request: serving.Request) -> list[int]:
  """What a request gets alone."""
  return list(
    writer.write(
      request.prompt,
      sampling.Sampling(),
      most=request.most,
      ends=tiny.Letters.ends,
    )
  )


def serve(server: serving.Server, seed: int) -> list[serving.Answer]:
  """Submits 32 requests at random times and cancels some of them.

  Args:
    server: that answers.
    seed: of times and requests.

  Returns:
    The answers, all of which have ended.
  """
  numbers = random.Random(seed)
  left = requests(32, seed)
  answers: list[serving.Answer] = []
  while left or not server.idle:
    while left and numbers.random() < 0.4:
      answers.append(server.submit(left.pop()))
    if answers and numbers.random() < 0.08:
      server.cancel(numbers.choice(answers))
    server.step()
  return answers


def check(test, server, writer, seed):
  """Serves a load; each text must be what it is alone, and nothing is left.

  Args:
    test: a test case.
    server: that answers.
    writer: of the same model.
    seed: of the load: one of whose tokens none is nearer to another than 1e-3,
      since steps of other sizes may round otherwise.
  """
  compiled = []

  def listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    answers = serve(server, seed)
    # That it would have been heard.
    test.assertEmpty(compiled)
    jax.jit(lambda x: 3 * x + seed)(1.0).block_until_ready()
    test.assertNotEmpty(compiled)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  test.assertLen(answers, 32)
  cancelled = 0
  for answer in answers:
    text = expected(writer, answer.request)
    if answer.reason == serving.CANCELLED:
      cancelled += 1
      text = text[: len(answer.tokens)]
    test.assertEqual(answer.tokens, text)
    test.assertEqual("".join(answer.pieces), tiny.Letters().decode(text))
  counters = server.counters
  test.assertEqual(counters.cancelled, cancelled)
  test.assertGreater(cancelled, 2)
  test.assertEqual(counters.ended, 32 - cancelled)
  test.assertGreater(counters.shared_tokens, 0)
  test.assertGreater(counters.most_blocks, BLOCKS // 2)
  test.assertEqual(server.blocks.free, BLOCKS)
