"""What every program shares: one parse of its own flags, errors with a way out, and exit codes.

Exit codes: 0 done; 1 a check failed or the program broke; 2 something the user can fix; 130 interrupted.
"""

import difflib
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from absl import flags
from absl import logging as absl_logging

from mgr_jax.problems import Problem, UserError

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
_QUIET = ("absl", "grain", "orbax", "jax", "httpx", "httpx2", "huggingface_hub", "filelock")


def run(main: Callable[[list[str]], int | None], flag_values: flags.FlagValues | None = None, max_args: int = 0):
  """Ends the process with the exit code of `execute` on this process's arguments."""
  sys.exit(execute(main, sys.argv, flag_values, max_args))


def execute(
  main: Callable[[list[str]], int | None],
  argv: Sequence[str],
  flag_values: flags.FlagValues | None = None,
  max_args: int = 0,
) -> int:
  """Parses `argv` into `flag_values` (absl's global flags when None), calls `main` and returns the exit code.

  `main` receives `[program, *positional arguments]`, of which there may be at most `max_args`; its result is the exit
  code (None is 0). A program that keeps its flags in a `FlagValues` of its own can be imported and run beside the
  others in one process; every call starts again from the defaults. `UserError` is printed as `error:` and `fix:`
  lines; tracebacks appear with `--debug` only.
  """
  fv = flags.FLAGS if flag_values is None else flag_values
  if "debug" not in fv:
    flags.DEFINE_boolean("debug", False, "Show tracebacks.", flag_values=fv, module_name=main.__module__)
  _quieten()
  _reset(fv)
  fv.set_gnu_getopt(True)
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(argv[:1])  # Grain keeps switches in absl's global flags and reads them at run time
  try:
    if any(arg in ("-h", "-?", "--help", "--helpshort", "--helpfull") for arg in argv[1:]):
      code = print(_help(main, fv))
    else:
      code = main(_parse(fv, argv, max_args))
    sys.stdout.flush()
    return code or 0
  except UserError as e:
    return _fail(fv, str(e), 2)
  except KeyboardInterrupt:
    return _fail(fv, "interrupted", 130)
  except BrokenPipeError:
    # The reader of a pipe such as `| head` has gone; Python would complain again when it flushes stdout at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except Exception as e:
    first_line = next(iter(str(e).splitlines()), "")
    return _fail(fv, str(Problem(f"{type(e).__name__}: {first_line}", "run again with --debug for the traceback")), 1)


def _parse(fv: flags.FlagValues, argv: Sequence[str], max_args: int) -> list[str]:
  """The arguments that are no flags. Raises one `UserError` with every unknown, malformed or surplus argument."""
  problems: list[Problem] = []
  try:
    argv = [argv[0], *fv.read_flags_from_files(list(argv[1:]), force_gnu=True)]
  except flags.Error as e:
    raise UserError(Problem(str(e), "give --flagfile the path of an existing file with one flag per line")) from e
  while True:
    try:
      rest = fv(argv)
      break
    except flags.UnrecognizedFlagError as e:
      problems.append(_unknown(fv, e.flagname))
      shorter = [a for a in argv if not re.match(rf"--?{re.escape(e.flagname)}(=|$)", a)]
    except (flags.Error, ValueError) as e:
      name = next(iter(re.findall(r"flag -*(\w+)", str(e))), "")
      problems.append(_illegal(fv, name, str(e)))
      shorter = _without(argv, name)
    if shorter == argv:
      raise UserError(*problems)
    argv = shorter  # parse what is left, so that all mistakes are reported together
    _reset(fv)
  for arg in rest[1 + max_args :]:
    problems.append(Problem(f"unexpected argument {arg!r}", "write flags as --name=value; --help lists them"))
  if problems:
    raise UserError(*problems)
  return rest


def _reset(fv: flags.FlagValues) -> None:
  """Every flag as if it had never been given, also after a parse that failed half way."""
  for name in fv:
    fv[name].unparse()


def _unknown(fv: flags.FlagValues, name: str) -> Problem:
  close = difflib.get_close_matches(name, list(fv), n=3, cutoff=0.6)
  fix = "did you mean " + " or ".join(f"--{n}" for n in close) + "? --help" if close else "--help"
  return Problem(f"unknown flag --{name}", f"{fix} lists the flags of this program")


def _illegal(fv: flags.FlagValues, name: str, message: str) -> Problem:
  message = message.removeprefix("flag ")
  if name not in fv:
    return Problem(message, "--help lists the flags of this program")
  flag = fv[name]
  values = getattr(flag.parser, "enum_values", None)
  kind = flag.flag_type()
  accepted = " or ".join(f"--{name}={v}" for v in values) if values else f"--{name}={_KINDS.get(kind, kind)}"
  return Problem(message, f"use {accepted} (the default is {_shown(flag.default)})")


def _without(argv: Sequence[str], name: str) -> list[str]:
  """`argv` without `--name=value` and `--name value`."""
  kept, skip_value = [], False
  for arg in argv:
    if skip_value and not arg.startswith("-"):
      skip_value = False
      continue
    skip_value = arg.lstrip("-") == name and arg.startswith("-")
    if not skip_value and not re.match(rf"--?{name}=", arg):
      kept.append(arg)
  return kept


def _help(main: Callable, fv: flags.FlagValues) -> str:
  """The program's docstring and each of its flags with its default, in the order of definition."""
  lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", "flags:"]
  modules = fv.flags_by_module_dict()
  own = [f for m, fs in modules.items() if not m.startswith(("absl", "grain")) for f in fs]
  for flag in dict.fromkeys(own):
    values = getattr(flag.parser, "enum_values", None)
    name = flag.name + (f"={'|'.join(values)}" if values else "")
    # absl puts the values before the help of an enum, and a hint after that of a repeatable flag.
    text = flag.help.split(";\n")[0].removeprefix(f"<{'|'.join(values or ())}>: ")
    if flag.default not in (None, [], ""):
      text += f" (default: {_shown(flag.default)})"
    lines += textwrap.wrap(
      f"--{name}: {text}", 110, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
    )
  return "\n".join([*lines, "  --flagfile: Read flags from this file, one per line; # starts a comment."])


def _shown(default: object) -> str:
  return str(default).lower() if isinstance(default, bool) else repr(default) if default == "" else str(default)


def _fail(fv: flags.FlagValues, message: str, code: int) -> int:
  if fv["debug"].value:
    traceback.print_exc()
  print(message, file=sys.stderr)
  return code


def _quieten() -> None:
  """Warnings and worse only, from the libraries that log on every call."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  for name in _QUIET:
    logging.getLogger(name).setLevel(logging.WARNING)
