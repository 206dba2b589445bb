"""A laptop-sized stand-in for a real model and a real data set, as one would download them.

``python -m experiments.word_problems DIRECTORY`` (`pip install -e '.[parity]'`) writes there

    train.jsonl, heldout.jsonl   word problems of one step: prompt, answer, and a solution that demonstrates it
    model/                       a small Qwen3-MoE with random weights, its tokeniser and chat template, by transformers
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("Ann", "Ben", "Chen", "Dora", "Emil", "Fay", "Goran", "Hana", "Ines", "Jo")
THINGS = ("apples", "books", "coins", "eggs", "keys", "nuts", "pens", "shells")
PROBLEMS = (
    ("{name} has {a} {things} and finds {b} more. How many {things} does {name} have?", 1),
    ("{name} has {a} {things} and loses {b}. How many {things} are left?", -1),
)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def problems(largest: int = 9) -> list[dict[str, str]]:
    """All problems with numbers from 1 to ``largest`` and no negative result, in a fixed random order."""
    records = []
    for question, sign in PROBLEMS:
        for a, b in ((a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)):
            if (result := a + sign * b) < 0:
                continue
            for name, things in ((name, things) for name in NAMES for things in THINGS):
                solution = rf"{a} {'+' if sign > 0 else '-'} {b} = \boxed{{{result}}}"
                prompt = question.format(name=name, things=things, a=a, b=b)
                records.append({"prompt": prompt, "answer": str(result), "solution": solution})
    random.Random(0).shuffle(records)
    return records


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level tokeniser with one token a digit, trained on ``texts``.

    Its files are like those of Qwen's base models, which do not say that <|im_end|> ends a turn.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHAT
    )


def make_model(tokenizer: Any, **sizes: Any) -> Any:
    """A Qwen3-MoE with random weights; ``sizes`` replace those of `transformers.Qwen3MoeConfig` here."""
    import torch
    import transformers

    numbers: dict[str, Any] = {
        "vocab_size": 512,  # more than the tokeniser's, as in published checkpoints
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "intermediate_size": 128,
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "initializer_range": 0.125,
    }
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**(numbers | sizes), eos_token_id=tokenizer.eos_token_id)
    return transformers.Qwen3MoeForCausalLM(config)


def write(directory: Path, *, largest: int = 9, heldout: int = 256, **sizes: Any) -> None:
    """Writes data and model; see `problems` and `make_model`. What is there already is left, with an error."""
    if there := [name for name in ("heldout.jsonl", "train.jsonl", "model") if (directory / name).exists()]:
        raise FileExistsError(f"{directory} holds {', '.join(there)} already: give another directory, or remove them")
    directory.mkdir(parents=True, exist_ok=True)
    records = problems(largest)
    write_records(directory / "heldout.jsonl", records[:heldout])
    write_records(directory / "train.jsonl", records[heldout:])
    tokenizer = make_tokenizer([f"{record['prompt']}\n{record['solution']}" for record in records])
    make_model(tokenizer, **sizes).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    print(f"{directory}: {len(records)} problems, {heldout} of them held out, and a model with {len(tokenizer)} tokens")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m experiments.word_problems DIRECTORY")
    try:
        write(Path(sys.argv[1]))
    except FileExistsError as error:
        sys.exit(str(error))
