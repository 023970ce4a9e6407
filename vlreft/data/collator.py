"""`Collator`: examples or chat messages to a batch with labels, for text and for images.

Legend: B rows of a batch, S tokens of a row once padded. Ids are int64; masks are 1 on real tokens and 0 on padding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlreft.data.samples import Sample, read_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger("vlreft")

IGNORED = -100  # the label that torch's cross entropy leaves out
TAIL = 64  # characters of the prompt that its answer is tokenised with; more than any token is long
# What `token_type_ids` say of an answer: 0 ("text") almost everywhere. PaliGemma's say whether a token sees the tokens
# behind it (0) or not (1): with 0 an answer would be read before it is predicted.
ANSWER_TOKEN_TYPE = {"PaliGemmaProcessor": 1}


class Collator:
    """Turn examples into training batches, and into generation batches with the very same prompt ids.

    An example has columns `question`, `answer` and optionally `image` or `images` (PIL images or paths), or `messages`
    in the hub's chat form, the assistant's last one being the answer. Under `transformers.Trainer`, set
    `remove_unused_columns=False`. Raises: ValueError, naming the sample.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        overflow: Literal["error", "cut"] = "error",
        prompt_format: str = "{question}",
    ) -> None:
        """Take a processor, or the tokenizer of a text-only model.

        `max_length` counts a row's tokens, image tokens included, and is never met by cutting a prompt: `overflow` says
        what becomes of the answer ("cut" drops its end, the end token included, and logs it). `prompt_format` is the
        prompt's text where there is no chat template, with `{question}` for the question.
        """
        _check_settings(max_length, overflow, prompt_format)
        self.processor = processor
        self.tokenizer = _tokenizer_of(processor)
        self.max_length, self.overflow, self.prompt_format = max_length, overflow, prompt_format
        self.is_text_only = processor is self.tokenizer
        # BLIP-2 keeps an AddedToken here, whose `str` is its text.
        token = None if self.is_text_only else getattr(processor, "image_token", None)
        self.image_token = None if token is None else str(token)
        self._image_ids = _media_ids(processor, "image")
        self._media_ids = self._image_ids | _media_ids(processor, "video") | _media_ids(processor, "audio")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a training batch: prompt and answer, right padded, with the answer and its end token as labels.

        Shapes: input_ids, attention_mask, labels (-100 on prompt and padding) and token types, all BS; what else the
        processor makes (pixel_values, image_grid_thw, ...) as it makes it. Raises: ValueError, naming the sample.
        """
        samples = self._samples(examples, training=True)
        aligned, rest = self._encode(samples)
        answers = [self._answer_ids(sample) for sample in samples]
        answers = [self._fit(*row) for row in zip(samples, aligned["input_ids"], answers, strict=True)]
        labels = [torch.full_like(ids, IGNORED) for ids in aligned["input_ids"]]
        labels = [self._extend("labels", *row) for row in zip(labels, answers, strict=True)]
        for key, rows in aligned.items():
            aligned[key] = [self._extend(key, *row) for row in zip(rows, answers, strict=True)]
        return {**self._pad({**aligned, "labels": labels}, "right"), **rest}

    def prompts(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a generation batch: the prompts alone, left padded, for `model.generate(**batch)`.

        Row by row the ids are those of the prompt part of `self(examples)`. Answers may be absent, and messages may end
        with the user's. Shapes: as in `__call__`, without labels. Raises: ValueError, naming the sample.
        """
        samples = self._samples(examples, training=False)
        aligned, rest = self._encode(samples)
        for sample, ids in zip(samples, aligned["input_ids"], strict=True):
            self._fit(sample, ids, [])
        return {**self._pad(aligned, "left"), **rest}

    def decode(self, generated_ids_BS: Tensor, prompt_length: int) -> list[str]:
        """Give the text that follows the first `prompt_length` tokens of each row, without special tokens.

        Shapes: generated_ids_BS as `generate` returns it for `prompts`, S at least `prompt_length`. Units: tokens.
        """
        if generated_ids_BS.ndim != 2 or not 0 <= prompt_length <= generated_ids_BS.shape[1]:
            raise ValueError(
                f"`prompt_length` (={prompt_length}) must lie within the rows of `generated_ids_BS` (shape "
                f"{tuple(generated_ids_BS.shape)}); pass the width of the prompts' `input_ids`."
            )
        texts = self.tokenizer.batch_decode(generated_ids_BS[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @property
    def _eos_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int), eos
        return eos

    @property
    def _pad_id(self) -> int:
        """What fills the rows; without a pad token any id will do, as masks come from lengths."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else self._eos_id

    def _samples(self, examples: Sequence[Mapping[str, Any]], *, training: bool) -> list[Sample]:
        if not len(examples):
            raise ValueError("`examples` (=[]) must hold at least one example.")
        return [self._render(read_sample(example, place, training=training)) for place, example in enumerate(examples)]

    def _render(self, sample: Sample) -> Sample:
        name, messages, images, question, answer, _ = sample
        self._check_answer(name, answer)
        kind = type(self.processor).__name__
        if images and self.image_token is None:
            raise ValueError(f"{name} has {len(images)} image(s), but {kind} has no image token; leave the images out.")
        if self.processor.chat_template:
            text = self._chat(messages, add_generation_prompt=True)
            answer = None if answer is None else self._follow(messages, text, answer)
        elif question is None:
            raise ValueError(f"{name} has `messages`, but {kind} has no chat template; give `question` and `answer`.")
        else:
            text = (self.image_token or "") * len(images) + self.prompt_format.replace("{question}", question)
            # Words are told apart by a space; a bare answer would be glued to the prompt's last word.
            glued = answer is not None and not text[-1:].isspace() and not answer[:1].isspace()
            answer = f" {answer}" if glued else answer
        self._check_placeholders(name, text, len(images))
        return sample._replace(text=text, answer=answer)

    def _check_answer(self, name: str, answer: str | None) -> None:
        end = str(self.tokenizer.eos_token)
        if answer and end in answer.strip().removesuffix(end):
            raise ValueError(
                f"{name} has an answer with the end token {end!r} inside: what follows is never learnt; remove it."
            )

    def _chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        if self.is_text_only:  # their templates add strings; a processor's walk through parts and lose strings
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        return str(text)

    def _follow(self, messages: list[dict[str, Any]], text: str, answer: str) -> str:
        """What the template writes after the prompt, its own spacing and end of turn included, else the bare answer."""
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = self._chat([*messages, reply], add_generation_prompt=False)
        if not whole.startswith(text) or answer.strip() not in whole[len(text) :]:
            return answer
        # Blanks between this turn and the next are no part of the answer, as in LLaVA-1.5's own training.
        return whole[len(text) :].rstrip()

    def _check_placeholders(self, name: str, text: str, num_images: int) -> None:
        num_placeholders = text.count(self.image_token) if self.image_token else 0
        if num_placeholders != num_images:
            remedy = "add an entry {'type': 'image'} to the messages for each image."
            if num_placeholders > num_images:
                remedy = f"give an image for each image entry, and leave {self.image_token!r} out of the question."
            raise ValueError(
                f"{name} has {num_images} image(s) and {num_placeholders} place(s) for them in its prompt; {remedy}"
            )

    def _encode(self, samples: list[Sample]) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
        """The prompts as rows without padding (whatever runs along the sequence), and all else the processor made."""
        texts = [sample.text for sample in samples]
        options: dict[str, Any] = {"add_special_tokens": not self._has_bos(samples), "truncation": False}
        if self.is_text_only:  # row by row: needs no pad token and leaves the tokenizer's padding as it is
            encoded = self.tokenizer(texts, padding=False, **options)
            aligned = {key: [torch.tensor(row) for row in rows] for key, rows in encoded.items()}
            rest: dict[str, Any] = {}
        else:
            # Nested by row, as some processors take a flat list for the images of one row.
            images: Any = [sample.images for sample in samples]
            options |= {"padding": True, "return_tensors": "pt"}
            encoded = self.processor(text=texts, images=images if any(images) else None, **options)
            aligned, rest = _split(dict(encoded))
        aligned.pop("attention_mask", None)
        for sample, ids in zip(samples, aligned["input_ids"], strict=True):
            self._check_prompt(sample, ids.tolist())
        return aligned, rest

    def _has_bos(self, samples: list[Sample]) -> bool:
        """Whether the prompts begin with the start token already, so that the tokenizer must not add its own."""
        bos = self.tokenizer.bos_token
        having = [bool(bos) and sample.text.startswith(str(bos)) for sample in samples]
        if any(having) and not all(having):
            raise ValueError(
                f"{samples[having.index(True)].name} begins with the start token {bos!r} and "
                f"{samples[having.index(False)].name} does not; leave it out, the tokenizer adds it."
            )
        return all(having)

    def _check_prompt(self, sample: Sample, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"{sample.name} has a prompt of 0 tokens; give it a question.")
        if ids[-1] == self._eos_id and not sample.text.rstrip().endswith(str(self.tokenizer.eos_token)):
            raise ValueError(
                f"{sample.name}: the tokenizer ends the prompt with its end token {self.tokenizer.eos_token!r}, so no "
                "answer could follow; make it not add one (`add_eos_token=False`)."
            )

    def _answer_ids(self, sample: Sample) -> list[int]:
        """The answer's ids, tokenised as they come after the prompt, up to and with one end token."""
        answer, eos = str(sample.answer), self._eos_id
        tail = sample.text.rsplit(self.image_token, 1)[-1] if self.image_token else sample.text
        tail_ids = self._bare_ids(tail[-TAIL:])
        ids = self._bare_ids(tail[-TAIL:] + answer)
        # A tokenizer may merge the two where they meet; the prompt's ids must stay what generation sees.
        ids = ids[len(tail_ids) :] if ids[: len(tail_ids)] == tail_ids else self._bare_ids(answer)
        ids = ids[: ids.index(eos)] if eos in ids else ids
        if not ids:
            raise ValueError(f"{sample.name} has an answer that gives no tokens: {answer!r}; give it a text.")
        forbidden = (self._media_ids | {self._pad_id}) - {eos}
        if found := sorted(forbidden.intersection(ids)):
            raise ValueError(
                f"{sample.name} has an answer with the special token(s) {self.tokenizer.convert_ids_to_tokens(found)}; "
                "an answer is text: remove them."
            )
        return [*ids, eos]

    def _bare_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"]

    def _fit(self, sample: Sample, prompt_ids: Tensor, answer_ids: list[int]) -> list[int]:
        """The answer's ids as far as `max_length` lets them; the prompt is never cut."""
        if self.max_length is None or len(prompt_ids) + len(answer_ids) <= self.max_length:
            return answer_ids
        room = self.max_length - len(prompt_ids)
        if room < 1:
            num_image = sum(token in self._image_ids for token in prompt_ids.tolist())
            raise ValueError(
                f"{sample.name} has a prompt of {len(prompt_ids)} tokens, {num_image} of them image tokens: "
                f"too long for `max_length` (={self.max_length}){' and an answer' if answer_ids else ''}; raise "
                "`max_length` or use smaller images."
            )
        if self.overflow == "error":
            raise ValueError(
                f"{sample.name} has a prompt of {len(prompt_ids)} and an answer of {len(answer_ids)} tokens, more than "
                f"`max_length` (={self.max_length}); raise it, or cut such answers with overflow='cut'."
            )
        logger.warning(
            "%s: its answer is cut from %d to %d tokens to keep within max_length=%d.",
            *(sample.name, len(answer_ids), room, self.max_length),
        )
        return answer_ids[:room]

    def _extend(self, key: str, row: Tensor, answer_ids: list[int]) -> Tensor:
        if key in ("input_ids", "labels"):
            return torch.cat([row, torch.tensor(answer_ids)])
        kind = ANSWER_TOKEN_TYPE.get(type(self.processor).__name__, 0) if key == "token_type_ids" else 0
        return torch.cat([row, row.new_full([len(answer_ids)], kind)])

    def _pad(self, aligned: dict[str, list[Tensor]], side: Literal["left", "right"]) -> dict[str, Tensor]:
        # Lengths, not ids: where the pad token is the end token, a mask made from ids would hide real ends.
        masks = [torch.ones_like(ids) for ids in aligned["input_ids"]]
        fill = {"input_ids": self._pad_id, "labels": IGNORED}
        return {
            key: pad_sequence(rows, batch_first=True, padding_value=fill.get(key, 0), padding_side=side)
            for key, rows in {**aligned, "attention_mask": masks}.items()
        }


def _check_settings(max_length: int | None, overflow: str, prompt_format: str) -> None:
    if max_length is not None and max_length < 1:
        raise ValueError(f"`max_length` (={max_length}) must be at least 1 token; leave it None for no limit.")
    if overflow not in ("error", "cut"):
        raise ValueError(f"`overflow` (={overflow!r}) must be 'error' or 'cut'.")
    if "{question}" not in prompt_format:
        raise ValueError(
            f"`prompt_format` (={prompt_format!r}) must hold {{question}}; put it where the question goes."
        )


def _tokenizer_of(processor: object) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    is_processor = isinstance(processor, ProcessorMixin)
    tokenizer = getattr(processor, "tokenizer", None) if is_processor else processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`processor` (a {type(processor).__name__}) must be a transformers processor with a tokenizer, or a "
            "tokenizer; load it with AutoProcessor or AutoTokenizer."
        )
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("`processor` has a tokenizer without an end token: no end could be learnt; set `eos_token`.")
    if is_processor and tokenizer.pad_token_id is None:
        raise ValueError("`processor` has a tokenizer without a pad token; set `pad_token`, `eos_token` will do.")
    return tokenizer


def _media_ids(processor: object, kind: Literal["image", "video", "audio"]) -> set[int]:
    from transformers import ProcessorMixin

    ids = getattr(processor, f"{kind}_token_ids") if isinstance(processor, ProcessorMixin) else []
    return {token for token in ids if token is not None}


def _split(encoded: dict[str, Any]) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
    """Tell what runs along the sequence (stripped of padding, by row) from the rest (as it is)."""
    encoded.pop("labels", None)  # PaliGemma's processor makes its own, of the prompt alone
    mask_BS = encoded["attention_mask"].bool()
    aligned, rest = {}, {}
    for key, value in encoded.items():
        if not isinstance(value, Tensor) or value.shape[:2] != mask_BS.shape:
            rest[key] = value
        elif value.ndim == 2:
            aligned[key] = [row[mask] for row, mask in zip(value, mask_BS, strict=True)]
        else:
            raise ValueError(
                f"`processor` makes `{key}` (shape {tuple(value.shape)}), more than one number a token; how an answer "
                "extends that is not known here: use another model."
            )
    return aligned, rest
