import math
import os

import pytest
import torch
import torch.nn.functional as F

import baselines
from model import IGNORE_INDEX, SIZES, Config, LLaMA


@pytest.mark.parametrize("name, count", [("60m", 58_073_600), ("130m", 134_105_856), ("350m", 367_969_280), ("1b", 1_339_082_752)])
def test_parameter_counts_are_the_papers(name, count):
    with torch.device("meta"):
        model = LLaMA(Config.named(name, vocab_size=32_000))
    assert sum(p.numel() for p in model.parameters()) == count == model.config.parameters
    products = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    assert model.config.flops_per_token(0) == 6 * sum(p.numel() for p in products)


def test_names_are_hugging_faces():
    names = set(LLaMA(Config.named("nano", 50)).state_dict())
    layer = {f"model.layers.3.{n}.weight" for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj", "input_layernorm", "post_attention_layernorm")}
    assert layer | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert len(names) == 4 * 9 + 3


def test_weights_at_the_start():
    torch.manual_seed(0)
    model = LLaMA(Config.named("nano", 2000))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        else:
            assert abs(p.std().item() - 0.02) < 5e-4 and abs(p.mean().item()) < 5e-4, name


def reference(w, tokens, heads, layers):
    """LLaMA's logits as its formulas say, position by position where that is plainer. Float64, no repo code."""
    def norm(x, gain):
        return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    B, T = tokens.shape
    x = w["model.embed_tokens.weight"][tokens]
    d = x.shape[-1] // heads
    turn = torch.zeros(T, d, d, dtype=torch.float64)  # the rotation of each position, as a matrix
    for t in range(T):
        for i in range(d // 2):
            a = t * 10_000 ** (-2 * i / d)
            turn[t, i, i] = turn[t, i + d // 2, i + d // 2] = math.cos(a)
            turn[t, i, i + d // 2], turn[t, i + d // 2, i] = -math.sin(a), math.sin(a)
    for n in range(layers):
        p = {k.removeprefix(f"model.layers.{n}."): v for k, v in w.items() if k.startswith(f"model.layers.{n}.")}
        h = norm(x, p["input_layernorm.weight"])
        q, k, v = (torch.stack((h @ p[f"self_attn.{m}_proj.weight"].T).split(d, -1), 1) for m in "qkv")
        q, k = (torch.einsum("tij,bhtj->bhti", turn, z) for z in (q, k))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = torch.cat((scores.softmax(-1) @ v).unbind(1), -1)
        x = x + y @ p["self_attn.o_proj.weight"].T
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = h @ p["mlp.gate_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (h @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.fixture(scope="module")
def case():
    """A model with weights large enough to matter, a batch with ignored targets, and the reference's loss and gradients."""
    torch.manual_seed(0)
    config = Config(hidden=32, ffn=48, layers=2, heads=4, vocab_size=97)
    model = LLaMA(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.1)
    tokens, targets = torch.randint(97, (2, 3, 19))
    targets[torch.rand(3, 19) < 0.3] = IGNORE_INDEX
    w = {k: v.detach().double().requires_grad_() for k, v in model.state_dict().items()}
    logits = reference(w, tokens, 4, 2)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss.backward()
    return model, tokens, targets, logits.detach(), loss.item(), {k: v.grad for k, v in w.items()}


def test_logits_are_the_references(case):
    model, tokens, _, logits, _, _ = case
    torch.testing.assert_close(model(tokens).double(), logits, rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_are_the_references(case):
    model, tokens, targets, _, loss, grads = case
    model.zero_grad()
    ours = model(tokens, targets)
    assert ours.item() == pytest.approx(loss, rel=1e-6)
    (ours * 0.5).backward()
    for name, p in model.named_parameters():
        expected = grads[name] / 2
        torch.testing.assert_close(p.grad.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    with torch.no_grad():
        assert model(tokens, targets).item() == ours.item()


def test_second_derivatives_are_right(case):
    """A Hessian-vector product, against the reference's in float64."""
    model, tokens, targets, *_ = case
    v = torch.randn_like(model.lm_head.weight)
    w = {k: p.detach().double() for k, p in model.state_dict().items()}
    head = w["lm_head.weight"].requires_grad_()
    logits = reference(w, tokens, 4, 2)
    losses = (model(tokens, targets),
              F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"))
    products = []
    for loss, weight in zip(losses, (model.lm_head.weight, head)):
        grad, = torch.autograd.grad(loss, weight, create_graph=True)
        products.append(torch.autograd.grad((grad * v).sum(), weight)[0].double())
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4 * products[1].abs().max().item())


def test_hooks_and_replacements_of_the_output_layer_run(case):
    """LoRA and the like wrap lm_head; it must be called."""
    model, tokens, targets, *_ = case
    plain = model(tokens, targets).item()
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    doubled = model(tokens, targets).item()
    hook.remove()
    expected = F.cross_entropy(2 * model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    assert doubled == pytest.approx(expected.item(), rel=1e-6) and doubled != pytest.approx(plain, rel=1e-3)


def test_a_target_outside_the_vocabulary_is_an_error(case):
    model, tokens, targets, *_ = case
    for bad in (-1, 97):
        wrong = targets.clone()
        wrong[0, 0] = bad
        with pytest.raises(IndexError):
            model(tokens, wrong)


def test_losses_of_the_tokens_are_the_references(case):
    model, tokens, targets, logits, *_ = case
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(model(tokens, targets, reduction="none").double(), each, rtol=1e-5, atol=1e-5)


def test_the_variants_of_spike_no_more():
    def start(**changes):
        torch.manual_seed(0)
        model = LLaMA(Config.named("nano", 2000, **changes))
        assert sum(p.numel() for p in model.parameters()) == model.config.parameters
        return model
    tokens = torch.randint(2000, (2, 16))
    models = {variant: start(embedding=variant, init="small") for variant in (None, "detach", "norm", "scale")}
    sigma = math.sqrt(2 / 5 / 128)  # section 3: outputs of sub-layers get 1 / sqrt(2 * 4 layers) of it
    for name, p in models[None].named_parameters():
        if "norm" not in name:
            std = sigma / math.sqrt(8) if "o_proj" in name or "down_proj" in name else sigma
            assert p.std().item() == pytest.approx(std, rel=0.02), name
    seen = {}
    for variant, model in models.items():
        model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.update({variant: args[0]}))
        model(tokens, tokens).backward()
    assert torch.allclose(seen["detach"], seen[None]) and torch.allclose(seen["scale"], seen[None] * math.sqrt(128))
    assert seen["scale"].std().item() == pytest.approx(math.sqrt(0.4), rel=0.05)
    assert seen["norm"].std().item() == pytest.approx(1, rel=0.01)
    whole, tenth = (models[variant].model.embed_tokens.weight.grad for variant in (None, "detach"))
    torch.testing.assert_close(tenth, whole / 10)


def test_all_targets_ignored_is_no_loss_and_no_gradient(case):
    model, tokens, targets, *_ = case
    model.zero_grad()
    loss = model(tokens, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_the_future_is_not_seen(case):
    model, tokens, *_ = case
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 97
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.equal(a[:, 10:], b[:, 10:])


def test_the_future_is_not_seen_in_bf16_either(case):
    model, tokens, *_ = case
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 97
    with torch.autocast("cpu", torch.bfloat16):
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.equal(a[:, 10:], b[:, 10:])


def test_bf16_autocast_is_close_and_its_loss_is_fp32(case):
    model, tokens, targets, _, loss, grads = case
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(tokens, targets)
    ours.backward()
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(loss, rel=0.02)
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert torch.cosine_similarity(p.grad.double().flatten(), grads[name].flatten(), 0) > 0.99, name


@pytest.fixture
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


def test_compiled_on_all_threads_gradients_are_the_same_every_time(all_threads):
    """Tokens are heavy-tailed, so that many threads add to the same row of the embedding's gradient."""
    torch.manual_seed(0)
    model = LLaMA(Config(hidden=32, ffn=48, layers=1, heads=2, vocab_size=97))
    tokens = torch.multinomial(1 / torch.arange(1, 98), 64 * 64, replacement=True).view(64, 64)

    def gradients():
        model.zero_grad()
        loss = model(tokens, tokens)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    eager = gradients()
    model.compile()
    compiled = gradients()
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(compiled, gradients()))


def test_fifty_steps_stay_with_the_reference():
    """Compiled and by the foreach optimizer, against eager PyTorch and one tensor at a time."""
    tokens = torch.multinomial(1 / torch.arange(1, 98), 50 * 64 * 65, replacement=True,
                               generator=torch.Generator().manual_seed(0)).view(50, 64, 65)
    tokens[..., 1::2] = tokens[..., :64:2] * 7 % 97  # something to learn

    def losses(fast):
        torch.manual_seed(0)
        model = LLaMA(Config(hidden=32, ffn=48, layers=1, heads=2, vocab_size=97))
        optimizer = baselines.build_optimizer("clipped_sgd", model, lr=100.0, update_clip=5e-3)
        for group in optimizer.param_groups:
            group["foreach"] = fast
        if fast:
            model.compile()
        found = []
        for x, y in zip(tokens[..., :-1], tokens[..., 1:]):
            loss = model(x, y) / y.numel() if fast else F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found
    fast, plain = losses(True), losses(False)
    assert plain[-1] < 0.8 * plain[0]
    assert max(abs(a - b) for a, b in zip(fast, plain)) < 1e-3


def test_every_size_has_whole_heads():
    assert all(hidden % heads == 0 and (hidden // heads) % 2 == 0 for hidden, _, _, heads in SIZES.values())
