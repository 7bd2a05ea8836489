"Models, tokenizers and texts as people have them: read rightly, or refused with what to do; never wrong silently."

import copy
import gzip
import json
import warnings
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import transformers
from conftest import cli
from test_bad_input import refuses
from torch import nn

from crosscoder import ModelPair, compare_outputs, extract, load_texts, mix, render_chat
from crosscoder.changes.samples import compare_samples
from crosscoder.data.blocks import block_output, find_blocks
from crosscoder.data.rows import _values, json_rows
from crosscoder.data.texts import TextSource, file_texts, hub_texts

TEXTS = [f"the cat number {i} sat on the mat and a dog ran over hill {i * 7}" for i in range(12)]
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
WRITES_BOS = "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}"


def tokenizer(single="$A", template=None, extra=()):
    "A byte-level tokenizer with BOS and EOS, which it adds as `single` says."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<turn>", *extra]
    how = {"vocab_size": 300, "special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    t.train_from_iterator(["the cat sat on the mat", "a dog ran over the hill"], trainers.BpeTrainer(**how))
    t.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, chat_template=template, **named)


def llama(seed=0, vocab=320, cls="LlamaForCausalLM", **more):
    "A tiny random model."
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": vocab}
    return getattr(transformers, cls)(transformers.LlamaConfig(**sizes | more)).eval()


def saved(folder, model, tok=None):
    "The name of a folder with a model, and perhaps its tokenizer."
    model.save_pretrained(folder)
    if tok is not None:
        tok.save_pretrained(folder)
    return str(folder)


def read_by(pair, texts, path, **how):
    "All that the models were given, and the store."
    seen, real = [], pair.activations
    pair.activations = lambda ids, *args: (seen.extend(ids.tolist()), real(ids, *args))[1]
    return seen, extract(pair, texts, path, layer=1, progress=False, **how)


# --- 1: special tokens


@pytest.mark.parametrize("single", ["<bos> $A", "<bos> $A <eos>", "$A"])
def test_a_mark_is_read_once(single, tmp_path):
    "Also where the text came with its marks written out, as data sets of finished chats do."
    tok = tokenizer(single, WRITES_BOS)
    text = render_chat(CHAT, tok)
    (ids,), store = read_by(ModelPair(llama(), llama(1), tok), [text], tmp_path / "s", tokens="all")
    assert ids == tok.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    counts = store.manifest["counts"]
    assert counts.get("special tokens written twice", 0) == single.count("<")
    assert store.rows.end.max() <= len(text)


def test_the_last_token_is_of_the_text(tmp_path):
    "An EOS that the tokenizer appends, or that the text ends with, is passed over and counted."
    plain, closing = tokenizer(), tokenizer("$A <eos>")
    texts = [*TEXTS, "a dog<eos>", "<eos>"]
    a, b = llama(), llama(1)
    store = extract(ModelPair(a, b, closing), texts, tmp_path / "s", layer=1, tokens="last", progress=False)
    usual = extract(ModelPair(a, b, plain), [*TEXTS, "a dog"], tmp_path / "t", layer=1, tokens="last", progress=False)
    assert store.rows.position.tolist() == usual.rows.position.tolist()
    for x, y in zip(store.read(0, 13), usual.read(0, 13)):
        torch.testing.assert_close(x, y, atol=0.02, rtol=0)
    counts = store.manifest["counts"]
    assert (counts["special tokens passed over"], counts["special tokens written twice"]) == (13, 2)
    assert counts["too short texts"] == 1


def test_an_opening_is_not_at_its_end():
    "What both models go on from has no EOS behind it."
    a, b = llama(), llama(1)
    said = [
        compare_samples(ModelPair(a, b, tok), TEXTS[:2], n=2, max_new=4, progress=False).drop(columns="surprise")
        for tok in (tokenizer(), tokenizer("$A <eos>"))
    ]
    assert said[0].equals(said[1])


