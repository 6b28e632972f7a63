//! Host buffers for kernels: poisoned at birth, between two guard bands that a kernel must leave as they are.

use bytemuck::Pod;
use std::marker::PhantomData;

const GUARD_BYTES: usize = 4096;
const GUARD: u8 = 0xA5;
/// A NaN in bf16 and f32, −1 in integers.
pub const POISON: u8 = 0xFF;
const ALIGNMENT: usize = 128;

/// `len` elements, 128-byte aligned.
pub struct Guarded<T> {
    bytes: Vec<u8>,
    first: usize,
    size: usize,
    kind: PhantomData<T>,
}

impl<T: Pod> Guarded<T> {
    pub fn poisoned(len: usize) -> Self {
        let size = len * size_of::<T>();
        let mut bytes = vec![GUARD; GUARD_BYTES + ALIGNMENT + size + GUARD_BYTES];
        let start = bytes.as_ptr() as usize + GUARD_BYTES;
        let first = GUARD_BYTES + start.next_multiple_of(ALIGNMENT) - start;
        bytes[first..first + size].fill(POISON);
        Self {
            bytes,
            first,
            size,
            kind: PhantomData,
        }
    }

    pub fn from_slice(values: &[T]) -> Self {
        let mut buffer = Self::poisoned(values.len());
        buffer.as_mut_slice().copy_from_slice(values);
        buffer
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[self.first..self.first + self.size]
    }

    pub fn as_slice(&self) -> &[T] {
        bytemuck::cast_slice(self.as_bytes())
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.bytes[self.first..self.first + self.size])
    }

    pub fn as_ptr(&self) -> *const T {
        self.as_slice().as_ptr()
    }

    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.as_mut_slice().as_mut_ptr()
    }

    /// Panics when a byte outside the buffer changed.
    pub fn check_guards(&self, name: &str) {
        let end = self.first + self.size;
        let outside = (0..self.first).chain(end..self.bytes.len());
        for at in outside {
            let from_start = at as i64 - self.first as i64;
            assert!(
                self.bytes[at] == GUARD,
                "{name}: the byte {from_start} from its start was overwritten"
            );
        }
    }
}
