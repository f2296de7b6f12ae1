"""Checks D01, D02, D05 to D08, D10, D11, D15: small files of a folder, as their readers parse them.

TEI, vLLM and llama.cpp are not run: what they require was read in their source.
"""

from collections.abc import Iterator

from mlembed_jax.errors import LoadError
from mlembed_jax.families import FAMILIES
from mlembed_jax.hf import config_files, own_file, param_mapping
from mlembed_jax.hf.card import HEADINGS, TAGS
from mlembed_jax.hf.checks.finding import (
  AGAIN,
  CONSUMERS,
  ERROR,
  LLAMA,
  OURS,
  OWN,
  SKIPPED,
  ST,
  TEI,
  TRANSFORMERS,
  VLLM,
  WARNING,
  Said,
  Subject,
)
from mlembed_jax.hf.folder import INDEX, WEIGHTS
from mlembed_jax.hf.own_file import OwnFile
from mlembed_jax.hf.parity import FILE as PARITY

MODULES, BERT = "modules.json", "sentence_bert_config.json"
PROMPTS, CARD = "config_sentence_transformers.json", "README.md"
NEEDED = {  # file -> its readers
  "config.json": CONSUMERS,
  "tokenizer.json": CONSUMERS,
  "tokenizer_config.json": (ST, TRANSFORMERS, VLLM, LLAMA),
  MODULES: (ST, TEI, VLLM, LLAMA),
  PROMPTS: (OURS, ST),
  BERT: (ST, TEI, VLLM),
}
LEGACY = "sentence_transformers.models."
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
NEWEST_VERSION = (4, 57, 2)  # from 4.57.3 on, transformers 4.57 trusts a tokenizer as it is
CLASSIFIER_KEYS = ("num_labels", "id2label", "label2id")
MAX_LENGTH_RATIO = 8  # of the length that is allowed to the one that was trained

Types = dict[str, tuple[type, ...]]
NUMBER, COUNT, FLAG, TEXT = (int, float), (int,), (bool,), (str,)
SHAPE: Types = {key: COUNT for key in param_mapping.CONFIG_KEYS.values() if key != "head_dim"}
SHAPE |= {"rms_norm_eps": NUMBER, "max_position_embeddings": COUNT, "model_type": TEXT}
SHAPE |= {"architectures": (list,), "hidden_act": TEXT, "use_sliding_window": FLAG}
OF_FAMILY: Types = {"head_dim": COUNT, "attention_bias": FLAG}  # see Family.stated_keys
SCHEMAS: dict[str, Types] = {
  PROMPTS: {"prompts": (dict,)},
  "tokenizer_config.json": {"tokenizer_class": TEXT, "eos_token": (str, dict)},
}


def d01(s: Subject) -> Iterator[Said]:
  """All files are there, and none that a loader would take for weights."""
  for file, readers in NEEDED.items():
    if not s.has(file):
      yield Said(ERROR, file, "is not there", AGAIN, readers)
  if not s.has(CARD):
    found = "is not there: sentence-transformers asks the Hub for it"
    yield Said(WARNING, CARD, found, "Write one.", (ST,))
  yield from _own_files(s)
  stored = {p.name for p in s.path.glob("*.safetensors")}
  allowed = set(s.json(INDEX).get("weight_map", {}).values()) if s.has(INDEX) else {WEIGHTS}
  if not allowed & stored:
    yield Said(ERROR, WEIGHTS, "the folder has no weights", AGAIN)
  for file in sorted(stored - allowed):
    remedy = "Move it into a folder below."
    yield Said(ERROR, file, "vLLM takes every such file for weights", remedy, (VLLM,))
  for path in sorted([*s.path.glob("*.bin"), *s.path.glob("*.pth")]):
    yield Said(WARNING, path.name, "loaders may take it for weights", "Remove it.")


def _own_files(s: Subject) -> Iterator[Said]:
  if not s.json(OWN):
    found = "absent or empty: not an export of mlembed_jax; what it would say is not checked"
    yield Said(SKIPPED, OWN, found)
  elif not s.has(PARITY):
    yield Said(ERROR, PARITY, "is not there: nothing to compare vectors with", AGAIN, (OURS,))


def d02(s: Subject) -> Iterator[Said]:
  """Every JSON file parses, and has the types that the strictest reader wants."""
  for path in sorted(s.path.rglob("*.json")):
    file = path.relative_to(s.path).as_posix()
    try:
      s.parse(file)
    except (OSError, ValueError) as error:
      yield Said(ERROR, file, f"is no JSON: {error}", AGAIN)
    else:
      yield from _own_types(s) if file == OWN else ()
  keys = s.family.stated_keys if s.family else ()
  config = SHAPE | {key: OF_FAMILY[key] for key in keys}
  for file, types in {"config.json": config, **SCHEMAS}.items():
    yield from _types(s, file, types)
  for name, prompt in s.prompts.items():
    if not isinstance(prompt, str):
      found = f"the prompt {name!r} is {prompt!r}; TEI reads strings alone"
      yield Said(ERROR, PROMPTS, found, 'Write "" for none.', (TEI,))


