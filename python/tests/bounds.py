"""Float64 values with bounds on the error of a kernel that sums in f32 and rounds its results to bf16."""

import torch

F32 = 2.0**-24
"""Unit roundoff of float32."""


class Bounded:
    """A float64 tensor, and the largest allowed error of each element of a kernel's result."""

    def __init__(self, value, error=None):
        self.value = value.detach().double()
        self.error = torch.zeros_like(self.value) if error is None else error

    def size(self):
        return self.value.abs() + self.error

    def __getitem__(self, index):
        return Bounded(self.value[index], self.error[index])

    def t(self):
        return Bounded(self.value.t(), self.error.t())

    def __neg__(self):
        return Bounded(-self.value, self.error)

    def __add__(self, other):
        value = self.value + other.value
        return Bounded(value, self.error + other.error + F32 * (self.size() + other.size()))

    def __sub__(self, other):
        return self + -other

    def __mul__(self, other):
        value = self.value * other.value
        error = self.size() * other.size() - value.abs()
        return Bounded(value, error + F32 * (value.abs() + error))

    def __matmul__(self, other):
        """A sum of products in f32, in any order."""
        size = self.size() @ other.size()
        value = self.value @ other.value
        return Bounded(value, size - self.value.abs() @ other.value.abs() + F32 * (self.value.shape[-1] + 4) * size)

    def sum(self, dim):
        terms = self.value.shape[dim]
        return Bounded(self.value.sum(dim), self.error.sum(dim) + F32 * (terms + 4) * self.size().sum(dim))

    def function(self, value, slope, relative):
        """A function f of this tensor: its value, the largest |f'|, and the relative error of f itself."""
        return Bounded(value, slope * self.error + relative * value.abs() + 1e-37)

    def silu(self):
        """silu and its derivative. The exponential function of a GPU has an error of at most 16 + 4 |x| unit roundoffs."""
        x, s = self.value, self.value.sigmoid()
        relative = F32 * (16 + 4 * x.abs())
        derivative = s * (1 + x * (1 - s))
        slope = Bounded(derivative, s * relative * (1 + 2 * x.abs()) + 0.5 * self.error + 1e-37)
        return self.function(x * s, 1.1, relative), slope

    def rounded(self):
        """This tensor rounded to bf16."""
        return Bounded(self.value, self.error + half_ulp(self.size()))


def half_ulp(x):
    """Half the distance between neighbouring bf16 values at x."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x.abs().clamp(min=2.0**-126)).exponent - 9)


def holds(got, want, what="", limit=4e-3):
    """Asserts that every element of ``got`` is within its bound, and that the relative error by norm is at most ``limit``.

    Each rounding to bf16 causes a relative error by norm of about 1.6e-3.
    """
    got = got.detach().double()
    assert got.shape == want.value.shape, f"{what}: {got.shape}, {want.value.shape}"
    error = (got - want.value).abs()
    assert (error <= want.error + 1e-37).all(), f"{what}: {(error / (want.error + 1e-37)).max():.3f} of its bound"
    relative = error.norm() / want.value.norm().clamp(min=1e-30)
    assert relative <= limit or error.max() <= 1e-37, f"{what}: relative error {relative:.1e}"
