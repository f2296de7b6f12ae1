"""Checks D01 to D11 and D15: the text files of a folder, as their consumers parse them."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from mlembed_jax.hf import names
from mlembed_jax.hf.card import HEADINGS, TAGS
from mlembed_jax.hf.folder import INDEX, WEIGHTS
from mlembed_jax.hf.subject import ERROR, SKIPPED, WARNING, Said, Subject

AGAIN = "Export the folder again."
FILES = (
  *("config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"),
  *("config_sentence_transformers.json", "sentence_bert_config.json", "README.md"),
  *("mlembed.json", "parity.json"),
)
LEGACY = "sentence_transformers.models."
MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
IDENTITY = "torch.nn.modules.linear.Identity"  # the only one that all readers of Dense know
NUMBER, COUNT, FLAG = (int, float), (int,), (bool,)
SCHEMAS: dict[str, dict[str, tuple[type, ...]]] = {
  # TEI parses every one of these.
  "config.json": {
    **dict.fromkeys(names.CONFIG_KEYS.values(), COUNT),
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
    "max_position_embeddings": COUNT,
    "architectures": (list,),
    "model_type": (str,),
    "hidden_act": (str,),
    "attention_bias": FLAG,
    "use_sliding_window": FLAG,
  },
  "sentence_bert_config.json": {"max_seq_length": COUNT, "do_lower_case": FLAG},
  "config_sentence_transformers.json": {"prompts": (dict,)},
  "tokenizer_config.json": {"tokenizer_class": (str,), "eos_token": (str,)},
}
NEWEST_VERSION = (4, 57, 2)  # from 4.57.3 on, transformers 4.57 trusts a tokenizer as it is
CLASSIFIER_KEYS = ("num_labels", "id2label", "label2id")
MAX_LENGTH_RATIO = 8  # of the length that is allowed to the one that was trained


def d01(s: Subject) -> Iterator[Said]:
  """All files are there, and none that a loader would take for weights."""
  stored = {p.name for p in s.path.glob("*.safetensors")}
  index = s.json(INDEX)
  allowed = set(index.get("weight_map", {}).values()) if index else {WEIGHTS}
  for file in FILES:
    if not (s.path / file).is_file():
      yield ERROR, file, "is not there", AGAIN
  if not allowed & stored:
    yield ERROR, WEIGHTS, "the folder has no weights", AGAIN
  for file in sorted(stored - allowed):
    yield ERROR, file, "vLLM loads every such file here", "Move it into a folder below."
  for path in sorted([*s.path.glob("*.bin"), *s.path.glob("*.pth")]):
    yield ERROR, path.name, "is taken for weights", "Remove it."


def d02(s: Subject) -> Iterator[Said]:
  """Every JSON file parses, and has the types that the strictest reader wants."""
  for path in sorted(s.path.rglob("*.json")):
    file = path.relative_to(s.path).as_posix()
    try:
      s._json(file)
    except (OSError, ValueError) as error:
      yield ERROR, file, f"is no JSON: {error}", AGAIN
  for file, types in SCHEMAS.items():
    if found := s.json(file):
      yield from _types(file, found, types)
  prompts = s.json("config_sentence_transformers.json").get("prompts", {})
  for name, prompt in prompts.items() if isinstance(prompts, dict) else ():
    if not isinstance(prompt, str):
      text = f"the prompt {name!r} is {prompt!r}; TEI reads strings alone"
      yield ERROR, "config_sentence_transformers.json", text, 'Write "" for none.'


def _types(
  file: str, found: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]
) -> Iterator[Said]:
  for key, kinds in types.items():
    value = found.get(key)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
      wanted = kinds[-1].__name__
      yield ERROR, file, f"{key} is {value!r}, expected {wanted}", AGAIN


def d05(s: Subject) -> Iterator[Said]:
  """Both spellings of the rotary base, of transformers 4 and 5, say the same."""
  old = s.config.get("rope_theta")
  new = (s.config.get("rope_parameters") or {}).get("rope_theta")
  if old is None or old != new:
    found = f"rope_theta is {old}, rope_parameters.rope_theta is {new}"
    remedy = "Write the same number in both: with one, transformers 4 or 5 takes another."
    yield ERROR, "config.json", found, remedy


def d06(s: Subject) -> Iterator[Said]:
  """The architecture is known, and nothing says more than an encoder has."""
  config, kind = s.config, str(s.config.get("model_type")).removeprefix(names.REMOTE)
  if kind not in names.FAMILIES:
    known = ", ".join(names.FAMILIES)
    yield ERROR, "config.json", f"model_type is {kind!r}; known are {known}", AGAIN
  if not isinstance(config.get("eos_token_id"), int):
    found = f"eos_token_id is {config.get('eos_token_id')!r}; TEI reads one number"
    yield ERROR, "config.json", found, "Write the id of the pooled token."
  for key in CLASSIFIER_KEYS:
    if key in config:
      yield ERROR, "config.json", f"{key}: TEI looks for a classifier", "Remove the key."
  for key in ("auto_map",) if not s.is_remote else ():
    if key in config:
      yield ERROR, "config.json", f"{key}: loaders look for code", "Remove the key."
  if s.is_remote:
    yield from _remote_code(s)
  version = str(config.get("transformers_version", ""))
  if not version or _version(version) > NEWEST_VERSION:
    found = f"transformers_version is {version or 'absent'}: 4.57 warns of a wrong tokenizer"
    yield WARNING, "config.json", found, "Write 4.51.0."


def _version(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(".")[:3] if part.isdecimal())


def _remote_code(s: Subject) -> Iterator[Said]:
  named = s.config.get("auto_map") or {}
  for key in ("AutoConfig", "AutoModel"):
    file = str(named.get(key, "")).partition(".")[0] + ".py"
    if not (s.path / file).is_file():
      yield ERROR, "config.json", f"auto_map.{key}: there is no {file}", AGAIN


def d07(s: Subject) -> Iterator[Said]:
  """modules.json has the spelling that all versions of sentence-transformers and TEI read."""
  entries = s.modules()
  kinds = [str(m.get("type")) for m in entries]
  if newer := [k for k in kinds if not k.startswith(LEGACY)]:
    found = f"{newer[0]}: re-saved by sentence-transformers 5.4 or newer; 5.1 and TEI fail"
    yield ERROR, "modules.json", found, AGAIN
    return
  short = [k.removeprefix(LEGACY) for k in kinds]
  if unknown := set(short) - set(MODULES):
    yield ERROR, "modules.json", f"{sorted(unknown)} is not read by TEI", AGAIN
  if short[:2] != ["Transformer", "Pooling"] or short[-1:] != ["Normalize"]:
    found = f"the order is {short}; expected Transformer, Pooling, (Dense), Normalize"
    yield ERROR, "modules.json", found, AGAIN
  if [m.get("idx") for m in entries] != list(range(len(entries))):
    yield ERROR, "modules.json", "idx does not count from 0", AGAIN
  for path in (m.get("path") for m in entries):
    if path and not (s.path / path / "config.json").is_file():
      yield ERROR, "modules.json", f"there is no {path}/config.json", AGAIN


def d08(s: Subject) -> Iterator[Said]:
  """Pooling means the last token to old and new readers."""
  file = s.module("Pooling") or "1_Pooling/config.json"
  pooling = s.json(file)
  chosen = [key for key, value in pooling.items() if value is True]
  if chosen[:1] != ["pooling_mode_lasttoken"] or set(chosen[1:]) > {"include_prompt"}:
    found = f"the true keys are {chosen}; vLLM takes the first, TEI the only one"
    yield ERROR, file, found, "Only pooling_mode_lasttoken, then include_prompt."
  if pooling.get("pooling_mode", "lasttoken") != "lasttoken":
    yield ERROR, file, f"pooling_mode is {pooling['pooling_mode']!r}", "Write lasttoken."
  for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens"):
    if key not in pooling:
      yield ERROR, file, f"{key} is absent; TEI and llama.cpp look it up", AGAIN
  if "embedding_dimension" in pooling:
    found = "embedding_dimension: sentence-transformers 5.1 fails"
    yield ERROR, file, found, "Name it word_embedding_dimension."
  if (width := pooling.get("word_embedding_dimension")) != s.config.get("hidden_size"):
    yield ERROR, file, f"word_embedding_dimension is {width}, not hidden_size", AGAIN


def d10(s: Subject) -> Iterator[Said]:
  """There are prompts of queries and documents."""
  file = "config_sentence_transformers.json"
  prompts = s.json(file).get("prompts") or {}
  for name in ("query", "document"):
    if name not in prompts:
      yield ERROR, file, f"there is no prompt {name!r}", "Add it; document may be empty."
  query = prompts.get("query")
  if isinstance(query, str) and not (
    query.startswith("Instruct: ") and query.endswith("\nQuery: ")
  ):
    found = f"the prompt of queries is {query!r}"
    yield WARNING, file, found, "Training used 'Instruct: ...\\nQuery: '; was it another model?"


def d11(s: Subject) -> Iterator[Said]:
  """Texts are cut where the model still knows positions."""
  file = "sentence_bert_config.json"
  allowed = s.json(file).get("max_seq_length")
  positions = s.config.get("max_position_embeddings")
  if not isinstance(allowed, int) or not isinstance(positions, int):
    return  # D02 says so
  if allowed > positions:
    found = f"max_seq_length {allowed} is more than max_position_embeddings {positions}"
    yield ERROR, file, found, "Lower it."
  trained = s.ours.get("pooling", {}).get("trained_length")
  if trained and allowed > MAX_LENGTH_RATIO * trained:
    found = f"max_seq_length {allowed} is {allowed / trained:.0f} times the trained {trained}"
    yield WARNING, file, found, "Set export.max_seq_length to what you tested."


def d15(s: Subject) -> Iterator[Said]:
  """The card has its parts, and states what mlembed.json states."""
  file = "README.md"
  if not (s.path / file).is_file() or not s.ours:
    yield SKIPPED, file, "no card or no mlembed.json", ""
    return
  text = (s.path / file).read_text(encoding="utf-8")
  front, _, body = text.removeprefix("---\n").partition("\n---\n")
  wanted = ("library_name: sentence-transformers", *(f'- "{tag}"' for tag in TAGS))
  for line in wanted:
    if line not in front.splitlines():
      yield WARNING, file, f"the front matter has no line {line}", "Add it."
  lines = body.splitlines()
  for heading in HEADINGS:
    if f"## {heading}" not in lines:
      yield WARNING, file, f"there is no heading {heading!r}", "Add it."
  yield from _stated_sizes(s, file, lines)


def _stated_sizes(s: Subject, file: str, lines: list[str]) -> Iterator[Said]:
  ours = s.ours
  for row, size in (
    ("Parameters", f"{ours['body']['parameters']:,}"),
    ("Layers", str(ours["exits"]["exported"])),
    ("Dimension", str(ours["dims"]["exported"])),
  ):
    stated = next((line for line in lines if line.startswith(f"| {row} |")), "")
    if stated.split("|")[2:3] and size not in itertools.chain(stated.split("|")[2].split()):
      yield WARNING, file, f"{row}: the card says {stated.split('|')[2].strip()}", f"It is {size}."
