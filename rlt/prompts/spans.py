"""From character ranges to tokens: one tokenisation of the text, no searching.

A token counts for a span only if it lies wholly inside the span, and if the span's text alone is tokenised the same way
there. Two kinds of tokens are dropped, in the teacher's and in the student's text alike, so that both keep the same
tokens: tokens that straddle a boundary, and tokens at an edge that depend on the text around the span (two newlines are
two tokens before a tag, and one at the end of a text).

Two texts that hold the same span are compared piece by piece (`align_spans`), whichever tokenizers cut them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import eq

from rlt.errors import Refused
from rlt.prompts.rendering import Rendered

Range = tuple[int, int]


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a text and, for each of its spans, the indices of the tokens that count.

    `ranges` are the characters of these tokens, counted from the beginning of their span.
    """

    ids: list[int]
    spans: dict[str, list[int]]
    ranges: dict[str, list[Range]]


@dataclass(frozen=True)
class Aligned:
    """The pieces of one text that two tokenisations have in common, in order.

    `left` and `right` are the indices of their tokens, flat; `left_sizes` and `right_sizes` the tokens of each piece.
    """

    left: list[int]
    right: list[int]
    left_sizes: list[int]
    right_sizes: list[int]

    def __len__(self) -> int:
        return len(self.left_sizes)


def tiled(offsets: list[Range]) -> list[Range]:
    """The same ranges, where one leaves characters out before it, with these: some tokenizers trim white space."""
    ranges, end = [], 0
    for left, right in offsets:
        ranges.append((min(left, end), right))
        end = max(end, right)
    return ranges


def tokens_inside(offsets: list[Range], start: int, end: int) -> list[int]:
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
        offsets, spans, ranges = tiled(offsets), {}, {}
        for name, (start, end) in rendered.spans.items():
            inside = tokens_inside(offsets, start, end)
            spans[name] = [inside[i] for i, _ in common_ends([ids[j] for j in inside], next(alone))]
            ranges[name] = [(offsets[i][0] - start, offsets[i][1] - start) for i in spans[name]]
        tokenized.append(TokenizedText(ids, spans, ranges))
    return tokenized


def common_pieces(left: list[Range], right: list[Range]) -> list[tuple[range, range]]:
    """The shortest character ranges that begin and end with tokens of both sides: the tokens of each side in each.

    Tokens that share a character, as the bytes of one do, stay together. What one side alone has is left out, and so is
    a piece of which a side lacks a part.

    Args:
        left, right: characters of tokens, in order.
    """
    pieces, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        first_i, first_j = i, j
        start = end = min(left[i][0], right[j][0])
        while True:  # what begins the piece, then whatever shares a character with it
            if i < len(left) and (left[i][0] < end or i == first_i and left[i][0] == start):
                end, i = max(end, left[i][1]), i + 1
            elif j < len(right) and (right[j][0] < end or j == first_j and right[j][0] == start):
                end, j = max(end, right[j][1]), j + 1
            else:
                break
        if _covers(left[first_i:i], start, end) and _covers(right[first_j:j], start, end):
            pieces.append((range(first_i, i), range(first_j, j)))
    return pieces


def _covers(ranges: list[Range], start: int, end: int) -> bool:
    """Whether tokens reach from `start` to `end` without a gap."""
    reached = start
    for left, right in ranges:
        if left > reached:
            return False
        reached = max(reached, right)
    return bool(ranges) and reached == end


def align_spans(
    left: TokenizedText,
    left_span: str,
    right: TokenizedText,
    right_span: str,
    same_token: Callable[[int, int], bool] = eq,
) -> Aligned:
    """The pieces that both texts have inside spans of the same characters.

    Where both sides cut a piece into the same tokens, each token is a piece: of one tokenizer all are.

    Args:
        same_token: whether a token id of the left stands for the same text as one of the right.
    """
    aligned = Aligned([], [], [], [])
    a, b = left.spans[left_span], right.spans[right_span]
    for ours, theirs in common_pieces(left.ranges[left_span], right.ranges[right_span]):
        here, there = [a[i] for i in ours], [b[j] for j in theirs]
        alike = len(here) == len(there) and all(
            same_token(left.ids[i], right.ids[j]) for i, j in zip(here, there, strict=True)
        )
        aligned.left.extend(here)
        aligned.right.extend(there)
        aligned.left_sizes.extend([1] * len(here) if alike else [len(here)])
        aligned.right_sizes.extend([1] * len(there) if alike else [len(there)])
    return aligned
