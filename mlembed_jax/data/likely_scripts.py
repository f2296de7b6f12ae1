"""The script of languages that langcodes 3.5 does not know, or knows otherwise, by newer CLDR data.

langcodes has the likely subtags of CLDR 40, 1,866 of them, and takes Latin for all other languages.
Here are those of another script (and five that CLDR has in Latin today) in the CLDR data of babel
2.19, with which `tests/data/test_languages.py` compares them.
"""

_LANGUAGES = {
  "Aghb": "xag",
  "Arab": (
    "aao abh abv acm acq acw acx adf aec aee aeq afb aib aiq ask atn auj auz avd ayh ayl ayn ayp "
    "azb bdz bgp bhe bhm bjm brk bsh bsk chg clh def deh dmk dml esh fay faz ggg gha ghr gig glh "
    "grr gwf gzi hac hkh hoh hrz hss isk jad jat jbn jdg jnd jog kbu kcy kfm klj kmz ktl lrk lrl "
    "lsa lss luv mby mey mfi mhj mnj mve mzb nli nlm ntz nyq odk omy pbt phr phv plk prc prx psh "
    "psi pst qxq rdb sbn sdb sdf sdg sds sgr sgy shd shm shv siy siz smy sqo sqt srh srz ssh sts "
    "tjo tks tov tra trm ush uzs vaf vgr vmh wbk wne wsv xhe xka xkc xkj xkp xvi ydg zba zum"
  ),
  "Armn": "axm hyw rmi",
  "Bali": "kaw",
  "Batk": "btd btm",
  "Beng": "aot cdz ctg der kdq oak rah sdr",
  "Bopo": "hmj hmq",
  "Brah": "kho pmh psu xtq",
  "Cakm": "tnv",
  "Cans": "oj ojs",
  "Cprt": "ecy",
  "Cyrl": (
    "agx akv alr ani aqc atv bhh bph bxm cji ckt clw ddo dlg dng enf enh eve evn gdo gin gld huz "
    "itl jct jdt kap kca ket khv kim kjh kpt kpy krk kva mns mtm mud ndf neg nio niv nog oaa oac "
    "omk orv osd paq rsk rut sel sgh sia sjd sjt sty tab tin ude udi ugh ulc xal xas xdq xpm xrm "
    "xrn xwo yai ykg ykh ynk yrk ysr yug yux zko zkz"
  ),
  "Deva": (
    "agi ahr anp anq anr aph asr bee bfb bfz bgd bgq bgw bha bhd bhj bht bhu bix biy bmj bns bpx "
    "brd byh byw cdh cdj cdm cdn chx cih ctn daq dhi dhw drq dry duh dus dwz emg emu fmu gbk gdx "
    "ghe goj gok gon gra gyo hif hlb hoy hut jee jnl jns jul kex kfb kfk kfp kfq kfs kfu kfx kgj "
    "kif kip kjl kjo kkt kle klr kmj knn kra ksz kte kwx kyv kyw kzq lae lbf lbm lbr lhm lmh loy "
    "luu mjl mjt mjz mkb mke mrr mut nao ncd nll nlx nmm noi nwx ola oon pch pci pgg phd phw pum "
    "pwr raa rab raf rav rji rtw rwr scp sgj sjp skj soi suz syw tcn tdb tge the thf ths tij tkb "
    "ttz vah vas vav vay vjk wly wme ybh ybi"
  ),
  "Elym": "xly",
  "Ethi": "agj ahg alw anu awn dox gru har ior mdy muz mvz stv wle xan zwa",
  "Geor": "bbl jge oav sva",
  "Gran": "oty",
  "Grek": "aat cpg ecr grc scx uum xpg yej",
  "Gujr": "cdi dhn dho dub gas gbl",
  "Hang": "jje okm",
  "Hani": "how oko swi zch zeh zgb zgm zgn zhd zlj zln zlq zqe zyg zyn zzj",
  "Hans": "cdo cjy cnp cpx csp czh hnm luh mnp sjc",
  "Hant": "ltc lzh",
  "Hebr": "aij czk hbo huy itk jbe jpa jpr jrb jye lsd trg yhd yih yud zrp",
  "Ital": "osc pgn xve",
  "Java": "osi tes",
  "Jpan": "ams yoi",
  "Jurc": "juc",
  "Kali": "kvy kyu",
  "Kana": "ain",
  "Khar": "pgd",
  "Khmr": "brb krr krv okz pcb rka smu tpu xhm xkk",
  "Knda": "brw kfa kfd kfg sle vmd",
  "Lana": "cuu kkh stu",
  "Laoo": "alk brv kuf lbo ncq nev ngt oyb pho pnx sct sqq sss tth tto",
  "Latf": "gml",
  "Latg": "mga",
  "Latn": "bji bsq kxc rif sga",
  "Linb": "gmy",
  "Lyci": "imy",
  "Mand": "mid",
  "Marc": "xzh",
  "Mlym": "aaf all kev kfh mjq mjr mjv pcf pcg pkr udg yea",
  "Modi": "omr",
  "Mong": "bxu mnc mvf",
  "Mtei": "omp",
  "Mymr": (
    "aio blk bwe csh csj dnu dnv hpo int jkp kjp ksu ksw kvq kvt kxf kxk mwt obr omx pce phk pll "
    "pwo pyx rbb rki rmz tco tjl tvn yin zkn"
  ),
  "Newa": "nwc",
  "Ogam": "pgl xpi",
  "Orya": "bdv bfw dso dwk gaq gbj gdb jun juy peg rei spv uki xis zrg",
  "Phnx": "obm",
  "Plrd": "ktp lpo sfm ygp yna ysy ywq ywu",
  "Rjng": "abl",
  "Runr": "nrn sxu",
  "Samr": "sam",
  "Seal": "och",
  "Sidt": "xsd",
  "Syrc": "aii amw bhn bjf hrt kqd lhs oar syc syn tmr",
  "Tagb": "tbk",
  "Takr": "hii jna scu",
  "Tale": "thi",
  "Taml": "ctt cty era iru kfe kfi muv tcx vaa xua xub xuj",
  "Tavt": "soa tyr",
  "Telu": "cde gau key kfc mju nit ort pcj wsg yeu",
  "Tfng": "cnu gho tda zen",
  "Thai": "bzi cbn cog khf kjt lwm mkm mlf mpz mra nyl nyw pht phu prt pww skb thm ugo urk yoy",
  "Tibt": (
    "adx bfu bkk bro cgk cna dka dre dzl ght goe jda jya kbg kgy khg kjz kkf lbj lkh luk lya muk "
    "neh npb ole otb sbu sgt sip spt tgf twm xkf zau"
  ),
  "Xsux": "hit htx nei oht",
  "Yiii": "nos nsd nsf nsv nty smh yig yiv ysd ysn ysp",
}
LIKELY_SCRIPTS = {code: script for script, codes in _LANGUAGES.items() for code in codes.split()}
