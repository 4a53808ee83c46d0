"""Ending an answer where a certain text appears in it."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_UNFINISHED_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class StopStrings:
    """Texts that end an answer, with the tokenizer that turns tokens into text.

    Raises ValueError for an empty text, TypeError for a tokenizer that cannot decode.
    """

    strings: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if not self.strings or not all(isinstance(string, str) and string for string in self.strings):
            raise ValueError(f"stop_strings={list(self.strings)!r} must be texts of at least one character")

        if not callable(getattr(self.tokenizer, "decode", None)):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(self.tokenizer).__name__}")

    @property
    def num_tokens(self) -> int:
        """How many of the last tokens must be looked at: each is a byte at least, special tokens apart."""
        return max(len(string.encode()) for string in self.strings) + 8

    def is_completed_by_last(self, token_ids: list[int]) -> bool:
        """Whether the last token completes one of the texts (it may go on after it)."""
        before = self.tokenizer.decode(token_ids[:-1]).rstrip(_UNFINISHED_CHARACTER)
        text = self.tokenizer.decode(token_ids)
        return any((start := text.rfind(string)) >= 0 and start + len(string) > len(before) for string in self.strings)
