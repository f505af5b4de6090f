import copy
import itertools
import pickle

import pytest
import torch

from baselines import SCALE, build_optimizer
from conftest import ROOT, python
from model import Config, LLaMA
from optim import ClippedSGD

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(40, 8), (8, 8), (8,), (3, 5, 2)]  # the first one is the output layer: 40 token classes


def gradients(steps, seed=0):
    """Gradients whose rows differ by orders of magnitude, with spikes and a row that is always zero."""
    g = torch.Generator().manual_seed(seed)
    for step in range(steps):
        out = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES]
        out[0] *= torch.logspace(-4, 0, 40, dtype=torch.float64)[:, None]
        out[0][7] = 0
        yield [x * (100 if step % 9 == 5 else 1) for x in out]


def reference(weights, lr, momentum, token_clip, update_clip, steps, lrs=None):
    """The four steps of the paper in float64, a row and a number at a time."""
    ws = [w.double().clone() for w in weights]
    ms = [torch.zeros_like(w) for w in ws]
    for step, gs in enumerate(gradients(steps)):
        lr = lrs[step] if lrs else lr
        for i, (w, m, g) in enumerate(zip(ws, ms, gs)):
            m.copy_(momentum * m + (1 - momentum) * g)
            u = m.clone()
            if i == 0 and token_clip is not None:
                for row in u:
                    norm = sum(x * x for x in row.tolist()) ** 0.5
                    if norm > token_clip:
                        row *= token_clip / norm
            rms = (u * u).mean().sqrt().item()
            if update_clip is not None and lr * rms > update_clip:
                u *= update_clip / (lr * rms)
            w -= lr * u
    return ws


def start(*dtypes):
    """Parameters of these dtypes in turn."""
    g = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape, dtype in zip(SHAPES, itertools.cycle(dtypes or [FP32]))]


def groups(params, token_clip):
    return [{"params": params[:1], "token_clip": token_clip}, {"params": params[1:]}]


def run(optimizer, params, steps, skip=0, after=lambda: None, dtype=None):
    for gs in itertools.islice(gradients(steps), skip, None):
        for p, g in zip(params, gs):
            if dtype:
                p.grad_dtype = None  # any
            p.grad = g.to(p.device, dtype or p.dtype)
        optimizer.step()
        after()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("update_clip", [None, 1e-2])
