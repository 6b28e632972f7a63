//! The arena from which blocks of a device's memory are allocated.
//!
//! It rarely requests memory from the device, in large chunks, and allocates blocks from these. A block is placed in
//! the smallest free range that is large enough; of equal ranges, in the one with the lowest address. A freed block
//! is merged with its free neighbours. The address of a new block depends only on which blocks are allocated. A step
//! that begins with the same blocks as the last step therefore gets the same addresses, and a captured graph of the
//! step can be replayed.

use std::collections::BTreeMap;

/// Blocks begin at multiples of this: vector loads and bulk copies need 128, cuBLAS 256.
pub const ALIGNMENT: usize = 256;

/// Free ranges of the chunks.
pub struct Arena {
    /// Address and size in bytes of each free range; no two ranges are adjacent.
    free: BTreeMap<usize, usize>,
    chunks: BTreeMap<usize, usize>,
    used: usize,
    peak: usize,
}

/// Returns the number of bytes that the arena uses for a block of `bytes` bytes.
pub fn block_bytes(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGNMENT)
}

impl Arena {
    /// Creates an arena without memory.
    pub const fn new() -> Self {
        Arena {
            free: BTreeMap::new(),
            chunks: BTreeMap::new(),
            used: 0,
            peak: 0,
        }
    }

    /// Adds a chunk of memory. Blocks do not span two chunks.
    pub fn grow(&mut self, address: usize, bytes: usize) {
        assert!(address % ALIGNMENT == 0 && bytes % ALIGNMENT == 0);
        self.chunks.insert(address, bytes);
        self.free.insert(address, bytes);
    }

    /// Allocates a block and returns its address, if a free range is large enough.
    pub fn take(&mut self, bytes: usize) -> Option<usize> {
        let bytes = block_bytes(bytes);
        let fits = self.free.iter().filter(|(_, size)| **size >= bytes);
        let (&address, &size) = fits.min_by_key(|(address, size)| (**size, **address))?;
        self.free.remove(&address);
        if size > bytes {
            self.free.insert(address + bytes, size - bytes);
        }
        self.used += bytes;
        self.peak = self.peak.max(self.used);
        Some(address)
    }

    /// Frees a block that [`take`](Self::take) returned for the same number of bytes.
    pub fn give(&mut self, address: usize, bytes: usize) {
        let mut size = block_bytes(bytes);
        let mut start = address;
        self.used -= size;
        if let Some((&before, &length)) = self.free.range(..start).next_back()
            && before + length == start
            && !self.chunks.contains_key(&start)
        {
            self.free.remove(&before);
            (start, size) = (before, length + size);
        }
        let end = start + size;
        if !self.chunks.contains_key(&end)
            && let Some(after) = self.free.remove(&end)
        {
            size += after;
        }
        self.free.insert(start, size);
    }

    /// Returns the address and size in bytes of each free range.
    pub fn free_ranges(&self) -> &BTreeMap<usize, usize> {
        &self.free
    }

    /// Returns the peak number of bytes of allocated blocks.
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// Resets the peak to the current number of bytes.
    pub fn forget_peak(&mut self) {
        self.peak = self.used;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena(chunks: &[(usize, usize)]) -> Arena {
        let mut arena = Arena::new();
        chunks
            .iter()
            .for_each(|&(address, bytes)| arena.grow(address, bytes));
        arena
    }

    #[test]
    fn a_block_is_allocated_from_the_smallest_range_that_fits_and_the_lowest_of_equal_ones() {
        let mut a = arena(&[(0, 1024), (4096, 512), (8192, 512)]);
        assert_eq!(a.take(300), Some(4096));
        assert_eq!(a.take(512), Some(8192));
        assert_eq!(a.take(600), Some(0));
        assert_eq!(a.take(512), None);
        assert_eq!(a.take(256), Some(768));
        assert_eq!(a.take(1), None);
        assert_eq!(a.peak(), 2048);
    }

    #[test]
    fn freed_blocks_merge_with_their_neighbours_but_not_across_chunks() {
        let mut a = arena(&[(0, 1024), (1024, 1024)]);
        let blocks: Vec<usize> = (0..8).map(|_| a.take(256).unwrap()).collect();
        assert_eq!(a.take(1), None);
        for i in [1, 3, 2, 0, 7, 5, 4, 6] {
            a.give(blocks[i], 200);
        }
        assert_eq!(a.free, BTreeMap::from([(0, 1024), (1024, 1024)]));
        assert_eq!(a.take(1025), None, "a block across two chunks");
        assert_eq!(a.take(1024), Some(0));
    }

    #[test]
    fn blocks_never_overlap_and_equal_steps_get_equal_addresses() {
        let mut a = arena(&[(1 << 20, 1 << 20)]);
        let mut kept = Vec::new();
        let mut step = |a: &mut Arena, keep: bool| -> Vec<usize> {
            let (mut live, mut seen) = (Vec::new(), Vec::new());
            let mut state = 7u64;
            for _ in 0..400 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                if state >> 63 == 0 && !live.is_empty() {
                    let (address, bytes) = live.swap_remove((state >> 33) as usize % live.len());
                    a.give(address, bytes);
                } else {
                    let bytes = (state >> 40) as usize % 5000 + 1;
                    let address = a.take(bytes).unwrap();
                    assert!(live.iter().chain(&kept).all(|&(other, size)| {
                        address + bytes <= other || other + size <= address
                    }));
                    seen.push(address);
                    live.push((address, bytes));
                }
            }
            for (i, (address, bytes)) in live.into_iter().enumerate() {
                if keep && i % 3 == 0 {
                    kept.push((address, bytes));
                } else {
                    a.give(address, bytes);
                }
            }
            seen
        };
        step(&mut a, true);
        let second = step(&mut a, false);
        assert_eq!(second, step(&mut a, false));
        assert_eq!(second, step(&mut a, false));
    }
}
