"""Thoughts between tags, before the answer: <think> of DeepSeek R1 and Qwen 3, [THINK] of Magistral.

Source: the chat templates of these models.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from engine.text.formats.reader import SPACE, Reader, Stage, Steps

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ThinkTags:
    """Two tags around the thoughts. `is_always_open`: the output begins inside, unless the prompt says
    that there are no thoughts; else it does if the prompt ends with the first tag.
    """

    name: str
    start: str
    end: str
    is_always_open: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.start, self.end)

    def is_opened_by(self, prompt: str) -> bool:
        """Whether what follows this prompt are thoughts already."""
        prompt = prompt.rstrip()
        return prompt.endswith(self.start) or (self.is_always_open and not prompt.endswith(self.end))

    def is_left_open_by(self, message: str) -> bool:
        """Whether the thoughts in the beginning of an answer are not ended yet."""
        return message.rfind(self.start) > message.rfind(self.end)

    def marks(self, tokenizer: Tokenizer) -> tuple[int, int] | None:
        """The tokens of the tags; None if they are not one token each."""
        start, end = tokenizer.token_id(self.start), tokenizer.token_id(self.end)
        return None if start is None or end is None else (start, end)


QWEN3 = ThinkTags("qwen3", "<think>", "</think>")
DEEPSEEK_R1 = ThinkTags("deepseek-r1", "<think>", "</think>", is_always_open=True)
MAGISTRAL = ThinkTags("mistral", "[THINK]", "[/THINK]")


def read_thoughts(reader: Reader, tags: ThinkTags, *, is_open: bool, separates: bool) -> Steps[None]:
    """Thoughts, if the output begins with them. Without `separates` they are content as they are written."""
    if not is_open and not (
        (yield from reader.starts_with(tags.start, after=SPACE)) and reader.is_tag(SPACE)
    ):
        reader.stage = Stage.ANSWERING
        return
    reader.stage, reader.has_thought = Stage.THINKING, True
    emit = reader.reasoning if separates else reader.content
    if separates:
        yield from reader.skip_space()
        yield from reader.accept(tags.start)  # some models repeat the tag of the prompt
    while (found := (yield from reader.pass_until((tags.end,), emit))) is not None and not reader.is_tag():
        emit(reader.take(1))
    if found is not None:
        tag = reader.take(len(tags.end))
        if not separates:
            reader.content(tag)
    if separates:
        reader.end_reasoning()
    reader.stage = Stage.ANSWERING
