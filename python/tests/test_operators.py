"""Compares operators with loops in float64, forward and backward, within the error bounds of the kernels' arithmetic."""

import pytest
import torch
from bounds import F32, Bounded, half_ulp, holds

ops = pytest.importorskip("routegrad.torch.ops", exc_type=ImportError)
from moe_case import BF16, Moe, empty, normal  # noqa: E402


def stored(bounded, dtype):
    return bounded.rounded() if dtype == BF16 else bounded


def test_dispatch_sorts_slots_by_expert():
    moe = Moe()
    maps = moe.maps
    assert maps.row_token.tolist() == [t for _, t, _ in moe.rows]
    assert maps.row_slot.tolist() == [t * moe.top_k + k for _, t, k in moe.rows]
    assert [maps.slot_row[t, k].item() for _, t, k in moe.rows] == list(range(len(moe.rows)))
    counts = [sum(e == i for e, _, _ in moe.rows) for i in range(moe.experts)]
    assert maps.offsets.diff().tolist() == counts and counts[1] == 0


@pytest.mark.parametrize("bias", [False, True])
def test_router_scores_choices_and_gradients(bias):
    tokens, experts, hidden, top_k = 140, 6, 40, 2
    x, weight = normal(tokens, hidden, grad=True), normal(experts, hidden, scale=0.3, dtype=torch.float32, grad=True)
    selection = torch.tensor([0.0, 0.4, 0, 0, -0.4, 0]) if bias else None
    scores, choices, z_loss = ops.router(x, weight, top_k, selection)
    for t in range(tokens):
        z = Bounded(x[t : t + 1]) @ Bounded(weight).t()
        widest = z.error.max()
        p, lse = z.value.softmax(1), z.value.logsumexp(1)
        relative = 2 * widest + F32 * (16 + 4 * (z.value - lse).abs().max() + experts)
        holds(scores[t], Bounded(p[0], p[0] * relative), f"p of token {t}")
        ranked = scores[t].detach() + (selection if bias else 0)
        assert choices[t].tolist() == sorted(sorted(range(experts), key=lambda e: (-ranked[e], e))[:top_k])
    lse = (x.detach().double() @ weight.detach().double().t()).logsumexp(1)
    assert abs(z_loss.item() - lse.square().mean()) <= 1e-5 * lse.square().mean()
    # The backward pass, computed from the scores of the forward pass.
    dscores, dz_loss = torch.randn(tokens, experts), torch.tensor(0.7)
    torch.autograd.backward([scores, z_loss], [dscores, dz_loss])
    p, d = scores.detach().double(), dscores.double()
    square = 0.7 * 2 / tokens * lse[:, None]
    dz = p * (d - (p * d).sum(1, keepdim=True) + square)
    size = p * (d.abs() + (p * d.abs()).sum(1, keepdim=True) + square.abs())
    dz = Bounded(dz, F32 * (experts + 16) * size + 1e-5 * p * square.abs())
    split = 3 / 2**18  # The kernel splits the operands of the products into bf16 terms.
    dx, dw = dz @ Bounded(weight), dz.t() @ Bounded(x)
    dx.error += split * (dz.size() @ weight.detach().double().abs())
    dw.error += split * (dz.size().t() @ x.detach().double().abs())
    holds(x.grad, dx.rounded(), "dx")
    holds(weight.grad, dw, "dweight")


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_grouped_products(dtype):
    moe = Moe(weights=dtype)
    offsets, rows = moe.maps.offsets, len(moe.rows)
    x, dout = normal(rows, moe.hidden, grad=True), normal(rows, 2 * moe.ffn)
    out = ops.grouped_gemm(x, moe.gate_up, offsets)
    out.backward(dout)
    assert (moe.gate_up.grad.dtype, moe.gate_up.grad[1].abs().max()) == (dtype, 0)
    for e in range(moe.experts):
        run, w = slice(offsets[e], offsets[e + 1]), moe.weight("gate_up", e)
        holds(out[run], (Bounded(x[run]) @ w.t()).rounded(), f"expert {e}")
        holds(x.grad[run], (Bounded(dout[run]) @ w).rounded(), f"dx of expert {e}")
        holds(moe.gate_up.grad[e], stored(Bounded(dout[run]).t() @ Bounded(x[run]), dtype), f"dW of expert {e}")


