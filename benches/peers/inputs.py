"""The inputs of a case, the same numbers to the bit as src/verify/bench/inputs.rs makes: functions of the names alone.

Number i of tensor "t" of group "g" comes from SplitMix64, seeded with the FNV-1a hash of "g/t": the four 16-bit parts of its
output i are summed, centred and scaled to unit variance. `python inputs.py` tests it.
"""

import math

import torch

DEVIATION = math.sqrt((65536**2 - 1) / 3)


def signed(x):
    """An unsigned 64-bit number as torch.int64 holds it."""
    x %= 1 << 64
    return x - (1 << 64) if x >= 1 << 63 else x


def shifted(x, n):
    """Logical shift to the right."""
    return (x >> n) & ((1 << (64 - n)) - 1)


class Inputs:
    """The tensors of one group."""

    def __init__(self, group, device="cpu"):
        self.group, self.device = group, device

    def bits(self, tensor, end, first=0):
        """Outputs first ... end - 1 of the generator."""
        seed = 0xCBF29CE484222325
        for byte in f"{self.group}/{tensor}".encode():
            seed = (seed ^ byte) * 0x100000001B3 % (1 << 64)
        z = torch.arange(first + 1, end + 1, device=self.device) * signed(0x9E3779B97F4A7C15) + signed(seed)
        z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
        z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
        return z ^ shifted(z, 31)

    def normal(self, tensor, shape, deviation=1.0, dtype=torch.float32):
        """Numbers of mean 0 and this standard deviation, made 16 million at a time."""
        count, step = math.prod(shape), 1 << 24
        out = torch.empty(count, dtype=dtype, device=self.device)
        for first in range(0, count, step):
            bits = self.bits(tensor, min(count, first + step), first)
            total = sum(shifted(bits, 16 * i) & 0xFFFF for i in range(4))
            numbers = (total.double() - 131070.0) / DEVIATION * deviation
            out[first : first + step] = numbers.float().to(dtype)
        return out.view(shape)

    def ids(self, tensor, count, end):
        return shifted(self.bits(tensor, count), 33) % end

    def choices(self, counts, tokens):
        """Experts of each token, ascending, [T, K], such that expert e has counts[e] of them."""
        order = torch.argsort(shifted(self.bits("order", tokens), 1), stable=True)
        counts = torch.tensor(counts, device=self.device)
        row = torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts)
        chosen = torch.empty(tokens, len(row) // tokens, dtype=torch.int64, device=self.device)
        chosen[order] = row.view(-1, tokens).T
        return chosen


def test():
    """The same numbers stand in src/verify/bench/inputs.rs."""
    inputs = Inputs("grouped gemm")
    assert inputs.ids("ids", 4, 1000).tolist() == [321, 305, 525, 74]
    bits = inputs.normal("x", [4], 0.5).view(torch.int32).tolist()
    assert bits == [signed(b) for b in (0x3EDF877F, 0xBDE4FB87 - (1 << 32), 0x3EF01417, 0x3F19303A)], bits
    chosen = inputs.choices([3, 2, 2, 1], 4)
    assert torch.bincount(chosen.flatten()).tolist() == [3, 2, 2, 1]
    assert (chosen[:, 0] < chosen[:, 1]).all()


if __name__ == "__main__":
    test()
