import json
import re
import shutil

import pytest
import sentencepiece
import torch

import train
from conftest import ROOT, documents, metrics, one_line, python, settings
from loader import UserError, read_meta
from model import Config, LLaMA
from sample import Tokenizer, export, generate, load_pretrained, load_run

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


def test_text_from_a_run(run, stream):
    def say(*more):
        done = python(SAMPLE, f"--ckpt={run}", "--prompt=tea 🙂", "--tokens=12", *more)
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


def test_what_is_refused(run, hf, stream, tmp_path):
    one_line(python(SAMPLE, f"--ckpt={tmp_path}"), tmp_path, "config.json")
    model = LLaMA(Config.named("nano", 500, embedding="norm"))
    with pytest.raises(UserError, match="--embedding=norm"):
        export(model, tmp_path / "none", 32, None)
    assert not (tmp_path / "none").exists()
    one_line(python(ROOT / "train.py", *settings(data=stream, out=tmp_path / "run", init_from=tmp_path)), tmp_path, "--init_from")
    bad = shutil.copytree(hf, tmp_path / "bad")
    good = (bad / "model.safetensors").read_bytes()
    config = Config.named("nano", 500)
    for broken in (good[:-1], good[:50], b"", b"\xff" * 99, good[:8] + b"[" + good[9:]):
        (bad / "model.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match="export it again"):
            load_pretrained(bad, config)
    with pytest.raises(UserError, match=r"lm_head.weight \[500, 128\] \(here \[600, 128\]\)"):
        load_pretrained(hf, Config.named("nano", 600))
    other = json.loads((bad / "config.json").read_text()) | {"rope_theta": 500000.0}
    (bad / "config.json").write_text(json.dumps(other))
    (bad / "model.safetensors").write_bytes(good)
    with pytest.raises(UserError, match="rope_theta 500000.0"):
        load_pretrained(bad, config)
    assert not (tmp_path / "run").exists()
