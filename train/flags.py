"""The settings of a training run: one dataclass, from which flags, checks and the reproducing flagfile are made."""

import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import Any

from absl import flags

from mgr_jax.config import MLP_KINDS
from mgr_jax.problems import Problem

NAMED_DATA = ("builtin",)
NAMED_TOKENIZERS = ("auto", "bytes", "gpt2")


def _flag(default, text: str, choices: tuple[str, ...] = (), part: str = ""):
  """`part` names what the setting is handed to: the optimizer or the schedule, which also check it."""
  return dataclasses.field(default=default, metadata={"help": text, "choices": choices, "part": part})


@dataclasses.dataclass(frozen=True)
class Settings:
  """What `train.loop.run` needs to know. Every field is a flag of the same name, with the text below as its help."""

  run_id: str = _flag("", "Name of the run's directory in --workdir; empty makes one from date, time and settings.")
  workdir: str = _flag("artifacts", "Directory that holds the runs.")
  seed: int = _flag(42, "Seed of initial weights, data order and sampling.")
  certify: str = _flag(
    "auto",
    "Claims measured before training: auto = causality and decode parity; full = every claim of the mechanisms used.",
    ("auto", "full", "off"),
  )
  dry_run: bool = _flag(False, "Check, compile, time 3 steps, print the plan; train nothing, write nothing.")

  attention: str = _flag("standard", 'Mechanism of each layer, e.g. braid or "standard*2,braid(mode=word)".')
  n_layer: int = _flag(4, "Layers.")
  n_head: int = _flag(4, "Query heads.")
  n_kv_head: int = _flag(0, "Key/value heads; 0 = as many as query heads.")
  n_embd: int = _flag(128, "Width of the model.")
  seq_len: int = _flag(256, "Tokens of context.")
  mlp: str = _flag("relu2", "Kind of MLP.", MLP_KINDS)
  mlp_ratio: float = _flag(4.0, "Hidden width of the MLP divided by --n_embd.")
  mlp_beta: float = _flag(0.0, "Inverse temperature of tropical MLPs; 0 = hard maximum.")
  rope_base: float = _flag(10000.0, "Wavelength base of rotary position embedding.")
  logit_softcap: float = _flag(15.0, "Logits z become c·tanh(z/c); 0 = off.")
  doc_mask: bool = _flag(False, "Packed documents do not attend to each other.")

  ca_rule: str = _flag("none", "Elementary cellular automaton, 0 to 255, that initial matrices are made of; or none.")
  ca_alpha: float = _flag(1.0, "Share of their variance that comes from its cells, 0 to 1; the rest is normal.")

  optimizer: str = _flag("adamw", "Optimizer: adamw, muon, hoss, hoss_hidden or sgd.")
  lr_scale: float = _flag(1.0, "Multiplies the learning rate of every group.", part="optimizer")
  matrix_lr: float = _flag(
    0.0, "Learning rate of hidden matrices, for HOSS its macro time; 0 = the optimizer's own.", part="optimizer"
  )
  embed_lr: float = _flag(0.2, "Learning rate of the embedding, times (n_embd/768)^-1/2.", part="optimizer")
  head_lr: float = _flag(0.004, "Learning rate of the head, times (n_embd/768)^-1/2.", part="optimizer")
  scalar_lr: float = _flag(3e-3, "Learning rate of gains, biases and tables.", part="optimizer")
  weight_decay: float = _flag(-1.0, "Decoupled decay of hidden matrices; -1 = the optimizer's own.", part="optimizer")
  adam_b1: float = _flag(0.9, "Decay of Adam's first moment.", part="optimizer")
  adam_b2: float = _flag(0.95, "Decay of Adam's second moment.", part="optimizer")
  adam_eps: float = _flag(1e-8, "Adam's epsilon.", part="optimizer")
  momentum: float = _flag(0.95, "Decay of the momentum of Muon and SGD.", part="optimizer")
  muon_ns: str = _flag("polar_express", "Coefficients of Newton-Schulz.", ("polar_express", "ns5"), part="optimizer")
  muon_ns_steps: int = _flag(5, "Newton-Schulz iterations.", part="optimizer")
  muon_scale: str = _flag(
    "jordan", "Size of a Muon update by shape.", ("jordan", "spectral", "rms", "none"), part="optimizer"
  )
  hoss_rank: int = _flag(8, "Dimension of the Krylov space of HOSS.", part="optimizer")
  hoss_curvature: str = _flag("ggn", "Gauss-Newton matrix or Hessian.", ("ggn", "hessian"), part="optimizer")
  hoss_hvp_frac: float = _flag(0.25, "Share of the batch that curvature is taken of.", part="optimizer")
  hoss_metric: str = _flag(
    "none", "Metric of HOSS; adam = Adam's diagonal (try --matrix_lr=0.01).", ("none", "adam"), part="optimizer"
  )
  hoss_neg: str = _flag("abs", "What HOSS makes of negative curvature.", ("abs", "flat", "flow"), part="optimizer")
  hoss_noise: str = _flag(
    "none", "Noise of the macro step.", ("none", "krylov", "krylov+tail", "full"), part="optimizer"
  )
  hoss_temperature: float = _flag(0.0, "Temperature of that noise.", part="optimizer")
  hoss_trust_radius: float = _flag(0.0, "Largest norm of a HOSS step; 0 = no limit.", part="optimizer")
  grad_clip: float = _flag(1.0, "Largest global gradient norm; 0 = no clipping. HOSS does not clip.")

  schedule: str = _flag("wsd", "Learning-rate schedule: constant, cosine, wsd or ordinal.")
  lr_warmup_steps: int = _flag(-1, "Steps of linear warm-up; -1 = 2% of the run, at most 100.", part="schedule")
  warmdown_frac: float = _flag(0.2, "Share of the run in which wsd decays.", part="schedule")
  warmdown_shape: str = _flag("linear", "Shape of that decay.", ("linear", "sqrt", "cosine"), part="schedule")
  final_lr_frac: float = _flag(0.0, "Multiplier at the end of cosine and wsd.", part="schedule")
  ord_restarts: int = _flag(2, "Restarts of the ordinal schedule.", part="schedule")
  ord_levels: int = _flag(3, "Times it lowers the learning rate before a restart.", part="schedule")
  ord_patience: int = _flag(100, "Steps without improvement that its first level allows.", part="schedule")
  ord_refill: str = _flag(
    "geometric",
    "Patience of later levels: doubled, or from the measured noise.",
    ("geometric", "adaptive"),
    part="schedule",
  )
  ord_gamma: float = _flag(0.5, "Factor by which it lowers the learning rate.", part="schedule")
  ord_ema: float = _flag(0.9, "Decay of the average of the loss that it watches.", part="schedule")

  batch_size: int = _flag(8, "Sequences per update.")
  grad_accum: int = _flag(1, "Micro-batches per update.")
  loss_chunk: int = _flag(0, "Tokens per cross-entropy chunk; 0 = automatic.")
  compute_dtype: str = _flag(
    "auto",
    "Type of activations and matrix products; auto = bfloat16 on TPUs and on GPUs of capability 8 and up.",
    ("auto", "float32", "bfloat16"),
  )
  parallel: str = _flag(
    "auto",
    "Devices: single; jit = one program over --mesh; pmap = a copy of the state per device; auto = jit on several.",
    ("auto", "single", "jit", "pmap"),
  )
  mesh: str = _flag("", "Mesh of jit: data=N,fsdp=M; parameters and moments are split over fsdp, rows over both.")
  coordinator: str = _flag(
    "", "host:port of process 0, for several processes; also JAX_COORDINATOR_ADDRESS or a cluster."
  )
  num_processes: int = _flag(0, "Processes of this run; also JAX_NUM_PROCESSES or a cluster.")
  process_id: int = _flag(-1, "Number of this process, from 0; also JAX_PROCESS_ID or a cluster.")
  remat: str = _flag(
    "none",
    "Recomputed in the backward pass: none, full = layers, every_K = groups of K, dots = all but weight products.",
  )

  max_steps: int = _flag(200, "Updates to train for.")
  target_tokens: int = _flag(0, "Train on this many tokens instead of --max_steps.")
  max_seconds: float = _flag(0.0, "Stop, save and end well after this time; 0 = no limit.")

  data: str = _flag("builtin", "builtin, or a directory of parquet shards.")
  tokenizer: str = _flag("auto", "auto = the one beside the data; bytes; gpt2; or the path of a tokenizer.json.")
  text_column: str = _flag("text", "Column of the shards that holds the text.")
  val_from_train: float = _flag(0.0, "Share of documents held out when the data has no validation split.")
  data_shards: int = _flag(0, "Streams that the rows of a batch come from, a multiple of the processes; 0 = one each.")
  data_threads: int = _flag(4, "Threads that read and tokenize; 0 = none.")

  val_every: int = _flag(0, "Steps between validations; 0 = at the start and the end, -1 = never.")
  val_tokens: int = _flag(131072, "Tokens of each validation; always the same ones.")
  sample_every: int = _flag(0, "Steps between samples; 0 = at the end, -1 = never.")
  sample_prompt: tuple[str, ...] = _flag((), "Text to continue in samples; may be given several times.")

  ckpt_every: int = _flag(0, "Steps between checkpoints; there is always one at the end and on SIGINT or SIGTERM.")
  ckpt_keep: int = _flag(3, "Newest checkpoints to keep, beside the best by validation.")
  resume: str = _flag(
    "auto", "auto = go on if --run_id has a checkpoint; none; or RUN, PATH or PATH@STEP to start a new run from."
  )
  resume_strict: bool = _flag(True, "Refuse to resume with other settings, data or tokenizer.")

  profile_steps: str = _flag("", "First:last update whose profiler trace goes to profile/ of the run, e.g. 10:13.")
  compile_cache: str = _flag("auto", "Keeps compiled programs: auto = beside the corpora; none; or a directory.")
  log_every: int = _flag(10, "Steps between log lines.")
  optimizer_stats: bool = _flag(False, "Log norms and angles of gradient and update by role.")
  probe_every: int = _flag(0, "Steps between diagnostics of the mechanisms, written to metrics.jsonl; 0 = never.")
  progress: str = _flag("auto", "auto = bar on a terminal, else plain.", ("auto", "bar", "plain", "none"))
  tensorboard: bool = _flag(False, "Also write TensorBoard events into tb/ (needs the tensorboard extra).")
  on_nonfinite: str = _flag("raise", "raise, or skip:K = drop such updates and give up after K in a row.")

  @property
  def automaton(self) -> int | None:
    """The rule of the cellular automaton that weights are initialised with, None for none."""
    return None if self.ca_rule == "none" else int(self.ca_rule)

  @property
  def skip_limit(self) -> int | None:
    """K of `skip:K`, None for `raise`."""
    return int(self.on_nonfinite.partition(":")[2]) if self.on_nonfinite != "raise" else None


