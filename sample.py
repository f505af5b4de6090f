"""Text from a trained model; its weights in Hugging Face's LLaMA format, and back.

    python sample.py --ckpt=runs/clipped --prompt="import os" --tokens=200
    python sample.py --ckpt=runs/clipped --export=hf     # LlamaForCausalLM.from_pretrained("hf")
    python train.py --init_from=hf --data=... --out=...  # calls load_pretrained below

--ckpt is the folder of a run. The tokenizer is the one in its data directory.
"""
import argparse
import hashlib
import json
import math
import sys
import tempfile
import zipfile
from pathlib import Path

import sentencepiece
import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loader import UserError, fingerprint, read_meta
from model import Config, LLaMA


def unusable(what, e, remedy):
    """The UserError for a file: `remedy`, unless memory, disk or permissions are the problem."""
    if isinstance(e, MemoryError) or getattr(e, "errno", 0) or "Cannot allocate memory" in str(e):
        remedy = "check that it is there and allowed, make room, and start again"
    return UserError(f"{what}: {type(e).__name__}: {' '.join(str(e).split()):.300}: {remedy}")


def load_run(folder, data=None):
    """A run's model, on the CPU, its data's path (or `data`) and meta.json. Raises UserError."""
    try:
        run = json.loads((Path(folder) / "config.json").read_bytes())
        settings, trained_on = run["settings"], run["identity"].get("data_sha256")
        path, data = Path(folder) / "ckpt.pt", Path(data or settings["data"])
        if zipfile.ZipFile(path).testzip():  # torch.load does not verify checksums
            raise ValueError("wrong checksum")
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
        vocab_size = len(weights["lm_head.weight"])
        config = Config.named(settings["model"], vocab_size, embedding=settings.get("embedding"))
        with torch.device("meta"):
            model = LLaMA(config)
        model.load_state_dict(weights, assign=True)
    except Exception as e:  # a torn or foreign file fails in many ways
        raise unusable(f"--ckpt={folder}", e, "give the folder of a run of train.py, with "
                       "config.json and ckpt.pt") from None
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{folder} diverged, its weights are not finite: choose another --ckpt")
    if not data.exists():
        raise UserError(f"the data of {folder}, {data}, is not there: pass its place with --data")
    meta = read_meta(data)
    if fingerprint(data) != trained_on:
        other = f"{data} is not the data that {folder} was trained on: give that by --data"
        if meta["vocab_size"] != vocab_size:
            raise UserError(other)
        print(f"sample.py: {other}, unless the tokenizer is the same", file=sys.stderr)
    return model.eval(), data, meta


class Tokenizer:
    """encode(text) -> ids and decode(ids) -> text of a data directory. Raises UserError. Without
    `download`, tiktoken's, which may come from the network, have a name only."""

    def __init__(self, data, meta, download=True):
        self.name, ids = str(meta.get("tokenizer")), range(meta["vocab_size"])
        self.pad_id = meta["pad_id"] if meta["pad_id"] in ids else None
        self.sp = None  # the SentencePiece model, unless the tokenizer is tiktoken's
        try:
            self.eos_id = ids.index(meta["eos_id"])
            if self.name.endswith(".model"):
                self.content = (data / self.name).read_bytes()
                self.sp = sp = sentencepiece.SentencePieceProcessor(model_proto=self.content)
                self.encode, self.decode, self.size = sp.encode, sp.decode, sp.vocab_size()
                if hashlib.sha256(self.content).hexdigest() != meta["tokenizer_sha256"]:
                    raise ValueError("it is not the one of meta.json")
            elif download:
                bpe = tiktoken.get_encoding(self.name)
                self.encode, self.decode, self.size = bpe.encode_ordinary, bpe.decode, bpe.n_vocab
        except Exception as e:  # tiktoken's download fails in many ways
            raise unusable(f"the tokenizer {self.name} of {data}", e, "a .model file belongs in "
                           "the data directory, tiktoken's are downloaded at first use") from None


