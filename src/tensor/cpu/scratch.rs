//! Working memory inside operations.

use crate::device::Memory;
use crate::tensor::dtype::Real;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A slice whose elements are unspecified until written, from the memory pool of tensors. Repeated allocations cause
/// neither page faults nor zeroing.
pub struct Scratch<T> {
    memory: Memory,
    element: PhantomData<T>,
}

impl<T: Real> Scratch<T> {
    /// Allocates `n` elements.
    pub fn new(n: usize) -> Self {
        Scratch {
            memory: Memory::unspecified(n * size_of::<T>()),
            element: PhantomData,
        }
    }
}

impl<T: Real> Deref for Scratch<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(self.memory.bytes())
    }
}

impl<T: Real> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.memory.bytes_mut())
    }
}