@pytest.mark.parametrize("token_clip", [None, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_the_reference(momentum, token_clip, update_clip, foreach):
    params = start()
    expected = reference(params, 0.1, momentum, token_clip, update_clip, 60)
    optimizer = ClippedSGD(groups(params, token_clip), lr=0.1, momentum=momentum, update_clip=update_clip, foreach=foreach)
    run(optimizer, params, 60)
    for p, w in zip(params, expected):
        torch.testing.assert_close(p.double(), w, rtol=1e-4, atol=1e-5)
    assert bool(optimizer.state) == (momentum > 0)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_row_whose_norm_overflows_leaves_the_others_alone(foreach):
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.tensor([[1e30] * 3, [1.0] * 3])  # 1e60 is inf in fp32
    ClippedSGD([p], lr=1.0, momentum=0.0, token_clip=1e-3, update_clip=1.0, foreach=foreach).step()
    assert p[0].tolist() == [1, 1, 1] and torch.allclose(1 - p[1], torch.full((3,), 1e-3 / 3**0.5), rtol=1e-3)


@pytest.mark.parametrize("foreach", [True, False])
def test_without_clips_it_is_torchs_sgd(foreach):
    """With dampening = momentum, and at 1 / (1 - momentum) times the learning rate of SGD without dampening."""
    ours, theirs, undamped = start(FP64), start(FP64), start(FP64)
    optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, dampening=0.9)
    for p in theirs:  # torch's first step takes the whole gradient into the buffer; an EMA from zero does not
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    run(optimizer, theirs, 40)
    run(torch.optim.SGD(undamped, lr=0.01, momentum=0.9), undamped, 40)
    run(ClippedSGD(ours, lr=0.1, update_clip=None, foreach=foreach), ours, 40)
    for a, b, c in zip(ours, theirs, undamped):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("update_clip", [1e-2, None])
@pytest.mark.parametrize("number", [float, torch.tensor])
@pytest.mark.parametrize("foreach", [True, False])
def test_follows_a_scheduler(foreach, number, update_clip):
    params = start()
    optimizer = ClippedSGD(groups(params, 0.05), lr=number(0.5), update_clip=update_clip, foreach=foreach)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    lrs = []
    expected_start = [p.detach().clone() for p in params]
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    probe_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(probe, 30)
    for _ in range(30):
        lrs.append(probe.param_groups[0]["lr"])
        probe.step()
        probe_scheduler.step()
    run(optimizer, params, 30, after=scheduler.step)
    for p, w in zip(params, reference(expected_start, None, 0.9, 0.05, update_clip, 30, lrs)):
        torch.testing.assert_close(p.double(), w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("token_clip, update_clip", [(0.05, 1e-2), (None, None)])
@pytest.mark.parametrize("how", ["model.to", "load_state_dict"])
@pytest.mark.parametrize("first, then, grads", [
    ([BF16], BF16, None), ([FP16], FP16, None), ([FP64], FP64, None), ([BF16], BF16, FP32), ([FP32], FP32, BF16),
    ([FP32], BF16, None), ([FP32], FP16, None), ([FP32], FP64, None), ([BF16], FP32, None), ([FP32, BF16, FP64, FP16], None, None)])
def test_any_dtype(first, then, grads, how, token_clip, update_clip, foreach):
    """Of the parameters, mixed or not, before and after a conversion, and of the gradients."""
    params = start(*first)
    expected = reference(params, 0.1, 0.9, token_clip, update_clip, 10)
    optimizer = ClippedSGD(groups(params, token_clip), lr=0.1, update_clip=update_clip, foreach=foreach)
    run(optimizer, params, 5, dtype=grads)
    if how == "model.to":
        torch.nn.ParameterList(params).to(then)
    else:
        params = [torch.nn.Parameter(p.detach().to(then or p.dtype)) for p in params]
        saved = optimizer.state_dict()
        optimizer = ClippedSGD(groups(params, None), lr=1.0, foreach=foreach)
        optimizer.load_state_dict(saved)
    run(optimizer, params, 10, skip=5, dtype=grads)
    for p, w, dtype in zip(params, expected, itertools.cycle(first)):
        assert p.dtype == (then or dtype) == optimizer.state[p]["momentum_buffer"].dtype  # so that a checkpoint loses nothing
        worst = max((dtype, then or dtype, grads or dtype), key=lambda dtype: torch.finfo(dtype).eps)
        tolerance = {BF16: 0.03, FP16: 5e-3, FP32: 1e-4, FP64: 1e-9}[worst]
        torch.testing.assert_close(p.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("foreach", [True, False])
def test_any_shape_layout_and_device(foreach):
    """Complex, 0-d, transposed and channels_last parameters take the steps of real, 1-D and contiguous ones, beside empty
    ones and those of another device in one group."""
    g = torch.Generator().manual_seed(0)
    plain = [torch.randn(shape, generator=g, dtype=FP64) for shape in ((6, 5), (6, 5), (2, 3, 4, 5), (1,))]
    phase = torch.tensor(0.6 + 0.8j, dtype=torch.complex128)  # turns all numbers, and leaves their absolute values
    forms = [lambda t: t * phase, lambda t: t.t().contiguous().t(), lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t[0]]
    for options in (dict(update_clip=1e-2), dict(update_clip=None), dict(update_clip=0.2, momentum=0.0)):
        ours = [torch.nn.Parameter(form(t).clone()) for form, t in zip(forms, plain)]
        theirs = [torch.nn.Parameter(t.clone()) for t in plain]
        others = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape, device in (((0,), "cpu"), ((3, 0), "cpu"), ((4, 3), "meta"))]
        optimizers = ClippedSGD(ours + others, lr=1.0, foreach=foreach, **options), ClippedSGD(theirs, lr=1.0, **options)
        for step in range(4):
            grads = [torch.randn(t.shape, generator=g, dtype=FP64) / 4 for t in plain]
            for p, q, form, grad in zip(ours, theirs, forms, grads):
                p.grad, q.grad = form(grad), grad
            for p in others:
                p.grad = torch.ones_like(p)
            for optimizer in optimizers:
                optimizer.step()
        for p, q, form in zip(ours, theirs, forms):
            torch.testing.assert_close(p.detach(), form(q.detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor(0.1, device="meta")])
@pytest.mark.parametrize("token_clip, update_clip", [(0.05, 1e-2), (0.05, None), (None, 1e-2), (None, None)])
def test_the_host_reads_nothing(token_clip, update_clip, lr, foreach):
    """On the meta device, whose tensors have no values."""
    params = [torch.nn.Parameter(p.to("meta")) for p in start()]
    optimizer = ClippedSGD(groups(params, token_clip), lr=0.1, update_clip=update_clip, foreach=foreach)
    for group in optimizer.param_groups:
        group["lr"] = lr
    run(optimizer, params, 3)
    assert [v is None for v in optimizer.clip_fraction.values()] == [update_clip is None, token_clip is None]


def test_compiled_in_one_graph_it_takes_the_same_steps():
    ends = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, fullgraph=True, backend="aot_eager")):
        params = start()
        lr = torch.tensor(0.5)
        optimizer = ClippedSGD(groups(params, 0.05), lr=lr, update_clip=1e-2)
        optimizer.step = wrap(optimizer.step)
        run(optimizer, params, 12, after=lambda: lr.mul_(0.9))
        ends.append(params)
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_go_on_alike(twin):
    params = start()
    optimizer = ClippedSGD(groups(params, 0.05), lr=0.1, update_clip=1e-2)
    run(optimizer, params, 10)
    again = twin(optimizer)
    assert again.clip_fraction == optimizer.clip_fraction
    copies = [p for group in again.param_groups for p in group["params"]]
    run(optimizer, params, 20, skip=10)
    run(again, copies, 20, skip=10)
    assert all(torch.equal(a, b) for a, b in zip(params, copies)) and again.clip_fraction == optimizer.clip_fraction


