"""Model configuration and the attention grammar. Everything here is checked before anything is traced.

Axis letters, used as suffixes throughout: B batch, T query time, S key time, C model width, H query heads,
K key/value heads, D head size, V vocabulary, L layers.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from mgr_jax.problems import Problem, UserError, raise_if_any

MLP_KINDS = ("relu2", "gelu", "swiglu", "none", "tropical", "tropical_rational")
DTYPES = ("float32", "bfloat16")
VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class GPTConfig:
  """Static, hashable description of a GPT.

  Args:
    vocab_size: number of token ids; tables are padded to a multiple of 128 and the padding never gets probability.
    seq_len: training context, and the largest context that `generate` accepts.
    n_layer, n_head, n_kv_head, n_embd: depth, query heads, key/value heads, width. `n_kv_head` divides `n_head`.
    attention: the attention grammar, see `parse_attention`.
    mlp: one of `MLP_KINDS`, see `model.layers`.
    mlp_ratio: hidden width over `n_embd`; kinds with more matrices get fewer, so that all have as many parameters.
    mlp_beta: inverse temperature of tropical MLPs; 0 is the hard maximum.
    logit_softcap: c in c·tanh(z/c); 0 turns it off.
    rope_base: wavelength base of rotary position embedding.
    doc_mask: packed documents do not attend to each other.
    compute_dtype: dtype of activations and matrix products; parameters, norms, softmax, logits and loss are float32.
    remat: what the backward pass finds: `none`, all activations; `full`, the input of each layer, which is computed
      again; `every_K`, the input of every K-th layer (K near √n_layer needs least memory); `dots`, the products with
      weight matrices. All but `none` compute each layer once more, `dots` without those products.
    loss_chunk: tokens per cross-entropy chunk; 0 picks a chunk of about 4 Mi logits.

  Raises:
    UserError: with every problem found, each with a value that works.
  """

  vocab_size: int = 50304
  seq_len: int = 1024
  n_layer: int = 12
  n_head: int = 6
  n_kv_head: int = 6
  n_embd: int = 768
  attention: str = "standard"
  mlp: str = "relu2"
  mlp_ratio: float = 4.0
  mlp_beta: float = 0.0
  logit_softcap: float = 15.0
  rope_base: float = 10000.0
  doc_mask: bool = False
  compute_dtype: str = "float32"
  remat: str = "none"
  loss_chunk: int = 0

  def __post_init__(self):
    raise_if_any(config_problems(self))

  @property
  def head_dim(self) -> int:
    return self.n_embd // self.n_head

  @property
  def padded_vocab(self) -> int:
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

  @property
  def mlp_dim(self) -> int:
    return int(self.mlp_ratio * self.n_embd)


def config_problems(cfg) -> list[Problem]:
  """All problems of a `GPTConfig`, or of any object with its fields, that need no knowledge of mechanisms."""
  found = []
  for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_kv_head", "n_embd"):
    if getattr(cfg, name) < 1:
      found.append(Problem(f"--{name}={getattr(cfg, name)} is not positive", f"use --{name} of 1 or more"))
  if not found:
    found += _head_problems(cfg)
  for name, choices in (("mlp", MLP_KINDS), ("compute_dtype", DTYPES)):
    if getattr(cfg, name) not in choices:
      found.append(Problem(f"--{name}={getattr(cfg, name)} is unknown", f"use one of {', '.join(choices)}"))
  if not re.fullmatch(r"none|full|dots|every_[1-9]\d*", cfg.remat):
    found.append(Problem(f"--remat={cfg.remat} is unknown", "use none, full, dots, or e.g. every_4"))
  if cfg.mlp_ratio <= 0:
    found.append(Problem(f"--mlp_ratio={cfg.mlp_ratio} is not positive", "use --mlp_ratio=4"))
  if not 0 <= cfg.mlp_beta < math.inf:
    found.append(Problem(f"--mlp_beta={cfg.mlp_beta} is negative", "use 0 (hard maximum), or e.g. --mlp_beta=8"))
  if cfg.logit_softcap < 0:
    found.append(Problem(f"--logit_softcap={cfg.logit_softcap} is negative", "use 15, or 0 for no softcap"))
  if cfg.rope_base <= 1:
    found.append(Problem(f"--rope_base={cfg.rope_base} is not above 1", "use --rope_base=10000"))
  if cfg.loss_chunk < 0:
    found.append(Problem(f"--loss_chunk={cfg.loss_chunk} is negative", "use 0 (automatic) or a number of tokens"))
  try:
    layer_items(cfg.attention, max(1, cfg.n_layer))
  except UserError as e:
    found += e.problems
  return found


def _head_problems(cfg) -> list[Problem]:
  found = []
  width, heads = cfg.n_embd, cfg.n_head
  if width % heads:
    down, up = width // (2 * heads) * 2 * heads, -(-width // (2 * heads)) * 2 * heads
    widths = " or ".join(str(w) for w in (down, up) if w > 0)
    divisors = [h for h in range(1, width // 2 + 1) if width % h == 0 and (width // h) % 2 == 0]
    near = f", or --n_head={min(divisors, key=lambda h: abs(h - heads))}" if divisors else ""
    found.append(
      Problem(
        f"--n_embd={width} is not divisible by --n_head={heads}",
        f"use --n_embd={widths}{near} (the head size must also be even for RoPE)",
      )
    )
  elif (width // heads) % 2:
    found.append(
      Problem(
        f"head size {width // heads} (--n_embd={width} / --n_head={heads}) is odd; RoPE rotates pairs",
        f"use --n_embd={(width // heads + 1) * heads}",
      )
    )
  if heads % cfg.n_kv_head:
    divisors = [k for k in range(1, heads + 1) if heads % k == 0]
    found.append(
      Problem(
        f"--n_kv_head={cfg.n_kv_head} does not divide --n_head={heads}",
        f"use one of {', '.join(map(str, divisors))}",
      )
    )
  return found


class Item(NamedTuple):
  """One parsed element of the grammar: `name(inner, key=value, ...)`; `inner` only for wrappers."""

  name: str
  options: tuple[tuple[str, str], ...] = ()
  inner: "Item | None" = None

  def __str__(self) -> str:
    parts = ([str(self.inner)] if self.inner else []) + [f"{k}={v}" for k, v in self.options]
    return f"{self.name}({', '.join(parts)})" if parts else self.name


def parse_attention(text: str) -> tuple[Item, ...]:
  """Parses `item(,item)*` with `item = name | name(opt=value,...) | wrapper(item, opt=value,...)`, each maybe `*count`.

  `"standard*2,tropical(beta=8)"` gives three items. Names are not looked up here.

  Raises:
    UserError: unbalanced parentheses, empty items, malformed options or counts.
  """
  items: list[Item] = []
  for piece in _split(text, text):
    match = re.fullmatch(r"(.*?)(?:\*\s*(\S+))?", piece.strip(), re.S)
    body, times = match.group(1).strip(), match.group(2) or "1"
    if not re.fullmatch(r"[1-9]\d*", times):
      raise _syntax(text, f"count '*{times}' is not a positive integer", "write e.g. standard*2")
    items += [_parse_item(body, text)] * int(times)
  return tuple(items)


def _parse_item(body: str, text: str) -> Item:
  match = re.fullmatch(r"([A-Za-z_]\w*)\s*(?:\((.*)\))?", body, re.S)
  if not match:
    raise _syntax(text, f"{body!r} is not name or name(option=value, ...)", 'write e.g. --attention="braid(mode=word)"')
  name, inside = match.group(1), match.group(2)
  inner, options = None, []
  for i, part in enumerate(_split(inside, text) if inside and inside.strip() else []):
    key, eq, value = (s.strip() for s in part.partition("="))
    if eq and re.fullmatch(r"\w+", key) and value:
      options.append((key, value))
    elif i == 0 and "=" not in part.split("(")[0]:
      inner = _parse_item(part.strip(), text)
    else:
      raise _syntax(text, f"{part.strip()!r} is not option=value", f"write e.g. {name}(option=value)")
  if len({k for k, _ in options}) < len(options):
    raise _syntax(text, f"an option of {name} is given twice", "give each option once")
  return Item(name, tuple(options), inner)


def _split(text: str, whole: str) -> list[str]:
  """Splits at commas outside parentheses."""
  pieces, depth, start = [], 0, 0
  for i, c in enumerate(text):
    depth += (c == "(") - (c == ")")
    if depth < 0:
      break
    if c == "," and depth == 0:
      pieces.append(text[start:i])
      start = i + 1
  if depth:
    raise _syntax(whole, "unbalanced parentheses", "close every '(' with one ')'")
  pieces.append(text[start:])
  if not all(p.strip() for p in pieces):
    raise _syntax(whole, "an empty item", "remove the extra comma, or name a mechanism, e.g. --attention=standard")
  return pieces


def _syntax(text: str, what: str, fix: str) -> UserError:
  return UserError(Problem(f"--attention={text!r}: {what}", fix))


def layer_items(text: str, n_layer: int) -> tuple[Item, ...]:
  """The grammar tiled over `n_layer` layers.

  Raises:
    UserError: bad syntax, or a pattern longer than the stack.
  """
  items = parse_attention(text)
  if len(items) > n_layer:
    raise UserError(
      Problem(
        f"--attention={text!r} names {len(items)} layers but --n_layer={n_layer}",
        f"use --n_layer={len(items)} or a shorter pattern",
      )
    )
  return tuple(items[i % len(items)] for i in range(n_layer))


def nearest(name: str, known: Sequence[str]) -> str:
  """`'did you mean X? '` for the closest known name, or an empty string."""
  close = get_close_matches(name, known, n=1, cutoff=0.5)
  return f"did you mean {close[0]}? " if close else ""


def build_options(options_class: type, pairs: Sequence[tuple[str, str]], owner: str) -> Any:
  """Builds a frozen options dataclass from grammar strings, converting each to the type of its default.

  Raises:
    ValueError: unknown option (with the nearest and all known ones), unparsable value, or the class's own checks.
  """
  fields = {f.name: f for f in dataclasses.fields(options_class)}
  values = {}
  for key, raw in pairs:
    if key not in fields:
      raise ValueError(
        f"{owner} has no option {key!r}; {nearest(key, list(fields))}known options: {', '.join(fields) or 'none'}"
      )
    values[key] = _convert(raw, type(fields[key].default), f"{owner} option {key}={raw}")
  return options_class(**values)


def _convert(raw: str, kind: type, where: str):
  if kind is bool:
    if raw.lower() not in ("true", "false"):
      raise ValueError(f"{where} is not true or false")
    return raw.lower() == "true"
  try:
    return kind(raw)
  except ValueError:
    raise ValueError(f"{where} is not {'an integer' if kind is int else 'a number'}") from None
