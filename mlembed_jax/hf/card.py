"""The model card: README.md of an exported folder, written from what the run recorded."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlembed_jax.config import flatten
from mlembed_jax.config_fields import PRODUCTS, REFERENCE, LossesConfig
from mlembed_jax.data import languages
from mlembed_jax.families import FAMILIES
from mlembed_jax.hf.card_use import listed, remote_code, use
from mlembed_jax.hf.config_files import Variant, switches
from mlembed_jax.models.encoder import parameter_count
from mlembed_jax.slice_scores import SliceScore
from mlembed_jax.workdir import StepScores

HEADINGS = (
  "What it is",
  "Use",
  "Cutting it",
  "Training",
  "Data",
  "Results",
  "Limits",
  "Citation",
)
TAGS = (
  "sentence-transformers",
  "feature-extraction",
  "matryoshka",
  "text-embeddings-inference",
  "mlembed-jax",
)
MIN_LANGUAGE_ROWS = 1000  # of training data, for a language to be named in the front matter
DIMENSION = """\
**Dimension.** Keep the first {dims} coordinates and normalise again:

```python
short = model.encode(
  ["Put the egg in boiling water."], truncate_dim={dim}, normalize_embeddings=True
)
```"""
DEPTH = """\
**Depth.** Keep the first layers and the final norm:

```python
shallow = SentenceTransformer("{name}", config_kwargs={{"num_hidden_layers": {depth}}}{code})
print(shallow.encode_query(["how do I boil an egg?"]).shape)
```

Queries and documents need the same depth: training compares no vectors of two depths."""
RANK = """\
**Rank.** `mlembed/uv.safetensors` holds the factors of the token table, whose columns are ordered:
the first ones make the table of a lower rank.