def test_state_dict_round_trip():
    whole, first = start(), start()
    run(ClippedSGD(groups(whole, 0.05), lr=0.1, update_clip=1e-2), whole, 20)
    optimizer = ClippedSGD(groups(first, 0.05), lr=0.1, update_clip=1e-2)
    run(optimizer, first, 10)
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    again = ClippedSGD(groups(second, None), lr=3.0)  # the saved options win
    again.load_state_dict(optimizer.state_dict())
    run(again, second, 20, skip=10)
    assert all(torch.equal(a, b) for a, b in zip(whole, second))


@pytest.mark.parametrize("foreach", [True, False])
def test_the_momentum_keeps_what_was_clipped_and_zero_gradients_move_nothing(foreach):
    w = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = ClippedSGD([w], lr=100.0, token_clip=1e-3, update_clip=1e-4, foreach=foreach)
    w.grad = torch.zeros(4, 3)
    optimizer.step()
    assert torch.equal(w, torch.ones(4, 3))
    w.grad = torch.full((4, 3), 7.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["momentum_buffer"], torch.full((4, 3), 0.7))
    torch.testing.assert_close(w.detach(), torch.full((4, 3), 1 - 1e-4))


def test_clip_fraction_counts_what_was_clipped():
    head, other = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(5))
    optimizer = ClippedSGD([{"params": [head], "token_clip": 1.0}, {"params": [other]}], lr=1.0, momentum=0.0, update_clip=0.5)
    head.grad = torch.tensor([5.0, 0.1, 0.1, 0.0])[:, None].expand(4, 3).contiguous()  # one row of four over 1
    other.grad = torch.full((5,), 2.0)                                                 # rms 2 over 0.5; head's is below
    assert optimizer.clip_fraction == {"tensors": None, "rows": None}
    optimizer.step()
    assert optimizer.clip_fraction["rows"].item() == 0.25 and optimizer.clip_fraction["tensors"].item() == 0.5


@pytest.mark.parametrize("options, words", [
    (dict(lr=-1.0), "lr"), (dict(lr=float("nan")), "lr"), (dict(lr=torch.ones(2)), "lr"), (dict(lr=1.0, momentum=1.0), "momentum"),
    (dict(lr=1.0, token_clip=0.0), "token_clip"), (dict(lr=1.0, update_clip=-1.0), "update_clip"), (dict(lr=1.0, token_clip=1.0), "2-D")])
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ClippedSGD([torch.nn.Parameter(torch.ones(3))], **options)


def test_a_group_added_after_steps():
    """One that is refused leaves the optimizer as it was."""
    params, late = start(), torch.nn.Parameter(torch.ones(3))
    optimizer = ClippedSGD(params, lr=0.1, update_clip=None)
    run(optimizer, params, 5)
    with pytest.raises(ValueError, match="2-D"):
        optimizer.add_param_group({"params": [late], "token_clip": 1.0})
    optimizer.add_param_group({"params": [late], "lr": 10.0})
    late.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.zeros(3))


@pytest.mark.parametrize("foreach", [True, False])
def test_sparse_gradients_are_refused(foreach):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        ClippedSGD(embedding.parameters(), lr=0.1, foreach=foreach).step()


def test_closure_and_parameters_without_gradient():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = ClippedSGD([a, b], lr=0.1, momentum=0.0, update_clip=None)

    def closure():
        optimizer.zero_grad()
        loss = (a ** 2).sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 3.0
    torch.testing.assert_close(a.detach(), torch.full((3,), 0.8))
    assert torch.equal(b, torch.ones(3))


