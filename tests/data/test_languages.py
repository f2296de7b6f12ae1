"""Keys of languages against CLDR: a table written down, and CLDR's own data by another program."""

from collections import Counter

import pytest
from babel.core import get_global

from mlembed_jax.config_fields import SETTINGS
from mlembed_jax.data import languages
from mlembed_jax.data.languages import bare_code, language_key, merged
from mlembed_jax.errors import ConfigError
from tests.material import CONVENTIONS

ALIASES, LIKELY = get_global("language_aliases"), get_global("likely_subtags")
# What the package decides otherwise than CLDR, and says so.
OURS = {"nb": "no", "pbt": "ps", "quy": "qu", "fuv": "ff"}
KEYS = {
  "heb-Hebr": "he iw heb heb-Hebr heb_Hebr he-IL HE",
  "zho-Hans": "zh zh-CN zh_CN zh-Hans zh_Hans zho_Hans cmn cmn-Hans zh-SG",
  "zho-Hant": "zh-TW zh-Hant zh-HK zho_Hant cmn_TW",
  "yue-Hant": "yue yue_Hant yue-HK",
  "nor-Latn": "no nb nob nor nob-Latn nob_Latn nb-NO",
  "nno-Latn": "nn nno nno_Latn",
  "kat-Geor": "ka kat-Geor ka_GE kat",
  "kor-Hang": "ko kor-Hang kor-Kore ko-KR kor_Hang",
  "pus-Arab": "ps pus pbt pbt_Arab",
  "que-Latn": "qu que quy quy_Latn",
  "ful-Latn": "ff ful fuv fuv_Latn",
  "azb-Arab": "azb azb_Arab",
  "acm-Arab": "acm acm_Arab",
  "acm-Latn": "acm_Latn",  # a script that is written goes before a likely one
  "acq-Arab": "acq acq_Arab",
  "apc-Arab": "apc ajp ajp_Arab",
  "fas-Arab": "fa fas pes pes_Arab fa-IR prs",
  "ara-Arab": "ar ara arb arb_Arab ar-EG",
  "ara-Latn": "arb_Latn",
  "aze-Latn": "az aze azj_Latn",
  "aze-Cyrl": "az-Cyrl",
  "uzb-Arab": "uz-AF uz_Arab",
  "kaz-Arab": "kk-Arab kk-CN",
  "pan-Arab": "pa-PK",
  "pan-Guru": "pa pan_Guru",
  "srp-Cyrl": "sr srp_Cyrl",
  "srp-Latn": "sr-Latn sh sr-ME",
  "mon-Cyrl": "mn khk_Cyrl",
  "lav-Latn": "lv lvs_Latn",
  "est-Latn": "et ekk",
  "sqi-Latn": "sq als_Latn",
  "mlg-Latn": "mg plt_Latn",
  "msa-Latn": "ms zsm_Latn",
  "ind-Latn": "id in",
  "fil-Latn": "tl tgl_Latn fil",
  "swa-Latn": "sw swh_Latn",
  "nep-Deva": "ne npi_Deva",
  "ori-Orya": "or ory_Orya",
  "kok-Deva": "kok gom_Deva",
  "yid-Hebr": "yi ydd_Hebr ji",
  "kur-Latn": "ku kmr_Latn",
  "ckb-Arab": "ckb ckb_Arab",
  "aka-Latn": "ak tw twi_Latn",
  "kas-Arab": "ks kas_Arab",
  "kas-Deva": "kas_Deva",
  "mni-Beng": "mni",
  "mni-Mtei": "mni_Mtei",
  "grc-Grek": "grc",
  "lzh-Hant": "lzh",
  "mag-Deva": "mag",
  "din-Latn": "din dik_Latn",
  "por-Latn": "pt pt-BR pt_PT",
  "eng-Latn": "en en-US eng_Latn",
}
TABLE = [(tag, key) for key, tags in KEYS.items() for tag in tags.split()]
NO_LANGUAGE = ("", "und", "mul", "zxx", "mis", "root", "und-Latn", "qaa-Latn", "x-foo", "default")
NO_LANGUAGE += ("unknown", "python-Code", "c++", "de-en", "zh-classical", " he", "é", "_", "xx")


def by_cldr(tag):
  """Returns the two- or three-letter code and the script of a tag by the CLDR data of babel."""
  code, *rest = tag.replace("-", "_").split("_")
  code, *implied = ALIASES.get(code.lower(), code.lower()).split("_")
  code = OURS.get(code, code)
  rest = [*rest, *implied]
  script = next((part for part in rest if len(part) == 4), None)
  region = next((part for part in rest if len(part) == 2), None)
  likely = LIKELY.get(f"{code}_{region}") or LIKELY[code]
  script = script or likely.split("_")[1]
  return code, "Hang" if script == "Kore" else script


@pytest.mark.parametrize(("tag", "key"), TABLE)
def test_keys_are_those_of_cldr(tag, key):
  assert language_key(tag) == key
  code, script = key.split("-")
  assert by_cldr(tag) == (ALIASES.get(code, code), script)


def test_the_script_of_every_language_is_that_of_cldr():
  """None of 7,283 differs in babel 2.19; a later release may have other scripts for a few."""
  known = {code: language_key(code) for code in LIKELY if "_" not in code and code != "und"}
  wrong = {code for code, key in known.items() if key != code and by_cldr(code)[1] != key[-4:]}
  assert len(wrong) <= 6, wrong
  assert sum(key == code for code, key in known.items()) < 0.01 * len(known)  # newer than langcodes


def test_a_key_is_its_own_key():
  keys = {language_key(code) for code in LIKELY}
  assert len(keys) > 7000 and {language_key(key) for key in keys} == keys


@pytest.mark.parametrize("tag", NO_LANGUAGE)
def test_what_names_no_known_language_stays(tag):
  assert language_key(tag) == tag


def test_schemes_are_those_of_the_setting():
  assert SETTINGS["data.language_key"].choices == languages.SCHEMES
  assert language_key("iw", "as-written") == "iw"
  with pytest.raises(
    ConfigError, match=r"language_key: 'script' is not one of 'language-script', "
  ):
    language_key("iw", "script")


def test_merges_are_named():
  assert merged(["iw", "de", "heb_Hebr", "iw", "und"]) == {"heb-Hebr": ["heb_Hebr", "iw"]}
  assert merged(["iw", "de", "heb_Hebr"], "as-written") == {}
  text = languages.merges_text({"heb-Hebr": ["heb_Hebr", "iw"]})
  assert text == "counted as one language:\n  heb-Hebr: heb_Hebr, iw"


def test_cards_name_the_shortest_code():
  tags = ["iw", "heb_Hebr", "nob-Latn", "zh-hant", "pbt_Arab", "fil", "x-foo", "Python"]
  assert [bare_code(tag) for tag in tags] == ["he", "he", "no", "zh", "ps", "fil", "x", "Python"]


def test_the_conventions_of_the_tests_are_three_tags_of_one_language_each():
  assert all(len(set(tags)) == 3 for tags in CONVENTIONS)
  assert all(len(set(map(language_key, tags))) == 1 for tags in CONVENTIONS)
  assert max(Counter(map(language_key, sum(CONVENTIONS, ()))).values()) == 3
