#!/usr/bin/env bash
# langcodes gives a language that it does not know the Latin script and the United States.
#
# Guess: `Language.get(tag).maximize()` adds the likely script and region of CLDR, and leaves a
# language alone of which CLDR says nothing, or raises.
#
# Seen (langcodes 3.5.1): languages that its copy of the table lacks are filled in as if the language
# were not given at all: `und` is en-Latn-US, so the answer is Latn-US. South Azerbaijani (azb),
# Mesopotamian (acm), Ta'izzi-Adeni (acq) and South Levantine Arabic (ajp) and Southern Pashto (pbt),
# all written in Arabic letters, become Latin. Nothing tells such an answer from a real one; the
# tags are valid, and are those of FLORES and of other sets for the languages with the least data.
#
# Why it matters: tags are unified by script before languages are counted, sampled and scored. By
# this table the Arabic rows of five languages are counted as Latin ones, beside `azb-Arab` and
# `acm-Arab` of files that write the script.
#
# What to do: take the likely script from a newer CLDR (babel has one), or believe `maximize` only
# where `und` in place of the language gives something else.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langcodes==3.5.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from langcodes import Language

print("langcodes", version("langcodes"))
seen = {tag: Language.get(tag).maximize().to_tag() for tag in ("azb", "acm", "acq", "ajp", "pbt")}
known = {tag: Language.get(tag).maximize().script for tag in ("arz", "ary", "ckb", "ps")}
for tag, full in seen.items():
  print(f"{tag}: guessed {tag}-Arab or {tag}, seen {full}")
if set(known.values()) != {"Arab"}:
  sys.exit(f"Languages that the table has are given other scripts now: {known}")
if any(full != f"{tag}-Latn-US" for tag, full in seen.items()):
  sys.exit("Unknown languages are no longer Latin in the United States.")
PYTHON