@torch.no_grad()
def generate(model, ids, count, seq_len, temperature=1.0, top_k=None, stop=None, size=None):
    """Yields up to `count` ids below `size` after the list `ids`, drawn from softmax(logits /
    temperature) over the top_k most probable (the most probable one at temperature 0). Ends after
    the id `stop`. The model sees the last seq_len ids."""
    ids = list(ids)
    for _ in range(count):
        x = torch.tensor([ids[-seq_len:]], device=model.lm_head.weight.device)
        logits = model.lm_head(model.model(x)[0, -1])[:size].double()
        if top_k is not None and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = -math.inf
        if temperature == 0:
            next_id = logits.argmax()
        else:
            next_id = torch.multinomial(((logits - logits.max()) / temperature).softmax(0), 1)
        ids.append(int(next_id))
        yield ids[-1]
        if ids[-1] == stop:
            return


# ---- Hugging Face's LLaMA format -----------------------------------------------------------------

# keys of config.json that say nothing of what the model computes
BOOKKEEPING = ("_name_or_path architectures bos_token_id dtype eos_token_id initializer_range "
               "max_position_embeddings pad_token_id torch_dtype transformers_version "
               "use_cache").split()


def architecture(c):
    """The keys of config.json that say what the model computes."""
    return {"model_type": "llama", "vocab_size": c.vocab_size, "hidden_size": c.hidden,
            "intermediate_size": c.ffn, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "num_key_value_heads": c.heads,
            "head_dim": c.hidden // c.heads, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
            "attention_dropout": 0.0, "pretraining_tp": 1}


