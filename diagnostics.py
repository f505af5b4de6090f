"""What the papers plot along training: quantities of a step (arXiv 2605.17787) and groups of tokens (2402.19449).

For the tensors W with gradients g, at a step that changes W by dW:
    weight-to-gradient ratio   mean over the tensors of ||W||_F / ||g||_F        [ours: the paper says "Avg." only]
    effective learning rate    rms(dW) / rms(g), over all tensors together       [ours; for plain SGD it is the lr]
    token-class imbalance      max_i ||g_i|| / mean_i ||g_i|| over the rows g_i of lm_head's gradient   (Fig. 7)

g is the gradient of the mean loss of the batch, before any clip. Values are 0-d tensors on the device: no host sync.
"""
import torch


def frequency_groups(counts, groups=10):
    """The group of each token class, 0 (frequent) to groups - 1 (rare), int64 [vocab]: with the classes in descending
    order of counts [vocab], a class falls where the middle of its share of the tokens does, so that each group holds
    about 1/groups of them (arXiv 2402.19449, appendix; the middle is ours)."""
    order = counts.argsort(descending=True, stable=True)
    share = counts[order].double() / counts.sum()
    group = torch.empty_like(order)
    group[order] = ((share.cumsum(0) - share / 2) * groups).long().clamp(max=groups - 1)
    return group


class Probe:
    """Looks at a step: `before()` when the gradients are there, `after()` when the optimizer has used them."""

    def __init__(self, model):
        self.parameters, self.head = list(model.parameters()), model.lm_head.weight

    @torch.no_grad()
    def before(self):
        grads = [p.grad for p in self.parameters]
        self.old = [p.clone() for p in self.parameters]
        norms = torch.stack(torch._foreach_norm(grads))
        self.norm = torch.linalg.vector_norm(norms)
        rows = torch.linalg.vector_norm(self.head.grad, dim=1)
        ratios = torch.stack(torch._foreach_norm(self.old)) / norms
        return {"weight_to_gradient": ratios.mean(), "imbalance": rows.max() / rows.mean()}

    @torch.no_grad()
    def after(self):
        torch._foreach_sub_(self.old, self.parameters)
        moved = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.old)))
        self.old = None
        return {"effective_lr": moved / self.norm}
