"""Checks of the small files of a folder, as their readers parse them.

TEI, vLLM and llama.cpp are not run: what they require was read in their source.
"""

from collections.abc import Iterator

from mlembed_jax import files
from mlembed_jax.errors import LoadError
from mlembed_jax.families import FAMILIES
from mlembed_jax.hf import own_file, param_mapping
from mlembed_jax.hf.card import HEADINGS, TAGS
from mlembed_jax.hf.checks.consumers import TEI, Fact, needed_files
from mlembed_jax.hf.checks.finding import AGAIN, ERROR, SKIPPED, WARNING, File, Finding, Subject
from mlembed_jax.hf.checks.installed import foreign_code
from mlembed_jax.hf.file_names import INDEX, WEIGHTS
from mlembed_jax.hf.own_file import OwnFile
from mlembed_jax.hf.parity import FILE as PARITY
from mlembed_jax.hf.recipe import FLAGS, LAST

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
  File.PROMPTS: {"prompts": (dict,)},
  File.TOKENIZER_CONFIG: {"tokenizer_class": TEXT, "eos_token": (str, dict)},
}


def check_files(s: Subject) -> Iterator[Finding]:
  """All files are there, and none that a loader would take for weights."""
  for file in needed_files():
    if not s.has(file):
      yield Finding(ERROR, file, "is not there", AGAIN, file)
  if not s.has(File.CARD):
    found = "is not there: sentence-transformers asks the Hub for it"
    yield Finding(WARNING, File.CARD, found, "Write one.", File.CARD)
  yield from _own_files(s)
  stored = {p.name for p in s.path.glob("*.safetensors")}
  allowed = set(s.json(INDEX).get("weight_map", {}).values()) if s.has(INDEX) else {WEIGHTS}
  if not allowed & stored:
    yield Finding(ERROR, WEIGHTS, "the folder has no weights", AGAIN)
  for file in sorted(stored - allowed):
    found, remedy = "vLLM takes every such file for weights", "Move it into a folder below."
    yield Finding(ERROR, file, found, remedy, Fact.EVERY_SAFETENSORS)
  for path in sorted([*s.path.glob("*.bin"), *s.path.glob("*.pth")]):
    yield Finding(WARNING, path.name, "loaders may take it for weights", "Remove it.")


def _own_files(s: Subject) -> Iterator[Finding]:
  if not s.json(File.OWN):
    found = "absent or empty: not an export of mlembed_jax; what it would say is not checked"
    yield Finding(SKIPPED, File.OWN, found)
  elif not s.has(PARITY):
    yield Finding(ERROR, PARITY, "is not there: nothing to compare vectors with", AGAIN, PARITY)


def check_json(s: Subject) -> Iterator[Finding]:
  """Every JSON file parses, and has the types that the strictest reader wants."""
  for path in sorted(s.path.rglob("*.json")):
    file = path.relative_to(s.path).as_posix()
    try:
      s.parse(file)
    except (OSError, ValueError) as error:
      yield Finding(ERROR, file, f"is no JSON: {error}", AGAIN)
    else:
      yield from _own_types(s) if file == File.OWN else ()
  keys = s.family.stated_keys if s.family else ()
  config = SHAPE | {key: OF_FAMILY[key] for key in keys}
  for file, types in {File.CONFIG: config, **SCHEMAS}.items():
    yield from _types(s, file, types)
  for name, prompt in s.prompts.items():
    if not isinstance(prompt, str):
      found = f"the prompt {name!r} is {prompt!r}; TEI reads strings alone"
      yield Finding(ERROR, File.PROMPTS, found, 'Write "" for none.', Fact.TEXT_PROMPTS)


def _own_types(s: Subject) -> Iterator[Finding]:
  try:
    own_file.read(s.path)
  except LoadError as error:
    yield Finding(ERROR, File.OWN, str(error), AGAIN, File.OWN)


def _types(s: Subject, file: str, types: Types) -> Iterator[Finding]:
  found = s.json(file)
  for key, kinds in types.items() if found else ():
    value = found.get(key)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
      wanted = " or ".join(kind.__name__ for kind in kinds)
      # Others have defaults; a size is needed by all.
      fact = Fact.MODEL if key in param_mapping.CONFIG_KEYS.values() else Fact.EVERY_KEY
      yield Finding(ERROR, file, f"{key} is {value!r}, expected {wanted}", AGAIN, fact)


def check_rotary_base(s: Subject) -> Iterator[Finding]:
  """Both spellings of the rotary base, of transformers 4 and 5, say the same."""
  old = s.config.get("rope_theta")
  new = (s.config.get("rope_parameters") or {}).get("rope_theta")
  found = f"rope_theta is {old}, rope_parameters.rope_theta is {new}"
  remedy = "Write the same number in both."
  if old is None:
    yield Finding(ERROR, File.CONFIG, f"{found}: most would take another", remedy, Fact.ROPE_THETA)
  elif new is None:
    yield Finding(WARNING, File.CONFIG, found, remedy, Fact.ROPE_PARAMETERS)
  elif old != new:
    yield Finding(ERROR, File.CONFIG, found, remedy)