FIELDS: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(Settings)}


def define(flag_values: flags.FlagValues) -> None:
  """Defines one absl flag per field of `Settings`."""
  kinds = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
  for f in FIELDS.values():
    common = {"flag_values": flag_values, "module_name": __name__}
    if f.metadata["choices"]:
      flags.DEFINE_enum(f.name, f.default, f.metadata["choices"], f.metadata["help"], **common)
    elif isinstance(f.default, tuple):
      flags.DEFINE_multi_string(f.name, list(f.default), f.metadata["help"], **common)
    else:
      kinds[type(f.default)](f.name, f.default, f.metadata["help"], **common)


def from_flags(flag_values: flags.FlagValues) -> Settings:
  """The settings that parsed flags hold."""
  values = {name: flag_values[name].value for name in FIELDS}
  return Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _arguments(settings: Settings, names) -> list[str]:
  """`--name=value` for each named setting."""
  lines = []
  for name in names:
    value = getattr(settings, name)
    for v in value if isinstance(value, tuple) else (value,):
      lines.append(f"--{name}={str(v).lower() if isinstance(v, bool) else v}")
  return lines


def command(settings: Settings, **changes) -> str:
  """The shell command of this run with `changes`: the settings that differ from the defaults."""
  settings = dataclasses.replace(settings, **changes)
  changed = [name for name, f in FIELDS.items() if getattr(settings, name) != f.default]
  return shlex.join(["python", "-m", "train.main", *_arguments(settings, changed)])


