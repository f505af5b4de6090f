"""Text from a trained model; its weights in Hugging Face's LLaMA format, and back.

    python sample.py --ckpt=runs/clipped --prompt="import os" --tokens=200
    python sample.py --ckpt=runs/clipped --export=hf     # LlamaForCausalLM.from_pretrained("hf")
    python train.py --init_from=hf --data=... --out=...  # calls load_pretrained below

--ckpt is the folder of a run. The tokenizer is the one in its data directory.
"""
import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import sentencepiece
import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loader import UserError, read_meta
from model import Config, LLaMA


def load_run(folder):
    """The model of a run, on the CPU, its data's path and meta.json. Raises UserError."""
    try:
        settings = json.loads((Path(folder) / "config.json").read_text())["settings"]
        path = Path(folder) / "ckpt.pt"
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
        vocab_size = len(weights["lm_head.weight"])
        config = Config.named(settings["model"], vocab_size, embedding=settings.get("embedding"))
        model = LLaMA(config)
        model.load_state_dict(weights)
    except Exception as e:  # a torn or foreign file fails in many ways, all with this remedy
        raise UserError(f"--ckpt={folder} is not the folder of a run of train.py with a checkpoint "
                        f"({type(e).__name__}): it needs config.json and ckpt.pt") from None
    return model.eval(), Path(settings["data"]), read_meta(settings["data"])


class Tokenizer:
    """encode(text) -> ids and decode(ids) -> text of a data directory. Raises UserError."""

    def __init__(self, data, meta):
        self.name, self.eos_id = meta.get("tokenizer", ""), meta.get("eos_id")
        self.sp = None  # the SentencePiece model, unless the tokenizer is tiktoken's
        self.path = data / self.name
        try:
            if self.name.endswith(".model"):
                self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
                self.encode, self.decode = self.sp.encode, self.sp.decode
            else:
                encoding = tiktoken.get_encoding(self.name)
                self.encode, self.decode = encoding.encode_ordinary, encoding.decode
        except Exception as e:  # tiktoken's download fails in many ways
            raise UserError(f"the tokenizer {self.name or '?'} of {data} cannot be read "
                            f"({type(e).__name__}): a .model file belongs into the data directory, "
                            "tiktoken's are downloaded at first use") from None


@torch.no_grad()
def generate(model, ids, count, seq_len, temperature=1.0, top_k=None, stop=None):
    """Yields up to `count` ids after the list `ids`, drawn from softmax(logits / temperature) over
    the top_k most probable (the most probable one at temperature 0). Ends after the id `stop`. The
    model sees the last seq_len ids."""
    ids = list(ids)
    for _ in range(count):
        x = torch.tensor([ids[-seq_len:]], device=model.lm_head.weight.device)
        logits = model.lm_head(model.model(x)[0, -1]).float()
        if top_k is not None and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = -math.inf
        if temperature == 0:
            next_id = logits.argmax()
        else:
            next_id = torch.multinomial((logits / temperature).softmax(0), 1)
        ids.append(int(next_id))
        yield ids[-1]
        if ids[-1] == stop:
            return


# ---- Hugging Face's LLaMA format -----------------------------------------------------------------

def export(model, folder, seq_len, tokenizer):
    """Writes config.json, model.safetensors (fp32) and the tokenizer. Raises UserError if LLaMA has
    no such model."""
    c = model.config
    if c.embedding == "norm":
        raise UserError("--export: LLaMA has no norm after the embedding (--embedding=norm)")
    weights = {k: v.detach().float().contiguous() for k, v in model.state_dict().items()}
    if c.embedding == "scale":
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * c.hidden**0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "vocab_size": c.vocab_size, "hidden_size": c.hidden, "intermediate_size": c.ffn,
              "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
              "num_key_value_heads": c.heads, "max_position_embeddings": seq_len,
              "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
              "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
              "initializer_range": 0.02, "torch_dtype": "float32", "bos_token_id": None,
              "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if tokenizer.sp is None:
        print(f"the tokenizer is not copied: it is tiktoken's {tokenizer.name}")
    else:
        shutil.copy(tokenizer.path, folder / "tokenizer.model")
        export_tokenizer(tokenizer.sp, folder)


