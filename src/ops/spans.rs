//! Causal attention over sequences of any length, some of which share a prefix. It has no gradients and is used for
//! evaluation.
//!
//! A span is a range of consecutive rows. It may continue another span, its prefix. Its rows then attend to all rows
//! of the prefix and, causally, to the rows of their own span, and their positions continue those of the prefix. For
//! example, several answers to one question need the rows of the question only once.
//!
//! On a device with kernels the spans are packed documents of one long sequence, each after a copy of the rows of its
//! prefix.

use super::attention::kernels;
use super::attention::reference::forward_from;
use super::embedding::kernels::forward as gather;
use super::heads::Heads;
use super::rope::{RopeTables, rope_at};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::with_real;
use std::ops::Range;

/// Sequences as consecutive ranges of rows.
#[derive(Clone, Debug, Default)]
pub struct Spans {
    spans: Vec<Span>,
}

#[derive(Clone, Debug)]
struct Span {
    rows: Range<usize>,
    /// The rows of the prefix; empty if the span has none.
    before: Range<usize>,
}

impl Span {
    fn length(&self) -> usize {
        self.before.len() + self.rows.len()
    }
}

impl Spans {
    /// Adds a sequence of `length` > 0 rows and returns its number.
    pub fn add(&mut self, length: usize) -> usize {
        let begin = self.rows();
        self.push(begin..begin + length, 0..0)
    }

    /// Adds `length` > 0 rows that continue the sequence with number `first`, and returns the number of the new span.
    ///
    /// # Errors
    /// Returns an error when there is no such sequence, or that sequence itself has a prefix.
    pub fn add_behind(&mut self, first: usize, length: usize) -> Result<usize> {
        let begin = self.rows();
        match self.spans.get(first) {
            Some(span) if span.before.is_empty() => {
                let before = span.rows.clone();
                Ok(self.push(begin..begin + length, before))
            }
            _ => Err(Error::invalid(
                "spans",
                "the number of a sequence without a prefix",
                first.to_string(),
                "pass a number that `add` returned",
            )),
        }
    }

    fn push(&mut self, rows: Range<usize>, before: Range<usize>) -> usize {
        self.spans.push(Span { rows, before });
        self.spans.len() - 1
    }

    /// Returns the number of rows of all spans.
    pub fn rows(&self) -> usize {
        self.spans.last().map_or(0, |s| s.rows.end)
    }

    /// Returns the length of the longest sequence including its prefix; 0 if a span has no row.
    pub fn longest(&self) -> usize {
        if self.spans.iter().any(|s| s.rows.is_empty()) {
            return 0;
        }
        self.spans.iter().map(Span::length).max().unwrap_or(0)
    }

    /// RoPE and attention of `qkv [rows, (H + 2 KV) hd]`; returns `[rows, H hd]`.
    ///
    /// # Errors
    /// Returns an error when `qkv` does not have this number of rows or the layout of `heads`, or the tables are too
    /// short.
    pub fn attention(&self, qkv: &Tensor, heads: Heads, tables: &RopeTables) -> Result<Tensor> {
        let positions: Vec<usize> = self
            .spans
            .iter()
            .flat_map(|s| s.before.len()..s.length())
            .collect();
        let qkv = rope_at(qkv, heads, &positions, tables)?;
        if qkv.device() != Device::Cpu {
            return self.attention_kernels(&qkv, heads);
        }
        let (width, out_width) = (heads.row_width(), heads.query * heads.dim);
        let mut out = Tensor::unspecified(qkv.device(), qkv.dtype(), [self.rows(), out_width]);
        with_real!(qkv.dtype(), "attention", |T| {
            let qkv = qkv.slice::<T>();
            let rows = |r: &Range<usize>| &qkv[r.start * width..r.end * width];
            let mut rest = out.slice_mut::<T>();
            let mut joined = Vec::new();
            for span in &self.spans {
                let (own, later) = rest.split_at_mut(span.rows.len() * out_width);
                rest = later;
                let whole = if span.before.is_empty() {
                    rows(&span.rows)
                } else {
                    joined.clear();
                    joined.extend_from_slice(rows(&span.before));
                    joined.extend_from_slice(rows(&span.rows));
                    &joined
                };
                forward_from(own, whole, heads, span.before.len());
            }
            Ok(out)
        })
    }