def flagfile(settings: Settings) -> str:
  """A flagfile that starts the same run again, from scratch and under a new name.

  All settings are written, so that it means the same when defaults change; relative paths of data and tokenizer are
  made absolute, so that it means the same everywhere on this machine.
  """
  data = settings.data if settings.data in NAMED_DATA else os.path.abspath(os.path.expanduser(settings.data))
  tokenizer = settings.tokenizer
  if tokenizer not in NAMED_TOKENIZERS:
    tokenizer = os.path.abspath(os.path.expanduser(tokenizer))
  settings = dataclasses.replace(settings, data=data, tokenizer=tokenizer)
  this_start = ("run_id", "workdir", "dry_run", "resume", "resume_strict", "coordinator", "num_processes", "process_id")
  names = [name for name in FIELDS if name not in this_start]
  return "\n".join(["# python -m train.main --flagfile=THIS_FILE", *_arguments(settings, names)]) + "\n"


def arguments_of(settings: Settings, part: str, known) -> dict[str, Any]:
  """The settings of one part: those it knows, and those that differ from their default, known or not."""
  named = {n: getattr(settings, n) for n, f in FIELDS.items() if f.metadata["part"] == part}
  return {n: v for n, v in named.items() if n in known or v != FIELDS[n].default}


def profiled_steps(s: Settings) -> range | None:
  """The updates to profile, numbered from 1; empty for none, None for a text that says something else."""
  match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", s.profile_steps)
  if s.profile_steps and (not match or int(match.group(1)) > int(match.group(2))):
    return None
  return range(int(match.group(1)), int(match.group(2)) + 1) if match else range(0)


