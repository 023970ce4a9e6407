"""What the two training scripts share: tokenizer, chat template, optimizers, schedule, saving."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from world import SPECIAL_TOKENS, VOCABULARY, WORDS

TOKEN_IDS = {word: index for index, word in enumerate(VOCABULARY)}
SPECIAL_IDS = {
    "pad_token_id": TOKEN_IDS["<pad>"],
    "bos_token_id": TOKEN_IDS["<s>"],
    "eos_token_id": TOKEN_IDS["</s>"],
}
IGNORE = -100  # the label that cross_entropy skips

_TEMPLATE = (
    "{{ '<s>' }}"
    "{%- for message in messages %}"
    "{%- set content %}"
    "{%- if message['content'] is string %}{{ ' ' + message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{ ' ' + part['text'] }}"
    "IMAGE_PART"
    "{%- else %}{{ raise_exception('this model does not read parts of type ' + part['type']) }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{%- endset %}"
    "{%- if message['role'] == 'user' %}{{ ' <user>' + content }}"
    "{%- elif message['role'] == 'assistant' %}{{ ' <assistant>' }}"
    "{%- generation %}{{ content + ' </s>' }}{%- endgeneration %}"
    "{%- else %}{{ raise_exception('only the roles user and assistant are known') }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ ' <assistant>' }}{%- endif %}"
)


def chat_template(*, images: bool) -> str:
    """Jinja source of `<s> <user> <image> question <assistant> answer </s>`, without `<image>` for a text model.

    The tokenizer drops the blanks between the parts.
    """
    return _TEMPLATE.replace("IMAGE_PART", "{%- elif part['type'] == 'image' %}{{ ' <image>' }}" if images else "")


def encode(text: str) -> list[int]:
    """Ids of words separated by blanks; a word outside the vocabulary is an error here."""
    return [TOKEN_IDS[word] for word in text.split()]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; lower case, punctuation split off, no token added around the text."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        clean_up_tokenization_spaces=False,
        padding_side="left",  # what generate needs; training code that wants right padding says so
        model_max_length=1024,
    )


def build_text_config() -> LlamaConfig:
    """The language model of both demo models, 0.88 million parameters."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )


class Optimizers:
    """Muon for matrices, AdamW for embeddings, norms and biases, under one learning-rate schedule."""

    def __init__(
        self,
        modules: list[nn.Module],
        *,
        muon: float,
        adamw: float,
        schedule: Callable[[int], float],
        clip: float = 1.0,
    ) -> None:
        """`muon` and `adamw` are peak learning rates; `schedule(step)` in 0..1 scales both."""
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        embeddings = {id(m.weight) for module in modules for m in module.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in self.parameters if p.ndim == 2 and id(p) not in embeddings]
        rest = [p for p in self.parameters if p.ndim != 2 or id(p) in embeddings]
        self.optimizers = [torch.optim.Muon(matrices, lr=muon), torch.optim.AdamW(rest, lr=adamw, weight_decay=0.0)]
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in self.optimizers]
        self.clip = clip

    def step(self, loss: torch.Tensor) -> None:
        """Backward, clip, update, clear, and move the schedule on."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


def constant_then_linear(num_steps: int, warmup: int, decay_from: float) -> Callable[[int], float]:
    """Linear warmup, constant, then linear to 2 % of the peak from step `decay_from * num_steps` on."""

    def scale(step: int) -> float:
        left = (num_steps - step) / (num_steps * (1 - decay_from))
        return min((step + 1) / warmup, 1.0, max(0.02, left))

    return scale


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Weights in float16, to halve the file; the config says float32, so that they load as float32 for CPU use."""
    precision = next(model.parameters()).dtype
    model.generation_config = GenerationConfig(max_new_tokens=32, **SPECIAL_IDS)
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.half().save_pretrained(folder)
    model.to(precision).load_state_dict(full)  # undo the rounding: training may go on
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def copy_drill(rng: random.Random) -> tuple[list[int], list[int]]:
    """Question and answer ids of `say W please`, so that no word's embedding stays as it was drawn at the start."""
    word = rng.choice(WORDS)
    return encode(f"say {word} please"), encode(word)


def log(path: Path | None, **fields: object) -> None:
    """One JSON line to the screen, and to `path` where given."""
    line = json.dumps(fields)
    print(line, flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(line + "\n")
