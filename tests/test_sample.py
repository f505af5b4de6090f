import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import train
from conftest import ROOT, documents, metrics, one_line, prepare, python, settings
from loader import UserError, read_meta
from model import Config, LLaMA
from sample import Tokenizer, export, generate, load_pretrained, load_run
from sample import main as sample

SAMPLE = ROOT / "sample.py"


@pytest.fixture(scope="module")
def run(stream, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train.train(train.parse(settings(data=stream, out=out, steps=40, eval_every=40, lr=300)))
    return out


@pytest.fixture(scope="module")
def hf(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "hf"
    done = python(SAMPLE, f"--ckpt={run}", f"--export={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_text_from_a_run(run, call):
    def say(*more):
        done = call(sample, f"--ckpt={run}", "--prompt=tea 🙂", "--tokens=12", *more)
        assert done.returncode == 0, done.stderr
        return done.stdout
    first = say()
    assert first.startswith("tea 🙂") and len(first) > len("tea 🙂\n") and first == say("--seed=0") != say("--seed=1")


def test_draws_follow_the_model(run):
    model, data, meta = load_run(run)
    ids = Tokenizer(data, meta).encode("tea")
    p = (model(torch.tensor([ids]))[0, -1] / 0.5).softmax(0)
    top = p.topk(3)
    torch.manual_seed(0)
    seen = [next(generate(model, ids, 1, 32, 0.5, 3)) for _ in range(300)]
    for i, q in zip(top.indices.tolist(), (top.values / top.values.sum()).tolist()):
        assert seen.count(i) / 300 == pytest.approx(q, abs=0.1)
    assert set(seen) <= set(top.indices.tolist())
    assert list(generate(model, ids, 5, 32, 0)) == list(generate(model, ids, 5, 32, 1, 1))
    greedy = list(generate(model, ids * 40, 9, 32, 0))  # the prompt is longer than the window
    assert len(greedy) == 9
    assert list(generate(model, ids * 40, 9, 32, 0, stop=greedy[2])) == greedy[:greedy.index(greedy[2]) + 1]


def test_the_way_to_hugging_face_and_back(run, hf, stream, tmp_path):
    model = load_run(run)[0]
    back = LLaMA(model.config)
    back.load_state_dict(load_pretrained(hf, model.config))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values()))
    train.train(train.parse(settings(data=stream, out=tmp_path / "on", init_from=hf)))
    last = [x for x in metrics(run) if "val_tokens" in x][-1]
    assert metrics(tmp_path / "on")[0]["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    again = shutil.copytree(hf, tmp_path / "again")  # not the path but the weights identify the run
    words = dict(data=stream, out=tmp_path / "on", init_from=again)
    train.train(train.parse(settings(**words)))
    weights = load_file(again / "model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, again / "model.safetensors")
    with pytest.raises(UserError, match="init_from_sha256"):
        train.train(train.parse(settings(**words)))
    scaled = LLaMA(Config.named("nano", 500, embedding="scale"))
    export(scaled, tmp_path / "scaled", 32, Tokenizer(stream, read_meta(stream)))
    again = load_pretrained(tmp_path / "scaled", scaled.config)
    assert all(torch.allclose(again[k], v) for k, v in scaled.state_dict().items())


@pytest.mark.parametrize("embedding", [None, "scale", "detach"])
def test_transformers_gives_the_same_logits(embedding, stream, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    model = LLaMA(Config.named("nano", 500, embedding=embedding, init="small"))
    meta = read_meta(stream)
    export(model, tmp_path, 32, Tokenizer(stream, meta))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(500, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(stream / "tokenizer.model"))
    for text in [t.replace("</s>", "").replace("<unk>", "") for t in documents(50)] + ["\n\n  a\tb \n", "", "日本 x"]:
        assert tokenizer(text)["input_ids"] == ours.encode(text) and tokenizer.decode(ours.encode(text)) == text
    theirs.save_pretrained(tmp_path / "again")  # what transformers writes comes back too
    again = load_pretrained(tmp_path / "again", Config.named("nano", 500))
    assert torch.equal(again["lm_head.weight"], model.lm_head.weight)


def test_the_readmes_loop_with_transformers(hf, monkeypatch):
    pytest.importorskip("transformers", reason="pip install transformers")
    code = re.search(r"```python\n(from transformers.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(hf.parent)
    batch = torch.randint(500, (4, 32))
    names = {"batches": [batch] * 30}
    exec(code, names)
    loss = names["model"](input_ids=batch, labels=batch).loss.item()
    assert loss < load_loss(hf, batch) - 0.5


def load_loss(hf, batch):
    model = LLaMA(Config.named("nano", 500))
    model.load_state_dict(load_pretrained(hf, model.config))
    return model(batch[:, :-1], batch[:, 1:]).item() / batch[:, 1:].numel()


def test_what_is_refused(run, hf, stream, tmp_path, call):
    one_line(call(sample, f"--ckpt={tmp_path}"), tmp_path, "config.json")
    model = LLaMA(Config.named("nano", 500, embedding="norm"))
    with pytest.raises(UserError, match="--embedding=norm"):
        export(model, tmp_path / "none", 32, None)
    assert not (tmp_path / "none").exists()
    words = settings(data=stream, out=tmp_path / "run", init_from=tmp_path)
    one_line(call(lambda: train.main(words)), tmp_path, "--init_from")
    bad = shutil.copytree(hf, tmp_path / "bad")
    good = (bad / "model.safetensors").read_bytes()
    config = Config.named("nano", 500)
    for broken in (good[:-1], good[:50], b"", b"\xff" * 99, good[:8] + b"[" + good[9:]):
        (bad / "model.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match="export it again"):
            load_pretrained(bad, config)
    save_file({name: w * math.nan for name, w in load_file(hf / "model.safetensors").items()}, bad / "model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load_pretrained(bad, config)
    with pytest.raises(UserError, match=r"lm_head.weight \[500, 128\] \(here \[600, 128\]\)"):
        load_pretrained(hf, Config.named("nano", 600))
    other = json.loads((bad / "config.json").read_text()) | {"rope_theta": 500000.0}
    (bad / "config.json").write_text(json.dumps(other))
    (bad / "model.safetensors").write_bytes(good)
    with pytest.raises(UserError, match="rope_theta 500000.0"):
        load_pretrained(bad, config)
    assert not (tmp_path / "run").exists()


def test_the_ends_of_the_settings(run, call):
    model = load_run(run)[0]
    assert list(generate(model, [5], 40, 32, 1e-320)) == list(generate(model, [5], 40, 32, 0))  # longer than the window of 32
    assert "start at 0" in call(sample, f"--ckpt={run}", "--temperature=nan").stderr.splitlines()[-1]


# what transformers 5.24 and 4.57 write beside the sizes, and what older files have
COMMON = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [1, 2],
          "head_dim": 32, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 2048, "mlp_bias": False,
          "model_type": "llama", "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "use_cache": True}
WRITTEN = {
    "5": COMMON | {"dtype": "float32", "pad_token_id": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
                   "tie_word_embeddings": False, "transformers_version": "5.24.0"},
    "4": COMMON | {"torch_dtype": "bfloat16", "rope_scaling": None, "rope_theta": 10000, "transformers_version": "4.57.6"},
    "old": {"_name_or_path": "/x", "architectures": ["LLaMAForCausalLM"], "model_type": "llama"}}
SIZES = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture
def theirs(hf, tmp_path):
    """Changes keys of config.json in a copy of an export; None takes a key away."""
    folder = shutil.copytree(hf, tmp_path / "theirs")

    def change(**keys):
        config = {k: v for k, v in {**json.loads((hf / "config.json").read_text()), **keys}.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder
    change.folder = folder
    return change


@pytest.mark.parametrize("version", WRITTEN)
def test_what_transformers_writes_is_accepted(version, theirs):
    (theirs.folder / "config.json").write_text(json.dumps(WRITTEN[version] | SIZES))
    load_pretrained(theirs.folder, Config.named("nano", 500))


@pytest.mark.parametrize("keys", [
    {"rope_parameters": {"rope_type": "linear", "factor": 4}}, {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}, {"partial_rotary_factor": 0.5},
    {"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 64},
    {"num_key_value_heads": 2}, {"num_attention_heads": 8}, {"sliding_window": 16}, {"quantization_config": {"bits": 4}},
    {"auto_map": {"AutoModel": "x.Y"}}, {"model_type": "mistral"}, {"pretraining_tp": 2}, {"attention_dropout": 0.1},
    {"logit_scale": 2.0}, {"residual\nscale": 2.0}, {"num_attention_heads": None}, {"model_type": None}], ids=str)
def test_another_architecture_is_refused_by_its_key(keys, theirs):
    with pytest.raises(UserError, match=" ".join(next(iter(keys)).split())) as e:
        load_pretrained(theirs(**keys), Config.named("nano", 500))
    assert "\n" not in str(e.value)


def test_shards_tied_embeddings_and_other_precisions(theirs, tmp_path):
    config = Config.named("nano", 500)
    weights, folder = load_file(theirs.folder / "model.safetensors"), theirs.folder
    names = sorted(weights)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1::2] for i in (1, 2)}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / shard)
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"of an older model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: s for s, part in shards.items() for n in part}}))
    (folder / "model.safetensors").unlink()
    again = load_pretrained(folder, config)
    assert all(torch.equal(again[name], w) for name, w in weights.items())
    (folder / shard).unlink()
    with pytest.raises(UserError, match=shard):
        load_pretrained(folder, config)
    half = {name: w.bfloat16() for name, w in weights.items() if name != "lm_head.weight"}
    save_file(half, folder / "model.safetensors")
    again = load_pretrained(theirs(tie_word_embeddings=True), Config.named("nano", 500, embedding="scale"))
    assert all(w.dtype == torch.float32 for w in again.values())
    assert torch.equal(again["lm_head.weight"], half["model.embed_tokens.weight"].float())
    assert torch.allclose(again["model.embed_tokens.weight"] * 128**0.5, again["lm_head.weight"])
    save_file({name: (w * 100).to(torch.int8) for name, w in weights.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="torch.int8"):
        load_pretrained(theirs(), config)


def test_an_export_leaves_nothing_to_guess(run, hf):
    config, tokenizer = (json.loads((hf / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}.items() <= config.items()
    assert {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "add_prefix_space": False,
            "add_bos_token": False, "add_eos_token": False, "padding_side": "left", "model_max_length": 32}.items() <= tokenizer.items()
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    batch = tokenizer(["tea", "a longer text\n"], padding=True, return_tensors="pt")
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)
    alone = model.generate(**tokenizer("tea", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert torch.equal(together[0, -4:], alone[0, -4:])
    assert model.generate(max_new_tokens=4, do_sample=False)[0, 0] == 1  # a new document, as sample.py begins one
    ours = Tokenizer(*load_run(run)[1:])
    ids = ours.encode("tea")
    text = transformers.pipeline("text-generation", model=str(hf))("tea", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text == ours.decode(ids + list(generate(load_run(run)[0], ids, 4, 32, 0)))


@pytest.fixture(scope="module")
def odd(text, tmp_path_factory):
    """A data directory and a run whose padding is no piece of the tokenizer, which has a bos and a piece of its user."""
    folder, model = tmp_path_factory.mktemp("odd"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t for text in documents(200) for t in text.split("\n")]), model_writer=model, model_type="bpe", vocab_size=450,
        user_defined_symbols=["<sep>", "\n"], byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
    (folder / "a.model").write_bytes(model.getvalue())
    done = prepare("files", text, f"--out={folder / 'data'}", f"--tokenizer={folder / 'a.model'}", "--layout=rows", "--seq_len=32")
    assert done.returncode == 0, done.stderr
    train.train(train.parse(settings(data=folder / "data", out=folder / "run", steps=1, eval_every=1)))
    return folder


def test_ids_without_a_piece_are_not_drawn(odd, tmp_path, call):
    run = shutil.copytree(odd / "run", tmp_path / "run")
    model, data, meta = load_run(run)
    tokenizer = Tokenizer(data, meta)
    assert meta["vocab_size"] == 451 and meta["pad_id"] == 450 == tokenizer.size
    ids = tokenizer.encode("tea")
    expected = list(generate(model, ids, 5, 32, 0, stop=tokenizer.eos_id))
    state = torch.load(run / "ckpt.pt", weights_only=True)  # make the padding the most probable
    state["model"]["lm_head.weight"][450] = 10 * state["model"]["lm_head.weight"][expected[0]]
    torch.save(state, run / "ckpt.pt")
    assert next(generate(load_run(run)[0], ids, 1, 32, 0)) == 450
    done = call(sample, f"--ckpt={run}", "--prompt=tea", "--tokens=5", "--temperature=0")
    assert done.returncode == 0 and done.stdout == tokenizer.decode(ids + expected) + "\n", done.stderr


def test_transformers_reads_ids_without_a_piece(odd, tmp_path):
    model, data, meta = load_run(odd / "run")
    export(model, tmp_path / "hf", 32, Tokenizer(data, meta))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["pad_token_id"] == 450
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = sentencepiece.SentencePieceProcessor(model_file=str(odd / "data" / "tokenizer.model"))
    assert tokenizer.pad_token_id == 450 and tokenizer.decode([450]) == "<pad>" and tokenizer.decode([450], skip_special_tokens=True) == ""
    for words in ("a <sep> b\n c", "  naïve 🙂"):
        assert tokenizer(words)["input_ids"] == ours.encode(words) and tokenizer.decode(ours.encode(words)) == words


def test_a_foreign_tokenizer_is_not_left_to_guessing(text, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(documents(200)), model_writer=model, vocab_size=300, minloglevel=2)
    (tmp_path / "a.model").write_bytes(model.getvalue())
    assert prepare("files", text, f"--out={tmp_path / 'data'}", f"--tokenizer={tmp_path / 'a.model'}").returncode == 0
    export(LLaMA(Config.named("micro", 300)), tmp_path / "hf", 32, Tokenizer(tmp_path / "data", read_meta(tmp_path / "data")))
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors", "sentencepiece.model"}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_an_export_replaces_nothing(run, hf, odd, tmp_path, call):
    model, data, meta = load_run(odd / "run")
    tokenizer = Tokenizer(data, meta)
    for full in (run, hf):
        before = contents(full)
        one_line(call(sample, f"--ckpt={run}", f"--export={full}"), f"--export={full}", "not empty", "choose another")
        assert contents(full) == before
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty", 32, tokenizer)
    assert contents(tmp_path / "empty").keys() == contents(hf).keys()


@pytest.mark.parametrize("words", [["--temperature=0"], ["--export=hf"]])
def test_the_weights_of_a_run_that_diverged_are_refused(run, tmp_path, monkeypatch, call, words):
    monkeypatch.chdir(tmp_path)
    mine = shutil.copytree(run, tmp_path / "run")
    state = torch.load(mine / "ckpt.pt", weights_only=True)
    state["model"]["lm_head.weight"][3, 5] = float("nan")
    torch.save(state, mine / "ckpt.pt")
    one_line(call(sample, f"--ckpt={mine}", *words), mine, "diverged")
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_leaves_nothing_half_written(odd, tmp_path):
    full = python(SAMPLE, f"--ckpt={odd / 'run'}", f"--export={tmp_path / 'hf'}",
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)))
    one_line(full, f"--export={tmp_path / 'hf'}", "make room")
    assert not list(tmp_path.iterdir())


def test_data_that_was_moved(run, stream, odd, text, tmp_path, capsys, call):
    mine = shutil.copytree(run, tmp_path / "run")
    config = json.loads((mine / "config.json").read_text())
    config["settings"]["data"] = str(tmp_path / "gone")
    (mine / "config.json").write_text(json.dumps(config))
    one_line(call(sample, f"--ckpt={mine}"), tmp_path / "gone", "--data")
    (tmp_path / "moved").mkdir()  # the tokenizer is enough
    for name in ("meta.json", "tokenizer.model"):
        shutil.copy(stream / name, tmp_path / "moved")
    found = call(sample, f"--ckpt={mine}", f"--data={tmp_path / 'moved'}", "--tokens=3")
    assert found.returncode == 0 and found.stdout and not found.stderr
    with pytest.raises(UserError, match="give that by --data"):  # another vocabulary
        load_run(mine, odd / "data")
    prepare("files", text, f"--out={tmp_path / 'same'}", f"--tokenizer={stream / 'tokenizer.model'}", "--seq_len=16")
    load_run(mine, tmp_path / "same")
    assert "unless the tokenizer is the same" in capsys.readouterr().err
    shutil.copy(odd / "data" / "tokenizer.model", tmp_path / "moved")
    with pytest.raises(UserError, match="not the one of meta.json"):
        Tokenizer(tmp_path / "moved", read_meta(stream))
    with pytest.raises(UserError, match="eos_id|not in range"):
        Tokenizer(stream, {**read_meta(stream), "eos_id": -1})


def test_the_export_of_a_gpt2_run_needs_no_network(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        header = np.array([20240520, 1, 500] + 253 * [0], dtype="<i4")
        (tmp_path / "data" / f"x_{split}_000000.bin").write_bytes(header.tobytes() + np.arange(500, dtype="<u2").tobytes())
    train.train(train.parse(settings(data=tmp_path / "data", out=tmp_path / "run", model="micro", batch_size=1, steps=1)))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    done = python(SAMPLE, f"--ckpt={tmp_path / 'run'}", f"--export={tmp_path / 'hf'}")
    assert done.returncode == 0 and "gpt2" in done.stdout, done.stderr
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 50256
    with pytest.raises(UserError, match="first use"):
        Tokenizer(tmp_path / "data", read_meta(tmp_path / "data"))


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}])
def test_a_terminal_that_is_not_utf8(locale, run):
    done = subprocess.run([sys.executable, SAMPLE, f"--ckpt={run}", "--prompt=🙂 ".encode() + b"\xff", "--tokens=0"],
                          capture_output=True, env={**os.environ, **locale}, timeout=120)
    assert done.returncode == 0 and done.stdout == b"\\U0001f642 \\ufffd\n", done.stderr


def test_a_good_checkpoint_is_not_blamed_for_the_machine(run, tmp_path):
    mine = shutil.copytree(run, tmp_path / "run")
    (mine / "ckpt.pt").unlink()
    (mine / "ckpt.pt").symlink_to("ckpt.pt")  # nobody may read this, not even root
    with pytest.raises(UserError, match="Too many levels.*check that it is there and allowed"):
        load_run(mine)
    (mine / "ckpt.pt").unlink()
    good = (run / "ckpt.pt").read_bytes()
    for torn in (good[:5000], good[:2000000] + bytes([good[2000000] ^ 1]) + good[2000001:], b""):
        (mine / "ckpt.pt").write_bytes(torn)
        with pytest.raises(UserError, match="give the folder of a run"):
            load_run(mine)
    with pytest.raises(UserError, match="config.json"):
        load_run(run / "ckpt.pt")
    code = """if True:
        import resource, sample
        size = resource.getpagesize() * int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, -1))
        sample.main()"""
    one_line(python("-c", code, f"--ckpt={run}", cwd=ROOT), run, "Cannot allocate memory", "make room")
