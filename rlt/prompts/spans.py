"""From character ranges to tokens: one tokenisation of the text, no searching.

A token counts for a span only if it lies wholly inside the span, and if the span's text alone is tokenised the same way
there. Two kinds of tokens are dropped, in the teacher's and in the student's text alike, so that both keep the same
tokens: tokens that straddle a boundary, and tokens at an edge that depend on the text around the span (two newlines are
two tokens before a tag, and one at the end of a text).
"""

from dataclasses import dataclass

from rlt.errors import Refused
from rlt.prompts.rendering import Rendered


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a text and, for each of its spans, the indices of the tokens that count."""

    ids: list[int]
    spans: dict[str, list[int]]


def tokens_inside(offsets: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """Indices of the non-empty tokens whose characters all lie in [start, end)."""
    return [i for i, (left, right) in enumerate(offsets) if start <= left < right <= end]


def common_ends(a: list[int], b: list[int]) -> list[tuple[int, int]]:
    """Index pairs of two lists that agree from the front, then from the back; the middle that differs is left out."""
    shorter = min(len(a), len(b))
    front = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    back = next((i for i in range(shorter - front) if a[-1 - i] != b[-1 - i]), shorter - front)
    pairs = [(i, i) for i in range(front)]
    return pairs + [(len(a) - i, len(b) - i) for i in range(back, 0, -1)]


def tokenize_with_spans(tokenizer, texts: list[Rendered]) -> list[TokenizedText]:
    """Tokenise rendered texts (which carry their own special tokens) without truncation.

    Raises:
        Refused: the tokenizer cannot give character offsets.
    """
    if not tokenizer.is_fast:
        raise Refused(f"{tokenizer.name_or_path}: a fast tokenizer is needed, this one gives no character offsets")
    # verbose=False: the caller judges texts that are longer than the tokenizer's limit; they are not cut here.
    options = {"add_special_tokens": False, "return_attention_mask": False, "truncation": False, "verbose": False}
    encoded = tokenizer([rendered.text for rendered in texts], return_offsets_mapping=True, **options)
    pieces = [rendered.text[start:end] for rendered in texts for start, end in rendered.spans.values()]
    alone = iter(tokenizer(pieces, **options)["input_ids"] if pieces else [])
    tokenized = []
    for ids, offsets, rendered in zip(encoded["input_ids"], encoded["offset_mapping"], texts, strict=True):
        spans = {}
        for name, span in rendered.spans.items():
            inside = tokens_inside(offsets, *span)
            spans[name] = [inside[i] for i, _ in common_ends([ids[j] for j in inside], next(alone))]
        tokenized.append(TokenizedText(ids, spans))
    return tokenized


def align_spans(left: TokenizedText, left_span: str, right: TokenizedText, right_span: str) -> list[tuple[int, int]]:
    """Index pairs of the tokens that both texts have inside spans of the same characters, in order."""
    a, b = left.spans[left_span], right.spans[right_span]
    pairs = common_ends([left.ids[i] for i in a], [right.ids[i] for i in b])
    return [(a[i], b[j]) for i, j in pairs]