def test_whose_template(tmp_path):
    with_one = tokenizer(template=WRITES_BOS)
    base, chat = saved(tmp_path / "b", llama(), tokenizer()), saved(tmp_path / "c", llama(1), with_one)
    pair = ModelPair(base, chat)
    assert "<turn>" in render_chat(CHAT, pair.tokenizer)
    assert pair.chats == "chats are written with the chat template of B; A has none" and pair.chats in repr(pair)
    other = saved(tmp_path / "o", llama(2), tokenizer(template=WRITES_BOS.replace("<turn>", "## ")))
    pair = ModelPair(other, chat)
    assert pair.chats == "chats are written with the chat template of A; that of B is another one"
    assert "<turn>" in render_chat(CHAT, ModelPair(other, chat, template="B").tokenizer)
    refuses("template is 'A': models with a chat template: B", lambda: ModelPair(base, chat, template="A"))
    given = tokenizer()
    given.pad_token = None
    ModelPair(llama(), llama(1), given)
    assert given.pad_token is None  # it comes back as it was


# --- 2: A is B


def test_an_adapter_changes_its_base():
    from peft import IA3Config, LoraConfig, get_peft_model

    for config in (LoraConfig(target_modules=["q_proj"]), IA3Config(target_modules=["k_proj"], feedforward_modules=[])):
        base = llama()
        untouched = copy.deepcopy(base)
        tuned = get_peft_model(base, config)
        for pair in ((tuned, base), (base, tuned), (tuned, base.model)):
            message = refuses("peft puts an adapter into its base", lambda: ModelPair(*pair, tokenizer=tokenizer()))
            assert "Give the base by its name or folder" in message
        ModelPair(tuned, untouched, tokenizer=tokenizer())


def test_shared_parameters_and_the_same_twice(tmp_path):
    a, b = llama(), llama(1)
    b.model.layers[0] = a.model.layers[0]
    refuses("share 9 parameters, first 'model.layers.0.", lambda: ModelPair(a, b, tokenizer=tokenizer()))
    folder = saved(tmp_path / "m", a, tokenizer())
    for twice in ((a, a), (folder, folder), (folder, Path(folder))):
        with pytest.warns(UserWarning, match="A and B are both .*: there is no difference to find"):
            ModelPair(*twice, tokenizer=tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelPair(llama(), llama(), tokenizer=tokenizer())  # loaded twice: a null that nobody needs to be told of


def test_the_command_line_asks_whether_it_is_meant(models, files, tmp_path):
    (tmp_path / "link").symlink_to(models[0])
    how = ["--texts", f"{files}/toolrl.jsonl", "--layer", 1, "--out", tmp_path / "r"]
    for b in (models[0], models[0] + "/", tmp_path / "link"):
        done = cli("extract", "--model-a", models[0], "--model-b", b, *how)
        assert done.returncode == 2 and "say --null if" in done.said, done.said
    assert not (tmp_path / "r").exists()
    assert cli("extract", "--model-a", models[0], "--model-b", models[0], "--null", *how).returncode == 0


# --- 3: what the hook catches


class Odd(nn.Module):
    "A block that puts out what `f` makes of the stream."

    def __init__(self, block, f):
        super().__init__()
        self.block, self.f = block, f

    def forward(self, *args, **kwargs):
        return self.f(self.block(*args, **kwargs))


@pytest.mark.parametrize(
    "f, found",
    [
        (lambda x: torch.cat([x[:, :2], x], 1), "(1, 5, 32)"),  # learned tokens before the text
        (lambda x: x[None].repeat(4, 1, 1, 1), "(4, 1, 3, 32)"),  # streams side by side, as in Gemma 3n
        (lambda x: x.transpose(0, 1), "(3, 1, 32)"),  # tokens first, as in XLNet
        (lambda x: x[..., :16], "(1, 3, 16)"),
        (lambda x: (), "tuple"),
        (lambda x: (None, x), "NoneType"),
    ],
)
def test_only_the_stream_is_read(f, found):
    model = llama()
    model.model.layers[1] = Odd(model.model.layers[1], f)
    ids = torch.tensor([[5, 6, 7]])
    part = f"block 1 of LlamaForCausalLM (llama) put out {found}, expected (1, 3, 32)"
    refuses(part, lambda: block_output(model, find_blocks(model), 1, ids))
    refuses(part, lambda: ModelPair(model, llama(1), tokenizer()).activations(ids, None, 1))


def test_a_block_that_never_runs():
    model = llama()
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.model.config.num_hidden_layers = 4  # so many does its body run
    refuses("block 4 of LlamaForCausalLM", lambda: block_output(model, model.model.layers, 4, torch.tensor([[5]])))


def test_learned_prompts_are_refused_everywhere():
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for config in (PromptTuningConfig, PrefixTuningConfig):
        a = get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=5))
        pair = ModelPair(a, llama(1), tokenizer())
        refuses("is a learned prompt", lambda: pair.activations(torch.tensor([[5, 6]]), None, 1))
        refuses("is a learned prompt", lambda: compare_outputs(pair, TEXTS, progress=False))


