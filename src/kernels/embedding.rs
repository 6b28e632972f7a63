//! `kernels/embedding.cu`: rows of a table by id, the tokens' order by id, and the table's gradient.
//!
//! `y_t = W[id_t]`, NaN where the id is not in `0 … V − 1`. `dW_v (+)= Σ dy_t` over the tokens with id v, t
//! ascending. The tokens are sorted by id a byte at a time: [`EmbeddingOrder`] computes the bytes, `dispatch_choices`
//! sorts them stably.

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
        /// T, the number of tokens.
        tokens: usize;
        /// V, the size of the vocabulary.
        vocabulary: usize;
        /// D, the width of the model.
        hidden: usize;
    }
}

impl EmbeddingForward<'_> {
    /// The cost for `rows` tokens whose ids name as many different rows of a table of `table_rows` rows as possible.
    pub fn cost(rows: usize, table_rows: usize, hidden: usize) -> Cost {
        Cost::new(0, 2 * hidden * (rows + rows.min(table_rows)) + 4 * rows)
    }
}

kernel! {
    /// Assigns `order_i = i`, or `previous[row_token_i]` if given, and `keys_i`, the key of the token `order_i`. The
    /// key is the token's id, or V if the id is not in the table, shifted right by `shift` bits, and reduced to its
    /// lowest 8 bits unless `whole`.
    pub struct EmbeddingOrder = embedding_order {
        /// `[T]`.
        order: Out<'a, i32> [tokens];
        /// `[T]`.
        keys: Out<'a, i32> [tokens];
        /// The order of the tokens after the previous call, `[T]`.
        previous: Option<In<'a, i32>> [tokens];
        /// A sort of `previous`, `[T]`.
        row_token: Option<In<'a, i32>> [tokens];
        /// `[T]`.
        ids: In<'a, i32> [tokens];
        /// T, the number of tokens.
        tokens: usize;
        /// V, the size of the vocabulary.
        vocabulary: usize;
        /// Number of bits by which a key is shifted right.
        shift: usize;
        /// Whether a key keeps all its bits; otherwise it keeps the lowest 8.
        whole: bool;
    }
}

impl EmbeddingOrder<'_> {
    /// Returns the number of calls for a vocabulary: one for each byte of an id, and one for the complete ids.
    pub fn calls(vocabulary: usize) -> usize {
        // V represents an id that is not in the table.
        let bits = usize::BITS - vocabulary.leading_zeros();
        bits.div_ceil(8) as usize + 1
    }

    /// The cost of one call.
    pub fn cost(tokens: usize) -> Cost {
        Cost::new(0, 16 * tokens)
    }
}

kernel! {
    /// `dW_v (+)= Σ dy_t` over the tokens with id v.
    pub struct EmbeddingGradient = embedding_gradient {
        /// `[V, D]`, assigned, or added to.
        dw: Out<'a, f32> [vocabulary * hidden];
        /// [`workspace`] f32 elements.
        parts: Out<'a, f32> => workspace(tokens, hidden);
        /// `[T, D]`.
        dy: In<'a, bf16> [tokens * hidden];
        /// The tokens, sorted by id, `[T]`.
        order: In<'a, i32> [tokens];
        /// The ids of the tokens in that order, `[T]`.
        keys: In<'a, i32> [tokens];
        /// T, the number of tokens.
        tokens: usize;
        /// V, the size of the vocabulary.
        vocabulary: usize;
        /// D, the width of the model.
        hidden: usize;
        /// Whether to add to `dw` instead of assigning it.
        accumulate: bool;
    }
}

impl EmbeddingGradient<'_> {
    /// The cost when the tokens have as many different ids as possible.
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
    /// Number of f32 elements of `parts`.
    pub fn workspace = embedding_parts(tokens: usize, hidden: usize) -> u64
}
