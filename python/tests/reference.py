"""An MoE layer with default vectors in plain loops over tokens and experts, in NumPy float64, forward and backward.

Written only from the formulas. Does not use autograd, PyTorch or code of the package.
"""

import numpy as np


def silu(a):
    return a / (1 + np.exp(-a))


def silu_derivative(a):
    s = 1 / (1 + np.exp(-a))
    return s * (1 + a * (1 - s))


def expert(x, gate, up, down):
    """e [D] for x [D]; gate, up [F, D], down [D, F]."""
    return down @ (silu(gate @ x) * (up @ x))


def expert_backward(x, gate, up, down, de):
    """Gradients (dx, dgate, dup, ddown) for the incoming gradient de [D]."""
    a, b = gate @ x, up @ x
    h = silu(a) * b
    dh = down.T @ de
    da, db = dh * b * silu_derivative(a), dh * silu(a)
    return gate.T @ da + up.T @ db, np.outer(da, x), np.outer(db, x), np.outer(de, h)


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def chosen(p, k):
    """The k most probable experts. Of equally probable experts, those with the lower index are chosen."""
    return sorted(range(len(p)), key=lambda i: (-p[i], i))[:k]


class Layer:
    """Weights: router [E, D]; gate, up [E, F, D]; down [E, D, F]; vectors ê [E, D]."""

    def __init__(self, router, gate, up, down, vectors, k, renormalize):
        self.router, self.gate, self.up, self.down = router, gate, up, down
        self.vectors, self.k, self.renormalize = vectors.copy(), k, renormalize
        self.experts = len(router)

    def run(self, x, i):
        return expert(x, self.gate[i], self.up[i], self.down[i])

    def update(self, tokens, beta, weighted, weight_norm):
        """ê_i ← β ê_i + (1 − β) m_i over the tokens [T, D] of one micro-batch."""
        sums, masses, counts = np.zeros_like(self.vectors), np.zeros(self.experts), np.zeros(self.experts)
        for x in tokens:
            p = softmax(self.router @ x)
            for i in chosen(p, self.k):
                weight = p[i] if weighted else 1.0
                sums[i] += weight * self.run(x, i)
                masses[i] += weight
                counts[i] += 1
        for i in range(self.experts):
            if counts[i] == 0:
                continue
            divisor = counts[i] if weight_norm == "count" else masses[i]
            self.vectors[i] = beta * self.vectors[i] + (1 - beta) * sums[i] / divisor

    def forward(self, tokens, use_vectors):
        out = np.zeros_like(tokens)
        for t, x in enumerate(tokens):
            p = softmax(self.router @ x)
            on = chosen(p, self.k)
            q = p / p[on].sum() if self.renormalize else p
            for i in range(self.experts):
                if i in on:
                    out[t] += q[i] * self.run(x, i)
                elif use_vectors:
                    out[t] += q[i] * self.vectors[i]
        return out

    def backward(self, tokens, g, use_vectors):
        """Gradients for the incoming g [T, D]: tokens, router, gate, up, down."""
        dx, drouter = np.zeros_like(tokens), np.zeros_like(self.router)
        dgate, dup, ddown = np.zeros_like(self.gate), np.zeros_like(self.up), np.zeros_like(self.down)
        for t, x in enumerate(tokens):
            p = softmax(self.router @ x)
            on = chosen(p, self.k)
            q = p / p[on].sum() if self.renormalize else p
            s = np.zeros(self.experts)
            for i in range(self.experts):
                if i in on:
                    s[i] = g[t] @ self.run(x, i)
                elif use_vectors:
                    s[i] = g[t] @ self.vectors[i]
            dz = np.zeros(self.experts)
            for j in range(self.experts):
                if not self.renormalize:
                    dz[j] = p[j] * (s[j] - (p * s).sum())
                elif use_vectors or j in on:
                    dz[j] = q[j] * (s[j] - ((q * s).sum() if j in on else 0.0))
            drouter += np.outer(dz, x)
            dx[t] += self.router.T @ dz
            for i in on:
                own = expert_backward(x, self.gate[i], self.up[i], self.down[i], q[i] * g[t])
                dx[t] += own[0]
                dgate[i] += own[1]
                dup[i] += own[2]
                ddown[i] += own[3]
        return dx, drouter, dgate, dup, ddown
