"""Text from a trained model, and its weights in Hugging Face's LLaMA format.

    python sample.py --ckpt=runs/clipped --prompt="import os" --tokens=200 --temperature=0.8 --top_k=50
    python sample.py --ckpt=runs/clipped --export=hf        # for transformers: LlamaForCausalLM.from_pretrained("hf")
    python train.py --init_from=hf --data=... --out=...     # and back: `pretrained` below

--ckpt is a run's folder; the tokenizer is the one in its data directory.
"""
import argparse
import json
import math
import shutil
import struct
import sys
from pathlib import Path

import sentencepiece
import tiktoken
import torch

from loader import DataError, read_meta
from model import Config, LLaMA
from run import UserError

# as safetensors names them
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(run):
    """The model of a run's folder, on the CPU, and the meta.json of its data and their directory. Raises UserError."""
    try:
        settings = json.loads((Path(run) / "config.json").read_text())["settings"]
        weights = torch.load(Path(run) / "ckpt.pt", map_location="cpu", weights_only=True, mmap=True)["model"]
        vocab = len(weights["lm_head.weight"])
        model = LLaMA(Config.named(settings["model"], vocab, embedding=settings.get("embedding")))
        model.load_state_dict(weights)
    except Exception as e:  # a torn or foreign file fails in many ways, all with this remedy
        raise UserError(f"--ckpt={run} is not the folder of a run of train.py with a checkpoint ({type(e).__name__}): "
                        f"give one that has config.json and ckpt.pt") from None
    return model.eval(), read_meta(settings["data"]), Path(settings["data"])


class Tokenizer:
    """encode(text) -> ids and decode(ids) -> text, of a data directory."""

    def __init__(self, meta, folder):
        self.name, self.eos, self.path = meta.get("tokenizer", ""), meta.get("eos_id"), None
        try:
            if not self.name.endswith(".model"):
                encoding = tiktoken.get_encoding(self.name)
                self.encode, self.decode = encoding.encode_ordinary, encoding.decode
                return
            self.path = folder / self.name
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except Exception as e:  # tiktoken's download fails in many ways
            raise UserError(f"the tokenizer {self.name or '?'} of {folder} cannot be read ({type(e).__name__}): a file"
                            " .model is in the data directory, tiktoken's are downloaded at first use") from None
        self.encode, self.decode = self.sp.encode, self.sp.decode


@torch.no_grad()
def generate(model, ids, count, length, temperature=1.0, top_k=None, stop=None):
    """Yields up to `count` new ids after ids (a list), each drawn from softmax(logits / temperature) over the `top_k`
    most probable, the most probable one at temperature 0; ends after `stop`. The model sees the last `length`."""
    ids = list(ids)
    for _ in range(count):
        x = torch.tensor([ids[-length:]], device=model.lm_head.weight.device)
        logits = model.lm_head(model.model(x)[0, -1]).float()
        if top_k is not None and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = -math.inf
        probable = logits.argmax() if temperature == 0 else torch.multinomial((logits / temperature).softmax(0), 1)
        ids.append(int(probable))
        yield ids[-1]
        if ids[-1] == stop:
            return


# ---- Hugging Face's LLaMA format ------------------------------------------------------------------------------------

def export(model, folder, length, tokenizer):
    """Writes config.json, model.safetensors and, if it is a SentencePiece model, the tokenizer. Raises UserError if
    LLaMA has no such model."""
    c, weights = model.config, {k: v.detach().float().contiguous() for k, v in model.state_dict().items()}
    if c.embedding == "norm":
        raise UserError("--export: LLaMA has no norm after the embedding (this run has --embedding=norm)")
    if c.embedding == "scale":
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * c.hidden**0.5
    folder.mkdir(parents=True, exist_ok=True)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, w in weights.items():
        header[name] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": [at, at + 4 * w.numel()]}
        at += 4 * w.numel()
    head = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for w in weights.values():
            f.write(w.numpy().data)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
              "hidden_size": c.hidden, "intermediate_size": c.ffn, "num_hidden_layers": c.layers,
              "num_attention_heads": c.heads, "num_key_value_heads": c.heads, "max_position_embeddings": length,
              "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
              "mlp_bias": False, "tie_word_embeddings": False, "initializer_range": 0.02, "torch_dtype": "float32",
              "bos_token_id": None, "eos_token_id": tokenizer.eos, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if not tokenizer.path:
        print(f"the tokenizer is not copied: it is tiktoken's {tokenizer.name}")
    elif not export_tokenizer(tokenizer, folder):
        print("tokenizer.model is copied, without a tokenizer.json: only those that data/prepare.py trains get one")


