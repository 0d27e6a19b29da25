"""Settings, model, data and tokenizer of a run, checked together before anything is compiled or written."""

import dataclasses
import math
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgr_jax import conformance, optim, schedules
from mgr_jax.attention import model_problems
from mgr_jax.config import GPTConfig
from mgr_jax.data import stream
from mgr_jax.data import tokenizer as tokenizer_lib
from mgr_jax.data.builtin import builtin_corpus, cache_dir
from mgr_jax.data.corpus import Corpus, load_corpus
from mgr_jax.data.tokenizer import Tokenizer
from mgr_jax.flops import peak_flops
from mgr_jax.model import annealing, gpt
from mgr_jax.model.cellular_init import cellular_problems, cellular_specs
from mgr_jax.params import is_spec
from mgr_jax.problems import Problem, UserError, raise_if_any
from mgr_jax.step import gradient_flops, init_key, make_train_step, model_flops, optimizer_flops
from train.flags import Settings, arguments_of, profiled_steps, setting_problems
from train.parallel import Placement, make_placement
from train.samples import prompt_problems


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run that can start: `steps` updates of `cfg` on `corpus`."""

  settings: Settings
  cfg: GPTConfig
  corpus: Corpus
  tokenizer: Tokenizer
  steps: int
  placement: Placement
  warnings: tuple[Problem, ...]

  @property
  def data_shards(self) -> int:
    """Streams of data that all processes read together."""
    return self.settings.data_shards or jax.process_count()

  @property
  def inputs(self) -> tuple[str, ...]:
    """What a step reads of a batch."""
    return ("tokens", "targets", "segment_ids") if self.cfg.doc_mask else ("tokens", "targets")

  @property
  def tokens_per_step(self) -> int:
    return self.settings.batch_size * self.settings.seq_len

  @property
  def flops_per_token(self) -> float:
    """FLOPs of the gradient."""
    return gradient_flops(self.cfg, 1) / self.cfg.seq_len

  @property
  def optimizer_flops(self) -> float:
    """FLOPs of one update beside its gradient."""
    s = self.settings
    known = optim.optimizer_settings(s.optimizer)
    return optimizer_flops(s.optimizer, self.cfg, s.batch_size, **arguments_of(s, "optimizer", known))

  def utilisation(self, step_seconds: float) -> float | None:
    """Model FLOPs of a step over what the devices could do in that time; None where their peak is not known."""
    peak = peak_flops(jax.devices()[0].device_kind, self.cfg.compute_dtype)
    flops = model_flops(self.cfg) * self.tokens_per_step
    return flops / (step_seconds * self.placement.n_devices * peak) if peak else None

  @property
  def parameters(self) -> dict[str, int]:
    """Number of parameters by role."""
    counts: dict[str, int] = {}
    for spec in jax.tree.leaves(gpt.specs(self.cfg), is_leaf=is_spec):
      counts[spec.role] = counts.get(spec.role, 0) + spec.size
    return counts


def make_optimizer(settings: Settings, specs, cfg: GPTConfig, placement: Placement | None = None):
  """The optimizer of the settings for the parameters that `specs` describes. Raises `UserError`."""
  known = optim.optimizer_settings(settings.optimizer)
  owners = None if placement is None else placement.owners
  return optim.make_optimizer(
    settings.optimizer, specs, cfg, owners=owners, **arguments_of(settings, "optimizer", known)
  )


def make_schedule(settings: Settings, steps: int) -> schedules.Schedule:
  """The schedule of the settings over `steps` updates. Raises `UserError`."""
  known = schedules.schedule_settings(settings.schedule)
  return schedules.make_schedule(settings.schedule, steps, **arguments_of(settings, "schedule", known))


def make_step(
  settings: Settings,
  cfg: GPTConfig,
  optimizer,
  schedule,
  steps: int,
  grad_accum: int = 0,
  placement: Placement | None = None,
):
  """The train step of the settings, not compiled; `grad_accum` replaces theirs."""
  known = optim.optimizer_settings(settings.optimizer)
  products = optim.curvature(settings.optimizer, **arguments_of(settings, "optimizer", known))
  return make_train_step(
    cfg,
    optimizer,
    schedule,
    total_steps=steps,
    grad_accum=grad_accum or settings.grad_accum,
    grad_clip=0.0 if products else settings.grad_clip,
    on_nonfinite=settings.on_nonfinite,
    products=products,
    stats=settings.optimizer_stats,
    axis_name=None if placement is None else placement.axis_name,
  )


def placement_of(settings: Settings) -> Placement:
  """Where the steps of the settings run. Raises `UserError`."""
  known = optim.optimizer_settings(settings.optimizer)
  products = optim.curvature(settings.optimizer, **arguments_of(settings, "optimizer", known))
  fraction = products.fraction if products else None
  return make_placement(settings.parallel, settings.mesh, settings.batch_size, settings.grad_accum, fraction)


def _shard_problems(settings: Settings) -> list[Problem]:
  shards, processes = settings.data_shards or jax.process_count(), jax.process_count()
  if shards % processes:
    fix = f"use --data_shards={-(-shards // processes) * processes}, or start {math.gcd(shards, processes)} processes"
    return [Problem(f"--data_shards={shards} cannot be shared by {processes} processes", fix)]
  if settings.batch_size % shards:
    fix = f"use --batch_size={-(-settings.batch_size // shards) * shards}"
    return [
      Problem(f"--batch_size={settings.batch_size} cannot be taken in equal parts from {shards} data shards", fix)
    ]
  return []


def _trace_problems(cfg: GPTConfig, settings: Settings) -> list[Problem]:
  """What only a trace shows: whether the mechanisms can serve these devices, and the toy model of the claims."""
  row = jnp.zeros((1, cfg.seq_len), jnp.int32)
  batch = dict.fromkeys(("tokens", "targets", *(("segment_ids",) if cfg.doc_mask else ())), row)
  traces = [lambda: jax.eval_shape(lambda: gpt.loss(gpt.init(jax.random.key(0), cfg), batch, cfg)[0])]
  if settings.certify != "off":
    traces.append(lambda: gpt.specs(conformance.tiny(cfg)))
  found = []
  for trace in traces:
    try:
      trace()
    except UserError as e:
      found += e.problems
  return found


def initial_specs(settings: Settings, cfg: GPTConfig):
  """The parameter table that initial weights are drawn from."""
  specs = gpt.specs(cfg)
  rule = settings.automaton
  return specs if rule is None else cellular_specs(specs, rule, settings.ca_alpha)


def matrix_rate(settings: Settings) -> float:
  """The learning rate of hidden matrices before the schedule's multiplier: the `lr` that is logged."""
  return settings.lr_scale * (settings.matrix_lr or optim.optimizer_settings(settings.optimizer)["matrix_lr"])