def setting_problems(s: Settings) -> list[Problem]:
  """Every problem that the settings alone show: ranges, contradictions, and settings that would have no effect.

  The parts check what they are handed: model, optimizer, schedule, data and tokenizer.
  """
  return [*_range_problems(s), *_horizon_problems(s), *_useless(s), *_run_problems(s)]


def _range_problems(s: Settings) -> list[Problem]:
  found = []
  for name, f in FIELDS.items():
    value, choices = getattr(s, name), f.metadata["choices"]
    # The model's own check reports a bad kind of MLP.
    if choices and value not in choices and name != "mlp":
      found.append(Problem(f"--{name}={value} is unknown", f"use one of {', '.join(choices)}"))

  def need(name: str, good: bool, rule: str):
    if not good:
      found.append(Problem(f"--{name}={getattr(s, name)} {rule}", f"use --{name}={FIELDS[name].default}"))

  for name in ("batch_size", "grad_accum", "log_every", "ckpt_keep", "val_tokens"):
    need(name, getattr(s, name) >= 1, "is not positive")
  counts = ("target_tokens", "n_kv_head", "data_shards", "data_threads", "ckpt_every", "probe_every", "seed")
  for name in ("grad_clip", "max_seconds", *counts):
    need(name, getattr(s, name) >= 0, "is negative")
  for name in ("val_every", "sample_every"):
    need(name, getattr(s, name) >= -1, "is below -1")
  need("seed", s.seed < 2**32, "does not fit 32 bits")
  need("on_nonfinite", re.fullmatch(r"raise|skip:[1-9]\d*", s.on_nonfinite) is not None, "is not raise or skip:K")
  rule = s.ca_rule == "none" or (re.fullmatch(r"[0-9]{1,3}", s.ca_rule) is not None and int(s.ca_rule) <= 255)
  need("ca_rule", rule, "is not none or a rule from 0 to 255")
  need("ca_alpha", 0 <= s.ca_alpha <= 1, "is outside 0 to 1")
  if s.batch_size >= 1 and s.grad_accum >= 1 and s.batch_size % s.grad_accum:
    near = max(d for d in range(1, s.grad_accum) if s.batch_size % d == 0)
    fix = f"use --grad_accum={near} or --batch_size={-(-s.batch_size // s.grad_accum) * s.grad_accum}"
    found.append(Problem(f"--batch_size={s.batch_size} is not divisible by --grad_accum={s.grad_accum}", fix))
  need("profile_steps", profiled_steps(s) is not None, "is not FIRST:LAST with 1 <= FIRST <= LAST")
  if any("\n" in prompt or not prompt.strip() for prompt in s.sample_prompt):
    found.append(Problem("--sample_prompt is empty or has a line break", "give one line of text per --sample_prompt"))
  return found


