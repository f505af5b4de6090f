"""LLaMA in plain PyTorch, with Hugging Face's parameter names.

Untied embeddings, no biases, RMSNorm before each sub-layer, rotary positions, causal attention,
SwiGLU, no dropout; weights N(0, 0.02), gains 1 (Glentis et al. 2026, arXiv 2605.17787, and its
release). Config's `embedding` and `init` are the variants of Takase et al. 2023 (arXiv 2312.16903).

    >>> model = LLaMA(Config.named("nano", vocab_size=4096))
    >>> logits = model(tokens)             # tokens [B, T] int64 -> [B, T, vocab_size]
    >>> loss_sum = model(tokens, targets)  # the SUM of the token losses in nats, an fp32 scalar

Needs torch and nothing else: copy this file into a project of your own.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE_INDEX = -100  # a target that is not counted, such as padding (PyTorch's convention)

#        hidden    ffn  layers  heads
SIZES = {
    "micro": (64,   176,  4,  2),   # the first three are ours, for a CPU
    "nano": (128,   352,  4,  4),
    "mini": (256,   704,  4,  8),
    "60m":  (512,  1376,  8,  8),   # 58,073,600 parameters at a vocabulary of 32,000
    "130m": (768,  2048, 12, 12),   # 134,105,856
    "350m": (1024, 2736, 24, 16),   # 367,969,280
    "1b":   (2048, 5461, 24, 32),   # 1,339,082,752
}


@dataclass(frozen=True)
class Config:
    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab_size: int
    embedding: str | None = None  # "detach", "norm", "scale" change its output; "large" its start
    init: str | None = None       # "small" (Takase et al. 2023), or None for N(0, 0.02)

    @classmethod
    def named(cls, name, vocab_size, **overrides):
        return cls(*SIZES[name], vocab_size, **overrides)

    @property
    def matmul_parameters(self):
        """Number of weights that take part in a matrix product (all but embedding and norms)."""
        per_layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn
        return self.layers * per_layer + self.vocab_size * self.hidden

    @property
    def parameters(self):
        """Number of all weights."""
        norms = 2 * self.layers + 1 + (self.embedding == "norm")
        return self.matmul_parameters + self.vocab_size * self.hidden + norms * self.hidden

    def flops_per_token(self, seq_len):
        """FLOPs per token of forward and backward: 6 per weight in a matrix product, and
        6 * layers * seq_len * hidden for causal attention, which needs half of all pairs."""
        return 6 * self.matmul_parameters + 6 * self.layers * seq_len * self.hidden


def rotary_angles(seq_len, head_dim, device, base=10_000.0):
    """cos and sin of position / base^(2i / head_dim), fp32 [seq_len, head_dim / 2] each."""
    i = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    position = torch.arange(seq_len, device=device, dtype=torch.float32)
    angle = position[:, None] * base ** (-i / head_dim)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + head_dim/2}) of x [B, heads, T, head_dim]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def causal_attention(q, k, v):
    """q, k, v [B, heads, T, head_dim] -> [B, heads, T, head_dim]."""
    if q.is_cuda or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On a CPU PyTorch's own kernel is slow in bf16 (dev/LOG.md): two matrix products instead.
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # [B, heads, T, T]
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.where(causal, -torch.inf).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden
        self.heads = config.heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x, cos, sin):
        B, T, d = x.shape
        shape = B, T, self.heads, d // self.heads
        q = self.q_proj(x).view(shape).transpose(1, 2)  # [B, heads, T, head_dim]
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        y = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=1e-6)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        if config.embedding == "norm":
            self.embed_norm = nn.LayerNorm(config.hidden, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)

    def forward(self, tokens):
        """tokens [B, T] -> the last hidden states, [B, T, hidden]."""
        config = self.config
        x = self.embed_tokens(tokens)
        if config.embedding == "detach":  # a tenth of the gradient passes
            x = 0.1 * x + 0.9 * x.detach()
        elif config.embedding == "norm":
            x = self.embed_norm(x)
        elif config.embedding == "scale":
            x = x * config.hidden**0.5
        cos, sin = rotary_angles(tokens.shape[1], config.hidden // config.heads, tokens.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class LLaMA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if config.init == "small":  # Takase et al. 2023, section 3
                    std = (2 / (5 * config.hidden)) ** 0.5
                    if name.endswith(("o_proj", "down_proj")):
                        std /= (2 * config.layers) ** 0.5
                if config.embedding == "large" and isinstance(module, nn.Embedding):
                    std *= config.hidden**0.5  # as if by "scale", but at the start alone (ours)
                nn.init.normal_(module.weight, std=std)

    def compile(self, **options):
        """nn.Module's, which leaves out the embedding: on a CPU its compiled backward adds
        atomically, in an order that changes from run to run: a resumed run would not be exact."""
        embedding = self.model.embed_tokens
        embedding.forward = torch.compiler.disable(embedding.forward)
        super().compile(**options)

    def forward(self, tokens, targets=None, reduction="sum"):
        """Logits [B, T, vocab_size] of tokens [B, T], or with targets [B, T] the cross-entropy in
        nats: reduction "sum" gives a scalar, "none" losses [B * T]."""
        logits = self.lm_head(self.model(tokens))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                               ignore_index=IGNORE_INDEX, reduction=reduction)