def test_a_wrapped_model_knows_its_positions():
    "GPT-2 has learned places; torch.compile and DataParallel hide that it takes them."
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    filled, mask = torch.cat([torch.ones(1, 3).long(), ids], 1), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        pair = ModelPair(wrapped, copy.deepcopy(model), tokenizer())
        for x, y in zip(pair.activations(filled, mask, 1), pair.activations(ids, None, 1)):
            torch.testing.assert_close(x[:, 3:], y, atol=1e-5, rtol=1e-4)
    refuses("is no language model of transformers", lambda: ModelPair(nn.Linear(2, 2), model, tokenizer()))


# --- 5: a user's module comes back as it was


def test_a_model_in_training_goes_on():
    model, base = llama().train(), llama(1)
    model.model.embed_tokens.requires_grad_(False)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    grad = model.lm_head.weight.grad.clone()
    state = lambda: [(p.requires_grad, p.dtype, p.device) for p in model.parameters()]
    before = state()
    pair = ModelPair(model, base, tokenizer(), dtype=torch.bfloat16)
    pair.activations(ids, None, 2)
    assert state() == before and model.training and model.lm_head.weight.grad.equal(grad)
    assert pair.dtype == (torch.bfloat16, torch.bfloat16) and not any(m.training for m in pair.models)
    lent = ModelPair(model, base, tokenizer()).models[0]
    with torch.no_grad():
        model.lm_head.weight.add_(1)  # a step of training is seen: the numbers are shared
    assert lent.lm_head.weight.equal(model.lm_head.weight)
    assert not list(model.model.embed_tokens._forward_pre_hooks)


# --- 7: tokenizers, adapters, heads, quantized and offloaded models


def test_a_token_without_an_embedding(tmp_path):
    tok = tokenizer()
    a, b = llama(vocab=len(tok)), llama(1, vocab=len(tok))
    tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pair = ModelPair(a, b, tok)
    extract(pair, TEXTS, tmp_path / "s", layer=1, progress=False)
    part = "the token '<image>', for which 'LlamaForCausalLM' has no embedding"
    refuses(part, lambda: extract(pair, [*TEXTS, "see <image>"], tmp_path / "t", layer=1, progress=False))
    refuses(part, lambda: compare_outputs(pair, ["see <image> there"], progress=False))


def test_adapters_as_folders(tmp_path):
    from peft import LoraConfig, get_peft_model

    tok = tokenizer()
    base = saved(tmp_path / "base", llama(), tok)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    how = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(load(), LoraConfig(**how))
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    x, y = ModelPair(tmp_path / "adapter", base, dtype=torch.float32).activations(ids, None, 2)
    a, b = ModelPair(tuned, load(), tok).activations(ids, None, 2)
    assert x.equal(a) and y.equal(b) and not x.equal(y)
    tok.add_tokens([f"<new{i}>" for i in range(60)])
    longer = load()
    longer.resize_token_embeddings(len(tok))
    get_peft_model(longer, LoraConfig(**how, modules_to_save=["embed_tokens", "lm_head"])).save_pretrained(
        tmp_path / "n"
    )
    pair = ModelPair(tmp_path / "n", base, tok)
    assert [len(m.get_input_embeddings().weight) for m in pair.models] == [len(tok), 320]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/moved"}))
    refuses("is an adapter on '/moved'. Could not load", lambda: ModelPair(tmp_path / "adapter", base, tok))


