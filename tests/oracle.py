"""transformers as the oracle: the same checkpoint, one prompt at a time, no cache of ours in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NEAR_TIE = 1e-4  # a difference where the oracle's two best logits are closer than this is a tie, not an error


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and how far the best logit was ahead of the second at each of them."""

    tokens: list[int]
    margins: list[float]


class Oracle:
    """Greedy generation by transformers in float32."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, prompt: Sequence[int], count: int) -> Answer:
        import torch

        tokens: list[int] = []
        margins: list[float] = []
        with torch.inference_mode():
            out = self._model(torch.tensor([list(prompt)]), use_cache=True)
            for _ in range(count):
                best = torch.topk(out.logits[0, -1].float(), 2)
                tokens.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                out = self._model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        return Answer(tokens, margins)


    def greedy_batch(self, prompts: Sequence[Sequence[int]], count: int, batch: int = 16) -> list[Answer]:
        """`greedy` for many prompts, padded on the left and run in batches of similar length, which is several times faster."""
        answers: dict[int, Answer] = {}
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for first in range(0, len(order), batch):
            group = order[first : first + batch]
            for index, answer in zip(group, self._padded([prompts[i] for i in group], count), strict=True):
                answers[index] = answer
        return [answers[index] for index in range(len(prompts))]

    def _padded(self, prompts: Sequence[Sequence[int]], count: int) -> list[Answer]:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.stack([torch.topk(step.float(), 2).values for step in out.logits], dim=1)
        margins = (best[..., 0] - best[..., 1]).tolist()
        return [Answer(row, margin) for row, margin in zip(out.sequences[:, width:].tolist(), margins, strict=True)]


def assert_same(answer: Answer, tokens: Sequence[int], what: str) -> bool:
    """Equal token for token, or different first at a near tie (after which the two go on from different texts).

    True if equal throughout.
    """
    for place, (expected, got) in enumerate(zip(answer.tokens, tokens, strict=True)):
        if expected != got:
            assert answer.margins[place] < NEAR_TIE, f"{what}: token {place} is {got}, the oracle says {expected}"
            return False
    return True
