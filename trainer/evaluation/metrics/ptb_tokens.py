"""Split captions into tokens of the Penn Treebank, as the official caption metrics do with Java.

The official pipeline (pycocoevalcap) runs ``PTBTokenizer -preserveLines -lowerCase`` of CoreNLP 3.4.1 and drops
punctuation. These rules are written from the tokens that it gives; ``tests/evaluation/ptb_fixture.json`` is recorded
from it. At each place the longest match of all rules is the token. The first rule wins a tie.

One thing differs on purpose. Java ends a line at carriage returns, U+2028 and the like, so the official pipeline gives
every later caption to the wrong image. Here they are spaces, as line feeds are in the official pipeline too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

_DROPPED = frozenset(["''", "'", "``", "`", "-", "--", "!", "?"])
_LINE_BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")
_SPACES = re.compile("(?:[ \t\u00a0\u2000-\u200a\u3000]|&nbsp;)+")
_SIMPLE_WORD = re.compile("[A-Za-z]+(?= |$)")

# Python counts digits of other shapes as letters; Java's lexer knows the basic plane only.
_NO_LETTER = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2080-\u2089\u2150-\u2189\u2460-\u24ff\u2776-\u2793\u3007"
_MARKS = (
    "\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02ff\u0300-\u036f\u0384\u0385\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf"
    "\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u06e7-\u06ed\u0711\u0730-\u074a"
    "\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09cd\u0a01-\u0a03\u0a3c\u0a3e-"
    "\u0a4d\u0a81-\u0a83\u0abc\u0abe-\u0acd\u0b82\u0bbe-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d48\u0e31\u0e34-\u0e3a"
    "\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
_LETTER = rf"(?:(?![{_NO_LETTER}\U00010000-\U0010ffff])[^\W\d_]|[{_MARKS}])"
_WORD = rf"{_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*"
_APOSTROPHE = "(?:['\u0092\u2019]|&apos;)"
_IN_WORD = f"(?:{_APOSTROPHE}|[`\u0091\u2018\u201b])"
_SUFFIX = f"{_APOSTROPHE}(?:[msdMSD]|[Rr][Ee]|[Vv][Ee]|[Ll][Ll])"
_NUMBER = r"(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)"
_PARTS = rf"(?:{_LETTER}|\d)+(?:[-_\u058a\u2010\u2011](?:[dDoOlL]{_IN_WORD}{_LETTER})?(?:{_LETTER}|\d)+)*"

_ABBREVIATIONS = (
    "Jan Feb Mar Apr Jun Jul Aug Sept? Oct Nov Dec Mon Tues? Wed Thurs? Fri "
    "Ala Ariz Az Ark Calif Colo Conn Ct Dak Del Fla Ga Ill Ind Kans? Ky La Mass Md Mich Minn Mo Mont Neb Nev Okla Ore "
    "Pa Penn Tenn Tex Va Vt Wash Wisc? Wyo Inc Cos? Corp Pp?t[ye]s? Ltd Plc Rt Bancorp Bldg Dept Bhd Assn Univ Intl "
    "Sys Invt Elec Natl M[ft]g Mr Mrs Ms Drs? Profs? Sens? Reps? Attys? Lt Col Gen Messrs Govs? Adm Rev Maj Sgt Cpl "
    "Pvt Capt Ste? Ave Pres Lieut Hon Brig Co?mdr Pfc Spc Supts? Det Mt Ft Adj Adv Asst Assoc Ens Insp Mlle Mme Msgr "
    r"Sfc Jr Sr Bros (?:Ed|Ph)\.D Blvd Rd Esq etc al seq tel est ext sq vs Alex Wm Jos Cie a\.k\.a cf treas [a-z]"
).replace(" ", "|")
_BEFORE_NUMBERS = "nos?|art|ca|figs?|op|pp"
_EXTENSIONS = (
    "bat|bmp|bz2|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp[34g]|pdf|php|pl|png|ppt|ps|py|sql|"
    "tar|txt|wav|x|xml|zip|3gp|wm[va]|avi|flv"
)
_URL_END = r"""[^ \t\n\f\r"<>|.!?(){},-]"""
_HOST = r"""(?:[^ \t\n\f\r"`'<>|.!?(){},$_-]+\.)+"""
_SYMBOLS = (
    "$%&*+/<>@\\\\\\^|~=\u00a1-\u00a9\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05f3\u05f4"
    "\u0606-\u060c\u061b\u061e\u061f\u066a\u066d\u06d4\u0e3f\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044"
    "\u207a-\u207e\u208a-\u208e\u20a0\u20a4\u20ac\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123"
    "\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2190-\u245f\u249c-\u24e9\u2500-\u2775\u2794-"
    "\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
    "\u201a\u201e\u201f"
)
_QUOTES = "`\u0091\u0092\u0093\u0094\u2018\u2019\u201b\u201c\u201d\u2039\u203a\u00ab\u00bb"
_SPLIT = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3, "'twas": 2, "'tis": 2, "y'all": 2}