def export(model, folder, seq_len, tokenizer):
    """Writes a folder with config.json, model.safetensors (fp32) and the tokenizer, whole or not at
    all. Raises UserError if LLaMA has no such model, or the folder is not empty."""
    c = model.config
    if c.embedding == "norm":
        raise UserError("--export: LLaMA has no norm after the embedding (--embedding=norm)")
    weights = {k: v.detach().float().contiguous() for k, v in model.state_dict().items()}
    if c.embedding == "scale":
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * c.hidden**0.5
    files = tokenizer_files(tokenizer, c.vocab_size, seq_len)
    files["config.json"] = json.dumps({
        "architectures": ["LlamaForCausalLM"], **architecture(c), "tie_word_embeddings": False,
        "max_position_embeddings": seq_len, "initializer_range": 0.02, "torch_dtype": "float32",
        "bos_token_id": tokenizer.eos_id,  # a document follows an eos in training
        "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}, indent=1).encode()
    try:
        folder = folder.resolve()
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--export={folder} is not empty: choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            save_file(weights, new / "model.safetensors", {"format": "pt"})
            for name, content in files.items():
                (new / name).write_bytes(content)
            new.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as e:  # a loop of links is a RuntimeError
        raise unusable(f"--export={folder}", e, "make room, or choose another folder") from None


def tokenizer_files(tokenizer, vocab_size, seq_len):
    """The files of a SentencePiece model, by name: among them, if data/prepare.py trained it, a
    tokenizer.json that gives its ids: BPE whose scores are ranks, with byte fallback and no space
    put before the text."""
    sp, eos, pad = tokenizer.sp, tokenizer.eos_id, tokenizer.pad_id
    if sp is None:
        print(f"the tokenizer is not copied: it is tiktoken's {tokenizer.name}")
        return {}
    size = sp.vocab_size()
    pieces = [sp.id_to_piece(i) for i in range(size)]
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    ranked = {pieces[i]: i for i in range(size) if i not in special and not sp.is_byte(i)}
    scores = {piece: sp.get_score(i) for piece, i in ranked.items()}
    if sp.normalize("Ａ  ½ ") != "Ａ▁▁½▁" or any(x != int(x) for x in scores.values()):
        print("the tokenizer is copied as sentencepiece.model, for SentencePiece only: "
              "transformers would guess how to read it, as data/prepare.py did not train it")
        return {"sentencepiece.model": tokenizer.content}
    # every way to make a piece of two others, the best pieces first
    merges = sorted((-scores[piece], piece[:k], piece[k:]) for piece in ranked
                    for k in range(1, len(piece)) if piece[:k] in ranked and piece[k:] in ranked)
    # pieces that the user defined, such as a newline, have the score 0 of the first that was learnt
    defined = [piece for piece in ranked if scores[piece] == 0][:-1]
    for i in range(size, vocab_size):  # ids of the model without a piece
        pieces.append("<pad>" if i == pad else f"<unused_{i}>")
        special.append(i)
    added = [{"id": i, "content": piece, "special": i in special, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False}
             for i, piece in enumerate(pieces) if i in special or piece in defined]
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    model = {"type": "BPE", "unk_token": pieces[sp.unk_id()], "fuse_unk": True,
             "byte_fallback": True, "dropout": None, "merges": [merge[1:] for merge in merges],
             "vocab": {piece: i for i, piece in enumerate(pieces)}}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    fast = {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
            "post_processor": None, "added_tokens": added, "normalizer": from_space,
            "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "add_prefix_space": False, "add_bos_token": False, "add_eos_token": False,
              "model_input_names": ["input_ids", "attention_mask"], "padding_side": "left",
              "model_max_length": seq_len, "bos_token": pieces[eos], "eos_token": pieces[eos],
              "pad_token": pieces[eos if pad is None else pad], "unk_token": pieces[sp.unk_id()]}
    return {"tokenizer.model": tokenizer.content, "tokenizer.json": json.dumps(fast).encode(),
            "tokenizer_config.json": json.dumps(config, indent=1).encode()}


def load_pretrained(folder, config):
    """The weights of a folder in Hugging Face's LLaMA format, as LLaMA(config).load_state_dict
    takes them, in fp32. Raises UserError if they are not such a model's."""
    folder, weights, embedding = Path(folder), {}, "model.embed_tokens.weight"
    try:
        theirs = json.loads((folder / "config.json").read_bytes())
        names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
        if index.exists() and not (folder / names[0]).exists():  # in several files
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        for name in names:
            weights |= load_file(folder / name)
        weights = {k: w for k, w in weights.items() if not k.endswith("rotary_emb.inv_freq")}
        if theirs.pop("tie_word_embeddings", None):
            weights.setdefault("lm_head.weight", weights[embedding])
        theirs = {k: v for k, v in theirs.items() if v is not None and k not in BOOKKEEPING}
    except Exception as e:  # a torn or foreign file fails in many ways
        raise unusable(f"--init_from={folder}", e, "give a folder in Hugging Face's LLaMA format, "
                       "with config.json and model.safetensors, or export it again") from None

    # the same function and tensors; an absent key has Hugging Face's default, mostly ours as well
    keys = architecture(config)
    keys["rope_parameters"] = {"rope_type": "default", "rope_theta": keys["rope_theta"]}
    found = {**keys, "model_type": "missing", "num_attention_heads": 32, **theirs}
    found |= {k: list(w.shape) if w.is_floating_point() else w.dtype for k, w in weights.items()}
    with torch.device("meta"):
        expected = keys | {k: list(w.shape) for k, w in LLaMA(config).state_dict().items()}
    differ = [f"{name} {found.get(name, 'missing')} (here {expected.get(name, 'none')})"
              for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if differ:
        raise UserError(f"--init_from={folder} differs from what --model and the data's "
                        f"vocabulary make: {' '.join(', '.join(differ[:3]).split()):.400}")
    weights = {name: w.float() for name, w in weights.items()}
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"--init_from={folder} has weights that are not finite: choose another")
    if config.embedding == "scale":  # as export() multiplied
        weights[embedding] = weights[embedding] / config.hidden**0.5
    return weights


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="folder of a run")
    parser.add_argument("--data", help="its data directory, if that has moved")
    parser.add_argument("--export", type=Path, help="write Hugging Face's format to this folder")
    parser.add_argument("--prompt", default="", help="text to continue; none: a new document")
    parser.add_argument("--tokens", type=int, default=200, help="how many at most [200]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: most probable [0.8]")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the most probable [50]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    args = parser.parse_args()
    if not 0 <= args.temperature < math.inf or args.top_k < 1 or min(args.tokens, args.seed) < 0:
        parser.error("--temperature, --tokens and --seed start at 0, --top_k at 1")
    # what the locale cannot read of the prompt is UTF-8; what it cannot print is escaped
    prompt = args.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        model, data, meta = load_run(args.ckpt, args.data)
        tokenizer = Tokenizer(data, meta, download=not args.export)
        if args.export:
            export(model, args.export, meta["seq_len"], tokenizer)
            print(f"{args.export}: {model.config.parameters:,} parameters")
            return
        torch.manual_seed(args.seed % 2**63)
        ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
        ids += generate(model, ids, args.tokens, meta["seq_len"], args.temperature, args.top_k,
                        tokenizer.eos_id, tokenizer.size)
        print(tokenizer.decode([i for i in ids if i != tokenizer.eos_id]))
    except UserError as e:
        sys.exit(f"sample.py: {e}")
    except (OSError, MemoryError) as e:
        sys.exit(f"sample.py: {unusable('stopped', e, '')}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
