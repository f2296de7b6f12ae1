"""One key per language, however its tag is written: he, iw, heb_Hebr and he-IL are heb-Hebr.

A key is the code of three letters and the script, as MTEB and FLORES name languages. Languages are
counted as CLDR counts them: cmn and zho_Hans as zho-Hans, arb as ara-Arab, azj as aze-Latn. Regions
and variants are left out (pt-BR and pt-PT are por-Latn) but for the script that they imply (zh-TW
is zho-Hant). A pair such as en-de cannot be told from a region: it is English in Germany.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from langcodes import Language

from mlembed_jax.data.likely_scripts import LIKELY_SCRIPTS
from mlembed_jax.errors import ConfigError

# The values of data.language_key, the default first.
SCHEMES = LANGUAGE_SCRIPT, AS_WRITTEN = "language-script", "as-written"
ENGLISH = "en", "eng-Latn"  # as most files write it, and its key

# Languages that are counted as another, beside those that langcodes 3.5 knows. CLDR has ajp and gom
# so today; text of `no` is nearly always nb; FLORES has pbt, quy and fuv for ps, qu and ff.
_COUNTED_AS = {
  "ajp": "apc",
  "fuv": "ff",
  "gom": "kok",
  "nb": "no",
  "pbt": "ps",
  "quy": "qu",
}
_SAME_SCRIPT = {"Kore": "Hang"}  # Korean of today; CLDR has the former, FLORES and MTEB the latter
_NO_LANGUAGE = re.compile("mis|mul|und|zxx|q[a-t][a-z]")  # the last are for private use


def language_key(tag: str, scheme: str = LANGUAGE_SCRIPT) -> str:
  """Returns the name under which rows of a tag are counted and scored.

  A tag stays as it is if `scheme` is as-written, and if it names no language that is known.

  Raises:
    ConfigError: there is no such scheme.
  """
  if scheme not in SCHEMES:
    known = ", ".join(map(repr, SCHEMES))
    raise ConfigError(f"language_key: {scheme!r} is not one of {known}")
  return tag if scheme == AS_WRITTEN else _language_script(tag)


@functools.lru_cache(maxsize=2**16)
def _language_script(tag: str) -> str:
  language = _parsed(tag)
  return f"{language.to_alpha3()}-{_script(language)}" if language else tag


def _parsed(tag: str) -> Language | None:
  """Returns the language that a tag is counted as; None where it names none that is known."""
  try:
    found = Language.get(tag).prefer_macrolanguage()
    found.to_alpha3()
  except (ValueError, LookupError):
    return None
  if not found.language or _NO_LANGUAGE.fullmatch(found.language) or not found.is_valid():
    return None  # a tag such as und-Latn has no language, either
  return found.update_dict({"language": _COUNTED_AS.get(found.language, found.language)})


def _script(language: Language) -> str:
  """Returns the script that is written or likely."""
  script = language.script or LIKELY_SCRIPTS.get(str(language.language))
  script = script or str(language.maximize().script)
  return _SAME_SCRIPT.get(script, script)


def is_known(tag: str) -> bool:
  """Returns whether a tag names a known language."""
  return _parsed(tag) is not None


def unknown_text(rows: Mapping[str, int]) -> str:
  """Returns the tags that name no known language, with the numbers of their rows."""
  return ", ".join(f"{tag!r} {n:,}" for tag, n in rows.items() if not is_known(tag))


def bare_code(tag: str) -> str:
  """Returns the shortest code of the language alone, he of heb_Hebr, as model cards name it."""
  language = _parsed(tag)
  return str(language.language) if language else tag.replace("_", "-").split("-")[0]


def merged(tags: Iterable[str], scheme: str = LANGUAGE_SCRIPT) -> dict[str, list[str]]:
  """Returns the keys that stand for several of the tags, with these."""
  spellings = defaultdict(set)
  for tag in tags:
    spellings[language_key(tag, scheme)].add(tag)
  return {key: sorted(found) for key, found in sorted(spellings.items()) if len(found) > 1}


def merges_text(merges: dict[str, list[str]]) -> str:
  """Returns a line per key of `merged` below a heading; empty where there is none."""
  lines = [f"  {key}: {', '.join(tags)}" for key, tags in merges.items()]
  return "\n".join(["counted as one language:", *lines]) if lines else ""
