"""One document made clean, or the reason to leave it out."""

import dataclasses
import html.parser
import re
import unicodedata

_HIDDEN = frozenset(("script", "style", "template", "noscript"))
_INLINE = re.compile("a|abbr|b|bdi|bdo|cite|code|em|font|i|kbd|mark|q|s|samp|small|span|strong|sub|sup|u|var|wbr")


@dataclasses.dataclass(frozen=True)
class CleanOptions:
  """Limits in characters of the cleaned text; `unicode` is NFC, NFD, NFKC, NFKD or none."""

  min_chars: int = 32
  max_chars: int = 1_000_000
  strip_html: bool = False
  unicode: str = "NFC"


def clean(text: str, options: CleanOptions) -> str:
  """`text` with line ends as "\\n", without blank lines at both ends and, when asked for, markup; then
  Unicode-normalised."""
  if "\r" in text:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
  if options.strip_html:
    text = strip_html(text)
  if options.unicode != "none":
    text = unicodedata.normalize(options.unicode, text)
  return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()


def reason_to_drop(text: str, options: CleanOptions) -> str | None:
  """Why a cleaned text is left out, None when it is kept."""
  if not text:
    return "empty"
  if len(text) < options.min_chars:
    return "shorter than min_chars"
  if len(text) > options.max_chars:
    return "longer than max_chars"
  return None


def strip_html(text: str) -> str:
  """The visible text of HTML: entities resolved, scripts and styles gone, blocks on lines of their own."""
  if "<" not in text and "&" not in text:
    return text
  parser = _Visible()
  parser.feed(text)
  parser.close()
  lines = (re.sub(r"[^\S\n]+", " ", line).strip() for line in "".join(parser.parts).split("\n"))
  return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Visible(html.parser.HTMLParser):
  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.parts: list[str] = []
    self._hidden = 0

  def handle_starttag(self, tag, attrs):
    self._hidden += tag in _HIDDEN
    if not _INLINE.fullmatch(tag):
      self.parts.append("\n")

  def handle_endtag(self, tag):
    self._hidden = max(0, self._hidden - (tag in _HIDDEN))
    if not _INLINE.fullmatch(tag):
      self.parts.append("\n")

  def handle_startendtag(self, tag, attrs):
    if not _INLINE.fullmatch(tag):
      self.parts.append("\n")

  def handle_data(self, data):
    if not self._hidden:
      self.parts.append(data)
