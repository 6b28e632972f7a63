//! `kernels/embedding.cu`: rows of a table by id, the tokens' order by id, and the table's gradient.
//!
//! `y_t = W[id_t]`, NaN where the id is not in `0 … V − 1`. `dW_v (+)= Σ dy_t` over the tokens with id v, t ascending. The
//! tokens are sorted by id a byte at a time: [`EmbeddingOrder`] gives the bytes, `dispatch_choices` their stable order.

use super::cost::Cost;
use super::{In, Out, host_function, kernel};
use half::bf16;

kernel! {
    /// `y_t = W[id_t]`, assigned.
    pub struct EmbeddingForward = embedding_forward {
        /// `[T, D]`.
        y: Out<'a, bf16> [tokens * hidden];
        /// `[V, D]`.
        w: In<'a, bf16> [vocabulary * hidden];
        /// `[T]`.
        ids: In<'a, i32> [tokens];
        /// T.
        tokens: usize;
        /// V.
        vocabulary: usize;
        /// D.
        hidden: usize;
    }
}

impl EmbeddingForward<'_> {
    /// Of so many rows, each of a table of which every row, or as many as there are, is read.
    pub fn cost(rows: usize, table_rows: usize, hidden: usize) -> Cost {
        Cost::new(0, 2 * hidden * (rows + rows.min(table_rows)) + 4 * rows)
    }
}

kernel! {
    /// `order_i = i`, or `previous[row_token_i]`; `keys_i` the key of the token `order_i`: its id, or V where that is not in
    /// the table, shifted by `shift` bits, of it the lowest 8 unless `whole`. Assigned.
    pub struct EmbeddingOrder = embedding_order {
        /// `[T]`.
        order: Out<'a, i32> [tokens];
        /// `[T]`.
        keys: Out<'a, i32> [tokens];
        /// The order so far, `[T]`.
        previous: Option<In<'a, i32>> [tokens];
        /// A sort of it, `[T]`.
        row_token: Option<In<'a, i32>> [tokens];
        /// `[T]`.
        ids: In<'a, i32> [tokens];
        /// T.
        tokens: usize;
        /// V.
        vocabulary: usize;
        /// Bits that a key is shifted right by.
        shift: usize;
        /// Whether a key keeps all its bits, or the lowest 8.
        whole: bool;
    }
}

impl EmbeddingOrder<'_> {
    /// Calls for a vocabulary: one for each byte of an id, and one for the whole ids.
    pub fn calls(vocabulary: usize) -> usize {
        // V stands for an id that is not in the table.
        let bits = usize::BITS - vocabulary.leading_zeros();
        bits.div_ceil(8) as usize + 1
    }

    /// Of one call.
    pub fn cost(tokens: usize) -> Cost {
        Cost::new(0, 16 * tokens)
    }
}

kernel! {
    /// `dW_v (+)= Σ dy_t` over the tokens with id v.
    pub struct EmbeddingGradient = embedding_gradient {
        /// `[V, D]`, assigned, or added to.
        dw: Out<'a, f32> [vocabulary * hidden];
        /// [`workspace`] floats.
        parts: Out<'a, f32> => workspace(tokens, hidden);
        /// `[T, D]`.
        dy: In<'a, bf16> [tokens * hidden];
        /// The tokens by id, `[T]`.
        order: In<'a, i32> [tokens];
        /// Their ids in that order, `[T]`.
        keys: In<'a, i32> [tokens];
        /// T.
        tokens: usize;
        /// V.
        vocabulary: usize;
        /// D.
        hidden: usize;
        /// Whether `dw` is added to, or assigned.
        accumulate: bool;
    }
}

impl EmbeddingGradient<'_> {
    /// When the tokens have as many different ids as they can.
    pub fn cost(tokens: usize, vocabulary: usize, hidden: usize, accumulate: bool) -> Cost {
        let met = 4 * tokens.min(vocabulary) * hidden;
        let rest = if accumulate {
            met
        } else {
            4 * vocabulary * hidden
        };
        Cost::new(0, 2 * tokens * hidden + met + 8 * tokens + rest)
    }
}

host_function! {
    /// Floats of `parts`.
    pub fn workspace = embedding_parts(tokens: usize, hidden: usize) -> u64
}
