"""Serves an exported program over HTTP; it knows neither `nnx` nor the model.

    python server.py FILE

prints the port it listens on. What is posted to it are images, `[b, 8, 8, 1]`
float32 as bytes; it answers with their labels, as JSON. `serve.py` starts it.
"""

from http import server
import json
import pathlib
import sys

from jax import export
import numpy as np

PROGRAM = export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))


class Handler(server.BaseHTTPRequestHandler):
  """Answers requests, one after another."""

  def do_POST(self) -> None:
    """Reads images, and writes what the program says of them."""
    body = self.rfile.read(int(self.headers["Content-Length"]))
    images = np.frombuffer(body, np.float32).reshape(-1, 8, 8, 1)
    labels = np.asarray(PROGRAM.call(images)).tolist()
    self.send_response(200)
    self.end_headers()
    self.wfile.write(json.dumps(labels).encode())

  def log_message(self, *_) -> None:
    """Says nothing of each request."""


if __name__ == "__main__":
  with server.HTTPServer(("localhost", 0), Handler) as running:
    print(running.server_port, flush=True)
    running.serve_forever()
