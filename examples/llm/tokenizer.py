"""Text to tokens and back, by what a checkpoint carries.

The package `tokenizers` does the work; `jinja2` renders chats.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

# What a byte-level vocabulary splits text by, under GGUF's names for it.
_SPLITS = {
  "qwen2": (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  ),
  "llama-bpe": (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  ),
}
# Kinds of tokens of GGUF that text never makes by itself.
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary, and what a model says about its use.

  Attributes:
    vocabulary: of the package `tokenizers`.
    ends: the tokens that end an answer.
    bos: what a text begins with, if anything; chats say so themselves.
    template: of chats, in Jinja; without one, a prompt is text to go on with.
    names: of special tokens, for the template.
  """

  vocabulary: Any
  ends: frozenset[int]
  bos: int | None = None
  template: str | None = None
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def encode(self, text: str, bos: bool = True) -> list[int]:
    """Returns the tokens of a text.

    Args:
      text: where names of special tokens stand for these.
      bos: whether the text is one from its beginning.
    """
    tokens = self.vocabulary.encode(text, add_special_tokens=False).ids
    return [self.bos, *tokens] if bos and self.bos is not None else tokens

  def decode(self, tokens: Sequence[int]) -> str:
    """Returns the text of tokens, without special ones."""
    return self.vocabulary.decode(list(tokens))

  def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Returns the tokens of a conversation, up to where the answer begins.

    Args:
      messages: each with `role` and `content`.

    Raises:
      ValueError: if the model has no template for conversations.
    """
    if self.template is None:
      raise ValueError(
        "The checkpoint must have a chat template for conversations, but has"
        " none. Give it text to go on with (`--raw`)."
      )
    from jinja2 import sandbox

    def refuse(message):
      raise ValueError(f"The chat template refuses the messages: {message}")

    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=["jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = refuse
    text = environment.from_string(self.template).render(
      messages=list(messages), add_generation_prompt=True, **self.names
    )
    return self.encode(text, bos=False)


def from_folder(path: str | pathlib.Path) -> Tokenizer:
  """Reads `tokenizer.json` and the files beside it.

  Args:
    path: of the folder.

  Raises:
    FileNotFoundError: if there is no `tokenizer.json`.
  """
  import tokenizers

  path = pathlib.Path(path)
  file = path / "tokenizer.json"
  if not file.exists():
    raise FileNotFoundError(f"`{path}` must have a file `tokenizer.json`.")
  vocabulary = tokenizers.Tokenizer.from_file(str(file))

  def read(name: str) -> dict[str, Any]:
    there = (path / name).exists()
    text = (path / name).read_text(encoding="utf-8") if there else "{}"
    return json.loads(text)

  config = read("tokenizer_config.json")
  names = {}
  for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
    token = config.get(name)
    if token is not None:
      names[name] = token["content"] if isinstance(token, dict) else token
  ends = set()
  for name in ("generation_config.json", "config.json"):
    token = read(name).get("eos_token_id")
    ends |= set(token if isinstance(token, list) else [token])
  ends.add(vocabulary.token_to_id(names.get("eos_token", "")))
  # What the file puts before a text, if it is a single token.
  added = vocabulary.encode("").ids
  template = config.get("chat_template")
  if isinstance(template, list):  # several, by name
    named = {entry["name"]: entry["template"] for entry in template}
    template = named.get("default")
  if (path / "chat_template.jinja").exists():
    template = (path / "chat_template.jinja").read_text(encoding="utf-8")
  return Tokenizer(
    vocabulary,
    frozenset(ends - {None}),
    added[0] if added else None,
    template,
    names,
  )


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
  """Makes the tokenizer that the metadata of a GGUF file describes.

  Args:
    metadata: of a `gguf_file.File`.

  Raises:
    ValueError: if it is of a kind that is not here.
  """
  import tokenizers

  def get(name: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}", default)

  model, tokens, pre = get("model"), get("tokens"), get("pre", "default")
  if model == "gpt2":
    vocabulary = _byte_level(tokens, get("merges"), pre)
  elif model == "llama":
    space = get("add_space_prefix", True)
    vocabulary = _sentencepiece(tokens, get("scores"), space)
  else:
    raise ValueError(
      f"`tokenizer.ggml.model` must be `gpt2` or `llama`, but is `{model}`."
    )
  kinds = get("token_type") or ()
  for kind, add in (
    (_CONTROL, vocabulary.add_special_tokens),
    (_USER_DEFINED, vocabulary.add_tokens),
  ):
    add(
      [
        tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, its_kind in zip(tokens, kinds)
        if its_kind == kind
      ]
    )
  numbers = {
    f"{name}_token": get(f"{name}_token_id") for name in ("bos", "eos", "eot")
  }
  ends = {numbers["eos_token"], numbers["eot_token"]}
  begins = model == "llama" or pre == "llama-bpe"  # where the file is silent
  return Tokenizer(
    vocabulary,
    frozenset(ends - {None}),
    numbers["bos_token"] if get("add_bos_token", begins) else None,
    metadata.get("tokenizer.chat_template"),
    {name: tokens[i] for name, i in numbers.items() if i is not None},
  )


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: str) -> Any:
  """Makes a vocabulary of bytes, split as `pre` says."""
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

  whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
  if pre in _SPLITS:
    parts = [
      pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  elif pre == "smollm":
    parts = [pre_tokenizers.Digits(individual_digits=True), whole]
  elif pre in ("default", "gpt-2"):
    parts = [whole]
  else:
    known = ", ".join(["default", "gpt-2", "smollm", *_SPLITS])
    raise ValueError(
      f"`tokenizer.ggml.pre` must be one of {known}, but is `{pre}`."
    )
  tokenizer = Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in merges],
      # Llama 3 has words that its merges would not lead to.
      ignore_merges=pre == "llama-bpe",
    )
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(
  tokens: Sequence[str], scores: Sequence[float], space: bool
) -> Any:
  """Makes a vocabulary with scores, which say which merges come first."""
  from tokenizers import Tokenizer, decoders, models, normalizers

  vocab = {token: i for i, token in enumerate(tokens)}
  merges = [
    (-scores[i], vocab[token[:cut]], vocab[token[cut:]])
    for token, i in vocab.items()
    for cut in range(1, len(token))
    if token[:cut] in vocab and token[cut:] in vocab
  ]
  tokenizer = Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=[(tokens[a], tokens[b]) for _, a, b in sorted(merges)],
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  steps = [normalizers.Prepend(_SPACE)] if space else []
  tokenizer.normalizer = normalizers.Sequence(
    [*steps, normalizers.Replace(" ", _SPACE)]
  )
  strip = [decoders.Strip(" ", 1, 0)] if space else []
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  return tokenizer