    /// [`attention`](Self::attention) of rows that are already rotated.
    fn attention_kernels(&self, qkv: &Tensor, heads: Heads) -> Result<Tensor> {
        let (mut rows, mut first_key, mut own) = (Vec::new(), Vec::new(), Vec::new());
        for span in &self.spans {
            let begin = rows.len();
            rows.extend(span.before.clone().chain(span.rows.clone()));
            own.extend(begin + span.before.len()..rows.len());
            first_key.resize(rows.len(), begin);
        }
        let numbers = |list: &[usize]| {
            let list: Vec<i32> = list.iter().map(|&i| i as i32).collect();
            Tensor::from_slice([list.len()], &list).on(qkv.device())
        };
        let gathered = |from: &Tensor, rows: &[usize]| -> Result<Tensor> {
            let shape = [rows.len(), from.shape().width()];
            let mut to = Tensor::unspecified(from.device(), from.dtype(), shape);
            gather(&mut to, from, &numbers(rows))?;
            Ok(to)
        };
        let whole = gathered(qkv, &rows)?;
        let first_key = numbers(&first_key);
        let [out, _] = kernels::forward(&whole, Some(&first_key), heads, rows.len())?;
        gathered(&out, &own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::attention;
    use crate::ops::rope::rope;
    use crate::tape::check::normal_numbers;
    use crate::tape::{Tape, Var};
    use crate::tensor::dtype::DType;

    const HEADS: Heads = Heads {
        query: 4,
        key_value: 2,
        dim: 6,
    };

    fn tables() -> RopeTables {
        RopeTables::new(DType::F64, 200, HEADS.dim, 10_000.0).unwrap()
    }

    /// Computes the attention of one sequence with the operations used in training.
    fn alone(qkv: &[f64]) -> Vec<f64> {
        let length = qkv.len() / HEADS.row_width();
        let qkv = Tensor::from_slice([length, HEADS.row_width()], qkv);
        let tape = Tape::new();
        let turned = rope(&tape, &Var::constant(qkv), HEADS, length, &tables()).unwrap();
        let out = attention(&tape, &turned, HEADS, length, None).unwrap();
        out.tensor().slice::<f64>().to_vec()
    }

    #[test]
    fn spans_match_each_complete_sequence_computed_alone() {
        let width = HEADS.row_width();
        // A sequence of 70 rows, three spans of 1, 130 and 3 rows that continue it, and a separate sequence of 5
        // rows.
        let mut spans = Spans::default();
        let first = spans.add(70);
        let behind = [1, 130, 3].map(|n| (spans.add_behind(first, n).unwrap(), n));
        let single = spans.add(5);
        assert_eq!((behind[2].0, single), (3, 4));
        assert_eq!((spans.rows(), spans.longest()), (70 + 134 + 5, 200));
        let qkv = normal_numbers(spans.rows() * width, 31);
        let tensor = Tensor::from_slice([spans.rows(), width], &qkv);
        let found = spans.attention(&tensor, HEADS, &tables()).unwrap();
        let found = found.slice::<f64>();
        let out_width = HEADS.query * HEADS.dim;
        let compare = |from: usize, before: usize, expected: &[f64]| {
            let expected = &expected[before * out_width..];
            let found = &found[from * out_width..][..expected.len()];
            for (a, b) in found.iter().zip(expected) {
                assert!((a - b).abs() <= 1e-12, "{a} is not {b}");
            }
        };
        compare(0, 0, &alone(&qkv[..70 * width]));
        let mut at = 70;
        for (_, n) in behind {
            let own = &qkv[at * width..(at + n) * width];
            compare(at, 70, &alone(&[&qkv[..70 * width], own].concat()));
            at += n;
        }
        compare(at, 0, &alone(&qkv[at * width..]));
    }

    #[test]
    fn the_kernels_agree_with_the_cpu_within_one_percent() {
        let heads = Heads {
            query: 4,
            key_value: 2,
            dim: 64,
        };
        let tables = RopeTables::new(DType::F32, 200, heads.dim, 10_000.0).unwrap();
        let mut spans = Spans::default();
        spans.add(1);
        let first = spans.add(70);
        for length in [1, 130, 3] {
            spans.add_behind(first, length).unwrap();
        }
        let numbers = normal_numbers(spans.rows() * heads.row_width(), 32);
        let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
        let shape = [spans.rows(), heads.row_width()];
        let qkv = Tensor::from_slice(shape, &numbers).narrowed();
        let found = spans.attention(&qkv.on(Device::Sim), heads, &tables);
        let cpu = spans.attention(&qkv.widened(), heads, &tables).unwrap();
        let (found, cpu) = (found.unwrap().to_f64().unwrap(), cpu.to_f64().unwrap());
        for (row, (a, b)) in found.chunks(64).zip(cpu.chunks(64)).enumerate() {
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
            let size = norm(&mut b.iter().copied());
            assert!(
                error <= 0.01 * size,
                "head row {row} is off by {error:.1e} of {size:.1e}"
            );
        }
    }

    #[test]
    fn a_span_can_only_continue_a_sequence_without_a_prefix() {
        let mut spans = Spans::default();
        let first = spans.add(3);
        let second = spans.add_behind(first, 2).unwrap();
        assert!(spans.add_behind(second, 2).is_err());
        assert!(spans.add_behind(7, 2).is_err());
        spans.add(0);
        assert_eq!(spans.longest(), 0);
    }
}