def export_tokenizer(tokenizer, folder):
    """The .model file; if data/prepare.py trained it also a tokenizer.json that gives the same ids, and then True."""
    shutil.copy(tokenizer.path, folder / "tokenizer.model")
    sp = tokenizer.sp
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    rank = {p: i for i, p in enumerate(pieces) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))}
    scores = [sp.get_score(i) for i in rank.values()]
    if sp.encode_as_pieces("a")[0].startswith("▁") or any(score != int(score) for score in scores):
        return False  # it puts a space before the text, or is no BPE, whose scores are ranks
    ways = sorted((-sp.get_score(i), p[:k], p[k:]) for p, i in rank.items() for k in range(1, len(p))
                  if p[:k] in rank and p[k:] in rank)
    kinds = [(i, p, sp.is_control(i) or sp.is_unknown(i)) for i, p in enumerate(pieces)
             if sp.is_control(i) or sp.is_unknown(i) or p == "\n"]
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": p, "special": special, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for i, p, special in kinds],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": sp.id_to_piece(sp.unk_id()), "fuse_unk": True, "byte_fallback": True,
                  "dropout": None, "vocab": {p: i for i, p in enumerate(pieces)},
                  "merges": [[a, b] for _, a, b in ways]}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "eos_token": sp.id_to_piece(sp.eos_id()), "unk_token": sp.id_to_piece(sp.unk_id())}))
    return True


def read_safetensors(path):
    """{name: tensor}, memory-mapped. ValueError if it is none."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("no header")
        header = json.loads(f.read(length))
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + length:]
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            if not 0 <= begin <= end <= len(data):
                raise ValueError(f"{name} reaches beyond the end")
            raw = data[begin:end].clone()  # aligned
            tensors[name] = raw.view(DTYPES[about["dtype"]]).view(about["shape"])
    return tensors


def pretrained(folder, config):
    """The weights of a folder in Hugging Face's LLaMA format, as LLaMA(config).load_state_dict takes them, in fp32.
    Raises UserError if they are not such a model's."""
    folder = Path(folder)
    try:
        theirs = json.loads((folder / "config.json").read_text())
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(2, "No such file", str(folder / "model.safetensors"))
        weights = {k: v.float() for path in paths for k, v in read_safetensors(path).items()}
        if theirs.get("tie_word_embeddings"):
            weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        theta = (theirs.get("rope_parameters") or theirs).get("rope_theta", 10000.0)
        weights = {k: v for k, v in weights.items() if not k.endswith("inv_freq")}  # of older exports
        if config.embedding == "scale":  # as export() multiplied
            weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] / config.hidden**0.5
    except OSError as e:
        raise UserError(f"--init_from={folder}: {e.filename}: {e.strerror}: give a folder in Hugging Face's LLaMA "
                        "format, with config.json and model.safetensors") from None
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as e:
        raise UserError(f"--init_from={folder} is damaged, or not in Hugging Face's LLaMA format "
                        f"({type(e).__name__}: {e}): export it again") from None
    with torch.device("meta"):
        expected = {k: list(v.shape) for k, v in LLaMA(config).state_dict().items()}
    wrong = [f"{k} {list(weights[k].shape) if k in weights else 'missing'} (here {shape or 'none'})"
             for k in {**expected, **weights} for shape in [expected.get(k)]
             if k not in weights or list(weights[k].shape) != shape]
    for what, value, ours in (("rms_norm_eps", theirs.get("rms_norm_eps", 1e-6), 1e-6), ("rope_theta", theta, 10000.0),
                              ("num_attention_heads", theirs.get("num_attention_heads"), config.heads)):
        wrong += [f"{what} {value} (here {ours})"] * (value != ours)
    if wrong:
        raise UserError(f"--init_from={folder} is another model than --model and the data's vocabulary make: "
                        f"{', '.join(wrong[:3])}{' and more' * (len(wrong) > 3)}")
    return weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="folder of a run")
    parser.add_argument("--export", type=Path, help="folder to write in Hugging Face's LLaMA format; no text then")
    parser.add_argument("--prompt", default="", help="beginning of the text; none: the end of a document before it")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many [200]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token [0.8]")
    parser.add_argument("--top_k", type=int, default=50, help="draw from so many of the most probable [50]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    args = parser.parse_args()
    if args.temperature < 0 or args.top_k < 1 or args.tokens < 0:
        parser.error("--temperature and --tokens start at 0, --top_k at 1")
    try:
        model, meta, folder = load(args.ckpt)
        tokenizer = Tokenizer(meta, folder)
        if args.export:
            export(model, args.export, meta["seq_len"], tokenizer)
            print(f"{args.export}: {model.config.parameters:,} parameters")
            return
        torch.manual_seed(args.seed)
        ids = tokenizer.encode(args.prompt) or [tokenizer.eos]
        ids += generate(model, ids, args.tokens, meta["seq_len"], args.temperature, args.top_k, tokenizer.eos)
        print(tokenizer.decode([i for i in ids if i != tokenizer.eos]))
    except (UserError, DataError) as e:
        sys.exit(f"sample.py: {e}")
    except OSError as e:
        sys.exit(f"sample.py: {e.filename}: {e.strerror}")


if __name__ == "__main__":
    main()
