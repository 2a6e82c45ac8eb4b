"""What tables and plots say instead of the names in the CSV files."""

from __future__ import annotations

import re

NAMES = {
    "quire": "Quire", "quire, compiled": "Quire, compiled", "quire, batch-invariant": "Quire, batch-invariant",
    "sdpa, contiguous": "SDPA, contiguous", "gather + sdpa": "gather + SDPA", "flex, paged": "FlexAttention, paged",
    "vllm": "vLLM", "vllm, page 128": "vLLM, page 128", "vllm, eager": "vLLM, eager",
    "vllm, compiled": "vLLM, compiled", "openvino-genai": "OpenVINO GenAI",
    "generate_batch": "transformers' generate_batch", "model.generate": "transformers' generate",
    "sdpa cudnn": "cuDNN, contiguous", "sdpa flash": "FlashAttention-2, contiguous", "flex": "FlexAttention, paged",
    "with prefix caching": "Quire with prefix caching", "without prefix caching": "Quire without prefix caching",
}  # fmt: skip
_GROUP = re.compile(r"(\d+)x(\d+k?):(\d+k?)")
_HEADS = re.compile(r"\d+/\d+x\d+")


def name_of(who: str) -> str:
    """A contestant's name as its makers write it."""
    return NAMES.get(who, who)


def case_in_words(case: str) -> str:
    """A step's lengths in words, as `benchmarks.cases` writes them; what that grammar does not know stays as it is."""
    lengths, *changes = case.split("@")
    groups = [_group_in_words(group) for group in lengths.split("+")]
    return ", ".join([" beside ".join(groups), *map(_change_in_words, changes)])


def _group_in_words(group: str) -> str:
    match = _GROUP.fullmatch(group)
    if match is None:
        return group
    count, keys, queries = match.groups()
    if queries == keys:
        return f"a prompt of {keys}" if count == "1" else f"{count} prompts of {keys}"
    if queries == "1":
        return f"decode, {count} × {keys} keys"
    if queries.isdigit() and int(queries) < 64:
        return f"{count} × {keys} keys, {queries} queries each"
    chunks = f"a chunk of {queries}" if count == "1" else f"{count} chunks of {queries}"
    return f"{chunks} up to token {keys}"


def _change_in_words(change: str) -> str:
    if change.startswith("page"):
        return f"pages of {change.removeprefix('page')}"
    if _HEADS.fullmatch(change):
        heads, _, width = change.partition("x")
        return f"{heads} heads of {width}"
    return change if change in ("float32", "float16", "bfloat16") else f"{change} pages"