def test_second_derivatives_of_the_grouped_products():
    moe = Moe(weights=BF16)
    offsets, rows = moe.maps.offsets, len(moe.rows)
    dout, x, w = normal(rows, 2 * moe.ffn, grad=True), normal(rows, moe.hidden, grad=True), moe.gate_up
    gradient = normal(rows, moe.hidden)
    ops.grouped_gemm_input_gradient(dout, w, offsets).backward(gradient)
    dw_gradient = normal(*w.shape, dtype=torch.float32)
    given = dout.grad.clone()
    dout.grad = None
    ops.grouped_gemm_weight_gradient(dout, x, offsets).backward(dw_gradient)
    for e in range(moe.experts):
        run, ddw = slice(offsets[e], offsets[e + 1]), Bounded(dw_gradient[e].to(BF16))
        holds(given[run], (Bounded(gradient[run]) @ moe.weight("gate_up", e).t()).rounded(), "ddout")
        holds(w.grad[e], (Bounded(dout[run]).t() @ Bounded(gradient[run])).rounded(), "dW")
        holds(dout.grad[run], (Bounded(x[run]) @ ddw.t()).rounded(), "ddout")
        holds(x.grad[run], (Bounded(dout[run]) @ ddw).rounded(), "dx")


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("with_vectors", [False, True])
def test_experts_forward_and_every_gradient(dtype, with_vectors):
    moe = Moe(weights=dtype)
    vectors = moe.vectors if with_vectors else None
    y = ops.swiglu_experts(moe.x, moe.gates, moe.gate_up, moe.down, moe.maps, vectors)
    y.backward(moe.dy)
    want_y, want_dx = empty(moe.tokens, moe.hidden), empty(moe.tokens, moe.hidden)
    want_gates = empty(moe.tokens, moe.experts)
    chosen = torch.zeros(moe.tokens, moe.experts, dtype=bool).scatter(1, moe.choices, True)
    for e in range(moe.experts):
        _, t = moe.rows_of(e)
        gate = moe.gates[t, e].detach()
        rows = moe.expert(moe.x[t], e)[2].rounded()
        dgate_up, ddown, dx, dots = moe.expert_backward(moe.x[t].detach(), e, moe.dy[t], gate)
        for want, part in [(want_y, Bounded(gate[:, None]) * rows), (want_dx, dx)]:
            added = want[t] + part
            want.value[t], want.error[t] = added.value, added.error
        want_gates.value[t, e], want_gates.error[t, e] = dots.value, dots.error
        holds(moe.gate_up.grad[e], stored(dgate_up, dtype), f"dgate_up of expert {e}", limit=8e-3)
        holds(moe.down.grad[e], stored(ddown, dtype), f"ddown of expert {e}", limit=8e-3)
    if with_vectors:
        off = Bounded(moe.gates * ~chosen) @ Bounded(moe.vectors)
        want_y = want_y + Bounded(off.value, off.error + off.size() * 2.0**-16 * 8)
        dots = Bounded(moe.dy) @ Bounded(moe.vectors).t()
        dots.error += 3 / 2**18 * (moe.dy.double().abs() @ moe.vectors.double().abs().t())
        want_gates.value[~chosen], want_gates.error[~chosen] = dots.value[~chosen], dots.error[~chosen]
    holds(y, want_y.rounded(), "y")
    holds(moe.x.grad, want_dx.rounded(), "dx", limit=8e-3)
    holds(moe.gates.grad, want_gates, "dgates", limit=8e-3)


def test_rows_and_combine_equal_the_fused_operator():
    moe = Moe()
    rows, _ = ops.swiglu_expert_rows(moe.x, moe.gate_up, moe.down, moe.maps)
    rows.retain_grad()
    y = ops.combine(rows, moe.gates, moe.maps, moe.vectors)
    assert torch.equal(y, ops.swiglu_experts(moe.x, moe.gates, moe.gate_up, moe.down, moe.maps, moe.vectors))
    y.backward(moe.dy)
    chosen = torch.zeros(moe.tokens, moe.experts, dtype=bool).scatter(1, moe.choices, True)
    dots = Bounded(moe.dy) @ Bounded(moe.vectors).t()
    dots.error += 3 / 2**18 * (moe.dy.double().abs() @ moe.vectors.double().abs().t())
    holds(moe.gates.grad[~chosen], dots[~chosen], "dgates outside A")
    for e in range(moe.experts):
        r, t = moe.rows_of(e)
        if not r:
            continue
        drows = (Bounded(moe.gates[t, e][:, None]) * Bounded(moe.dy[t])).rounded()
        holds(rows.grad[r], drows, f"drows of expert {e}")
        holds(moe.gates.grad[t, e], (Bounded(moe.dy[t]) * Bounded(rows[r])).sum(1), f"dgates of expert {e}")
        ones = torch.ones(len(t))
        dgate_up, ddown, _, _ = moe.expert_backward(moe.x[t].detach(), e, rows.grad[r], ones)
        holds(moe.gate_up.grad[e], dgate_up.rounded(), f"dgate_up of expert {e}", limit=8e-3)
        holds(moe.down.grad[e], ddown.rounded(), f"ddown of expert {e}", limit=8e-3)