_WORDS_WITH_APOSTROPHE = (
    "'n'?|[lLdDjJ]'|'em|'[2-9]0s|'till?|'cause|(?ai:dunkin'|somethin'|ol'|cont'd\\.?|nor'easter|c'mon|e'er|s'mores|"
    "ev'ry|li'l|nat'l|cap'n|c'est)"
).replace("'", _APOSTROPHE)
_URL = (
    rf"(?:www\.(?:[^ \t\n\f\r\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}|{_HOST}(?:com|net|org|edu))"
    rf"(?:/[^ \t\n\f\r\"<>|()]+{_URL_END})?"
)
_EMAIL = r"[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{}]*@(?:[^ \t\n\f\r\"<>|(){}.\u00a0]+\.)*[^ \t\n\f\r\"<>|(){}.\u00a0]+"
_PHONE = (
    r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}"
    r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}"
)

# A group marks the token where a rule looks at what follows it.
_RULES = tuple(
    map(
        re.compile,
        (
            f"(?ai:{'|'.join(_SPLIT)})",  # split in two; it has to be the first rule
            # Markup and entities.
            r"<[!?][A-Za-z-][^>\r\n]*>",
            r"</?[A-Za-z][A-Za-z0-9:.-]*(?: +[A-Za-z][A-Za-z0-9:.-]*(?: *= *(?:'[^'\r\n]*'|\"[^\"\r\n]*\"))?)* */? *>",
            "&(?:amp|lt|gt|quot|apos|MD|mdash|ndash);|&#\\d+;",
            # Words, and the suffixes of contractions.
            f"({_WORD}){_SUFFIX}",
            f"([A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*)[nN]{_IN_WORD}[tT]",
            _WORD,
            f"[nN]{_IN_WORD}[tT]",
            rf"({_SUFFIX})(?:[^A-Za-z]|$)",
            _WORDS_WITH_APOSTROPHE,
            f"[A-HJ-XZn]{_IN_WORD}{_LETTER}{{2,}}|{_LETTER}+[aeiouyAEIOUY]{_IN_WORD}[aeiouA-Z]{_LETTER}*",
            f"({_APOSTROPHE}\\d\\d)(?: |$)",
            # Addresses.
            rf"https?://[^ \t\n\f\r\"<>|()]+{_URL_END}",
            _URL,
            _EMAIL,
            r"@[a-zA-Z_][a-zA-Z_0-9]*",
            f"#{_LETTER}+",
            # Numbers, fractions, dates and telephone numbers.
            rf"[-+]?{_NUMBER}",
            r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}|\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
            "[\u00bc-\u00be\u2153-\u215e]",
            "[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)",
            _PHONE,
            # Words with digits, hyphens and slashes, and file names.
            rf"(?:[dDoOlL]{_IN_WORD}{_LETTER})?{_PARTS}",
            r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-[A-Za-z0-9\u00ad]+(?:(?:\.[A-Za-z])+\.)?)+",
            r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
            rf"(?:{_LETTER}|\d)+(?:\.(?:{_LETTER}|\d)+)*\.(?:{_EXTENSIONS})(?!{_LETTER}|\d)",
            # Abbreviations and acronyms.
            f"(?ai:{_ABBREVIATIONS})\\.",
            rf"((?ai:{_BEFORE_NUMBERS})\.)(?: *\d|[,;:])",
            r"[A-Za-z](?:\.[A-Za-z])+\.?|(?ai:canada|sino|korean|eu|japan|non)-U\.S\.?",
            "S(?:&|&amp;)P-500|S(?:&|&amp;)Ls|[A-Z]+(?:&|&amp;)[A-Z]+|C\\+\\+|c\\+\\+|[CcFf]#|(?:E|Yahoo|Jeopardy)!",
            "-(?:[LR][RCS]B|[lr][rcs]b)-|pro-|anti-|C\\.D\\.s|(?ai:w/o)",
            # Smileys, then punctuation and symbols.
            r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])(?:[^A-Za-z]|$)",
            r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)",
            r"[A-Z]*\$|#+|@+|_+|\*+|[!?]+|<<|>>|-+",
            f"''|{_APOSTROPHE}|[{_QUOTES}]{{1,2}}",
            "\u2019(?:[msdMSD]|[Rr][Ee]|[Vv][Ee]|[Ll][Ll])",
            r"[()\[\]{}]",
            f"[{_SYMBOLS}]",
        ),
    )
)
_CHANGED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u00a2": "cents", "\u00a3": "#", "\u20ac": "$", "\u20a0": "$", "\u00a4": "$",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3", "\u215b": "1/8",
    "\u215c": "3/8", "\u215d": "5/8", "\u215e": "7/8", " ": "\u00a0", "\u00ad": "",
    **dict.fromkeys("\u0091\u0092\u2018\u2019\u201b", "'"),
}  # fmt: skip
_CHANGED_QUOTES = {
    **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"), **dict.fromkeys("\u0092\u2019\u203a", "'"),
    **dict.fromkeys("\u0093\u201c\u00ab", "``"), **dict.fromkeys("\u0094\u201d\u00bb", "''"),
}  # fmt: skip
_ENTITY = re.compile("&(amp|lt|gt|apos|quot|MD|mdash|ndash);")
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "apos": "'"}