def planned_steps(settings: Settings) -> int:
  """Updates of the run; `target_tokens` is rounded up to whole updates."""
  tokens_per_step = max(1, settings.batch_size * settings.seq_len)
  return -(-settings.target_tokens // tokens_per_step) if settings.target_tokens > 0 else settings.max_steps


def make_plan(settings: Settings, say: Callable[[str], None] = lambda text: None) -> Plan:
  """Checks everything and returns the plan; `say` is told when that takes long.

  Raises:
    UserError: with all problems of settings, model, data and tokenizer at once.
  """
  problems = setting_problems(settings)
  steps = planned_steps(settings)
  model = model_fields(settings)
  asked = types.SimpleNamespace(vocab_size=tokenizer_lib.MIN_VOCAB, **model)
  found = model_problems(asked)
  problems += found or annealing.problems(GPTConfig(vocab_size=asked.vocab_size, **model), settings.schedule)
  if not problems and settings.automaton is not None:
    specs = gpt.specs(GPTConfig(vocab_size=asked.vocab_size, **model))
    problems += cellular_problems(init_key(settings.seed), specs, settings.automaton, settings.seed)
  if (profiled_steps(settings) or range(0)).start > steps:
    what = f"--profile_steps={settings.profile_steps} begins after the last of {steps} updates"
    problems.append(Problem(what, f"use e.g. --profile_steps={max(1, steps - 2)}:{steps}"))
  for make in (lambda: make_optimizer(settings, {}, asked), lambda: make_schedule(settings, max(1, steps))):
    try:
      make()
    except UserError as e:
      problems += e.problems
  corpus, tok, placement = None, None, None
  if not problems:
    try:
      placement = placement_of(settings)
      problems += _shard_problems(settings)
    except UserError as e:
      problems += e.problems
  try:
    # Building the builtin corpus takes seconds: not for a run that cannot start.
    if settings.data != "builtin" or not problems:
      if settings.data == "builtin" and not any(cache_dir().glob("builtin-*")):
        say("building the builtin corpus and its tokenizer, about ten seconds ...")
      directory = builtin_corpus() if settings.data == "builtin" else settings.data
      need_val = settings.val_every != -1
      corpus = load_corpus(directory, settings.text_column, settings.val_from_train, need_val)
  except UserError as e:
    problems += e.problems
  try:
    # Without its data, an automatic tokenizer could only repeat that the data is missing.
    if corpus is not None or settings.tokenizer not in ("auto", "gpt2"):
      tok = tokenizer_lib.resolve(settings.tokenizer, corpus.directory if corpus else settings.data)
  except UserError as e:
    problems += e.problems
  if tok is not None:
    problems += prompt_problems(settings.sample_prompt, tok, settings.seq_len)
  raise_if_any(dict.fromkeys(problems))
  cfg = GPTConfig(vocab_size=tok.vocab_size, **model)
  raise_if_any(_trace_problems(cfg, settings))
  repeated = stream.repetition(corpus, tok, steps * settings.batch_size * settings.seq_len)
  return Plan(settings, cfg, corpus, tok, steps, placement, corpus.warnings + ((repeated,) if repeated else ()))


def model_fields(s: Settings) -> dict:
  """The fields of `GPTConfig` that the settings decide: all but the vocabulary."""
  names = ("seq_len", "n_layer", "n_head", "n_embd", "attention", "mlp", "mlp_ratio", "mlp_beta")
  names += ("logit_softcap", "rope_base", "doc_mask", "remat", "loss_chunk")
  dtype = automatic_dtype() if s.compute_dtype == "auto" else s.compute_dtype
  return {name: getattr(s, name) for name in names} | {"n_kv_head": s.n_kv_head or s.n_head, "compute_dtype": dtype}


def automatic_dtype() -> str:
  """bfloat16 where it is the fast type: on TPUs, and on GPUs of compute capability 8 and up."""
  device = jax.devices()[0]
  if device.platform == "tpu":
    return "bfloat16"
  capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
  return "bfloat16" if capability and float(capability) >= 8 else "float32"