def check_architecture(s: Subject) -> Iterator[Finding]:
  """The architecture is known, and nothing says more than an encoder has."""
  file, config = File.CONFIG, s.config
  if not s.family:
    known = ", ".join(FAMILIES)
    found = f"model_type is {s.kind!r}; known are {known}"
    yield Finding(ERROR, file, found, "Examine it with its own tools.", Fact.MODEL_TYPE)
  elif s.family.name != "qwen3":
    yield Finding(SKIPPED, file, f"serves {s.family.title} on CUDA alone", fact=TEI)
  eos = config.get("eos_token_id")
  if not isinstance(eos, int):
    found = f"eos_token_id is {eos!r}; TEI reads one number"
    yield Finding(ERROR, file, found, "Write the id of the pooled token.", Fact.EOS_TOKEN_ID)
  for key in CLASSIFIER_KEYS:
    if key in config:
      found = f"{key}: TEI looks for a classifier"
      yield Finding(ERROR, file, found, "Remove the key.", Fact.NO_CLASSIFIER)
  version = str(config.get("transformers_version", ""))
  if not version or _version(version) > NEWEST_VERSION:
    found = f"transformers_version is {version or 'absent'}: 4.57 warns of a wrong tokenizer"
    yield Finding(WARNING, file, found, "Write 4.51.0.", Fact.TRANSFORMERS_VERSION)
  yield from _code(s)


def _version(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(".")[:3] if part.isdecimal())


def _code(s: Subject) -> Iterator[Finding]:
  """Says where config.json names code that is absent, not ours, or not needed."""
  named = s.config.get("auto_map") or {}
  if named and not s.is_remote:
    yield Finding(ERROR, File.CONFIG, "auto_map: loaders look for code", "Remove the key.")
  for key in ("AutoConfig", "AutoModel") if s.is_remote else ():
    file = str(named.get(key)).partition(".")[0] + ".py"
    if not s.has(file):
      yield Finding(ERROR, File.CONFIG, f"auto_map.{key}: there is no {file}", AGAIN)
  if foreign := foreign_code(s):
    found = "is or names other code than this version of mlembed_jax writes; it is not run here"
    yield Finding(WARNING, foreign[0], found, "Read it before you trust it.")


def check_modules(s: Subject) -> Iterator[Finding]:
  """modules.json has the spelling that all versions of sentence-transformers and TEI read."""
  entries = s.modules()
  kinds = [str(m.get("type")) for m in entries]
  if newer := [k for k in kinds if not k.startswith(LEGACY)]:
    found = f"{newer[0]}: re-saved by sentence-transformers 5.4 or newer; 5.1 and TEI fail"
    yield Finding(ERROR, File.MODULES, found, AGAIN, Fact.MODULE_TYPES)
    return
  short = [k.removeprefix(LEGACY) for k in kinds]
  if unknown := sorted(set(short) - set(KINDS)):
    yield Finding(ERROR, File.MODULES, f"{unknown} is not read by TEI", AGAIN)
  elif short not in (list(KINDS), [k for k in KINDS if k != "Dense"]):
    found = f"the order is {short}; expected Transformer, Pooling, (Dense), Normalize"
    yield Finding(ERROR, File.MODULES, found, AGAIN)
  if [m.get("idx") for m in entries] != list(range(len(entries))):
    yield Finding(ERROR, File.MODULES, "idx does not count from 0", AGAIN)
  for path in (m.get("path") for m in entries):
    if path and not s.has(f"{path}/config.json"):
      yield Finding(ERROR, File.MODULES, f"there is no {path}/config.json", AGAIN)


