"""SGD with two clips, which let it use a learning rate of 100 ("SGD-LL", Glentis et al. 2026,
arXiv 2605.17787).

    >>> head = model.lm_head.weight
    >>> body = [p for p in model.parameters() if p is not head]
    >>> optimizer = ClippedSGD([{"params": body}, {"params": [head], "token_clip": 1e-3}], lr=100.0)

Needs torch and nothing else: copy this file into a project of your own.
"""
import torch


def _norm(m, **options):
    """L2 norm, in fp32 or better."""
    return torch.linalg.vector_norm(m, dtype=torch.promote_types(m.dtype, torch.float32), **options)


def _single_tensor(params, grads, momenta, lr, momentum, token_clip, update_clip):
    """The reference: one step on lists of tensors, in place, one tensor after the other.

    Returns two lists: the step size of each tensor (0-d), empty if update_clip is None, and the
    factor of each row ([rows, 1] per tensor), empty if token_clip is None.
    """
    step_sizes, row_factors = [], []
    for p, g, m in zip(params, grads, momenta):
        if momentum:
            m.lerp_(g, 1 - momentum)
        u, step_size = m, lr
        if token_clip is not None:  # a row of zeros has the factor inf, clamped to 1
            factor = (token_clip / _norm(u, dim=1, keepdim=True)).clamp(max=1.0)
            row_factors.append(factor)
            u = u * factor
        if update_clip is not None:
            rms = _norm(u) / u.numel() ** 0.5
            step_size = (update_clip / rms).clamp(max=lr)
            step_sizes.append(step_size)
        p.sub_(u * step_size)
    return step_sizes, row_factors


def _multi_tensor(params, grads, momenta, lr, momentum, token_clip, update_clip):
    """The same with torch._foreach_*: one call for all tensors of a group, and no copy of the
    momentum. Both clips only shrink, so the update is momentum times one factor per tensor, or one
    per row."""
    step_sizes, row_factors = [], []
    if momentum:
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
    if token_clip is not None or update_clip is not None:  # a tensor's norm is that of its rows'
        row_norms = [_norm(m, dim=-1, keepdim=True) for m in momenta]
    if token_clip is not None:
        # the norm of a finite row may overflow to inf, and inf x 0 would be nan
        row_norms = [norm.clamp(max=torch.finfo(norm.dtype).max) for norm in row_norms]
        row_factors = [(token_clip / norm).clamp_(max=1.0) for norm in row_norms]
        row_norms = torch._foreach_mul(row_norms, row_factors)  # the norms after the clip
    if update_clip is not None:
        norms = torch._foreach_norm(row_norms)
        step_sizes = [(update_clip * m.numel() ** 0.5 / norm).clamp(max=lr)
                      for m, norm in zip(momenta, norms)]

    factors = step_sizes  # of each tensor, or of each of its rows
    if token_clip is not None:
        factors = torch._foreach_mul(row_factors, step_sizes or lr)
    if factors:
        torch._foreach_addcmul_(params, momenta, factors, value=-1)
    elif isinstance(lr, torch.Tensor):  # alpha=-lr would wait for the GPU
        torch._foreach_sub_(params, torch._foreach_mul(momenta, lr))
    else:
        torch._foreach_add_(params, momenta, alpha=-lr)
    return step_sizes, row_factors


