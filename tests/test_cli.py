"""What all programs share: flags, errors with a way out, and exit codes."""

import pytest
from absl import flags

from mgr_jax.problems import Problem, UserError
from train import cli


def tiny():
  fv = flags.FlagValues()
  flags.DEFINE_integer("width", 4, "How wide.", flag_values=fv)
  flags.DEFINE_enum("mode", "fast", ["fast", "slow"], "How.", flag_values=fv)
  flags.DEFINE_boolean("loud", False, "Shout.", flag_values=fv)
  return fv


def test_flag_mistakes_are_reported_together(capsys):
  args = ["prog", "--wdith=3", "--mode=fsat", "--width", "five", "--nonsense", "extra"]
  assert cli.execute(lambda argv: 0, args, tiny()) == 2
  err = capsys.readouterr().err
  for part in (
    "unknown flag --wdith",
    "did you mean --width",
    "--mode=fsat",
    "use --mode=fast or --mode=slow (the default is fast)",
    "--width=five",
    "use --width=a whole number (the default is 4)",
    "unknown flag --nonsense",
    "unexpected argument 'extra'",
  ):
    assert part in err, err
  assert err.count("error: ") == err.count("fix: ") == 5 and "FATAL" not in err


def test_flags_are_parsed_anew_each_time_and_from_files(tmp_path):
  fv, seen = tiny(), []
  path = tmp_path / "a.cfg"
  path.write_text("# a comment\n--width=7\n--loud\n")

  def main(argv):
    seen.append((fv.width, fv.loud, argv[1:]))

  assert cli.execute(main, ["prog", f"--flagfile={path}", "--width=9", "name"], fv, max_args=1) == 0
  assert cli.execute(main, ["prog"], fv) == 0
  assert seen == [(9, True, ["name"]), (4, False, [])]


def test_a_failed_parse_leaves_nothing_behind():
  fv = tiny()
  assert cli.execute(lambda argv: 0, ["prog", "--width=9", "--absent"], fv) == 2
  assert cli.execute(lambda argv: fv.width, ["prog"], fv) == 4


def test_missing_flagfile(capsys):
  assert cli.execute(lambda argv: 0, ["prog", "--flagfile=/absent.cfg"], tiny()) == 2
  assert "absent.cfg" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("error", "code", "text"),
  [
    (UserError(Problem("bad value", "good value")), 2, "error: bad value\n  fix: good value\n"),
    (ZeroDivisionError("oh"), 1, "error: ZeroDivisionError: oh\n  fix: run again with --debug for the traceback\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
  ],
)
def test_exit_codes_and_tracebacks(capsys, error, code, text):
  def main(argv):
    raise error

  assert cli.execute(main, ["prog"], tiny()) == code
  assert capsys.readouterr().err == text
  assert cli.execute(main, ["prog", "--debug"], tiny()) == code
  err = capsys.readouterr().err
  assert "Traceback" in err and err.endswith(text)


def test_the_result_of_main_is_the_exit_code():
  assert [cli.execute(lambda argv, r=r: r, ["prog"], tiny()) for r in (None, 0, 1)] == [0, 0, 1]
