"""Home Assistant's sentence templates: which intents are told apart, expansion, pairing by intent.

`[optional]`, `(one|of|these)`, `(in;any;order)`, `{list:slot}` and `<rule>` nest freely. Knows the
template language and its intents; no files, splits or other sources.
"""

import dataclasses
import functools
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from random import Random
from typing import Any, Literal

# Intents that one utterance may well mean at the same time.
MERGED = {
  "HassCancelAllTimers": "HassCancelTimer",
  "HassClimateSetFanMode": "HassFanSetSpeed",
  "HassLawnMowerDock": "HassVacuumReturnToBase",
  "HassLawnMowerStartMowing": "HassVacuumStart",
  "HassListRemoveItem": "HassListCompleteItem",
  "HassSetVolumeRelative": "HassSetVolume",
  "HassShoppingListAddItem": "HassListAddItem",
  "HassShoppingListCompleteItem": "HassListCompleteItem",
  "HassVacuumCleanArea": "HassVacuumStart",
}
# Setting a light or a cover is also turning it on or off; the others are free text or small talk.
DROPPED = {
  "HassBroadcast",
  "HassLightSet",
  "HassMediaSearchAndPlay",
  "HassNevermind",
  "HassRespond",
  "HassSetPosition",
}

PER_INTENT = 60  # utterances drawn per language and intent
QUERIES, NEGATIVES = 14, 9  # per language and intent, and per query

# Names, areas and free text have no word list. A code tells nothing of intent or language.
_CODES = tuple(f"{letter}{digit}" for letter in "ABCDEFGHJKLMNPRSTUVWXYZ" for digit in range(1, 10))
_TOKEN = re.compile(r"\{[^}]*\}|<[^>]*>|[\[\]()|;]|[^\[\]()|;{}<>]+")

ByLanguage = dict[str, dict[str, list[str]]]  # language -> intent -> utterances


@dataclasses.dataclass(frozen=True)
class Node:
  """A piece of a template: a literal, a name to look up, or other pieces."""

  kind: Literal["text", "list", "rule", "sequence", "choice", "permutation", "optional"]
  text: str = ""
  parts: tuple["Node", ...] = ()


@dataclasses.dataclass(frozen=True)
class Utterance:
  """A request to a home assistant, and what it was expanded from."""

  intent: str
  template: str
  text: str


def templates(language: dict[str, Any]) -> dict[str, list[str]]:
  """Returns intent -> sentence templates of one language file; merged intents under one name."""
  found: dict[str, list[str]] = defaultdict(list)
  intents: dict[str, Any] = language["intents"]
  for intent in sorted(intents.keys() - DROPPED):
    sentences = [s for data in intents[intent]["data"] for s in data["sentences"]]
    found[MERGED.get(intent, intent)] += sentences
  return dict(found)


@functools.cache
def parse_template(template: str) -> Node:
  """Returns the syntax tree of a template."""
  return _group(deque(_TOKEN.findall(template)))


def _group(tokens: deque[str]) -> Node:
  """Returns the alternatives up to the closing bracket, which is consumed too."""
  branches: list[list[Node]] = [[]]
  kind: Literal["choice", "permutation"] = "choice"
  while tokens and (token := tokens.popleft()) not in ("]", ")"):
    if token in ("|", ";"):
      kind = "permutation" if token == ";" else kind
      branches.append([])
    else:
      branches[-1].append(_piece(token, tokens))
  return Node(kind, parts=tuple(Node("sequence", parts=tuple(branch)) for branch in branches))


def _piece(token: str, rest: deque[str]) -> Node:
  match token[0]:
    case "(":
      return _group(rest)
    case "[":
      return Node("optional", parts=(_group(rest),))
    case "{":
      return Node("list", token[1:-1].split(":")[0])
    case "<":
      return Node("rule", token[1:-1])
    case _:
      return Node("text", token)


def utterances(language: dict[str, Any], rng: Random) -> list[Utterance]:
  """Returns up to PER_INTENT utterances per intent; a text drawn for two intents is left out."""
  grammar = _Grammar(language, rng)
  drawn: dict[str, dict[str, Utterance]] = defaultdict(dict)  # text -> intent -> utterance
  for intent, choices in templates(language).items():
    mine: set[str] = set()
    for _ in range(4 * PER_INTENT):  # short templates repeat themselves
      if len(mine) == PER_INTENT:
        break
      template = rng.choice(choices)
      text = grammar.sentence(template)
      if sum(map(str.isalpha, text)) >= 2:
        mine.add(text.casefold())
        drawn[text.casefold()].setdefault(intent, Utterance(intent, template, text))
  return [u for by_intent in drawn.values() if len(by_intent) == 1 for u in by_intent.values()]


def pairs(by_language: ByLanguage, rng: Random) -> Iterator[tuple[str, str, list[str]]]:
  """Yields language and text of a query, and its documents: one of its intent, nine of others."""
  able = {
    lang: intents for lang, intents in sorted(by_language.items()) if len(intents) > NEGATIVES
  }
  cells = [(lang, intent) for lang, intents in able.items() for intent in sorted(intents)]
  for lang, intent in cells:
    for text in rng.sample(able[lang][intent], min(QUERIES, len(able[lang][intent]))):
      partner = _partner(lang, intent, able, rng)
      others = [other for other in able[partner][intent] if other != text]
      if others:
        sides = [(lang, text), (partner, rng.choice(others))]
        (query_lang, query), (passage_lang, passage) = rng.sample(sides, 2)
        wrong = rng.sample(sorted(able[passage_lang].keys() - {intent}), NEGATIVES)
        negatives = [rng.choice(able[passage_lang][other]) for other in wrong]
        yield query_lang, query, [passage, *negatives]


def _partner(lang: str, intent: str, by_language: ByLanguage, rng: Random) -> str:
  """Returns the same language half of the time, else mostly English, which aligns the others."""
  if rng.random() < 0.5:
    return lang
  if lang != "en" and intent in by_language["en"] and rng.random() < 0.8:
    return "en"
  return rng.choice([other for other, intents in by_language.items() if intent in intents])


class _Grammar:
  """Random sentences of one language file."""

  def __init__(self, language: dict[str, Any], rng: Random):
    self._rules: dict[str, str] = language["expansion_rules"]
    self._lists: dict[str, dict[str, Any]] = language["lists"]
    self._rng = rng

  def sentence(self, template: str) -> str:
    """Returns one random expansion of a template, blanks squeezed.

    Raises:
      KeyError: the template names a rule that the language file lacks.
    """
    return " ".join(self._expand(parse_template(template)).split())

  def _expand(self, node: Node) -> str:
    match node.kind:
      case "text":
        return node.text
      case "list":
        return self._list_value(node.text)
      case "rule":
        return self._expand(parse_template(self._rules[node.text]))
      case "sequence":
        return "".join(map(self._expand, node.parts))
      case "permutation":
        return " ".join(map(self._expand, self._rng.sample(node.parts, len(node.parts))))
      case "choice":
        return self._expand(self._rng.choice(node.parts))
      case "optional":
        return self._expand(node.parts[0]) if self._rng.random() < 0.5 else ""

  def _list_value(self, name: str) -> str:
    content = self._lists.get(name, {})
    if "values" in content:
      value = self._rng.choice(content["values"])
      return self._expand(parse_template(value if isinstance(value, str) else value["in"]))
    if "range" in content:
      return str(self._rng.randint(content["range"]["from"], content["range"]["to"]))
    return self._rng.choice(_CODES)
