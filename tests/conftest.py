"A tiny pair in folders and tiny local files with the schemas of the card's data sets, shared by all tests."

import json
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
HERE = Path(__file__).parent
WORDS = "the a tool call name search find paper on cat dog sat user think respond weather city date".split()
WORDS += "query number list of in for to and".split()
CHAT = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|endoftext|> {% endfor %}"


def make_tokenizer(folder, words=WORDS):
    "A byte-level BPE as Qwen2 has it, in which each of `words` is one token."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tok.train_from_iterator([f"{w} {w}" for w in words], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHAT
    )
    fast.save_pretrained(folder)
    return len(fast)


def make_model(folder, seed, d=16, layers=4, words=WORDS):
    "A random Qwen2 in a folder, as `from_pretrained` wants it."
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    n = make_tokenizer(folder, words)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=n,
        hidden_size=d,
        intermediate_size=2 * d,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    "Folders of a tiny model A and a tiny model B."
    root = tmp_path_factory.mktemp("models")
    return make_model(root / "a", 0), make_model(root / "b", 1)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    "Local files with the schemas of FineWeb and of ToolRL."
    import random

    root, rng = tmp_path_factory.mktemp("files"), random.Random(0)
    words = lambda n: " ".join(rng.choice(WORDS) for _ in range(n))
    web = [
        {
            "text": words(rng.randint(5, 40)),
            "id": f"<urn:{i}>",
            "dump": "CC",
            "url": "u",
            "date": "d",
            "file_path": "p",
            "language": "en",
            "language_score": 0.9,
            "token_count": 9,
        }
        for i in range(60)
    ]
    tools = [
        {
            "instruction": f"tool {words(8)}",
            "input": f"<user> {words(6)} </user>",
            "output": f"<think> {words(5)} </think> <tool_call> {words(4)} </tool_call>",
        }
        for _ in range(20)
    ]
    web[7]["text"] += (
        ' <script>document.title = "taken over"</script> <img src=x onerror="document.title=1"> </style> \x1b[31m'
    )
    for name, rows in {"fineweb": web, "toolrl": tools}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


@pytest.fixture
def pair(models):
    from crosscoder import ModelPair

    return ModelPair(*models)


def cli(*args, **kwargs):
    "The installed command in a process of its own: what it returned and printed."
    import subprocess

    command = [sys.executable, "-c", "from crosscoder.cli import app; app()", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    done.said = " ".join((done.stderr + done.stdout).split())
    return done