def test_second_derivatives_of_combine():
    """Compares with autograd in float64. Values are rounded to bf16 between the products, so they differ by some 1e-3."""
    moe = Moe(tokens=9)
    rows, gates, dy = normal(18, 24, grad=True), moe.gates, normal(9, 24, grad=True)
    directions = torch.randn(18, 24), torch.randn(9, 5)

    def second(y, rows, gates, dy):
        first = torch.autograd.grad(y, (rows, gates), dy, create_graph=True)
        total = sum((d * g).sum() for d, g in zip(directions, first, strict=True))
        return torch.autograd.grad(total, (rows, gates, dy))

    exact = [t.detach().double().requires_grad_() for t in (rows, gates, dy)]
    chosen = torch.zeros(9, 5, dtype=torch.float64).scatter(1, moe.choices, 1.0)
    own = exact[0][moe.maps.slot_row.long()] * exact[1].gather(1, moe.choices).unsqueeze(2)
    y = own.sum(1) + (exact[1] * (1 - chosen)) @ moe.vectors.double()
    found = second(ops.combine(rows, gates, moe.maps, moe.vectors), rows, gates, dy)
    for got, want in zip(found, second(y, *exact), strict=True):
        assert (got.double() - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("weighting", ["plain", "sum_p", "count"])
def test_means_and_moving_average(weighting):
    moe = Moe(tokens=150)
    weights = None if weighting == "plain" else moe.gates.detach()
    _, column_sums = ops.swiglu_expert_rows(moe.x, moe.gate_up, moe.down, moe.maps, weights)
    sums, masses = ops.expert_sums(column_sums, moe.maps, weights)
    vectors = moe.vectors.clone()
    ops.expert_mean_update(vectors, sums, masses, 0.75, weighting)
    assert torch.equal(vectors[1], moe.vectors[1])
    for e in range(moe.experts):
        r, t = moe.rows_of(e)
        weight = torch.ones(len(t)) if weights is None else weights[t, e]
        total = (Bounded(weight[:, None]) * moe.expert(moe.x[t], e)[2]).sum(0)
        holds(sums[e], total, f"sums of expert {e}")
        mass = weight.double().sum().item()
        assert masses[e].tolist() == pytest.approx([mass, len(r)], rel=1e-5)
        if r:
            divisor = mass if weighting == "sum_p" else len(r)
            want = 0.75 * moe.vectors[e].double() + 0.25 * total.value / divisor
            holds(vectors[e], Bounded(want, total.error / divisor + 1e-5 * (want.abs() + 1)), f"vector of expert {e}")


def test_gate_gradient_adds_the_partial_sums_of_each_row():
    moe = Moe()
    dots = torch.randn(len(moe.rows), 3, requires_grad=True)
    dy = moe.dy.clone().requires_grad_()
    found = ops.gate_gradient(dots, dy, moe.maps, moe.experts, moe.vectors)
    back = torch.randn_like(found)
    found.backward(back)
    want_dots, off = torch.zeros(dots.shape), back.clone()
    for r, (e, t, _) in enumerate(moe.rows):
        holds(found[t, e], Bounded(dots[r]).sum(0), f"row {r}")
        want_dots[r], off[t, e] = back[t, e], 0
    assert torch.equal(dots.grad, want_dots)
    holds(dy.grad, (Bounded(off) @ Bounded(moe.vectors)).rounded(), "ddy")
    assert not ops.gate_gradient(dots, dy, moe.maps, moe.experts)[:, 1].any()


@pytest.mark.parametrize(("heads", "key_value_heads", "documents"), [(2, 2, False), (4, 2, True)])
def test_attention(heads, key_value_heads, documents):
    batch, sequence, d = 2, 70, 64
    qkv = normal(batch * sequence, (heads + 2 * key_value_heads) * d, grad=True)
    first = torch.tensor([0] * 20 + [20] * 50, dtype=torch.int32).repeat(batch) if documents else None
    out = ops.attention(qkv, sequence, heads, key_value_heads, first)
    dout = normal(*out.shape)
    out.backward(dout)
    parts = qkv.detach().view(batch, sequence, -1, d)
    want = empty(batch, sequence, heads + 2 * key_value_heads, d)
    position = torch.arange(sequence)
    seen = position[None] <= position[:, None]
    if documents:
        seen &= position[None] >= first[:sequence, None]
    for b in range(batch):
        for head in range(heads):
            key, value = heads + head * key_value_heads // heads, heads + key_value_heads + head * key_value_heads // heads
            q, k, v = (Bounded(parts[b, :, i]) for i in (head, key, value))
            scores = q @ k.t() * Bounded(torch.tensor(d**-0.5))
            p = scores.value.masked_fill(~seen, -torch.inf).softmax(1)
            off = 2 * scores.error.amax(1, keepdim=True) + F32 * (64 + 8 * scores.value.abs().amax(1, keepdim=True))
            rounded = Bounded(p, p * (off + 2.0**-8))
            here = slice(b * sequence, (b + 1) * sequence), slice(head * d, (head + 1) * d)
            holds(out[here], (rounded @ v).rounded(), "out")
            g, o = Bounded(dout[here]), Bounded(out[here])
            ds = Bounded(p, p * off) * (g @ v.t() - (g * o).sum(1)[:, None])
            ds.value, ds.error = ds.value.masked_fill(~seen, 0), ds.error.masked_fill(~seen, 0)
            scale = Bounded(torch.tensor(d**-0.5))
            gradients = [(head, ds.rounded() @ k * scale), (key, ds.rounded().t() @ q * scale), (value, rounded.t() @ g)]
            for place, gradient in gradients:
                added = want[b, :, place] + gradient
                want.value[b, :, place], want.error[b, :, place] = added.value, added.error
    holds(qkv.grad.view(batch, sequence, -1, d), want.rounded(), "dqkv", limit=8e-3)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_cross_entropy_of_each_token_and_its_gradients(dtype):
    tokens, vocabulary, hidden = 50, 72, 32
    x, weight = normal(tokens, hidden, grad=True), normal(vocabulary, hidden, scale=0.3, dtype=dtype, grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    losses = ops.token_losses(x, weight, targets)
    dlosses = torch.rand(tokens)
    losses.backward(dlosses)
    w = Bounded(weight.to(BF16))
    z = Bounded(x) @ w.t()
    lse = z.value.logsumexp(1)
    bound = 2 * z.error.amax(1) + F32 * (16 + 4 * z.value.abs().amax(1))
    holds(losses, Bounded(lse - z.value[range(tokens), targets], bound), "losses")
    p = z.value.softmax(1)
    dz = p.clone()
    dz[range(tokens), targets] -= 1
    relative = 2 * z.error.amax(1, keepdim=True) + F32 * (64 + 8 * z.value.abs().amax(1, keepdim=True))
    dz = Bounded(dz, p * relative + F32 * dz.abs()).rounded()
    dz = (dz * Bounded(dlosses[:, None])).rounded()
    holds(x.grad, (dz @ w).rounded(), "dx")
    holds(weight.grad, stored(dz.t() @ Bounded(x), dtype), "dweight")


def test_the_mean_cross_entropy_excludes_ignored_targets():
    x, weight = normal(6, 16, grad=True), normal(24, 16)
    targets = torch.tensor([3, -100, 5, 23, -100, 0])
    loss = ops.cross_entropy(x, weight, targets)
    logits = x.detach().double() @ weight.double().t()
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    loss.backward()
    assert not x.grad[targets < 0].any() and x.grad[targets >= 0].any(dim=1).all()


def test_a_batch_without_tokens_gives_no_rows_and_zero_gradients():
    moe = Moe()
    x, choices = normal(0, moe.hidden, grad=True), torch.zeros(0, 2, dtype=torch.int64)
    scores, _, z_loss = ops.router(x, normal(moe.experts, moe.hidden, dtype=torch.float32), 2)
    y = ops.swiglu_experts(x, scores, moe.gate_up, moe.down, ops.dispatch(choices, moe.experts))
    (y.sum() + z_loss).backward()
    assert (y.shape, x.grad.shape, z_loss.item()) == (x.shape, x.shape, 0.0)
    assert moe.gate_up.grad.abs().max() == 0 == moe.down.grad.abs().max()
    assert ops.attention(normal(0, 3 * 64), 8, 1).shape == (0, 64)
    assert ops.token_losses(normal(0, 16), normal(24, 16), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_half_ulp():
    for value, want in [(1.0, 2.0**-8), (1.99, 2.0**-8), (2.0, 2.0**-7), (0.75, 2.0**-9)]:
        assert half_ulp(torch.tensor(value, dtype=torch.float64)).item() == want