def test_scale_equals_its_definition():
    """In float64, a row, a column and a number at a time."""
    params = start(FP64)[:3]
    ws, ms = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    v, lr = torch.zeros_like(ws[2]), 0.1
    optimizer = SCALE([{"params": [params[0]], "momentum": 0.8}, {"params": [params[1]], "normalize": 0},
                       {"params": [params[2]], "normalize": None}], lr)
    for step, gs in enumerate(gradients(12), 1):
        ms[0] = 0.8 * ms[0] + 0.2 * gs[0]
        for w, m in zip(ws[0], ms[0]):
            w -= lr * m / max((m * m).mean().sqrt().item(), 1e-8)
        for w, g in zip(ws[1].T, gs[1].T):
            w -= lr * g / max((g * g).mean().sqrt().item(), 1e-8)
        ms[2], v = 0.9 * ms[2] + 0.1 * gs[2], 0.999 * v + 0.001 * gs[2] ** 2
        ws[2] -= lr * (ms[2] / (1 - 0.9 ** step)) / ((v / (1 - 0.999 ** step)) ** 0.5 + 1e-8)
        for p, g in zip(params, gs):
            p.grad = g
        optimizer.step()
    for p, w in zip(params, ws):
        torch.testing.assert_close(p.detach(), w)


def test_groups_by_kind_of_tensor():
    model = LLaMA(Config.named("micro", 50))
    factors = {"embedding": 4.0, "lm_head": 2.0, "matrix": 0.5, "norm": 3.0}
    for name in ("clipped_sgd", "sgd", "adamw", "scale"):
        groups = build_optimizer(name, model, 0.1, multipliers=factors).param_groups
        assert [g["lr"] for g in groups] == [0.4, 0.2, 0.05, pytest.approx(0.3)] == [g["peak"]["lr"] for g in groups]
        assert [len(g["params"]) for g in groups] == [1, 1, 28, 9]
        assert groups[0]["params"][0] is model.model.embed_tokens.weight and groups[1]["params"][0] is model.lm_head.weight
    groups = build_optimizer("clipped_sgd", model, 0.1, row_clip=1e-4, multipliers=factors).param_groups
    assert [g["update_clip"] for g in groups] == [2e-3, 1e-3, 2.5e-4, pytest.approx(1.5e-3)]
    assert [g["token_clip"] for g in groups] == [1e-4, 1e-3, 1e-4, None] and "update_clip" not in groups[0]["peak"]
    groups = build_optimizer("clipped_sgd", model, 0.1, row_clip=1e-4, row_clip_on="embedding", schedule_update_clip=True).param_groups
    assert [g["token_clip"] for g in groups] == [1e-4, 1e-3, None, None] and groups[0]["peak"]["update_clip"] == 5e-4


@pytest.mark.parametrize("name", ["clipped_sgd", "sgd", "adamw", "scale"])
def test_build_optimizer_has_each_parameter_once_and_clips_the_output_layer_alone(name):
    model = LLaMA(Config.named("nano", 50))
    optimizer = build_optimizer(name, model, 1.0)
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    clipped = [p for group in optimizer.param_groups if group.get("token_clip") for p in group["params"]]
    assert [id(p) for p in clipped] == ([id(model.lm_head.weight)] if name == "clipped_sgd" else [])


def test_sharded_by_fsdp2_the_steps_are_the_same():
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tests" / "fsdp.py")
    assert done.returncode == 0 and done.stdout == "equal 2\n", done.stdout + done.stderr


def test_accelerate_takes_the_steps_that_it_takes_alone():
    """Prepared, with gradients accumulated over two micro-batches and a scheduler, in its ordinary loop."""
    accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
    batches = torch.randint(50, (6, 2, 4, 9), generator=torch.Generator().manual_seed(0))  # 6 steps of 2 parts of 4 x 9
    ends = []
    for prepare in (False, True):
        torch.manual_seed(0)
        model = LLaMA(Config.named("micro", 50))
        optimizer = build_optimizer("clipped_sgd", model, 100.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        if prepare:
            helper = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
            model, optimizer, scheduler = helper.prepare(model, optimizer, scheduler)
        for x in batches.flatten(0, 1) if prepare else []:
            with helper.accumulate(model):
                helper.backward(model(x[:, :-1], x[:, 1:]))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        for parts in [] if prepare else batches:
            for x in parts:
                (model(x[:, :-1], x[:, 1:]) / 2).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        ends.append(model)
    assert all(torch.equal(a, b) for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True))
