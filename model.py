"""LLaMA, as small as it goes, under Hugging Face's parameter names.

Vocabulary from the data, untied embeddings, no biases, RMSNorm before each sub-layer, rotary positions, causal
attention, SwiGLU, no dropout; weights N(0, 0.02), gains 1 (arXiv 2605.17787 and its release). Config's `embedding` and
`init` are the arms of Spike No More (arXiv 2312.16903).

The logits of a batch never exist all at once. At 64 sequences of 256 tokens and a vocabulary of 32,000 they would take
2 GiB in fp32, and their gradient as much again. The output layer and the cross-entropy are one function instead, which
walks over chunks of rows and works out its gradients while it has the logits in hand: see `OutputLoss`.

    >>> model = LLaMA(Config.named("nano", vocab_size=4096))
    >>> loss_sum = model(tokens, targets)    # [B, T] int64 each -> fp32 scalar, the SUM of the token losses
    >>> losses = model(tokens, targets, reduction="none")    # [B, T] each token's, without a gradient
    >>> logits = model(tokens)               # [B, T, vocab_size]
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100  # a target that counts for nothing: padding (PyTorch's own convention)

#        hidden    ffn  layers  heads
SIZES = {
    "micro": (64,   176,  4,  2),   # ours, these three: for a CPU
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
    embedding: str | None = None  # what is done to the embedding's output: "detach", "norm", "scale" or nothing
    init: str | None = None       # "small", or N(0, 0.02)

    @classmethod
    def named(cls, name, vocab_size, **more):
        return cls(*SIZES[name], vocab_size, **more)

    @property
    def matrices(self):
        """The number of weights in matrix products: the layers' and the output layer's."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn) + self.vocab_size * self.hidden

    @property
    def parameters(self):
        """Their number: those, the embedding and the gains of the norms."""
        norms = 2 * self.layers + 1 + (self.embedding == "norm")
        return self.matrices + self.vocab_size * self.hidden + norms * self.hidden

    def flops_per_token(self, length):
        """FLOPs of forward and backward: 6 a weight in a product, and 6 * layers * length * hidden for attention, half
        of all pairs since it is causal. Look-ups and elementwise work count for nothing."""
        return 6 * self.matrices + 6 * self.layers * length * self.hidden


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary(length, head_dim, device, base=10_000.0):
    """cos and sin of the angle position / base^(2i/head_dim): [length, head_dim/2] each, fp32."""
    freq = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + head_dim/2}) of x [B, heads, T, head_dim]: the half-split form."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(q, k, v):
    """Causal attention on q, k, v [B, heads, T, head_dim]. In bf16 on a CPU PyTorch's own is slow: there two batched
    products, with all of the scores [B, heads, T, T] in memory."""
    if q.is_cuda or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.where(mask, -torch.inf).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.hidden, c.hidden, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.hidden, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.hidden, bias=False)
        self.o_proj = nn.Linear(c.hidden, c.hidden, bias=False)

    def forward(self, x, cos, sin):
        B, T, d = x.shape
        q, k, v = (proj(x).view(B, T, self.heads, -1).transpose(1, 2)  # [B, heads, T, head_dim]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden)
        self.post_attention_layernorm = RMSNorm(c.hidden)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding, self.hidden, self.head_dim = c.embedding, c.hidden, c.hidden // c.heads
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        if c.embedding == "norm":
            self.embed_norm = nn.LayerNorm(c.hidden, bias=False)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden)

    def forward(self, tokens):
        return self.body(self.embed_tokens(tokens))

    def body(self, x):
        """x [B, T, hidden], the embedded tokens -> the normed output of the last layer, [B, T, hidden]."""
        if self.embedding == "detach":  # a tenth of the gradient passes
            x = 0.1 * x + 0.9 * x.detach()
        elif self.embedding == "norm":
            x = self.embed_norm(x)
        elif self.embedding == "scale":
            x = x * self.hidden**0.5
        cos, sin = rotary(x.shape[1], self.head_dim, x.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


def chunk_loss(h, w, y, weight):
    """Rows h [n, hidden], output matrix w [vocab, hidden], targets y [n], weight of each row [n] -> the weighted losses
    [n], and the gradient of their sum in the logits, weight * (softmax - onehot), [n, vocab] in h's dtype."""
    logits = (h @ w.T).float()
    label = y.clamp(min=0)[:, None]
    norm = logits.logsumexp(-1, keepdim=True)
    losses = (norm - logits.gather(-1, label)).squeeze(-1) * weight
    onehot = torch.arange(logits.shape[1], device=y.device) == label
    return losses, (((logits - norm).exp() - onehot.float()) * weight[:, None]).to(h.dtype)


class OutputLoss(torch.autograd.Function):
    """The output layer and the cross-entropy: -log softmax(hidden @ weight.T)[targets], each times its `scale`: their
    sum, and the N of them, which pass no gradient.

    hidden [N, hidden], weight [vocab, hidden], targets [N] int64, scale [N]; `chunk` rows at a time. Forward computes
    the gradients (if `grad`) while it has the logits in hand: they cost less to keep ([N, hidden] and the weight's own
    shape) than the logits ([N, vocab]) would. Products run in the autocast dtype, all else in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, chunk, chunk_loss, grad):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        h, w = hidden.to(dtype), weight.to(dtype)
        grad_h = torch.empty_like(h) if grad else None
        grad_w = torch.zeros_like(weight) if grad else None
        losses = torch.empty(len(h), device=hidden.device)
        for i in range(0, len(h), chunk):
            of = slice(i, i + chunk)
            rows = h[of]
            # for an evaluation too: g costs little, and alone the loss compiles worse
            losses[of], g = chunk_loss(rows, w, targets[of], scale[of])
            if grad:
                torch.mm(g, w, out=grad_h[of])
                if dtype == weight.dtype:
                    grad_w.addmm_(g.T, rows)
                else:
                    grad_w += g.T @ rows
        ctx.grads = grad_h, grad_w
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_output, _):
        if ctx.grads is None:
            raise RuntimeError("OutputLoss scales its gradients in place, so backward runs once for a forward")
        (grad_h, grad_w), ctx.grads = ctx.grads, None
        return grad_h.mul_(grad_output), grad_w.mul_(grad_output), None, None, None, None, None


class LLaMA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.chunk_loss = chunk_loss
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if config.init == "small":  # arXiv 2312.16903, section 3
                    std = (2 / (5 * config.hidden)) ** 0.5
                    std /= (2 * config.layers) ** 0.5 if name.endswith(("o_proj", "down_proj")) else 1
                nn.init.normal_(module.weight, std=std)

    def compile(self):
        """torch.compile, in place. Two things stay outside: the embedding, since compiled for a CPU its backward adds
        atomically, in an order that changes from run to run; and the loop over chunks, which would be unrolled."""
        self.model.body = torch.compile(self.model.body)
        self.chunk_loss = torch.compile(chunk_loss)

    def forward(self, tokens, targets=None, class_weights=None, reduction="sum", chunk=None):
        """tokens [B, T] int64. Without targets: logits [B, T, vocab]. With targets [B, T] (int64, IGNORE to skip):
        the sum of the token losses in nats, an fp32 scalar, or with reduction "none" each of them, [B, T] fp32 without
        a gradient; times class_weights[target], [vocab], if given. `chunk` rows of logits exist at a time."""
        x = self.model(tokens)
        if targets is None:
            return self.lm_head(x)
        y = targets.flatten()
        scale = (y != IGNORE).float()
        if class_weights is not None:
            scale *= class_weights[y.clamp(min=0)]
        chunk = chunk or (4096 if x.is_cuda else 256)  # a CPU's cache holds 256 rows; a GPU wants larger products
        total, losses = OutputLoss.apply(x.flatten(0, 1), self.lm_head.weight, y, scale, chunk, self.chunk_loss,
                                         torch.is_grad_enabled())
        return total if reduction == "sum" else losses.view_as(targets)