class ClippedSGD(torch.optim.Optimizer):
    """SGD with row-wise clipping of the momentum and per-tensor RMS clipping of the update.

    For each tensor w with gradient g, in this order (Glentis et al. 2026 and their release):
        m <- momentum * m + (1 - momentum) * g     zero start, no bias correction, no Nesterov
        u <- m, each row scaled down to an L2 norm of at most token_clip
        u <- u, scaled down so that lr * rms(u) is at most update_clip
        w <- w - lr * u
    The clips leave m as it is. Without them this is torch.optim.SGD with dampening = momentum, but
    for the start: torch's m begins as the first g. lr is 1 / (1 - momentum) times that of SGD
    without dampening. step() does not synchronize with the host.

    Args (all but params can differ between parameter groups):
        params: parameters or groups, of any floating dtypes. State: one tensor per parameter.
        lr: in weight units per gradient unit; 100 to 300 in the paper. A number or a 0-d tensor.
        momentum: decay of the average, in [0, 1). Default 0.9; 0 needs no state.
        token_clip: largest norm of a row of m, in gradient units, or None (default). The paper
            clips lm_head's weight [vocab, hidden] alone, whose rows are token classes, at 1e-3.
            Other matrices can be clipped in the same way (ours).
        update_clip: largest RMS of a tensor's update, in weight units, or None. Default 5e-4, the
            paper's (2e-4 at 1B). While it binds, neither lr nor its schedule changes the step.
        foreach: all tensors of a group at once (default), or the reference, one after the other.
    """
    def __init__(self, params, lr, momentum=0.9, token_clip=None, update_clip=5e-4, foreach=True):
        self._clipped = {"tensors": [], "rows": []}  # by the last step: lists of bool tensors
        super().__init__(params, dict(lr=lr, momentum=momentum, token_clip=token_clip,
                                      update_clip=update_clip, foreach=foreach))

    def __getstate__(self):  # of copies and pickles
        return {**super().__getstate__(), "_clipped": self._clipped}

    def add_param_group(self, param_group):
        super().add_param_group(param_group)  # fills in the defaults
        group = self.param_groups.pop()  # checked, then put back
        if getattr(group["lr"], "ndim", 0) or not group["lr"] >= 0:  # nan is refused, too
            raise ValueError(f"lr must be one number, at least 0, not {group['lr']}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), not {group['momentum']}")
        for name in ("token_clip", "update_clip"):
            if group[name] is not None and not group[name] > 0:
                raise ValueError(f"{name} must be above 0 or None, not {group[name]}")
        if group["token_clip"] is not None and any(p.dim() != 2 for p in group["params"]):
            raise ValueError("token_clip needs 2-D parameters: put the others in another group")
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._clipped = {"tensors": [], "rows": []}
        for group in self.param_groups:
            lists = {}  # what one torch._foreach_* call takes: one type, device, dtype and mesh
            for p in [p for p in group["params"] if p.grad is not None]:
                if p.grad.is_sparse:
                    raise RuntimeError("ClippedSGD does not support sparse gradients")
                g = m = p.grad.to(p.dtype)  # without momentum, m is g
                if group["momentum"]:  # m follows p where model.to() has converted or moved it
                    m = self.state[p].get("momentum_buffer")
                    m = torch.zeros_like(p) if m is None else m.to(p)
                    self.state[p]["momentum_buffer"] = m
                kind = type(p), p.device, p.dtype, getattr(p, "device_mesh", None)
                lists.setdefault(kind, []).append((p, g, m))
            update = _multi_tensor if group["foreach"] else _single_tensor
            options = [group[name] for name in ("lr", "momentum", "token_clip", "update_clip")]
            for tensors in lists.values():
                step_sizes, row_factors = update(*zip(*tensors), *options)
                if step_sizes:
                    self._clipped["tensors"].append(torch.stack(step_sizes) < group["lr"])
                if row_factors:
                    self._clipped["rows"].append(torch.cat(row_factors) < 1)
        return loss

    @property
    def clip_fraction(self):
        """The share of tensors and of rows that the last step's clips shrank, as 0-d tensors; None
        where a clip is off. Under FSDP2 all ranks must read it."""
        def mean(flags):
            flags = [f.full_tensor() if hasattr(f, "full_tensor") else f for f in flags]
            return torch.cat([f.flatten().to(flags[0].device) for f in flags]).float().mean()
        return {name: mean(flags) if flags else None for name, flags in self._clipped.items()}
