"""Checks of what ends a text, and of whether the converter of llama.cpp knows the rest."""

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from mlembed_jax.families import Family
from mlembed_jax.hf.checks.consumers import Fact
from mlembed_jax.hf.checks.finding import AGAIN, ERROR, SKIPPED, WARNING, File, Finding, Subject

SHORT = 4  # tokens that are left of a text
LONG = "one two three four five six seven eight nine ten"
QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
CLASSES = (*QWEN, "PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer")
CLASSES += ("GPT2TokenizerFast", "LlamaTokenizerFast")
# The converter of llama.cpp knows a tokenizer by the sha256 of str() of the ids of this text.
CHECK_TEXT = (
  "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
  "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
  "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
  "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
  "I'll make it, 'D you like some tea? We'Ve a'lL"
)
HASHES = {  # of its ids, for the vocabularies that our families have, by the token that ends a text
  "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "<|endoftext|>",
  "862f827721df956049dff5ca81a57f29e575280bc622e290d3bf4e35eca29015": "<|im_end|>",
  "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": None,  # Qwen
  "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": None,  # SmolLM
  "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": None,  # Llama 3
}


def check_pooled_token(s: Subject) -> Iterator[Finding]:
  """Every text ends in one pooled token, and all files mean the same by it."""
  try:
    tokenizer = _open(s)
  except Exception as error:  # the library raises bare Exception
    yield Finding(ERROR, File.TOKENIZER, f"is not a tokenizer: {error}", AGAIN, Fact.MODEL)
    return
  if (pooled := s.own.pooling.token_id if s.own else _end(tokenizer)) is not None:
    yield from _endings(tokenizer, pooled)
    yield from _names(s, tokenizer, pooled)
  yield from _class(s.json(File.TOKENIZER_CONFIG))
  size, rows = max(tokenizer.get_vocab().values()) + 1, s.config.get("vocab_size")
  if isinstance(rows, int) and size > rows:
    found = f"E106 tokenizer: {size} ids but the table has {rows} rows"
    remedy = "Take the tokenizer.json of that model."
    yield Finding(ERROR, File.TOKENIZER, found, remedy, Fact.MODEL)


def _open(s: Subject) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer.from_file(str(s.path / File.TOKENIZER))
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer


def _end(tokenizer: tokenizers.Tokenizer) -> int | None:
  """Returns the id that the post-processor puts after every text, None where it puts none."""
  whole = tokenizer.encode("hello")
  return whole.ids[-1] if whole.ids and whole.sequence_ids[-1] is None else None


def _endings(tokenizer: tokenizers.Tokenizer, pooled: int) -> Iterator[Finding]:
  ids = {text: tokenizer.encode(text).ids for text in ("hello", "")}
  tokenizer.enable_truncation(SHORT)
  ids[f"a text cut to {SHORT} tokens"] = tokenizer.encode(LONG).ids
  tokenizer.no_truncation()
  for text, found in ids.items():
    if found[-1:] != [pooled] or found.count(pooled) != 1:
      said = f"{text!r} becomes {found}; expected one {pooled} at its end"
      remedy = "Let post_processor append it: export the folder again."
      yield Finding(ERROR, File.TOKENIZER, said, remedy)
      return


def _names(s: Subject, tokenizer: tokenizers.Tokenizer, pooled: int) -> Iterator[Finding]:
  """Compares the names of the end token: all but llama.cpp append what the post-processor says."""
  token = tokenizer.id_to_token(pooled)
  if (eos := s.config.get("eos_token_id")) != pooled and isinstance(eos, int):
    found = f"eos_token_id is {eos}, but texts end in {pooled}, {token}"
    yield Finding(WARNING, File.CONFIG, found, f"Write {pooled}.", Fact.GGUF)
  stated = s.json(File.TOKENIZER_CONFIG).get("eos_token")
  if (name := stated.get("content") if isinstance(stated, dict) else stated) != token:
    found = f"eos_token is {name!r}, but texts end in {token!r}"
    yield Finding(WARNING, File.TOKENIZER_CONFIG, found, f"Write {token}.", Fact.GGUF)
  if s.own and (ours := s.own.pooling.token) != token:
    found = f"pooling.token is {ours!r}, its token_id {pooled} is {token!r}"
    yield Finding(ERROR, File.OWN, found, AGAIN, File.OWN)


