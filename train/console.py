"""What a run shows: a bar on a terminal, plain lines elsewhere."""

import os
import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from train.metrics import Record


class Console:
  """Prints lines and the progress of `total` steps in the style `bar`, `plain`, `none`, `silent` or `auto`."""

  def __init__(self, style: str, total: int, done: int):
    if style == "auto":
      style = "bar" if _terminal_width() else "plain"
    self._style = style
    self._total = total
    self._done = done
    self._bar: tqdm | None = None

  def line(self, text: str = "") -> None:
    """Prints above the bar, if there is one."""
    if self._style == "silent":
      return
    if self._bar is not None:
      self._bar.clear()
    print(text, flush=True)
    if self._bar is not None:
      self._bar.refresh()

  def progress(self, record: Record, val_bpb: float | None, eta_s: float) -> None:
    """Shows one log record of `metrics.jsonl`."""
    parts = [f"step {record['step']}/{self._total}", f"loss {record['loss']:.3f}", f"bpb {record['bpb']:.3f}"]
    if val_bpb is not None:
      parts.append(f"val_bpb {val_bpb:.3f}")
    parts += [
      f"lr {record['lr']:.3g}",
      f"gnorm {record['grad_norm']:.2f}",
      f"{compact(record['tokens_per_s'])} tok/s",
      f"wait {100 * record['data_wait_ms'] / record['step_ms']:.0f}%",
      f"eta {duration(eta_s)}",
    ]
    if self._style == "bar":
      if self._bar is None:
        form = "{percentage:3.0f}% {bar:10} {desc}"
        self._bar = tqdm(total=self._total, initial=self._done, bar_format=form, file=sys.stdout, dynamic_ncols=True)
      self._bar.n = record["step"]
      self._bar.set_description_str(" | ".join(parts))
    elif self._style == "plain":
      print(" | ".join(parts), flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def _terminal_width() -> int:
  """Columns of the terminal that stdout is, 0 when it is none or does not know."""
  try:
    return os.get_terminal_size(sys.stdout.fileno()).columns
  except (OSError, ValueError):
    return 0


def compact(number: float) -> str:
  """`41.2k`, `3.30M`: three significant digits and the SI letter."""
  for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(number) >= size:
      return f"{number / size:.3g}{letter}"
  return f"{number:.3g}"


def duration(seconds: float) -> str:
  """`mm:ss`, or `h:mm:ss` from an hour on."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f"{hours}:{m:02}:{s:02}" if hours else f"{m:02}:{s:02}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """Text columns, numbers as `str` shows them; the first column left-aligned, the others right-aligned."""
  cells = [[str(c) for c in row] for row in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  align = lambda row: [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
  return "\n".join("  ".join(align(row)).rstrip() for row in cells)