def _horizon_problems(s: Settings) -> list[Problem]:
  if s.target_tokens > 0 and s.max_steps not in (0, FIELDS["max_steps"].default):
    error = f"two horizons: --max_steps={s.max_steps} and --target_tokens={s.target_tokens}"
    return [Problem(error, "leave --target_tokens out, or use --max_steps=0 with it")]
  if s.target_tokens <= 0 and s.max_steps < 1:
    return [Problem(f"--max_steps={s.max_steps} is not positive", "use --max_steps=200, or --target_tokens=N")]
  return []


def _useless(s: Settings) -> list[Problem]:
  """Settings that differ from their default where they change nothing."""
  rules = (
    ("val_tokens", s.val_every == -1, "--val_every=-1 turns validation off", "use --val_every=0"),
    ("val_from_train", s.val_every == -1, "--val_every=-1 turns validation off", "use --val_every=0"),
    ("sample_prompt", s.sample_every == -1, "--sample_every=-1 turns samples off", "use --sample_every=0"),
    ("resume_strict", s.resume == "none", "--resume=none resumes nothing", "leave --resume out"),
    ("resume", s.dry_run, "--dry_run starts from dummy weights", "leave --dry_run out"),
    ("mlp_ratio", s.mlp == "none", "--mlp=none has no width", "use another --mlp"),
    ("mlp_beta", not s.mlp.startswith("tropical"), f"--mlp={s.mlp} has no temperature", "use --mlp=tropical"),
    ("ca_alpha", s.ca_rule == "none", "--ca_rule=none has no cells", "use --ca_rule=30"),
    ("ca_rule", s.ca_alpha == 0, "--ca_alpha=0 leaves no share to its cells", "use --ca_alpha=0.5"),
    ("grad_clip", s.optimizer.startswith("hoss"), "HOSS follows a flow for a time", "use --hoss_trust_radius=1"),
    ("text_column", s.data in NAMED_DATA, f"--data={s.data} has its own column", "use --data=DIRECTORY"),
    ("val_from_train", s.data in NAMED_DATA, f"--data={s.data} has a validation split", "use --data=DIRECTORY"),
  )
  found = {}
  for name, useless, why, fix in rules:
    if useless and getattr(s, name) != FIELDS[name].default:
      found.setdefault(name, Problem(f"--{name} has no effect: {why}", f"leave --{name} out, or {fix}"))
  return list(found.values())


def _run_problems(s: Settings) -> list[Problem]:
  found = []
  if s.run_id and not re.fullmatch(r"[\w.-]*\w[\w.-]*", s.run_id):
    fix = f"use --run_id={re.sub(r'[^A-Za-z0-9_.-]+', '-', s.run_id).strip('-.') or 'first'}"
    found.append(Problem(f"--run_id={s.run_id!r} is not a name of letters, digits, dots, dashes and underscores", fix))
  workdir = Path(s.workdir).expanduser().absolute()
  existing = next(p for p in (workdir, *workdir.parents) if p.exists())
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    why = "is not a directory" if not existing.is_dir() else "is not writable"
    found.append(Problem(f"--workdir={s.workdir}: {existing} {why}", "use --workdir=DIRECTORY that you may write to"))
  if s.tensorboard:
    try:
      import tensorboardX  # noqa: F401  an extra: looked for only when asked for
    except ImportError:
      fix = "pip install 'mgr_jax[tensorboard]', or leave --tensorboard out"
      found.append(Problem("--tensorboard needs the package tensorboardX, which is not installed", fix))
  return found