def check_pooling(s: Subject) -> Iterator[Finding]:
  """Pooling means the same to old and new readers, in an export the last token."""
  file = f"{s.module('Pooling') or '1_Pooling'}/config.json"
  pooling = s.json(file)
  chosen = [key for key, value in pooling.items() if value is True]
  mode = pooling.get("pooling_mode")
  wanted = [key for key, name in FLAGS.items() if name == (LAST if s.is_export else mode)]
  if chosen[:1] != (wanted or chosen[:1]) or not chosen or set(chosen[1:]) - {"include_prompt"}:
    found = f"the true keys are {chosen}; vLLM takes the first, TEI the only one"
    remedy = f"Only {(wanted or ['one pooling_mode_...'])[0]}, then include_prompt."
    yield Finding(ERROR, file, found, remedy, File.POOLING)
  if s.is_export and mode not in (None, LAST):
    yield Finding(ERROR, file, f"pooling_mode is {mode!r}", f"Write {LAST}.")
  for key in ("pooling_mode_cls_token", "pooling_mode_mean_tokens"):
    if key not in pooling:
      found = f"{key} is absent; TEI and llama.cpp look it up"
      yield Finding(ERROR, file, found, AGAIN, Fact.POOLING_FLAGS)
  if "embedding_dimension" in pooling:
    found = "embedding_dimension: sentence-transformers 5.1 fails"
    remedy = "Name it word_embedding_dimension."
    yield Finding(ERROR, file, found, remedy, Fact.EMBEDDING_DIMENSION)
  width, hidden = pooling.get("word_embedding_dimension"), s.config.get("hidden_size")
  if width != hidden:
    found = f"word_embedding_dimension is {width}, hidden_size {hidden}"
    yield Finding(ERROR, file, found, AGAIN, Fact.WORD_EMBEDDING_DIMENSION)


def check_prompts(s: Subject) -> Iterator[Finding]:
  """An export has prompts of queries and documents."""
  if not s.is_export:
    return
  for name in ("query", "document"):
    if name not in s.prompts:
      remedy = "Add it; document may be empty."
      yield Finding(ERROR, File.PROMPTS, f"there is no prompt {name!r}", remedy)
  if s.own and not s.own.prompt_template:
    return
  query = s.prompts.get("query")
  if isinstance(query, str) and not (
    query.startswith("Instruct: ") and query.endswith(("\nQuery: ", "\nQuery:"))
  ):
    remedy = "Training used 'Instruct: ...\\nQuery: '; was it another model?"
    yield Finding(WARNING, File.PROMPTS, f"the prompt of queries is {query!r}", remedy)


def check_text_length(s: Subject) -> Iterator[Finding]:
  """Texts are cut where the model still knows positions."""
  allowed, positions = s.allowed, s.config.get("max_position_embeddings")
  if allowed is None:
    found = "max_seq_length is not a number; TEI needs it"
    yield Finding(ERROR, File.BERT, found, AGAIN, Fact.MAX_SEQ_LENGTH)
  if not isinstance(s.json(File.BERT).get("do_lower_case"), bool):
    found = "there is no do_lower_case: vLLM ignores the file"
    yield Finding(ERROR, File.BERT, found, "Write false.", Fact.DO_LOWER_CASE)
  if allowed and isinstance(positions, int) and allowed > positions:
    found = f"max_seq_length {allowed} is more than max_position_embeddings {positions}"
    yield Finding(ERROR, File.BERT, found, "Lower it.")
  trained = s.own and s.own.pooling.trained_length
  if allowed and trained and allowed > MAX_LENGTH_RATIO * trained:
    found = f"max_seq_length {allowed} is {allowed / trained:.0f} times the trained {trained}"
    yield Finding(WARNING, File.BERT, found, "Set export.max_seq_length to what you tested.")


def check_card(s: Subject) -> Iterator[Finding]:
  """The card has its parts, and states what mlembed.json states."""
  text = (s.path / File.CARD).read_text(encoding="utf-8")
  front, _, body = text.removeprefix("---\n").partition("\n---\n")
  for line in ("library_name: sentence-transformers", *(f'- "{tag}"' for tag in TAGS)):
    if line not in front.splitlines():
      yield Finding(WARNING, File.CARD, f"the front matter has no line {line}", "Add it.")
  lines = body.splitlines()
  for heading in HEADINGS:
    if f"## {heading}" not in lines:
      yield Finding(WARNING, File.CARD, f"there is no heading {heading!r}", "Add it.")
  if s.own:
    yield from _stated_sizes(s.own, lines)


def _stated_sizes(own: OwnFile, lines: list[str]) -> Iterator[Finding]:
  for row, size in (
    ("Parameters", f"{own.body.parameters:,}"),
    ("Layers", str(own.exits.exported)),
    ("Dimension", str(own.dims.exported)),
  ):
    cells = next((line.split("|") for line in lines if line.startswith(f"| {row} |")), None)
    stated = cells[2].strip() if cells else "nothing"
    if stated.split()[0] != size:
      found = f"{row}: the card says {stated}, mlembed.json {size}"
      yield Finding(WARNING, File.CARD, found, f"Write {size}.")


def check_digests(s: Subject) -> Iterator[Finding]:
  """Every file is the one that was exported."""
  if not s.own:
    yield Finding(SKIPPED, File.OWN, "says nothing that can be used")
    return
  found = files.digests(s.path)
  for file, stated in s.own.files.items():
    if found.get(file) != stated.sha256:
      said = "is not the one that was exported" if file in found else "was exported, and is gone"
      yield Finding(WARNING, file, said, "Copy the folder again, unless you changed it.")
