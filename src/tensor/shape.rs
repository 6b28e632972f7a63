//! Extents of a tensor: up to four, row-major, the last one contiguous.

use std::fmt;
use std::ops::Deref;

/// The extents of a tensor, outermost first. A scalar has none.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    extents: [usize; 4],
    rank: usize,
}

impl Shape {
    /// Returns the number of elements; 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.iter().product()
    }

    /// Returns the extent of the last axis; 1 for a scalar.
    pub fn width(&self) -> usize {
        self.last().copied().unwrap_or(1)
    }

    /// Returns the number of rows of [`width`](Self::width) elements.
    pub fn rows(&self) -> usize {
        self.iter().rev().skip(1).product()
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.extents[..self.rank]
    }
}

impl From<&[usize]> for Shape {
    /// # Panics
    /// Panics when there are more than four extents.
    fn from(s: &[usize]) -> Self {
        assert!(s.len() <= 4, "a tensor has at most four axes, got {s:?}");
        let mut extents = [1; 4];
        extents[..s.len()].copy_from_slice(s);
        Shape {
            extents,
            rank: s.len(),
        }
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(s: [usize; N]) -> Self {
        Shape::from(s.as_slice())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &**self)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
