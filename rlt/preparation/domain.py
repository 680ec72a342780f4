"""What a record is about, as far as rules differ by it: prose, mathematics or code.

A source or format can say it (`meta.kind`). Otherwise a record with a test program, or the path of a source file, is
code, as is one with mostly code lines; mathematics is where equations are frequent, or where the gold answer is a
number. Digits alone do not make mathematics: a list of telephone numbers has more of them than any sum."""

import re

from rlt.formats.record import Record, texts_of

PROSE, MATHS, CODE = "prose", "maths", "code"
SOURCE_FILES = (".py", ".js", ".ts", ".java", ".c", ".h", ".cpp", ".hpp", ".cs", ".go", ".rs", ".rb", ".php", ".sh")
SOURCE_FILES += (".sql", ".kt", ".swift", ".scala", ".r", ".jl", ".pl", ".lua", ".ps1", ".yaml", ".yml", ".toml")
# `x = 3`, `48/2 = 24`, `3 < y`, `2 × 4`, `5 + 7`, `\frac`: an operator between operands, or a command of LaTeX.
EQUATION = re.compile(
    r"[\w)\]}%] ?(?:=| [<>] |[≤≥≈]) ?[-−(\[$]?\$?[\d\\]|\d ?[×÷*^·] ?[-−(]?\d|\d \+ \d|\d [-−/] \d"
    r"|\\(?:frac|sqrt|boxed|cdot|times|sum|int|begin\{)"
)
CODE_LINE = re.compile(
    r"^[ \t]*(?:(?:def|class|if|elif|for|while|with|try|except|else|finally)\b.*:"
    r"|(?:import|from)\s+[\w.]+(?: import .*)?"
    r"|(?:return|raise|assert|yield|pass|break|continue|package|using|#include|#define|const|let|var|public|private|static"
    r"|fn|func)\b.*"
    r"|@\w[\w.]*(?:\(.*)?|//.*|/\*.*|[\w.\[\]'\"]+\s*[-+*/|&:]?=(?!=).*|.*[;{}]|.*[(\[]|[\w.]+\(.*\)"
    r"|[\])}]+[,;:]?)[ \t]*$",
    re.MULTILINE,
)
FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
NUMBER = re.compile(r"[-−$£€]? ?\d[\d,.]*(?:/\d+)? ?%?|\\?\$?\\(?:frac|sqrt|boxed).*")
LEAST_EQUATIONS = 2
PER_EQUATION = 150  # characters: one equation in so many is mathematics
CODE_SHARE = 0.4  # of the lines that are not blank
LOOKED_AT = 20_000  # characters of a record


def domain_of(record: Record) -> str:
    """`prose`, `maths` or `code`, of all texts of a record together."""
    meta = record["meta"]
    said = meta.get("kind")
    if said in (PROSE, MATHS, CODE):
        return said
    if record["tests"] or str(meta.get("path", "")).lower().endswith(SOURCE_FILES):
        return CODE
    if record["answer"] and NUMBER.fullmatch(record["answer"].strip()):
        return MATHS
    return domain_of_text("\n".join(texts_of(record))[:LOOKED_AT])


def domain_of_text(text: str) -> str:
    lines = [line for line in text.split("\n") if line.strip()]
    if not FENCE.search(text) and len(lines) >= 3 and len(CODE_LINE.findall(text)) > CODE_SHARE * len(lines):
        return CODE
    equations = sum(1 for _ in EQUATION.finditer(text))
    return MATHS if equations >= LEAST_EQUATIONS and equations * PER_EQUATION > len(text) else PROSE
