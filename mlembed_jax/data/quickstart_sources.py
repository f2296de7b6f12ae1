"""Multilingual text inside ordinary pip packages, and which of it is held out.

The packages are optional, so they are imported where they are read.
"""

import functools
import gettext
import hashlib
import html
import importlib.resources
import json
import pathlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from random import Random
from typing import Any

from mlembed_jax.data import intent_templates
from mlembed_jax.data.intent_templates import ByLanguage

HELDOUT_PERCENT = 15  # of the English strings, and of the intent templates
MAX_CHARS = 300
MIN_NAMES = 100  # CLDR locales with fewer are barely begun
KINDS = {
  "territories": "the name of a country or region",
  "languages": "the name of a language",
  "currencies": "the name of a currency",
  "scripts": "the name of a script",
}

# One spelling per language. Regional variants that are not listed are near-copies: left out. So are
# other scripts of a language, but for those of CLDR that share no name with the usual script.
SPELLINGS = {
  "de-ch": "gsw",
  "no": "nb",
  "pt-pt": "pt",
  "zh": "zh-hans",
  "zh-cn": "zh-hans",
  "zh-hk": "yue",
  "zh-tw": "zh-hant",
}
VARIANTS = {"pt-br", "sr-latn", "zh-hans", "zh-hant"}
_OF_SCRIPT = re.compile("(?!en_)[a-z]+_[A-Z][a-z]{3}")  # English in Deseret is the English names

_PLACEHOLDER = re.compile(r"%(\([^)]*\))?[\d.]*[a-z]|\{[^{}]*\}")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")

Translations = dict[str, dict[str, str]]  # language -> English -> text


def clean(text: str) -> str:
  """Returns the text on one line, NFC, without markup."""
  plain = html.unescape(_TAG.sub(" ", text))
  return " ".join(unicodedata.normalize("NFC", plain).split())


@functools.cache
def fold(text: str) -> str:
  """Returns the key under which texts count as equal: case and punctuation are ignored."""
  kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text.casefold())
  return " ".join("".join(kept).split()) or text


def language_code(code: str) -> str | None:
  """Returns the code in the one spelling used here, None for a regional near-copy."""
  code = code.lower().replace("_", "-")
  code = SPELLINGS.get(code, code)
  return code if "-" not in code or code in VARIANTS else None


def _is_heldout(text: str) -> bool:
  return int(hashlib.sha256(fold(text).encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def part(translations: Translations, *, heldout: bool) -> Translations:
  """Returns the held-out pairs, or the others; the English side alone decides."""
  return {
    lang: {english: text for english, text in pairs.items() if _is_heldout(english) == heldout}
    for lang, pairs in translations.items()
  }


def seeded(seed: int, name: str = "") -> Random:
  """Returns the generator of one purpose of the seed."""
  return Random(f"{seed} {name}")  # a string seeds alike under any PYTHONHASHSEED


def _is_pair(english: str, text: str) -> bool:
  return _is_text(english) and _is_text(text) and fold(english) != fold(text)


def _is_text(text: str) -> bool:
  bare = _PLACEHOLDER.sub("", text).replace(" ", "")
  letters = sum(unicodedata.category(c)[0] in "LM" for c in bare)
  return len(text) <= MAX_CHARS and letters >= max(2, 0.4 * len(bare))


def _folder(module: str) -> pathlib.Path:
  return pathlib.Path(str(importlib.resources.files(module)))


def read_messages() -> Translations:
  """Returns the interface messages of Django and django-allauth, of two English words or more."""
  found: Translations = defaultdict(dict)
  spelling: dict[str, str] = {}  # one of those that differ in case or punctuation only
  folders = (_folder(module) for module in ("django", "allauth"))
  for path in (p for f in folders for p in sorted(f.rglob("locale/*/LC_MESSAGES/*.mo"))):
    lang = language_code(path.parts[-3])
    for english, text in _catalogue(path):
      words = fold(_PLACEHOLDER.sub("", english)).split()
      if lang and len(words) >= 2 and _is_pair(english, text):
        found[lang].setdefault(spelling.setdefault(fold(english), english), text)
  return dict(found)


def _catalogue(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields English and translation of the messages that need no context to be understood."""
  from babel.messages.mofile import read_mo

  with path.open("rb") as file:
    catalogue = read_mo(file)
  singular = gettext.c2py(catalogue.plural_expr)(1)  # not 0 in Arabic
  for message in catalogue:
    if message.id and message.string and not message.context:
      english, text = message.id, message.string
      if not isinstance(english, str):  # plural forms
        english, text = english[0], text[singular]
      yield clean(english), clean(str(text))


def read_names() -> tuple[Translations, dict[str, str]]:
  """Returns CLDR's names of countries, languages, currencies and scripts, and their kinds.

  An English name of two kinds ("Arabic") has none.
  """
  from babel import Locale, localedata

  reference, kinds = Locale("en"), defaultdict(set)
  for kind in KINDS:
    for english in getattr(reference, kind).values():
      kinds[clean(english)].add(kind)
  found: Translations = {}
  for identifier in sorted(localedata.locale_identifiers()):
    lang = language_code(identifier)
    if not lang and _OF_SCRIPT.fullmatch(identifier):
      lang = _script_code(identifier, reference)
    if lang and identifier != "pt":  # CLDR's pt is pt_BR
      names = _names(Locale.parse(identifier), reference)
      if len(names) >= MIN_NAMES:
        found[lang] = names
  return found, {name: min(mine) for name, mine in kinds.items() if len(mine) == 1}


def _script_code(identifier: str, reference: Any) -> str | None:
  """Returns the code of a locale in another script; None where it has names of the usual one."""
  from babel import Locale

  usual, names = (
    _names(Locale.parse(each), reference) for each in (identifier.split("_")[0], identifier)
  )
  return identifier.lower().replace("_", "-") if usual.items().isdisjoint(names.items()) else None


def _names(locale: Any, reference: Any) -> dict[str, str]:
  found: dict[str, str] = {}
  for kind in KINDS:
    local = getattr(locale, kind)
    for code, english in sorted(getattr(reference, kind).items()):
      name, text = clean(english), clean(local.get(code, code))
      if text != code and _is_pair(name, text):
        found.setdefault(name, text)
  return found


def read_utterances(seed: int) -> tuple[ByLanguage, ByLanguage]:
  """Returns the utterances of training templates and those of held-out templates."""
  parts: tuple[ByLanguage, ByLanguage] = {}, {}
  for path in sorted((_folder("home_assistant_intents") / "data").glob("*.json")):
    lang = language_code(path.stem)
    if lang:
      for each in parts:
        each[lang] = defaultdict(list)
      language = json.loads(path.read_text(encoding="utf-8"))
      for u in intent_templates.utterances(language, seeded(seed, lang)):
        heldout = _is_heldout(f"{lang} {u.intent} {u.template}")
        parts[heldout][lang][u.intent].append(clean(u.text))
  return parts