def _own_types(s: Subject) -> Iterator[Said]:
  try:
    own_file.read(s.path)
  except LoadError as error:
    yield Said(ERROR, OWN, str(error), AGAIN, (OURS,))


def _types(s: Subject, file: str, types: Types) -> Iterator[Said]:
  found = s.json(file)
  for key, kinds in types.items() if found else ():
    value = found.get(key)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
      wanted = " or ".join(kind.__name__ for kind in kinds)
      # Others have defaults; a size is needed by all.
      readers = CONSUMERS if key in param_mapping.CONFIG_KEYS.values() else (TEI, VLLM)
      yield Said(ERROR, file, f"{key} is {value!r}, expected {wanted}", AGAIN, readers)


def d05(s: Subject) -> Iterator[Said]:
  """Both spellings of the rotary base, of transformers 4 and 5, say the same."""
  old = s.config.get("rope_theta")
  new = (s.config.get("rope_parameters") or {}).get("rope_theta")
  found = f"rope_theta is {old}, rope_parameters.rope_theta is {new}"
  remedy = "Write the same number in both."
  if old is None:
    readers = tuple(c for c in CONSUMERS if c != OURS)  # which reads either
    yield Said(ERROR, "config.json", f"{found}: most would take another", remedy, readers)
  elif new is None:
    yield Said(WARNING, "config.json", found, remedy, (ST, TRANSFORMERS))
  elif old != new:
    yield Said(ERROR, "config.json", found, remedy)


def d06(s: Subject) -> Iterator[Said]:
  """The architecture is known, and nothing says more than an encoder has."""
  file, config = "config.json", s.config
  if not s.family:
    known = ", ".join(FAMILIES)
    found = f"model_type is {s.kind!r}; known are {known}"
    yield Said(ERROR, file, found, "Examine it with its own tools.", (OURS,))
  eos = config.get("eos_token_id")
  if not isinstance(eos, int):
    found = f"eos_token_id is {eos!r}; TEI reads one number"
    yield Said(ERROR, file, found, "Write the id of the pooled token.", (TEI,))
  for key in CLASSIFIER_KEYS:
    if key in config:
      yield Said(ERROR, file, f"{key}: TEI looks for a classifier", "Remove the key.", (TEI,))
  version = str(config.get("transformers_version", ""))
  if not version or _version(version) > NEWEST_VERSION:
    found = f"transformers_version is {version or 'absent'}: 4.57 warns of a wrong tokenizer"
    yield Said(WARNING, file, found, "Write 4.51.0.", (ST, TRANSFORMERS))
  yield from _code(s)


def _version(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(".")[:3] if part.isdecimal())


def _code(s: Subject) -> Iterator[Said]:
  """Says where config.json names code that is absent, not ours, or not needed."""
  named = s.config.get("auto_map") or {}
  if named and not s.is_remote:
    yield Said(ERROR, "config.json", "auto_map: loaders look for code", "Remove the key.")
  for key in ("AutoConfig", "AutoModel") if s.is_remote else ():
    file = str(named.get(key)).partition(".")[0] + ".py"
    if not s.has(file):
      yield Said(ERROR, "config.json", f"auto_map.{key}: there is no {file}", AGAIN)
  if foreign := foreign_code(s):
    found = "is or names other code than this version of mlembed_jax writes; it is not run here"
    yield Said(WARNING, foreign[0], found, "Read it before you trust it.", (ST, TRANSFORMERS))


def foreign_code(s: Subject) -> list[str]:
  """Returns the files of a folder that are code, or name some, that our exports do not hold.

  Loaders that trust a folder also run code below it, of other repositories, of any package.
  """
  known = config_files.remote_code(s.family) if s.is_remote and s.family else {}
  found = sorted(path.relative_to(s.path).as_posix() for path in s.path.rglob("*.py"))
  foreign = [f for f in found if (s.path / f).read_text(encoding="utf-8") != known.get(f)]
  for file in ("config.json", "tokenizer_config.json"):
    named = s.json(file).get("auto_map") or {}
    values = named.values() if isinstance(named, dict) else [named]
    if any(str(value).partition(".")[0] + ".py" not in known for value in values):
      foreign.append(file)
  if any(not str(m.get("type")).startswith("sentence_transformers.") for m in s.modules()):
    foreign.append(MODULES)
  return foreign


def d07(s: Subject) -> Iterator[Said]:
  """modules.json has the spelling that all versions of sentence-transformers and TEI read."""
  entries = s.modules()
  kinds = [str(m.get("type")) for m in entries]
  if newer := [k for k in kinds if not k.startswith(LEGACY)]:
    found = f"{newer[0]}: re-saved by sentence-transformers 5.4 or newer; 5.1 and TEI fail"
    yield Said(ERROR, MODULES, found, AGAIN, (ST, TEI, VLLM))
    return
  short = [k.removeprefix(LEGACY) for k in kinds]
  if unknown := sorted(set(short) - set(KINDS)):
    yield Said(ERROR, MODULES, f"{unknown} is not read by TEI", AGAIN)
  elif short not in (list(KINDS), [k for k in KINDS if k != "Dense"]):
    found = f"the order is {short}; expected Transformer, Pooling, (Dense), Normalize"
    yield Said(ERROR, MODULES, found, AGAIN)
  if [m.get("idx") for m in entries] != list(range(len(entries))):
    yield Said(ERROR, MODULES, "idx does not count from 0", AGAIN)
  for path in (m.get("path") for m in entries):
    if path and not s.has(f"{path}/config.json"):
      yield Said(ERROR, MODULES, f"there is no {path}/config.json", AGAIN)