def test_a_reward_model_has_a_stream(tmp_path):
    "And what needs its head is refused."
    base, reward = llama(), llama(1, cls="LlamaForSequenceClassification")
    folders = saved(tmp_path / "r", reward, tokenizer()), saved(tmp_path / "b", base, tokenizer())
    pair = ModelPair(*folders, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    expected = reward.model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(pair.activations(ids, None, 1)[0], expected)
    refuses("no unembedding", lambda: compare_outputs(pair, TEXTS, progress=False))


def test_offloaded_and_guarded_models(tmp_path):
    from accelerate import cpu_offload

    base, tuned = llama(), llama(1)
    expected = ModelPair(tuned, base, tokenizer())
    offloaded = cpu_offload(copy.deepcopy(tuned), execution_device=torch.device("cpu"))
    pair = ModelPair(offloaded, base, tokenizer())
    ids = torch.tensor([[5, 6, 7]])
    assert pair.activations(ids, None, 1)[0].equal(expected.activations(ids, None, 1)[0])
    assert pair.describe()["weights"] == expected.describe()["weights"]
    refuses(
        "cannot be brought to dtype torch.float16", lambda: ModelPair(offloaded, base, tokenizer(), dtype=torch.half)
    )


def test_the_way_out_is_said(tmp_path):
    "Of .bin files, code of the model's own, a model that sees: never loaded, and what to do in a line."
    tok, base = tokenizer(), saved(tmp_path / "base", llama(), tokenizer())
    pickled = tmp_path / "bin"
    saved(pickled, llama(), tok)
    (pickled / "model.safetensors").unlink()
    torch.save(llama().state_dict(), pickled / "pytorch_model.bin")
    own = tmp_path / "own"
    own.mkdir()
    tok.save_pretrained(own)
    (own / "config.json").write_text('{"model_type": "weird", "auto_map": {"AutoConfig": "configuration_weird.C"}}')
    (own / "configuration_weird.py").write_text("raise SystemExit('it ran')")
    seeing = tmp_path / "seeing"
    seeing.mkdir()
    (seeing / "config.json").write_text('{"model_type": "llava"}')
    for folder, do in {
        pickled: "save it again with model.save_pretrained(folder)",
        own: "load it in Python with that code allowed",
        seeing: "AutoModelForImageTextToText",
    }.items():
        message = refuses(do, lambda: ModelPair(folder, base, tok))
        assert "give the loaded module in place of its name: ModelPair(module" in message and "\n" not in message


def test_options_of_the_command_line(models, files, tmp_path):
    how = ["extract", "--model-a", models[0], "--model-b", models[1], "--texts", f"{files}/toolrl.jsonl", "--layer", 1]
    more = ["--tokenizer", models[1], "--dtype", "bfloat16", "--batch-tokens", 256, "--template", "B"]
    done = cli(*how, *more, "--revision", "main", "--out", tmp_path / "r")
    assert done.returncode == 0 and "chats are written with the chat template of B" in done.said, done.said
    settings = json.loads((tmp_path / "r/activations/manifest.json").read_text())["settings"]
    assert (settings["pair"]["dtype"], settings["batch_tokens"]) == (["bfloat16"] * 2, 256)
    for wrong, part in {"--dtype": "dtype is 'x': expected", "--template": "template is 'x': expected"}.items():
        done = cli(*how, wrong, "x", "--out", tmp_path / "s")
        assert done.returncode == 2 and part in done.said and not (tmp_path / "s").exists(), done.said


# --- 8: chats, folders, packed files


CHATML = render_chat(CHAT)
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
WRITTEN = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"


@pytest.mark.parametrize(
    "row, text",
    [
        ({"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]}, CHATML),
        ({"conversation": CHAT}, CHATML),
        ({"messages": json.dumps(CHAT)}, CHATML),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "the "}, "cat"]}, CHAT[1]]}, CHATML),
        ({"instruction": "the cat", "output": "sat"}, CHATML),
        ({"instruction": "the cat", "input": "", "output": "sat"}, CHATML),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHATML),
        ({"system": "Be.", "messages": CHAT}, "<|im_start|>system\nBe.<|im_end|>\n" + CHATML),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": CALL}], "name": None}]},
            None,
        ),
        ({"messages": [{"role": "assistant", "function_call": CALL}]}, None),
    ],
)
def test_chats_in_their_shapes(row, text, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    read = [t.text for t in load_texts(str(tmp_path / "c.jsonl"))]
    assert read == [text or f"<|im_start|>assistant\n{WRITTEN}<|im_end|>\n"]


def test_tool_calls_reach_the_template():
    asks = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    calls = "{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}"
    knows = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    assert render_chat([CHAT[0], asks], tokenizer(template=knows)) == "the cat[weather]"
    assert WRITTEN in render_chat([CHAT[0], asks], tokenizer(template=WRITES_BOS))  # it would have left them out
    image = [{"role": "user", "content": [{"type": "image"}]}]
    refuses("turn 0, content, has a part of type 'image'; only text is read", lambda: render_chat(image))


def test_a_corpus_as_it_lies_on_disks(tmp_path):
    import datasets

    rows = [{"text": f"page {i}"} for i in range(3)]
    lines = ["\n".join(map(json.dumps, rows)), json.dumps(rows), json.dumps(rows, indent=2)]
    lines.append("\n".join(json.dumps(r, indent=1) for r in rows))
    read = lambda spec: [t.text for t in load_texts(str(spec))]
    whole = [r["text"] for r in rows]
    for i, content in enumerate(lines):
        for name, data in {
            "f.json": content.encode(),
            "f.jsonl.gz": gzip.compress(content.encode()),
            "f.json.zst": pa.compress(content.encode(), codec="zstd", asbytes=True),
        }.items():
            (tmp_path / f"{i}{name}").write_bytes(data)
            assert read(tmp_path / f"{i}{name}") == whole, (i, name)
    (tmp_path / "web" / "deep").mkdir(parents=True)
    for i in (2, 10):
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "web/deep" / f"part-{i:02}.parquet"))
    assert read(tmp_path / "web") == read(f"{tmp_path}/web/*/part-*.parquet") == whole * 2
    assert (
        load_texts(f"{tmp_path}/web/deep/*.parquet").name == "deep" and load_texts(str(tmp_path / "web")).name == "web"
    )
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == read(tmp_path / "saved/train") == whole
    cut = gzip.compress("\n".join(map(json.dumps, rows)).encode())[:-12]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    refuses("cannot be read to its end", lambda: read(tmp_path / "cut.jsonl.gz"))
    refuses(
        "the folder holds .json and .jsonl and .parquet files, expected one kind", lambda: load_texts(str(tmp_path))
    )


