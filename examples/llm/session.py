"""Requests as lines of JSON, and what becomes of them; see `serve`."""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import queue
import threading
from typing import Any, TextIO

from examples.llm import sampling, serving, tokenizer

_SAMPLING = tuple(field.name for field in dataclasses.fields(sampling.Sampling))
_KNOWN = {"id", "prompt", "messages", "tokens", "stop", *_SAMPLING}


def parse(line: Mapping[str, Any], text: tokenizer.Tokenizer) -> Any:
  """Makes a request of a line.

  Args:
    line: the parsed JSON: a `prompt` (a chat's only message) or `messages`, and
      what may come with them: `tokens`, `stop` and the names of `Sampling`.
    text: the model's tokenizer.

  Raises:
    ValueError: if something is unknown, or missing.
  """
  unknown = sorted(set(line) - _KNOWN)
  if unknown:
    raise ValueError(
      f"A request must have no other keys than {', '.join(sorted(_KNOWN))}, but"
      f" has {', '.join(unknown)}."
    )
  if ("prompt" in line) == ("messages" in line):
    raise ValueError("A request must have either `prompt` or `messages`.")
  if "prompt" in line and not text.template:
    prompt = text.encode(line["prompt"])
  elif "prompt" in line:
    prompt = text.chat([{"role": "user", "content": line["prompt"]}])
  else:
    prompt = text.chat(line["messages"])
  stops = line.get("stop", [])
  return serving.Request(
    prompt,
    line.get("tokens", 256),
    sampling.Sampling(**{k: line[k] for k in _SAMPLING if k in line}),
    [stops] if isinstance(stops, str) else stops,
  )


class Session:
  """Requests of one input, answered on one output.

  Args:
    server: that answers.
    text: the model's tokenizer.
    output: where lines are written to.
  """

  def __init__(
    self, server: serving.Server, text: tokenizer.Tokenizer, output: TextIO
  ):
    self._server = server
    self._text = text
    self._output = output
    self._answers: dict[Any, serving.Answer] = {}

  def take(self, line: str) -> None:
    """Takes a line of input.

    Args:
      line: of JSON; a blank one is nothing.
    """
    if not line.strip():
      return
    name = None
    try:
      values = json.loads(line)
      if not isinstance(values, dict):
        raise ValueError(f"A line must be an object, but got {line.strip()}.")
      if "cancel" in values:
        answer = self._answers.get(values["cancel"])
        if answer is not None:  # or it has ended
          self._server.cancel(answer)
        return
      name = values.get("id")
      if name is None or name in self._answers:
        raise ValueError(
          "`id` must be there, and be that of no answer that goes on, but got"
          f" {json.dumps(name)}."
        )
      self._answers[name] = self._server.submit(parse(values, self._text))
    except (TypeError, ValueError) as error:
      self._write({"id": name, "error": str(error)})

  def write(self) -> None:
    """Writes what there is of all answers."""
    for name, answer in list(self._answers.items()):
      text = "".join(answer.pieces)
      answer.pieces.clear()
      if text:
        self._write({"id": name, "text": text})
      if answer.reason is not None:
        del self._answers[name]
        done = {"done": answer.reason, "tokens": len(answer.tokens)}
        self._write({"id": name, **done})

  def run(self, lines: Iterable[str]) -> None:
    """Answers until the input ends, and all answers have.

    Args:
      lines: of input; they are read in a thread of their own, so that waiting
        for one holds up no answer.
    """
    arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read():
      for line in lines:
        arrived.put(line)
      arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    more = True
    while more or not self._server.idle:
      while more and (self._server.idle or not arrived.empty()):
        line = arrived.get()
        more = line is not None
        if line is not None:
          self.take(line)
          self.write()  # what was cancelled while nothing else runs
      self._server.step()
      self.write()

  def _write(self, values: Mapping[str, Any]) -> None:
    print(json.dumps(values), file=self._output, flush=True)