def _class(config: Mapping[str, Any]) -> Iterator[Finding]:
  if config.get("add_eos_token") is False:
    found = "add_eos_token is false: transformers 5 then appends no token"
    yield Finding(ERROR, File.TOKENIZER_CONFIG, found, "Write true.", Fact.TOKENIZER_CLASS)
  kind = config.get("tokenizer_class")
  remedy = "Write PreTrainedTokenizerFast."
  if kind == "TokenizersBackend":
    found = f"tokenizer_class is {kind}, written by transformers 5; 4 does not know it"
    yield Finding(ERROR, File.TOKENIZER_CONFIG, found, remedy, Fact.TOKENIZER_CLASS)
  elif kind not in CLASSES:
    found = f"tokenizer_class is {kind}, which was never tried"
    yield Finding(WARNING, File.TOKENIZER_CONFIG, found, remedy, Fact.TOKENIZER_CLASS)


def check_llama_converter(s: Subject) -> Iterator[Finding]:
  """llama.cpp's converter knows the architecture, the tokenizer and the tensors."""
  if s.is_remote or not s.family:
    yield Finding(SKIPPED, File.CONFIG, "is of no architecture that llama.cpp reads")
    return
  if any(s.path.glob("*.gguf")):
    yield Finding(SKIPPED, "", "a GGUF file is there: nothing is to be converted")
    return
  wanted, stated = s.family.architecture, s.config.get("architectures")
  if stated != [wanted]:
    found = f"architectures is {stated}; older converters know {wanted} alone"
    yield Finding(WARNING, File.CONFIG, found, f"Write {wanted}.")
  yield from _hash(s)
  if importlib.util.find_spec("gguf"):
    yield from _gguf(s, s.family)
  else:
    yield Finding(SKIPPED, "", "names of tensors were not compared: pip install gguf")


def _hash(s: Subject) -> Iterator[Finding]:
  digest = _hash_of_ids(s)
  if digest is None:
    return  # check_pooled_token says so
  if digest not in HASHES:
    # No fault: a vocabulary of one's own, or Llama's with a token that ends a text.
    found = f"the converter of llama.cpp does not know its hash, {digest[:12]}..., and stops"
    yield Finding(SKIPPED, File.TOKENIZER, found)
  elif HASHES[digest] is None:
    level = ERROR if s.is_export else WARNING
    yield Finding(level, File.TOKENIZER, "is known to llama.cpp, but no token ends a text", AGAIN)


def _hash_of_ids(s: Subject) -> str | None:
  """Returns the hash by which the converter knows a vocabulary, None of what is no tokenizer."""
  try:
    ids = _open(s).encode(CHECK_TEXT).ids
  except Exception:  # the library raises bare Exception
    return None
  return hashlib.sha256(str(ids).encode()).hexdigest()


def unread_by_llama_cpp(s: Subject) -> str:
  """Returns why llama.cpp does not read the folder, "" where it does, or it is another fault."""
  if any(s.path.glob("*.gguf")):
    return ""
  if s.is_remote:
    return "the token table is stored as two factors; export --gguf q8_0 multiplies them"
  known = _hash_of_ids(s) in (*HASHES, None)  # of no tokenizer, check_pooled_token speaks
  return "" if known else "its converter stops at this vocabulary; export --gguf q8_0 writes a file"


def _gguf(s: Subject, family: Family) -> Iterator[Finding]:
  import gguf  # beside the converter, in no requirement of ours

  architecture = gguf.MODEL_ARCH[family.gguf]
  known = gguf.get_tensor_name_map(architecture, s.config.get("num_hidden_layers", 0))
  unknown = [n for n in s.stored() if known.get_name(n, (".weight", ".bias")) is None]
  if unknown:
    found = f"gguf has no name for {len(unknown)} tensors, first {unknown[0]}"
    yield Finding(ERROR, "", found, AGAIN)
  special = gguf.SpecialVocab(s.path)
  if special.add_special_token.get("eos") is not True:
    found = "gguf does not see that a token is appended"
    remedy = "Let post_processor and eos_token name the same token."
    level = ERROR if _end(_open(s)) is None else WARNING  # texts can be given with the token
    yield Finding(level, File.TOKENIZER, found, remedy)