def d08(s: Subject) -> Iterator[Said]:
  """Pooling means the last token to old and new readers."""
  file = f"{s.module('Pooling') or '1_Pooling'}/config.json"
  pooling = s.json(file)
  chosen = [key for key, value in pooling.items() if value is True]
  mode = pooling.get("pooling_mode")
  if chosen[:1] != ["pooling_mode_lasttoken"] or set(chosen[1:]) - {"include_prompt"}:
    found = f"the true keys are {chosen}; vLLM takes the first, TEI the only one"
    remedy = "Only pooling_mode_lasttoken, then include_prompt."
    readers = NEEDED[MODULES] if mode == "lasttoken" else ()  # ours pools nothing but the last
    yield Said(ERROR, file, found, remedy, readers)
  if mode not in (None, "lasttoken"):
    yield Said(ERROR, file, f"pooling_mode is {mode!r}", "Write lasttoken.")
  for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens"):
    if key not in pooling:
      found = f"{key} is absent; TEI and llama.cpp look it up"
      yield Said(ERROR, file, found, AGAIN, (TEI, LLAMA))
  if "embedding_dimension" in pooling:
    found = "embedding_dimension: sentence-transformers 5.1 fails"
    yield Said(ERROR, file, found, "Name it word_embedding_dimension.", (ST,))
  width, hidden = pooling.get("word_embedding_dimension"), s.config.get("hidden_size")
  if width != hidden:
    found = f"word_embedding_dimension is {width}, hidden_size {hidden}"
    yield Said(ERROR, file, found, AGAIN, (ST, TEI))


def d10(s: Subject) -> Iterator[Said]:
  """There are prompts of queries and documents."""
  for name in ("query", "document"):
    if name not in s.prompts:
      yield Said(ERROR, PROMPTS, f"there is no prompt {name!r}", "Add it; document may be empty.")
  query = s.prompts.get("query")
  if isinstance(query, str) and not (
    query.startswith("Instruct: ") and query.endswith(("\nQuery: ", "\nQuery:"))
  ):
    remedy = "Training used 'Instruct: ...\\nQuery: '; was it another model?"
    yield Said(WARNING, PROMPTS, f"the prompt of queries is {query!r}", remedy)


def d11(s: Subject) -> Iterator[Said]:
  """Texts are cut where the model still knows positions."""
  allowed, positions = s.allowed, s.config.get("max_position_embeddings")
  if allowed is None:
    yield Said(ERROR, BERT, "max_seq_length is not a number; TEI needs it", AGAIN, (ST, TEI))
  if not isinstance(s.json(BERT).get("do_lower_case"), bool):
    found = "there is no do_lower_case: vLLM ignores the file"
    yield Said(ERROR, BERT, found, "Write false.", (VLLM,))
  if allowed and isinstance(positions, int) and allowed > positions:
    found = f"max_seq_length {allowed} is more than max_position_embeddings {positions}"
    yield Said(ERROR, BERT, found, "Lower it.")
  trained = s.own and s.own.pooling.trained_length
  if allowed and trained and allowed > MAX_LENGTH_RATIO * trained:
    found = f"max_seq_length {allowed} is {allowed / trained:.0f} times the trained {trained}"
    yield Said(WARNING, BERT, found, "Set export.max_seq_length to what you tested.")


def d15(s: Subject) -> Iterator[Said]:
  """The card has its parts, and states what mlembed.json states."""
  text = (s.path / CARD).read_text(encoding="utf-8")
  front, _, body = text.removeprefix("---\n").partition("\n---\n")
  for line in ("library_name: sentence-transformers", *(f'- "{tag}"' for tag in TAGS)):
    if line not in front.splitlines():
      yield Said(WARNING, CARD, f"the front matter has no line {line}", "Add it.")
  lines = body.splitlines()
  for heading in HEADINGS:
    if f"## {heading}" not in lines:
      yield Said(WARNING, CARD, f"there is no heading {heading!r}", "Add it.")
  if s.own:
    yield from _stated_sizes(s.own, lines)


def _stated_sizes(own: OwnFile, lines: list[str]) -> Iterator[Said]:
  for row, size in (
    ("Parameters", f"{own.body.parameters:,}"),
    ("Layers", str(own.exits.exported)),
    ("Dimension", str(own.dims.exported)),
  ):
    cells = next((line.split("|") for line in lines if line.startswith(f"| {row} |")), None)
    stated = cells[2].strip() if cells else "nothing"
    if stated.split()[0] != size:
      found = f"{row}: the card says {stated}, mlembed.json {size}"
      yield Said(WARNING, CARD, found, f"Write {size}.")