def test_json_is_read_in_pieces():
    rows = [{"text": 'é{["\\' * i, "n": [i, {}]} for i in range(9)]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\n".join(json.dumps(r, indent=3) for r in rows)):
        for size in (1, 7, 10**6):
            pieces = [text[i : i + size] for i in range(0, len(text), size)]
            assert list(_values(iter(pieces), "f")) == rows
    refuses("f: broken JSON (Expecting value, character 10)", lambda: list(_values(iter(['[{"a": 1},']), "f")))
    refuses("f: broken JSON", lambda: list(_values(iter(["[{}", ", {'a': 1}]" + " " * 99]), "f")))
    refuses("broken JSON", lambda: list(_values(iter(["[" * 100_000]), "f")))


def test_json_of_one_line_is_a_row(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    refuses("f.jsonl, line 2: broken JSON", lambda: list(json_rows(tmp_path / "f.jsonl", None)))


def test_two_configurations_of_one_data_set(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chats.jsonl").write_text('{"text": "a"}\n')
    hub = mix([hub_texts("me/data", "en"), hub_texts("me/data", "de"), hub_texts("me/data", split="test")])
    assert [s.name for s in hub.sources] == ["me/data:en", "me/data:de", "me/data::test"]
    files = mix([load_texts(f"{tmp_path}/{name}/chats.jsonl") for name in ("en", "de")])
    assert {t.source for t in files} == {"en/chats.jsonl", "de/chats.jsonl"}


# --- 9: streams


def test_a_stream_that_breaks(tmp_path, monkeypatch):
    "It is opened again and read on from there; what never comes back is refused, and what was extracted stays."
    import datasets
    import httpx

    texts = [f"{t} {i}" for i in range(4) for t in TEXTS]
    rows, opened = [{"text": t} for t in texts], []

    def load(*args, **kwargs):
        opened.append(1)
        for i, row in enumerate(rows):
            if i in breaks and len(opened) <= breaks[i]:
                raise httpx.ReadTimeout("the read operation timed out")
            yield row

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("time.sleep", lambda s: None)
    breaks = {5: 2, 8: 3}
    assert [t.text for t in hub_texts("owner/name")] == texts and len(opened) == 4
    opened.clear()
    breaks = {40: 99}
    pair = ModelPair(llama(), llama(1), tokenizer())
    how = {"layer": 1, "tokens": "all", "shard_rows": 20, "batch_tokens": 4, "progress": False}
    broke = "broke off after 40 rows (the read operation timed out). What was kept until then stays"
    refuses(broke, lambda: extract(pair, hub_texts("owner/name"), tmp_path / "s", **how))
    assert len(opened) == 3 and list((tmp_path / "s").glob("*.safetensors"))
    breaks = {}
    again = extract(pair, hub_texts("owner/name"), tmp_path / "s", **how)
    whole = extract(pair, hub_texts("owner/name"), tmp_path / "t", **how)
    assert all(x.equal(y) for x, y in zip(again.read(0, len(again)), whole.read(0, len(whole))))


def test_nothing_is_counted_before_it_is_read():
    read = []
    endless = TextSource("endless", lambda: (read.append(i) or f"text {i}" for i in range(10**12)))
    both = mix([endless, TextSource("few", ["a", "b"]), TextSource("stream", lambda: iter("xyz"))])
    first = [t for _, t in zip(range(300), both)]
    assert len(read) < 300 and Counter(t.source for t in first)["stream"] == 3
    assert [t.text for _, t in zip(range(2), mix([endless]))] == ["text 0", "text 1"]


def test_a_text_is_cut_where_it_is_used(tmp_path):
    "Of a book its beginning is tokenized; its tokens are those of the whole."
    tok = tokenizer("<bos> $A <eos>")
    book = " ".join(TEXTS * 40)
    given = []
    counting = copy.deepcopy(tok)
    real = type(tok).__call__
    kind = type("Counting", (type(tok),), {"__call__": lambda s, x, **k: (given.append(x), real(s, x, **k))[1]})
    counting.__class__ = kind
    (ids,), store = read_by(ModelPair(llama(), llama(1), counting), [book], tmp_path / "s", tokens="all", max_tokens=32)
    assert ids == tok(book)["input_ids"][:32]
    counts = store.manifest["counts"]
    assert counts["truncated texts"] == 1 and counts["characters beyond, not cut into tokens"] == len(book) - 64 * 32
    assert max(len(t) for x in given for t in (x if isinstance(x, list) else [x])) == 64 * 32
    spaces = " " * 5000 + TEXTS[0]  # a beginning that has no word in it is not enough
    (ids,), _ = read_by(ModelPair(llama(), llama(1), tok), [spaces + " the cat" * 9], tmp_path / "t", max_tokens=256)
    assert ids == tok(spaces + " the cat" * 9)["input_ids"][:256]


def test_contexts_are_known_before(tmp_path):
    a, b = llama(max_position_embeddings=64), llama(1)
    texts = [*TEXTS * 5, "cat " * 400]
    store = extract(ModelPair(a, b, tokenizer()), texts, tmp_path / "s", layer=1, shard_rows=64, progress=False)
    assert store.manifest["settings"]["max_tokens"] == 64 and store.rows.position.max() == 63
    assert store.manifest["counts"]["truncated texts"] >= 1


# --- files that are something else


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("broken.jsonl", b'{"text": "one"}\n\n{"text": "two\n', "broken.jsonl, line 3: broken JSON"),
        ("body.jsonl", b'{"body": "one", "id": 1}\n', "body.jsonl, line 1: columns found: body, id; expected 'text'"),
        (
            "number.jsonl",
            b'{"text": "one"}\n{"text": 17}\n',
            "line 2: column 'text' holds int ('17'), expected a string.",
        ),
        ("bare.jsonl", b'"one"\n', "bare.jsonl, line 1: holds str, expected an object"),
        ("half.jsonl", b'{"text": "\\ud83d"}\n', "line 1: column 'text' holds half of a surrogate pair"),
        ("latin.txt", "café".encode("latin-1"), "latin.txt: not a UTF-8 text file"),
        ("empty.jsonl", b"", "empty.jsonl: there is no text in it (0 empty rows)."),
        ("blank.jsonl", b'{"text": ""}\n{"text": null}\n', "blank.jsonl: there is no text in it (2 empty rows)."),
        ("fake.parquet", b"PAR1 is how it begins", "fake.parquet: not a parquet file that can be read"),
        ("table.csv", b"text\none\n", "table.csv: cannot read .csv; expected .jsonl, .json, .parquet, .txt, packed"),
        ("fake.txt.gz", b"no gzip", "fake.txt.gz: cannot be read to its end"),
        ("fake.jsonl.zst", b"no zstd", "fake.jsonl.zst: cannot be read to its end"),
    ],
)
def test_files_that_are_something_else(name, content, part, tmp_path):
    (tmp_path / name).write_bytes(content)
    refuses(part, lambda: list(file_texts(tmp_path / name)))
    refuses("nowhere.jsonl: there is no such file.", lambda: file_texts(tmp_path / "nowhere.jsonl"))
