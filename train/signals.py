"""Stopping a run from outside without losing it."""

import signal
import threading


class StopSignals:
  """While entered, the first SIGINT or SIGTERM only sets `received`; a second one does what it did before.

  Outside the main thread, where Python allows no handlers, nothing changes.
  """

  def __init__(self):
    self.received: signal.Signals | None = None
    self._previous: dict[int, object] = {}

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc) -> None:
    self._restore()

  def _handle(self, number: int, frame) -> None:
    del frame
    self.received = signal.Signals(number)
    self._restore()

  def _restore(self) -> None:
    while self._previous:
      signal.signal(*self._previous.popitem())