```python
from safetensors.torch import load_file

factors = load_file("{name}/mlembed/uv.safetensors")
table = factors["U"][:, :{rank}] @ factors["V"][:{rank}]
```"""
CITATION = """\
Trained with mlembed_jax. The method is 3-D Matryoshka learning of ML-Embed (arXiv:2605.15081); the
embedding recipe is that of F2LLM-v2 (arXiv:2603.19223); the architecture is {family.title}
({family.paper}). Please cite them."""


def card(
  variant: Variant,
  pooled_token: str,
  prompts: Mapping[str, str],
  evaluation: StepScores | None,
  ranges_file: str | None = None,
  gguf: Sequence[str] = (),
) -> str:
  """Returns README.md.

  `evaluation` holds the held-out scores of the step; `ranges_file` is that of int8 vectors, if any;
  `gguf` are the GGUF files of the folder.
  """
  bodies = (
    _what_it_is(variant, pooled_token, prompts),
    use(variant, prompts, ranges_file, gguf),
    _cutting(variant),
    _training(variant),
    _data(variant),
    _results(variant, evaluation),
    _limits(variant),
    CITATION.format(family=FAMILIES[variant.body.family]),
  )
  sections = [f"## {h}\n\n{b}\n" for h, b in zip(HEADINGS, bodies, strict=True)]
  return "\n".join([_front_matter(variant), f"# {variant.name}\n", *sections])


def _front_matter(variant: Variant) -> str:
  """Returns YAML whose scalars are JSON strings: the bare code of Norwegian, no, means false."""
  by_code: dict[str, int] = {}
  for key, rows in _languages(variant).items():
    code = languages.bare_code(key)
    by_code[code] = by_code.get(code, 0) + rows
  named = sorted(
    code
    for code, rows in by_code.items()
    if rows >= MIN_LANGUAGE_ROWS and code.isalpha() and code.islower() and len(code) in (2, 3)
  )
  lines = ["library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
  for key, values in (("language", named), ("tags", TAGS)):
    if values:
      lines += [f"{key}:", *(f"- {json.dumps(value)}" for value in values)]
  return "\n".join(["---", *lines, "---", ""])


def _languages(variant: Variant) -> dict[str, int]:
  """Returns the training rows of each language that the manifest counts, as the run names it."""
  rows: dict[str, int] = {}
  scheme = variant.run.config.data.language_key
  for entry in variant.run.datasets.values():
    for tag, count in entry.get("languages", {}).items():
      key = languages.language_key(tag, scheme)
      rows[key] = rows.get(key, 0) + count
  return dict(sorted(rows.items(), key=lambda item: (-item[1], item[0])))


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  cells = [[str(cell).replace("|", r"\|") for cell in line] for line in lines]
  return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _what_it_is(variant: Variant, pooled_token: str, prompts: Mapping[str, str]) -> str:
  config, axes, body = variant.run.config, variant.axes, variant.body
  start = config.train.init_from
  base = f"the weights of `{start.rstrip('/').split('/')[-1]}`" if start else "random weights"
  family = FAMILIES[body.family].title
  rank = "full, never factorised"
  if variant.rank:
    form = "stored as two factors" if variant.forms.factors else "stored as their product"
    rank = f"rank {variant.rank} of {config.model.rank}, trained {listed(axes.ranks)}; {form}"
  facts = (
    ("Architecture", f"{family} decoder, causal, without a language-model head"),
    ("Started from", base),
    ("Parameters", f"{parameter_count(body):,}"),
    ("Layers", f"{variant.depth} of {config.model.layers}, trained exits {listed(axes.exits)}"),
    ("Dimension", f"{variant.dim} of {body.width}, trained dimensions {listed(axes.dims)}"),
    ("Token table", rank),
    *_vocabulary(variant),
    ("Context", f"trained to {config.data.lengths[-1]}, allowed {config.export.max_seq_length}"),
    ("Pooling", f"state of the last token, `{pooled_token}`, which the tokenizer appends"),
    ("Stored as", config.export.dtype),
  )
  warnings = [f"**Warning.** {sentence}.\n" for sentence in variant.untrained]
  texts = _table(
    ("prompt", "text"),
    ((f"`{k}`", f"`{json.dumps(v, ensure_ascii=False)}`") for k, v in prompts.items()),
  )
  return "\n".join([*warnings, _table(("", ""), facts), "", texts])


def _vocabulary(variant: Variant) -> list[tuple[str, str]]:
  """Returns the fact about the vocabulary where tokens were left out."""
  if not (found := variant.trimmed):
    return []
  body = variant.body
  said = found.said(body.vocab, body.rank or body.width, variant.run.config.export.dtype)
  return [("Vocabulary", said)]


def _cutting(variant: Variant) -> str:
  lines = [_dimensions(variant), *_depths(variant)]
  if variant.table_form == "merged":
    lines.append(RANK.format(name=variant.name, rank=min((variant.rank, *variant.axes.ranks))))
  return "\n\n".join(lines)


def _dimensions(variant: Variant) -> str:
  return DIMENSION.format(dims=listed(variant.dims), dim=variant.dims[0])


def _depths(variant: Variant) -> list[str]:
  """Returns how layers are cut, and what each depth costs."""
  itemsize = {"bfloat16": 2, "float32": 4}[variant.run.config.export.dtype]
  rows = []
  for depth in variant.depths:
    count = parameter_count(dataclasses.replace(variant.body, layers=depth))
    rows.append((depth, f"{count:,}", f"{count * itemsize / 1e6:.1f}"))
  how = DEPTH.format(name=variant.name, depth=variant.depths[0], code=remote_code(variant))
  return [how, _table(("layers", "parameters", "MB"), rows)]


def _training(variant: Variant) -> str:
  config, flat = variant.run.config, flatten(variant.run.config)
  fields = (
    "data.global_batch",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "model.dtype",
    "train.seed",
  )
  used = switches(config)
  changed = [f"`{k}` = {json.dumps(used[k])}" for k, v in REFERENCE.items() if used[k] != v]
  facts = (
    ("recipe", variant.recipe),
    ("switches that differ from the reference", "; ".join(changed) or "nothing"),
    ("steps", variant.step),
    *((field, flat[field]) for field in fields),
    *_temperatures(variant),
    *_adapter(variant),
    *_teacher(variant),
    ("fingerprint of the data order", f"`{variant.run.fingerprint}`"),
  )
  return _table(("", ""), facts)


def _adapter(variant: Variant) -> list[tuple[str, str]]:
  """Returns what is trained of the model where that is not all of it."""
  config, facts = variant.run.config, []
  if (lora := config.model.lora).rank:
    products = ", ".join(lora.targets or PRODUCTS)
    said = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, of {products}; merged into the weights"
    facts.append(("adapter", f"{said}, of which the held-out scores are those before"))
  if config.train.frozen:
    facts.append(("frozen", ", ".join(config.train.frozen)))
  return facts


def _temperatures(variant: Variant) -> list[tuple[str, str]]:
  losses = variant.run.config.losses
  task_types = sorted({entry["task_type"] for entry in variant.run.datasets.values()})
  own = [name for name in task_types if hasattr(losses, name)]  # texts alone have none
  own = own if losses.contrastive else []
  return [(f"losses.{name}.temperature", _temperature(losses, name)) for name in own]


def _teacher(variant: Variant) -> list[tuple[str, Any]]:
  """Returns what was learnt of a teacher, and whether of anything else."""
  config, kd = variant.run.config, dataclasses.asdict(variant.run.config.kd)
  if not config.kd.teacher:
    return []
  weights = {name: kd[name] for name in ("weight", "prefix", "similarity") if kd[name]}
  fields = {name: kd[name] for name in ("match", "space")} | weights
  return [
    ("teacher", f"`{config.kd.teacher.rstrip('/').split('/')[-1]}`"),
    *((f"kd.{name}", value) for name, value in fields.items()),
    ("losses.contrastive", config.losses.contrastive),
  ]


def _temperature(losses: LossesConfig, task_type: str) -> str:
  settings = getattr(losses, task_type)
  first, last = settings.temperature, settings.final_temperature
  if losses.learn_temperature:
    return f"learned, from {first}"
  return str(first) if first == last else f"{first} to {last}"


def _data(variant: Variant) -> str:
  columns = ("task_type", "rows", "languages", "licence", "source")
  rows = [
    (f"`{file}`", *(_entry_value(entry, column) for column in columns))
    for file, entry in variant.run.datasets.items()
  ]
  text = _table(("file", *columns), rows)
  if rows_of := _languages(variant):
    counted = ", ".join(f"{key} {count:,}" for key, count in rows_of.items())
    text += f"\n\nTraining rows by language: {counted}."
  return text + "\n\nOverlap with public test sets was not checked."


def _entry_value(entry: Mapping[str, Any], column: str) -> Any:
  value = entry.get(column, "not recorded")
  return len(value) if column == "languages" and isinstance(value, Mapping) else value


def _results(variant: Variant, evaluation: StepScores | None) -> str:
  scores = [
    s
    for s in (evaluation.scores if evaluation else ())
    if s.depth <= variant.depth and s.dim <= variant.dim and s.rank <= variant.rank
  ]
  if evaluation is None or not scores:
    return "Not evaluated."
  tables = [
    f"Scores of the training weights at step {evaluation.step}, before rounding to the stored "
    "dtype, on held-out files of the run. No public benchmark was run."
  ]
  for task, metric in dict.fromkeys((s.task, s.metric) for s in scores):
    chosen = [s for s in scores if (s.task, s.metric) == (task, metric)]
    tables += _grids(variant, f"{task}, {metric}", chosen)
  return "\n\n".join(tables)


def _grids(variant: Variant, title: str, scores: Sequence[SliceScore]) -> list[str]:
  """Returns the table depth by dimension at this folder's rank, and that of the smaller ranks."""
  at = {(s.rank, s.depth, s.dim): f"{s.score:.4f}" for s in scores}
  ranks, depths, dims = (sorted(set(axis)) for axis in zip(*at, strict=True))
  grid = [[n, *(at.get((variant.rank, n, d), "") for d in dims)] for n in depths]
  tables = [f"### {title}", _table((r"layers \ dimension", *dims), grid)]
  by_rank = [at.get((rank, variant.depth, variant.dim), "") for rank in ranks]
  if len(ranks) > 1:
    tables.append(
      _table(("rank, at the depth and dimension of this folder", *ranks), [["score", *by_rank]])
    )
  return tables


def _limits(variant: Variant) -> str:
  few = [key for key, rows in _languages(variant).items() if rows < MIN_LANGUAGE_ROWS]
  lines = [
    f"- Texts beyond {variant.run.config.data.lengths[-1]} tokens are longer than any in training.",
    "- Domains and tasks that the data above does not hold were not trained.",
  ]
  if few:
    lines.append(f"- Languages with fewer than {MIN_LANGUAGE_ROWS:,} rows: {', '.join(few)}.")
  return "\n".join(lines)