@lru_cache(maxsize=1 << 16)
def ptb_tokenize(caption: str) -> str:
    """Return the tokens of a caption, in lower case and without punctuation, with a space between them."""
    text = _LINE_BREAK.sub(" ", caption)
    tokens = (_change(token).lower() for token in _split(text))
    return " ".join(token for token in tokens if token and token not in _DROPPED)


def _split(text: str) -> Iterator[str]:
    """Yield the tokens; a character that no rule knows only ends the token before it."""
    place = 0
    while place < len(text):
        spaces = _SPACES.match(text, place)
        if spaces is not None:
            place = spaces.end()
            continue
        simple = _SIMPLE_WORD.match(text, place)
        if simple is not None and simple.group().lower() not in _SPLIT:  # most words of a caption, quickly
            token = simple.group()
        else:
            token, at = _longest(text, place)
            if at:
                yield token[:at]
                place, token = place + at, token[at:]
        yield token
        place += max(1, len(token))


def _longest(text: str, place: int) -> tuple[str, int]:
    """Return the longest token of all rules, "" for none, and where it is split in two, 0 for nowhere."""
    token, at, longest = "", 0, 0
    for number, rule in enumerate(_RULES):
        found = rule.match(text, place)
        if found is not None and found.end() - place > longest:
            longest = found.end() - place
            token = found.group(1) if rule.groups else found.group()
            at = 0 if number else _SPLIT[token.lower()]
    return token, at


def _change(token: str) -> str:
    """Return what the lexer writes for a token: brackets and fractions by name, plain apostrophes, one dash."""
    if token.isascii() and token.isalnum():
        return token
    if token.startswith("<") and token.endswith(">") and len(token) > 2:
        return token.replace(" ", "\u00a0")
    if "@" in token[1:]:
        return token
    token = _ENTITY.sub(lambda found: _ENTITIES.get(found.group(1), ""), token)
    if set(token) == {"-"}:
        return "-" if len(token) == 1 else "--"
    if not token.strip("'" + _QUOTES):
        return "".join(_CHANGED_QUOTES.get(character, character) for character in token)
    if token == "\u00ad":
        return "-"
    changed = "".join(_CHANGED.get(character, character) for character in token)
    if len(token) > 1 and token[0] in "<>:;=":  # a smiley keeps its square brackets and braces
        return token.replace("(", "-lrb-").replace(")", "-rrb-")
    return changed