def export_tokenizer(sp, folder):
    """Writes tokenizer.json, which gives the ids of a SentencePiece model that data/prepare.py
    trained: BPE whose scores are ranks, with byte fallback and no space put before the text."""
    size = sp.vocab_size()
    pieces = [sp.id_to_piece(i) for i in range(size)]
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    ranked = {pieces[i]: i for i in range(size) if i not in special and not sp.is_byte(i)}
    scores = {piece: sp.get_score(i) for piece, i in ranked.items()}
    if sp.encode_as_pieces("a")[0].startswith("▁") or any(x != int(x) for x in scores.values()):
        print("tokenizer.model is copied, without a tokenizer.json: only those that "
              "data/prepare.py trains get one")
        return
    # every way to make a piece of two others, the best pieces first
    merges = sorted((-scores[piece], piece[:k], piece[k:]) for piece in ranked
                    for k in range(1, len(piece)) if piece[:k] in ranked and piece[k:] in ranked)
    added = [{"id": i, "content": piece, "special": i in special, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False}
             for i, piece in enumerate(pieces) if i in special or piece == "\n"]
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    model = {"type": "BPE", "unk_token": sp.id_to_piece(sp.unk_id()), "fuse_unk": True,
             "byte_fallback": True, "dropout": None, "merges": [merge[1:] for merge in merges],
             "vocab": {piece: i for i, piece in enumerate(pieces)}}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
                 "post_processor": None, "added_tokens": added, "normalizer": from_space,
                 "decoder": {"type": "Sequence", "decoders": [
                     to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "eos_token": sp.id_to_piece(sp.eos_id()), "unk_token": sp.id_to_piece(sp.unk_id())}))


def load_pretrained(folder, config):
    """The weights of a folder in Hugging Face's LLaMA format, as LLaMA(config).load_state_dict
    takes them, in fp32. Raises UserError if they are not such a model's."""
    folder = Path(folder)
    try:
        theirs = json.loads((folder / "config.json").read_text())
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(2, "No such file", str(folder / "model.safetensors"))
        weights = {}
        for path in paths:
            weights |= {name: w.float() for name, w in load_file(path).items()}
        if theirs.get("tie_word_embeddings"):
            weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        if config.embedding == "scale":  # as export() multiplied
            weights["model.embed_tokens.weight"] /= config.hidden**0.5
        theta = (theirs.get("rope_parameters") or theirs).get("rope_theta", 10000.0)
        found = {"rms_norm_eps": theirs.get("rms_norm_eps", 1e-6), "rope_theta": theta,
                 "num_attention_heads": theirs.get("num_attention_heads")}
    except OSError as e:
        raise UserError(f"--init_from={folder}: {e.filename}: {e.strerror}: give a folder in "
                        "Hugging Face's LLaMA format, with config.json and "
                        "model.safetensors") from None
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"--init_from={folder} is damaged, or not in Hugging Face's LLaMA format "
                        f"({type(e).__name__}: {e}): export it again") from None

    # the same settings, and the same tensors in the same shapes
    weights = {name: w for name, w in weights.items() if not name.endswith("inv_freq")}
    expected = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_attention_heads": config.heads}
    with torch.device("meta"):
        expected |= {name: list(w.shape) for name, w in LLaMA(config).state_dict().items()}
    found |= {name: list(w.shape) for name, w in weights.items()}
    differ = [f"{name} {found.get(name, 'missing')} (here {expected.get(name, 'none')})"
              for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if differ:
        raise UserError(f"--init_from={folder} is another model than --model and the data's "
                        f"vocabulary make: {', '.join(differ[:3])}")
    return weights


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="folder of a run")
    parser.add_argument("--export", type=Path, help="write Hugging Face's format to this folder")
    parser.add_argument("--prompt", default="", help="text to continue; none: a new document")
    parser.add_argument("--tokens", type=int, default=200, help="how many at most [200]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: most probable [0.8]")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the most probable [50]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    args = parser.parse_args()
    if args.temperature < 0 or args.top_k < 1 or args.tokens < 0:
        parser.error("--temperature and --tokens start at 0, --top_k at 1")
    try:
        model, data, meta = load_run(args.ckpt)
        tokenizer = Tokenizer(data, meta)
        if args.export:
            export(model, args.export, meta["seq_len"], tokenizer)
            print(f"{args.export}: {model.config.parameters:,} parameters")
            return
        torch.manual_seed(args.seed)
        ids = tokenizer.encode(args.prompt) or [tokenizer.eos_id]
        ids += generate(model, ids, args.tokens, meta["seq_len"], args.temperature, args.top_k,
                        tokenizer.eos_id)
        print(tokenizer.decode([i for i in ids if i != tokenizer.eos_id]))
    except UserError as e:
        sys.exit(f"sample.py: {e}")
    except OSError as e:
        sys.exit(f"sample.py: {e.filename}: {e.strerror}")


if __name__ == "__main__":
    main()
